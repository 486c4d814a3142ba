"""The options --mean, --std, --names and --output, for .onnx files that do not contain these."""

import json

import pytest
from cases import case
from exporting import export
from one_layer_networks import MEAN, NAMES, STD, nearest_colour, save

from export.models.load import load_model
from export.models.stated import Stated
from export.to_onnx import freeze
from runtime.bundle.read import Bundle
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, InputError
from sdk import Segmenter

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")

NUMBERS = ("--mean", ",".join(map(str, MEAN)), "--std", *map(str, STD))


@pytest.fixture
def raw(tmp_path):
    """A network as other tools export it, without metadata."""
    weight, bias = nearest_colour()
    return save(tmp_path / "raw.onnx", weight, bias, mean=None, std=None)


def test_a_file_without_metadata_becomes_a_bundle(raw, tmp_path, photos):
    out = tmp_path / "raw.bundle"
    words = ("--model", raw, "--imgsz", "48x72", "--pictures", photos, "-q", "-o", out)
    missing = export(*words)
    assert missing.refused(
        5, "metadata 'mean' is missing", "python -m export --model raw.onnx --mean"
    )
    ended = export(*words, *NUMBERS, "--names", ",".join(NAMES), "--output", "logits")
    assert ended.code == 0, ended
    manifest = Bundle.open(out).manifest
    assert manifest["classes"] == NAMES and manifest["prior"]["output"] == "logits"
    assert manifest["preprocess"]["mean"] == pytest.approx(MEAN.tolist())
    assert manifest["preprocess"]["std"] == pytest.approx(STD.tolist())
    with OnnxEngine(out / "prior.onnx") as engine:
        meta = engine.metadata
    assert json.loads(meta["mean"]) == MEAN.tolist() and json.loads(meta["classes"]) == NAMES
    assert meta["output"] == "logits"
    assert Segmenter(str(out / "prior.onnx"), refine=None).prior.names == NAMES


def test_what_is_stated_replaces_metadata(tmp_path):
    weight, bias = nearest_colour()
    path = save(
        tmp_path / "net.onnx", weight, bias, names=str(dict(enumerate("abcd"))), output="labels"
    )
    stated = Stated(mean=(0.1, 0.2, 0.3), names=NAMES, output="logits")
    model = load_model(str(path), None, (24, 40), stated)
    assert (model.names, model.output) == (NAMES, "logits")
    assert model.preprocess.mean == stated.mean and model.preprocess.std == tuple(STD)
    assert load_model(str(path)).names == list("abcd")
    with pytest.raises(
        InputError, match=r"net returns 4 classes, but has 3 names: a, b, c\n  fix: .*--names"
    ):
        freeze(load_model(str(path), None, (24, 40), Stated(names=list("abc"), output="logits")))


SPELLINGS = [
    ["0.485,0.456,0.406"], ["0.485", "0.456", "0.406"], ["0.485,", "0.456,", "0.406"],
    ["[0.485, 0.456, 0.406]"], ["(0.485", "0.456", "0.406)"],
]  # fmt: skip


def test_numbers_in_every_spelling():
    for words in SPELLINGS:
        with case(words):
            stated = Stated.from_words(mean=words, std=words)
            assert stated.mean == stated.std == (0.485, 0.456, 0.406)
    assert Stated.from_words(mean=[".5", ".5", ".5"]).metadata() == {"mean": "[0.5, 0.5, 0.5]"}


def test_the_output_s_name_and_kind():
    stated = Stated.from_words(output="labels", output_name="scores")
    assert stated.metadata() == {"output": "labels", "output_name": "scores"}
    assert stated.options == ["--output", "--output-name"]
    assert Stated().metadata() == {} and Stated().options == []


def test_negative_numbers_on_the_command_line(raw, tmp_path, photos):
    words = ("--model", raw, "--imgsz", "48x72", "--pictures", photos, "-q", "--std", "1,1,1")
    for text in (("-0.5,-.25,-1",), ("-0.5", "-.25", "-1"), ("[-0.5,-.25,-1]",)):
        with case(text):
            ended = export(*words, "--mean", *text, "-o", tmp_path / "b")
            assert ended.code == 0, ended
            preprocess = Bundle.open(tmp_path / "b").manifest["preprocess"]
            assert preprocess["mean"] == [-0.5, -0.25, -1]


WRONG_NUMBERS = [
    (["123.7,116.3,103.5"], r"mean is \(123.7, .*; wanted numbers .*\n  fix: divide them by 255"),
    (["0.5"], r"mean is \(0.5,\); wanted three numbers"),
    (["0.5,0.5,0.5,0.5"], "wanted three numbers"),
    (["nan,0,0"], "wanted finite numbers"),
    (["a,b,c"], r"mean is 'a,b,c'; wanted three numbers\n  fix: --mean 0.485,0.456,0.406"),
    ([""], "mean is ''; wanted three numbers"),
]  # fmt: skip


def test_numbers_that_do_not_fit():
    for words, match in WRONG_NUMBERS:
        with case(words), pytest.raises(InputError, match=match):
            Stated.from_words(mean=words)
    with pytest.raises(InputError, match=r"std is \(0.0, 1.0, 1.0\); wanted numbers above 0"):
        Stated.from_words(std=["0,1,1"])
    with pytest.raises(InputError, match="output is 'scores'; wanted logits, probabilities"):
        Stated(output="scores")


