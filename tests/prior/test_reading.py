"""Networks of other kinds than (1, C, h, w) logits are understood, or refused with the reason."""

import numpy as np
import pytest
from cases import case
from drawn_pictures import COLOURS, quadrants
from one_layer_networks import FLOAT, MEAN, NAMES, STD, nearest_colour, save

from runtime.errors import BundleError, InputError
from runtime.prior.names import class_names, names_in
from runtime.prior.network import NetworkPrior
from runtime.prior.reading import contradicts, find_form, find_kind, fits, kind_named, standard
from sdk import RefineConfig, Segmenter

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
from onnx import TensorProto, helper  # noqa: E402 (after importorskip)

SIZE = (48, 64)
PICTURE, TRUTH = quadrants(*SIZE)
ARG_MAX = ("ArgMax", {"axis": 1, "keepdims": 1})


def one_channel():
    """A weight and a bias whose only channel is positive where TRUTH is 0."""
    c = COLOURS / 255
    weight = 40 * (c[0] - c[1:].mean(0))
    bias = -(weight @ c[0] + (c[1:] @ weight).max()) / 2
    return (weight * STD)[None], [weight @ MEAN + bias]


def prior_of(path):
    return NetworkPrior.from_onnx(path, imgsz=SIZE)


def segment(path):
    return Segmenter(path, imgsz=SIZE, refine=RefineConfig(steps=1), min_area=0)(PICTURE)


# One channel: background and foreground


def test_one_channel_is_background_and_foreground(tmp_path):
    for tail, output in [
        ([], None),
        ([], "logits"),
        ([("Sigmoid", {})], None),
        ([("Sigmoid", {})], "Sigmoid"),
        ([("Sigmoid", {}), ("Squeeze", {})], None),
        ([("Sigmoid", {}), ("Transpose", {"perm": [0, 2, 3, 1]})], None),
        ([("Sigmoid", {}), ("Cast", {"to": TensorProto.FLOAT16})], None),
        ([("Sigmoid", {}), ("Round", {})], None),
        ([("Sigmoid", {}), ("Round", {}), ("Cast", {"to": TensorProto.BOOL})], None),
    ]:
        with case(*(name for name, _ in tail), output):
            out = tail[-1][1].get("to", FLOAT) if tail else FLOAT
            path = save(tmp_path / "m.onnx", *one_channel(), tail=tail, out=out, output=output)
            guide = prior_of(path)(PICTURE, None)
            found = guide if guide.ndim == 2 else guide.argmax(-1)
            assert np.array_equal(found, TRUTH == 0)
            assert np.array_equal(segment(path).labels, TRUTH == 0)


def test_the_foreground_s_probability_is_the_sigmoid(tmp_path):
    weight, bias = one_channel()
    x = (PICTURE / 255 - MEAN) / STD
    wanted = 1 / (1 + np.exp(-(x @ weight[0] + bias[0])))
    for tail in [[], [("Sigmoid", {})]]:
        with case(tail):
            guide = prior_of(save(tmp_path / "m.onnx", weight, bias, tail=tail))(PICTURE, None)
            assert guide.shape == (*SIZE, 2)
            np.testing.assert_allclose(guide[..., 1], wanted, atol=1e-5)
            np.testing.assert_allclose(guide.sum(-1), 1, atol=1e-6)


def test_names_of_one_channel(tmp_path):
    for names in [["person"], ["background", "person"]]:
        with case(*names):
            path = save(tmp_path / "m.onnx", *one_channel(), classes=names)
            assert segment(path).names == ["background", "person"]
    path = save(tmp_path / "m.onnx", *one_channel(), classes=["a", "b", "c"])
    with pytest.raises(BundleError, match="returned 2 classes, but has 3 names"):
        segment(path)


# Labels


