"""A network's input and output on a GPU; kernels and ONNX Runtime run on the host here."""

import time
from dataclasses import replace
from itertools import product

import fake_tensorrt
import numpy as np
import pytest
from cases import case
from foreign_arrays import Interface
from one_layer_networks import MEAN, STD, nearest_colour, save
from scenes import scene

import runtime.engines.onnx
from runtime.checks import UnknownGuide
from runtime.core import classes_cuda, resize
from runtime.core.classes import frequent_classes, restricted
from runtime.device import transfer
from runtime.engines.tensorrt_engine import TensorRTEngine
from runtime.errors import BundleError, InputError
from runtime.prior import network
from runtime.prior.network import NetworkPrior, as_probabilities
from runtime.prior.preprocess import Preprocess
from sdk import RefineConfig, Segmenter
from sdk.stream_state import colours_of

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
from onnxruntime.capi.onnxruntime_inference_collection import (  # noqa: E402
    InferenceSession,
)


class Binding:
    """An IO binding that checks that arrays are bound by their address on GPU 0, here the host."""

    def __init__(self, binding):
        self.real = binding

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(self, name, device_type, device_id):
        assert (device_type, device_id) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0)

    def get_outputs(self):
        return self.real.get_outputs()


class Session:
    """A session of ONNX Runtime on the CPU that claims to be on a GPU."""

    options = None  # of the last one's CUDA provider

    def __init__(self, model, options, providers, enable_fallback):
        type(self).options = dict(
            dict(p for p in providers if p[0].startswith("CUDA")).popitem()[1]
        )
        self.real = InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name):
        return getattr(self.real, name)

    def get_providers(self):
        return ["CUDAExecutionProvider"]

    def run(self, *_):
        raise AssertionError("arrays of the host")

    def io_binding(self):
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding, *options):
        self.real.run_with_iobinding(binding.real, *options)


@pytest.fixture
def gpu(cuda, monkeypatch):
    """The module, and an ONNX Runtime with a CUDA provider."""
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers, **more: (
            Session if len(providers) > 1 else InferenceSession
        )(model, options, providers=providers, **more),
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(runtime.engines.onnx, "cuda_absence", lambda: None)
    monkeypatch.setattr(runtime.engines.onnx, "cuda_devices", lambda: ["cuda:0"])
    return cuda


def guide_of(scores, size, exponents):
    return resize.resized(network.soft_guide(scores, exponents, 0), size)


INPUTS = [(36, 52), (18, 26), (12, 13), (11, 17), (50, 70), (20, 90)]
GUIDES = [(9, 13), (4, 6), (9, 6), (18, 26), (23, 13), (5, 20), (1, 1)]
SIZES = [(1, 1), (5, 7), (33, 61)]


def picture(height=36, width=52):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_input_is_the_preprocess_rule_s(cuda):
    for color, size in product(("rgb", "bgr"), INPUTS):
        with case(color, size):
            rule = Preprocess(
                mean=tuple(MEAN), std=tuple(STD), color=color, height=size[0], width=size[1]
            )
            image = picture()
            wanted = rule(image)
            found = network.network_input(
                transfer.upload(image, "cuda"), size, rule.mean, rule.std, color == "bgr"
            )
            assert isinstance(found, cuda.Array) and found.shape == wanted.shape == (1, 3, *size)
            off = np.abs(found.numpy() - wanted) * 255 * STD[:, None, None]
            assert off.max() <= 1.001  # a grey level, where OpenCV rounds otherwise
            if size[0] <= 36 and size[1] <= 52:
                assert (off > 1e-3).mean() <= 0.02


def test_guide_is_the_host_s(gpu, tmp_path):
    prior = NetworkPrior.from_onnx(save(tmp_path / "m.onnx", np.eye(3)))
    for output, classes, size in product(("logits", "probabilities"), (2, 19), GUIDES):
        with case(output, classes, size):
            prior.output = output
            rng = np.random.default_rng(0)
            scores = rng.random((1, classes, 9, 13), dtype=np.float32) * 8
            wanted = as_probabilities(prior.guide(scores), *size)
            found = guide_of(gpu.to_device(scores), size, output == "logits")
            assert found.shape == (*size, classes) and found.dtype == np.float32
            np.testing.assert_allclose(found.numpy(), wanted, atol=2e-6)
            np.testing.assert_allclose(classes_cuda.shares(found), wanted.mean((0, 1)), atol=1e-6)


