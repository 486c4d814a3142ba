"""DynaSeg's networks with a feature extractor, and how their training ends. Weights are random."""

import copy

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="the networks are of torch")

from torch.nn import functional as F  # noqa: E402

from export.backbones.efficientnet_lite import Lite0  # noqa: E402
from export.backbones.resnet import ResNet  # noqa: E402
from export.guides import fpn  # noqa: E402
from export.guides.fpn import Pyramid, Truncated, segment  # noqa: E402
from export.train.dynaseg_losses import cluster_count  # noqa: E402
from runtime.errors import SdkError  # noqa: E402

SGD = {"weighting": "fsf", "lr": 0.1, "momentum": 0.9, "decay": 1e-4}


def made(build):
    """What ``build`` makes of the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build()


@pytest.fixture(scope="module")
def originals():
    return {
        "resnet18": made(lambda: ResNet(18, dilated=False)),
        "lite0": made(lambda: Lite0(dilated=False)),
    }


@pytest.fixture
def bodies(originals):
    """Backbones that a network may contain and change."""
    return copy.deepcopy(originals)


def pyramid_of(body, clusters, **options):
    return made(lambda: Pyramid(body, clusters, **options))


def response(network, x):
    """The response map of a picture."""
    return network.response(network.features(x), x.shape[2:])


def picture(height=48, width=64):
    return made(lambda: torch.randn(1, 3, height, width))


def count(parameters):
    return sum(p.numel() for p in parameters)


def test_the_public_codes_network_has_198720_parameters(bodies):
    network = Truncated(bodies["resnet18"])
    assert count(p for p in network.parameters() if p.requires_grad) == 198_720
    response(network, picture()).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_pyramid_has_the_parameters_of_its_layers(bodies):
    """Of w channels: a lateral w * 64 + 64; the smoothing 64 * 64 * 9 + 64; the 1x1 convolution
    64 K + K; the batch norm 2 K."""
    trained = {"resnet18": 11_689_512 - 513_000, "lite0": 4_652_008}
    for name, widths in (("resnet18", (64, 128, 256, 512)), ("lite0", (24, 40, 112, 320))):
        with case(name):
            pyramid = Pyramid(bodies[name], 10)
            assert bodies[name].widths == widths
            own = sum(w * 64 + 64 for w in widths) + 36_928 + 650 + 20
            assert count(pyramid.parameters()) == own + trained[name]
            frozen = Pyramid(bodies[name], 10, frozen=True)
            assert count(p for p in frozen.parameters() if p.requires_grad) == own


def test_stages_and_maps_have_the_right_sizes(bodies):
    """ResNet-18 rounds sizes up, EfficientNet-Lite0 down."""
    for name, up in (("resnet18", 31), ("lite0", 0)):
        for height, width in ((33, 71), (64, 32)):
            with case(name, (height, width)):
                pyramid = Pyramid(bodies[name], 6)
                stages = pyramid.features(picture(height, width))
                assert [tuple(x.shape[1:]) for x in stages] == [
                    (channels, *((n + min(up, stride - 1)) // stride for n in (height, width)))
                    for channels, stride in zip(bodies[name].widths, (4, 8, 16, 32), strict=True)
                ]
                assert response(pyramid, picture(height, width)).shape == (1, 6, height, width)
    for height, width in ((33, 47), (10, 12)):
        network = Truncated(bodies["resnet18"])
        assert response(network, picture(height, width)).shape == (1, 64, height, width)


def enlarged(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def normed(x, norm):
    """The batch norm of one picture's own statistics."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scale = norm.weight[:, None, None] / (var + 1e-5).sqrt()
    return (x - mean) * scale + norm.bias[:, None, None]


