"""The choice of the instruction set."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import case

import runtime
from runtime import _core
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