def test_nan_is_found_in_pixels_that_resizing_skips(gpu, tmp_path):
    """Interpolation to a smaller size does not read every pixel."""
    prior = NetworkPrior.from_onnx(
        save(tmp_path / "m.onnx", np.eye(3)), device="cuda", imgsz=(9, 40)
    )
    scores = np.ones((1, 3, 9, 40), np.float32)
    scores[0, 0, 4, 1] = np.nan
    prior.engine.on_gpu = lambda _: [
        transfer.Buffer(scores.ctypes.data, scores.shape, "f4", scores.copy)
    ]
    with pytest.raises(BundleError, match="returned NaN"):
        prior(transfer.upload(picture(), "cuda"), np.empty((18, 13)))


def test_a_pixel_without_probabilities_becomes_nan(cuda):
    for value, exponents in product((np.nan, np.inf, -np.inf, -1), (True, False)):
        with case(value, exponents):
            scores = np.ones((1, 3, 5, 7), np.float32)
            scores[0, 1, 2, 3] = value
            found = guide_of(cuda.to_device(scores), (5, 7), exponents).numpy()
            wrong = np.isnan(found).all(-1)
            assert (np.argwhere(wrong) == [[2, 3]]).all() and wrong.any() != (
                value == -1 and exponents
            )
            assert np.isfinite(found[~wrong]).all()
            nothing = guide_of(cuda.to_device(np.zeros((1, 2, 4, 4), np.float32)), (4, 4), False)
            assert np.isnan(nothing).all()


def test_class_operations_of_refinement(cuda):
    for classes, size in product((1, 2, 7, 150), SIZES):
        with case(classes, size):
            rng = np.random.default_rng(0)
            guide = (rng.random((*size, classes), dtype=np.float32) ** 8).round(2)  # ties, zeros
            guide[0, 0] = 0
            there = cuda.to_device(guide)
            np.testing.assert_allclose(classes_cuda.shares(there), guide.mean((0, 1)), rtol=1e-5)
            if guide.any():
                np.testing.assert_array_equal(frequent_classes(there), frequent_classes(guide))
            np.testing.assert_array_equal(classes_cuda.winners(there), np.unique(guide.argmax(-1)))
            for columns in ([0], [*range(0, classes, 2)], [classes - 1, 0, classes + 3]):
                columns = np.array(columns)
                found = restricted(there, columns)
                assert isinstance(found, cuda.Array)
                np.testing.assert_allclose(found.numpy(), restricted(guide, columns), atol=1e-6)
                plain = classes_cuda.take(there, columns[columns < classes], False).numpy()
                np.testing.assert_array_equal(plain, guide[..., columns[columns < classes]])


def test_class_operations_of_streams_and_clusters(cuda):
    for size in SIZES:
        with case(size):
            rng = np.random.default_rng(0)
            guide = (rng.random((*size, 5), dtype=np.float32) ** 8).round(2)  # ties, zeros
            guide[0, 0] = 0
            wanted = np.where(guide.any(-1), guide.argmax(-1), -1)
            labels, share = classes_cuda.hard(cuda.to_device(guide))
            np.testing.assert_array_equal(labels.numpy(), wanted)
            np.testing.assert_array_equal(share.numpy(), guide.max(-1))
            damaged = guide.copy()
            damaged[-1, -1, 3] = np.nan
            assert (classes_cuda.hard(cuda.to_device(damaged))[0].numpy() == -2).sum() == 1

            clusters = rng.integers(0, 3, size).astype(np.int32)
            table = classes_cuda.pairs(cuda.to_device(clusters), labels, 3, 5)
            for c, k in np.ndindex(3, 5):
                assert table[c, k] == ((clusters == c) & (wanted == k)).sum()
            there = cuda.to_device(clusters), cuda.to_device(guide)
            np.testing.assert_array_equal(
                runtime.majority_classes(*there, 3), runtime.majority_classes(clusters, guide, 3)
            )

            merged = classes_cuda.merge(
                cuda.to_device(guide), np.array([1, -1, 0, 1, 0]), 2
            ).numpy()
            np.testing.assert_allclose(merged[..., 0], guide[..., 2] + guide[..., 4], rtol=1e-6)
            np.testing.assert_allclose(merged[..., 1], guide[..., 0] + guide[..., 3], rtol=1e-6)

            mask, other = rng.random(size) < 0.5, rng.random((*size, 5), dtype=np.float32)
            scores = cuda.to_device(guide)
            classes_cuda.keep(scores, cuda.to_device(other), mask)
            np.testing.assert_array_equal(scores.numpy(), np.where(mask[..., None], other, guide))

            image = rng.random((*size, 3), dtype=np.float32)
            image[0, 0] = (0, 1, 0.5)
            np.testing.assert_array_equal(colours_of(cuda.to_device(image)), colours_of(image))


