"""Builds with the real TensorRT for RTX, which needs no GPU."""

import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import types
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
from cases import case
from tensorrt_models import LAYERS, build, convolution, helper, kernel, model

from runtime.device.driver import CudaDevice
from runtime.engines import tensorrt, tensorrt_build
from runtime.engines.plan import PlanHeader, read_header
from runtime.engines.tensorrt import load_tensorrt, supported_compute_capabilities
from runtime.errors import BundleError, DeviceError, InputError, MissingBackend

onnx = pytest.importorskip("onnx", reason="the onnx package makes the models")


def gpu(monkeypatch, capability="8.6", free=2**34):
    """Pretend that there is one; ``free`` may be a list, one value for each time it is asked."""
    frees = iter(free) if isinstance(free, list) else None
    monkeypatch.setattr(
        tensorrt_build,
        "cuda_devices",
        lambda: [CudaDevice(0, "Pretended", capability, 2**35, next(frees) if frees else free)],
    )


def product(dtype=np.float32):
    nodes = [helper.make_node("MatMul", ["image", "w"], ["scores"])]
    return model(nodes, {"w": kernel(32, 48).astype(dtype)}, (64, 32), dtype)


def only(low, usual=None, high=None):
    return {"image": (low, usual or low, high or low)}


# Real builds


def test_builds_a_plan_that_says_what_it_is(rtx, no_gpu):
    start = time.monotonic()
    built = build(convolution(), compute_capabilities=("8.6", "8.9", "8.6"))
    assert 0 < built.seconds <= time.monotonic() - start
    assert built.inputs == [("image", (1, 3, 16, 16), "tensor(float)")]
    assert built.outputs == [("scores", (1, 4, 16, 16), "tensor(float)")]
    assert built.compute_capabilities == ("8.6", "8.9")
    assert built.version == rtx.__version__
    assert built.timing_cache is None and built.workspace is None
    assert read_header(built.plan) == PlanHeader(len(built.plan), rtx.__version__)
    assert b"image" in built.plan and b"scores" in built.plan
    json.dumps(built.receipt)


def test_rebuilds_are_identical(rtx, no_gpu):
    first = build(convolution())
    assert first.plan == build(convolution()).plan
    assert first.plan != build(convolution(), compute_capabilities=("8.9",)).plan
    assert first.plan != build(convolution(np.float16)).plan


def test_one_shape_makes_a_plan_for_it_alone(rtx, no_gpu):
    free = convolution(shape=(1, 3, "height", "width"))
    built = build(free, shapes=only((1, 3, 16, 16)))
    assert built.outputs[0].shape == (1, 4, 16, 16)
    assert built.plan == build(convolution()).plan  # as if the model had said so


def test_a_range_of_shapes_makes_a_profile(rtx, no_gpu):
    free = convolution(shape=(1, 3, "height", "width"))
    built = build(free, shapes=only((1, 3, 8, 8), (1, 3, 16, 16), (1, 3, 32, 64)))
    assert built.inputs[0].shape == (1, 3, "height", "width")
    assert built.outputs[0].shape == (1, 4, None, None)


UNFIT = [
    ({}, r"'image' has free dimensions, \(1, 3, any, any\), and no shape(.|\n)*--imgsz"),
    ({"picture": only((1,))["image"]}, "name the input 'picture'; the model has image"),
    (only((3, 8, 8)), r"wanted a least, a usual and a largest one for \(1, 3, any, any\)"),
    (only((1, 4, 8, 8)), r"wanted least <= usual <= largest, and \(1, 3, any, any\)"),
    (only((1, 3, 8, 0)), "wanted least <= usual <= largest"),
    (only((1, 3, 8, 9), (1, 3, 8, 8), (1, 3, 9, 9)), "wanted least <= usual <= largest"),
]


def test_shapes_that_do_not_fit(rtx, no_gpu):
    for shapes, message in UNFIT:
        with case(shapes):
            with pytest.raises(InputError, match=message):
                build(convolution(shape=(1, 3, "height", "width")), shapes=shapes)


def test_fp32_means_fp32(rtx, no_gpu):
    """TF32 is on where nothing is said, and changes the plan of a matrix product."""
    assert build(product()).plan != build(product(), tf32=True).plan


