"""Types of the C++ core, whose caller guarantees all shapes and dtypes.

Kernels have the shapes and meanings of the functions of the same name in runtime/core/reference.py.
Arrays are float32 and C-contiguous unless stated; h and w are the height and width of a picture, k
is the number of classes. ``isa`` names an instruction set, "" the default one. ``threads`` is at
least 1. A kernel runs ``repeats`` times on the same memory, for measurements.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

def isas() -> list[str]:
    """Return the instruction sets that this machine runs, the slowest first."""

def isa() -> str:
    """Return the default instruction set: SEG_ISA or the fastest."""

def lanes(isa: str = "") -> int:
    """Return the floats of a vector."""

def constants() -> dict[str, Any]:
    """Return the constants of network.h by name."""

def conv(
    x: Array,
    weight: Array,
    bias: Array,
    relu: bool = False,
    few: bool = False,
    norm: Array = ...,
    isa: str = "",
    repeats: int = 1,
) -> Array: ...
def conv_backward(
    dy: Array, x: Array, weight: Array, few: bool = False, isa: str = "", repeats: int = 1
) -> tuple[Array, Array, Array]: ...
def moments(x: Array, reference: Array, isa: str = "") -> tuple[Array, Array]: ...
def normalize(x: Array, mean: Array, scale: Array, shift: Array, isa: str = "") -> Array: ...
def bn_sums(dy: Array, x: Array, mean: Array, isa: str = "") -> tuple[Array, Array]: ...
def bn_backward(
    dy: Array,
    x: Array,
    mean: Array,
    scale: Array,
    a: Array,
    b: Array,
    relu: bool,
    isa: str = "",
    repeats: int = 1,
) -> tuple[Array, Array]: ...
def softmax(r: Array, isa: str = "", repeats: int = 1) -> tuple[Array, Array, Array]: ...
def cluster_loss(
    r: Array,
    labels: Array,
    guide: Array | None,
    table: Array,
    self_weight: float,
    guide_weight: float,
    isa: str = "",
    repeats: int = 1,
) -> tuple[Array, float, float]: ...
def spatial_loss(
    r: Array,
    gain: Array,
    weight: float,
    scale: Array,
    huber: bool,
    isa: str = "",
    repeats: int = 1,
) -> tuple[Array, float]: ...
def affinity(image: Array, offsets: Array, sigma: float, isa: str = "") -> Array: ...
def residual_loss(
    z: Array,
    q: Array,
    confidence: Array,
    class_weight: Array,
    affinity: Array,
    offsets: Array,
    lam: float,
    isa: str = "",
    repeats: int = 1,
) -> tuple[Array, float, float]: ...
def sgd_step(
    w: Array, v: Array, dw: Array, lr: float, momentum: float, isa: str = ""
) -> tuple[Array, Array]: ...
def assign(cost: Array) -> Array: ...
def guided_coefficients(
    guidance: Array, values: Array, radius: int, eps: float, threads: int, isa: str = ""
) -> Array:
    """Return (h, g + 1, k, w) from guidance (h, w, g), with g 1 or 3, and values (h, w, k)."""

def guided_filter(
    guidance: Array,
    values: Array,
    radius: int,
    eps: float,
    threads: int,
    isa: str = "",
    out: Array | None = None,
) -> Array:
    """Return the filtered values (h, w, k), in ``out`` if it is not None.

    Guidance of uint8 is divided by 255, in this function and in those below.
    """

def apply_coefficients(
    coefficients: Array, guidance: Array, threads: int, isa: str = "", out: Array | None = None
) -> Array:
    """Return values (h, w, k) of guidance (h, w, g) and coefficients (low_h, g + 1, k, low_w)."""

def shrink(planes: Array, height: int, width: int, threads: int, isa: str = "") -> Array:
    """Return (height, width, k): the means of planes (h, w, k) over the area of each pixel."""

def joint_upsample(
    coefficients: Array, image: Array, threads: int, isa: str = ""
) -> tuple[Array, Array]:
    """Return labels (h, w) int32 and confidence (h, w) for an image (h, w, 3) uint8.

    Coefficients are (low_h, 4, k, low_w), or (low_h, 1, k, low_w) for bilinear upsampling.
    """

def connected_regions(labels: Array, min_area: int) -> tuple[Array, Array, int]:
    """Return regions and merged labels, both (h, w) int32, and the number of regions."""

class Refiner:
    """Refines pictures of one size. Enumerations in ``options`` are numbers."""

    def __init__(
        self, height: int, width: int, options: dict[str, Any], threads: int, isa: str = ""
    ) -> None: ...
    def run(
        self,
        image: Array,
        guide: Array | None,
        label_floor: int,
        steps: int,
        progress: Callable[[int], bool] | None,
    ) -> tuple[Array, Array, Array, Array, int, int, int]:
        """Return scores (h, w, k), labels (h, w), losses (steps, 4) float64, clusters (steps,),
        steps, the number of the stop reason, and the clusters of the returned labels.

        ``progress`` receives the number of steps done and returns True to end the run.
        """

    def state(self) -> dict[str, Any]:
        """Return parameters, momenta and buffers as flat arrays, and batches, a number."""

    def set_state(
        self, parameters: Array, momenta: Array, buffers: Array, batches: int
    ) -> None: ...
    def arena_bytes(self) -> int:
        """Return the bytes of the memory for maps."""