ON_THE_GPU = {
    "residual": {},
    "dynaguide": {"refine": RefineConfig.preset("dynaguide", channels=8, steps=2)},
    "soft": {"refine": RefineConfig.preset("dynaguide", channels=8, steps=2, soft_guide=True)},
    "dynaseg": {"refine": RefineConfig.preset("dynaseg_scf", channels=8, steps=2)},
    "none": {"refine": None},
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ON_THE_GPU)
def test_guide_and_scores_stay_on_the_gpu(gpu, tmp_path, monkeypatch, name, streams):
    """Only labels and counts are copied to the host."""
    path = save(tmp_path / "m.onnx", *nearest_colour(), classes=list("abcd"), output="logits")
    wanted = Segmenter(path, **ON_THE_GPU[name])
    segmenter, seen = Segmenter(path, device="cuda", **ON_THE_GPU[name]), {}
    run_by = segmenter.pipeline
    real_guide, real_finish, real_run = run_by.guide, run_by.finish, runtime.Refiner.run

    def guide(*arguments):
        guide, semantic = real_guide(*arguments)
        seen["guide"] = guide.array
        return guide, semantic

    def finish(picture, scored, *rest, **more):
        seen.update(uploaded=picture.uploaded, working=picture.working, scores=scored.scores)
        return real_finish(picture, scored, *rest, **more)

    def run(self, image, guide=None, **options):
        if self.device != "cpu":
            seen.update(image=image, of=image if guide is None else guide.array)
        return real_run(self, image, guide, **options)

    monkeypatch.setattr(run_by, "guide", guide)
    monkeypatch.setattr(run_by, "finish", finish)
    monkeypatch.setattr(runtime.Refiner, "run", run)
    image = np.ascontiguousarray((scene(36, 52, seed=3)[0] * 255).round().astype(np.uint8))
    results = segmenter.stream([image] * 3) if streams else [segmenter(image)]
    hosts = wanted.stream([image] * 3) if streams else [wanted(image)]
    for found, host in zip(results, hosts, strict=True):
        assert len(seen) == (4 if name == "none" else 6)
        assert all(isinstance(a, gpu.Array) for a in seen.values()), seen
        assert (found.labels == host.labels).mean() >= 0.99
        assert found.stats["stop_reason"] == host.stats["stop_reason"]


def test_refine_accepts_arrays_of_other_libraries(cuda):
    image, guide = scene(20, 28, classes=3)[:2]
    image, guide = np.ascontiguousarray(image, np.float32), np.ascontiguousarray(guide, np.float32)
    options = {"device": "cuda", "steps": 2, "channels": 8}
    wanted = runtime.refine(image, guide, **options)
    found = runtime.refine(Interface(image), Interface(guide), **options)
    assert isinstance(found.scores, cuda.Array)
    np.testing.assert_array_equal(found.classes, wanted.classes)
    np.testing.assert_allclose(found.scores.numpy(), wanted.scores, atol=1e-5)
    hard = guide.argmax(-1).astype(np.int32)
    wanted = runtime.refine(image, hard, **options)
    found = runtime.refine(Interface(image), Interface(hard), **options)
    np.testing.assert_allclose(found.scores.numpy(), wanted.scores, atol=1e-5)
    for nothing in (guide * 0, guide * np.nan):
        with pytest.raises(UnknownGuide, match="guide is zero"):
            runtime.refine(Interface(image), Interface(nothing.astype(np.float32)), **options)
    with pytest.raises(InputError, match=r"is on a GPU"):
        runtime.refine(Interface(image), guide)


