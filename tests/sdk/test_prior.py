"""sdk/prior.py: ONNX networks of one layer whose answer is known, their metadata, and every
refusal. K-means and callables are tested through the Segmenter (test_segmenter.py)."""

import json
import re

import numpy as np
import pytest
from cases import case
from developer_data import needs_data
from drawn_pictures import quadrants
from one_layer_networks import FLOAT, MEAN, NAMES, STD, nearest_colour, save

import runtime
from benchmarks.quality import datasets
from runtime.core.resize import resize
from runtime.errors import BundleError, InputError
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior, as_probabilities
from sdk import RefineConfig, Segmenter
from sdk.prior import CallablePrior, make_prior

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

CITYSCAPES = "espnetv2_s0.5_cityscapes_512x256.onnx"
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8


def noise(height=20, width=30):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# What the network is fed


def test_input_is_normalised_and_in_the_order_asked_for(tmp_path):
    for layout in [None, "NCHW float32 RGB, done by the caller", "NCHW BGR"]:
        with case(layout):
            path = save(tmp_path / "identity.onnx", np.eye(3), input_layout=layout)
            picture = noise()
            guide = NetworkPrior.from_onnx(path, imgsz=(20, 30))(picture, None)
            x = picture / 255
            if layout == "NCHW BGR":
                x = x[..., ::-1]
            expected = softmax((x - MEAN) / STD)
            assert guide.shape == (20, 30, 3) and guide.dtype == np.float32
            assert guide.flags.c_contiguous
            assert np.abs(guide - expected).max() < 1e-5
            other = softmax((x[..., ::-1] - MEAN) / STD)
            assert np.abs(guide - other).max() > 0.1  # the test can tell


def test_unequal_mean_and_std_stay_with_their_channels(tmp_path):
    path = save(tmp_path / "m.onnx", np.eye(3), mean=[0, 0.5, 1], std=[1, 2, 0.25])
    picture = noise()
    expected = softmax((picture / 255 - [0, 0.5, 1]) / [1, 2, 0.25])
    assert (
        np.abs(NetworkPrior.from_onnx(path, imgsz=(20, 30))(picture, None) - expected).max() < 1e-5
    )


def test_picture_is_averaged_down_and_interpolated_up(tmp_path):
    path = save(tmp_path / "m.onnx", np.eye(3), mean=[0, 0, 0], std=[1, 1, 1], output="logits")
    picture = noise(20, 30)
    half = picture.reshape(10, 2, 15, 2, 3).mean((1, 3)) / 255
    guide = NetworkPrior.from_onnx(path, imgsz=(10, 15))(picture, None)
    assert np.abs(guide - softmax(half)).max() < 0.5 / 255  # 8-bit rounding
    up = NetworkPrior.from_onnx(path, imgsz=(40, 60))(picture, None)
    assert np.abs(up - softmax(resize(picture, 40, 60) / 255)).max() < 1e-5
    assert np.abs(up[1, 1] - softmax(picture[0, 0] / 255)).max() < 0.2


def test_input_size(tmp_path):
    for meta, imgsz, size, expected in [
        ({}, None, (100, 200), (256, 512)),  # 512 when the file does not say
        ({}, None, (200, 100), (512, 256)),
        ({"input_size": {"width": 64, "height": 32}}, None, (30, 60), (32, 64)),
        ({"input_size": {"width": 64, "height": 32}}, None, (60, 30), (64, 32)),  # the long side
        ({"input_size": {"width": 32, "height": 64}}, None, (30, 60), (32, 64)),
        ({"input_size": {"width": 64, "height": 64}}, None, (30, 50), (38, 64)),
        (
            {"input_size": {"width": 64, "height": 64}, "size_multiple": 16},
            None,
            (30, 50),
            (32, 64),
        ),
        ({"size_multiple": 16}, 60, (30, 50), (32, 64)),
        ({"size_multiple": 16}, 70, (30, 50), (48, 64)),
        ({"size_multiple": 16, "minimum_size": 40}, 64, (30, 60), (48, 64)),
        ({"size_multiple": 16, "minimum_size": 48}, 64, (1, 1000), (48, 64)),
        ({}, 64, (1, 10_000), (1, 64)),
        ({}, 64, (10_000, 1), (64, 1)),
        ({}, 40, (1, 1), (40, 40)),
        ({"size_multiple": 32, "minimum_size": 96}, (96, 160), (100, 200), (96, 160)),  # as told
        ({}, (24, 40), (7, 9), (24, 40)),
    ]:
        with case(meta, imgsz, size, expected):
            prior = NetworkPrior.from_onnx(
                save(tmp_path / "m.onnx", np.eye(3), **meta), imgsz=imgsz
            )
            assert prior.preprocess.size(*size) == expected
            # A network of one 1x1 layer shows the size of its input.
            assert prior(noise(*size), None).shape[:2] == expected


