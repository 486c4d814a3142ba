"""The choice of the instruction set, and the number of threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import case

import runtime
from runtime import _core
from runtime.device import choose
from runtime.errors import InputError

LANES = {"base": 4, "avx2": 8, "avx512": 16}


def python(code, isa=None):
    """Run code in a fresh process with SEG_ISA = isa; return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "SEG_ISA"}
    if isa is not None:
        environment["SEG_ISA"] = isa
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_targets_are_listed_slowest_first():
    assert runtime.isas() == list(LANES)[: len(runtime.isas())]
    assert runtime.isa() in runtime.isas()


def test_lanes():
    for isa in runtime.isas():
        with case(isa):
            assert _core.lanes(isa) == LANES[isa]
    assert _core.lanes() == LANES[runtime.isa()]


def test_the_best_is_the_default():
    for isa in (None, ""):
        with case(isa):
            assert python("import runtime; print(runtime.isa())", isa) == runtime.isas()[-1]


def test_seg_isa_forces_one_and_this_one_computes(rng):
    code = (
        "import numpy, runtime; print(runtime.isa(), runtime._core.lanes());"
        "g = numpy.random.default_rng(0).random((31, 17, 4), 'f');"
        "print(runtime.guided_filter(g[..., :3], g[..., 3:]).tobytes().hex())"
    )
    g = rng.random((31, 17, 4), np.float32)
    for isa in runtime.isas():
        with case(isa):
            coefficients = _core.guided_coefficients(g[..., :3], g[..., 3:], 8, 1e-3, 1, isa)
            expected = _core.apply_coefficients(coefficients, g[..., :3], 1, isa)
            named, filtered = python(code, isa).splitlines()
            assert named == f"{isa} {LANES[isa]}"
            assert filtered == expected.tobytes().hex()


def test_wrong_seg_isa_says_what_runs_here():
    calls = ["isa()", "guided_filter(x, x)", "Refiner(4, 5, classes=2)"]
    calls += ["dense_crf(numpy.uint8(x), numpy.float32(x))"]
    code = f"""
import numpy, runtime
from runtime.errors import DeviceError
x = numpy.zeros((4, 5, 3))
for call in {calls}:
    try:
        eval(f"runtime.{{call}}")
    except DeviceError as error:
        print(error)
"""
    usable = ", ".join(runtime.isas())
    refusal = (
        f"SEG_ISA is 'sse9', but this machine runs {usable}\n"
        "  fix: unset SEG_ISA, or set it to one of these names"
    )
    assert python(code, "sse9") == "\n".join([refusal] * len(calls))


def test_unknown_target_is_refused():
    with pytest.raises(InputError, match=r"isa is 'sse9'; this machine runs base"):
        runtime.Refiner(4, 5, classes=2, isa="sse9")
    with pytest.raises(ValueError, match="this machine cannot run isa sse9"):
        _core.lanes("sse9")


def machine(root, groups, **limits):
    """Lay out a machine's control groups: /proc/self/cgroup, and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def test_the_cpu_limits_of_control_groups_are_read(tmp_path):

    def first(folder, quota, period="100000"):  # version 1 has two files
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        return {f"{folder}/{n}": f"{v}\n" for n, v in zip(names, (quota, period), strict=True)}

    for number, (name, groups, limits, wanted) in enumerate([
        ("docker --cpus 1.5", "0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("no limit", "0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("its own", "0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}, 0.5),
        ("of a group above", "0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "3 1"}, 3.0),
        ("the smallest", "0::/a/b\n", {"a/b/cpu.max": "400 100", "cpu.max": "250 100"}, 2.5),
        ("path of the host", "0::/../../docker/x\n", {"cpu.max": "200000 100000"}, 2.0),
        ("version 1", "4:cpu,cpuacct:/d\n1:name=a:/d\n", first("cpu,cpuacct/d", "250000"), 2.5),
        ("version 1, short name", "4:cpuacct,cpu:/\n", first("cpu", "300000"), 3.0),
        ("version 1, host's path", "4:cpu:/docker/x\n", first("cpu", "9", "3"), 3.0),
        ("version 1, no limit", "4:cpu:/\n", first("cpu", "-1"), None),
        ("another controller", "4:cpuset:/\n", first("cpuset", "9", "3"), None),
        ("hybrid", "1:name=systemd:/\n0::/a\n", {"unified/a/cpu.max": "100 100"}, 1.0),
        ("damaged", "0::/\nx\n\n7\n", {"cpu.max": "1 \u00b2\n"}, None),
        ("damaged too", "0::/\n", {"cpu.max": "0 0\n"}, None),
        ("no time at all", "0::/\n", {"cpu.max": "0 100000\n"}, None),
        ("no files", "0::/a\n", {}, None),
    ]):  # fmt: skip
        with case(name):
            root = machine(tmp_path / str(number), groups, **limits)
            assert choose.cpu_limit(root) == wanted
    assert choose.cpu_limit(tmp_path / "no Linux") is None


def test_the_threads_are_those_of_the_limit(monkeypatch):
    for limit, processors, threads in [
        (None, 8, 8), (1.5, 8, 2), (2.0, 8, 2), (0.1, 8, 1), (8.5, 4, 4), (64.0, 2, 2),
    ]:  # fmt: skip
        with case(limit, processors):
            monkeypatch.setattr(choose, "cpu_limit", lambda limit=limit: limit)
            monkeypatch.setattr(choose, "processors", lambda processors=processors: processors)
            assert choose.default_threads() == choose.thread_count(None) == threads
            assert choose.thread_count(5) == 5  # the user's number is not reduced
