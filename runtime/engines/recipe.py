"""EngineRecipe: all settings that decide how an engine is built, and how a bundle stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from runtime.checks import check_count
from runtime.engines.named_files import shell_word
from runtime.engines.plan import engine_key
from runtime.engines.port import Shapes
from runtime.errors import BundleError

ENGINES = {  # value of --engines -> the graphs that engines are built for
    "all": ("prior", "refine_step", "refine_map", "cnn"),
    "prior": ("prior",),
    "refine": ("refine_step", "refine_map", "cnn"),
}
_ALWAYS = ("workspace", "level", "dynamic")  # flags that a bundle stores even if they are defaults


@dataclass(frozen=True, kw_only=True)
class EngineRecipe:
    """What decides how an engine is built from an ONNX file, apart from the library and the device.

    To add a flag of the builder, add a field here, a line in ``tensorrt_build`` and an option of a
    command line. A bundle stores a new flag only if it differs from its default, so that the keys
    of existing engines do not change.

    Parameters
    ----------
    shapes : (least, usual, largest) shape for each input that has free dimensions. Where the three
        are equal, the engine is made for that shape alone.
    compute_capabilities : for "tensorrt_rtx", the GPUs to build for, e.g. ("8.6", "8.9"); empty:
        the GPU of the machine that builds. "tensorrt" builds for that GPU only.
    workspace : most scratch memory of a layer, in bytes. None: a quarter of the GPU's free memory,
        at most 2 GiB; without a GPU, the builder's own default. With a GPU, it is cut to the free
        memory.
    level : the builder's effort, 0 to 5; None: its default.
    dynamic : whether the picture's size is free, within the shapes.
    tf32 : let FP32 products round their inputs to 10 bits of mantissa.

    Raises
    ------
    InputError : a number that is out of its range.
    """

    shapes: Shapes = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    dynamic: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.workspace is not None:
            check_count("workspace (bytes)", self.workspace, 2**20, 2**50)
        if self.level is not None:
            check_count("level", self.level, 0, 5)

    def flags(self) -> dict[str, Any]:
        """The flags as a bundle stores them, by name. The key of an engine depends on them."""
        values = {flag: (getattr(self, flag), default) for flag, default in _FLAGS.items()}
        return {
            flag: value
            for flag, (value, default) in values.items()
            if flag in _ALWAYS or value != default
        }

    def shapes_entry(self) -> dict[str, list[list[int]]]:
        """The shapes as a bundle stores them: by input, the least, the usual and the largest
        shape."""
        return {name: [list(shape) for shape in three] for name, three in self.shapes.items()}

    def key(
        self, onnx: bytes, *, runtime: str, version: str, gpu_name: str | None, l4t: str | None
    ) -> str:
        """The key of the engine that this recipe makes of a model.

        Parameters
        ----------
        onnx : the serialised model.
        runtime : "tensorrt" or "tensorrt_rtx".
        version : the version of that runtime, for example "10.3.0".
        gpu_name, l4t : name of the GPU and release of its Jetson Linux; None where the engine does
            not depend on them.

        Returns
        -------
        16 hexadecimal digits.
        """
        return engine_key(
            onnx,
            {**self.flags(), "shapes": self.shapes_entry()},
            runtime=runtime,
            version=version,
            compute_capabilities=self.compute_capabilities,
            gpu_name=gpu_name,
            l4t=l4t,
        )

    def trtexec(self, onnx: str, engine: str, precision: str) -> str:
        """The command by which NVIDIA's program trtexec builds an engine as this recipe does.

        Parameters
        ----------
        onnx : the path of the ONNX file.
        engine : the path of the engine to write.
        precision : of the graph, as the manifest names it. TensorRT 10 needs --stronglyTyped for
            precisions below FP32; TensorRT 11 accepts it.

        Examples
        --------
        >>> EngineRecipe(shapes={"x": ((1, 3), (1, 3), (1, 3))}).trtexec("a.onnx", "a.plan", "fp16")
        'trtexec --onnx=a.onnx --saveEngine=a.plan --optShapes=x:1x3 --noTF32 --stronglyTyped'
        """
        words = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}"]
        fixed = all(low == high for low, _, high in self.shapes.values())
        for i, end in enumerate(("min", "opt", "max")):
            if self.shapes and (end == "opt" or not fixed):  # opt alone stands for all three
                shapes = (
                    f"{_trtexec_name(name)}:{'x'.join(map(str, three[i]))}"
                    for name, three in self.shapes.items()
                )
                words.append(f"--{end}Shapes={','.join(shapes)}")
        words += [] if self.tf32 else ["--noTF32"]
        words += [] if precision == "fp32" else ["--stronglyTyped"]
        if self.workspace is not None:
            words.append(f"--memPoolSize=workspace:{self.workspace // 2**20}")
        if self.level is not None:
            words.append(f"--builderOptimizationLevel={self.level}")
        return " ".join(map(shell_word, words))

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> EngineRecipe:
        """The recipe in an engine's entry that :func:`runtime.bundle.engines.wanted_engines` made.
        Its form is not checked again."""
        return cls(
            shapes=_shapes(entry["shapes"]),
            compute_capabilities=tuple(entry["compute_capabilities"]),
            **entry["flags"],
        )

    def to_manifest(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the manifest's ``recipe`` that is about engines.

        Parameters
        ----------
        shapes : for each graph, its shapes as :meth:`shapes_entry` returns them.

        Returns
        -------
        The manifest's ``recipe`` without "command" and "targets".
        """
        capabilities = list(self.compute_capabilities)
        return {"compute_capabilities": capabilities, **self.flags(), "shapes": dict(shapes)}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> dict[str, EngineRecipe]:
        """Read the recipe of each graph's engine.

        Parameters
        ----------
        manifest : a manifest whose form was checked.

        Returns
        -------
        A recipe for each name of a graph.

        Raises
        ------
        BundleError : the manifest does not say how to build engines.
        InputError : a number is out of its range.
        """
        recipe = manifest["recipe"]
        flags = {flag: recipe.get(flag, _UNSAID) for flag in _FLAGS}
        shapes = recipe.get("shapes")
        fits = (
            isinstance(shapes, dict)
            and all(_are_shapes(shapes.get(graph)) for graph in manifest["graphs"])
            and all(_is_flag(flag, value) for flag, value in flags.items())
            and all(_are_texts(recipe.get(name)) for name in ("targets", "compute_capabilities"))
        )
        if not fits:
            raise BundleError(
                "the bundle's recipe does not say how to build its engines",
                fix="export the bundle again",
            )
        common = cls(
            compute_capabilities=tuple(recipe["compute_capabilities"]),
            **{flag: value for flag, value in flags.items() if value is not _UNSAID},
        )
        return {
            graph: replace(common, shapes=_shapes(shapes[graph])) for graph in manifest["graphs"]
        }