def test_bad_options(rtx, no_gpu):
    with pytest.raises(InputError, match="level is 9; wanted 0 to 5"):
        build(convolution(), level=9)
    with pytest.raises(InputError, match=r"workspace \(bytes\) is 4; wanted 1048576 to"):
        build(convolution(), workspace=4)
    with pytest.raises(InputError, match="timing cache was given, but TensorRT for RTX times no"):
        build(convolution(), timing_cache=b"")
    with pytest.raises(InputError, match="runtime is 'trt'; wanted 'tensorrt' or"):
        build(convolution(), runtime="trt")


class Kept:
    """The library, whose builders keep the configuration that they were last given to build."""

    def __init__(self, library):
        self._library, self.config = library, None

    def __getattr__(self, name):
        return getattr(self._library, name)

    def Builder(self, log):
        return KeptBuilder(self, self._library.Builder(log))


class KeptBuilder:
    """A builder of :class:`Kept`. No cycle of references contains it, so that it is freed by the
    thread that builds: the garbage collector of another thread would free it with Python's lock
    held and wait for TensorRT's lock, while the next builder holds that and waits for Python's."""

    def __init__(self, kept, builder):
        self._kept, self._builder = kept, builder

    def __getattr__(self, name):
        return getattr(self._builder, name)

    def build_serialized_network(self, network, config):
        self._kept.config = config
        return self._builder.build_serialized_network(network, config)


def test_a_failed_build_frees_its_builder(rtx, no_gpu, monkeypatch):
    """A builder that an error keeps alive is freed by the garbage collector. If that runs while the
    next builder is made, the two wait for TensorRT's lock for ever."""
    kept, builders = Kept(rtx), []

    def builder(log):
        builders.append(KeptBuilder(kept, rtx.Builder(log)))
        return builders[-1]

    kept.Builder = builder
    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda runtime: kept)
    with pytest.raises(BundleError) as caught:
        build(b"no network")
    alive = weakref.ref(builders.pop())
    assert alive() is None and caught.value.__traceback__ is not None


def test_effort_is_passed_on(rtx, no_gpu, monkeypatch):
    kept = Kept(rtx)
    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda runtime: kept)

    def passed(**options):
        build(convolution(), **options)
        pool = kept.config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE)
        return kept.config.builder_optimization_level, pool

    default = passed()
    for level, workspace in ((0, 2**30), (5, 2**29), (2, 3 * 2**26)):
        assert passed(level=level, workspace=workspace) == (level, workspace) != default
    assert passed(level=0) == (0, default[1]) and passed(workspace=2**29) == (default[0], 2**29)


# Which GPUs


def test_supported_gpus_come_from_the_library(rtx):
    found = supported_compute_capabilities()
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(found)
    assert "8.7" not in found and found == sorted(found, key=float)
    assert set(tensorrt.RTX_CAPABILITIES) >= set(found)  # those of the newest version


def test_unsupported_gpus_need_their_device(rtx, no_gpu):
    for capability in ["8.7", "9.0", "sm_86", ""]:
        with case(capability):
            message = (
                f"for compute capability {capability}; it knows 7.5, .*"
                "\n  fix: Orin .8.7.*build BUND"
            )
            with pytest.raises(InputError, match=message):
                build(convolution(), compute_capabilities=(capability,))


def test_no_gpu_named_and_none_here(rtx, no_gpu):
    with pytest.raises(InputError, match=r"no compute capability(.|\n)*no CUDA driver(.|\n)*8\.9"):
        build(convolution(), compute_capabilities=())


def test_the_gpu_here_is_the_default(rtx, monkeypatch):
    gpu(monkeypatch, "8.9")
    built = build(convolution(), compute_capabilities=())
    assert built.compute_capabilities == ("8.9",)
    with pytest.raises(InputError, match="device is 1; wanted 0 to 0"):
        build(convolution(), device=1)


def test_the_engine_is_built_on_the_chosen_gpu(rtx, monkeypatch):
    gpus = [CudaDevice(i, "Pretended", "8.9", 2**35, 2**34) for i in range(2)]
    monkeypatch.setattr(tensorrt_build, "cuda_devices", lambda: gpus)
    current = []
    monkeypatch.setattr(
        tensorrt_build, "current_gpu", lambda device: nullcontext(current.append(device))
    )
    for device in (0, 1):
        build(convolution(), device=device)
    assert current == [0, 1]


def test_turing_needs_half(rtx, no_gpu):
    with pytest.raises(InputError, match=r"(?s)Turing .*node_of_scores.*with --half; or leave 7.5"):
        build(product(), compute_capabilities=("7.5",))
    build(product(np.float16), compute_capabilities=("7.5",))


