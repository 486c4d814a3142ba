"""Engines for a bundle's graphs: built by the exporter, or finished on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime.bundle.manifest import file_entry, ports_entry
from runtime.bundle.read import Bundle
from runtime.device.driver import cuda_absence, cuda_devices, l4t, platform_tag
from runtime.engines.plan import check_receipt, engine_key
from runtime.engines.tensorrt import load_tensorrt, supported_compute_capabilities
from runtime.engines.tensorrt_build import build_engine
from runtime.errors import BundleError, InputError, MissingBackend

RUNTIMES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}  # target -> runtime
BACKENDS = ("onnx", *RUNTIMES)  # what can run a bundle's graphs
Progress = Callable[[str, float], None]


def wanted_engines(
    manifest: Mapping[str, Any], graphs: Mapping[str, bytes], target: str, *, device: int = 0
) -> list[dict[str, Any]]:
    """What has to be built for ``target`` ("trt" or "rtx") here: an entry without its file for each
    graph, whose ``key`` says whether the bundle has it already.

    Raises
    ------
    MissingBackend : TensorRT, or for "trt" a GPU, is not here.
    """
    runtime, recipe = RUNTIMES[target], manifest["recipe"]
    version = str(load_tensorrt(runtime).__version__)
    gpus = cuda_devices()
    gpu = gpus[device] if device < len(gpus) else None
    if runtime == "tensorrt" and gpu is None:
        raise MissingBackend(
            f"TensorRT engines are built on the GPU that runs them: {cuda_absence()}",
            fix="copy the bundle to the device that will run it",
        )
    capabilities = list(recipe["compute_capabilities"]) if runtime == "tensorrt_rtx" else []
    if gpu is not None and not capabilities:
        capabilities = [gpu.compute_capability]
    exact = gpu if runtime == "tensorrt" else None
    flags = {name: recipe[name] for name in ("workspace", "level", "dynamic")}
    entries = []
    for graph, data in graphs.items():
        shapes = recipe["shapes"][graph]
        key = engine_key(
            data,
            {**flags, "shapes": shapes},
            runtime=runtime,
            version=version,
            compute_capabilities=capabilities,
            gpu_name=exact.name if exact else None,
            l4t=l4t() if exact else None,
        )
        entries.append(
            {
                "key": key,
                "graph": graph,
                "file": f"engines/{key}.engine",
                "runtime": runtime,
                "version": version,
                "compute_capabilities": capabilities,
                "gpu_name": exact.name if exact else None,
                "l4t": l4t() if exact else None,
                "platform": platform_tag(),
                "shapes": shapes,
                "flags": flags,
            }
        )
    return entries


def check_targets(targets: Sequence[str], capabilities: Sequence[str]) -> None:
    """InputError when "rtx" has no GPU to build for, or one that it cannot build for."""
    if "rtx" not in targets:
        return
    if not capabilities and not cuda_devices():
        raise InputError(
            "target rtx needs to know the GPUs to build for, and there is none here to ask",
            fix="e.g. --compute-capability 8.6,8.9,12.0",
        )
    try:
        known = supported_compute_capabilities()
    except MissingBackend:
        return  # said where engines are built, after the bundle is safe
    strange = [c for c in capabilities if c not in known]
    if strange:
        raise InputError(
            f"TensorRT for RTX cannot build for compute capability {', '.join(strange)}; "
            f"it knows {', '.join(known)}",
            fix="Orin (8.7), Thor and Hopper (9.0) need --target trt and a build on the device",
        )


def build(
    entry: Mapping[str, Any],
    data: bytes,
    precision: str,
    *,
    device: int = 0,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], bytes, bytes | None]:
    """Build what :func:`wanted_engines` asked for: the whole entry, the plan, the timing cache.

    Raises
    ------
    VerificationFailed : the engine computes in another precision than ``precision``.
    And what :func:`runtime.engines.tensorrt_build.build_engine` raises.
    """
    shapes: Any = {name: tuple(map(tuple, three)) for name, three in entry["shapes"].items()}
    capabilities = entry["compute_capabilities"] if entry["runtime"] == "tensorrt_rtx" else ()
    built = build_engine(
        data,
        runtime=entry["runtime"],
        shapes=shapes,
        compute_capabilities=capabilities,
        workspace=entry["flags"]["workspace"],
        level=entry["flags"]["level"],
        timing_cache=timing_cache,
        device=device,
        progress=progress,
    )
    check_receipt(built.receipt, precision.split("+")[0])
    whole = {
        **entry,
        **file_entry(entry["file"], built.plan),
        "receipt": built.receipt,
        "seconds": round(built.seconds, 3),
        "inputs": ports_entry(built.inputs),
        "outputs": ports_entry(built.outputs),
    }
    return whole, built.plan, built.timing_cache


def graph_bytes(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """Every graph of a bundle, checked against its hash."""
    for name in bundle.manifest["graphs"]:
        yield name, bundle.graph(name)


def check_recipe(manifest: Mapping[str, Any]) -> None:
    """BundleError unless the recipe says what building engines needs."""
    recipe = manifest["recipe"]
    shapes = recipe.get("shapes")
    fits = (
        isinstance(shapes, dict)
        and all(_are_shapes(shapes.get(graph)) for graph in manifest["graphs"])
        and _is_count(recipe.get("workspace"), none=True)
        and _is_count(recipe.get("level"), none=True)
        and isinstance(recipe.get("dynamic"), bool)
        and all(_are_texts(recipe.get(name)) for name in ("targets", "compute_capabilities"))
    )
    if not fits:
        raise BundleError(
            "the bundle's recipe does not say how to build its engines",
            fix="export the bundle again",
        )


def _is_count(value: Any, *, none: bool = False) -> bool:
    if value is None:
        return none
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**50


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_shapes(value: Any) -> bool:
    """{input: [least, usual, largest]}, each a shape of the same rank."""
    return isinstance(value, dict) and all(
        isinstance(three, list)
        and len(three) == 3
        and all(isinstance(s, list) and s and all(map(_is_count, s)) for s in three)
        and len({len(s) for s in three}) == 1
        for three in value.values()
    )