def test_names_in_every_spelling(tmp_path):
    lines = "\ufeffroad\r\nblue sky\r\nwald, grün\r\n\r\n"
    files = {
        "lines.txt": (lines, ["road", "blue sky", "wald, grün"]),
        "list.json": ('["road", "sky"]', ["road", "sky"]),
        "dict.json": ('{"1": "sky", "0": "road"}', ["road", "sky"]),
        "one.txt": ("road", ["road"]),
        "commas.txt": ("road, sky,sea\n", ["road", "sky", "sea"]),
        "config.json": ('{"id2label": {"0": "road", "1": "sky"}, "x": 1}', ["road", "sky"]),
        "a, b.txt": ("road\nsky", ["road", "sky"]),
    }
    for name, (text, wanted) in files.items():
        with case(name):
            (tmp_path / name).write_text(text, encoding="utf-8")
            assert list(Stated.from_words(names=str(tmp_path / name)).names) == wanted
    for text in (
        *("road,sky", "road, sky", '["road", "sky"]'),
        *("{0: 'road', 1: 'sky'}", "('road', 'sky')"),
    ):
        with case(text):
            assert list(Stated.from_words(names=text).names) == ["road", "sky"]
    for text in ("road", "blue sky", " road "):
        with case(text):
            assert list(Stated.from_words(names=text).names) == [text.strip()]
    many = ",".join(["a long name"] * 500)  # too long for a path
    assert len(Stated.from_words(names=many).names) == 500


def test_one_name_is_that_of_the_foreground(tmp_path, photos):
    weight, bias = nearest_colour()
    path = save(tmp_path / "net.onnx", weight[:1], bias[:1])
    words = ("--model", path, "--imgsz", "48x72", "--pictures", photos, "-q", "--names", "brick")
    assert export(*words, "--allow-one-class", "-o", tmp_path / "b").code == 0
    assert Bundle.open(tmp_path / "b").manifest["classes"] == ["background", "brick"]


def test_names_that_do_not_fit(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "gap.txt").write_text("road\n\nsky\n")
    (tmp_path / "no_text.txt").write_bytes(b"road\n\xff\n")
    (tmp_path / "long.txt").write_bytes(b"a\n" * 2**20)
    for text, match in [
        ("no.txt", r"'no.txt', which is no list with commas .*: No such file.*\n  fix: --names"),
        ("empty.txt", "empty.txt contains no names of classes\n  fix: write a name for each class"),
        ("gap.txt", "gap.txt: name 1 of 3 is empty"),
        ("no_text.txt", "names is .*no_text.txt'.*cannot be read as a file: 'utf-8' codec"),
        ("long.txt", "has more than 1048576 bytes; wanted names of classes"),
        (".", "Is a directory"),
    ]:  # fmt: skip
        with case(text), pytest.raises(InputError, match=match):
            Stated.from_words(names=str(tmp_path / text) if "no.txt" != text else text)
    for text, match in [
        ("road,,sky", "names: name 1 of 3 is empty"),
        ('{"0": "road", "2": "sky"}', r"names has the class numbers .*; wanted each number from 0"),
        ("[]", "names contains no names of classes"),
        ("nosuch.names", "'nosuch.names', which is no list .*: No such file"),
        ("folder/nosuch", "'folder/nosuch', which is no list .*: No such file"),
        ("[1, 2]", "names is .*; wanted a list of texts"),
        ("21", "names is 21; wanted a list of texts"),
        ("{'road', 'sky'}", "names is .*; wanted a list of texts"),
        ("x" * 5000, "cannot be read as a file: File name too long"),
        ("a\0b", "cannot be read as a file: embedded null"),
    ]:
        with case(text[:40]), pytest.raises(InputError, match=match):
            Stated.from_words(names=text)


def test_other_models_state_these_themselves(tmp_path):
    for model, code, text in [
        ("kmeans", 1, "--mean, --std: kmeans has no such settings"),
        ("my_nets:net", 1, "these describe .onnx files; my_nets:net returns its own"),
        ("segformer", 1, "--mean, --std: SegFormer states these in its own files"),
    ]:
        with case(model):
            ended = export("--model", model, *NUMBERS, "-q", "-o", tmp_path / "x.bundle")
            assert ended.refused(code, text, "fix: ")
            assert not (tmp_path / "x.bundle").exists()


def test_a_file_that_is_newer_than_what_reads_it(raw, tmp_path, photos):
    model = onnx.load(raw)
    model.opset_import[0].version, model.ir_version = 21, 11
    onnx.save(model, raw)
    out = tmp_path / "raw.bundle"
    words = ("--model", raw, *NUMBERS, "--imgsz", "48x72", "--pictures", photos, "-q", "-o", out)
    ended = export(*words)
    assert ended.code == 0, ended
    for text in (
        "WARNING: raw.onnx has opset 21; TensorRT 10.3 reads opsets up to 20",
        "WARNING: raw.onnx has IR version 11; ONNX Runtime 1.18 to 1.20 read up to 10",
    ):
        assert ended.err.count(text) == 1, ended.err
    model.opset_import[0].version, model.ir_version = 20, 10
    onnx.save(model, raw)
    assert "WARNING" not in export(*words).err
    for change in ({"ir_version": 99}, {"opset": 99}):
        model.ir_version = change.get("ir_version", 10)
        model.opset_import[0].version = change.get("opset", 20)
        onnx.save(model, raw)
        with pytest.raises(BundleError, match=r" 99; onnx .* reads up to \d+\n  fix: pip install"):
            load_model(str(raw))
    model.opset_import[0].domain, model.ir_version = "ai.onnx", 10  # the other name of ""
    onnx.save(model, raw)
    with pytest.raises(BundleError, match=r"raw.onnx has opset 99; onnx"):
        load_model(str(raw))
