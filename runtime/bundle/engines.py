"""Build engines for a bundle's graphs, at the export or on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runtime.bundle.manifest import file_entry
from runtime.bundle.read import Bundle
from runtime.device.driver import cuda_absence, cuda_devices, l4t, platform_tag
from runtime.engines.plan import check_receipt
from runtime.engines.recipe import ENGINES, EngineRecipe
from runtime.engines.tensorrt import load_tensorrt, make, rtx_targets
from runtime.engines.tensorrt_build import build_engine, current_gpu
from runtime.errors import DeviceError, InputError, MissingBackend

RUNTIMES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}  # target -> runtime of the manifest
BACKENDS = ("onnx", *RUNTIMES)  # what can run a bundle's graphs
Progress = Callable[[str, float], None]


def wanted_engines(
    recipes: Mapping[str, EngineRecipe],
    graphs: Mapping[str, bytes],
    target: str,
    *,
    device: int = 0,
) -> list[dict[str, Any]]:
    """The manifest's entries of the engines to build on this machine for ``target``. They lack what
    :func:`build` adds.

    Parameters
    ----------
    recipes : the recipe of each graph's engine.
    graphs : the serialised ONNX of each graph.
    target : "trt" or "rtx".
    device : the GPU's number.

    Returns
    -------
    An entry for each graph. If a bundle lists an engine with the same ``key``, the engine need not
    be built again.

    Raises
    ------
    MissingBackend : TensorRT, or for "trt" a GPU, is missing here.
    DeviceError : a GPU is needed, and its driver fails.
    """
    runtime = RUNTIMES[target]
    version = str(load_tensorrt(runtime).__version__)
    named = runtime == "tensorrt_rtx" and all(
        recipes[graph].compute_capabilities for graph in graphs
    )
    gpus = [] if named else cuda_devices()  # engines for named GPUs do not depend on this machine's
    gpu = gpus[device] if device < len(gpus) else None
    if runtime == "tensorrt" and gpu is None:
        raise MissingBackend(
            f"TensorRT engines are built on the GPU that runs them: {cuda_absence()}",
            fix="copy the bundle to the device that will run it",
        )
    exact = gpu if runtime == "tensorrt" else None
    gpu_name, release = (exact.name, l4t()) if exact else (None, None)
    entries = []
    for graph, data in graphs.items():
        recipe = recipes[graph]
        capabilities = recipe.compute_capabilities if runtime == "tensorrt_rtx" else ()
        if gpu is not None and not capabilities:
            capabilities = (gpu.compute_capability,)
        recipe = replace(recipe, compute_capabilities=capabilities)
        key = recipe.key(data, runtime=runtime, version=version, gpu_name=gpu_name, l4t=release)
        entries.append(
            {
                "key": key,
                "graph": graph,
                "file": f"engines/{key}.engine",
                "runtime": runtime,
                "version": version,
                "compute_capabilities": list(capabilities),
                "gpu_name": gpu_name,
                "l4t": release,
                "platform": platform_tag(),
                "shapes": recipe.shapes_entry(),
                "flags": recipe.flags(),
            }
        )
    return entries


def check_targets(
    targets: Sequence[str],
    capabilities: Sequence[str],
    graphs: Collection[str] = (),
    precision: str = "fp32",
) -> None:
    """Check that "rtx" has GPUs to build for, and can build the graphs for them.

    Parameters
    ----------
    targets : of the export.
    capabilities : the compute capabilities that were asked for; empty for those of this machine's
        GPU.
    graphs : the names of the graphs that engines are built for.
    precision : of the prior's graph, as the manifest names it.

    Raises
    ------
    InputError : there are none, or TensorRT for RTX cannot build for one of them. It cannot build
        the graphs of the refinement for Turing (7.5).
    DeviceError : the GPU's driver fails.
    """
    if "rtx" not in targets:
        return
    gpus = [] if capabilities else cuda_devices()
    try:
        rtx_targets(capabilities, next(iter(gpus), None))
    except MissingBackend:
        pass  # building engines reports it, after the bundle has been written
    if "7.5" in (capabilities or [gpu.compute_capability for gpu in gpus[:1]]) and (
        set(graphs) & set(ENGINES["refine"])
    ):
        raise InputError(
            "TensorRT for RTX has no FP32 matrix products for Turing (compute capability 7.5), and "
            "the refinement computes in FP32",
            fix=_turing_fix(graphs, precision, others=bool({*capabilities} - {"7.5"})),
        )


def _turing_fix(graphs: Collection[str], precision: str, *, others: bool) -> str:
    """How to do without engines of the refinement on Turing. ``others`` says whether engines are
    built for other GPUs, too."""
    fix = "export with --target onnx"
    if "prior" in graphs:
        half = "--half, without --int8" if "int8" in precision else "--half"
        fix = "export with --engines prior"
        fix += "" if precision == "fp16" else f" and an FP16 network ({half})"
    fix += "; refine_backend='native' (the default) refines without an engine"
    return fix + ("; or leave 7.5 out of --compute-capability" if others else "")


def check_device(targets: Sequence[str], device: int) -> None:
    """Check that the GPU to build on exists.

    Parameters
    ----------
    targets : "trt" and "rtx" build engines; others are ignored.
    device : the GPU's number. 0 is accepted without a GPU, too: TensorRT for RTX needs none, and
        :func:`wanted_engines` reports it for TensorRT.

    Raises
    ------
    InputError : another number than those of this machine's GPUs.
    """
    if not set(targets) & set(RUNTIMES):
        return
    try:
        count = len(cuda_devices())
    except DeviceError:  # wanted_engines reports this error if a target needs a GPU
        return
    if device >= max(count, 1):
        raise InputError(
            f"device is {device}; "
            + (f"wanted 0 to {count - 1}" if count else f"no GPU: {cuda_absence()}"),
            fix="python -m runtime doctor   (lists the GPUs of this machine)",
        )


def check_start(entries: Sequence[Mapping[str, Any]], device: int = 0) -> None:
    """Check that the library that builds some engines starts, before it builds the first of them.

    Parameters
    ----------
    entries : from :func:`wanted_engines`.
    device : the number of the GPU to build on, which exists or is 0.

    Raises
    ------
    MissingBackend : the library, or PyCUDA for a device other than 0, is not installed.
    DeviceError : the library cannot start, for example because the driver is too old for it.
    """
    for runtime in {entry["runtime"] for entry in entries}:
        trt = load_tensorrt(runtime)
        with current_gpu(device):
            make(trt, "Builder")


def build(
    entry: Mapping[str, Any],
    data: bytes,
    precision: str,
    *,
    device: int = 0,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], bytes, bytes | None]:
    """Build one engine.

    Parameters
    ----------
    entry : from :func:`wanted_engines`.
    data : the serialised ONNX of its graph.
    precision : of the graph, from its entry in the manifest; the engine must compute in it.
    device : the GPU's number.
    timing_cache : times of an earlier build; None or b"" for none. Only TensorRT takes them, so it
        must be None for TensorRT for RTX.
    progress : called as progress(phase, fraction done, 0 to 1).

    Returns
    -------
    The complete entry, the plan, and the timing cache after the build; None for TensorRT for RTX.

    Raises
    ------
    VerificationFailed : the engine computes in another precision. Also what
        :func:`runtime.engines.tensorrt_build.build_engine` raises.
    """
    built = build_engine(
        data,
        EngineRecipe.from_entry(entry),
        runtime=entry["runtime"],
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
        "inputs": [port.entry() for port in built.inputs],
        "outputs": [port.entry() for port in built.outputs],
    }
    return whole, built.plan, built.timing_cache


def graph_bytes(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every graph of a bundle, each checked against its hash.

    Raises
    ------
    BundleError : a file is missing or damaged.
    """
    for name in bundle.manifest["graphs"]:
        yield name, bundle.graph(name)
