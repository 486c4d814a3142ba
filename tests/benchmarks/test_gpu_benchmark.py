"""python -m benchmarks gpu without a GPU: its arithmetic, its order, its JSON and its errors. Our
kernels and PyTorch run on the host, at tiny sizes, and the times are made up."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cases import case as named

from benchmarks import __main__ as command
from benchmarks.speed import workloads
from benchmarks.speed.gpu import cases, comparison, device, run, timing
from benchmarks.speed.gpu.goals import goals
from benchmarks.speed.torch_filter import TorchFilter
from runtime.device.driver import cuda_absence
from runtime.errors import DeviceError, InputError

torch = pytest.importorskip("torch", reason="the peers need PyTorch")
pytestmark = pytest.mark.skipif(not cuda_absence(), reason="there is a GPU")
ROOT = Path(__file__).parents[2]


class Host(device.Gpu):
    """The host in a GPU's place; every run takes a millisecond more than the last."""

    name = "cpu"

    def __init__(self):
        self.torch, self.clock, self.bursts = torch, itertools.count(1), 0

    def stream(self):
        return None

    def time(self, run, after=None, *, ahead=False):
        run()
        self.bursts += ahead
        if after is not None:
            after()
        now = float(next(self.clock))
        return now, now + 0.5

    def record(self, step):
        step()
        return step

    def peak(self, make):
        return make(), {"torch": 1.0, "others": 2.0}

    def clean(self):
        pass

    def describe(self):
        return {"name": "the host"}


