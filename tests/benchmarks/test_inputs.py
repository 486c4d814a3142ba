"""The inputs of the profiler: missing files, and hashes of models."""

import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import inputs


def test_files_that_are_missing_are_named(capsys):
    for argv, message in (
        (["--picture", "none.png"], "none.png"),
        (["--video", "none.mp4"], "none.mp4 does not exist"),
        (["nothing.onnx"], "nothing.onnx"),
        (["nothing"], "which does not exist"),
        (["--refine", ",".join(map(str, range(60)))], "these are 120 rows; wanted at most 100"),
        (["--picture", "README.md", "--labels", "none.png"], "README.md"),
    ):
        assert command.main(["latency", *argv]) == 1, argv
        told = capsys.readouterr()
        assert message in told.err and "Traceback" not in told.err and not told.out, argv


def test_a_model_is_known_by_its_hash(tmp_path):
    from bundles import tiny_bundle

    (tmp_path / "x.onnx").write_bytes(b"abc")
    assert inputs.hashes(str(tmp_path / "x.onnx")) == {
        "x.onnx": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    tiny_bundle(tmp_path / "a.bundle", with_network=False)
    (found,) = inputs.hashes(str(tmp_path / "a.bundle")).items()
    (tmp_path / "a.bundle" / "notes.txt").write_text("not the bundle's")
    assert inputs.hashes(str(tmp_path / "a.bundle")) == dict([found])
    assert found[0] == "a.bundle/manifest.json" and len(found[1]) == 64
    assert inputs.hashes("kmeans") == {}
