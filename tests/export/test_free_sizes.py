"""--dynamic: a network runs at the least, usual and largest size, as landscape and as portrait."""

import collections
import json

import cv2
import numpy as np
import pytest
from cases import case
from exporting import export, files

from export import pack
from export.frozen import Frozen, SizeFailed
from export.sizes import FreeSizes
from runtime.bundle.read import Bundle
from runtime.errors import VerificationFailed
from runtime.prior.preprocess import Preprocess

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

RULE = Preprocess(mean=(0.5,) * 3, std=(0.2,) * 3, resize="long_side", long_side=96)


def network(path, nodes, tensors=(), **meta):
    """An ONNX file of free size. ``nodes`` compute "features", of which a 1x1 convolution makes the
    scores of four colours."""
    from one_layer_networks import META, nearest_colour

    weight, bias = nearest_colour()
    tensors = {
        "weight": np.float32(weight)[..., None, None],
        "bias": np.float32(bias),
        **dict(tensors),
    }
    graph = helper.make_graph(
        [
            *(helper.make_node(op, i, [o], **options) for op, i, o, options in nodes),
            helper.make_node("Conv", ["features", "weight", "bias"], ["scores"]),
        ],
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, "h", "w"))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    texts = {key: json.dumps(value) for key, value in meta.items()}
    helper.set_model_props(model, META | {"output": "logits"} | texts)
    onnx.save(model, path)
    return path


def multiples_of(path, number, **meta):
    """A network that adds its picture to a copy that was made smaller and larger again: that copy
    has other sides unless they are multiples of ``number``."""
    pool = {"kernel_shape": [number, number], "strides": [number, number]}
    nodes = [
        ("AveragePool", ["image"], "small", pool),
        ("Resize", ["small", "", "scales"], "large", {"mode": "nearest"}),
        ("Add", ["image", "large"], "sum", {}),
        ("Mul", ["sum", "half"], "features", {}),
    ]
    tensors = {"scales": np.float32([1, 1, number, number]), "half": np.float32(0.5)}
    return network(path, nodes, tensors, **meta)


@pytest.fixture
def refused(tmp_path, photos):
    """The export of a network with --dynamic fails with code 3 and texts, and writes nothing."""
    out = tmp_path / "out"
    out.mkdir()

    def refuses(path, *texts, words=("--imgsz", 96)):
        words = ("--model", path, "--dynamic", "--pictures", photos, "-q", *words)
        ended = export(*words, "-o", out / "b")
        assert ended.refused(3, *texts) and files(out) == {}
        return ended.err

    return refuses


def test_sizes_that_are_verified():
    for changes, least, largest, wanted in [
        ({}, None, None, [(63, 96), (96, 63)]),
        ({"multiple": 32}, None, None, [(32, 96), (96, 32)]),
        ({"multiple": 32, "long_side": 512}, None, None, [(288, 512), (512, 288)]),
        ({"multiple": 64, "long_side": 512}, None, None, [(320, 512), (512, 320)]),
        ({"long_side": 512}, None, None, [(341, 512), (512, 341)]),
        ({}, (32, 48), (200, 100), [(32, 48), (63, 96), (96, 63), (200, 100)]),
        ({"multiple": 16}, (30, 50), (96, 96), [(32, 48), (48, 96), (96, 48), (96, 96)]),
        ({"minimum": 80}, None, None, [(80, 96), (96, 80)]),
        ({"long_side": 1}, None, None, [(1, 1)]),
    ]:
        with case(changes, least, largest):
            rule = Preprocess(**{**vars(RULE), **changes})
            assert FreeSizes(rule, least, largest).all == wanted


def test_a_network_that_wants_multiples(tmp_path, refused):
    for number in (2, 4, 8, 16, 32):
        with case(number):
            refused(
                multiples_of(tmp_path / "net.onnx", number),
                "--dynamic leaves the input size free, but net fails on (1, 3, ",
                f"size_multiple {number} in the metadata",
                f"Preprocess(multiple={number})",
                "or drop --dynamic",
            )


def test_a_picture_of_another_aspect(tmp_path, refused):
    """The picture alone has a size that the network does not take."""
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((67, 96, 3), np.uint8))
    words = ("--imgsz", 96, "--pictures", tmp_path / "a.png")
    path = multiples_of(tmp_path / "net.onnx", 32)
    refused(path, "net fails on (1, 3, 67, 96)", "size_multiple 32 in the metadata", words=words)


