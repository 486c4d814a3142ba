"""The constants of the algorithm stand once in csrc/network.h; Python's copies equal them."""

import ast
import importlib.util
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from runtime import _core
from runtime.core import options, parameters, reference, refiner

CONSTANTS = _core.constants()


def tree_of(module):
    """The parsed source of a module, which is not imported: that might need PyTorch or ONNX."""
    path = Path(importlib.util.find_spec(module).origin)
    return ast.parse(path.read_text(encoding="utf-8"))


def numbers_in(module):
    """All numbers that a module's source names, signs included."""
    found = set()
    for node in ast.walk(tree_of(module)):
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            found.add(sign * node.value)
    return found


def lists_of_pairs_in(module):
    """All lists of pairs that a module's source names, such as [(0, 1), (1, 0)]."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, (ast.List, ast.Tuple)):
            continue
        try:
            value = ast.literal_eval(node)
        except ValueError:
            continue
        if all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            found.add(tuple(value))
    return found


def as_written(name):
    """A constant that is a float32 in C++, as Python writes it."""
    written = float(f"{CONSTANTS[name]:.6g}")
    assert np.float32(written) == np.float32(CONSTANTS[name])
    return written


def test_named_constants_are_equal():
    assert reference.EPS == CONSTANTS["norm_eps"]
    assert reference.DIRECTIONS == CONSTANTS["spatial_neighbours"]
    assert parameters.MAPPING_STEPS == CONSTANTS["mapping_steps"]
    assert parameters.CHECK_EVERY == CONSTANTS["check_every"]
    assert parameters.CALM_CHECKS == CONSTANTS["checks"]
    defaults = {field.name: field.default for field in fields(options.RefineOptions)}
    assert defaults["momentum"] == as_written("momentum")


def test_options_have_the_same_numbers():
    for name, choices in refiner.CODES.items():
        assert choices == CONSTANTS[name] == options.CHOICES[name], name
    assert refiner.STOPS == CONSTANTS["stop"]
    assert CONSTANTS["objective"] == ("residual", "cluster")
    enumerations = {name for name, value in CONSTANTS.items() if isinstance(value, tuple)}
    neighbours = {"spatial_neighbours", "pair_neighbours"}
    assert enumerations - neighbours == {*refiner.CODES, "objective", "stop"}


@pytest.mark.parametrize(
    "module, names",
    [
        ("runtime.core.reference", ["running_share", "smallest_prior", "loss_change",
                                    "least_deviation", "least_area", "least_balanced"]),
        ("export.refine_step", ["running_share", "smallest_prior", "never",
                                "least_deviation", "least_area", "least_balanced"]),
        ("export.check", ["smallest_prior", "never"]),
        ("benchmarks.speed.torch_twin", ["smallest_prior", "least_area"]),
    ],
)  # fmt: skip
def test_numbers_in_the_sources_are_equal(module, names):
    """These modules write the numbers where they use them, as their formulas do."""
    written = numbers_in(module)
    assert not [name for name in names if as_written(name) not in written]
    if "running_share" in names:
        assert 1 - CONSTANTS["running_share"] in written


@pytest.mark.parametrize("module", ["runtime.core.reference", "export.refine_step"])
def test_residual_has_the_same_pairs(module):
    assert CONSTANTS["pair_neighbours"] in lists_of_pairs_in(module)


def test_the_cuda_module_uses_the_same_header(cuda):
    assert cuda.constants() == CONSTANTS