def test_labels_of_every_type_and_shape(tmp_path):
    to_last, to_first = {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}
    for kind in [
        *(FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE),
        *(TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT32),
    ]:
        for shape in [
            [],
            [("Squeeze", {})],
            [("Transpose", to_last)],
            [("Transpose", to_last), ("Transpose", to_first)],
        ]:
            for output in [None, "labels", "arg max over the classes"]:
                with case(kind, *(name for name, _ in shape), output):
                    tail = [ARG_MAX, ("Cast", {"to": kind}), *shape]
                    path = save(
                        tmp_path / "m.onnx",
                        *nearest_colour(),
                        tail=tail,
                        out=kind,
                        classes=NAMES,
                        output=output,
                    )
                    guide = prior_of(path)(PICTURE, None)
                    assert guide.dtype == np.int32 and np.array_equal(guide, TRUTH)


def test_values_that_are_not_what_the_metadata_says(tmp_path):
    for output, tail, match in [
        ("labels", [], "is said to return labels; wanted whole numbers from -1 to 4095"),
        ("probabilities", [], "calls its output probabilities, but"),
        ("probabilities", [("Relu", {})], "probabilities, but returned values up to"),
    ]:
        with case(output, *(name for name, _ in tail)):
            path = save(tmp_path / "m.onnx", *one_channel(), tail=tail, output=output)
            with pytest.raises(BundleError, match=match) as error:
                segment(path)
            assert "--output" in error.value.fix


# Order of the axes


def test_channels_last(tmp_path):
    tail = [("Transpose", {"perm": [0, 2, 3, 1]})]
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=tail)
    first = save(tmp_path / "first.onnx", *nearest_colour())
    assert np.array_equal(prior_of(path)(PICTURE, None), prior_of(first)(PICTURE, None))
    assert np.array_equal(segment(path).labels, TRUTH)


def test_which_axis_has_the_channels():
    for shape, picture, names, wanted in [
        ((1, 4, 64, 96), (64, 96), 0, (4, False)),
        ((1, 64, 96, 4), (64, 96), 0, (4, True)),
        ((64, 96, 4), (64, 96), 0, (4, True)),
        ((4, 64, 96), (64, 96), 0, (4, False)),
        ((1, 16, 24, 150), (512, 768), 0, (150, True)),
        ((1, 150, 16, 24), (512, 768), 0, (150, False)),
        ((1, 64, 64, 64), (64, 64), 0, (64, False)),
        ((1, 20, 20, 21), (20, 20), 0, (21, True)),
        ((1, 21, 20, 20), (20, 20), 0, (21, False)),
        ((1, 20, 21, 20), (80, 82), 20, (20, False)),
        ((1, 64, 32, 16), (64, 32), 0, (16, True)),  # of this size, before a smaller one
        ((1, 64, 32, 16), (64, 32), 64, (64, False)),  # one for each name
        ((1, 19, 1, 3), (17, 100), 0, (19, False)),  # stride 32, which rounds
        ((1, 64, 96), (64, 96), 0, (1, False)),
        ((1, 1, 64, 96, 1), (64, 96), 0, (1, True)),
        ((64, 96), (64, 96), 0, (1, False)),
        ((1, 19, 1, 1), (32, 32), 0, (19, False)),
    ]:
        with case(shape, picture):
            form = find_form([("y", shape, "float32")], picture, names=["a"] * names)
            assert (form.channels, form.last) == wanted
            size = (form.channels, *form.size)
            assert form.planes(np.zeros(shape, np.float32)).shape == size
            beside = find_form(
                [("s", (1, 1, 19), "float32"), ("y", shape, "float32")],
                picture,
                names=["a"] * names,
            )
            assert (beside.output, beside.channels, beside.last) == (1, *wanted)


