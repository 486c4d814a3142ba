"""The refinement network in PyTorch against the reference in float64."""

import numpy as np
import pytest
from cases import case
from exactness import relative_error
from scenes import scene

torch = pytest.importorskip("torch", reason="the network is trained by torch: pip install torch")

from export.models.refinement import RefinementNet, inputs  # noqa: E402
from runtime import RefineOptions  # noqa: E402
from runtime.core import parameters, reference  # noqa: E402
from runtime.errors import InputError  # noqa: E402


def planes(array):
    """(H, W, C) to (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def network(classes=5, **options):
    """A network in float64 whose weights are all random, and its tensors."""
    net = RefinementNet(RefineOptions(channels=7, **options), classes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3 + 0.1)
    return net, {k: v.numpy() for k, v in net.state_dict().items()}


def test_new_weights_are_those_of_the_runtime():
    for options in ({}, {"blocks": 3, "channels": 17, "seed": 4}):
        with case(options):
            config = RefineOptions(**options)
            state = RefinementNet(config, 6).state_dict()
            wanted = parameters.initial_state(config, 6)
            wanted = {k: v for k, v in wanted.items() if not k.startswith("momentum.")}
            assert state.keys() == wanted.keys()
            for name, value in wanted.items():
                assert state[name].shape == value.shape and state[name].numpy().dtype == value.dtype
                np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_the_input_is_the_reference():
    for size in ((13, 17), (1, 9), (8, 1), (1, 1)):
        with case(size):
            image = scene(*size)[0].astype(np.float64)
            np.testing.assert_allclose(
                inputs(planes(image)[None])[0],
                reference.residual_input(image).transpose(2, 0, 1),
                atol=1e-12,
            )


def test_a_grey_picture_has_a_finite_input():
    assert torch.isfinite(inputs(torch.full((1, 3, 4, 6), 0.5))).all()


def test_the_output_is_the_reference():
    for options in ({}, {"blocks": 3}):
        for size in ((13, 17), (1, 9)):
            with case(options, size):
                net, state = network(**options)
                x = reference.residual_input(scene(*size)[0].astype(np.float64))
                wanted, _ = reference.forward(
                    RefineOptions(channels=7, **options), state, x, None, False
                )
                found = net(planes(x)[None]).detach()[0]
                assert relative_error(found, wanted.transpose(2, 0, 1)) < 1e-12


def test_pictures_of_a_batch_are_independent_also_in_eval_mode():
    net, before = network()
    pictures = [planes(scene(12, 15, seed=seed)[0].astype(np.float64)) for seed in (1, 2, 3)]
    together = net(inputs(torch.stack(pictures)))
    net.eval()
    for picture, found in zip(pictures, together, strict=True):
        torch.testing.assert_close(net(inputs(picture[None]))[0], found)
    for name, value in net.state_dict().items():  # the running statistics too
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_classes_select_rows_of_the_last_layer():
    net, _ = network()
    x = inputs(planes(scene(9, 11)[0].astype(np.float64))[None])
    torch.testing.assert_close(net(x, torch.tensor([0, 3])), net(x)[:, [0, 3]])


def test_other_objectives_are_refused():
    with pytest.raises(InputError, match="objective is 'dynaguide'; its network has clusters"):
        RefinementNet(RefineOptions(objective="dynaguide"), 5)
