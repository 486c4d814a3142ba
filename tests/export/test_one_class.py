"""A network that finds only one class in each picture is refused, or the export warns of it."""

import json

import cv2
import numpy as np
import pytest
from cases import case
from drawn_pictures import quadrants
from exporting import export, files

from export import pack
from export.check_prior import one_class
from export.frozen import Frozen
from runtime.bundle.read import Bundle

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import TensorProto, numpy_helper  # noqa: E402 (after importorskip)

SIZE = (48, 72)
NOTHING = np.zeros((4, 3))  # weights that do not read the picture
WARNING = "warning  the prior returns one class (number "


def network(path, weight=NOTHING, bias=(0, 0, 100, 0), **changes):
    from one_layer_networks import save

    return save(path, weight, bias, inputs=((1, 3, *SIZE),), **changes)


def whole_picture(path):
    """A network that finds another class in each picture, the same in all of its pixels."""
    from one_layer_networks import nearest_colour

    weight, bias = nearest_colour()
    none, shape = np.zeros(0, np.float32), np.array([1, 4, *SIZE])
    tail = [("GlobalAveragePool", {}), ("Resize", {"mode": "nearest"}, none, none, shape)]
    return network(path, 20 * weight, 20 * bias, tail=tail)


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of one of the four colours each."""
    from drawn_pictures import COLOURS

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        picture = np.broadcast_to(colour, (*SIZE, 3)).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), picture[..., ::-1])
    return folder


def test_three_pictures_are_an_error(tmp_path, photos):
    arg_max = {"tail": [("ArgMax", {"axis": 1, "keepdims": 0})], "out": TensorProto.INT64}
    before = files(tmp_path)
    for name, changes in {
        "scores": {},
        "probabilities": {"tail": [("Softmax", {"axis": 1})], "output": "probabilities"},
        "labels": arg_max,  # they have no confidence
    }.items():
        with case(name):
            path = network(tmp_path / "net.onnx", **changes)
            shown = [photos / f"{i}.png" for i in range(3)]
            ended = export("--model", path, "--pictures", *shown, "-q", "-o", tmp_path / "b")
            assert ended.refused(
                3,
                "net returns one class (number 2) with confidence 1.00 in every pixel of each of "
                "3 pictures: 0.png, 1.png, 2.png",
                "--pictures FILE...",
                "--allow-one-class",
            )
            path.unlink()
            assert files(tmp_path) == before


def test_another_class_in_each_picture_is_an_error(tmp_path, pictures):
    words = ("--model", whole_picture(tmp_path / "net.onnx"), "-q", "-o", tmp_path / "b")
    ended = export(*words, "--pictures", pictures)
    assert ended.refused(3, "one class (number 0, 1, 2, 3) with confidence 1.00")


def test_one_and_two_pictures_are_a_warning(tmp_path, photos):
    words = ("--model", network(tmp_path / "net.onnx"), "-q", "-o", tmp_path / "b")
    for count in (1, 2):
        with case(count):
            ended = export(*words, "--pictures", *(photos / f"{i}.png" for i in range(count)))
            assert ended.code == 0 and ended.err == ""
            assert f"{WARNING}2, mean confidence 1.00)" in ended.out
            assert "each picture: name pictures with several classes (--pictures" in ended.out
            done = Bundle.open(tmp_path / "b").manifest["verification"]
            assert done["one_class"] == {"classes": [2], "confidence": 1.0}
            assert done["allow_one_class"] is False


def test_the_user_may_allow_it(tmp_path, photos):
    words = ("--model", network(tmp_path / "net.onnx"), "--pictures", photos, "-o", tmp_path / "b")
    ended = export(*words, "--allow-one-class", "--json", "-q")
    assert ended.code == 0
    done = json.loads(ended.out)["manifest"]["verification"]
    again = export(*words, "--allow-one-class", "-q")
    assert f"{WARNING}2, mean confidence 1.00) in every pixel of each picture\n" in again.out
    assert done["allow_one_class"] is True and done["one_class"]["classes"] == [2]
    assert WARNING in export(*words, "--allow-one-class", "-q").out


def test_a_lower_confidence_is_a_warning(tmp_path, photos):
    path = network(tmp_path / "net.onnx", bias=(0, 2, 1, 0))
    ended = export("--model", path, "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert ended.code == 0 and f"{WARNING}1, mean confidence 0.61)" in ended.out
    done = Bundle.open(tmp_path / "b").manifest["verification"]
    assert done["one_class"]["confidence"] == pytest.approx(np.e**2 / (np.e**2 + np.e + 2))
    for bias, code in [(6.4, 0), (8.1, 3)]:  # confidence 0.995 and 0.9991
        with case(bias):
            path = network(tmp_path / "net.onnx", bias=(0, 0, bias, 0))
            ended = export("--model", path, "--pictures", photos, "-q", "-o", tmp_path / "b")
            assert ended.code == code


def test_two_classes_are_neither(plain):
    assert "one_class" not in Bundle.open(plain[1]).manifest["verification"]


def test_a_lower_precision_that_finds_one_class(tmp_path, photos, monkeypatch):
    """INT8 may differ from FP32 by half of the largest score, so that one class is left."""

    def planted(data, feeds, half):
        model = onnx.load_from_string(data)
        bias = next(t for t in model.graph.initializer if list(t.dims) == [4])
        shifted = numpy_helper.to_array(bias) + np.float32([0, 45, 0, 0])
        bias.CopyFrom(numpy_helper.from_array(shifted, bias.name))
        return Frozen("planted", model).data, {"kept": [], "method": "none"}

    monkeypatch.setattr(pack, "to_int8", planted)
    weight = np.zeros((4, 3))
    weight[0] = 3  # class 0 where the picture is bright, else class 1
    path = network(tmp_path / "net.onnx", weight, (100, 100, 100, 100))
    words = ("--model", path, "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert export(*words).code == 0
    ended = export(*words, "--int8", "--data", photos, "--min-agreement", 0.001)
    assert ended.refused(3, "one class (number 1) with confidence 1.00")


def test_kmeans_of_a_flat_picture(tmp_path, pictures):
    ended = export("--pictures", pictures, "--imgsz", "48x72", "-q", "-o", tmp_path / "b")
    assert ended.code == 0 and f"{WARNING}0, mean confidence 1.00)" in ended.out


def test_kmeans_has_nothing_to_allow(tmp_path, pictures):
    ended = export("--pictures", pictures, "--allow-one-class", "-q", "-o", tmp_path / "b")
    assert ended.refused(1, "allow-one-class is for networks; kmeans has no network")


def test_what_one_class_returns():
    sure = np.zeros((4, 6, 3), np.float32)
    sure[..., 1] = 1
    half = np.full((4, 6, 2), [0.25, 0.75], np.float32)
    labels = np.full((4, 6), 2, np.int32)
    unknown, mixed = labels.copy(), sure.copy()
    unknown[0, 0], mixed[3, 5] = -1, [1, 0, 0]
    assert one_class([sure]) == {"classes": [1], "confidence": 1.0}
    assert one_class([sure, half]) == {"classes": [1], "confidence": 0.75}
    assert one_class([labels, sure]) == {"classes": [1, 2], "confidence": 1.0}
    assert one_class([sure, mixed]) is one_class([unknown]) is one_class([mixed, sure]) is None
    assert one_class([quadrants(4, 6)[1]]) is None