def test_sizes_that_fit():
    for height, width in [(48, 64), (375, 1242), (31, 33), (513, 1025)]:
        for stride in [1, 2, 4, 8, 16, 32]:
            with case((height, width), stride):
                small = (-(-height // stride), width // stride or 1)
                assert fits(small, (height, width))
                assert not fits((2 * height, width), (height, width))
                assert not fits((1, 1), (height + 64, width))
    assert fits((1, 1), (64, 48)) and not fits((1, 1), (48, 65))
    assert not fits((64, 96), (96, 64)) and not fits((0, 1), (64, 96))
    assert not fits((65, 64), (64, 64)) and not fits((64, 65), (64, 64))  # only if smaller


# Several outputs


def with_outputs(path, first, meta=(), **sides):
    """Save a network whose outputs are those of ``sides``, (operator, attributes, shape) by name,
    and "y", the logits, which are last unless ``first``."""
    save(path, *nearest_colour())
    model = onnx.load(path)
    graph = model.graph
    y = graph.output.pop()
    for name, (operator, attributes, inputs, shape) in sides.items():
        graph.node.append(helper.make_node(operator, inputs or [y.name], [name], **attributes))
        graph.output.append(helper.make_tensor_value_info(name, FLOAT, shape))
    graph.output.insert(0 if first else len(graph.output), y)
    for key, value in meta:
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


def test_the_output_that_fits_is_taken_and_named(tmp_path):
    small = ("AveragePool", {"kernel_shape": [4, 4], "strides": [4, 4]}, None, (1, 4, "a", "b"))
    for first in (True, False):
        for sides in [
            {"score": ("GlobalAveragePool", {}, None, (1, 4, 1, 1))},
            {"aux": ("Neg", {}, None, (1, 4, "h", "w"))},
            {"deep": small},
            {"image_again": ("Identity", {}, ["image"], (1, 3, "h", "w"))},
            {"certainty": ("ReduceMax", {"axes": [1], "keepdims": 1}, None, (1, 1, "h", "w"))},
        ]:
            with case(first, *sides):
                path = with_outputs(tmp_path / "m.onnx", first, **sides)
                result = segment(path)
                assert np.array_equal(result.labels, TRUTH)
                told = [w for w in result.warnings if "is taken as the segmentation" in w]
                assert len(told) == len(sides) and all(name in told[0] for name in sides)
    prior = prior_of(path)
    for told in (1, 0):  # once
        prior(PICTURE, None)
        assert len(prior.engine.warnings) == told
        prior.engine.warnings.clear()
    features = {"features": ("Identity", {}, ["image"], (1, 3, "h", "w"))}
    meta = [("names", "{0: 'brick', 1: 'grass', 2: 'sea', 3: 'sand'}")]
    path = with_outputs(tmp_path / "m.onnx", False, meta, **features)
    assert np.array_equal(segment(path).labels, TRUTH)


def test_outputs_that_are_no_segmentation(tmp_path):
    for shapes, match in [
        ([(1, 10, 1, 1)], "one score for the whole picture is a classification"),
        ([(1, 10)], "with the input's aspect ratio"),
        ([(1, 3, 96, 64)], r"returned y0 \(1, 3, 96, 64\) float32 for an input of 64 x 96 pix"),
        ([(2, 3, 64, 96)], "wanted"),
        ([(1, 0, 64, 96)], "wanted"),
        ([(1, 64, 96, 0)], "wanted"),
        ([(0, 64, 96)], "wanted"),
        ([(1, 100, 151), (1, 100, 16, 24)], "a network that finds objects"),
        ([(1, 116, 8400), (1, 32, 16, 24)], "a network that finds objects"),
    ]:
        with case(*shapes):
            outputs = [(f"y{n}", shape, "float32") for n, shape in enumerate(shapes)]
            with pytest.raises(BundleError, match=match):
                find_form(outputs, (64, 96))
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=[("GlobalAveragePool", {})])
    with pytest.raises(BundleError, match="a classification"):
        Segmenter(path, imgsz=(80, 96))(PICTURE)


def test_which_of_several_outputs():
    logits, labels = ("y", (1, 4, 64, 96), "float32"), ("l", (1, 64, 96), "int64")
    sure, deep = ("c", (1, 64, 96), "float32"), ("d", (1, 4, 32, 48), "float32")
    features = ("features", (1, 64, 64, 96), "float32")
    for outputs, options, wanted in [
        ([sure, labels], {}, "l"),
        ([labels, sure], {}, "l"),
        ([sure, logits], {}, "y"),
        ([features, logits], {}, "y"),
        ([("Features", *features[1:]), logits], {}, "y"),
        ([("f", *features[1:]), logits], {"names": ["a"] * 4}, "y"),
        ([deep, logits], {}, "y"),
        ([logits, labels], {"kind": "labels"}, "l"),
        ([labels, logits], {"kind": "logits"}, "y"),
        ([logits, labels], {"chosen": "l"}, "l"),
        ([logits, deep], {"chosen": "d"}, "d"),
        ([("boxes", (1, 100, 4), "float32"), logits], {"chosen": "y"}, "y"),
        ([("counts", (1, 100, 4), "int64"), logits], {}, "y"),  # boxes are floats
        ([("s", (), "list"), logits], {}, "y"),
    ]:
        with case(*(o[0] for o in outputs), *options):
            form = find_form(outputs, (64, 96), **options)
            assert outputs[form.output][0] == wanted
            assert (form.note == "") == ("chosen" in options)
    for outputs, options, match in [
        ([logits, labels], {}, r"several of these could be(.|\n)*--output-name"),
        ([("f", *features[1:]), logits], {}, "several of these could be the segmentation"),
        ([logits], {"chosen": "z"}, r"has no output 'z', only y \(1, 4, 64, 96\) float32"),
        ([("y", (1, 4, 64, 96), "int32")], {}, "int32 .*scores, which are floats"),
        ([("y", (1, 4, 64, 96), "object")], {}, "wanted"),
    ]:
        with case(match), pytest.raises(BundleError, match=match):
            find_form(outputs, (64, 96), **options)


def test_an_output_that_is_no_array(tmp_path):
    path = save(tmp_path / "m.onnx", *nearest_colour())
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("SequenceConstruct", ["scores"], ["list"]))
    kind = helper.make_tensor_sequence_value_info("list", FLOAT, None)
    del model.graph.output[:]
    model.graph.output.append(kind)
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"returned list \(\) list for an input"):
        segment(path)