def engine_graphs(manifest: Mapping[str, Any]) -> list[str]:
    """The graphs of a bundle that engines are built for, in the manifest's order.

    Parameters
    ----------
    manifest : a manifest whose form was checked. Its recipe contains "engines" only if the export
        did not choose "all".

    Raises
    ------
    BundleError : the manifest's choice of engines is unknown.

    Examples
    --------
    >>> engine_graphs(Bundle.open("city.bundle").manifest)  # exported with --engines prior
    ['prior']
    """
    chosen = manifest["recipe"].get("engines", "all")
    if not isinstance(chosen, str) or chosen not in ENGINES:
        raise BundleError(
            f"the bundle's recipe names the engines {str(chosen)[:80]!r}; wanted one of "
            f"{', '.join(ENGINES)}",
            fix="export the bundle again",
        )
    return [graph for graph in manifest["graphs"] if graph in ENGINES[chosen]]


_UNSAID = object()  # the value of a flag that the manifest does not contain
_FLAGS = {  # name -> default
    flag.name: flag.default
    for flag in fields(EngineRecipe)
    if flag.name not in ("shapes", "compute_capabilities")
}


def _trtexec_name(name: str) -> str:
    """The name of an input for trtexec, which needs quotes around its own separators."""
    return f"'{name}'" if set(name) & set(":,") else name


def _is_flag(name: str, value: Any) -> bool:
    """Whether the manifest's value of a flag has the flag's type."""
    if value is _UNSAID:
        return name not in _ALWAYS
    if isinstance(_FLAGS[name], bool):
        return isinstance(value, bool)
    return value is None or _is_count(value)


def _is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 to 2^50 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**50


def _are_texts(value: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_shapes(value: Any) -> bool:
    """Whether it is {input: [least, usual, largest]}, three shapes of the same rank for each
    input."""
    return isinstance(value, dict) and all(
        isinstance(three, list)
        and len(three) == 3
        and all(isinstance(s, list) and s and all(map(_is_count, s)) for s in three)
        and len({len(s) for s in three}) == 1
        for three in value.values()
    )


def _shapes(entry: Mapping[str, Any]) -> Shapes:
    """The inverse of :meth:`EngineRecipe.shapes_entry`."""
    made: Any = {name: tuple(map(tuple, three)) for name, three in entry.items()}
    return made
