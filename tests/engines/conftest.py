"""Fixtures of the tests of engines.

Modules that need onnx are imported by the fixtures that use them, because a test that does not
need it can run without it.
"""

import pytest

from runtime.engines import tensorrt, tensorrt_build


@pytest.fixture
def folder(tmp_path):
    """A folder with weights beside the model, weights above it, and a link to those."""
    from onnx_files import BESIDE, SECRET

    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "beside.bin").write_bytes(BESIDE.tobytes())
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    (inside / "link.bin").symlink_to("../secret.bin")
    (inside / "fine.bin").symlink_to("beside.bin")
    (inside / "loop.bin").symlink_to("loop.bin")
    (inside / "up").symlink_to("..")
    (inside / "data").mkdir()
    (inside / "data" / "deep.bin").write_bytes(BESIDE.tobytes())
    return inside


@pytest.fixture
def not_opened(monkeypatch):
    """ONNX Runtime must not see the file."""
    import onnxruntime

    def opened(*_, **__):
        pytest.fail("ONNX Runtime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'dynaguide-edge[rtx]'")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "cuda_devices", list)
    for module in (tensorrt, tensorrt_build):
        monkeypatch.setattr(module, "cuda_absence", lambda: "no CUDA driver")