def test_output_name_in_the_metadata(tmp_path):
    sides = {"other": ("Neg", {}, None, (1, 4, "h", "w"))}
    path = with_outputs(tmp_path / "m.onnx", True, [("output_name", "other")], **sides)
    assert (segment(path).labels != TRUTH).mean() > 0.5


# Soft-max


def test_soft_max_in_the_graph_is_seen_once_and_remembered(tmp_path):
    tail = [("Softmax", {"axis": 1})]
    path = save(tmp_path / "m.onnx", *nearest_colour(), tail=tail)
    said = save(tmp_path / "said.onnx", *nearest_colour(), tail=tail, output="SoftMax")
    segmenter = Segmenter(path, imgsz=SIZE, refine=None)
    first, second = segmenter(PICTURE), segmenter(PICTURE)
    assert any("taken as probabilities" in warning for warning in first.warnings)
    assert second.warnings == [] and segmenter.prior.output == "probabilities"
    wanted = Segmenter(said, imgsz=SIZE, refine=None)(PICTURE)
    assert np.array_equal(first.confidence, wanted.confidence) and wanted.warnings == []


def test_logits_are_remembered(tmp_path):
    prior = prior_of(save(tmp_path / "m.onnx", np.eye(3), mean=[0, 0, 0], std=[1, 1, 1]))
    prior.preprocess(PICTURE)
    white = np.full_like(PICTURE, 255)
    with pytest.raises(BundleError, match=r"sum over the classes is not 1(.|\n)*--output logits"):
        prior(white, None)
    prior = prior_of(save(tmp_path / "m.onnx", np.eye(3)))
    prior(PICTURE, None)
    assert prior.output == "logits"
    assert np.abs(prior.guide(np.eye(3, dtype="f4").reshape(1, 3, 3, 1)).max() - 0.576) < 1e-3


def test_a_picture_that_contradicts_the_first_changes_the_decision(tmp_path):
    """On one colour, a logit can seem to be a probability."""
    weight, bias = one_channel()
    flat = np.full_like(PICTURE, 128)
    bias = [0.5 - float(weight[0] @ ((flat[0, 0] / 255 - MEAN) / STD))]
    path = save(tmp_path / "m.onnx", weight, bias)
    segmenter = Segmenter(path, imgsz=SIZE, refine=None, min_area=0)
    assert any("probability of the foreground" in w for w in segmenter(flat).warnings)
    result = segmenter(PICTURE)
    assert any("values that are no probabilities" in w for w in result.warnings)
    said = save(tmp_path / "said.onnx", weight, bias, output="logits")
    wanted = Segmenter(said, imgsz=SIZE, refine=None, min_area=0)(PICTURE)
    assert np.array_equal(result.labels, wanted.labels)
    assert np.array_equal(result.confidence, wanted.confidence)


