"""The network's parameters: their first values, their sizes and the way into PyTorch."""

import numpy as np
import pytest
from cases import case
from refinements import CASES, case_name, draw, make

from runtime import RefineOptions
from runtime.core import parameters


def test_state_loads_in_torch():
    pytest.importorskip("torch", reason="needs PyTorch")
    for options, kind in CASES:
        with case(case_name(options), kind):
            assert_state_loads_in_torch(options, kind)


def assert_state_loads_in_torch(options, kind):
    """Copy a refiner's state into PyTorch's network and back."""
    import torch

    from benchmarks.speed.torch_twin import Net

    image, guide = draw(kind)
    refiner = make(image, options)
    refiner.run(image, guide, steps=2)
    o, state = refiner.options, refiner.state_dict()
    inputs = parameters.objective_of(o).inputs
    net = Net(inputs, o.channels, refiner.classes, o.blocks, o.skip, o.final_bn)
    tensors = {k: torch.as_tensor(v) for k, v in state.items() if not k.startswith("momentum.")}
    net.load_state_dict(tensors, strict=True)
    shapes = {k: tuple(p.shape) for k, p in net.named_parameters()}
    assert shapes == parameters.shapes(o, refiner.classes)[0]
    refiner.load_state_dict({k: v.numpy() for k, v in net.state_dict().items()})


def test_initial_weights_follow_torch():
    for options, kind in CASES:
        with case(case_name(options), kind):
            assert_initial_weights_follow_torch(RefineOptions(**options))


def assert_initial_weights_follow_torch(o):
    """Check the range of each parameter and the first values of the norms."""
    state = parameters.initial_state(o, 5)
    shapes, norms = parameters.shapes(o, 5)
    bound = None
    for name, shape in shapes.items():
        value, layer = state[name], name.partition(".")[0]
        assert value.shape == shape and value.dtype == np.float32
        assert not state[f"momentum.{name}"].any()
        if layer.startswith("bn"):
            assert (value == (name.endswith("weight"))).all()
        elif o.objective == "residual" and layer == "conv3":
            assert not value.any()
        else:
            bound = np.prod(shape[1:]) ** -0.5 if name.endswith("weight") else bound
            assert np.abs(value).max() <= bound
            if value.size > 150:
                assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
                assert abs(value.mean()) < bound / 5
    for name in norms:
        assert (state[name] == name.endswith("var")).all()


def test_published_network_has_its_published_size():
    shapes, _ = parameters.shapes(RefineOptions(objective="dynaguide"), 100)
    assert sum(np.prod(shape) for shape in shapes.values()) == 106_400


def test_first_weights_of_seed_0():
    for objective, layer, first in (
        ("residual", "conv1.weight", [0.04083407, -0.06863636, -0.13685526]),
        ("residual", "conv2.0.bias", [0.03816873, 0.0130208, 0.05593195]),
        ("dynaguide", "conv1.weight", [0.05271656, -0.08860916, -0.17667939]),
        ("dynaguide", "conv3.weight", [0.08449974, -0.01899855, 0.05437833]),
        ("dynaseg", "conv3.weight", [-0.0379197, -0.00694901, -0.01941046]),
    ):
        state = parameters.initial_state(RefineOptions(objective=objective), 100)
        np.testing.assert_allclose(state[layer].ravel()[:3], first, rtol=1e-6)
    seeds = [
        parameters.initial_state(RefineOptions(seed=s), 5)["conv1.bias"] for s in (0, 1, 2**63 - 1)
    ]
    assert len({s.tobytes() for s in seeds}) == 3
