"""Segmentation that adapts to each picture: a prior, its refinement, and a guided filter.

Examples
--------
>>> from sdk import Segmenter
>>> labels = Segmenter()("street.jpg").labels
"""

from typing import NoReturn

import runtime

__dist__ = "dynaguide-edge"
if getattr(runtime, "__dist__", None) != __dist__:
    # SdkError cannot be imported: runtime.errors would be a file of the other project.
    raise ImportError(
        f"the package 'runtime' in {getattr(runtime, '__path__', ['?'])[0]} belongs to another "
        "project; uninstall it, or install dynaguide-edge in an environment of its own"
    )

from runtime.core.config import CrfConfig, FilterConfig, RefineConfig
from runtime.errors import (
    BundleError,
    DeviceError,
    EngineMismatch,
    InputError,
    MissingBackend,
    SdkError,
)

try:
    from runtime.prior.masks import MasksPrior
    from sdk.result import FrameInfo, Result, Segment
    from sdk.segmenter import Segmenter
    from sdk.stream_state import StreamState
except MissingBackend as _error:  # OpenCV
    # This import succeeds, so that python -m sdk can print the error and end with its exit code.
    _absence = _error

    def __getattr__(name: str) -> NoReturn:
        """Raise the error at the first use of a name that needs OpenCV."""
        if name in __all__:
            raise _absence
        raise AttributeError(f"module 'sdk' has no attribute {name!r}")


__all__ = [
    "BundleError",
    "CrfConfig",
    "DeviceError",
    "EngineMismatch",
    "FilterConfig",
    "FrameInfo",
    "InputError",
    "MasksPrior",
    "MissingBackend",
    "RefineConfig",
    "Result",
    "SdkError",
    "Segment",
    "Segmenter",
    "StreamState",
]
