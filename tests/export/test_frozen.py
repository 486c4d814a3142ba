"""export/frozen.py: an export opens each graph once, closes it, and computes no answer twice."""

import collections
import re
import weakref

import numpy as np
import onnxruntime
import pytest
from cases import case
from exporting import export
from one_layer_networks import save

from export.frozen import Frozen, SizeFailed, serialised
from runtime.bundle.read import Bundle
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError
from runtime.prior.kmeans import KMeansPrior

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")


@pytest.fixture
def sessions(monkeypatch):
    """Counts the sessions and their runs by the bytes or the path of the graph, and knows which
    sessions exist still."""
    real = onnxruntime.InferenceSession

    class Counted(real):
        opened, runs, alive = collections.Counter(), collections.Counter(), weakref.WeakSet()

        def __init__(self, source, *arguments, **options):
            self.source = source
            Counted.opened[source] += 1
            Counted.alive.add(self)
            super().__init__(source, *arguments, **options)

        def run(self, *arguments, **options):
            Counted.runs[self.source] += 1
            return super().run(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    return Counted


@pytest.fixture
def engines(monkeypatch):
    """The names of all engines that are made, and of those that are not closed yet."""
    made, left, new, close = [], {}, OnnxEngine.__init__, OnnxEngine.close

    def init(self, *arguments, **options):
        new(self, *arguments, **options)
        made.append(self.name)
        left[id(self)] = self.name

    def closed(self):
        close(self)
        left.pop(id(self), None)

    monkeypatch.setattr(OnnxEngine, "__init__", init)
    monkeypatch.setattr(OnnxEngine, "close", closed)
    return made, left


WAYS = {  # words of the command, and how many graphs ONNX Runtime opens
    "fp32": ((), 5),  # the original, before and after simplifying, and the two of the refinement
    "not simplified": (("--no-simplify",), 4),
    "free size": (("--dynamic",), 5),
    "fp16": (("--half",), 8),  # and in FP16: as it is, rounded, and its magnitudes
    "int8": (("--int8", "--data", "PHOTOS"), 6),  # and in INT8
}


@pytest.mark.parametrize("way", [*WAYS, "kmeans"])
def test_each_graph_is_opened_once_and_closed(tmp_path, colours, photos, sessions, engines, way):
    words, count = WAYS.get(way, ((), 2))
    model = "kmeans" if way == "kmeans" else colours
    words = [photos if word == "PHOTOS" else word for word in words]
    words = ("--model", model, "--imgsz", "48x72", "--pictures", photos, *words)
    assert export(*words, "-q", "-o", tmp_path / "b").code == 0
    ours = {graph: n for graph, n in sessions.opened.items() if isinstance(graph, bytes)}
    twice = [len(graph) for graph, n in ours.items() if n > 1]
    assert not twice, f"opened more than once: graphs of {twice} bytes"
    made, left = engines
    assert len(ours) == len(made) == count, made
    if way != "int8":  # ONNX Runtime's calibration opens a file of its own
        assert len(sessions.opened) == count
    # All are closed; the command's own objects are gone, so the sessions are released, too.
    assert left == {} and len(sessions.alive) == 0
    if way != "kmeans":
        prior = Bundle.open(tmp_path / "b").graph("prior")
        noise = way in ("fp32", "free size")  # the comparison of the simplified graph
        pictures = 1 if way == "fp16" else 4  # the check runs the rounded graph
        sizes = 2 * (way == "free size")  # landscape and portrait
        assert sessions.runs[prior] == pictures + sizes + noise


def test_sessions_are_closed_when_the_export_fails(tmp_path, colours, photos, sessions, engines):
    words = ("--model", colours, "--pictures", photos, "--half", "--min-agreement", "1")
    assert export(*words, "-q", "-o", tmp_path / "b").code in (0, 3)
    broken = onnx.load(colours)
    broken.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(
            np.full([*broken.graph.initializer[0].dims], np.nan, np.float32),
            broken.graph.initializer[0].name,
        )
    )
    onnx.save(broken, tmp_path / "nan.onnx")
    words = ("--model", tmp_path / "nan.onnx", "--pictures", photos, "-q", "-o", tmp_path / "c")
    assert export(*words).refused(3, "NaN or infinite scores")
    made, left = engines
    assert made and left == {} and len(sessions.alive) == 0