def test_masks_times_255_are_refused():
    ramp = np.linspace(0, 255, 48 * 64).reshape(1, *SIZE)
    mask = 255 * (TRUTH[None] == 0)
    soft = 0.7 * ramp
    for array in [mask, mask.astype("u1"), mask.astype("f4"), ramp, soft, soft.astype("u1")]:
        with case(array.dtype), pytest.raises(BundleError, match="times 255"):
            find_kind([array])
    for array, wanted in [
        (TRUTH[None], "labels"),
        (ramp - 99, "logits"),
        (ramp / 20, "logits"),
        (ramp * 0.39, "logits"),  # ends at 99
        (np.linspace(-50, 255, 99).reshape(1, 9, 11), "logits"),
        (np.int32([[[0, 7, 255]]]), "labels"),
        (3 * np.arange(48).reshape(1, 6, 8), "labels"),
        (np.int32([[[-1, 0, 255]]]), "labels"),
    ]:
        with case(wanted, array.min(), array.max()):
            assert find_kind([array]) == wanted


def test_kinds_of_values():
    soft = np.random.default_rng(0).dirichlet(np.ones(5), (8, 8)).transpose(2, 0, 1)
    for arrays, wanted in [
        ([soft], "probabilities"),
        ([soft.astype("f4")], "probabilities"),
        ([soft.astype("f2")], "probabilities"),
        ([np.float32([[[1.0005]], [[0]]])], "probabilities"),  # rounded above 1
        ([soft, 2 * soft - 1], "logits"),
        ([soft[:1]], "probabilities"),
        ([2 * soft[:1]], "logits"),
        ([soft[:1] - 0.5], "logits"),
        ([np.float32([[[0, 1]]])], None),
        ([np.float32([[[0, 1]]]), np.float32([[[0, 0.5]]])], "probabilities"),
        ([np.float32([[[0, 1]]]), np.float32([[[0, 7]]])], "labels"),
        ([np.float32([[[0, -1]]])], "labels"),
        *[([np.float32([[[0, number]]])], "logits") for number in (5000, -2)],
        ([np.array([[[True, False]]])], "labels"),
    ]:
        with case(wanted, arrays[-1].shape, len(arrays)):
            assert find_kind(arrays) == wanted
    for arrays in [[0.9 * soft], [soft, 0.9 * soft], [np.zeros((3, 2, 2), "f4")]]:
        with pytest.raises(BundleError, match="sigmoids of classes that overlap"):
            find_kind(arrays)
    with pytest.raises(BundleError, match="NaN"):
        find_kind([soft, np.full_like(soft, np.nan)])
    for value, kind, match in [
        (-2, "labels", "values from -2 to -2 in 1 channels"),
        (4096, "labels", "wanted whole numbers from -1 to 4095"),
        (0.5, "labels", "values from 0.5 to 0.5 in 1 channels, but is said to return labels"),
        (1.5, "probabilities", "returned values up to 1.5"),
        (np.nan, "logits", "NaN"),
    ]:
        with case(value, kind), pytest.raises(BundleError, match=match):
            standard(np.full((1, 2, 2), value, np.float32), kind)
    with pytest.raises(BundleError, match="in 3 channels, but is said to return labels"):
        standard(np.ones((3, 2, 2), np.float32), "labels")
    for value, refused in [(-2, True), (-1, False), (4095, False), (4096, True)]:
        with case("integers", value):
            planes = np.full((1, 2, 2), value, np.int64)
            if refused:
                with pytest.raises(BundleError, match=f"labels from {value} to {value}; wanted -1"):
                    standard(planes, "labels")
            else:
                assert (standard(planes, "labels") == value).all()


