"""Which errors of ONNX Runtime speak of the device, the model, or the input.

Stand-ins for its session raise what ONNX Runtime says, in its own classes.
"""

import re
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from cases import case

import runtime.engines.onnx
from runtime.device import faults, transfer
from runtime.device.driver import CudaDevice
from runtime.device.faults import CUDA_FAULTS
from runtime.engines.onnx import OnnxEngine
from runtime.engines.onnx_errors import load_problem, reason
from runtime.errors import BundleError, DeviceError, InputError, MissingBackend
from sdk import Segmenter

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")

from onnxruntime.capi.onnxruntime_pybind11_state import (  # noqa: E402 (after importorskip)
    EPFail,
    Fail,
    InvalidArgument,
    RuntimeException,
)

IMAGE = np.zeros((1, 3, 4, 4), np.float32)
RUNNING = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running "
CUDA = RUNNING + "Conv node. Name:'c' Status Message: CUDA failure {}: {} ; GPU=0 ; hostname=h ;"
ARENA = RUNNING + (
    "Expand node. Name:'' Status Message: /src/bfc_arena.cc:360 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for "
    "requested buffer of size 4398046511104\n"
)
RESHAPE = RUNNING + (
    "Reshape node. Name:'' Status Message: /src/reshape_helper.h:91 "
    "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&) "
    "input_shape_size == size was false. The input tensor cannot be reshaped to the requested shape"
)
ADD = RUNNING + (
    "Add node. Name:'' Status Message: /src/element_wise_ops.h:583 void "
    "onnxruntime::BroadcastIterator::Append(ptrdiff_t, ptrdiff_t) "
    "axis == 1 || axis == largest was false. Attempting to broadcast an axis by a dimension"
)
RANK = "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: x Got: 3 Expected: 4"
BOUND = "Error in execution: Got invalid dimensions for input: x for the following indices\n index"
SHAPES = [InvalidArgument(RANK), Fail(RESHAPE), Fail(ADD), RuntimeError(BOUND), ValueError("shape")]

OUT_OF_MEMORY = [
    Fail(ARENA),
    Fail(CUDA.format(2, "out of memory")),
    RuntimeError("Error in execution: " + CUDA.format(2, "out of memory")),
    RuntimeException("/src/bfc_arena.cc:376 Available memory of 5120 is smaller than 4194304"),
    Fail(RUNNING + "MatMul node. CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ;"),
    MemoryError("std::bad_alloc"),
    MemoryError("Unable to allocate 3.00 GiB for an array"),  # NumPy
    RuntimeException("std::bad_alloc"),
]


class Session:
    """A network from "x" to "y", each run of which raises ``error``, should there be one."""

    error = None

    def __init__(self, model, options, providers, enable_fallback):
        self.providers = [p if isinstance(p, str) else p[0] for p in providers]

    def get_inputs(self):
        return [SimpleNamespace(name="x", shape=[1, 3, "h", "w"], type="tensor(float)")]

    def get_outputs(self):
        return [SimpleNamespace(name="y", shape=[1, 2, "h", "w"], type="tensor(float)")]

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={"mean": "[0, 0, 0]", "std": "[1, 1, 1]"})

    def get_providers(self):
        return self.providers

    def run(self, outputs, feed, options=None):
        if self.error is not None:
            raise self.error
        return [np.concatenate([feed["x"][:, :1], 1 - feed["x"][:, :1]], 1)]


@pytest.fixture
def session(monkeypatch):
    """The stand-in, on a machine with one GPU and no CUDA module of ours."""
    kind = type("Session", (Session,), {})
    here = CudaDevice(0, "RTX 3060", "8.6", 12 * 2**30, 3 * 2**29)
    monkeypatch.setattr(onnxruntime, "InferenceSession", kind)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(runtime.engines.onnx, "cuda_absence", lambda: "")
    monkeypatch.setattr(runtime.engines.onnx, "cuda_devices", lambda: [here])
    monkeypatch.setattr(faults, "cuda_devices", lambda: [here])
    monkeypatch.setattr(transfer, "own_stream", not_built)
    monkeypatch.setitem(sys.modules, "runtime._cuda", None)  # the messages need no module of ours
    return kind


def not_built(index):
    raise MissingBackend("the CUDA module is not built (no module)", fix="pip install -e .")


def engine(place="cpu"):
    return OnnxEngine(b"\x08\x08", name="net", device=place)


