"""Vision transformers with random weights: tokens, keys, registers, and folders refused."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")
transformers = pytest.importorskip("transformers", reason="reads checkpoint folders")

from export.backbones.load import load_backbone  # noqa: E402
from export.backbones.vit import KEYS, key_projection  # noqa: E402
from runtime.errors import BundleError, InputError, MissingBackend  # noqa: E402

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
SETTINGS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "do_center_crop": True}
SIDES = {"vit": 8, "dinov2": 14, "dinov2_with_registers": 14}


def network(kind):
    """A tiny network of random weights whose position embeddings are for another size."""
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(**SMALL, intermediate_size=8, image_size=32, patch_size=8)
        return transformers.ViTModel(config)  # with a pooler, which is not read
    options = SMALL | {"mlp_ratio": 1, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**options))
    config = transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a checkpoint folder."""
    root = tmp_path_factory.mktemp("vit")
    for kind in SIDES:
        network(kind).save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return {kind: root / kind for kind in SIDES}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the folder of the ViT, which a test may change."""
    return shutil.copytree(folders["vit"], tmp_path / "copy")


def sha256_of(folder, *names):
    config = json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True)
    parts = [config.encode(), *((folder / name).read_bytes() for name in names)]
    hashes = "".join(hashlib.sha256(part).hexdigest() for part in parts)
    return hashlib.sha256(hashes.encode()).hexdigest()


def picture(side, rows=3, columns=5):
    random = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, rows * side, columns * side, generator=random)


def tokens_and_keys(kind, images):
    """Of all tokens: after the last normalisation, and the last block's keys by its own weights."""
    own = network(kind).eval()
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        found = own(pixel_values=images, output_hidden_states=True, **options)
        state, last = own.state_dict(), SMALL["num_hidden_layers"] - 1
        # The weights' names in this version: of the norm before the attention, and of the keys.
        before = found.hidden_states[last]
        name = "layernorm_before" if kind == "vit" else "norm1"
        ends = (f".{last}.{name}.weight", f".{last}.{name}.bias")
        weight, bias = (next(v for k, v in state.items() if k.endswith(end)) for end in ends)
        x = torch.nn.functional.layer_norm(before, (12,), weight, bias, own.config.layer_norm_eps)
        key = {k.rpartition(".")[2]: v for k, v in state.items()
               if f".{last}." in k and (".k_proj." in k or ".key." in k)}  # fmt: skip
        return found.last_hidden_state, x @ key["weight"].T + key["bias"]


@pytest.mark.parametrize("kind", SIDES)
def test_features_are_those_of_the_patches(folders, kind):
    side, skipped = SIDES[kind], 5 if kind.endswith("registers") else 1
    images = picture(side)
    for features, expected in zip(("tokens", "keys"), tokens_and_keys(kind, images), strict=True):
        backbone = load_backbone(str(folders[kind]), features)
        found = backbone.module(images)
        assert (backbone.channels, backbone.stride) == (12, side)
        assert found.shape == (2, 12, 3, 5) and not found.requires_grad
        for row, column in ((0, 0), (0, 4), (2, 1)):  # patches are numbered row by row
            token = expected[:, skipped + row * 5 + column]
            assert torch.allclose(found[:, :, row, column], token, atol=1e-6), (features, row)