@pytest.mark.parametrize("soft", [False, True])
def test_published_objectives_accept_guides_on_the_gpu(cuda, soft):
    """The number of classes equals the host's, also if the guide has more classes."""
    image, guide = scene(20, 28, classes=3)[:2]
    image = np.ascontiguousarray(image, np.float32)
    guide = np.concatenate([guide, 0.1 * guide, np.zeros_like(guide)], -1).astype(np.float32)
    guide /= guide.sum(-1, keepdims=True)
    options = {"device": "cuda", "objective": "dynaguide", "steps": 2, "channels": 8}
    options |= {"soft_guide": soft}
    wanted = runtime.refine(image, guide, **options)
    found = runtime.refine(Interface(image), Interface(guide), **options)
    assert isinstance(found.scores, cuda.Array) and isinstance(found.labels, cuda.Array)
    np.testing.assert_array_equal(found.classes, wanted.classes)
    near = 2e-5 if soft else 0  # the host makes pixels sum to 1 once more
    np.testing.assert_allclose(found.scores.numpy(), wanted.scores, rtol=0, atol=near)
    mixed = runtime.refine(image, Interface(guide), **options)
    np.testing.assert_array_equal(mixed.scores.numpy(), found.scores.numpy())
    labels = guide.argmax(-1).astype(np.int32)
    mixed = runtime.refine(Interface(image), labels, **options)
    np.testing.assert_array_equal(mixed.classes, runtime.refine(image, labels, **options).classes)
    for nothing in (guide * 0, guide * np.nan):
        with pytest.raises(UnknownGuide, match="guide is zero"):
            runtime.refine(image, Interface(nothing.astype(np.float32)), **options)