def test_fixed_input_size_is_obeyed(tmp_path):
    for imgsz in [None, (24, 40), 40]:
        with case(imgsz):
            path = save(
                tmp_path / "m.onnx",
                np.eye(3),
                inputs=[(1, 3, 24, 40)],
                input_size={"width": 99, "height": 77},
                size_multiple=16,
            )
            assert NetworkPrior.from_onnx(path, imgsz=imgsz)(noise(), None).shape == (24, 40, 3)


def test_named_free_dimensions_are_free(tmp_path):
    path = save(tmp_path / "m.onnx", np.eye(3), inputs=[("batch", "channels", "h", "w")])
    assert NetworkPrior.from_onnx(path, imgsz=(5, 7))(noise(), None).shape == (5, 7, 3)


# What comes out


def test_known_colours_are_found_with_their_names(tmp_path):
    path = save(tmp_path / "m.onnx", *nearest_colour(), classes=NAMES)
    picture, truth = quadrants(48, 64)
    for settings in ({}, {"refine": None}, {"refine": "fast"}):
        result = Segmenter(path, imgsz=64, **settings)(picture)
        assert np.array_equal(result.labels, truth) and result.names == NAMES
        assert {s.name for s in result.segments} == set(NAMES) and len(result.segments) == 4
        assert result.backend.startswith("onnxruntime-cpu + cpu-")
    swapped = Segmenter(path, imgsz=64, refine=None)(picture[..., ::-1])
    assert not np.array_equal(swapped.labels, truth)


def test_path_of_any_kind(tmp_path):
    for kind in ["path", "str"]:
        with case(kind):
            path = save(tmp_path / "UPPER.ONNX", *nearest_colour())
            prior = make_prior(path if kind == "path" else str(path), imgsz=(8, 9), threads=1)
            assert isinstance(prior, NetworkPrior) and prior.names is None
            assert prior(noise(), None).shape == (8, 9, 4)


def test_softmax_inside_or_outside_of_the_network(tmp_path):
    picture, _ = quadrants(48, 64)
    weight, bias = nearest_colour()
    outside = NetworkPrior.from_onnx(save(tmp_path / "a.onnx", weight, bias), imgsz=64)(
        picture, None
    )
    inside = NetworkPrior.from_onnx(
        save(
            tmp_path / "b.onnx",
            weight,
            bias,
            tail=[("Softmax", {"axis": 1})],
            output="probabilities, (1, C, h, w)",
        ),
        imgsz=64,
    )(picture, None)
    assert np.abs(inside - outside).max() < 1e-5
    assert np.allclose(inside.sum(-1), 1, atol=1e-5)
    unsaid = save(tmp_path / "c.onnx", weight, bias, tail=[("Softmax", {"axis": 1})])
    assert np.array_equal(NetworkPrior.from_onnx(unsaid, imgsz=64)(picture, None), inside)
    wrong = save(
        tmp_path / "d.onnx", weight, bias, tail=[("Softmax", {"axis": 1})], output="logits"
    )  # a second soft-max flattens it
    assert np.abs(NetworkPrior.from_onnx(wrong, imgsz=64)(picture, None) - outside).max() > 0.1


def test_large_scores_do_not_overflow(tmp_path):
    path = save(tmp_path / "m.onnx", 1e6 * np.eye(3))
    guide = NetworkPrior.from_onnx(path, imgsz=(20, 30))(noise(), None)
    assert np.isfinite(guide).all() and np.allclose(guide.sum(-1), 1, atol=1e-5)