def test_the_backbone_states_what_the_folder_states(folders, monkeypatch):
    monkeypatch.chdir(folders["vit"].parent)
    backbone = load_backbone("vit")
    assert (backbone.mean, backbone.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert backbone.sha256 == sha256_of(folders["vit"], "model.safetensors")
    assert (backbone.name, backbone.features, backbone.padding) == ("vit", "tokens", "none")
    assert load_backbone(backbone.source, backbone.features).key == backbone.key
    assert backbone.source == str(folders["vit"])
    assert backbone.library == f"transformers {transformers.__version__}"


def test_weights_of_half_precision_are_computed_in_single(folders, copy):
    network("vit").half().save_pretrained(copy)
    found = load_backbone(str(copy)).module(picture(8))
    assert found.dtype == torch.float32
    expected = load_backbone(str(folders["vit"])).module(picture(8))
    assert torch.allclose(found, expected, atol=0.01) and not torch.equal(found, expected)


def test_several_files_have_a_hash_of_their_hashes(tmp_path):
    own = network("vit")
    own.save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    files = sorted(tmp_path.glob("*.safetensors"))
    found = load_backbone(str(tmp_path)).sha256
    assert len(files) > 1 and found == sha256_of(tmp_path, *(f.name for f in files))


def test_the_hash_changes_with_the_settings_in_config_json(copy):
    """The weights fit both numbers of heads, but the features differ."""
    before = load_backbone(str(copy))
    values = json.loads((copy / "config.json").read_text())
    for change, same in (({}, True), ({"num_attention_heads": 2}, False)):
        text = json.dumps(dict(reversed([*(values | change).items()])), indent=4)
        (copy / "config.json").write_text(text)
        after = load_backbone(str(copy))
        assert (after.sha256 == before.sha256) == (after.key == before.key) == same
        assert torch.equal(after.module(picture(8)), before.module(picture(8))) == same


@pytest.mark.parametrize(("kind", "features"), [("vit", "keys"), ("dinov2", "tokens")])
def test_the_graph_equals_the_network(folders, tmp_path, kind, features):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = load_backbone(str(folders[kind]), features).module
    images = picture(SIDES[kind])[:1]
    program = torch.onnx.export(module, (images,), dynamo=True, opset_version=18)
    program.save(tmp_path / "vit.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(found, module(images).numpy(), atol=1e-4)


def test_a_size_that_is_no_multiple_names_the_nearest(folders):
    module = load_backbone(str(folders["dinov2"])).module
    with pytest.raises(InputError, match=r"224 x 230 .*multiples of 14(?s:.*)choose 224 x 224"):
        module(torch.zeros(1, 3, 224, 230))
    with pytest.raises(InputError, match="choose 14 x 14, the nearest size: --imgsz 14"):
        module(torch.zeros(1, 3, 3, 15))


def test_the_keys_of_all_supported_versions_are_found():
    """By stand-ins: 4.50 to 5.0 call the key projection otherwise than the installed version."""
    for name in KEYS:
        stand_in = SimpleNamespace(
            named_modules=lambda name=name: [("", None), (name.format(11), None)]
        )
        assert key_projection(stand_in, 11) == name.format(11)
    with pytest.raises(MissingBackend, match=r"SimpleNamespace is at none of encoder.layer.10.att"):
        key_projection(stand_in, 10)


def test_wrong_folders_are_refused(copy):
    settings, config = copy / "preprocessor_config.json", copy / "config.json"
    values = json.loads(config.read_text())
    for path, text, match in (
        (config, json.dumps(values | {"model_type": "swin"}), "'swin'; wanted 'vit', 'dinov2', 'd"),
        (
            config,
            json.dumps(values | {"patch_size": [8, 8]}),
            r"patch_size is \[8, 8\]; wanted a whole number, 1 to 256",
        ),
        *(
            (config, json.dumps(values | {key: value}), f"config.json: {key} is {value}; wanted a")
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
            for value in (-1, 0, 10**9, 1.5)
        ),
        (
            config,
            json.dumps(values | {"num_attention_heads": 5}),
            "hidden_size is 12, and num_attention_heads 5; wanted a multiple",
        ),
        (config, "[", "config.json cannot be read"),
        (settings, "{}", r"image_mean is None; wanted three numbers"),
        (
            settings,
            json.dumps(SETTINGS | {"image_std": [1, "a", 1]}),
            "image_std is .*; wanted thr",
        ),
        (settings, json.dumps(SETTINGS | {"image_std": [1, 0, 1]}), "std of copy is"),
        (settings, json.dumps(SETTINGS | {"do_normalize": 1}), "do_normalize is 1; wanted true"),
        (
            settings,
            json.dumps(SETTINGS | {"rescale_factor": 0}),
            "rescale_factor is 0; wanted a nu",
        ),
        (settings, None, "preprocessor_config.json is missing"),
        (config, None, "config.json is missing"),
    ):
        before = path.read_text()
        path.write_text(text) if text is not None else path.unlink()
        with pytest.raises((InputError, BundleError), match=match):
            load_backbone(str(copy))
        path.write_text(before)
    with pytest.raises(InputError, match="features is 'key'; a vision transformer has tokens, key"):
        load_backbone(str(copy), "key")


def test_a_rescale_factor_is_a_part_of_the_normalisation(copy):
    text = json.dumps(SETTINGS | {"rescale_factor": 2 / 255})
    (copy / "preprocessor_config.json").write_text(text)
    assert load_backbone(str(copy)).mean == (0.2, 0.25, 0.3)
    (copy / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert (load_backbone(str(copy)).mean, load_backbone(str(copy)).std) == ((0.0,) * 3, (1.0,) * 3)


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


def test_wrong_weights_are_refused(copy, capsys, recwarn):
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    good, state = file.read_bytes(), load_file(file)
    save_file({k: v for k, v in state.items() if not k.startswith("layernorm")}, file)
    with pytest.raises(BundleError, match=r"missing: layernorm.bias, layernorm.weight\n"):
        load_backbone(str(copy))
    save_file(state | {"decoder.bias": torch.zeros(1)}, file)
    with pytest.raises(BundleError, match=r"unexpected: decoder.bias\n"):
        load_backbone(str(copy))
    for value in (float("nan"), float("-inf")):
        save_file(state | {"layernorm.bias": torch.full((12,), value)}, file)
        with pytest.raises(BundleError, match="have NaN or infinite values: layernorm"):
            load_backbone(str(copy))
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(BundleError, match="cannot be loaded: "):
        load_backbone(str(copy))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BundleError, match="a Git LFS pointer"):
        load_backbone(str(copy))
    file.unlink()
    torch.save({"layernorm.weight": Hostile()}, copy / "pytorch_model.bin", pickle_protocol=4)
    recwarn.clear()
    with pytest.raises(BundleError, match="no plain weights"):
        load_backbone(str(copy))
    assert "must not run" not in capsys.readouterr().out and not recwarn