def fails(monkeypatch, session, error, place):
    """What the first run on ``place`` raises."""
    made = engine(place)
    monkeypatch.setattr(session, "error", error)
    with pytest.raises((InputError, DeviceError)) as caught:
        made(IMAGE)
    assert caught.value.__cause__ is error
    assert reason(error) in str(caught.value) and "ONNXRuntimeError" not in str(caught.value)
    return caught.value


LOADING = "[ONNXRuntimeError] : 1 : FAIL : Load model from my files/m.onnx failed:"
SOURCE = "/onnxruntime_src/onnxruntime/core/graph/"
NEW_IR = f"{LOADING}{SOURCE}model.cc:256 " + (
    "onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::IOnnxRuntimeOpSchemaRegistry"
    "List*, const onnxruntime::ModelOptions&) Unsupported model IR version: 99, max supported IR "
    "version: 13\n"
)
NEW_OPSET = f"{LOADING}{SOURCE}model_load_utils.h:46 " + (
    "void onnxruntime::model_load_utils::ValidateOpsetForDomain(const std::unordered_map<std::"
    "__cxx11::basic_string<char>, int>&, bool, int) ONNX Runtime only *guarantees* support for "
    "models stamped with official released onnx opset versions. Opset 99 is under development and "
    "support for this is limited. Current official support for domain ai.onnx is till opset 26.\n"
)
NO_KERNEL = (
    "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for "
    "GridSample(16) node with name 'grid'"
)
UNKNOWN = LOADING + (
    'This is an invalid model. In Node, ("", Foo, "", -1) : ("x": tensor(float),) -> '
    '("y": tensor(float),) , Error No Op registered for Foo with domain_version of 17'
)
OTHER_DOMAIN = LOADING + "Fatal error: my.ops:Foo(-1) is not a registered function/op"
WEIGHTS = (
    "[ONNXRuntimeError] : 1 : FAIL : graph.cc:4447 InjectExternalInitializersFromFilesInMemory "
    "External initializer: w offset: 0 size to read: 48 are out of bounds (of the file)"
)
LAMBDA = RUNNING + (
    "Slice node. Name:'/a/Slice' Status Message: slice.cc:9 onnxruntime::Slice<T>::Run(const "
    "std::function<void(long int)>&) const [with T = float] Starts must be a 1-D array"
)
REASONS = [
    (NEW_IR, "Unsupported model IR version: 99, max supported IR version: 13"),
    (NO_KERNEL, "Could not find an implementation for GridSample(16) node with name 'grid'"),
    (OTHER_DOMAIN, "Fatal error: my.ops:Foo(-1) is not a registered function/op"),
    (WEIGHTS, "External initializer: w offset: 0 size to read: 48 are out of bounds (of the file)"),
    (LAMBDA, "Slice node '/a/Slice': Starts must be a 1-D array"),
    (RANK, "Invalid rank for input: x Got: 3 Expected: 4"),
    (BOUND, "Got invalid dimensions for input: x for the following indices"),
    ("std::bad_alloc", "std::bad_alloc"),
    ("/src/a.cc:1 no::end(int", "no::end(int"),
]


def test_the_reason_is_what_stands_behind_the_c_plus_plus():
    for text, wanted in REASONS:
        with case(wanted):
            assert reason(Fail(text)) == wanted


PROBLEMS = [
    (
        NEW_IR,
        "it has IR version 99, and ONNX Runtime 1.31.1 reads IR versions up to 13",
        r"pip install --upgrade onnxruntime.*; or save the model with ir_version = 13",
    ),
    (
        NEW_OPSET,
        "it uses opset 99 of ai.onnx, and ONNX Runtime 1.31.1 reads opsets up to 26",
        r"pip install --upgrade onnxruntime.*; or export the network with a lower opset",
    ),
    (
        NO_KERNEL,
        "ONNX Runtime 1.31.1 has no kernel for its operator GridSample (of opset 16) on this "
        "device with the types of its inputs",
        r"export the network without this operator, in float32 \(most .* no kernel for float64\)",
    ),
    (UNKNOWN, "ONNX Runtime 1.31.1 does not know its operator Foo", "operators of the ONNX stand"),
    (OTHER_DOMAIN, "ONNX Runtime 1.31.1 does not know its operator my.ops:Foo", "operators of"),
    (
        LOADING + "Error Data of TensorProto should be in model.data, but it is a symbolic link.",
        "Error Data of TensorProto should be in model.data, but it is a symbolic link.",
        "cp -rL FOLDER COPY",
    ),
    (
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : No graph was found",
        "No graph was found",
        r"check it with: check-model m\.onnx \(pip install onnx\), or export it again",
    ),
]