def test_integer_labels(tmp_path):
    for kind in [INT64, TensorProto.INT32, UINT8]:
        for keepdims in [0, 1]:
            with case("type", kind, "keepdims", keepdims):
                tail = [("ArgMax", {"axis": 1, "keepdims": keepdims}), ("Cast", {"to": kind})]
                path = save(
                    tmp_path / "m.onnx", *nearest_colour(), tail=tail, out=kind, classes=NAMES
                )
                picture, truth = quadrants(48, 64)
                guide = NetworkPrior.from_onnx(path, imgsz=64)(picture, None)
                assert guide.dtype == np.int32 and np.array_equal(guide, truth)
                result = Segmenter(path, imgsz=64)(picture)
                assert np.array_equal(result.labels, truth) and result.names == NAMES


def test_scores_of_another_precision(tmp_path):
    for kind in [TensorProto.FLOAT16, TensorProto.DOUBLE]:
        with case(kind):
            path = save(
                tmp_path / "m.onnx", *nearest_colour(), tail=[("Cast", {"to": kind})], out=kind
            )
            picture, truth = quadrants(48, 64)
            guide = NetworkPrior.from_onnx(path, imgsz=64)(picture, None)
            assert guide.dtype == np.float32 and np.array_equal(guide.argmax(-1), truth)


# Networks that do not fit


def test_other_inputs_are_refused_when_loading(tmp_path):
    for changes, match in [
        ({"inputs": [(1, 3, "h", "w"), (1, 3, "h", "w")]}, r"image .*, image1 .*; wanted one \(1,"),
        ({"inputs": [(2, 3, "h", "w")]}, r"image \(2, 3, 'h', 'w'\) .*wanted one \(1, 3, h, w\)"),
        ({"dtype": UINT8}, r".* tensor\(uint8\); wanted one \(1, 3, h, w\) float32"),
        ({"inputs": [(1, "h", "w", 3)]}, r"(.|\n)*channels first: tf2onnx has --inputs"),
    ]:
        with case(match):
            path = save(tmp_path / "odd.onnx", np.eye(3), **changes)
            with pytest.raises(BundleError, match=f"odd.onnx wants inputs {match}"):
                NetworkPrior.from_onnx(path)


def test_four_channels_are_refused_when_loading(tmp_path):
    path = save(tmp_path / "m.onnx", np.ones((2, 4)), inputs=[(1, 4, "h", "w")])
    with pytest.raises(BundleError, match=r"wants inputs image \(1, 4, 'h', 'w'\)"):
        NetworkPrior.from_onnx(path)


def test_other_ranks_are_refused_when_loading(tmp_path):
    for shape in [None, ("n",), (3, "h", "w"), (1, 1, 3, "h", "w")]:
        with case(shape):
            if shape is None:  # no input at all
                inputs, came = [], ""
                zeros = numpy_helper.from_array(np.zeros(3, np.float32), "zeros")
                node = helper.make_node("Constant", [], ["y"], value=zeros)
            else:
                inputs = [helper.make_tensor_value_info("image", FLOAT, shape)]
                came = f"image {shape}"
                node = helper.make_node("Identity", ["image"], ["y"])
            output = helper.make_tensor_value_info("y", FLOAT, None)
            graph = helper.make_graph([node], "g", inputs, [output])
            model = helper.make_model(
                graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
            )
            onnx.save(model, tmp_path / "m.onnx")
            with pytest.raises(BundleError, match=re.escape(f"m.onnx wants inputs {came}")):
                NetworkPrior.from_onnx(tmp_path / "m.onnx")


