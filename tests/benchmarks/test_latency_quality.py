"""The quality that the profiler reports beside the latency."""

import numpy as np
import pytest
from latency_parts import PICTURE

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks.latency import quality
from benchmarks.quality import metrics
from runtime.errors import InputError
from sdk import RefineConfig


def test_miou_of_labelled_pictures(tmp_path):
    from sdk import Segmenter

    def prior(picture):
        return (picture[..., 0] > 127).astype(np.int32)

    seg = Segmenter(prior, refine=None, filter=None)
    with pytest.raises(InputError, match="names its classes"):
        quality.quality_of(seg, [PICTURE], [np.zeros((48, 64), np.uint8)])
    seg.prior.names = ["dark", "light"]
    truth = (PICTURE[..., 0] > 127).astype(np.uint8)
    truth[:10] = 255
    truth[10:20] = 1 - truth[10:20]
    found = quality.quality_of(seg, [PICTURE], [truth])
    counts = metrics.confusion(seg(PICTURE).labels, truth, 2, ignore=255)
    assert found == {"what": "mIoU", "value": metrics.miou(counts), "pictures": 1}
    assert 0.4 < found["value"] < 0.8


def test_quality_of_a_bundle_is_that_of_the_row(tmp_path):
    """It falls when the prior has changed since it was recorded."""
    from bundles import tiny_bundle

    from sdk import Segmenter

    for network in (True, False):
        bundle = tmp_path / f"{network}.bundle"
        tiny_bundle(bundle, with_network=network)
        for config in (None, RefineConfig(steps=2), RefineConfig(steps=1, scale=0.3)):
            seg = Segmenter(bundle, refine=config, self_test="never")
            found, case = quality.quality_of(seg, [PICTURE], None), f"network {network}, {config}"
            assert found["value"] == 1.0, case
            assert found["what"].startswith("agreement with float32"), case
        seg.pipeline.prior = Wrong(seg.prior.names)
        assert quality.quality_of(seg, [PICTURE], None)["value"] < 1, f"network {network}"


class Wrong:
    """A prior that returns probability 1 for its first class everywhere."""

    backend, gpu, engine = "test", None, None

    def __init__(self, names):
        self.names = names

    def __call__(self, picture, low):
        return np.eye(len(self.names or "abc"), dtype=np.float32)[np.zeros(low.shape[:2], int)]


def test_quality_at_the_size_of_a_step_graph(tmp_path):
    """A step graph has a fixed working size; the reference is computed at that size."""
    pytest.importorskip("torch", reason="exports")
    from export.models.load import load_model
    from export.pack import ExportOptions, export_bundle

    options = ExportOptions(targets=("onnx",), refine=RefineConfig(steps=2), imgsz=(40, 64))
    export_bundle(load_model("kmeans", None, None), tmp_path / "k.bundle", options)
    from sdk import Segmenter

    seg = Segmenter(
        tmp_path / "k.bundle", refine=RefineConfig(steps=2), refine_backend="onnx",
        self_test="never",
    )  # fmt: skip
    assert quality.quality_of(seg, [PICTURE], None)["value"] > 0.999
