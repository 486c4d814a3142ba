"""The command `benchmarks latency`: measuring, writing, interrupts and failures."""

import json
import lzma
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from latency_parts import PICTURE

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import compare, reading, run
from benchmarks.latency import document as documents
from runtime.core.config import PRESETS
from runtime.errors import InputError
from sdk import RefineConfig
from sdk.image import encode_image

HERE = Path(__file__).parents[2]


def test_a_folder_that_is_no_bundle_is_not_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "large").write_text("large")
    monkeypatch.setattr(run, "measure", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert command.main(["latency", str(tmp_path)]) == 5
    assert "is no bundle: it has no manifest.json" in capsys.readouterr().err


def test_missing_packages_are_named_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "measure", None)
    for name in ("scipy", "matplotlib"):
        with monkeypatch.context() as without:
            for module in [m for m in sys.modules if m.partition(".")[0] == name]:
                without.setitem(sys.modules, module, None)
            assert command.main(["latency", "-o", str(tmp_path)]) == 4, name
        assert f"needs {name}" in capsys.readouterr().err


def samples_of(folder):
    """The samples of each row, from the file beside the document."""
    packed = (folder / "latency.raw.json.xz").read_bytes()
    return json.loads(lzma.decompress(packed))["rows"]


def test_the_document_holds_what_was_measured(measured):
    document, raw = reading.load(measured / "latency.json"), samples_of(measured)
    names = [r["name"] for r in document["rows"]]
    assert len(names) == 6 and names[1] == "paced 20/s, 0 steps, 1 thread"
    assert not document["partial"] and document["picture"] == [48, 64, 1]
    assert {"cpu", "commit", "before", "after", "governors"} <= set(document["environment"])
    assert document["environment"]["before"]["load_average"] is not None
    for found, beside in zip(document["rows"], raw, strict=True):
        n = found["summary"]["n"]
        stages = beside["stages_ms"]
        assert n == len(found["total_ms"]) == len(beside["start_s"]) > 0
        assert beside["name"] == found["name"] and beside["total_ms"] == found["total_ms"]
        for stage, times in stages.items():
            assert found["stage_p50_ms"][stage] == round(np.median(times), 3)
            ordered = np.sort(times)
            assert found["stage_percentiles_ms"][stage] == {
                "p50": round(ordered[-(-n // 2) - 1], 3),
                "p90": round(ordered[-(-9 * n // 10) - 1], 3),
            }
        assert not any(name in found for name in documents.RAW)
        np.testing.assert_allclose(
            np.sum([v for v in stages.values()], 0), found["total_ms"], rtol=1e-9
        )
        assert np.min(np.divide(stages["unaccounted"], found["total_ms"])) < 0.2
        assert set(beside["steps_done"]) == {found["steps"]}
        assert found["load_ms"] >= 0 and found["first_ms"] > 0
        assert found["quality"] == {"what": "not measured"}
    shortest = min(np.median(r["stages_ms"]["decode"]) for r in raw if "decode" in r["stages_ms"])
    told = document["overhead"]
    assert 0 < told["ms_a_stage"] < 0.1 and told["of"].startswith("decode")
    assert told["share"] == pytest.approx(told["ms_a_stage"] / shortest)


def test_a_run_on_a_gpu_has_two_clocks(cuda, tmp_path):
    """The kernels run on the host here; its clock plays that of a GPU."""
    (tmp_path / "picture.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = ["latency", "--picture", str(tmp_path / "picture.png"), "--refine", "0,1"]
    argv += ["--device", "cuda", "--duration", "0.5", "--threads", "1", "-o", str(tmp_path)]
    assert command.main(argv) == 0
    document = reading.load(tmp_path / "latency.json")
    assert document["device_time"].startswith("device time: CUDA events around preprocess")
    plain, refined = (r for r in samples_of(tmp_path) if r["name"].startswith("back-to-back"))
    told = document["rows"][[r["name"] for r in document["rows"]].index(refined["name"])]
    assert set(plain["device_ms"]) == {"preprocess", "filter"}
    assert set(refined["device_ms"]) == {"preprocess", "refine", "filter"}
    for stage, times in refined["device_ms"].items():
        assert len(times) == told["summary"]["n"]
        median = told["stage_p50_ms"][f"{stage}, device time"]
        assert 0 < median == round(np.median(times), 3) <= max(times)
        assert (np.array(times) <= refined["stages_ms"][stage]).all()
    assert "refine, device time" in (tmp_path / "latency.md").read_text()


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    code = (
        "import sys\n"
        "from benchmarks import __main__ as command\n"
        "from benchmarks.latency import modes\n"
        "real = modes.back_to_back\n"
        "def telling(row, seg, pictures, seconds, tell):\n"
        "    def told(now):\n"
        "        tell(now)\n"
        "        if len(row.total_ms) == 5:\n"
        "            print('measuring', file=sys.stderr, flush=True)\n"
        "    real(row, seg, pictures, seconds, told)\n"
        "modes.RUN['back-to-back'] = telling\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    argv = ["-c", code, "latency", "--imgsz", "64x64", "--duration", "600", "--refine", "1"]
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    argv += ["--picture", str(tmp_path / "p.png"), "--mode", "back-to-back", "-o", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, *argv], cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while (line := child.stderr.readline()) != "measuring\n":
        assert line, child.wait(60)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "marked partial" in err, err
    document = reading.load(tmp_path / "latency.json")
    assert document["partial"] and document["rows"][0]["partial"]
    assert document["rows"][0]["summary"]["n"] > 3 and "partial" in out
    assert "Partial" in (tmp_path / "latency.html").read_text()
    with pytest.raises(InputError, match="partial"):
        compare.main([str(tmp_path / "latency.json")] * 2)


def test_a_second_interrupt_loses_nothing(tmp_path):
    """The statistics take a while to compute; a second Ctrl-C must not interrupt that."""
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    code = (
        "import signal, sys\n"
        "from benchmarks import __main__ as command\n"
        "from benchmarks.latency import modes, run\n"
        "real, calls = modes.back_to_back, []\n"
        "def first(row, seg, pictures, seconds, tell):\n"
        "    real(row, seg, pictures, 0.3, tell)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "modes.RUN['back-to-back'] = first\n"
        "summed = run.summarise\n"
        "def again(*args):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    return summed(*args)\n"
        "run.summarise = again\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--threads", "1"]
    argv += ["--mode", "back-to-back", "-o", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=HERE, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 130 and "marked partial" in done.stderr, done.stderr
    found = reading.load(tmp_path / "latency.json")
    assert found["partial"] and found["rows"][0]["summary"]["n"] > 3


def test_any_failure_keeps_what_was_measured(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = ["--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3", "--memory"]
    for kind in (MemoryError, OSError, RuntimeError):
        out = tmp_path / kind.__name__

        def fails(*_, kind=kind):
            raise kind(kind.__name__)

        monkeypatch.setattr(run, "memory_run", fails)
        with pytest.raises(kind, match=kind.__name__):
            run.main([*argv, "--mode", "back-to-back", "-o", str(out)])
        assert reading.load(out / "latency.json")["partial"], kind


def test_ctrl_c_counts_once_a_second_and_only_while_measuring():
    ctrl_c = run.Interrupts()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    ctrl_c()  # ignored: the first one was less than a second ago
    ctrl_c.last -= 2
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()  # a second later, it counts again
    ctrl_c.last, ctrl_c.wanted = -1.0, False
    ctrl_c()


def test_odd_file_names_are_shown(tmp_path, capsys):
    folder = tmp_path / "r\udcff"
    folder.mkdir()
    (folder / "p\udcff.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = [
        "latency",
        "--picture",
        str(folder / "p\udcff.png"),
        "--refine",
        "0",
        "--duration",
        "0.3",
    ]
    assert command.main([*argv, "--mode", "back-to-back", "-o", str(folder)]) == 0
    assert command.main(["report", str(tmp_path)]) == 0
    assert "r?" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    real = run.write_atomic

    def full(path, data):
        if path.name in ("latency.json", "latency.md"):
            raise InputError(f"{path} cannot be written: File too large")
        real(path, data)

    monkeypatch.setattr(run, "write_atomic", full)
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3"]
    out = tmp_path / "out"
    assert command.main([*argv, "--mode", "back-to-back", "-o", str(out)]) == 1
    told = capsys.readouterr()
    assert "latency.json cannot be written" in told.err and "| back-to-back, 1 step" in told.out
    assert sorted(p.name for p in out.iterdir()) == [
        *("latency.csv", "latency.html", "latency.raw.json.xz", "trace.json")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *argv, "--mode", "back-to-back"],
        cwd=HERE, stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr


def test_refinements_are_told_apart():
    names = {run.refinement(RefineConfig.preset(p)) for p in PRESETS}
    assert len(names) == len(PRESETS)
    assert run.refinement(RefineConfig(steps=3, seed=7)) == "residual at scale 0.5"


def test_an_error_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))

    def fails(*_):
        raise InputError("no such memory")

    monkeypatch.setattr(run, "memory_run", fails)
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3"]
    out = tmp_path / "out"
    assert command.main([*argv, "--memory", "--mode", "back-to-back", "-o", str(out)]) == 1
    told = capsys.readouterr()
    assert "no such memory" in told.err and "marked partial" in told.err
    found = reading.load(out / "latency.json")
    assert found["partial"] and len(found["rows"]) == 1 and not found["rows"][0]["partial"]


def test_nothing_measured_replaces_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    assert command.main(["latency", "-o", str(tmp_path / "new" / "one")]) == 130
    assert not list(tmp_path.iterdir())
    (tmp_path / "latency.json").write_text("old")
    assert command.main(["latency", "-o", str(tmp_path)]) == 130
    assert (tmp_path / "latency.json").read_text() == "old"
    assert "nothing is written" in capsys.readouterr().err
    (tmp_path / "latency.csv").mkdir()
    assert command.main(["latency", "-o", str(tmp_path)]) == 1
    assert "latency.csv is a folder" in capsys.readouterr().err