def test_the_fix_for_turing_is_not_what_the_network_has_already(log_of):
    log = log_of("Cannot compile operation 'x' for Turing (SM75): FP32 GEMM is not supported.")
    for layers, fix in [
        ({"fp32": 2}, "export an FP16 network: with --half; or leave 7.5 out of "),
        ({"fp16": 2, "int8": 1}, "export an FP16 network: with --half, without --int8; or leave "),
        ({"fp16": 2, "fp32": 1}, "leave 7.5 out of --compute-capability, and use backend='onnx'"),
    ]:
        error = tensorrt_build._failure("tensorrt_rtx", log, None, None, {"layers": layers})
        assert type(error) is InputError and error.fix.startswith(fix)


# Workspace


def test_too_little_workspace_is_named(rtx, no_gpu):
    nodes = [
        helper.make_node("Softmax", ["image"], ["s"], axis=1),
        helper.make_node("Conv", ["s", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Softmax", ["c"], ["scores"], axis=3),
    ]
    wide = model(nodes, {"w": kernel(64, 64, 3, 3).astype(np.float32)}, (1, 64, 512, 512))
    with pytest.raises(DeviceError, match=r"out of memory \(workspace 1 MiB, no GPU here\)"):
        build(wide, workspace=2**20)


def test_workspace_follows_the_free_memory(rtx, monkeypatch):
    for workspace, free, taken in [
        (None, 2**32, 2**30),
        (None, 2**36, 2**31),
        (2**33, 2**34, 2**33),
        (2**33, 2**32, 2**32),
        (None, [2**34, 2**32], 2**30),  # something else took memory since the build began
    ]:
        with case(workspace, free), monkeypatch.context() as patch:
            gpu(patch, free=free)
            assert build(convolution(), workspace=workspace).workspace == taken


# Models that cannot be built


def test_garbage_is_named_by_the_parser(rtx, no_gpu):
    with pytest.raises(BundleError, match=r"cannot read the model: .*Failed to parse the ONNX"):
        build(b"garbage")


def test_an_unknown_operator_is_named(rtx, no_gpu):
    data = model([helper.make_node("Frobnicate", ["image"], ["scores"])], {})
    with pytest.raises(BundleError, match=r"Plugin not found.* \(at Frobnicate\)"):
        build(data)


def test_a_failed_build_says_the_first_error(rtx, no_gpu):
    """The log of one build is not that of the one before."""
    with pytest.raises(InputError, match="Turing"):
        build(product(), compute_capabilities=("7.5",))
    with pytest.raises(BundleError) as caught:
        build(b"garbage")
    assert "Turing" not in str(caught.value)


@pytest.fixture
def log_of():
    """Make a log that contains some lines."""
    return lambda *lines: types.SimpleNamespace(lines=lines, summary=lambda: "; then ".join(lines))


def test_other_failures_show_the_log(log_of):
    error = tensorrt_build._failure("tensorrt", log_of("first", "second"), None, None, {})
    assert type(error) is BundleError and "cannot build the model: first; then second" in str(error)


def test_out_of_memory_in_its_other_words(log_of):
    for line in (
        "Error Code 2: OutOfMemory (Requested size was 17089712 bytes.)",
        "Requested amount of GPU memory (15485030400 bytes) could not be allocated.",
        "Skipping tactic 1 due to insufficient memory on requested size of 15485030400",
    ):
        error = tensorrt_build._failure("tensorrt", log_of(line), 2**30, 2**28, {})
        assert type(error) is DeviceError
        assert "(workspace 1024 MiB, 256 MiB free): " + line in str(error)


def test_the_log_goes_to_python(rtx, no_gpu, caplog):
    with caplog.at_level(logging.DEBUG, "dg.tensorrt"), pytest.raises(InputError):
        build(product(), compute_capabilities=("7.5",))
    levels = {record.levelname for record in caplog.records if record.name == "dg.tensorrt"}
    assert "ERROR" in levels and "INFO" not in levels
    log = tensorrt.bridge_log(rtx)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "dg.tensorrt"):
        for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
            log.log(getattr(rtx.ILogger, severity), severity)
    assert [record.levelno for record in caplog.records] == [40, 40, 30, 10, 10]


# A library that cannot start


class Null:
    """The library, one of whose constructors returns a null pointer, as with an old driver."""

    def __init__(self, library, kind):
        self._library = library
        setattr(self, kind, self.null)

    def __getattr__(self, name):
        return getattr(self._library, name)

    def null(self, *arguments):
        log = arguments[-1]
        log.log(self.ILogger.WARNING, "CUDA initialization failure with error: 35.")
        raise TypeError("pybind11::init(): factory function returned nullptr")


def test_a_library_that_cannot_start_is_a_device_error(rtx, no_gpu, monkeypatch):
    for kind in ("Builder", "OnnxParser"):
        with case(kind), monkeypatch.context() as patch:
            patch.setattr(tensorrt_build, "load_tensorrt", lambda runtime, k=kind: Null(rtx, k))
            with pytest.raises(DeviceError, match=rf"does not start: it makes no {kind}, ") as e:
                build(convolution())
            assert "CUDA initialization failure with error: 35. (pybind11" in str(e.value)
            assert "tensorrt_rtx was built for CUDA 1" in str(e.value)
            assert "install NVIDIA's driver" in e.value.fix  # error 35 names it


def test_shapes_that_the_library_refuses(rtx, no_gpu, monkeypatch):
    """The binding raises a RuntimeError for them; its documentation says ValueError."""

    class Profile:
        def set_shape(self, *shapes):
            raise kind("Shape provided for min is inconsistent with other shapes.")

    monkeypatch.setattr(
        KeptBuilder, "create_optimization_profile", lambda self: Profile(), raising=False
    )
    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda runtime: Kept(rtx))
    free = convolution(shape=(1, 3, "height", "width"))
    message = r"'image': Shape provided for min(.|\n)*fix: use other"
    for kind in (RuntimeError, ValueError):
        with case(kind.__name__), pytest.raises(InputError, match=message):
            build(free, shapes=only((1, 3, 8, 8), (1, 3, 9, 9), (1, 3, 32, 64)))


