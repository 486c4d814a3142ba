"""ExportOptions: what an export writes besides the prior itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from export.models import PriorModel
from runtime.core.config import RefineConfig
from runtime.engines.recipe import ENGINES, EngineRecipe
from runtime.errors import InputError

TARGETS = ("onnx", "rtx", "trt")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported besides the prior itself.

    Parameters
    ----------
    targets : some of "onnx", "rtx" (TensorRT for RTX, built ahead of time) and "trt" (TensorRT,
        built on the device).
    refine : the refinement whose step is frozen; the model's own when None, or the default.
    imgsz : (height, width) in pixels of the pictures that the bundle is meant for; the model's own
        when None. Engines are made for this size, refinement engines for ``refine.working_size`` of
        it.
    initial : safetensors file with trained weights of the refinement network.
    half, int8 : precision of the prior; both together are INT8 with the rest in FP16.
    data : pictures to calibrate INT8 with, files or folders.
    fraction : share of ``data`` to calibrate with, above 0, at most 1.
    pictures : pictures to verify with, files or folders. When empty, some pictures of ``data``,
        which are not used to calibrate; the demo photo if ``data`` has fewer than 4.
    dynamic : leave the input size free.
    min_shape, max_shape : least and largest size of engines with a free size, (height, width) in
        pixels.
    opset : version of the ONNX operators, for PyTorch modules; the model's own when None.
    simplify : simplify the graph with onnxslim.
    engines : the graphs that engines are built for, now and by python -m runtime build: "all",
        "prior" or "refine". The ONNX graphs are all in the bundle.
    engine : flags of the engine builder. Its ``shapes`` and ``dynamic`` are ignored, because the
        export sets them from the graphs and from the options above.
    timing_cache : file with the times of kernels, which the builder of "trt" reads and writes.
    device : the number of the GPU to build on.
    min_agreement : least share of labels equal to the original's, above 0, at most 1; the
        precision's own when None.
    allow_one_class : write a bundle although the network finds only one class in each picture.
    command : the command line, for the manifest.

    Raises
    ------
    InputError : values that are out of their range or do not fit together.

    Example
    -------
    >>> ExportOptions(targets=("onnx", "rtx"), half=True).precision
    'fp16'
    """

    targets: tuple[str, ...] = ("onnx",)
    refine: RefineConfig | None = None
    imgsz: tuple[int, int] | None = None
    initial: Path | None = None
    half: bool = False
    int8: bool = False
    data: tuple[Path, ...] = ()
    fraction: float = 1.0
    pictures: tuple[Path, ...] = ()
    dynamic: bool = False
    min_shape: tuple[int, int] | None = None
    max_shape: tuple[int, int] | None = None
    opset: int | None = None
    simplify: bool = True
    engines: str = "all"
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    timing_cache: Path | None = None
    device: int = 0
    min_agreement: float | None = None
    allow_one_class: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets:
            raise InputError(
                f"target is {unknown or 'empty'}; wanted some of {TARGETS}", fix="--target onnx"
            )
        if self.engines not in ENGINES:
            raise InputError(
                f"engines is {self.engines!r}; wanted one of {', '.join(ENGINES)}",
                fix="--engines all, or leave it out",
            )
        _refuse(
            (
                self.int8 and not self.data,
                "int8 needs pictures to calibrate with, like those that it will run on",
                "--data DIR",
            ),
            (
                self.dynamic
                and set(self.targets) != {"onnx"}
                and not (self.min_shape and self.max_shape),
                "dynamic engines need the smallest and the largest size",
                "e.g. --min-shape 256x256 --opt-shape 512x512 --max-shape 1024x1024",
            ),
            (
                self.min_agreement is not None and not 0 < self.min_agreement <= 1,
                f"min-agreement is {self.min_agreement}; wanted above 0, at most 1",
                "--min-agreement 0.99, or leave it out",
            ),
            (
                not 0 < self.fraction <= 1,
                f"fraction is {self.fraction}; wanted above 0, at most 1",
                "--fraction 0.5, or leave it out",
            ),
            # Options without effect. The builder's other options have one with every target,
            # because the recipe stores them for python -m runtime build.
            (
                self.data and not self.int8,
                "data is for int8 only",
                "add --int8, or leave --data out",
            ),
            (
                self.fraction != 1 and not self.int8,
                "fraction is a share of the pictures that calibrate int8",
                "add --int8 --data DIR, or leave --fraction out",
            ),
            (
                (self.min_shape or self.max_shape) and not self.dynamic,
                "min-shape and max-shape are for dynamic shapes",
                "add --dynamic",
            ),
            (
                self.engine.compute_capabilities and "rtx" not in self.targets,
                "compute-capability is for target rtx; trt builds for the GPU it runs on",
                "leave it out, or add --target rtx",
            ),
            (
                self.timing_cache and "trt" not in self.targets,
                "timing-cache is for target trt; TensorRT for RTX and ONNX Runtime time nothing",
                "leave --timing-cache out, or add --target trt",
            ),
            (
                self.device and set(self.targets) == {"onnx"},
                f"device is {self.device}, the GPU that engines are built on; target onnx has none",
                "leave --device out, or add --target rtx or trt",
            ),
        )

    @property
    def precision(self) -> str:
        """The precision of the prior: "fp32", "fp16", "int8" or "int8+fp16"."""
        return {(0, 0): "fp32", (1, 0): "fp16", (0, 1): "int8", (1, 1): "int8+fp16"}[
            (int(self.half), int(self.int8))
        ]