def test_a_model_that_is_not_loaded_says_why_and_what_helps():
    for text, problem, fix in PROBLEMS:
        with case(problem):
            found = load_problem(Fail(text), "1.31.1", "m.onnx")
            assert found[0] == problem and re.search(fix, found[1]), found


def test_files_that_are_newer_than_onnx_runtime(tmp_path):
    """The words of the installed version are understood, too."""
    pytest.importorskip("onnx", reason="pip install onnx")
    from onnx import TensorProto, helper
    from onnx_files import info, model_of, write

    def model(operator="Relu", domain="", inputs=1, **value):
        node = helper.make_node(operator, ["x"] * inputs, ["y"], domain=domain)
        made = model_of([node], [info("x", **value)], domains=[domain] * bool(domain))
        made.graph.output[0].CopyFrom(info("y", **value))
        return made

    version = onnxruntime.__version__
    ir, opset = model(), model()
    ir.ir_version, opset.opset_import[0].version = 99, 99
    doubles = {"shape": (1, 2, 2, 2), "kind": TensorProto.DOUBLE}
    for made, message in [
        (model("GridSample", inputs=2, **doubles), r".*has no kernel for its operator GridSample"),
        (ir, rf"it has IR version 99, and ONNX Runtime {version} reads IR versions up to \d+\n"),
        (opset, rf"it uses opset 99 of ai.onnx, and ONNX Runtime {version} reads opsets up to \d+"),
        (model("Foo"), rf"ONNX Runtime {version} does not know its operator Foo\n"),
        (model("Foo", "my.ops"), rf"ONNX Runtime {version} does not know its operator my.ops:Foo"),
    ]:
        with case(message):
            with pytest.raises(BundleError, match=r"m\.onnx cannot be loaded: " + message):
                OnnxEngine(write(tmp_path, made))


def test_sizes_that_do_not_fit_inside_the_network_have_a_fix(session, monkeypatch):
    for error, fixed in [(RESHAPE, True), (ADD, True), (RANK, False), (BOUND, False)]:
        with case(error), monkeypatch.context() as patch:
            found = fails(patch, session, Fail(error), "cpu")
            assert ("use imgsz=(HEIGHT, WIDTH) with multiples of 32" in found.fix) == fixed
            assert ("'size_multiple'" in found.fix) == fixed
    said = SimpleNamespace(custom_metadata_map={"size_multiple": "4"})
    monkeypatch.setattr(session, "get_modelmeta", lambda self: said)
    assert fails(monkeypatch, session, Fail(ADD), "cpu").fix == ""


def test_shapes_are_the_input_s_fault_on_every_device(session, monkeypatch):
    for place in ["cpu", "cuda"]:
        for error in SHAPES:
            with case(place, error), monkeypatch.context() as patch:
                found = fails(patch, session, error, place)
                assert type(found) is InputError and "net fails on (1, 3, 4, 4): " in str(found)


def test_no_memory_is_the_device_s_fault(session, monkeypatch):
    for error in OUT_OF_MEMORY:
        with case(error), monkeypatch.context() as patch:
            found = fails(patch, session, error, "cuda")
            assert type(found) is DeviceError and "nvidia-smi" in found.fix
            assert str(found).startswith("GPU 0 is out of memory: 1.5 of 12.0 GiB are free (net: ")
            assert "hostname" not in str(found)
            found = fails(patch, session, error, "cpu")
            assert type(found) is DeviceError and "smaller" in found.fix
            assert str(found).startswith("the memory is too small (net: ")


def test_a_fault_of_the_gpu_says_what_it_means(session, monkeypatch):
    for code in sorted(CUDA_FAULTS):
        with case(code), monkeypatch.context() as patch:
            found = fails(patch, session, Fail(CUDA.format(code, "an error")), "cuda")
            assert type(found) is DeviceError and "restart" in found.fix
            assert "has lost its context" in str(found) or "is broken" in str(found)


OTHERS = [
    Fail(CUDA.format(209, "no kernel image is available for execution on the device")),
    Fail(CUDA.format(35, "CUDA driver version is insufficient for CUDA runtime version")),
    Fail(RUNNING + "MatMul node. CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0 ;"),
    Fail(RUNNING + "Conv node. CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ;"),
    Fail(RUNNING + "Conv node. CUDNN_FE failure 11: CUDNN_BACKEND_API_FAILED ; GPU=0 ;"),
    EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : the provider gave up"),
    RuntimeException("something that nobody has seen before"),
]


