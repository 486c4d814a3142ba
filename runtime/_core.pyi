"""Types of the C++ core. Shapes and meanings are those of runtime/core/reference.py."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

def isas() -> list[str]: ...
def isa() -> str: ...
def lanes(isa: str = "") -> int: ...
def constants() -> dict[str, Any]: ...
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
) -> Array: ...
def guided_filter(
    guidance: Array,
    values: Array,
    radius: int,
    eps: float,
    threads: int,
    isa: str = "",
    out: Array | None = None,
) -> Array:
    """A guidance of uint8 counts as level / 255, here and below."""

def apply_coefficients(
    coefficients: Array, guidance: Array, threads: int, isa: str = "", out: Array | None = None
) -> Array: ...
def shrink(planes: Array, height: int, width: int, threads: int, isa: str = "") -> Array: ...
def joint_upsample(
    coefficients: Array, image: Array, threads: int, isa: str = ""
) -> tuple[Array, Array]: ...
def connected_regions(labels: Array, min_area: int) -> tuple[Array, Array, int]: ...

class Refiner:
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
    ) -> tuple[Array, Array, Array, Array, int, int, int]: ...
    def state(self) -> dict[str, Any]: ...
    def set_state(
        self, parameters: Array, momenta: Array, buffers: Array, batches: int
    ) -> None: ...
    def arena_bytes(self) -> int: ...
