"""Types of the CUDA module: the functions of runtime._core, on a GPU.

Arguments are NumPy's arrays, which are copied up, or arrays on the GPU (``__dlpack__`` or
``__cuda_array_interface__``), which are taken as they are. Results are NumPy's if all arguments
were, and :class:`Array` otherwise. ``threads`` and ``isa`` are not used. ``stream`` is a
cudaStream_t as an integer, None the module's own; it has to live until arrays made on it do not.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

class Array:
    """A C-contiguous array on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def numpy(self) -> np.ndarray: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...
    def reshape(self, *shape: int) -> Array: ...

class Mark:
    """A moment of a stream."""

    def until(self, later: Mark) -> float:
        """Milliseconds to a later one, on the GPU's clock (CUDA events); waits for that."""

def mark(device: int = 0, stream: int | None = None) -> Mark: ...
def architectures() -> list[str]: ...
def runtime_version() -> int: ...
def constants() -> dict[str, Any]: ...
def to_device(array: np.ndarray, device: int = 0, stream: int | None = None) -> Array: ...
def as_array(
    value: Any, name: str = "array", device: int = 0, stream: int | None = None
) -> Array: ...
def guided_coefficients(
    guidance: Any,
    values: Any,
    radius: int,
    eps: float,
    threads: int,
    isa: str = "",
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any: ...
def guided_filter(
    guidance: Any,
    values: Any,
    radius: int,
    eps: float,
    threads: int,
    isa: str = "",
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any: ...
def apply_coefficients(
    coefficients: Any,
    guidance: Any,
    threads: int,
    isa: str = "",
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any: ...
def shrink(
    planes: Any,
    height: int,
    width: int,
    threads: int,
    isa: str = "",
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any: ...
def joint_upsample(
    coefficients: Any,
    image: Any,
    threads: int,
    isa: str = "",
    *,
    device: int = 0,
    stream: int | None = None,
) -> tuple[Any, Any]: ...
def working_picture(
    picture: Any, height: int, width: int, *, device: int = 0, stream: int | None = None
) -> Any: ...
def bilinear_coefficients(scores: Any, *, device: int = 0, stream: int | None = None) -> Any: ...

class Refiner:
    """As runtime._core.Refiner; ``image`` and ``guide`` may lie on the GPU. A guide of labels needs
    the number of its classes."""

    def __init__(
        self,
        height: int,
        width: int,
        options: dict[str, Any],
        threads: int,
        isa: str = "",
        device: int = 0,
        tensor_cores: bool = False,
    ) -> None: ...
    def run(
        self,
        image: Any,
        guide: Any,
        label_floor: int,
        steps: int,
        progress: Callable[[int], bool] | None,
        guide_classes: int = 0,
    ) -> tuple[Any, Any, np.ndarray, np.ndarray, int, int, int]: ...
    def state(self) -> dict[str, Any]: ...
    def set_state(
        self, parameters: np.ndarray, momenta: np.ndarray, buffers: np.ndarray, batches: int
    ) -> None: ...
    def arena_bytes(self) -> int: ...
    def milliseconds(self) -> float:
        """Of the last run's steps, on the GPU's clock."""

def network_input(
    picture: Any,
    height: int,
    width: int,
    mean: Any,
    std: Any,
    bgr: bool,
    to: Any = None,
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any:
    """(1, 3, height, width) float32, in ``to`` if that is given."""

def soft_guide(
    scores: Any, exponents: bool, *, device: int = 0, stream: int | None = None
) -> Any: ...
def resize_planes(
    planes: Any, height: int, width: int, *, device: int = 0, stream: int | None = None
) -> Any: ...
def class_sums(guide: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """(C, parts) float32: sums of (h, w, C) over parts of the pixels."""

def take_classes(
    guide: Any, classes: np.ndarray, normalised: bool, *, device: int = 0, stream: int | None = None
) -> Any: ...
def winners(scores: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """(C,) int32: 1 where the class is the first largest of some pixel."""

def hard_labels(guide: Any, *, device: int = 0, stream: int | None = None) -> tuple[Any, Any]:
    """(h, w) int32: the first largest class of (h, w, C), -1 where all are zero, -2 where one is
    NaN; and (h, w) float32, its value."""

def pair_counts(
    labels: Any,
    hard: Any,
    clusters: int,
    classes: int,
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any:
    """(clusters, classes) int32: how many pixels of two (h, w) int32 maps have both."""

def merge_classes(
    scores: Any, to: np.ndarray, count: int, *, device: int = 0, stream: int | None = None
) -> Any:
    """(h, w, count) from (h, w, C): column k is added to column to[k], unless that is negative."""

def keep_pixels(
    scores: Any, guide: Any, mask: np.ndarray, *, device: int = 0, stream: int | None = None
) -> Any:
    """In place: scores become the guide's where the (h, w) mask is not zero."""

def colour_counts(picture: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """(512,) int32: pixels of each of 8 x 8 x 8 colours of (h, w, 3) float32 in [0, 1]."""

def stream(device: int = 0) -> int:
    """The module's own cudaStream_t."""