def test_values_that_contradict_a_decision():
    for values, kind, wanted in [
        ([0, 1, 7], "labels", False),
        ([0, 1, 0.5], "labels", True),
        ([0, 0.5, 1], "probabilities", False),
        ([0, 0.5, 1.0005], "probabilities", False),  # rounded above 1
        ([0, 0.5, -0.5], "probabilities", True),
        ([0, 0.5, 1.5], "probabilities", True),
        ([-9, 0.5, 9], "logits", False),
    ]:
        with case(kind, *values):
            assert contradicts(np.float32([[values]]), kind) == wanted
    assert not contradicts(np.int64([[[0, 7]]]), "probabilities")


def test_a_later_output_of_another_number_of_channels():
    form = find_form([("y", (1, 4, 64, 96), "float32")], (64, 96))
    with pytest.raises(BundleError, match=r"net returned \(1, 5, 64, 96\); wanted 4 channels, as"):
        form.planes(np.zeros((1, 5, 64, 96), np.float32), "net")


# Metadata and names


def test_spellings_of_the_kind():
    for text, wanted in [
        ("Probabilities", "probabilities"),
        ("softmax", "probabilities"),
        ("SoftMax over C", "probabilities"),
        ("soft-max", "probabilities"),
        ("sigmoid", "probabilities"),
        ("logits before soft-max, at half the input size", "logits"),
        ("Raw scores", "logits"),
        ("ArgMax", "labels"),
        ("arg max of the classes", "labels"),
        ("LABELS", "labels"),
    ]:
        with case(text):
            assert kind_named(text, "x") == wanted
    for text in ["", "segmentation", "y", "5"]:
        with case(text), pytest.raises(BundleError, match=r"x is .*; wanted one of logits"):
            kind_named(text, "x")


def test_order_of_the_planes_in_small_letters(tmp_path):
    for layout, wanted in [("nchw bgr", "bgr"), ("nchw", "rgb"), ("Rgb planes", "rgb")]:
        with case(layout):
            path = save(tmp_path / "m.onnx", np.eye(3), input_layout=layout)
            assert prior_of(path).preprocess.color == wanted


def test_spellings_of_names(tmp_path):
    wanted = ["road", "sky"]
    for value in [
        wanted,
        tuple(wanted),
        np.array(wanted),
        {0: "road", 1: "sky"},
        {"1": "sky", "0": "road"},
        '["road", "sky"]',
        "['road', 'sky']",
        "{0: 'road', 1: 'sky'}",
        '{"0": "road", "1": "sky"}',
        (name for name in wanted),
    ]:
        with case(value):
            names = class_names(value, "x")
            assert names == wanted and all(type(name) is str for name in names)
    for value in [
        *("road", "", "[" * 10_000, "{'road', 'sky'}", "'road'", "5", "(" * 3000 + ")" * 3000),
        *({"road", "sky"}, {1: "road", 2: "sky"}, {0: "road", "0": "sky"}, {False: "sky"}),
        *({0: 1}, [1, 2], 5, b"road", None, {-1: "a"}, {"²": "a"}, {"a": "road"}),
    ]:
        with case(str(value)[:30]), pytest.raises(InputError, match=r"^x (is|has) "):
            class_names(value, "x")
    huge = {"{0x1" + "0" * 5000 + ": 'road'}": "a list that is too long to print"}
    for text, match in huge.items():
        with pytest.raises(InputError, match=f"x has the class numbers {match}; wanted each"):
            class_names(text, "x")
    for name in ("\0", "\x1b[2J", "\ud800", "\x85"):
        with (
            case(ascii(name)),
            pytest.raises(InputError, match=r"x: name 1 of 2 is .*broken letters"),
        ):
            class_names(["road", name], "x")
    path = save(tmp_path / "m.onnx", np.eye(3), names="['a', 'b', 'c']", classes='["d", "e", "f"]')
    assert prior_of(path).names == ["d", "e", "f"]
    for key, text in [("names", "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}"), ("classes", '{"0": "a"}')]:
        path = save(tmp_path / "m.onnx", *nearest_colour(), **{key: text})
        assert prior_of(path).names == (
            ["a", "b", "c", "d"] if key == "names" else ["background", "a"]
        )


