"""The runtime without PyTorch: refinement, guided filter, regions, engines."""

from runtime.device.choose import devices, target, targets
from runtime.engine import OnnxEngine, load_engine
from runtime.ops import (
    Refinement,
    Refiner,
    connected_regions,
    guided_filter,
    lift,
    majority_classes,
    refine,
)
from runtime.options import RefineOptions

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