def test_cycles_of_references_are_freed_before_the_builder_starts(rtx, no_gpu, monkeypatch):
    """A builder in a cycle would be freed while the next one holds TensorRT's lock."""

    class Old:
        """An object that only the garbage collector can free."""

        def __init__(self):
            self.itself = self

    class Watched(Kept):
        def Builder(self, log):
            alive.append(old() is not None)
            return super().Builder(log)

    alive = []
    monkeypatch.setattr(tensorrt_build, "load_tensorrt", lambda runtime: Watched(rtx))
    gc.disable()
    try:
        old = weakref.ref(Old())
        build(convolution())
    finally:
        gc.enable()
    assert alive == [False]


# Progress and stopping


def test_progress_goes_from_zero_to_one_in_the_callers_thread(rtx, no_gpu):
    told = []
    build(convolution(), progress=lambda *a: told.append((*a, threading.current_thread())))
    names, fractions, threads = zip(*told, strict=True)
    assert fractions == tuple(sorted(fractions)) and fractions[-1] == 1
    assert 0 <= fractions[0] < 0.2 and len(fractions) > 5
    assert set(threads) == {threading.main_thread()}
    assert all(isinstance(name, str) and name for name in names)


def test_what_progress_raises_stops_the_build(rtx, no_gpu, caplog):
    def stop(phase, fraction):
        raise ZeroDivisionError(phase)

    layers = [
        helper.make_node("Conv", [f"x{i}" if i else "image", "w"], [f"x{i + 1}"], pads=[1] * 4)
        for i in range(200)
    ]
    layers.append(helper.make_node("Relu", ["x200"], ["scores"]))
    slow = model(layers, {"w": kernel(3, 3, 3, 3).astype(np.float32)})
    with pytest.raises(ZeroDivisionError, match="Cloning"):
        build(slow, progress=stop)
    assert "canceled by user" in caplog.text  # it did not run on
    build(convolution())


def test_ctrl_c_stops_the_build(rtx, no_gpu, caplog):
    def interrupt(phase, fraction):
        os.kill(os.getpid(), signal.SIGINT)

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        build(convolution(), progress=interrupt)
    assert threading.active_count() == threads


