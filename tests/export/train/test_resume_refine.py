"""A resumed training of the refinement network knows the broken pictures of the run."""

import pytest

pytest.importorskip("torch", reason="the network is trained by torch: pip install torch")
pytest.importorskip("onnx", reason="the prior is made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="guides are computed by ONNX Runtime")
from one_layer_networks import nearest_colour, save
from training import draw_pictures, train

from export.train.run import read_checkpoint


def test_a_broken_picture_is_not_read_again(tmp_path):
    data, run = draw_pictures(tmp_path / "pictures", 20, broken=(3,)), tmp_path / "run"
    prior = save(tmp_path / "prior.onnx", *nearest_colour())
    words = ("--data", data, "--model", prior, "--channels", "8", "--threads", "1", "--no-cache")
    first = train("refine", *words, "-o", run, "--steps", "20")
    assert first.code == 0 and first.err.count("the next picture is used instead") == 1, first.err
    broken = read_checkpoint(run).state["broken"]
    assert [*broken] == [str(data / "03.png")]
    again = train("refine", "-o", run, "--resume", "--steps", "40")
    assert again.code == 0 and "the next picture is used instead" not in again.err
    assert read_checkpoint(run).state["broken"] == broken
