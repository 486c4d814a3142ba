"""A network's inputs and outputs: name, shape and data type, and the types' names in each tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Dtype(NamedTuple):
    """The names of one data type. If a tool does not have the type, the name is empty, or None for
    NumPy."""

    name: str  # in the manifest
    onnx: str  # in ONNX Runtime, and in ``Port.dtype``
    numpy: type[np.generic] | None
    tensorrt: str
    triton: str


DTYPES = (
    Dtype("float32", "tensor(float)", np.float32, "FLOAT", "TYPE_FP32"),
    Dtype("float16", "tensor(float16)", np.float16, "HALF", "TYPE_FP16"),
    Dtype("bfloat16", "tensor(bfloat16)", None, "BF16", "TYPE_BF16"),
    Dtype("float64", "tensor(double)", np.float64, "", "TYPE_FP64"),
    Dtype("int8", "tensor(int8)", np.int8, "INT8", "TYPE_INT8"),
    Dtype("int16", "tensor(int16)", np.int16, "", "TYPE_INT16"),
    Dtype("int32", "tensor(int32)", np.int32, "INT32", "TYPE_INT32"),
    Dtype("int64", "tensor(int64)", np.int64, "INT64", "TYPE_INT64"),
    Dtype("uint8", "tensor(uint8)", np.uint8, "UINT8", "TYPE_UINT8"),
    Dtype("uint16", "tensor(uint16)", np.uint16, "", "TYPE_UINT16"),
    Dtype("uint32", "tensor(uint32)", np.uint32, "", "TYPE_UINT32"),
    Dtype("uint64", "tensor(uint64)", np.uint64, "", "TYPE_UINT64"),
    Dtype("bool", "tensor(bool)", np.bool_, "BOOL", "TYPE_BOOL"),
)
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_BY_ONNX = {dtype.onnx: dtype for dtype in DTYPES}
_BY_TENSORRT = {dtype.tensorrt: dtype for dtype in DTYPES if dtype.tensorrt}


class Port(NamedTuple):
    """An input or output of a network.

    Parameters
    ----------
    name : in the graph.
    shape : a number for each fixed dimension; a name or None for each free one.
    dtype : the data type as ONNX Runtime writes it, for example "tensor(float)".
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def numpy(self) -> type[np.generic] | None:
        """NumPy's type; None where NumPy does not have it."""
        return numpy_dtype(self.dtype)

    def entry(self) -> dict[str, Any]:
        """The port as the manifest stores it: the dtype as "float32", a free dimension as its name
        or -1."""
        shape = [-1 if n is None else n for n in self.shape]
        return {"name": self.name, "dtype": manifest_dtype(self.dtype), "shape": shape}


Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> least, usual, largest


def numpy_dtype(onnx: str) -> type[np.generic] | None:
    """NumPy's type for ONNX Runtime's text: ``np.float32`` for "tensor(float)". None where NumPy
    has no such type."""
    known = _BY_ONNX.get(onnx)
    return known.numpy if known else None


def manifest_dtype(onnx: str) -> str:
    """The manifest's name for ONNX Runtime's text: "float32" for "tensor(float)". The text in the
    parentheses if the table does not contain it."""
    known = _BY_ONNX.get(onnx)
    return known.name if known else onnx.removeprefix("tensor(").removesuffix(")")


def onnx_dtype(name: str) -> str:
    """ONNX Runtime's text for the manifest's name: "tensor(float)" for "float32". "tensor(name)" if
    the table does not contain it."""
    known = _BY_NAME.get(name)
    return known.onnx if known else f"tensor({name})"


def dtype_of_tensorrt(name: str) -> str:
    """ONNX Runtime's text for TensorRT's name: "tensor(float)" for "FLOAT". The name itself where
    the table does not contain it."""
    known = _BY_TENSORRT.get(name)
    return known.onnx if known else name


def triton_dtype(name: str) -> str:
    """Triton's name for the manifest's name: "TYPE_FP32" for "float32".

    Raises
    ------
    KeyError : the table does not contain the type.
    """
    return _BY_NAME[name].triton
