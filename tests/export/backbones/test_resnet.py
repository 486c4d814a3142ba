"""ResNets with random weights: their names, their features, and files that are refused."""

import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")

from torch.nn import functional as F  # noqa: E402

from export.backbones.load import load_backbone  # noqa: E402
from export.backbones.resnet import ResNet  # noqa: E402
from runtime.errors import BundleError, InputError  # noqa: E402


def random_state(depth):
    """A state dict whose batch normalisations are not trivial, with a classifier."""
    random = torch.Generator().manual_seed(depth)
    state = ResNet(depth).state_dict()
    for key, value in state.items():
        if value.dtype == torch.float32:
            value.normal_(0, 0.05, generator=random)
            if "running_var" in key or value.dim() == 1:
                value.abs_().add_(0.5)
    wide = 512 if depth == 18 else 2048
    return state | {"fc.weight": torch.zeros(1000, wide), "fc.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def states():
    return {depth: random_state(depth) for depth in (18, 50)}


@pytest.fixture(scope="module")
def file(states, tmp_path_factory):
    """A file of a ResNet-18."""
    path = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save(states[18], path)
    return path


def picture(side=64):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def norm(x, state, name):
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{name}.{n}"].double() for n in names)
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def by_hand(x, state, depth, last):
    """The features by torch's functions, with the strides and dilations written out."""
    state = {key: value.double() for key, value in state.items()}
    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, stride in ((1, 1), (2, 2), (3, 2), (4, 1))[:last]:
        for block in range(10):
            name = f"layer{layer}.{block}"
            if f"{name}.conv1.weight" not in state:
                break
            step = stride if block == 0 else 1
            first = 2 if layer == 4 and block > 0 else 1  # the dilation where the stride was
            wide = {"stride": step, "padding": first, "dilation": first}
            second = 2 if layer == 4 else 1
            narrow = {"padding": second, "dilation": second}
            sides = [{}, wide, {}] if depth == 50 else [wide, narrow]
            y = x
            for i, options in enumerate(sides, 1):
                y = F.conv2d(y, state[f"{name}.conv{i}.weight"], **options)
                y = norm(y, state, f"{name}.bn{i}")
                y = F.relu(y) if i < len(sides) else y
            if f"{name}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=step)
                x = norm(x, state, f"{name}.downsample.1")
            x = F.relu(x + y)
    return x


@pytest.mark.parametrize(
    ("depth", "features", "channels"),
    [(18, "layer4", 512), (18, "layer3", 256), (50, "layer4", 2048), (50, "layer3", 1024)],
)
def test_features_equal_those_by_hand(states, tmp_path, depth, features, channels):
    torch.save(states[depth], tmp_path / "weights.pt")
    backbone = load_backbone(str(tmp_path / "weights.pt"), features)
    assert (backbone.name, backbone.channels, backbone.stride) == (f"resnet{depth}", channels, 16)
    # of R, G, B, as torchvision states them
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone.padding == "symmetric"
    found = backbone.module.double()(picture().double())
    expected = by_hand(picture().double(), states[depth], depth, int(features[-1]))
    assert found.shape == (1, channels, 4, 4)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [18, 50])
def test_every_second_dilated_feature_is_that_of_stride_32(states, depth):
    own = {k: v for k, v in states[depth].items() if not k.startswith("fc.")}
    dense, coarse = ResNet(depth).eval().double(), ResNet(depth, dilated=False).eval().double()
    dense.load_state_dict(own)
    coarse.load_state_dict(own)
    with torch.no_grad():
        found, expected = dense(picture(96).double()), coarse(picture(96).double())
    assert found.shape[2:] == (6, 6) and torch.allclose(found[:, :, ::2, ::2], expected)


def test_the_parameters_are_as_many_as_published():
    """torchvision publishes 11,689,512 and 25,557,032, of which fc has 513,000 and 2,049,000."""
    for depth, count in ((18, 11_689_512 - 513_000), (50, 25_557_032 - 2_049_000)):
        assert sum(p.numel() for p in ResNet(depth).parameters()) == count


def test_the_form_of_the_file_does_not_matter(states, file, tmp_path):
    from safetensors.torch import save_file

    plain, expected = states[18], load_backbone(str(file)).module(picture())
    old = {k: v for k, v in plain.items() if not k.endswith("num_batches_tracked")}
    wrapped = {f"module.backbone.{k}": v for k, v in old.items() if not k.startswith("fc.")}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "moco.pth")
    save_file(plain, tmp_path / "own.safetensors")
    torch.save({k: v.half() for k, v in old.items()}, tmp_path / "half.bin")
    for name in ("moco.pth", "own.safetensors"):
        assert torch.equal(load_backbone(str(tmp_path / name)).module(picture()), expected), name
    half = load_backbone(str(tmp_path / "half.bin")).module(picture())
    assert half.dtype == torch.float32 and torch.allclose(half, expected, rtol=0.05, atol=0.05)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def test_wrong_weights_are_named(states, tmp_path):
    plain = states[18]
    nan = plain | {"bn1.bias": torch.full((64,), torch.nan)}
    for number, (state, match) in enumerate(
        [
            (without(plain, "layer4.1.bn2.weight"), r"ResNet-18, .*missing: layer4.1.bn2.weight\n"),
            (plain | {"queue": torch.zeros(3)}, r"unexpected: queue\n"),
            (plain | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"another shape: conv1.weight\n"),
            (nan, r"not finite: bn1.bias\n"),
            ({f"module.{k}": v for k, v in plain.items()} | {"queue": torch.zeros(1)}, "missing: "),
            (ResNet(50).state_dict() | {"layer3.6.conv1.weight": torch.zeros(1)}, r"ResNet-50, "),
        ]
    ):
        torch.save(state, tmp_path / f"{number}.pth")
        with pytest.raises(BundleError, match=match):
            load_backbone(str(tmp_path / f"{number}.pth"))


def test_unknown_features_are_refused(file):
    with pytest.raises(InputError, match=r"features is 'layer5'; a ResNet has layer4, layer3"):
        load_backbone(str(file), "layer5")


def test_stages_are_those_of_the_layers(states, file):
    """Not dilated, for pictures of any size, and the last one is the feature map."""
    backbone = load_backbone(str(file), dilated=False)
    assert (backbone.stride, backbone.channels) == (32, 512)
    x = picture(64)[:, :, :33, :50]
    found = [*backbone.module.stages(x)]
    assert [tuple(y.shape[1:]) for y in found] == [
        (64, 9, 13), (128, 5, 7), (256, 3, 4), (512, 2, 2),
    ]  # fmt: skip
    for last, stage in enumerate(found[:3], 1):  # layer4 is dilated there
        assert torch.allclose(stage.double(), by_hand(x.double(), states[18], 18, last), atol=1e-3)
    assert torch.equal(backbone.module(x), found[3])
    assert backbone.module.widths == (64, 128, 256, 512)
    assert ResNet(50).widths == (256, 512, 1024, 2048)