def refinement_of(options: ExportOptions, model: PriorModel) -> RefineConfig:
    """The refinement that is exported: that of the options, or the model's own, or the default one.

    Parameters
    ----------
    options : of the export.
    model : the prior that is exported.

    Raises
    ------
    InputError : the model's refinement network was trained with other settings or weights. Only the
        number of steps may differ.

    Examples
    --------
    >>> refinement_of(ExportOptions(), load_model("kmeans")).steps
    10
    """
    own, asked = model.refine, options.refine
    if own is None:
        return asked or RefineConfig()
    if options.initial is not None:
        raise InputError(
            f"init names weights, and {model.name} has its own, which were trained for it",
            fix="leave --init out, or export the prior of the run with --init",
        )
    for name in () if asked is None else RefineConfig.__dataclass_fields__:
        came, trained = getattr(asked, name), getattr(own, name)
        if came != trained and name != "steps":
            raise InputError(
                f"{name} is {came}, and the refinement network of {model.name} was trained "
                f"with {trained}",
                fix=f"leave the options of the refinement out, except --steps; or train again with "
                f"another {name}",
            )
    return asked or own


def check_use(options: ExportOptions, model: PriorModel) -> None:
    """Check that no option is without effect on this model.

    Parameters
    ----------
    options : of the export.
    model : the prior that is exported.

    Raises
    ------
    InputError : an option has no effect.

    Examples
    --------
    >>> check_use(ExportOptions(opset=17), load_model("kmeans"))
    Traceback (most recent call last):
    runtime.errors.InputError: opset is for PyTorch modules; kmeans has no network...
    """
    network = model.preprocess is not None
    _refuse(
        (
            options.opset is not None and model.module is None,
            "opset is for PyTorch modules; "
            + (f"{model.name} is an ONNX file, which keeps its own" if network else _NO_NETWORK),
            "leave --opset out",
        ),
        (
            options.min_agreement is not None and not network,
            f"min-agreement is for networks; {_NO_NETWORK}",
            "leave --min-agreement out",
        ),
        (
            options.allow_one_class and not network,
            f"allow-one-class is for networks; {_NO_NETWORK}",
            "leave --allow-one-class out",
        ),
        (
            options.engines == "prior" and not network,
            f"engines is 'prior'; {_NO_NETWORK}",
            "leave --engines out, or choose a network with --model",
        ),
    )


_NO_NETWORK = "kmeans has no network"


def _refuse(*cases: tuple[object, str, str]) -> None:
    """InputError for the first of the ``cases`` that is true: (whether it is, message, fix)."""
    for wrong, message, fix in cases:
        if wrong:
            raise InputError(message, fix=fix)