def test_an_exported_network_is_opened_once_when_it_is_exported_again(
    tmp_path, plain, photos, sessions
):
    """Its original and its frozen graph are the same bytes, which are opened once."""
    path, words = tmp_path / "prior.onnx", ("--pictures", photos, "-q")
    path.write_bytes(Bundle.open(plain[1]).graph("prior"))
    assert export("--model", path, *words, "-o", tmp_path / "b").code == 0
    path.write_bytes(again := Bundle.open(tmp_path / "b").graph("prior"))
    sessions.opened.clear()
    assert export("--model", path, *words, "-o", tmp_path / "b").code == 0
    assert Bundle.open(tmp_path / "b").graph("prior") == again
    assert sessions.opened[again] == 1 and set(sessions.opened.values()) == {1}
    assert len(sessions.opened) == WAYS["fp32"][1] - 1


def test_kmeans_is_run_once(tmp_path, photos, monkeypatch):
    runs, real = [], KMeansPrior.__call__

    def counted(self, picture, low):
        runs.append(low.shape)
        return real(self, picture, low)

    monkeypatch.setattr(KMeansPrior, "__call__", counted)
    words = ("--imgsz", "48x72", "--pictures", photos, "-q", "-o", tmp_path / "b")
    assert export(*words).code == 0
    assert runs == [(24, 36, 3)]


def test_a_frozen_graph(colours):
    model = onnx.load(colours)
    with Frozen("colours", model) as graph:
        assert graph.data == serialised(model, "colours") and graph.model is model
        assert graph.opset == model.opset_import[0].version
        assert [p.name for p in graph.inputs] == ["image"] and graph.engine is graph.engine
        x = np.ones((1, 3, 8, 8), np.float32)
        np.testing.assert_array_equal(graph(x)[0], graph.engine(x)[0])
    assert [p.name for p in graph.inputs] == ["image"]  # they are known after it was closed
    again = Frozen("colours", data=graph.data)
    assert again.model == model
    again.close()
    with pytest.raises(AssertionError, match="colours is used after it was closed"):
        again(x)


def test_graphs_of_the_same_bytes_share_a_session(colours, engines):
    made, left = engines
    data = colours.read_bytes()
    x = np.ones((1, 3, 8, 8), np.float32)
    with Frozen("a", data=data) as first:
        with Frozen("b", data=bytes([*data])) as second:
            np.testing.assert_array_equal(first(x)[0], second(x)[0])
        first(x)
        second.close()  # a second time
        first(x)
    assert made == ["a"] and left == {}
    with Frozen("c", data=data) as third:
        third(x)
    assert made == ["a", "c"] and left == {}


def test_more_than_a_file_holds():
    from google.protobuf.message import EncodeError

    class Large:
        def SerializeToString(self, deterministic):
            raise EncodeError("Failed to serialize proto")

    with pytest.raises(BundleError, match="net has 2 GiB or more with its weights"):
        serialised(Large(), "net")


def test_another_size_is_advised_only_where_it_helps(tmp_path):
    """A type that NumPy lacks fails at each size, and a fixed size cannot be changed."""
    cast = [("Cast", {"to": onnx.TensorProto.BFLOAT16})]
    shape = [("NonZero", {}), ("Reshape", {}, np.array([4, 7, -1]))]  # fails when it runs
    free, fixed = ((1, 3, "h", "w"),), ((1, 3, 6, 8),)
    for tail, inputs, fix in [
        (cast, free, "^export the network with float32 outputs"),
        (cast, fixed, "^export the network with float32 outputs"),
        (shape, free, "--imgsz"),
        (shape, fixed, "^export the network again$"),
    ]:
        with case(tail[0][0], inputs):
            out = onnx.TensorProto.BFLOAT16 if tail is cast else onnx.TensorProto.INT64
            weight = np.ones((4, 3))
            path = save(tmp_path / "net.onnx", weight, tail=tail, inputs=inputs, out=out)
            with Frozen("net", data=path.read_bytes()) as graph:
                with pytest.raises(SizeFailed, match=r"net fails on \(1, 3, 6, 8\)") as error:
                    graph(np.ones((1, 3, 6, 8), np.float32))
            assert re.search(fix, error.value.fix)