def test_the_pyramid_equals_its_definition(bodies):
    """With the 1x1 convolution behind the enlargement, as DynaSeg's figure has it."""
    pyramid = pyramid_of(bodies["resnet18"], 7).double()
    x = picture(37, 50).double()
    p = dict(pyramid.named_parameters())
    stages = list(pyramid.body.stages(x))
    sums = F.conv2d(stages[3], p["lateral.3.weight"], p["lateral.3.bias"])
    for i in (2, 1, 0):
        lateral = F.conv2d(stages[i], p[f"lateral.{i}.weight"], p[f"lateral.{i}.bias"])
        sums = lateral + enlarged(sums, lateral.shape[2:])
    sums = F.conv2d(sums, p["smooth.weight"], p["smooth.bias"], padding=1)
    large = enlarged(sums, (37, 50))
    expected = normed(F.conv2d(large, p["score.weight"], p["score.bias"]), pyramid.norm)
    assert torch.allclose(response(pyramid, x), expected, atol=1e-10)


def test_the_truncated_network_equals_its_definition(bodies):
    network = made(lambda: Truncated(bodies["resnet18"])).double()
    x = picture(13, 18).double()
    p = dict(network.named_parameters())
    y = F.relu(normed(F.conv2d(x, p["conv1.weight"], stride=2, padding=3), network.bn1))
    y = enlarged(network.layer1(y), (14, 18))
    y = F.conv2d(y, p["smooth.weight"], p["smooth.bias"], padding=1)
    for _ in range(2):
        y = normed(F.conv2d(y, p["score.weight"], p["score.bias"]), network.norm)
    assert torch.allclose(response(network, x), y[:, :, :13, :18], atol=1e-10)


# Training


def test_two_steps_equal_a_plain_loop(bodies):
    """SGD with momentum and decay on CE(r, argmax r) + K' / 15 * L1, written out; and the first
    loss with the weight 50 / K'."""
    network = pyramid_of(bodies["resnet18"], 8).double()
    x, before = picture(32, 64).double(), copy.deepcopy(network.state_dict())
    found = segment(network, x, steps=2, **SGD)
    plain, velocity, losses = copy.deepcopy(network), {}, []
    for _ in range(2):
        r = response(plain, x)
        labels = r.argmax(1)
        k = len(np.unique(labels.numpy()))
        rows, columns = (r[:, :, 1:] - r[:, :, :-1]).abs(), (r[..., 1:] - r[..., :-1]).abs()
        own = -F.log_softmax(r, 1).gather(1, labels[:, None]).mean()
        loss = own + k / 15 * (rows.mean() + columns.mean())
        losses.append(float(loss.detach()))
        parameters = dict(plain.named_parameters())
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        with torch.no_grad():
            for (name, w), g in zip(parameters.items(), gradients, strict=True):
                velocity[name] = 0.9 * velocity.get(name, 0) + g + 1e-4 * w
                w -= 0.1 * velocity[name]
        if not losses[1:]:
            scf = segment(network, x, steps=1, **SGD | {"weighting": "scf"}).losses
            wanted = own + 50 / k * (rows.mean() + columns.mean())
            np.testing.assert_allclose(scf, [float(wanted.detach())], rtol=1e-9)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-9)
    np.testing.assert_array_equal(found.labels, response(plain, x).argmax(1)[0].numpy())
    assert found.labels.dtype == np.int32 and found.stop == "steps" and len(found.clusters) == 2
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value), name


