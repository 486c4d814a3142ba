"""The constants of the algorithm stand once in csrc/network.h; Python's copies equal them."""

import ast
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from runtime import _core
from runtime.core import constants, options, parameters, refiner

CONSTANTS = _core.constants()
ROOT = Path(__file__).resolve().parents[2]


def as_written(name):
    """A constant that is a float32 in C++, as Python writes it."""
    written = float(f"{CONSTANTS[name]:.6g}")
    assert np.float32(written) == np.float32(CONSTANTS[name])
    return written


def test_every_constant_has_its_twin():
    numbers = {name for name, value in CONSTANTS.items() if not isinstance(value, tuple)}
    neighbours = {"spatial_neighbours", "pair_neighbours"}
    own = {name.lower() for name in vars(constants) if name.isupper()}
    assert own == (numbers - {"momentum"}) | neighbours
    for name in sorted(own - neighbours):
        assert getattr(constants, name.upper()) == as_written(name), name
    for name in neighbours:
        assert getattr(constants, name.upper()) == CONSTANTS[name], name
    defaults = {field.name: field.default for field in fields(options.RefineOptions)}
    assert defaults["momentum"] == as_written("momentum")


def literals(source):
    """The numbers that a source text writes."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, float)}


@pytest.mark.parametrize(
    "file", ["runtime/core/reference.py", "export/refine_step.py", "benchmarks/speed/torch_twin.py"]
)
def test_formulas_name_the_constants(file):
    """A number that is written again could be changed in one place alone."""
    numbers = {v for v in vars(constants).values() if isinstance(v, float)}
    assert not literals((ROOT / file).read_text(encoding="utf-8")) & numbers
    assert literals("x = a * 1e-4 + 2") & numbers == {1e-4}


def test_options_have_the_same_numbers():
    for name, choices in refiner.CODES.items():
        assert choices == CONSTANTS[name] == options.CHOICES[name], name
    assert refiner.STOPS == CONSTANTS["stop"]
    assert CONSTANTS["objective"] == ("residual", "cluster")
    enumerations = {name for name, value in CONSTANTS.items() if isinstance(value, tuple)}
    neighbours = {"spatial_neighbours", "pair_neighbours"}
    assert enumerations - neighbours == {*refiner.CODES, "objective", "stop"}


def test_the_cuda_module_uses_the_same_header(cuda):
    assert cuda.constants() == CONSTANTS


def test_limits_of_the_objectives_are_no_looser_than_they_were():
    """A larger tolerance would let a wrong export pass, fewer golden steps a wrong engine."""
    limits = {n: (o.update_tolerance, o.golden_steps) for n, o in parameters.OBJECTIVES.items()}
    assert limits == {"residual": (5e-5, 10), "dynaguide": (1e-3, 3), "dynaseg": (1e-3, 3)}


def test_only_dynaseg_takes_no_guide_and_only_dynaguide_maps_clusters():
    objectives = parameters.OBJECTIVES.items()
    assert [n for n, o in objectives if not o.takes_guide] == ["dynaseg"]
    assert [n for n, o in objectives if o.maps_clusters] == ["dynaguide"]
    assert [n for n, o in objectives if o.channels_follow_classes] == ["residual"]