def test_wrong_metadata_is_refused_when_loading(tmp_path):
    for meta, match in [
        ({"mean": None}, r"metadata 'mean' is missing.*fix: .*--mean.*metadata_props.add"),
        ({"std": None}, r"metadata 'std' is missing"),
        ({"std": [0, 0, 0]}, r"metadata 'std' is \[0, 0, 0\]; wanted numbers above 0"),
        ({"std": [0.2, -0.2, 0.2]}, "metadata 'std' is .* wanted numbers above 0"),
        ({"mean": [0.5, 0.5]}, r"metadata 'mean' is \[0.5, 0.5\]; wanted three numbers"),
        ({"mean": "0.5"}, "metadata 'mean' is 0.5; wanted three numbers"),
        ({"mean": "[NaN, 0, 0]"}, "metadata 'mean' is .* wanted finite numbers"),
        ({"mean": "0.5 0.5 x"}, "metadata 'mean' is 0.5 0.5 x; wanted three numbers"),
        ({"classes": "[road, sky"}, r"metadata 'classes' is '\[road, sky', which is neither JSON"),
        (
            {"output": "something else"},
            "metadata 'output' is 'something else'; wanted one",
        ),
        ({"input_layout": "NHWC"}, "metadata 'input_layout' is 'NHWC'; wanted 'NCHW RGB' or"),
        ({"input_layout": "NCHW GBR"}, "metadata 'input_layout' is 'NCHW GBR'; wanted"),
        ({"input_layout": "NCHW RGB BGR"}, "metadata 'input_layout' is 'NCHW RGB BGR'; wanted"),
        ({"input_size": "{"}, "metadata 'input_size' is no JSON"),
    ]:
        with case(meta):
            path = save(tmp_path / "m.onnx", np.eye(3), **meta)
            with pytest.raises(BundleError, match=f"(?s)m.onnx.*{match}"):
                NetworkPrior.from_onnx(path)


def test_metadata_of_another_kind_is_refused_when_loading(tmp_path):
    for key, value in [
        ("mean", ["a", 0, 0]),
        ("mean", [[0], [0, 0], [0]]),
        ("mean", {"red": 0}),
        ("mean", [123.7, 116.3, 103.5]),  # of values in 0..255
        ("classes", 5),
        ("classes", "abc"),  # one name per letter
        ("classes", {"0": "road", "1": "sky", "3": "sea"}),
        ("classes", {"road": 0, "sky": 1}),
        ("names", {"0": 1, "1": 2}),
        ("classes", [1, 2, 3]),
        ("input_size", 512),
        ("input_size", [256, 512]),
        ("input_size", {"width": "wide"}),
        ("input_size", {"width": -5}),
        ("input_size", {"width": 10**9, "height": 10**9}),  # 10^18 pixels
        ("size_multiple", 0),
        ("size_multiple", -4),
        ("size_multiple", "x"),
        ("size_multiple", [16]),
        ("minimum_size", {}),
        ("minimum_size", 10**9),
    ]:
        with case(key, value):
            path = save(tmp_path / "m.onnx", np.eye(3), **{key: json.dumps(value)})
            with pytest.raises(BundleError, match=f"m.onnx: metadata '{key}'"):
                NetworkPrior.from_onnx(path)


def test_names_that_are_not_one_per_class(tmp_path):
    for names in [["a"], ["a", "b"], ["a", "b", "c", "d"], []]:
        with case(*names):
            path = save(tmp_path / "m.onnx", np.eye(3), classes=names)
            with pytest.raises(
                BundleError,
                match=f"m.onnx returned 3 classes, but has {len(names) + (len(names) == 1)} names",
            ):
                Segmenter(path, imgsz=(20, 30))(noise())


def test_integer_labels_beyond_the_names(tmp_path):
    tail = [("ArgMax", {"axis": 1})]
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=tail, out=INT64, classes=["a", "b"])
    with pytest.raises((BundleError, InputError), match=r"returned .*4 classes, but has .*2 names"):
        Segmenter(path, imgsz=64)(quadrants(48, 64)[0])


def test_scores_that_are_no_numbers(tmp_path):
    for value in [np.nan, np.inf, -np.inf]:
        with case(value):
            path = save(tmp_path / "m.onnx", np.eye(3), [0, value, 0])
            with pytest.raises(BundleError, match=r"m.onnx returned NaN or infinite scores"):
                Segmenter(path, imgsz=(20, 30))(noise())


def test_outputs_of_another_shape(tmp_path):
    for tail, out, match in [
        (
            [("Flatten", {"axis": 2})],
            FLOAT,
            r"returned t0 \(3, 600\) float32 for an input of 20 x 30 pixels; wanted",
        ),
        (
            [("Cast", {"to": INT64})],
            INT64,
            r"t0 \(1, 3, 20, 30\) int64 for .*; wanted .*scores, which are floats, or",
        ),
        (
            [("Cast", {"to": INT64}), ("ReduceMax", {"keepdims": 0})],
            INT64,
            r"returned t1 \(\) int64 for",
        ),
    ]:
        with case(match):
            path = save(tmp_path / "m.onnx", np.eye(3), tail=tail, out=out)
            with pytest.raises((BundleError, InputError), match=match):
                Segmenter(path, imgsz=(20, 30))(noise())


