"""Types of the CUDA module: the functions of runtime._core, on a GPU.

Arguments are NumPy arrays, which are copied to the GPU, or arrays on the GPU (``__dlpack__`` or
``__cuda_array_interface__``), which are not copied. Results are NumPy arrays if all arguments are
NumPy arrays, and :class:`Array` otherwise. ``threads`` and ``isa`` are not used. ``stream`` is a
cudaStream_t as an integer; None is the module's own stream. The caller destroys a stream only after
all arrays that were made on it. The caller guarantees all shapes and dtypes.
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
    """The time at which a stream has done all work that was queued before the mark."""

    def until(self, later: Mark) -> float:
        """Return the milliseconds to a later mark by the GPU's clock; wait for that mark."""

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
    """As runtime._core.Refiner; ``image`` and ``guide`` may be on the GPU. A guide of labels needs
    ``guide_classes``, the number of its classes."""

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
        """Return the milliseconds of the last run's steps by the GPU's clock."""

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
    """Return (1, 3, height, width) float32, in ``to`` if it is not None."""

def soft_guide(scores: Any, exponents: bool, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (h, w, C) probabilities of scores (1, C, h, w): their soft-max with ``exponents``,
    otherwise their shares. A pixel whose scores are invalid is NaN."""

def resize_planes(
    planes: Any, height: int, width: int, *, device: int = 0, stream: int | None = None
) -> Any:
    """Return (height, width, C): averages of planes (h, w, C), or interpolated if a side grows."""

def class_sums(guide: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (C, parts) float32: the sums of guide (h, w, C) over parts of the pixels."""

def take_classes(
    guide: Any, classes: np.ndarray, normalised: bool, *, device: int = 0, stream: int | None = None
) -> Any:
    """Return (h, w, len(classes)): these columns of guide (h, w, C), 0 for a column >= C."""

def winners(scores: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (C,) int32: 1 for a class that is the first largest one of some pixel."""

def hard_labels(guide: Any, *, device: int = 0, stream: int | None = None) -> tuple[Any, Any]:
    """Return labels (h, w) int32 and their values (h, w) float32: the first largest class of each
    pixel of guide (h, w, C). The label is -1 if all values are zero, -2 if one is NaN."""

def pair_counts(
    labels: Any,
    hard: Any,
    clusters: int,
    classes: int,
    *,
    device: int = 0,
    stream: int | None = None,
) -> Any:
    """Return (clusters, classes) int32: the pixels with each pair of values of the (h, w) maps."""

def merge_classes(
    scores: Any, to: np.ndarray, count: int, *, device: int = 0, stream: int | None = None
) -> Any:
    """Return (h, w, count): column k of scores (h, w, C) is added to column to[k] if to[k] >= 0."""

def keep_pixels(
    scores: Any, guide: Any, mask: np.ndarray, *, device: int = 0, stream: int | None = None
) -> Any:
    """Copy guide to scores, in place, where the (h, w) mask is not zero."""

def colour_counts(picture: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (512,) int32: the pixels of each of 8 x 8 x 8 colours of picture (h, w, 3)."""

def stream(device: int = 0) -> int:
    """Return the module's own cudaStream_t."""
