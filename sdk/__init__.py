"""Segmentation that adapts to each picture: a prior, its refinement, and a guided filter.

Examples
--------
>>> from sdk import Segmenter
>>> labels = Segmenter()("street.jpg").labels
"""

import runtime

__dist__ = "dynaguide-edge"
if getattr(runtime, "__dist__", None) != __dist__:
    # SdkError cannot be imported: runtime.errors would be a file of the other project.
    raise ImportError(
        f"the package 'runtime' in {getattr(runtime, '__path__', ['?'])[0]} belongs to another "
        "project; uninstall it, or install dynaguide-edge in an environment of its own"
    )

try:
    import cv2  # noqa: F401
except ImportError as error:  # OpenCV's wheel needs system libraries that small machines lack.
    from runtime.errors import MissingBackend

    raise MissingBackend(
        f"OpenCV cannot be loaded ({error})",
        fix="apt-get install libgl1 libglib2.0-0, or pip install opencv-python",
    ) from error

from runtime.core.config import FilterConfig, RefineConfig
from runtime.errors import (
    BundleError,
    DeviceError,
    EngineMismatch,
    InputError,
    MissingBackend,
    SdkError,
)
from sdk.result import FrameInfo, Result, Segment
from sdk.segmenter import Segmenter
from sdk.stream_state import StreamState

__all__ = [
    "BundleError",
    "DeviceError",
    "EngineMismatch",
    "FilterConfig",
    "FrameInfo",
    "InputError",
    "MissingBackend",
    "RefineConfig",
    "Result",
    "SdkError",
    "Segment",
    "Segmenter",
    "StreamState",
]
