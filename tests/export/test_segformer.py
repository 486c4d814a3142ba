"""Checkpoints of SegFormer in Hugging Face's format, whole and broken."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cases import case
from checkpoints import NAMES, SIZE, picture, run
from exporting import ROOT

from export.models.load import load_model
from export.models.segformer import segformer
from export.models.stated import Stated
from export.to_onnx import freeze
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError

torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


def state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **changes):
    """Change a JSON file; None takes a key out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def fresh(whole, tmp_path):
    """A new copy of the checkpoint, in the place of the last one."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return shutil.copytree(whole, tmp_path / "copy")


# Checkpoints


def test_checkpoint_is_read_whole(whole):
    model = load_model("segformer", whole)
    assert (model.name, model.names, model.output) == ("tiny-segformer", NAMES, "logits")
    assert model.trained and "research" in model.licence
    assert model.preprocess.size(480, 640) == SIZE
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(whole).eval()
    x = model.preprocess(picture())
    with torch.no_grad():
        wanted = own(torch.from_numpy(x)).logits.numpy()
    np.testing.assert_array_equal(run(model, x), wanted)
    assert wanted.shape == (1, 5, 16, 24) and np.ptp(wanted.argmax(1)) > 0


def test_other_ways_to_store_the_weights_give_the_same_network(whole, folder):
    x = np.random.default_rng(0).standard_normal((1, 3, *SIZE), np.float32)
    wanted = run(segformer(whole), x)
    os.remove(folder / "model.safetensors")
    torch.save(state(whole), folder / "pytorch_model.bin")
    np.testing.assert_array_equal(run(segformer(folder), x), wanted)
    os.remove(folder / "pytorch_model.bin")
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(whole)
    own.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(run(segformer(folder), x), wanted)
    own.half().save_pretrained(folder / "half")
    shutil.copy(whole / "preprocessor_config.json", folder / "half")
    single = segformer(folder / "half")  # computed in FP32 whatever the file holds
    np.testing.assert_allclose(run(single, x), wanted, atol=2e-3 * np.abs(wanted).max())


BROKEN = [
    (lambda f: os.remove(f / "config.json"), InputError, r"config.json is missing.*\n.*copy"),
    (lambda f: (f / "config.json").write_text("{"), InputError, "config.json cannot be read"),
    (lambda f: (f / "config.json").write_text("[]"), InputError, "contains a list; wanted a JSON"),
    (lambda f: os.remove(f / "preprocessor_config.json"), InputError,
     r"preprocessor_config.json is missing.*\n  fix: .*--mean .* --std "),
    (lambda f: os.remove(f / "model.safetensors"), BundleError, "cannot be loaded: .*no file"),
    (lambda f: edit(f / "config.json", model_type="bert"), InputError,
     "is for 'bert'; wanted 'segformer'\n.*--model PATH.onnx"),
    (lambda f: edit(f / "config.json", id2label={"0": "a", "2": "b"}), InputError,
     r"id2label has the class numbers \['0', '2'\]; wanted each number from 0 to 1 once\n  fix: "),
    (lambda f: edit(f / "config.json", id2label=5), InputError,
     r"id2label is a int; wanted an object of class numbers and names\n  fix: write {"),
    (lambda f: edit(f / "config.json", id2label=["a", "b"]), InputError, "id2label is a list"),
    (lambda f: edit(f / "config.json", id2label={"0": 1}), InputError, "id2label is {'0': 1}"),
    (lambda f: edit(f / "config.json", num_attention_heads=[0]), BundleError, "cannot be loaded"),
    (lambda f: edit(f / "config.json", depths="deep"), BundleError, "cannot be loaded: "),
    (lambda f: edit(f / "config.json", hidden_sizes=[8, 24]), BundleError,
     "mismatched: .*and [0-9]+ more"),
    (lambda f: edit(f / "config.json", depths=[2, 1]), BundleError,
     r"missing: segformer\.\S+, .* and [0-9]+ more"),
    (lambda f: edit(f / "config.json", depths=None, hidden_sizes=None), BundleError,
     "are not those of the network in config.json"),
]  # fmt: skip


def test_broken_folder_is_named(whole, tmp_path):
    for break_it, error, match in BROKEN:
        folder = fresh(whole, tmp_path)
        with case(match):
            break_it(folder)
            with pytest.raises(error, match=match):
                segformer(folder)


def test_missing_head_is_no_random_head(folder):
    tensors = state(folder)
    del tensors["decode_head.classifier.weight"]
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"config.json; missing: decode_head.classifier.weight\n"):
        segformer(folder)


def test_extra_and_misshapen_weights_are_named(folder):
    tensors = state(folder)
    tensors["decode_head.second.weight"] = torch.zeros(3)
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"unexpected: decode_head.second.weight\n"):
        segformer(folder)
    del tensors["decode_head.second.weight"]
    tensors["decode_head.classifier.bias"] = torch.zeros(7)
    save(folder, tensors)
    with pytest.raises(BundleError, match=r"mismatched: decode_head.classifier.bias\n"):
        segformer(folder)


def test_truncated_weights_are_named(whole, tmp_path):
    for length in [0, 4, 8, 2000, -1]:
        folder = fresh(whole, tmp_path)
        with case(length):
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:length])
            with pytest.raises(BundleError, match="copy cannot be loaded: "):
                segformer(folder)


class Attack:
    """A pickle that runs code when it is read."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_and_does_not_run(tmp_path, whole):
    for name, write in {
        "torch": torch.save,
        "pickle": lambda o, p: p.write_bytes(pickle.dumps(o)),
    }.items():
        folder = fresh(whole, tmp_path)
        with case(name):
            proof = tmp_path / f"{name} ran"
            os.remove(folder / "model.safetensors")
            write({"decode_head.classifier.bias": Attack(proof)}, folder / "pytorch_model.bin")
            with pytest.raises(BundleError, match=r"(?s)no plain weights.*fix: .*safetensors"):
                segformer(folder)
            assert not proof.exists()
            pickle.loads(
                (folder / "pytorch_model.bin").read_bytes()
            ) if write is not torch.save else None
            assert proof.exists() == (write is not torch.save)  # the attack is a real one