@pytest.mark.filterwarnings("error")
def test_probabilities_that_are_none(tmp_path):
    for weight in [np.zeros((3, 3)), -np.ones((3, 3)), np.diag([1, 1, -9])]:
        with case(weight.tolist()):
            path = save(
                tmp_path / "m.onnx", weight, mean=[0, 0, 0], std=[1, 1, 1], output="probabilities"
            )
            with pytest.raises((BundleError, InputError), match=r"m.onnx|guide"):
                Segmenter(path, imgsz=(20, 30))(noise())


# make_prior and as_probabilities


def test_no_such_prior():
    for prior, error, match in [
        (
            "resnet50",
            InputError,
            r"(?s)prior is 'resnet50', which does not exist; wanted 'kmeans'.*fix: check the name",
        ),
        (
            "weights.pt",
            InputError,
            "prior is 'weights.pt', which does not exist; wanted .*a folder of masks or a",
        ),
        ("missing.onnx", InputError, "missing.onnx does not exist"),
        ("", (InputError, BundleError), "prior is ''|is a folder"),
        (
            5,
            InputError,
            "prior is a int; wanted 'kmeans', a bundle folder, an .onnx file, a folder of masks",
        ),
        (None, InputError, "prior is a NoneType; wanted"),
    ]:
        with case(prior), pytest.raises(error, match=match):
            make_prior(prior)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest.json"):
        Segmenter(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a run of the trainer, which is not exported") as caught:
        Segmenter(tmp_path)
    assert caught.value.fix == f"export it first: python -m export --model {tmp_path}"


def test_wrong_imgsz(tmp_path):
    for imgsz in [0, -1, 2**15 + 1, 1.5, "64", (0, 5), (5, 6, 7), (5.0, 6), [5], (), (5,), True]:
        with case(imgsz):
            path = save(tmp_path / "m.onnx", np.eye(3))
            with pytest.raises(
                InputError, match=r"imgsz is .*; wanted \(height, width\) or the long side"
            ):
                Segmenter(path, imgsz=imgsz)


def test_imgsz_is_not_silently_ignored():
    for prior in ["kmeans", lambda picture: picture[..., 0] // 128]:
        with case(type(prior).__name__), pytest.raises(InputError, match="imgsz"):
            Segmenter(prior, imgsz=64)


def test_imgsz_against_a_fixed_input_is_not_silently_ignored(tmp_path):
    path = save(tmp_path / "m.onnx", np.eye(3), inputs=[(1, 3, 24, 40)])
    with pytest.raises(InputError, match=r"imgsz"):
        NetworkPrior.from_onnx(path, imgsz=(48, 80))


def test_priors_are_made_once_and_may_be_shared(tmp_path):
    network = NetworkPrior.from_onnx(save(tmp_path / "m.onnx", *nearest_colour()), imgsz=64)
    for prior in (network, KMeansPrior(3), CallablePrior(lambda p: p[..., 0] // 128)):
        assert make_prior(prior) is prior and Segmenter(prior).prior is prior
    assert isinstance(make_prior("kmeans"), KMeansPrior)
    assert isinstance(make_prior(len), CallablePrior)


def test_as_probabilities():
    soft = np.random.default_rng(0).dirichlet(np.ones(6), (10, 12)).astype(np.float32)
    half = as_probabilities(soft, 5, 6)
    assert half.shape == (5, 6, 6) and half.dtype == np.float32
    assert np.abs(half - soft.reshape(5, 2, 6, 2, 6).mean((1, 3))).max() < 1e-6
    assert np.allclose(as_probabilities(soft, 23, 31).sum(-1), 1, atol=1e-5)
    assert np.array_equal(as_probabilities(soft, 10, 12), soft)
    hard = np.array([[0, 1, -1, -1], [0, 0, -1, 2]])
    same = as_probabilities(hard, 2, 4)
    assert same.dtype == np.int32 and np.array_equal(same, hard)
    shares = as_probabilities(hard, 1, 2)  # unknown pixels leave zeros
    assert np.allclose(shares, [[[0.75, 0.25, 0], [0, 0, 0.25]]])


# A real network


@pytest.fixture(scope="module")
def street():
    """A CamVid frame by daylight, its truth, and the small Cityscapes network."""
    frame = datasets.camvid(12)[8]
    return frame.image(), frame.truth(), datasets.prior_path(CITYSCAPES)


@pytest.mark.data
@needs_data
def test_real_network_on_a_street(street):
    picture, truth, path = street
    settings = {"imgsz": (368, 480)}
    alone = Segmenter(path, refine=None, filter=None, **settings)(picture)
    refined = Segmenter(str(path), **settings)(picture)
    for result in (alone, refined):
        assert result.names[:3] == ["road", "sidewalk", "building"] and len(result.names) == 20
        assert result.labels.shape == (360, 480) and result.labels.min() >= 0
        assert result.labels.max() < 20
        assert result.backend == f"onnxruntime-cpu + cpu-{runtime.isa()}"
        table = datasets.camvid_lookup(result.names)
        road = table[result.labels] == datasets.CAMVID_CLASSES.index("Road")
        true = truth == datasets.CAMVID_CLASSES.index("Road")
        assert (road & true).sum() / (road | true).sum() > 0.9
    known = truth != datasets.CAMVID_VOID
    before, after = ((table[r.labels] == truth)[known].mean() for r in (alone, refined))
    assert after > before > 0.8
    assert 0 < (alone.labels != refined.labels).mean() < 0.1  # it corrects, it does not replace
    assert refined.to_coco()["categories"][0] == {"id": 0, "name": "road"}


@pytest.mark.data
@needs_data
def test_real_network_at_other_sizes(street):
    picture, _, path = street
    assert NetworkPrior.from_onnx(path).preprocess.size(360, 480) == (384, 512)
    assert NetworkPrior.from_onnx(path, imgsz=240).preprocess.size(360, 480) == (176, 240)
    guide = NetworkPrior.from_onnx(path, imgsz=(192, 256))(picture, picture)
    assert guide.shape == (96, 128, 20) and np.allclose(guide.sum(-1), 1, atol=1e-5)
    small = Segmenter(path, imgsz=(192, 256))(picture)
    assert small.labels.shape == (360, 480)
    one, two = (Segmenter(path, imgsz=(192, 256), threads=n)(picture) for n in (1, 2))
    assert np.array_equal(one.labels, two.labels)


@pytest.mark.data
@needs_data
def test_real_network_keeps_its_names_under_every_objective(street):
    for refine in ["dynaguide", "dynaguide_code", "dynaseg_fsf", "dynaseg_scf"]:
        with case(refine):
            picture, _, path = street
            config = RefineConfig.preset(refine, steps=2, scale=0.125)
            result = Segmenter(path, imgsz=(192, 256), refine=config)(picture)
            assert len(result.names) == 20 and 0 <= result.labels.min() <= result.labels.max() < 20
            found = {s.name for s in result.segments}
            assert found <= set(result.names) and len(found) > 1


def test_imgsz_that_the_network_does_not_take(tmp_path):
    for imgsz in [(33, 64), (64, 32)]:
        with case(imgsz):
            path = save(tmp_path / "m.onnx", np.eye(3), size_multiple=32, minimum_size=64)
            with pytest.raises(InputError, match=r"m\.onnx wants multiples of 32, at least 64"):
                NetworkPrior.from_onnx(path, imgsz=imgsz)


def test_names_of_a_callable_that_are_no_list():
    for names in ["road", 5, {"road", "sky"}, {1: "road", 2: "sky"}, [1, 2]]:
        with case(names):

            def prior(picture):
                return picture[..., 0]

            prior.names = names
            with pytest.raises(InputError, match=r"the prior's attribute names (is|has)"):
                CallablePrior(prior)


def test_names_of_a_callable_may_be_an_array():
    def prior(picture):
        return picture[..., 0]

    prior.names = np.array(["a", "b"])
    assert CallablePrior(prior).names == ["a", "b"]


def test_channels_first_guide_is_refused():
    with pytest.raises(InputError, match=r"looks like \(C, h, w\).*\n  fix: guide.transpose"):
        Segmenter(lambda picture: np.full((3, 60, 80), 1 / 3))(noise(60, 80))


def test_ragged_guide_is_refused():
    with pytest.raises(InputError, match="rows of different lengths"):
        Segmenter(lambda picture: [[1, 2], [3]])(noise())