def test_the_multiple_that_the_refusal_names_works(tmp_path, photos, refused):
    assert "size_multiple 8 " in refused(multiples_of(tmp_path / "net.onnx", 8))
    words = ("--pictures", photos, "--dynamic", "--imgsz", 96, "-q", "-o", tmp_path / "b")
    path = multiples_of(tmp_path / "net.onnx", 8, size_multiple=8)
    for more in ((), ("--half",)):
        ended = export("--model", path, *words, *more)
        assert ended.code == 0, ended.err
        assert "verify   on 4 pictures: 0.png, 1.png, 2.png, 3.png" in ended.out
        assert "; the first also at 56x96, 96x56\n" in ended.out
        done = Bundle.open(tmp_path / "b").manifest["verification"]["prior"]
        assert done["sizes"] == ["56x96", "96x56"] and done["pictures"] == 4


def test_sizes_that_no_multiple_mends(tmp_path, refused):
    """One size is written into the network: into a Reshape, or into its last Resize."""
    shape = {"shape": np.array([1, 3, 64, 96])}
    fixed = [("Reshape", ["image", "shape"], "features", {})]
    path = network(tmp_path / "reshape.onnx", fixed, shape)
    words = ("--imgsz", "64x96")
    text = refused(path, "reshape fails on (1, 3, 63, 96)", words=words)
    assert "\n  fix: drop --dynamic\n" in text
    fixed = [("Resize", ["image", "", "", "shape"], "features", {})]
    path = network(tmp_path / "resize.onnx", fixed, shape)
    text = refused(path, "returns (1, 4, 64, 96) for an input of (1, 3, ", words=words)
    assert "\n  fix: drop --dynamic\n" in text


def test_multiples_at_which_the_largest_input_is_too_large_mend_nothing():
    def fails(size):
        raise error

    sizes = FreeSizes(RULE, largest=(8033, 8353))  # at multiples of 64 more than 2^26 pixels
    error = SizeFailed("net fails", fix="export it again")
    assert sizes.refusal(error, fails).fix == "drop --dynamic"


def test_a_module_that_wants_multiples(tmp_path):
    """Its original fails, too; torch does not export such a module, so that the frozen graph is one
    that takes every size."""
    torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
    from export import check_prior
    from export.models import PriorModel
    from export.pictures import Pictures

    class Net(torch.nn.Module):
        def forward(self, x):
            small = torch.nn.functional.avg_pool2d(x, 4)
            large = torch.nn.functional.interpolate(small, scale_factor=4)
            return torch.cat([x, x - x + large], 1)[:, :4]

    nodes = [("Identity", ["image"], "features", {})]
    path = network(tmp_path / "net.onnx", nodes)
    fixed = Preprocess(mean=(0.5,) * 3, std=(0.2,) * 3, height=96, width=96)
    model = PriorModel(name="mine", module=Net(), preprocess=fixed, output="logits")
    pictures = Pictures([np.zeros((64, 96, 3), np.uint8)], ["a.png"])
    with Frozen("mine", data=path.read_bytes()) as frozen:
        with pytest.raises(VerificationFailed, match=r"mine fails on \(1, 3, 63, 96\)") as error:
            check_prior.check_prior(
                model, frozen, frozen, "fp32", RULE, pictures, sizes=FreeSizes(RULE)
            )
    assert "Preprocess(multiple=4)" in error.value.fix