def test_other_errors_of_a_run_on_a_gpu_are_the_gpu_s(session, monkeypatch):
    for error in OTHERS:
        with case(error), monkeypatch.context() as patch:
            found = fails(patch, session, error, "cuda")
            assert (
                type(found) is DeviceError and "nvidia-smi" in found.fix and "doctor" in found.fix
            )


def test_a_run_on_the_gpu_alone_is_explained_too(session, monkeypatch):
    """Arrays that lie on the GPU go by way of bindings, whose errors are all RuntimeError."""
    monkeypatch.setattr(transfer, "own_stream", lambda index: 7)
    made = engine("cuda")
    error = RuntimeError("Error in execution: " + CUDA.format(700, "an illegal memory access"))

    def run_with_iobinding(binding, options):
        raise error

    made._session.run_with_iobinding = run_with_iobinding
    made._session.io_binding = lambda: SimpleNamespace(
        bind_input=lambda *_: None, bind_output=lambda *_: None
    )
    array = SimpleNamespace(__cuda_array_interface__={"shape": IMAGE.shape, "data": (1, False)})
    with pytest.raises(
        DeviceError, match=r"(?s)has lost its context on GPU 0.*CUDA failure 700.*fix: restart"
    ):
        made.on_gpu(array)


def test_no_memory_while_loading_is_no_damaged_file(session, monkeypatch):
    for error in OUT_OF_MEMORY:
        for place, said in [("cuda", "GPU 0 is out of memory"), ("cpu", "the memory is too small")]:
            with case(place, error), monkeypatch.context() as patch:

                def raising(self, *_, error=error, **__):
                    raise error

                patch.setattr(session, "__init__", raising)
                with pytest.raises(DeviceError, match=said) as caught:
                    engine(place)
                assert caught.value.__cause__ is error


def test_a_gpu_that_fails_while_loading_is_no_damaged_file(session, monkeypatch):
    for error in OTHERS[:-2]:  # those that name a library of CUDA
        with case(error), monkeypatch.context() as patch:

            def raising(self, *_, error=error, **__):
                raise error

            patch.setattr(session, "__init__", raising)
            with pytest.raises(DeviceError, match=r"^GPU 0 fails \(net: .*\n  fix: run nvidia-smi"):
                engine("cuda")


def test_a_damaged_file_is_one_on_every_device(session, monkeypatch):
    for place in ["cpu", "cuda"]:
        with case(place), monkeypatch.context() as patch:

            def raising(self, *_, **__):
                raise InvalidArgument(
                    "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : No graph was found"
                )

            patch.setattr(session, "__init__", raising)
            with pytest.raises(BundleError, match=r"net cannot be loaded: .*No graph was found"):
                engine(place)


def test_errors_of_nobody_are_not_explained(session, monkeypatch):
    """What is no word of ONNX Runtime's is a mistake of ours, and ends in a traceback."""
    made = engine()
    monkeypatch.setattr(session, "error", AttributeError("a typing error"))
    with pytest.raises(AttributeError, match="a typing error"):
        made(IMAGE)
    made.close()
    face = {"shape": IMAGE.shape, "data": (0, False)}
    on_a_gpu = types.SimpleNamespace(__cuda_array_interface__=face)
    calls = (lambda: made(IMAGE), lambda: made.on_gpu(on_a_gpu), lambda: made.loop({}, {}))
    for call in calls:
        with pytest.raises(InputError, match="net is closed"):
            call()


# Nothing is silent


def test_a_network_that_cannot_share_the_gpu_says_so(session, monkeypatch):
    assert engine().warnings == []
    (told,) = engine("cuda").warnings
    assert told.output == "net" and told.message == (
        "the network's input and scores are copied through the host, because the CUDA module "
        "cannot be used: the CUDA module is not built (no module)"
    )
    monkeypatch.setattr(transfer, "own_stream", lambda index: 7)
    assert engine("cuda").warnings == []


def test_the_first_result_says_so(session, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x08")
    segmenter = Segmenter(path, device="cuda", refine=None)
    first, second = (segmenter(np.zeros((8, 8, 3), np.uint8)).warnings for _ in range(2))
    assert sum("copied through the host" in warning for warning in first) == 1
    assert not any("copied through the host" in warning for warning in second)