def test_names_in_a_text(tmp_path):
    for text, wanted in [
        ("road, sky", ["road", "sky"]),
        ("road\r\nblue sky\r\n", ["road", "blue sky"]),
        ("wald, grün\nsky", ["wald, grün", "sky"]),
        (" road ", ["road"]),
        ("'road', 'sky'", ["road", "sky"]),
        ('["road", "sky"]', ["road", "sky"]),
        ('{"id2label": {"0": "road"}}', ["road"]),
    ]:
        with case(text):
            assert names_in(text, "x") == wanted
    wrong = ("", " \n", "5", "'road'", '["road", "sky"', "{'road', 'sky'}", "a" * 2**21, "1,2")
    for text in wrong:
        with case(text[:30]), pytest.raises(InputError, match=r"^x is "):
            names_in(text, "x")
    with pytest.raises(InputError, match="x: name 1 of 3 is empty"):
        names_in("road,,sky", "x")
    path = save(tmp_path / "m.onnx", np.eye(3), names="a, b, c")
    assert prior_of(path).names == ["a", "b", "c"]


# Callables


def test_callables_of_other_forms():
    mask = TRUTH == 0
    soft = np.where(mask, np.float32(0.9), np.float32(0.2))
    sure = np.eye(4)[TRUTH]
    part, none = sure.copy(), 7 * sure
    part[:9] /= 2  # half of these pixels is unknown
    none[0, :9] = 0  # of these pixels nothing is known
    for guide, wanted in [
        (TRUTH, TRUTH),
        (TRUTH[None], TRUTH),
        (TRUTH[..., None], TRUTH),
        (TRUTH[None, ..., None], TRUTH),
        (TRUTH[None, None], TRUTH),
        (7 * sure, TRUTH),
        (part, TRUTH),
        (none, None),
        (TRUTH.astype(np.float64), TRUTH),
        (TRUTH[..., None].astype(np.float32), TRUTH),
        (mask, mask),
        (mask[..., None], mask),
        (mask.astype(np.float32), mask),
        (soft, mask),
        (soft[None], mask),
        (soft[..., None], mask),
        (soft[None, ..., None].astype(np.float16), mask),
        (np.eye(4)[TRUTH][None], TRUTH),
    ]:
        with case(guide.shape, guide.dtype):
            segmenter = Segmenter(lambda _, guide=guide: guide, refine=None, min_area=0)
            labels = segmenter(PICTURE).labels
            assert np.array_equal(labels[1:], (TRUTH if wanted is None else wanted)[1:])
            assert wanted is None or np.array_equal(labels[0], wanted[0])
    result = Segmenter(lambda _: soft, refine=None, filter=None)(PICTURE)
    assert np.allclose(result.confidence[0, [0, -1]], [0.9, 0.8], atol=1e-3)


def test_callables_that_are_refused():
    scores = np.where(TRUTH == 0, 4.5, -4.5)
    for guide, match in [
        (scores, r"one channel of values from -4.5 to 4.5(.|\n)*fix: return 1 / \(1 \+ np.exp"),
        (scores[..., None], "one channel of values from -4.5"),
        (scores + 1j, "wanted labels or probabilities"),
        (np.full(SIZE, "road"), "wanted labels or probabilities"),
        (np.full(SIZE, np.inf), "NaN or infinite"),
        (TRUTH.T, r"returned \(64, 48\) for a picture of 48 x 64 pixels; wanted"),
        (TRUTH[:12], r"returned \(12, 64\) for a picture"),
        (np.eye(4)[TRUTH][:12], r"returned \(12, 64, 4\) for a picture"),
        (PICTURE, r"returned \(48, 64, 3\) uint8; wanted \(h, w, C\) float prob"),
        (PICTURE / 255, "values whose sum over the classes is from"),
        (np.eye(4)[TRUTH].transpose(2, 0, 1), r"like \(C, h, w\)(.|\n)*fix: guide.transpose"),
        (np.eye(4)[TRUTH].transpose(2, 0, 1)[None], r"fix: guide\[0\].transpose"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            Segmenter(lambda _, guide=guide: guide)(PICTURE)


def test_names_of_a_callable_as_a_dict():
    def prior(picture):
        return TRUTH

    prior.names = dict(enumerate(NAMES))
    assert Segmenter(prior, refine=None)(PICTURE).names == NAMES
