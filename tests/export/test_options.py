"""Options of the exporter: each is honoured, stored for the device, or refused with a reason."""

import pytest

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")

from exporting import export, needs_rtx

from runtime.bundle.read import Bundle
from sdk import Segmenter

# Which engines are built


@needs_rtx
def test_turing_gets_an_engine_of_its_prior(tmp_path, checkpoint_onnx, photos, photo):
    """TensorRT for RTX has no FP32 matrix products for Turing, and the refinement needs them."""
    words = ("--model", checkpoint_onnx, "--pictures", photos, "-q", "-o", tmp_path / "b")
    words += ("--target", "rtx", "--compute-capability", "7.5,8.6", "--half")
    ended = export(*words)
    assert ended.refused(1, "Turing (compute capability 7.5) has no FP32 matrix products")
    assert "  fix: Turing needs an export with --half --engines prior, " in ended.err
    assert not (tmp_path / "b").exists()
    assert export(*words, "--engines", "prior").code == 0
    bundle = Bundle.open(tmp_path / "b")
    (engine,) = bundle.manifest["engines"]
    assert engine["graph"] == "prior" and engine["compute_capabilities"] == ["7.5", "8.6"]
    assert bundle.manifest["recipe"]["engines"] == "prior"
    assert set(bundle.manifest["graphs"]) == {"prior", "refine_step", "refine_map"}
    for refined_by in ("native", "onnx"):
        seg = Segmenter(tmp_path / "b", refine_backend=refined_by)
        assert seg(photo).labels.shape == photo.shape[:2]
        assert seg.info()["self_test"]["labels"] == 1