def test_code_in_the_folder_does_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    assert segformer(folder).names == NAMES


def test_nothing_is_downloaded():
    for name in ["nvidia/segformer-b0-finetuned-ade-512-512", "no-such-folder"]:
        with case(name):
            with pytest.raises(
                InputError, match=r"nothing is downloaded\n  fix: .*hf download .*--weights"
            ):
                load_model("segformer", name)


SIZES = [
    ({"size": 128}, (128, 128)),
    ({"size": {"shortest_edge": 160}}, (160, 160)),
    ({"size": {"height": 32, "width": 160}}, (32, 160)),
    ({"size": None}, (512, 512)),
]


def test_size_is_read_in_all_its_spellings(whole, tmp_path):
    for changes, size in SIZES:
        folder = fresh(whole, tmp_path)
        with case(changes):
            edit(folder / "preprocessor_config.json", **changes)
            assert segformer(folder).preprocess.size(1, 1) == size
            assert segformer(folder, (64, 32)).preprocess.size(1, 1) == (64, 32)


NORMALISATIONS = [
    {},
    {"image_mean": None, "image_std": None, "do_rescale": None, "rescale_factor": None},
    {"do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]},
    {"do_rescale": False, "image_mean": [123.7, 116, 104], "image_std": [58.4, 57, 57.4]},
]


def test_normalisation_is_that_of_hugging_face(whole, tmp_path):
    """Without resizing nothing but rounding may differ."""
    for changes in NORMALISATIONS:
        folder = fresh(whole, tmp_path)
        with case(changes):
            edit(folder / "preprocessor_config.json", **changes)
            processor = transformers.SegformerImageProcessor.from_pretrained(folder)
            image = picture(*SIZE)
            wanted = processor(image, return_tensors="np")["pixel_values"]
            ours = segformer(folder).preprocess(image)
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_resizing_is_near_that_of_hugging_face(folder):
    """Averaging against Pillow's triangle filter; the bounds are what was seen, rounded up."""
    processor = transformers.SegformerImageProcessor.from_pretrained(folder)
    ours = segformer(folder).preprocess
    image = picture(321, 481)
    difference = ours(image) - processor(image, return_tensors="np")["pixel_values"]
    assert np.abs(difference).mean() < 0.02 and np.abs(difference).max() < 0.8
    assert abs(difference.mean()) < 2e-3  # no shift


UNKNOWN = [
    ({"do_resize": False}, "do_resize is False; wanted true"),
    ({"do_normalize": "yes"}, "do_normalize is 'yes'; wanted true or false"),
    ({"do_pad": True}, "do_pad is True; wanted false: this step is not supported"),
    (
        {"do_center_crop": True},
        'do_center_crop is True; .*\n  fix: set "do_center_crop"',
    ),
    (
        {"resample": 3},
        r'resample is 3; wanted 2 \(bilinear\)\n  fix: set "resample": 2',
    ),
    (
        {"size": {"longest_edge": 512}},
        "size is {'longest_edge': 512}; wanted .*\n  fix: .*--imgsz",
    ),
    ({"size": "big"}, "size is 'big'; wanted a number"),
    ({"size": {"height": 0, "width": 3}}, "size is .*wanted a number"),
    ({"rescale_factor": 0}, "rescale_factor is 0; wanted a number above 0"),
    ({"rescale_factor": "x"}, "rescale_factor is 'x'; wanted a number above 0"),
    ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; wanted three numbers"),
    ({"image_std": [1, 1, "a"]}, "image_std is .*; wanted three numbers"),
    ({"image_std": [1, 1, 0]}, "std is .*wanted numbers above 0"),
    ({"size": 16}, r"imgsz is \(16, 16\); SegFormer wants at least 32 x 32"),
]


def test_unknown_preprocessing_names_the_key(whole, tmp_path):
    for changes, match in UNKNOWN:
        folder = fresh(whole, tmp_path)
        with case(changes):
            edit(folder / "preprocessor_config.json", **changes)
            with pytest.raises(InputError, match=match):
                segformer(folder)


def test_imgsz_replaces_a_size_that_is_not_understood(folder):
    edit(folder / "preprocessor_config.json", size={"longest_edge": 512})
    assert segformer(folder, (64, 32)).preprocess.size(1, 1) == (64, 32)


def test_mean_and_std_of_a_checkpoint_without_its_preprocessing(folder):
    stated = Stated(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    with pytest.raises(InputError, match=r"--mean, --std: .*json states these\n  fix: leave"):
        load_model("segformer", folder, None, stated)
    os.remove(folder / "preprocessor_config.json")
    own = load_model("segformer", folder, (64, 96), stated).preprocess
    assert (own.mean, own.std, own.size(1, 1)) == (stated.mean, stated.std, (64, 96))
    with pytest.raises(InputError, match=r"preprocessor_config.json is missing"):
        load_model("segformer", folder, None, Stated(mean=stated.mean))
    for other in (Stated(names=["a"]), Stated(output="labels")):
        with pytest.raises(InputError, match=f"{other.options[0]}: SegFormer states these in its"):
            load_model("segformer", folder, None, other)
    with pytest.raises(InputError, match="--mean, --std: SegFormer states these"):
        load_model("segformer", None, None, stated)


def test_a_hub_cache_is_found_and_named(whole, tmp_path):
    cache = tmp_path / "hub" / "models--nvidia--segformer-b0"
    snapshot = cache / "snapshots" / "489d5cd81a0b59fab9b7ea758d3548ebe99677da"
    shutil.copytree(whole, snapshot)
    assert segformer(snapshot).name == "segformer-b0"
    for revision in ("00older", "zzolder"):  # the newest one is named
        shutil.copytree(snapshot, snapshot.with_name(revision))
        os.utime(snapshot.with_name(revision), (0, 0))
    for folder in (cache, cache / "snapshots", tmp_path / "hub"):
        with pytest.raises(InputError, match="is no checkpoint; it contains checkpoints") as caught:
            segformer(folder)
        assert caught.value.fix == f"--weights {snapshot}"


def fails(tmp_path, whole, package, error):
    """What the export prints if a package of this name cannot be imported because of ``error``."""
    folder, info = tmp_path / package, tmp_path / f"{package}-0.1.dist-info"
    folder.mkdir()
    info.mkdir()
    (folder / "__init__.py").write_text(f"raise {error!r}")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n")
    words = ("-m", "export", "--model", "segformer", "--weights", whole)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stderr
    return done.stderr


def test_libraries_that_do_not_fit_are_not_called_missing(tmp_path, whole):
    """transformers imports a torchvision that is installed; one of another torch raises."""
    reason = "operator torchvision::nms does not exist"
    printed = fails(tmp_path, whole, "torchvision", RuntimeError(reason))
    assert f"are installed, but cannot be imported: {reason}\n" in printed
    assert "fix: torchvision does not fit torch: pip install --upgrade torch" in printed


def test_a_torch_that_lacks_a_library_is_not_called_missing(tmp_path, whole):
    reason = "libcudart.so.12: cannot open shared object file"
    printed = fails(tmp_path, whole, "torch", OSError(reason))
    assert f"are installed, but cannot be imported: {reason}\n" in printed
    assert "fix: install versions that fit" in printed


def test_classes_without_names_have_none(folder):
    edit(folder / "config.json", id2label=None, label2id=None, num_labels=5)
    assert segformer(folder).names is None


def test_b0_and_b5_have_their_published_sizes():
    """Parameters of SegFormer's table 6 (encoder and decoder), from configs alone."""
    counts = {}
    for name, depths, sizes, width in (
        ("b0", [2, 2, 2, 2], [32, 64, 160, 256], 256),
        ("b5", [3, 6, 40, 3], [64, 128, 320, 512], 768),
    ):
        config = transformers.SegformerConfig(
            depths=depths, hidden_sizes=sizes, decoder_hidden_size=width, num_labels=150
        )
        with torch.device("meta"):  # shapes without numbers
            network = transformers.SegformerForSemanticSegmentation(config)
        counts[name] = sum(p.numel() for p in network.parameters()) / 1e6
    assert counts["b0"] == pytest.approx(3.8, abs=0.1) and counts["b5"] == pytest.approx(
        84.7, abs=1
    )


def test_untrained_b0_says_so_and_is_the_same_each_time():
    before = torch.get_rng_state()
    first, second = segformer(None, (32, 64)), segformer(None, (32, 64))
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.trained and first.names is None and "untrained" in first.name
    x = np.ones((1, 3, 32, 64), np.float32)
    np.testing.assert_array_equal(run(first, x), run(second, x))
    assert sum(p.numel() for p in first.module.parameters()) == pytest.approx(3.75e6, rel=0.01)
    data = freeze(first)
    with OnnxEngine(data) as engine:
        assert "untrained" in engine.metadata["description"]
        np.testing.assert_allclose(engine(x)[0], run(first, x), atol=1e-5)
