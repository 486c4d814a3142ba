"""The head of SegUnify, and the network that is frozen from it and a backbone."""

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from export.models.segunify import Projector, SegUnifyHead, SegUnifyNetwork, cosines  # noqa: E402


def tiny_backbone(channels=6):
    """A convolution with stride 8, with random weights; no symmetry under mirroring."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, channels, 8, 8), nn.SiLU()).eval()


def tiny_head(kind="segunify", final_silu=True, channels=6, clusters=4):
    """A head whose running statistics are those of a few batches."""
    torch.manual_seed(1)
    head = SegUnifyHead(channels, clusters, 5, kind, final_silu)
    for _ in range(3):
        head.codes(torch.randn(4, channels, 5, 7))
    head.teacher.mul_(torch.rand(clusters, 1) + 0.5)  # lengths other than 1
    return head.eval()


# Projector


def test_counts_of_parameters():
    for channels, segunify, smooseg in ((384, 198_144, 197_120), (768, 690_816, 689_024)):
        for kind, wanted in (("segunify", segunify), ("smooseg", smooseg)):
            with case(channels, kind):
                projector = Projector(channels, 64, kind)
                assert sum(p.numel() for p in projector.parameters()) == wanted


def silu(x):
    return x / (1 + (-x).exp())


def conv(layer, x):
    return torch.einsum("dc,nchw->ndhw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]


def norm(x):
    """Batch norm with the statistics of the batch, as new weights compute it."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def convolutions(sequence):
    return [layer for layer in sequence if isinstance(layer, nn.Conv2d)]


def test_projector_computes_its_equations():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, 7)

    def end(final_silu, z):
        return silu(z) if final_silu else z

    for kind, final_silu in (("segunify", True), ("segunify", False), ("smooseg", True)):
        with case(kind, final_silu):
            projector = Projector(6, 4, kind, final_silu, dropout=0)
            (w,), (w1, w2) = convolutions(projector.linear), convolutions(projector.nonlinear)
            if kind == "smooseg":
                expected = conv(w, x) + conv(w2, silu(conv(w1, x)))
            else:
                expected = end(final_silu, norm(conv(w, x)))
                expected = expected + end(final_silu, norm(conv(w2, silu(norm(conv(w1, x))))))
            torch.testing.assert_close(projector(x), expected, rtol=1e-5, atol=1e-6)


def test_dropout_takes_whole_channels_independently_in_both_branches():
    """The linear branch copies the features; the nonlinear branch has weights of zero, or the
    reverse. What is left of features of ones is 0 or 1 / 0.8 in a whole channel of a picture."""
    drawn = []
    for branch in (0, 1):
        projector = Projector(64, 64, "smooseg", dropout=0.2)
        for parameter in projector.parameters():
            nn.init.zeros_(parameter)
        (w,), (w1, w2) = convolutions(projector.linear), convolutions(projector.nonlinear)
        with torch.no_grad():
            for layer in ((w,), (w1, w2))[branch]:
                layer.weight[:, :, 0, 0] = torch.eye(64)
        torch.manual_seed(0)
        codes = projector(torch.ones(8, 64, 3, 4))
        assert torch.equal(codes, codes[:, :, :1, :1].expand_as(codes))
        kept = codes[:, :, 0, 0] > 0
        value = 1.25 if branch == 0 else silu(torch.tensor(1.25)).item()
        torch.testing.assert_close(codes[:, :, 0, 0], kept * value)
        assert abs(kept.float().mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / kept.numel())
        drawn.append(kept)
        assert len(projector.eval()(torch.ones(1, 64, 1, 1)).unique()) == 1  # no dropout
    assert not torch.equal(*drawn)


# Head


def test_prototypes_start_with_length_1_and_the_teacher_as_a_copy():
    head = SegUnifyHead(6, 27, 64)
    assert head.student.shape == head.teacher.shape == (27, 64)
    torch.testing.assert_close(head.student.norm(dim=1), torch.ones(27))
    assert torch.equal(head.student, head.teacher)
    assert head.teacher.data_ptr() != head.student.data_ptr() and not head.teacher.requires_grad
    assert {"student", "teacher"} < set(head.state_dict())
    numbers = SegUnifyHead(6, 4000, 64).student.detach()  # normal: either sign is as likely
    assert abs(numbers.mean()) < 5 / 8 / np.sqrt(4000 * 64)
    # of a direction that is drawn uniformly; numbers that are uniform have about 1.8
    assert (64 * numbers**2).square().mean().item() == pytest.approx(3 * 64 / 66, abs=0.1)


def test_cosines_of_vectors_of_any_length():
    torch.manual_seed(0)
    codes, prototypes = torch.randn(2, 5, 3, 4), 3 * torch.randn(4, 5)
    codes[0, :, 0, 0] = 0
    expected = functional.cosine_similarity(
        codes[:, None], prototypes[None, :, :, None, None], dim=2
    )
    torch.testing.assert_close(cosines(codes, prototypes), expected)


def test_probabilities_are_a_soft_max_over_twice_the_cosines_with_the_teacher():
    head = tiny_head()
    codes = torch.randn(2, 5, 3, 4)
    expected = (2 * cosines(codes, head.teacher)).softmax(1)
    torch.testing.assert_close(head.probabilities(codes), expected)
    with torch.no_grad():
        head.student.zero_()
        head.teacher.mul_(7)
    torch.testing.assert_close(head.probabilities(codes), expected)


# Network


def test_network_without_and_with_flip():
    backbone, head = tiny_backbone(), tiny_head()
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        codes = head.codes(backbone(images))
        mirrored = head.codes(backbone(images.flip(3))).flip(3)
        plain, flipped = (SegUnifyNetwork(backbone, head, flip)(images) for flip in (False, True))
    assert plain.shape == (1, 4, 5, 7)
    torch.testing.assert_close(plain.sum(1), torch.ones(1, 5, 7))
    torch.testing.assert_close(plain, head.probabilities(codes))
    torch.testing.assert_close(flipped, head.probabilities((codes + mirrored) / 2))
    assert (plain - flipped).abs().max() > 1e-3


def test_network_with_flip_mirrors_what_it_finds_in_a_mirrored_picture():
    network = SegUnifyNetwork(tiny_backbone(), tiny_head(), flip=True)
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(network(images.flip(3)), network(images).flip(3))


def test_network_is_in_eval_mode_without_gradients():
    network = SegUnifyNetwork(tiny_backbone().train(), tiny_head().train())
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(("kind", "flip"), [("segunify", True), ("smooseg", False)])
def test_the_frozen_network_equals_torch(kind, flip):
    """Exported as the program exports priors, by torch.onnx.export(dynamo=True) and onnxslim, with
    a fixed and with a free size. The backbone is a convolution with random weights."""
    pytest.importorskip("onnxslim", reason="needs onnxslim")
    from export.models import PriorModel
    from export.to_onnx import freeze
    from runtime.engines.onnx import OnnxEngine
    from runtime.prior.preprocess import Preprocess

    network = SegUnifyNetwork(tiny_backbone(), tiny_head(kind), flip)
    model = PriorModel(
        name="tiny",
        module=network,
        preprocess=Preprocess(
            mean=(0, 0, 0), std=(1, 1, 1), height=40, width=56, multiple=8, minimum=16
        ),
        output="probabilities",
    )
    for dynamic, size in ((False, (40, 56)), (True, (48, 32))):
        with case(dynamic), OnnxEngine(freeze(model, dynamic=dynamic)) as engine:
            images = torch.randn(1, 3, *size)
            (found,) = engine(images.numpy())
            np.testing.assert_allclose(found, network(images).numpy(), atol=1e-6)
