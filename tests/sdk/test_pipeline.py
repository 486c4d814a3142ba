"""What the pipeline decides by itself: which small regions are kept, and what runs where."""

from types import SimpleNamespace

import numpy as np
from cases import case

import runtime
import runtime.engines.port
from runtime.device import choose
from runtime.errors import MissingBackend
from runtime.prior.network import NetworkPrior
from runtime.prior.preprocess import Preprocess
from sdk import CrfConfig, RefineConfig, Segmenter, StreamState, pipeline

PICTURE = np.full((80, 100, 3), 127, np.uint8)  # 0.2 % of it are 16 pixels


def spot(kind, names=None):
    """A callable prior of one class with a spot of 9 pixels of another one."""
    labels = np.zeros(PICTURE.shape[:2], np.int32)
    labels[40:43, 50:53] = 1

    def prior(picture):
        if kind == "labels":
            return labels
        return np.eye(2, dtype=np.float32)[labels]

    if names:
        prior.names = names
    return prior


def spots(prior, **options):
    """How many regions the result has besides the background."""
    segmenter = Segmenter(prior, refine=None, filter=None, **options)
    return len(segmenter(PICTURE).segments) - 1


def test_small_regions_are_kept_where_labels_are_classes():
    """A callable's or network's probabilities are classes with a meaning, named or not."""
    for kind, names, kept in [
        ("probabilities", ["road", "pole"], 1),
        ("probabilities", None, 1),
        ("labels", ["road", "pole"], 1),
        ("labels", None, 0),
    ]:
        with case(kind, names, kept):
            assert spots(spot(kind, names)) == kept
            assert spots(spot(kind, names), min_area=0) == 1
            assert spots(spot(kind, names), min_area=16) == 0


def test_regions_under_a_500th_of_the_picture_are_merged():
    """16 of 8000 pixels are kept, 12 are not."""
    for height, width, kept in [(4, 4, 1), (2, 6, 0)]:
        labels = np.zeros(PICTURE.shape[:2], np.int32)
        labels[40 : 40 + height, 50 : 50 + width] = 1
        with case(height, width):
            assert spots(lambda picture, labels=labels: labels) == kept


def test_small_regions_of_colours_are_merged():
    picture = PICTURE.copy()
    picture[40:42, 50:54] = 255, 0, 0
    segmenter = Segmenter("kmeans", refine=None, filter=None)
    assert len(segmenter(picture).segments) == 1
    assert len(Segmenter("kmeans", refine=None, filter=None, min_area=0)(picture).segments) == 2


def smallest(prior, config, **options):
    """The area of the smallest region of a picture of noise."""
    noise = np.random.default_rng(0).integers(0, 256, PICTURE.shape, np.uint8)
    return min(s.area for s in Segmenter(prior, refine=config, **options)(noise).segments)


def test_clusters_without_names_are_no_classes():
    """The published objectives give clusters, whatever the prior's answer means."""
    for preset in ["dynaguide", "dynaseg_fsf"]:
        with case(preset):
            config = RefineConfig.preset(preset, steps=0)
            assert smallest(spot("probabilities"), config, min_area=0) < 16
            assert smallest(spot("probabilities"), config) >= 16


def test_clusters_that_are_named_are_classes():
    """Where the prior's classes have names, each cluster is one of them."""

    def sides(picture):
        labels = np.zeros(PICTURE.shape[:2], np.int32)
        labels[:, 50:] = 1
        return labels

    sides.names = ["left", "right"]
    config = RefineConfig.preset("dynaguide", steps=0)
    assert smallest(sides, config) == smallest(sides, config, min_area=0) < 16


def test_a_stream_follows_the_same_rule():
    for kind, count in (("probabilities", 2), ("labels", 1)):
        segmenter = Segmenter(spot(kind), refine=None, filter=None)
        (result,) = segmenter.stream([PICTURE])
        assert len(result.segments) == count, kind


def test_a_stream_that_goes_on_where_nothing_is_known_keeps_small_regions():
    """The labels in the state are of classes with names, before any guide of this stream came."""

    def unknown(picture):
        return np.full(PICTURE.shape[:2], -1, np.int32)

    unknown.names = ["road", "pole"]
    state = StreamState()
    before = Segmenter(spot("labels", unknown.names), refine=None, filter=None)
    after = Segmenter(unknown, refine=None, filter=None)
    for segmenter in (before, after):
        (result,) = segmenter.stream([PICTURE], state=state)
        assert len(result.segments) == 2


class Engine:
    """A network of two classes that says it is on a GPU."""

    backend, metadata, gpu, warnings = "onnxruntime-cuda", {}, None, []
    inputs = (runtime.engines.port.Port("x", (1, 3, "h", "w"), "tensor(float)"),)
    outputs = (runtime.engines.port.Port("y", (1, 2, "h", "w"), "tensor(float)"),)

    def __call__(self, x):
        return [np.stack([x[:, 0], -x[:, 0]], 1)]


def test_a_filter_on_the_cpu_beside_a_network_on_a_gpu_says_so(monkeypatch):
    """Without refinement a network may run on a GPU that the CUDA module cannot use; the guided
    filter then runs on the CPU, which the result must not hide."""

    def missing(device):
        if device == "cpu":
            return choose.module_of("cpu")
        raise MissingBackend("the CUDA module is not built (gone)", fix="build it")

    prior = NetworkPrior(Engine(), Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=80, width=100))
    chosen = SimpleNamespace(
        devices=lambda: ["cpu"], module_of=missing, default_threads=choose.default_threads
    )
    monkeypatch.setattr(pipeline, "choose", chosen)
    monkeypatch.setattr(pipeline, "make_prior", lambda *_, **__: prior)
    segmenter = Segmenter("network.onnx", refine=None, device="cuda")
    result = segmenter(PICTURE)
    (warning,) = result.warnings
    assert warning.startswith("The guided filter runs on the CPU") and "(gone)" in warning
    assert warning in segmenter.info()["refine"] and "fix" not in warning
    assert Segmenter(prior, refine=None)(PICTURE).warnings == []
    crf = Segmenter("network.onnx", refine=None, device="cuda", filter=CrfConfig(steps=1))
    result = crf(PICTURE)  # the dense CRF runs on the CPU in any case
    assert result.warnings == [] and "(gone)" not in crf.info()["refine"]
    assert result.backend.endswith(f" + dense_crf on cpu-{runtime.isa()}")
