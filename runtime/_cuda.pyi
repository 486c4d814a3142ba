"""Types of the CUDA module: most functions of runtime._core on a GPU, and operations on guides.

A function without a docstring is the function of the same name of runtime._core. Guidance and
planes are float32, never uint8; the image of joint_upsample is uint8.

Arguments are NumPy arrays, which are copied to the GPU, or arrays on the GPU (``__dlpack__`` or
``__cuda_array_interface__``), which are not copied. Results are NumPy arrays if all arguments are
NumPy arrays, and :class:`Array` otherwise. ``threads`` and ``isa`` are not used. ``stream`` is a
cudaStream_t as an integer; None is the module's own stream. The caller destroys a stream only after
all arrays that were made on it are destroyed. The caller guarantees all shapes and dtypes.
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
    def numpy(self) -> np.ndarray:
        """Return a copy as a NumPy array; wait until the array is written."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...
    def reshape(self, *shape: int) -> Array:
        """Return an array of this shape and of the same memory."""

class Mark:
    """The time at which a stream has done all work that was queued before the mark."""

    def until(self, later: Mark) -> float:
        """Return the milliseconds to a later mark by the GPU's clock; wait for that mark."""

def mark(device: int = 0, stream: int | None = None) -> Mark:
    """Return a mark of the work that is queued on the stream now."""

def architectures() -> list[str]:
    """Return the GPU architectures that the module was built for."""

def runtime_version() -> int:
    """Return the version of the CUDA runtime, 0 if it is unknown."""

def constants() -> dict[str, Any]: ...
def to_device(array: np.ndarray, device: int = 0, stream: int | None = None) -> Array:
    """Return a copy on the GPU of an array of float32, int32 or uint8."""

def as_array(value: Any, name: str = "array", device: int = 0, stream: int | None = None) -> Array:
    """Return an Array of the same memory as ``value``, which must be an array on the GPU.

    Messages of errors call the value ``name``.
    """

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
) -> Any:
    """Return picture (h, w, c) uint8 resized to (height, width, c) float32 in [0, 1]."""

def bilinear_coefficients(scores: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return the coefficients (h, 1, k, w) with which joint_upsample interpolates (h, w, k)."""

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
    def arena_bytes(self) -> int:
        """Return the bytes of GPU memory for the network's state, the maps and the sums."""

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
    """Return picture (h, w, 3) uint8 resized and normalised as (level - mean) / std, with levels in
    [0, 1]: (1, 3, height, width) float32, in ``to`` if it is not None.

    With ``bgr`` the planes are blue, green, red. mean and std are in the order of the planes.
    """

def soft_guide(scores: Any, exponents: bool, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (h, w, C) probabilities of scores (1, C, h, w): their soft-max with ``exponents``,
    otherwise their shares. A pixel whose scores are invalid is NaN."""

def resize_planes(
    planes: Any, height: int, width: int, *, device: int = 0, stream: int | None = None
) -> Any:
    """Return planes (h, w, C) resized to (height, width, C): the mean over the area of each pixel,
    or bilinear interpolation if a side grows."""

def class_sums(guide: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (C, parts) float32: the sums of guide (h, w, C) over parts of the pixels."""

def take_classes(
    guide: Any, classes: np.ndarray, normalised: bool, *, device: int = 0, stream: int | None = None
) -> Any:
    """Return (h, w, len(classes)): these columns of guide (h, w, C), 0 for a number >= C.

    With ``normalised`` the values of each pixel are divided by their sum unless it is 0.
    """

def winners(scores: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (C,) int32: 1 for a class that is the first largest one of a pixel of scores
    (h, w, C), 0 for the others."""

def hard_labels(guide: Any, *, device: int = 0, stream: int | None = None) -> tuple[Any, Any]:
    """Return labels (h, w) int32 and their values (h, w) float32: the first largest class of each
    pixel of guide (h, w, C). The label is -1 if no value is above 0, -2 if one is NaN."""

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
    """Copy guide to scores, in place, where the (h, w) mask is not zero; return scores.

    Scores must be on the GPU.
    """

def colour_counts(picture: Any, *, device: int = 0, stream: int | None = None) -> Any:
    """Return (512,) int32: the pixels of each of 8 x 8 x 8 colours of picture (h, w, 3)."""

def stream(device: int = 0) -> int:
    """Return the module's own cudaStream_t of the GPU as an integer."""
