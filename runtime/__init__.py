"""The runtime without PyTorch: refinement, guided filter, regions, engines."""

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