def test_a_frozen_backbone_is_not_changed_and_has_its_own_statistics(bodies, monkeypatch):
    network = pyramid_of(bodies["resnet18"], 8, frozen=True)
    copies = []
    monkeypatch.setattr(fpn.copy, "deepcopy", lambda made: copies.append(made) or made)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = segment(network, picture(), steps=2, **SGD)
    changed = {k for k, v in copies[0].state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not any(name.startswith("body.") for name in changed)
    assert "smooth.weight" in changed and len(found.losses) == 2


def test_continuity_does_not_train_the_public_codes_network(bodies):
    """Both weights give other losses and the same map, and the last map has running statistics."""
    network = made(lambda: Truncated(bodies["resnet18"]))
    fsf, scf = (
        segment(network, picture(24, 32), steps=3, **SGD | {"weighting": w}) for w in ("fsf", "scf")
    )
    assert fsf.losses[0] != scf.losses[0] and fsf.clusters == scf.clusters
    np.testing.assert_array_equal(fsf.labels, scf.labels)
    start = segment(network, picture(24, 32), steps=0, **SGD).labels
    running = response(copy.deepcopy(network).eval(), picture(24, 32)).argmax(1)[0].numpy()
    np.testing.assert_array_equal(start, running)
    assert (response(network, picture(24, 32)).argmax(1)[0].numpy() != running).any()


class Scripted(torch.nn.Module):
    """A network whose maps have the given numbers of labels, one after the other; NaN makes a map
    that is not finite."""

    frozen = False

    def __init__(self, *counts):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.counts = list(counts)

    def features(self, images):
        return images

    def response(self, features, size):
        labels = self.counts.pop(0)
        if labels != labels:
            return torch.full((1, 16, *size), torch.nan) + self.weight
        index = torch.arange(size[0] * size[1]) % labels
        return 3 * F.one_hot(index, 16).T.reshape(1, 16, *size) + self.weight


STOPS = [  # K' of each map, the floor, the steps: why it ends, the steps made, K' of the result
    ((9, 8, 7), 0, 2, "steps", 2, 7),
    ((9,), 0, 0, "steps", 0, 9),
    ((9, 3, 2), 0, 9, "min_labels", 2, 2),
    ((9, 2, 2), 1, 9, "min_labels", 2, 2),  # a picture of one colour
    ((9, 6, 5, 5), 5, 9, "silhouette", 3, 5),
    ((9, 6, 5, 4), 5, 9, "silhouette", 3, 5),  # the last map that has five
    ((9, 3, 2), 5, 9, "silhouette", 2, 9),  # no map has five; the last one above them
    ((9, 3, 6), 5, 9, "silhouette", 2, 6),
    ((9, 3, 2), 3, 9, "silhouette", 2, 3),
    ((4, 2), 8, 9, "silhouette", 1, 4),  # the first map has too few already
    ((9, 8, 4), 5, 2, "steps", 2, 8),  # the last update made too few
]


def test_each_reason_to_stop():
    for counts, floor, steps, stop, done, kept in STOPS:
        with case(counts, floor):
            found = segment(Scripted(*counts), picture(4, 8), steps=steps, floor=floor, **SGD)
            assert (found.stop, len(found.losses)) == (stop, done)
            assert found.clusters == list(counts[:done])
            assert cluster_count(torch.from_numpy(found.labels)) == kept


def test_no_number_of_labels_stops_the_public_codes_network(bodies, monkeypatch):
    network = Truncated(bodies["resnet18"])
    monkeypatch.setattr(network, "response", Scripted(2, 1, 2, 1).response)
    monkeypatch.setattr(network, "score", torch.nn.Identity())
    found = segment(network, picture(4, 8), steps=3, **SGD | {"lr": 0.0})
    assert (found.stop, found.clusters) == ("steps", [2, 1, 2])


def test_a_caller_without_gradients_gets_the_same_map(bodies):
    network, x = pyramid_of(bodies["resnet18"], 8), picture(32, 64)
    wanted = segment(network, x, steps=1, **SGD)
    with torch.no_grad():
        found = segment(network, x, steps=1, **SGD)
    assert found.losses == wanted.losses
    np.testing.assert_array_equal(found.labels, wanted.labels)


def test_a_loss_that_is_not_finite_is_an_error():
    nan = float("nan")
    for counts, step, fix in (((nan,), 1, "weights of the backbone"), ((9, nan), 2, "--lr 0.01")):
        with pytest.raises(SdkError, match=rf"the loss is nan in step {step}\n.*{fix}"):
            segment(Scripted(*counts), picture(4, 8), steps=5, **SGD)
