"""Types of the C++ core, whose caller guarantees all shapes and dtypes.

A kernel without a docstring has the shapes and the meaning of the function of the same name in
runtime/core/reference.py. Arrays are float32 and C-contiguous unless stated; h and w are the height
and width of a picture, c is a number of channels, k is the number of classes. ``isa`` names an
instruction set, "" the default one. ``threads`` is at least 1. A kernel runs ``repeats`` times on
the same memory, for measurements; with more than 1, results that are sums grow each time.
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
    """Return the number of floats of a vector of this instruction set."""

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
) -> Array:
    """As in reference.py. A 3x3 convolution is computed by tiles (conv3), or with ``few`` by taps.

    ``norm`` is empty, or (3, c): mean, scale and shift, which conv3 applies to x.
    """

def conv_backward(
    dy: Array, x: Array, weight: Array, few: bool = False, isa: str = "", repeats: int = 1
) -> tuple[Array, Array, Array]:
    """As in reference.py. With ``few``, dw of a 3x3 convolution is computed by taps, not tiles."""

def moments(x: Array, reference: Array, isa: str = "") -> tuple[Array, Array]:
    """Return the sums (c,) of d and of d * d, with d = x - reference; x is one row (1, w, c)."""

def normalize(x: Array, mean: Array, scale: Array, shift: Array, isa: str = "") -> Array:
    """Return (x - mean) * scale + shift of x (h, w, c); mean, scale and shift are (c,)."""

def bn_sums(dy: Array, x: Array, mean: Array, isa: str = "") -> tuple[Array, Array]:
    """Return the sums (c,) over all pixels of dy and of dy * (x - mean)."""

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
) -> tuple[Array, Array]:
    """Return dx = scale * (dy - a - (x - mean) * b), with ``relu`` 0 where x <= 0, and its sum.

    dy, x and dx are (h, w, c), the other arrays (c,).
    """

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
) -> tuple[Array, float]:
    """As in reference.py, for the scores gain * r with gain (k,)."""

def affinity(image: Array, offsets: Array, sigma: float, isa: str = "") -> Array:
    """Return (offsets, 2, h, w): as in reference.py for each offset, and for its opposite."""

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

    Guidance is float32, or uint8, which is divided by 255. The same is true of guidance and planes
    in the functions below.
    """

def apply_coefficients(
    coefficients: Array, guidance: Array, threads: int, isa: str = "", out: Array | None = None
) -> Array:
    """Return values (h, w, k) of guidance (h, w, g) and coefficients (low_h, g + 1, k, low_w)."""

def shrink(planes: Array, height: int, width: int, threads: int, isa: str = "") -> Array:
    """Return (height, width, k): the means of planes (h, w, k) over the area of each pixel of the
    result, which has at most the size of planes."""

def joint_upsample(
    coefficients: Array, image: Array, threads: int, isa: str = ""
) -> tuple[Array, Array]:
    """Return labels (h, w) int32 and confidence (h, w) for an image (h, w, 3) uint8.

    Coefficients are (low_h, 4, k, low_w), or (low_h, 1, k, low_w) for bilinear upsampling.
    """

def dense_crf(
    image: Array,
    probabilities: Array,
    steps: int,
    bilateral_weight: float,
    bilateral_sxy: float,
    bilateral_srgb: float,
    gaussian_weight: float,
    gaussian_sxy: float,
    floor: float,
    compatibility: Array | None,
    threads: int,
    isa: str = "",
    out: Array | None = None,
) -> Array:
    """Return the distributions (h, w, k), in ``out`` if it is not None, for an image (h, w, 3)
    uint8, probabilities (h, w, k) and a compatibility (k, k).

    Raises OverflowError if the features of the pixels are too far apart for the lattice.
    """

def connected_regions(labels: Array, min_area: int) -> tuple[Array, Array, int]:
    """Return regions and merged labels, both (h, w) int32, and the number of regions.

    Regions of less than ``min_area`` pixels are merged into a neighbour.
    """

class JpegWalk:
    """What :func:`walk_jpeg` found in a JPEG file.

    ``coding`` is "sequential" (Huffman codes, the usual kind), "progressive", "arithmetic",
    "lossless", or "other" for a kind that OpenCV does not read and for a file without a frame
    header. ``width`` and ``height`` are those of the frame header, 0 without one. ``wanted`` and
    ``found`` count blocks of 8x8 coefficients; both are 0 unless the coding is sequential.

    ``problem`` is "" if nothing is wrong, or the second half of a sentence about the file:

    - "its header is damaged": a segment has a wrong length or wrong values;
    - "a Huffman table is missing or damaged";
    - "it contains no picture data": the frame header or all scans are missing;
    - "a colour channel is missing": a component is in no scan;
    - "its end marker is missing": the file ends too early;
    - "a part of its picture data is missing": ``found`` is less than ``wanted``;
    - "its picture data contains a wrong code": all blocks were found, but a code of the data is in
      no table. libjpeg takes such a code as 0 and does not always warn.
    """

    @property
    def coding(self) -> str: ...
    @property
    def problem(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def wanted(self) -> int: ...
    @property
    def found(self) -> int: ...

def walk_jpeg(data: bytes | bytearray | memoryview) -> JpegWalk:
    """Find out whether a JPEG file contains all blocks of its picture, without decoding pixels.

    Bytes behind the end marker (more pictures of an MPO file, for example) are not read. Only
    sequential Huffman coding is decoded, code by code. Of the other kinds, only the markers are
    read: an end marker, a frame, and a scan of each component must exist, so data that is missing
    inside a scan is not seen. The GIL is released.

    Example
    -------
    >>> walk = _core.walk_jpeg(data)
    >>> walk.problem, walk.found, walk.wanted
    """

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
        steps, the number of the stop reason, and the number of distinct returned labels.

        The columns of losses are total, first (similarity), spatial (or pair) and guide. A guide is
        (h, w, k) float32 or (h, w) int32. ``progress`` receives the number of steps done and
        returns True to end the run.
        """

    def state(self) -> dict[str, Any]:
        """Return parameters, momenta and buffers as flat arrays, and batches, a number."""

    def set_state(
        self, parameters: Array, momenta: Array, buffers: Array, batches: int
    ) -> None: ...
    def arena_bytes(self) -> int:
        """Return the bytes of the memory for maps, sums, and weights in the form of the kernels."""
