"""The runtime cache of TensorRT for RTX, on stand-ins: an engine's kernels are compiled once."""

import logging
import shutil
import sys

import fake_tensorrt
import numpy as np
import pytest
from cases import case
from permissions import obeyed

from runtime.engines.tensorrt_engine import TensorRTEngine
from runtime.errors import DeviceError

PORTS = {"x": ([2], "FLOAT")}, {"y": ([2], "FLOAT"), "s": ([1], "FLOAT")}
PLAN = fake_tensorrt.plan("double", *PORTS)
OTHER = fake_tensorrt.plan("triple", *PORTS)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    functions = {
        name: lambda inputs, k=k: {"y": k * inputs["x"], "s": inputs["x"][:1]}
        for k, name in ((2, "double"), (3, "triple"))
    }
    return fake_tensorrt.install(monkeypatch, functions=functions, version="1.7.1.116")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache/dynaguide-edge/rtx"


def run(fake, plan=PLAN, *, factor=2, name="prior"):
    """How often kernels are compiled by a process that runs the engine twice and then steps."""
    before = fake.calls["compile"]
    with TensorRTEngine(plan, runtime="tensorrt_rtx", name=name) as engine:
        for _ in range(2):
            x = np.arange(2, dtype=np.float32)
            np.testing.assert_array_equal(engine(x)[0], factor * x)
        loop = engine.loop({}, {"x": ("y", np.ones(2, np.float32))})
        loop.step()
    return fake.calls["compile"] - before


def test_kernels_are_compiled_once_for_an_engine(fake, folder):
    assert run(fake) == 1
    assert fake.calls["create_execution_context"] == 4  # 1, and 3 of the loop
    assert fake.calls["create_runtime_config"] == fake.calls["create_runtime_cache"] == 1
    (first,) = folder.iterdir()
    written = first.stat().st_mtime_ns
    assert run(fake) == 0 and first.stat().st_mtime_ns == written
    assert run(fake, OTHER, factor=3) == 1 and len(list(folder.iterdir())) == 2


def test_kernels_are_in_the_file_before_the_engine_is_closed(fake, folder):
    """A process that is killed has compiled them for the next one, too."""
    engine = TensorRTEngine(PLAN, runtime="tensorrt_rtx")
    assert not folder.exists()
    engine(np.zeros(2))
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    engine(np.zeros(2))
    assert fake.calls["serialize"] == 1
    engine.close()
    assert file.stat().st_mtime_ns == written
    assert run(fake) == 0


def test_kernels_that_a_run_compiles_are_in_the_file_after_the_close(fake, folder, monkeypatch):
    run_plain = fake_tensorrt.Context.execute_async_v3

    def run_late(context, stream):
        context.config.kernels().add("late")
        return run_plain(context, stream)

    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", run_late)
    with TensorRTEngine(PLAN, runtime="tensorrt_rtx") as engine:
        engine(np.zeros(2))
        (file,) = folder.iterdir()
        assert b"late" not in file.read_bytes()
    assert b"late" in file.read_bytes()


def test_the_file_is_for_one_library_and_one_gpu(fake, folder, monkeypatch):
    run(fake)
    import tensorrt_rtx

    monkeypatch.setattr(tensorrt_rtx, "__version__", "1.8.0.1")
    assert run(fake) == 1 and len(list(folder.iterdir())) == 2
    fake.capabilities = [(12, 0)]
    assert run(fake) == 1 and len(list(folder.iterdir())) == 3


def test_broken_files_stop_nothing_and_are_replaced(fake, folder, caplog):
    run(fake)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    assert not caplog.records
    for what, data in [
        ("damaged", b""),
        ("damaged", whole[:-1]),
        ("damaged", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]),
        ("damaged", b"an other program's file, longer than the hash at its start"),
    ]:
        with case(what, len(data)):
            file.write_bytes(data)
            caplog.clear()
            reads = fake.calls["read_runtime_cache"]
            assert run(fake) == 1 and file.read_bytes() == whole
            assert fake.calls["read_runtime_cache"] == reads  # the library gets no such bytes
            (record,) = caplog.records
            assert record.levelno == logging.WARNING and record.name == "dg.tensorrt"
            assert record.getMessage().startswith("prior: the kernels are compiled again: ")
            assert record.getMessage().endswith(f"{file} is {what}")
    caplog.clear()
    fake.driver = "590.1"
    assert run(fake) == 1 and run(fake) == 0
    (record,) = caplog.records
    assert f"the library refuses {file}" in record.getMessage()


def test_a_cache_that_cannot_be_used_stops_nothing(fake, folder, caplog, monkeypatch):
    def said():
        (record,) = caplog.records
        caplog.clear()
        return record.getMessage()

    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    assert run(fake) == 1 and "Not a directory" in said()
    folder.unlink()
    run(fake)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert run(fake) == 1 and "cannot be read: Is a directory" in said()
    shutil.rmtree(folder)
    for refused in ("create_runtime_cache", "set_runtime_cache"):
        with case(refused):
            fake.refuse = {refused}
            run(fake)
            assert "refuses a runtime cache" in said() and not folder.exists()
    fake.refuse = {"serialize"}
    assert run(fake) == 1 and not folder.exists() and not caplog.records
    fake.refuse = set()
    monkeypatch.setattr("runtime.engines.rtx_cache.cache_folder", lambda: None)
    assert run(fake) == 1 and "there is no home folder" in said()


def test_a_cache_folder_that_is_read_only(fake, folder, caplog):
    folder.mkdir(parents=True, mode=0o500)
    with obeyed():
        assert run(fake) == 1
    assert "cannot be written: Permission denied" in caplog.text


def test_a_failed_engine_saves_nothing(fake, folder):
    engine = TensorRTEngine(PLAN, runtime="tensorrt_rtx")
    engine(np.zeros(2))
    saved = fake.calls["serialize"]
    fake.refuse.add("execute_async_v3")
    with pytest.raises(DeviceError):
        engine(np.zeros(2))
    engine.close()
    assert fake.calls["serialize"] == saved


def test_tensorrt_has_no_runtime_cache(fake, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.3.0")
    with TensorRTEngine(PLAN, runtime="tensorrt") as engine:
        engine(np.zeros(2))
    assert fake.calls["create_runtime_config"] == 0 and not folder.exists()


def test_the_stand_ins_have_the_calls_of_the_library():
    rtx = pytest.importorskip("tensorrt_rtx", reason="pip install 'dynaguide-edge[rtx]'")
    for stand_in, real in [
        (fake_tensorrt.RuntimeConfig, rtx.IRuntimeConfig),
        (fake_tensorrt.RuntimeCache, rtx.IRuntimeCache),
        (fake_tensorrt.Engine, rtx.ICudaEngine),
        (fake_tensorrt.Context, rtx.IExecutionContext),
    ]:
        own = {"kernels", "view", "compute"}  # how the stand-ins compute
        names = {name for name in vars(stand_in) if not name.startswith("_")} - own
        assert names and names <= set(dir(real)), stand_in
    assert "runtime_config" in rtx.ICudaEngine.create_execution_context.__doc__
    assert "-> bool" in rtx.IRuntimeConfig.set_runtime_cache.__doc__
    assert "-> bool" in rtx.IRuntimeCache.deserialize.__doc__
    assert "IHostMemory" in rtx.IRuntimeCache.serialize.__doc__
    assert rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    assert hasattr(rtx.IRuntimeConfig, "cuda_graph_strategy")
