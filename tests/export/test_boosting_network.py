"""The head of Boosting, and the network that is frozen from it and a backbone."""

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from export.models.boosting import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    BoostingHead,
    BoostingNetwork,
    normalised,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)  # of the tiny backbone


def tiny_backbone(stride=8, channels=6):
    """A convolution with random weights; no symmetry under mirroring."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, channels, stride, stride), nn.SiLU()).eval()


def tiny_head(channels=6, width=4):
    """A head whose running statistics are those of a few batches."""
    torch.manual_seed(1)
    head = BoostingHead(channels, width)
    with torch.no_grad():
        for _ in range(3):
            head(torch.randn(4, channels, 5, 7), torch.randn(4, 3, 40, 56))
        head.to_fine.weight.mul_(3)
        head.to_coarse.weight.mul_(3)
    return head.eval()


# Head


def test_counts_of_parameters():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    head = BoostingHead(384)
    assert count(head) == 748_165
    assert count(head.reduce) == 24_640
    assert [count(block) for block in head.blocks] == [41_408, 41_408]
    assert count(head.to_coarse) == 65
    assert [count(stage) for stage in head.stages] == [116_352, 225_024, 151_296 + 147_840]
    assert count(head.to_fine) == 132


def test_blocks_compute_their_equations():
    head = tiny_head().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    for block in head.blocks:
        normed = functional.layer_norm(x, (4,), block.norm1.weight, block.norm1.bias)
        q, k, v = (normed @ block.qkv.weight.T).chunk(3, 2)
        found = []
        for part in (slice(0, 64), slice(64, 128)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8
            found.append(scores.softmax(2) @ v[..., part])
        y = x + torch.cat(found, 2) @ block.out.weight.T + block.out.bias
        normed = functional.layer_norm(y, (4,), block.norm2.weight, block.norm2.bias)
        first, last = block.mlp[0], block.mlp[2]
        hidden = functional.gelu(normed @ first.weight.T + first.bias)
        torch.testing.assert_close(block(x), y + hidden @ last.weight.T + last.bias)


def test_tokens_have_no_positions():
    head = tiny_head()
    features = torch.randn(1, 6, 3, 4)
    order = torch.randperm(12)
    shuffled = features.flatten(2)[:, :, order].unflatten(2, (3, 4))
    torch.testing.assert_close(
        head.coarse(shuffled)[0].flatten(), head.coarse(features)[0].flatten()[order]
    )


def test_sizes_at_any_stride():
    """The stride of the backbone is the size of the images divided by that of the features."""
    head = tiny_head()
    for stride in (4, 8, 14, 16, 32):
        with case(stride):
            images = torch.randn(2, 3, 2 * stride, 3 * stride)
            coarse, fine = head(torch.randn(2, 6, 2, 3), images)
            assert coarse.shape == (2, 1, 2, 3) and fine.shape == (2, 1, 16, 24)
            for mask in (coarse, fine):
                assert 0 < mask.min() and mask.max() < 1


def test_fine_stages_compute_their_equations():
    """Against the same layers one by one; RGB is resized for each stage, and joined again last."""
    head = tiny_head()
    tokens, images = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 32, 48)

    def resized(x, height, width):
        return functional.interpolate(x, (height, width), mode="bilinear")

    def layer(conv, norm, x):
        x = functional.conv2d(x, conv.weight, conv.bias, padding=1)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        x = (x - norm.running_mean[:, None, None]) * scale[:, None, None]
        x = x + norm.bias[:, None, None]
        return torch.where(x > 0, x, 0.01 * x)

    x = tokens
    for i, stage in enumerate(head.stages):
        size = 2 * x.shape[2], 2 * x.shape[3]
        x = torch.cat([resized(x, *size), resized(images, *size)], 1)
        x = layer(stage[0], stage[1], x)
        if i == 2:
            x = layer(stage[3], stage[4], x)
    x = torch.cat([x, resized(images, 16, 24)], 1)
    weight, bias = head.to_fine.weight[0, :, 0, 0], head.to_fine.bias
    expected = torch.sigmoid((weight[:, None, None] * x).sum(1, keepdim=True) + bias)
    torch.testing.assert_close(head.fine(tokens, images), expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_kept_in_the_block_alone():
    head = tiny_head().train()
    arguments = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 32, 32)

    def statistics():
        return {k: v.clone() for k, v in head.state_dict().items() if "running" in k}

    before = statistics()
    with head.keeping_statistics():
        inside = head(*arguments)
    for name, value in statistics().items():
        assert torch.equal(value, before[name])
    outside = head(*arguments)
    assert torch.equal(inside[1], outside[1])  # both use the statistics of the batch
    assert not any(torch.equal(value, before[name]) for name, value in statistics().items())


# Network


def masks(backbone, head, images):
    """The coarse and the fine mask of ``images`` in [0, 1], of either polarity."""
    features = backbone(normalised(images, MEAN, STD))
    return head(features, normalised(images, IMAGENET_MEAN, IMAGENET_STD))


def with_polarity(mask):
    return torch.stack([1 - m if m.mean() > 0.5 else m for m in mask])


def biased_towards_both(head, backbone, images):
    """``head`` with biases so that the means of the masks are on both sides of 0.5."""
    with torch.no_grad():
        for layer, mask in zip(
            (head.to_coarse, head.to_fine), masks(backbone, head, images), strict=True
        ):
            logits = torch.logit(mask).mean((1, 2, 3))
            layer.bias -= (logits.min() + logits.max()) / 2
    return head


def test_network_with_either_mask_with_and_without_flip():
    torch.manual_seed(2)
    images = torch.rand(4, 3, 40, 56) * torch.tensor([0.1, 0.4, 0.7, 1.0])[:, None, None, None]
    backbone = tiny_backbone()
    head = biased_towards_both(tiny_head(), backbone, images)
    with torch.no_grad():
        plain = masks(backbone, head, images)
        mirrored = [mask.flip(3) for mask in masks(backbone, head, images.flip(3))]
        for i, (mask, size) in enumerate((("coarse", (5, 7)), ("fine", (40, 56)))):
            above = plain[i].mean((1, 2, 3)) > 0.5
            assert above.any() and not above.all()
            for flip, expected in ((False, plain[i]), (True, (plain[i] + mirrored[i]) / 2)):
                with case(mask, flip):
                    network = BoostingNetwork(backbone, MEAN, STD, head, mask, flip)
                    found = network(normalised(images, MEAN, STD))
                    assert found.shape == (4, 2, *size)
                    torch.testing.assert_close(found.sum(1), torch.ones(4, *size))
                    torch.testing.assert_close(found[:, 1:], with_polarity(expected))
                    assert (found[:, 1].mean((1, 2)) <= 0.5).all()


def test_polarity_is_decided_for_each_picture_alone():
    torch.manual_seed(2)
    images = torch.rand(4, 3, 40, 56) * torch.tensor([0.1, 0.4, 0.7, 1.0])[:, None, None, None]
    backbone = tiny_backbone()
    head = biased_towards_both(tiny_head(), backbone, images)
    network = BoostingNetwork(backbone, MEAN, STD, head)
    images = normalised(images, MEAN, STD)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone)


def test_network_is_in_eval_mode_without_gradients():
    network = BoostingNetwork(tiny_backbone().train(), MEAN, STD, tiny_head().train())
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_the_frozen_network_equals_torch():
    """Exported as the program exports priors, by torch.onnx.export(dynamo=True) and onnxslim, with
    a free size and with flip, for pictures of either polarity. The backbone is a convolution with
    random weights and stride 16, so that the fine mask has half of the picture's size. A fixed size
    and the coarse mask are exported by test_boosting_bundle.py."""
    pytest.importorskip("onnxslim", reason="needs onnxslim")
    from export.models import PriorModel
    from export.to_onnx import freeze
    from runtime.engines.onnx import OnnxEngine
    from runtime.prior.preprocess import Preprocess

    torch.manual_seed(2)
    shades = torch.tensor([0.1, 1.0])[:, None, None, None]
    backbone = tiny_backbone(stride=16)
    head = biased_towards_both(tiny_head(), backbone, torch.rand(2, 3, 48, 80) * shades)
    network = BoostingNetwork(backbone, MEAN, STD, head, "fine", flip=True)
    model = PriorModel(
        name="tiny",
        module=network,
        preprocess=Preprocess(mean=MEAN, std=STD, height=48, width=80, multiple=16, minimum=16),
        names=["background", "object"],
        output="probabilities",
    )
    with OnnxEngine(freeze(model, dynamic=True)) as engine:
        for height, width in ((48, 80), (64, 32)):
            for shade in shades:
                with case(height, width, float(shade)):
                    image = normalised(torch.rand(1, 3, height, width) * shade, MEAN, STD)
                    (found,) = engine(image.numpy())
                    np.testing.assert_allclose(found, network(image).numpy(), atol=1e-5)
