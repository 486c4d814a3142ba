"""The runtime without PyTorch: refinement, guided filter, regions, engines.

The public functions are loaded when they are first used, so that importing one module of the
runtime loads no other that it does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.core.classes import majority_classes
    from runtime.core.guided_filter import guided_filter, lift
    from runtime.core.options import RefineOptions
    from runtime.core.refiner import Refinement, Refiner, refine
    from runtime.core.regions import connected_regions
    from runtime.device.choose import devices, target, targets
    from runtime.engines.onnx import OnnxEngine, load_engine

__dist__ = "dynaguide-edge"
__version__ = "0.1.0"
__all__ = [
    "OnnxEngine",
    "RefineOptions",
    "Refinement",
    "Refiner",
    "connected_regions",
    "devices",
    "guided_filter",
    "lift",
    "load_engine",
    "majority_classes",
    "refine",
    "target",
    "targets",
]
_HOMES = {
    "OnnxEngine": "runtime.engines.onnx",
    "RefineOptions": "runtime.core.options",
    "Refinement": "runtime.core.refiner",
    "Refiner": "runtime.core.refiner",
    "connected_regions": "runtime.core.regions",
    "devices": "runtime.device.choose",
    "guided_filter": "runtime.core.guided_filter",
    "lift": "runtime.core.guided_filter",
    "load_engine": "runtime.engines.onnx",
    "majority_classes": "runtime.core.classes",
    "refine": "runtime.core.refiner",
    "target": "runtime.device.choose",
    "targets": "runtime.device.choose",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module at its first use, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
