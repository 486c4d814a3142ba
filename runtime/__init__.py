"""The runtime without PyTorch: refinement, guided filter, regions, engines."""

from runtime.backend import devices, target, targets
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
__all__ = [
    "RefineOptions",
    "Refinement",
    "Refiner",
    "connected_regions",
    "devices",
    "guided_filter",
    "lift",
    "majority_classes",
    "refine",
    "target",
    "targets",
]