@pytest.fixture
def host(cuda, monkeypatch):
    """Our module runs on the host with few channels, its clock shows 0.5 ms, and the compiler
    returns its argument. PyTorch has one thread: on tiny arrays several threads are far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module, sizes in (
        (comparison, {"COPY": 2**10, "MATRIX": 8, "BURST": 2}),
        (timing, {"MOST": 2, "LEAST": 1}),
        (cases, {"SETS": 2}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    find, ours = cases.find_case, cases.ours

    def narrow(name):
        case = find(name)
        return case._replace(options=case.options | {"channels": 6})

    monkeypatch.setattr(cases, "find_case", narrow)
    monkeypatch.setattr(cases, "ours", lambda *a: ours(*a)._replace(clock=lambda: 0.5))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", comparison.nothing)
    yield Host()
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False


SMALL = {
    "guided filter, 1": lambda *a: cases.filter_case(*a, (11, 13), (11, 13), 1),
    "guided filter, 3": lambda *a: cases.filter_case(*a, (7, 5), (7, 5), 3),
    "joint upsampling": lambda *a: cases.filter_case(*a, (12, 20), (3, 5), 2),
    "bilinear upsampling": lambda *a: cases.upsample_case(*a, (12, 20), (3, 5), False),
    "guided upsampling": lambda *a: cases.upsample_case(*a, (12, 20), (3, 5), True),
    "residual": lambda *a: cases.steps_case(*a, "residual 5x7", 2),
    "dynaguide": lambda *a: cases.steps_case(*a, "dynaguide 5x7", 2),
}


def test_peers_agree(host):
    for name, make in SMALL.items():
        case = make(host, name, True)
        found = timing.measure(case)
        who = [f"{who} {precision}".strip() for who, precision in case.peers]
        wanted = ["ours", "torch eager", "torch compiled", "copy"]
        if name in ("residual", "dynaguide"):
            how = ("eager", "graph", "graph, channels last", "compiled", "compiled, graph")
            torchs = [f"torch {h} {p}" for h in how for p in ("fp32", "tf32", "fp16")]
            products = ["matmul fp32", "matmul tf32", "matmul fp16"]
            wanted = ["ours fp32", "ours fp16", *torchs, "copy", *products]
        with named(name):
            assert case.left_out == case.wrong == [] and who == wanted
            assert [(row["who"], row["precision"]) for row in found] == list(case.peers)
            assert all(len(row["samples"]["device ms"]) == timing.MOST for row in found)


def test_steps_without_waits_equal_the_twins(host):
    """Without the waits a step computes the same."""
    from benchmarks.speed.torch_twin import Twin

    case = cases.find_case("dynaguide 12x16")
    image, hard, _ = workloads.picture(12, 16)
    plain = workloads.refiner(case)
    arguments = (plain.options, plain.state_dict(), image, hard, torch.float32)
    for precision, close in (("fp32", 1e-4), ("tf32", 1e-4), ("fp16", 3e-2)):
        twin, loop = Twin(*arguments), cases.Loop(Twin(*arguments), torch, precision)
        losses, wanted = [], []
        for _ in range(3):
            loop.step()
            losses.append(loop.last.item())
            wanted.append(twin.step()[0][0])
            twin.step_count = 10  # keep the mapping of the first step
        with named(precision):
            np.testing.assert_allclose(losses, wanted, rtol=close)
            assert (losses != wanted) == (precision == "fp16")
            loop.restore()
            loop.step()
            assert loop.last.item() == losses[0]


def test_a_peer_that_differs_or_fails_is_left_out(host, capsys):
    case = comparison.Case(host, "work")
    case.add("ours", lambda: comparison.Peer(comparison.nothing, (np.ones(3),)))
    case.add("torch eager", lambda: comparison.Peer(comparison.nothing, (np.full(3, 1.001),)))
    case.add("torch compiled", lambda: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    assert list(case.peers) == [("ours", "")] and len(case.left_out) == 2
    assert case.wrong == [
        "work: torch eager : its result differs from that of our first peer: 0.001 of 1"
    ]  # fmt: skip
    assert case.left_out[1]["why"] == "RuntimeError: no compiler\nat all"
    assert "left out: torch compiled : RuntimeError: no compiler\n" in capsys.readouterr().out

    def full():
        raise DeviceError("memory is full")

    case.add("ours", full, "fp16")
    assert case.wrong[1] == "work: ours fp16: DeviceError: memory is full"
    with pytest.raises(DeviceError, match="memory is full"):
        comparison.Case(host, "work").add("ours", full)


@pytest.fixture
def mocked():
    """The real Gpu with a mock of torch.cuda, which has the names of the real one."""
    made = device.Gpu()
    made.cuda = mock.MagicMock(spec=torch.cuda)
    for name in ("Event", "Stream", "CUDAGraph", "current_stream"):
        real = torch.cuda.Stream if name == "current_stream" else getattr(torch.cuda, name)
        getattr(made.cuda, name).return_value = mock.Mock(spec=real)
    return made


def test_the_calls_of_torch_cuda(mocked):
    cuda = mocked.cuda
    event = cuda.Event.return_value
    event.elapsed_time.return_value = 2.5
    seen = []
    cuda.synchronize.side_effect = lambda: seen.append("wait")
    cuda._sleep.side_effect = lambda cycles: seen.append("sleep")
    event.record.side_effect = lambda: seen.append("event")
    ways = mocked.time(lambda: seen.append("run"), lambda: seen.append("after"), ahead=True)
    assert seen == ["wait", "sleep", "event", "run", "event", "after", "wait"]
    assert ways[0] == 2.5 and ways[1] > 0
    assert mocked.time(comparison.nothing)[0] == 2.5 and seen.count("sleep") == 1

    cuda.current_stream.return_value.cuda_stream = 77
    assert mocked.stream() == 77
    steps = []
    replay = mocked.record(lambda: steps.append(1))
    assert replay is cuda.CUDAGraph.return_value.replay and len(steps) == 4
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)

    cuda.memory_allocated.return_value = 2**20
    cuda.max_memory_allocated.return_value = 5 * 2**20
    cuda.memory_reserved.return_value = 6 * 2**20
    cuda.mem_get_info.side_effect = [(90 * 2**20, 100 * 2**20), (88 * 2**20, 100 * 2**20)]
    assert mocked.peak(lambda: "made") == ("made", {"torch": 4.0, "others": 2.0})


def test_the_gpu_is_described(mocked, cuda):
    found = mocked.cuda.get_device_properties.return_value
    found.name, found.major, found.minor, found.L2_cache_size = "A GPU", 9, 0, 2**25
    found.multi_processor_count, found.total_memory = 132, 2**33
    told = json.loads(json.dumps(mocked.describe()))
    assert (told["name"], told["compute_capability"], told["l2_bytes"]) == ("A GPU", "9.0", 2**25)
    assert told["torch"] == torch.__version__ and told["module_architectures"]


def test_differences():
    ones, labels = np.ones((2, 3)), np.arange(2000)
    assert comparison.difference((ones, labels), (ones, labels), 1e-4) == ""
    assert comparison.difference((ones + 5e-5,), (ones,), 1e-4) == ""
    assert comparison.difference((ones * np.nan,), (ones,), 1e-4) == "nan of 1"
    assert comparison.difference((ones[:1],), (ones,), 1e-4) == "shape (1, 3), not (2, 3)"
    few = labels.copy()
    few[0] = 7
    assert comparison.difference((few,), (labels,), 1e-4) == ""
    assert comparison.difference((labels[::-1],), (labels,), 1e-4) == "100.00% of the labels"


def test_turn_by_turn(host):
    seen = []
    case = comparison.Case(host, "work")
    for who in ("ours", "torch eager", "copy"):
        case.peers[who, ""] = comparison.Peer(lambda who=who: seen.append(who))
        case.memory[who, ""] = {}
    timing.measure(case)
    assert seen == ["ours", "torch eager", "copy"] * (timing.WARM + timing.MOST)


def test_a_case_ends_when_its_time_is_up(host, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    case = comparison.Case(host, "work")
    case.peers["copy", ""] = comparison.Peer(comparison.nothing)
    (row,) = timing.measure(case)
    assert len(row["samples"]["wall ms"]) == timing.LEAST < timing.MOST


def test_the_time_of_a_turn(host):
    calls = []
    burst = comparison.Peer(lambda: calls.append(1), burst=4)
    assert timing.turn(host, burst, "") == (1 / 4, 2.5)
    assert len(calls) == 5 and host.bursts == 1
    steps = comparison.Peer(
        lambda: calls.append("steps"),
        before=lambda: calls.append("before"),
        after=lambda: calls.append("after"),
    )
    assert timing.turn(host, steps, "tf32") == (3.0, 3.5)
    assert calls[5:] == ["before", "steps", "after"]
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    assert timing.turn(host, comparison.Peer(comparison.nothing, clock=lambda: 0.25), "fp32") == (
        0.25,
        4.5,
    )
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_arithmetic(host):
    case = comparison.Case(host, "work", bytes=1e6, operations=512.0, steps=10)
    keys = [("ours", "fp32"), ("torch eager", "fp32"), ("copy", ""), ("matmul", "fp32")]
    case.memory = {key: {} for key in keys}
    taken = {key: [(ms, 9.0)] * 7 for key, ms in zip(keys, (2.0, 8.0, 0.5, 0.25), strict=True)}
    taken["ours", "fp32"] = [(ms, 9.0) for ms in (1.0, 3.0, 2.0, 2.0, 2.0, 9.0, 1.0)]
    ours, eager, copy, matmul = timing.rows(case, taken)
    assert (ours["device ms"], ours["wall ms"], ours["ms/step"]) == (2.0, 9.0, 0.2)
    assert copy["GB/s"] == pytest.approx(2 * 2**10 / 0.5e-3 / 1e9)
    assert ours["of copy"] == pytest.approx(1e6 / 2e-3 / 1e9 / copy["GB/s"])
    assert matmul["TFLOP/s"] == pytest.approx(2 * 8**3 / 0.25e-3 / 1e12)
    assert ours["of matmul"] == pytest.approx(512 / 2e-3 / 1e12 / matmul["TFLOP/s"])
    assert (eager["x ours"], ours["x ours"]) == (4.0, 1.0)
    assert ours["samples"]["device ms"] == [1.0, 3.0, 2.0, 2.0, 2.0, 9.0, 1.0]
    assert ours["statistics"]["device"]["percentiles"]["p50"]["value"] == 2.0


def row(who, precision="", **values):
    return {"who": who, "precision": precision} | values


def test_goals():
    found = [row("ours", **{"of copy": 0.62}), row("torch eager", **{"x ours": 4.9})]
    first, second = goals("guided filter, 1, 1080x1920", found)
    assert first == {
        "goal": "guided filter, 1, 1080x1920: of copy >= 0.5",
        "value": 0.62,
        "met": True,
    }
    assert (second["value"], second["met"]) == (4.9, False)
    found = [
        row("ours", "fp32", **{"device ms": 30.0, "ms/step": 2.4}),
        row("torch eager", "fp32", **{"x ours": 4.0}),
        row("torch graph", "fp32", **{"x ours": 3.0}),
        row("torch compiled, graph", "fp32", **{"x ours": 1.9}),
        row("torch graph", "tf32", **{"x ours": 9.0}),
        row("torch graph, channels last", "fp16", **{"x ours": 8.0}),
        row("torch eager", "tf32", **{"x ours": 9.5}),
    ]
    told = {g["goal"]: (g["value"], g["met"]) for g in goals("dynaguide 321x481", found)}
    assert told == {
        "dynaguide 321x481: fp32, ms/step <= 2.5": (2.4, True),
        "dynaguide 321x481: fp32, x torch eager >= 4": (4.0, True),
        "dynaguide 321x481: fp32, x best graphed or compiled torch >= 2": (1.9, False),
        "dynaguide 321x481: fp16, ms/step <= 0.6": (None, None),
        "dynaguide 321x481: fp16, x torch eager >= 4": (9.5, True),
        "dynaguide 321x481: fp16, x best graphed or compiled torch >= 2": (8.0, True),
    }
    assert len(goals("residual 180x240, 10 steps", [])) == 6
    assert goals("bilinear upsampling, 14", []) == []


def test_cases_are_what_their_names_say():
    with_goals = [name for name in run.CASES if goals(name, [])]
    assert len(with_goals) == 4
    for name in run.CASES:
        if "steps" in name:
            size, steps = name.rsplit(",", 1)
            assert cases.find_case(size) and steps == f" {cases.STEPS[size.split()[0]]} steps"


@pytest.fixture
def told(host, monkeypatch):
    """The command line with a GPU that is the host."""
    monkeypatch.setattr(run, "find_gpu", lambda: host)
    monkeypatch.setattr(
        run, "CASES", {k: SMALL[k] for k in ("guided filter, 3", "bilinear upsampling")}
    )


def test_the_document(told, tmp_path, capsys):
    for compiled in (False, True):
        out = tmp_path / "new" / f"folder {compiled}"
        assert command.main(["gpu", "-o", str(out), *["--compiled"] * compiled]) == 0
        (path,) = out.iterdir()
        document, printed = json.loads(path.read_text()), capsys.readouterr().out
        with named("compiled" if compiled else "not compiled"):
            assert path.name == ("gpu-compiled.json" if compiled else "gpu.json")
            assert document["complete"] and document["failed"] == document["wrong"] == []
            assert document["command"][:5] == ["python", "-m", "benchmarks", "gpu", "-o"]
            keys = {"commit", "sources", "date", "gpu", "machine", "before", "after"}
            assert keys <= set(document)
            assert {row["case"] for row in document["rows"]} == set(run.CASES)
            assert ("torch compiled" in {row["who"] for row in document["rows"]}) == compiled
            assert all(len(row["samples"]["device ms"]) == timing.MOST for row in document["rows"])
            assert [g["goal"] for g in document["goals"]] == [
                "guided filter, 3: of copy >= 0.5",
                "guided filter, 3: x torch eager >= 5",
            ]
            assert "1 of 2: guided filter, 3\n" in printed and "NOT MET" in printed


def test_a_case_that_fails_is_reported_and_the_rest_is_measured(told, tmp_path, monkeypatch):
    def broken(*_):
        raise DeviceError("lost")

    monkeypatch.setitem(run.CASES, "guided filter, 3", broken)
    assert command.main(["gpu", "-o", str(tmp_path)]) == 1
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["failed"] == ["guided filter, 3: DeviceError: lost"]
    assert {row["case"] for row in document["rows"]} == {"bilinear upsampling"}


def test_a_result_that_differs_has_an_exit_code_of_its_own(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TorchFilter, "apply", lambda self, coefficients, guide: guide)
    assert command.main(["gpu", "-o", str(tmp_path), "--only", "filter"]) == 3
    assert "differs from that of our first peer: shape (7, 5, 3)" not in capsys.readouterr().err
    monkeypatch.setattr(TorchFilter, "apply", lambda self, c, guide: c[0])
    assert command.main(["gpu", "-o", str(tmp_path), "--only", "filter"]) == 3
    assert "torch eager : its result differs from that of our" in capsys.readouterr().err
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["who"] for row in document["rows"]} == {"ours", "copy"} and document["complete"]


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match="no case's name contains 'none': guided filter, 1"):
        run.main(["-o", str(tmp_path), "--only", "none"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is no folder to write to"):
        run.main(["-o", str(tmp_path / "file")])


def test_without_a_gpu_it_says_why(tmp_path, monkeypatch, capsys):
    def answer():
        assert command.main(["gpu", "-o", str(tmp_path)]) == 4
        return capsys.readouterr().err

    assert "error: no GPU to measure: " in answer()
    monkeypatch.setattr(device, "module_of", lambda device: None)
    assert f"error: PyTorch {torch.__version__} sees no GPU" in answer()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "error: PyTorch and SciPy are needed, but " in answer()
    assert list(tmp_path.iterdir()) == []


def test_nvidia_smi_is_read_if_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.nvidia_smi() == {}
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'A GPU, 580.1, P0, 345 MHz, 2619 MHz, 1980 MHz'\n")
    smi.chmod(0o755)
    told = device.nvidia_smi()
    assert (told["name"], told["driver_version"], told["clocks.sm"]) == (
        "A GPU",
        "580.1",
        "345 MHz",
    )


def test_the_check_says_of_each_phase_why_it_cannot(tmp_path):
    """gpu_check.sh without a GPU builds nothing, reports every phase, and ends."""
    script = ROOT / "benchmarks/speed/gpu_check.sh"
    done = subprocess.run(
        ["bash", script, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 1, done.stderr
    document = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert document["ok"] is False and document["complete"]
    phases = {phase["name"]: phase for phase in document["phases"]}
    assert list(phases) == [
        *("requirements", "build", "tests", "benchmarks", "memcheck", "racecheck", "initcheck"),
        "compiled",
    ]
    for name in ("requirements", "build", "tests", "benchmarks"):
        assert phases[name]["result"] == "failed" and "GPU" in phases[name]["log"]
    for phase in phases.values():
        assert phase["result"] in ("failed", "skipped") and phase["log"]
        assert 0 <= phase["seconds"] <= phase["limit"]


def test_the_check_wants_a_folder(tmp_path):
    script = ROOT / "benchmarks/speed/gpu_check.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: benchmarks/speed/gpu_check.sh FOLDER" in done.stderr
    environment = os.environ | {"PYTHON": str(tmp_path / "none")}
    command = ["bash", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "no Python 3.10 or newer" in done.stderr
    assert json.loads((tmp_path / "gpu_check.json").read_text())["ok"] is False