def pretend_tensorrt(monkeypatch, rtx, version="10.3.0", loads=True, starts=True):
    """The real builder under the name tensorrt; loading its plan is pretended."""
    seen = types.SimpleNamespace(shapes=[], network=None, config=None, inspector=None)

    class Builder(rtx.Builder):
        def create_network(self, flags):
            seen.network = flags
            return super().create_network(flags)

        def create_builder_config(self):
            seen.config = super().create_builder_config()
            return seen.config

    class Context:
        def set_input_shape(self, name, shape):
            seen.shapes.append((name, shape))
            return True

    class Runtime:
        def __init__(self, log):
            if not starts:
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, plan):
            seen.inspector = types.SimpleNamespace(
                get_engine_information=lambda kind: json.dumps(LAYERS), execution_context=None
            )
            engine = types.SimpleNamespace(
                create_engine_inspector=lambda: seen.inspector, create_execution_context=Context
            )
            return engine if loads else None

    module = types.ModuleType("tensorrt")
    module.__dict__.update(vars(rtx) | {"__name__": "tensorrt"})
    module.__version__, module.Runtime, module.Builder = version, Runtime, Builder
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorrt_builds_for_its_own_gpu(rtx, monkeypatch):
    gpu(monkeypatch)
    seen = pretend_tensorrt(monkeypatch, rtx)
    built = build(convolution(), runtime="tensorrt", timing_cache=b"")
    assert built.version == "10.3.0" and built.compute_capabilities == ("8.6",)
    assert isinstance(built.timing_cache, bytes)
    assert built.receipt["source"] == "engine" and built.receipt["layers"]["fp16"] == 1
    assert built.receipt["quantize"] == 0 and not seen.shapes
    assert seen.network == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert seen.config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
    assert seen.inspector.execution_context is None
    free = convolution(shape=(1, 3, "height", "width"))
    build(free, runtime="tensorrt", shapes=only((1, 3, 8, 8), (1, 3, 9, 9), (1, 3, 32, 64)))
    assert seen.shapes == [("image", (1, 3, 9, 9))]
    assert seen.inspector.execution_context is not None  # else it knows no types
    with pytest.raises(InputError, match=r"8\.7 was asked for; .* Pretended with 8\.6\n"):
        build(convolution(), runtime="tensorrt", compute_capabilities=("8.7",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_plan_that_does_not_load_is_not_returned(rtx, monkeypatch):
    gpu(monkeypatch)
    pretend_tensorrt(monkeypatch, rtx, loads=False)
    with pytest.raises(DeviceError, match="the engine just built cannot be loaded"):
        build(convolution(), runtime="tensorrt")
    pretend_tensorrt(monkeypatch, rtx, starts=False)
    with pytest.raises(DeviceError, match=r"tensorrt 10\.3\.0 does not start: it makes no Runtime"):
        build(convolution(), runtime="tensorrt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_all_networks_are_strongly_typed_there_is_no_flag(rtx, monkeypatch):
    gpu(monkeypatch)
    seen = pretend_tensorrt(monkeypatch, rtx, "11.4.0.106")
    sys.modules["tensorrt"].NetworkDefinitionCreationFlag = types.SimpleNamespace()
    build(convolution(), runtime="tensorrt")
    assert seen.network == 0


def test_tensorrt_needs_its_gpu(rtx, no_gpu, monkeypatch):
    pretend_tensorrt(monkeypatch, rtx)
    with pytest.raises(MissingBackend, match="no CUDA driver\n  fix: on the device: python -m run"):
        build(convolution(), runtime="tensorrt")


def test_other_versions_are_refused(rtx, monkeypatch):
    for version in ["8.6.1", "10.2.0", "12.0.0.1", "0.0.1"]:
        with case(version), monkeypatch.context() as patch:
            pretend_tensorrt(patch, rtx, version)
            with pytest.raises(
                MissingBackend, match=f"tensorrt {version} is installed; wanted .* 10.3"
            ):
                load_tensorrt("tensorrt")


def test_these_versions_are_taken(rtx, monkeypatch):
    for version in ["10.3.0", "10.16.1", "11.4.0.106"]:
        with case(version), monkeypatch.context() as patch:
            pretend_tensorrt(patch, rtx, version)
            assert load_tensorrt("tensorrt").__version__ == version


def test_a_package_that_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(MissingBackend, match="tensorrt of an unknown version is installed"):
        load_tensorrt("tensorrt")


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    for runtime, extra in [("tensorrt", "trt"), ("tensorrt_rtx", "rtx")]:
        with case(runtime), monkeypatch.context() as patch:
            patch.setitem(sys.modules, runtime, None)
            with pytest.raises(
                MissingBackend, match=rf"{runtime} is needed(.|\n)*edge\[{extra}\]"
            ) as e:
                load_tensorrt(runtime)
            assert e.value.exit_code == 4
