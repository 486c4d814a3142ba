"""What the errors of ONNX Runtime mean: the reason without C++, whose fault it is, and the fix."""

from __future__ import annotations

import re
from typing import Any

from runtime.device.faults import CUDA_FAULTS, OUT_OF_MEMORY, cuda_error
from runtime.engines.onnx_runtime import import_onnxruntime
from runtime.errors import DeviceError, first_line

SEE_GPU = "run nvidia-smi, and python -m runtime doctor"

# Patterns for the messages of ONNX Runtime's errors: the first four find a device that fails, the
# fifth one finds an input that does not fit. The class of an error is not enough, because ONNX
# Runtime raises Fail or RuntimeError in both cases.
_CUDA_CODE = re.compile(r"\bCUDA failure (\d+)")
_GPU_FAILS = re.compile(r"\b(CU[A-Z_]+|NCCL) failure|\bCUDA error|\bcudaError")
_NO_MEMORY = re.compile(
    "out of memory|bad_alloc|failed to allocate|alloc_failed|available memory of", re.IGNORECASE
)
_NO_THREAD = re.compile("pthread_create failed|can't start new thread")
_INPUT_IS_WRONG = re.compile(
    r"\b(dimensions?|rank|shapes?|axis|broadcast\w*|reshaped|input data type)\b", re.IGNORECASE
)
_NODE = re.compile(
    r"Non-zero status code returned while running (\S+) node\. Name:'([^']*)' Status Message: "
)
_SIZES = re.compile("dimension|shape|broadcast|reshape", re.IGNORECASE)

# What is wrong with a model that cannot be loaded: a pattern for the message, the problem, the fix.
_NEWER = (
    "upgrade ONNX Runtime (pip install --upgrade onnxruntime-gpu, or onnxruntime, whichever is "
    "installed)"
)
_LOADING = [
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        "it has IR version {1}, and ONNX Runtime {version} reads IR versions up to {2}",
        _NEWER + "; or save the model with ir_version = {2}",
    ),
    (
        r"Opset (\d+) is under development.* for domain (\S+) is till opset (\d+)",
        "it uses opset {1} of {2}, and ONNX Runtime {version} reads opsets up to {3}",
        _NEWER + "; or export the network with a lower opset",
    ),
    (
        r"Could not find an implementation for (\S+)\((\d+)\)",
        "ONNX Runtime {version} has no kernel for its operator {1} (of opset {2}) on this device "
        "with the types of its inputs",
        "export the network without this operator, in float32 (most operators have no kernel for "
        "float64), or for another opset",
    ),
    (
        r"Fatal error: (\S+?)(?:\(-?\d+\))? is not a registered function|"
        r"No Op registered for (\S+) with domain_version",
        "ONNX Runtime {version} does not know its operator {1}{2}",
        "export the network with operators of the ONNX standard, or upgrade ONNX Runtime",
    ),
    (
        "symbolic link",
        "{reason}",
        "copy the folder of the model with files in place of links: cp -rL FOLDER COPY",
    ),
]


def ort_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that ONNX Runtime raises: its own classes, which have no base class of
    their own, and the classes of Python that pybind11 raises for a C++ exception.

    Raises
    ------
    MissingBackend : ONNX Runtime is not installed, or cannot be imported.
    """
    own = [c for c in vars(_module()).values() if isinstance(c, type) and issubclass(c, Exception)]
    return (*own, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)


def _module() -> Any:
    """The module of ONNX Runtime that has the classes of its errors."""
    return import_onnxruntime("run a network").capi.onnxruntime_pybind11_state


def reason(error: Exception) -> str:
    """Return the first line of an error of ONNX Runtime without its code, the path of the model,
    the place in its C++ sources, and the C++ function that raised it.

    Example
    -------
    >>> reason(error)  # [ONNXRuntimeError] : 1 : FAIL : Load model from m.onnx failed:/src/...
    'Unsupported model IR version: 99, max supported IR version: 13'
    """
    text = first_line(error).removeprefix("Error in execution: ")
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = _NODE.sub(lambda m: f"{m[1]} node{m[2] and ' ' + repr(m[2])}: ", text)
    text = text.partition(" ; GPU=")[0]
    place = re.search(r"\S+\.(?:cc|cpp|cuh?|hp?p?):\d+ ", text)
    if place is None:
        return text
    return text[: place.start()] + (_after_function(text[place.end() :]) or text[place.end() :])


def _after_function(text: str) -> str:
    """The text after the C++ function at its start: one word, or a signature with arguments."""
    if "::" not in text.partition("(")[0]:
        return text.partition(" ")[2]
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0 and text[i + 1 : i + 2] in ("", " "):
            return re.sub(r"^( const\b)?( \[with [^]]*\])? ", "", text[i + 1 :])
    return ""


def load_problem(error: Exception, version: str, where: str) -> tuple[str, str]:
    """Return the problem of a model that ONNX Runtime does not load, and the fix.

    Parameters
    ----------
    error : the exception that ONNX Runtime raised.
    version : of ONNX Runtime.
    where : the file of the model, for a command in the fix.
    """
    text = reason(error)
    for pattern, problem, fix in _LOADING:
        found = re.search(pattern, text)
        if found:
            groups = ("", *(group or "" for group in found.groups()))
            return problem.format(*groups, version=version, reason=text), fix.format(*groups)
    return text, f"check it with: check-model {where} (pip install onnx), or export it again"


def is_about_input(error: Exception) -> bool:
    """Return whether an error of ONNX Runtime says that the input does not fit the network."""
    return isinstance(error, _module().InvalidArgument) or bool(_INPUT_IS_WRONG.search(str(error)))


def is_about_sizes(error: Exception) -> bool:
    """Return whether an operator inside the network failed because sizes do not fit together."""
    return bool(_NODE.search(str(error)) and _SIZES.search(reason(error)))


def is_about_types(error: Exception) -> bool:
    """Return whether an output of the network has a type that NumPy lacks, as bfloat16."""
    return "No corresponding Numpy type" in str(error)


def device_error(error: Exception, name: str, kind: str, index: int) -> DeviceError | None:
    """Return the DeviceError for an error of ONNX Runtime; None if the error does not say that the
    device failed, has too little memory, or starts no more threads.

    Parameters
    ----------
    error : the exception that ONNX Runtime raised.
    name : of the network.
    kind, index : "cpu" or "cuda", and the number of the GPU.
    """
    text, call = str(error), f"{name}: {reason(error)}"
    if _NO_THREAD.search(text):
        fix = "close other processes, or raise the limits: ulimit -u, or pids.max of the container"
        return DeviceError(f"no more threads can be started ({call})", fix=fix)
    no_memory = isinstance(error, MemoryError) or _NO_MEMORY.search(text)
    if kind == "cpu":
        fix = "use smaller pictures or a smaller imgsz; close other processes"
        return DeviceError(f"the memory is too small ({call})", fix=fix) if no_memory else None
    found = _CUDA_CODE.search(text)
    code = OUT_OF_MEMORY if no_memory else int(found[1]) if found else None
    if code is not None and (code == OUT_OF_MEMORY or code in CUDA_FAULTS):
        return cuda_error(code, call, index)
    if _GPU_FAILS.search(text):
        return DeviceError(f"GPU {index} fails ({call})", fix=SEE_GPU)
    return None
