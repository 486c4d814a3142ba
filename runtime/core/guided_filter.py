"""The guided filter and joint upsampling: check the arguments, then call the device's module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.checks import (
    check_bytes,
    check_count,
    check_finite,
    check_image,
    check_out,
    check_planes,
    check_positive,
    on_gpu,
    renamed,
)
from runtime.device.choose import isa, module_of, thread_count
from runtime.device.driver import parse_device
from runtime.device.transfer import check_rows
from runtime.errors import InputError


@renamed(guide="guidance")
def guided_filter(
    guidance: np.ndarray,
    values: np.ndarray,
    *,
    radius: int = 8,
    eps: float = 1e-3,
    subsample: int = 1,
    out: np.ndarray | None = None,
    device: str = "cpu",
    stream: int | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Filter or upsample values so that they follow the edges of a guidance image.

    This is the guided filter (He, Sun, Tang, TPAMI 2013); with ``subsample`` its fast form (He, Sun
    2015); with values smaller than the guidance, joint upsampling.

    Parameters
    ----------
    guidance : (H, W) or (H, W, 1) grey or (H, W, 3) colour, float32; eps is meant for [0, 1]. uint8
        counts as level / 255 and is faster, so that a camera's picture needs no conversion.
    values : (H, W, K) or (H, W) float32, the values to filter. Or (h, w, K) or (h, w), smaller than
        the guidance: the coefficients are computed at (h, w) from the averaged guidance, and
        interpolated bilinearly to (H, W).
    radius : of the (2 radius + 1)^2 window, in pixels of ``values``. A window ends at the border of
        the picture; its sums are divided by the number of pixels that it contains.
    eps : regularisation: contrast (variance) below this value is smoothed.
    subsample : s > 1 computes the coefficients at 1/s of the height and width, with radius / s.
    out : an array for the result: float32, of the result's shape, C-contiguous, and no part of
        ``guidance``; it may be ``values``. It saves the time in which the system clears new memory.
        Only for "cpu": on a GPU the module reuses its memory.
    device : "cpu", "cuda", "cuda:1". With a GPU, ``guidance`` and ``values`` may be on this GPU:
        arrays of PyTorch, CuPy, JAX, or any with ``__dlpack__`` or ``__cuda_array_interface__``,
        C-contiguous and float32, the guidance also uint8. Such arrays are not copied, and not
        searched for NaN, because a search would make the program wait for the GPU.
    stream : the cudaStream_t to work on, as an integer; None: the module's own. None on "cpu".
    threads : most threads of the CPU; all processors when None.

    Returns
    -------
    (H, W, K) float32, or (H, W) if ``values`` has two dimensions; ``out`` if that is not None. Not
    clipped. If an argument is on the GPU, the result is too: a ``runtime._cuda.Array``, with both
    protocols and ``numpy()``, whose values are complete when the work on ``stream`` is done.

    Raises
    ------
    InputError : shapes that do not fit, another dtype, NaN, an option out of range, an ``out`` that
        cannot be used, or on a GPU more than 65535 rows.
    DeviceError : the GPU cannot be used, fails, or its memory is full; or SEG_ISA is wrong.
    MissingBackend : a native module is not built, or there is no CUDA driver or GPU for "cuda".

    Example
    -------
    >>> smooth = runtime.guided_filter(picture, scores, radius=8, eps=1e-3)
    """
    given = out
    result_on_gpu = on_gpu(guidance) or on_gpu(values)
    core, where, guidance, values = _placed(device, stream, guidance=guidance, values=values)
    guidance = check_planes(
        "guidance", guidance, (1, 3), finite=bool(where), gpu=bool(where), levels=True
    )
    two_dimensional = np.ndim(values) == 2
    values = check_planes("values", values, finite=bool(where), gpu=bool(where))
    radius = check_count("radius", radius, 1, 2**20)
    subsample = check_count("subsample", subsample, 1, 2**20)
    eps = check_positive("eps", eps)
    if values.shape[0] > guidance.shape[0] or values.shape[1] > guidance.shape[1]:
        raise InputError(
            f"values {values.shape[:2]} are larger than the guidance {guidance.shape[:2]}",
            fix="filter at the size of the values: resize the guidance up",
        )
    height, width, classes = *guidance.shape[:2], values.shape[2]
    if out is not None:
        if where:
            raise InputError(
                "out is for device 'cpu' only", fix="leave it out: the GPU reuses its memory"
            )
        shape = (height, width, classes)
        wanted = shape[:2] if two_dimensional else shape
        out = check_out(out, wanted, guidance=guidance).reshape(shape)
    threads = thread_count(threads)
    isa()  # raises if SEG_ISA is wrong
    guidance, values = _moved(core, where, guidance=guidance, values=values)
    if where and guidance.dtype == np.uint8:
        guidance = core.working_picture(guidance, height, width, **where)
    size = [-(-n // subsample) for n in values.shape[:2]]
    if subsample > 1:
        radius = max(1, round(radius / subsample))

    def shrink(name: str, planes: np.ndarray) -> np.ndarray:
        low = planes
        if planes.shape[:2] != tuple(size):
            low = core.shrink(planes, *size, threads, **where)
        if not where and not np.isfinite(low).all():  # the mean of NaN is NaN
            check_finite(name, planes)
        return low

    # With subsample 1 and values of the guidance's size, nothing is shrunk.
    low, values = shrink("guidance", guidance), shrink("values", values)
    to = {} if out is None else {"out": out}
    if low.shape == guidance.shape:
        made = core.guided_filter(guidance, values, radius, eps, threads, **where, **to)
    else:
        coefficients = core.guided_coefficients(low, values, radius, eps, threads, **where)
        made = core.apply_coefficients(coefficients, guidance, threads, **where, **to)
    if given is not None:
        return given
    if two_dimensional:
        made = made.reshape(height, width)
    return made.numpy() if where and not result_on_gpu else made


def _placed(device: str, stream: int | None, **arrays: Any) -> tuple[Any, ...]:
    """Return the module of ``device``; further keywords for its functions (device and stream on a
    GPU, none on the CPU); and each of ``arrays``, as an array of the module if it is on the GPU."""
    core, (kind, index) = module_of(device), parse_device(device)
    if kind == "cpu":
        if stream is not None:
            raise InputError(f"stream is {stream!r}, but device is 'cpu', which has none")
        return core, {}, *arrays.values()
    if stream is not None:
        stream = check_count("stream", stream, 0, 2**64 - 1)
    where = {"device": index, "stream": stream}
    taken = (core.as_array(a, n, **where) if on_gpu(a) else a for n, a in arrays.items())
    return core, where, *taken


def _moved(core: Any, where: dict[str, Any], **arrays: Any) -> Iterator[Any]:
    """Yield each of ``arrays``, which are checked. If ``where`` names a GPU, arrays on the host are
    copied to that GPU, and more than 65535 rows are an InputError."""
    for name, array in arrays.items():
        if where:
            check_rows(name, array)
        yield core.to_device(array, **where) if where and not on_gpu(array) else array


def joint_upsample(
    image: np.ndarray,
    scores: np.ndarray,
    *,
    low_image: np.ndarray | None = None,
    radius: int = 2,
    eps: float = 1e-3,
    device: str = "cpu",
    stream: int | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute labels at the picture's size from scores at a smaller size (joint upsampling).

    Scores at the picture's size are never in memory as a whole.

    Parameters
    ----------
    image : (H, W, 3) uint8 RGB.
    scores : (h, w, K) float32 probabilities, at most as large as ``image``.
    low_image : (h, w, 3) float32 RGB in [0, 1], ``image`` averaged to the size of ``scores``; the
        guided filter follows its colours. None: scores are interpolated bilinearly.
    radius, eps : of the guided filter, radius in pixels of ``scores``; not used without
        ``low_image``.
    device, stream, threads : as in :func:`guided_filter`; the values of arrays on a GPU are not
        checked.

    Returns
    -------
    labels (H, W) int32, arg max of the upsampled scores; confidence (H, W) float32, their maximum
    clipped to [0, 1]. Both are on the GPU if an argument is.

    Raises
    ------
    InputError : shapes that do not fit, another dtype, NaN, scores larger than the picture, an
        option out of range, or on a GPU more than 65535 rows.
    DeviceError : the GPU cannot be used, fails, or its memory is full; or SEG_ISA is wrong.
    MissingBackend : a native module is not built, or there is no CUDA driver or GPU for "cuda".

    Example
    -------
    >>> labels, confidence = runtime.joint_upsample(picture, scores)
    """
    result_on_gpu = on_gpu(image) or on_gpu(scores) or on_gpu(low_image)
    core, where, picture, scores, low_image = _placed(
        device, stream, image=image, scores=scores, low_image=low_image
    )
    picture = check_bytes("image", picture, gpu=bool(where))
    size = picture.shape
    scores = check_planes("scores", scores, gpu=bool(where))
    if scores.shape[0] > size[0] or scores.shape[1] > size[1]:
        raise InputError(f"scores {scores.shape[:2]} are larger than the image {size[:2]}")
    threads = thread_count(threads)
    isa()  # raises if SEG_ISA is wrong
    picture, scores = _moved(core, where, image=picture, scores=scores)
    if low_image is None and where:
        coefficients = core.bilinear_coefficients(scores, **where)
    elif low_image is None:
        coefficients = np.moveaxis(scores[:, :, None, :], 1, -1)  # (h, 1, K, w): constants only
    else:
        low_image = check_image(low_image, "low_image", gpu=bool(where))
        if low_image.shape[:2] != scores.shape[:2]:
            raise InputError(
                f"low_image is {low_image.shape[:2]}; wanted the size of scores {scores.shape[:2]}"
            )
        radius, eps = check_count("radius", radius, 1, 2**20), check_positive("eps", eps)
        coefficients = core.guided_coefficients(low_image, scores, radius, eps, threads, **where)
    if not where:
        picture = np.ascontiguousarray(picture)
    labels, confidence = core.joint_upsample(coefficients, picture, threads, **where)
    return (
        (labels.numpy(), confidence.numpy())
        if where and not result_on_gpu
        else (labels, confidence)
    )