def test_a_frozen_network_that_is_wrong_at_one_size(photos, colours, refused, monkeypatch):
    """It is another network where the input has 96 rows."""
    freeze = pack.frozen_graph

    def wrong(*arguments, **options):
        with freeze(*arguments, **options) as graph:
            model = onnx.load_from_string(graph.data)
        inner = model.graph
        source, (output,) = inner.input[0].name, inner.output
        (last,) = [node for node in inner.node if output.name in node.output]
        last.output[0] = "before"
        inner.initializer.extend(
            [
                numpy_helper.from_array(np.array(2), "axis"),
                numpy_helper.from_array(np.array(96), "rows"),
                numpy_helper.from_array(np.float32([0, 999, 0, 0]).reshape(1, 4, 1, 1), "shift"),
            ]
        )
        inner.node.extend(
            [
                helper.make_node("Shape", [source], ["shape"]),
                helper.make_node("Gather", ["shape", "axis"], ["height"]),
                helper.make_node("Equal", ["height", "rows"], ["equal"]),
                helper.make_node("Cast", ["equal"], ["factor"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["factor", "shift"], ["wrong"]),
                helper.make_node("Add", ["before", "wrong"], [output.name]),
            ]
        )
        return Frozen(graph.name, model)

    monkeypatch.setattr(pack, "frozen_graph", wrong)
    text = refused(colours, "one of them also at other sizes", "%, 0.png at 96x63); wanted 99.90%")
    assert "drop --dynamic" in text


def test_the_largest_size_is_run_for_one_picture(tmp_path, colours, photos, monkeypatch):
    runs, call = collections.Counter(), Frozen.__call__

    def counted(self, *arrays):
        if arrays[0].ndim == 4:
            runs[id(self), arrays[0].shape] += 1
        return call(self, *arrays)

    monkeypatch.setattr(Frozen, "__call__", counted)
    words = ("--model", colours, "--pictures", photos, "--dynamic", "-q", "-o", tmp_path / "b")
    sizes = ("--min-shape", 32, "--opt-shape", 96, "--max-shape", "192x128")
    assert export(*words, *sizes).code == 0
    done = Bundle.open(tmp_path / "b").manifest["verification"]["prior"]
    assert done["sizes"] == ["32x32", "63x96", "96x63", "192x128"]
    largest = [n for (_, shape), n in runs.items() if shape == (1, 3, 192, 128)]
    assert largest == [1, 1]  # the original and the frozen network


def test_a_size_that_the_network_does_not_take(tmp_path, photos):
    """Without --dynamic: the size of --imgsz."""
    path = multiples_of(tmp_path / "net.onnx", 4)
    words = ("--model", path, "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert export(*words, "--imgsz", "64x96").code == 0
    for size in ("63x96", "62x94"):
        with case(size):
            ended = export(*words, "--imgsz", size)
            assert ended.refused(3, "net ", "choose another size with --imgsz (many networks want")


def test_a_graph_that_fails_says_its_input(tmp_path):
    with Frozen("net", data=multiples_of(tmp_path / "net.onnx", 4).read_bytes()) as graph:
        with pytest.raises(SizeFailed, match=r"net fails on \(1, 3, 6, 8\)") as error:
            graph(np.zeros((1, 3, 6, 8), np.float32))
    assert "--imgsz" in error.value.fix


def test_the_sizes_of_engines_are_multiples_as_well(tmp_path, photos):
    path = multiples_of(tmp_path / "net.onnx", 4, size_multiple=4, minimum_size=32)
    words = ("--model", path, "--dynamic", "--pictures", photos, "-q", "-o", tmp_path / "b")
    for least, largest, text in [
        ("30x32", 96, "min-shape is (30, 32); net wants multiples of 4, at least 32"),
        (16, 96, "min-shape is (16, 16); net wants multiples of 4, at least 32"),
        (32, "96x98", "max-shape is (96, 98); net wants multiples of 4, at least 32"),
    ]:
        with case(text):
            ended = export(*words, "--imgsz", 64, "--min-shape", least, "--max-shape", largest)
            assert ended.refused(1, text, f"fix: --{text[:9]} ")
            assert not (tmp_path / "b").exists()
    for option in ("imgsz", "opt-shape"):  # two names of one size: the message has the user's own
        with case(option):
            ended = export(*words, f"--{option}", "30x64")
            assert ended.refused(
                1, f"error: {option} is (30, 64); net.onnx wants", f"fix: --{option} 32 64"
            )


def test_the_summary_states_the_size_of_the_input(tmp_path, colours, photos):
    from one_layer_networks import nearest_colour, save

    fixed = save(tmp_path / "fixed.onnx", *nearest_colour(), inputs=((1, 3, 48, 72),))
    words = ("--pictures", photos, "-q", "-o", tmp_path / "b")
    for more, line in [
        (("--model", fixed), "48x72"),
        (
            ("--model", colours, "--imgsz", "48x64"),
            "48x64, free in the file: --imgsz sets another size, --dynamic keeps it free",
        ),
        (
            ("--model", colours, "--imgsz", "48x64", "--dynamic"),
            "of free size: the long side becomes 64",
        ),
    ]:
        with case(line):
            assert f"\ninput    {line}\nverify " in export(*words, *more).out