def test_two_threads_run_the_network_one_after_the_other(gpu, tmp_path, monkeypatch):
    """A session has one set of library handles, which only one thread may use at a time."""
    path = save(tmp_path / "m.onnx", *nearest_colour(), classes=list("abcd"), output="logits")
    segmenter, inside, most = Segmenter(path, device="cuda", refine=None), [], []
    real = Session.run_with_iobinding

    def run(self, binding, *options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        real(self, binding, *options)
        inside.pop()

    monkeypatch.setattr(Session, "run_with_iobinding", run)
    wanted = segmenter(picture()).labels
    for future in [segmenter.submit(picture()) for _ in range(6)]:
        np.testing.assert_array_equal(future.result().labels, wanted)
    segmenter.close()
    assert len(most) == 7 and max(most) == 1


CASES = [
    {},
    {"refine": RefineConfig(silhouette=True, steps=3)},
    {"refine": None},
    {"refine": RefineConfig.preset("dynaguide", channels=8, steps=2)},
    {"imgsz": (16, 24)},
    {"imgsz": 80},
]


@pytest.mark.parametrize("options", CASES, ids=range(len(CASES)))
def test_the_labels_are_those_of_the_cpu(cuda, monkeypatch, tmp_path, request, options):
    path = save(tmp_path / "m.onnx", *nearest_colour(), classes=list("abcd"), output="logits")
    image = picture()
    wanted = Segmenter(path, **options)(image)
    gpu = request.getfixturevalue("gpu")
    there = Segmenter(path, device="cuda", **options)
    assert Session.options == {"device_id": 0, "user_compute_stream": str(gpu.stream())}
    found = there(image)
    assert "onnxruntime-cuda" in found.backend
    assert (found.labels == wanted.labels).mean() >= 0.995
    assert 0 < found.stats["device_ms"]["prior"] <= found.timings["prior"]
    frames = list(there.stream([image, image]))
    assert [f.frame.start for f in frames] == ["cold", "warm"]
    assert all("prior" in f.stats["device_ms"] for f in frames)


def test_labels_of_a_network_are_copied_to_the_host(gpu, tmp_path):
    for output, kind in ((np.int64, 7), (np.int32, 6)):
        with case(output.__name__):
            tail = [("ArgMax", {"axis": 1, "keepdims": 0}), ("Cast", {"to": kind})]
            path = save(
                tmp_path / "m.onnx", *nearest_colour(), tail=tail, out=kind, classes=list("abcd")
            )
            clear = np.repeat(np.repeat(picture(3, 4), 12, 0), 12, 1)
            wanted = Segmenter(path, refine=None)(clear).labels
            found = Segmenter(path, device="cuda", refine=None)(clear)
            assert len(np.unique(wanted)) > 1 and (found.labels == wanted).mean() >= 0.99


def test_the_input_of_an_fp16_network_is_made_on_the_host(gpu, tmp_path):
    for name, kind, place in (("float32", 1, 0), ("float16", 10, None)):
        with case(name):
            path = save(tmp_path / "m.onnx", np.eye(3), dtype=kind)
            prior = NetworkPrior.from_onnx(path, device="cuda")
            assert prior.engine.gpu == 0 and prior.gpu == place


def test_errors_are_those_of_the_cpu(gpu, tmp_path):
    image = picture()
    nan = save(tmp_path / "nan.onnx", np.full((2, 3), np.inf))
    with pytest.raises(BundleError, match=r"nan\.onnx returned NaN or infinite scores for this"):
        Segmenter(nan, device="cuda")(image)
    none = save(tmp_path / "p.onnx", -np.eye(3), output="probabilities, in the graph")
    with pytest.raises(
        BundleError, match="calls its output probabilities, but values are negative"
    ):
        Segmenter(none, device="cuda")(image)
    names = save(tmp_path / "n.onnx", np.eye(3), classes=["a"])
    with pytest.raises(BundleError, match=r"n\.onnx returned 3 classes, but has 2 names"):
        Segmenter(names, device="cuda")(image)
    engine = Segmenter(save(tmp_path / "m.onnx", np.eye(3)), device="cuda").prior.engine
    with pytest.raises(InputError, match=r"m\.onnx fails on \(1, 5, 4, 4\): "):
        engine.on_gpu(gpu.to_device(np.zeros((1, 5, 4, 4), np.float32)))


# ---- TensorRT ------------------------------------------------------------------------------------

SIZE = (18, 26)
PORTS = {"image": ([1, 3, *SIZE], "FLOAT")}, {"scores": ([1, 4, *SIZE], "FLOAT")}
RULE = Preprocess(mean=tuple(MEAN), std=tuple(STD), height=SIZE[0], width=SIZE[1])


def colours(inputs):
    weight, bias = nearest_colour()
    scores = np.einsum("kc,nchw->nkhw", weight, inputs["image"]) + bias[:, None, None]
    return {"scores": scores.astype(np.float32)}


def flat(inputs):
    return {"scores": np.arange(4, dtype=np.float32)[None, :, None, None]}


def nan(inputs):
    return {"scores": np.full((1, 4, *SIZE), np.nan)}


def labels(inputs):
    return {"labels": colours(inputs)["scores"].argmax(1)}


def flat_labels(inputs):
    return {"labels": np.full((1, *SIZE), 2)}


def tensorrt_prior(function, ports=PORTS):
    engine = TensorRTEngine(fake_tensorrt.plan(function, *ports), runtime="tensorrt")
    return NetworkPrior(engine, RULE, names=list("abcd"), name="the plan")


@pytest.fixture
def fake(monkeypatch):
    functions = {f.__name__: f for f in (colours, flat, nan, labels, flat_labels)}
    return fake_tensorrt.install(monkeypatch, functions=functions)


def test_tensorrt_reads_and_writes_its_own_buffers(gpu, fake):
    """The input is written to the engine's buffer, and the output is read from its buffer."""
    prior, image = tensorrt_prior("colours"), picture()
    there = transfer.upload(image, "cuda")
    assert prior.gpu == 0
    for size in (SIZE, (9, 13), (36, 40)):
        wanted = as_probabilities(prior(image, None), *size)
        copies = fake.calls["htod"], fake.calls["dtoh"]
        found = prior(there, np.empty(size)).array
        assert isinstance(found, gpu.Array)
        np.testing.assert_allclose(found.numpy(), wanted, atol=0.02)  # grey levels at halves
        assert (np.abs(found.numpy() - wanted) > 1e-4).mean() < 0.05
        assert copies == (fake.calls["htod"], fake.calls["dtoh"])
    assert prior.engine.graph == "captured" and not prior.engine.warnings
    elsewhere = gpu.to_device(np.zeros((1, 3, *SIZE), np.float32))
    with pytest.raises(InputError, match="the array is not where the engine takes 'image' from"):
        tensorrt_prior("colours").engine.on_gpu(elsewhere)


def test_unusual_outputs_of_tensorrt_are_reported(gpu, fake):
    there = transfer.upload(picture(), "cuda")
    prior = tensorrt_prior("flat")
    prior(there, np.empty(SIZE))
    told = "one class covers the whole picture"
    assert [(w.output, w.message) for w in prior.engine.warnings] == [("scores", told)]
    with pytest.raises(BundleError, match="the plan returned NaN or infinite scores"):
        tensorrt_prior("nan")(there, np.empty(SIZE))
    ports = PORTS[0], {"labels": ([1, *SIZE], "INT64")}
    prior = tensorrt_prior("labels", ports)
    found, wanted = prior(there, np.empty(SIZE)), prior(picture(), None)
    assert found.dtype == np.int32 and (found == wanted).mean() >= 0.99
    prior = tensorrt_prior("flat_labels", ports)
    prior(there, np.empty(SIZE))
    assert [w.message for w in prior.engine.warnings] == [told]
    wrong = NetworkPrior(prior.engine, replace(RULE, height=20), name="the plan")
    with pytest.raises(InputError, match=r"has shape \(1, 3, 20, 26\); it takes \(1, 3, 18, 26\)"):
        wrong(there, np.empty(SIZE))
