"""The runtime without PyTorch: refinement, guided filter, regions, engines.

A public name is loaded from its module at its first use, so that the import of one module does not
load modules that it does not need.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.core.classes import majority_classes
    from runtime.core.dense_crf import dense_crf
    from runtime.core.guided_filter import guided_filter, joint_upsample
    from runtime.core.options import RefineOptions
    from runtime.core.refiner import Refinement, Refiner, refine
    from runtime.core.regions import connected_regions
    from runtime.device.choose import devices, isa, isas
    from runtime.engines.onnx import OnnxEngine, load_engine

__dist__ = "dynaguide-edge"
__version__ = "0.1.0"
__all__ = [
    "OnnxEngine",
    "RefineOptions",
    "Refinement",
    "Refiner",
    "connected_regions",
    "dense_crf",
    "devices",
    "guided_filter",
    "isa",
    "isas",
    "joint_upsample",
    "load_engine",
    "majority_classes",
    "refine",
]
_MODULE_OF = {  # the module of each public name
    "OnnxEngine": "runtime.engines.onnx",
    "RefineOptions": "runtime.core.options",
    "Refinement": "runtime.core.refiner",
    "Refiner": "runtime.core.refiner",
    "connected_regions": "runtime.core.regions",
    "dense_crf": "runtime.core.dense_crf",
    "devices": "runtime.device.choose",
    "guided_filter": "runtime.core.guided_filter",
    "isa": "runtime.device.choose",
    "isas": "runtime.device.choose",
    "joint_upsample": "runtime.core.guided_filter",
    "load_engine": "runtime.engines.onnx",
    "majority_classes": "runtime.core.classes",
    "refine": "runtime.core.refiner",
}
_RENAMED = {"lift": "joint_upsample", "target": "isa", "targets": "isas"}  # old name: new name


def __getattr__(name: str) -> Any:
    """Load a public name from its module at its first use, and store it here. The old name of a
    renamed function works for one more release, with a DeprecationWarning."""
    if name in _RENAMED:
        new = _RENAMED[name]
        message = f"runtime.{name} is now runtime.{new}; the next release has no runtime.{name}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
