"""Load what a bundle runs: its prior, its refinement graphs, and the engines for this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from runtime.bundle import golden
from runtime.bundle.engines import BACKENDS, RUNTIMES
from runtime.bundle.read import Bundle
from runtime.core import parameters
from runtime.core.config import RefineConfig
from runtime.core.options import RefineOptions
from runtime.core.refiner import Make, Refiner, maker
from runtime.device.driver import cuda_devices, cuda_problem, l4t, parse_device
from runtime.engines.graph_refiner import GraphRefiner
from runtime.engines.named_files import shell_word
from runtime.engines.onnx import OnnxEngine
from runtime.engines.port import onnx_dtype
from runtime.engines.recipe import engine_graphs
from runtime.errors import BundleError, EngineMismatch, InputError
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior


class Loaded(NamedTuple):
    """A graph of a bundle that was loaded on a backend.

    Parameters
    ----------
    engine : the OnnxEngine or TensorRTEngine.
    text : its backend and precision in words, for example "onnxruntime-cpu fp32".
    key : the ``key`` of the engine in the manifest; None for ONNX Runtime.
    """

    engine: Any
    text: str
    key: str | None


def open_graph(
    bundle: Bundle, graph: str, *, backend: str, device: str = "cpu", threads: int | None = None
) -> Loaded:
    """Load a graph of the bundle on a backend.

    Parameters
    ----------
    bundle : the bundle.
    graph : "prior", "refine_step", "refine_map" or "cnn".
    backend : "onnx" (ONNX Runtime), or "trt" or "rtx" (the bundle's engine for this GPU).
    device : "cpu", "cuda" or "cuda:N". Engines need a GPU.
    threads : for ONNX Runtime on the CPU; all processors when None.

    Raises
    ------
    InputError : another backend, an engine on the CPU, or a GPU that this machine does not have.
    MissingBackend : no GPU, or a package that is not installed.
    EngineMismatch : the bundle has no engine of this graph for this device.
    BundleError : no such graph, a damaged file, a recipe that names unknown engines, or inputs and
        outputs that differ from the manifest's.
    DeviceError : the device has too little memory, or fails.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"backend is {backend!r}; wanted one of {BACKENDS}", fix="backend='onnx' runs anywhere"
        )
    entry = bundle.manifest["graphs"].get(graph)
    precision = entry["precision"] if entry else ""
    if backend == "onnx":
        engine: Any = OnnxEngine(
            bundle.graph(graph),
            name=f"{bundle.name}/{graph}.onnx",
            threads=threads,
            device=device,
            spin=graph != "prior",  # without pause between the steps of a refinement
        )
        bundle.check_ports(graph, engine.inputs, engine.outputs)
        return Loaded(engine, f"{engine.backend} {precision}", None)
    kind, index = parse_device(device)
    if kind != "cuda":
        raise InputError(f"backend {backend!r} runs on a GPU; device is {device!r}",
                         fix="device='cuda', or backend='onnx'")  # fmt: skip
    found = fitting_engine(bundle, graph, backend, index)
    from runtime.engines.tensorrt_engine import TensorRTEngine

    engine = TensorRTEngine(
        bundle.read(found),
        runtime=found["runtime"],
        name=f"{bundle.name}/{graph}.{found['key']}",
        device=index,
        version=found["version"],
        compute_capabilities=found["compute_capabilities"],
    )
    for which in ("inputs", "outputs"):
        came = {(p.name, p.dtype) for p in getattr(engine, which)}
        wanted = {(p["name"], onnx_dtype(p["dtype"])) for p in found[which]}
        if came != wanted:
            raise BundleError(
                f"{engine.name} has {which} {sorted(came)}, the manifest says {sorted(wanted)}",
                fix="python -m runtime build --force BUNDLE",
            )
    return Loaded(engine, f"{found['runtime']}-{found['version']} {precision}", found["key"])


def fitting_engine(bundle: Bundle, graph: str, backend: str, index: int) -> Mapping[str, Any]:
    """The manifest's entry of the newest engine of a graph that fits GPU ``index``.

    Raises
    ------
    MissingBackend : no GPU.
    DeviceError : the GPU's driver fails.
    InputError : a GPU that this machine does not have.
    EngineMismatch : no engine fits; the message lists the engines that the bundle has.
    BundleError : no engine fits, and the bundle's recipe names unknown engines.
    """
    problem = cuda_problem()
    if problem is not None:
        raise problem
    gpus = cuda_devices()
    if index >= len(gpus):
        raise InputError(
            f"device is cuda:{index}; this machine has {len(gpus)} GPUs", fix="see: nvidia-smi -L"
        )
    gpu, has = gpus[index], []
    for entry in reversed(bundle.manifest["engines"]):  # the newest engine is the last
        if entry["graph"] != graph or entry["runtime"] != RUNTIMES[backend]:
            continue
        exact = entry["gpu_name"] in (None, gpu.name) and entry["l4t"] in (None, l4t())
        if exact and gpu.compute_capability in entry["compute_capabilities"]:
            return entry
        name = entry["gpu_name"] or "compute capability"
        has.append(f"{name} {','.join(entry['compute_capabilities'])}")
    fix = f"python -m runtime build --target {backend} {shell_word(str(bundle.path))}"
    if graph not in engine_graphs(bundle.manifest):
        other = "backend='onnx'" if graph == "prior" else "refine_backend='native'"
        fix = f"{other}; or export the bundle again with --engines all"
    raise EngineMismatch(
        f"{bundle.name} has no {backend} engine of {graph} for {gpu.name} "
        f"({gpu.compute_capability}); it has {'; '.join(has) or 'none'}",
        fix=fix,
    )


def open_prior(
    bundle: Bundle, *, backend: str = "onnx", device: str = "cpu", threads: int | None = None
) -> tuple[KMeansPrior | NetworkPrior, Loaded | None]:
    """Load the bundle's prior.

    Parameters
    ----------
    bundle : the bundle.
    backend, device, threads : as for :func:`open_graph`.

    Returns
    -------
    The prior, and its loaded graph; None instead of the graph for k-means.

    Raises
    ------
    InputError : another backend than "onnx" for k-means. Also what :func:`open_graph` raises.
    """
    entry = bundle.manifest["prior"]
    if entry["kind"] == "kmeans":
        if backend != "onnx":
            raise InputError(
                f"backend is {backend!r}; {bundle.name} has no network to run there",
                fix="backend='onnx'",
            )
        return KMeansPrior(entry["clusters"], entry["temperature"]), None
    loaded = open_graph(bundle, "prior", backend=backend, device=device, threads=threads)
    preprocess = bundle.preprocess()
    assert preprocess is not None  # parse_manifest checked that a network has one
    prior = NetworkPrior(
        loaded.engine,
        preprocess,
        names=bundle.names,
        output=entry["output"],
        name=f"{bundle.name}/prior",
    )
    prior.backend = loaded.text
    return prior, loaded


class BundleRefinement(NamedTuple):
    """How pictures are refined with a bundle.

    Parameters
    ----------
    make : called as make(config), returns the argument ``make`` of
        :func:`runtime.core.refiner.refine_with`.
    text : backend and precision of the step in words; None for the native module.
    engines : the engines of the step and of the map; empty for the native module.
    size : (height, width) in pixels if the step's graph or engine fixes the working size, else
        None.
    """

    make: Any
    text: str | None
    engines: tuple[Any, ...]
    size: tuple[int, int] | None


def open_refinement(
    bundle: Bundle,
    *,
    backend: str = "native",
    device: str = "cpu",
    threads: int | None = None,
    new: Callable[[RefineConfig, int, int, int | None], Refiner] | None = None,
) -> BundleRefinement:
    """Load the refinement of a bundle.

    Parameters
    ----------
    bundle : the bundle.
    backend : "native" for the device's own module; or the backend that runs the bundle's graphs, as
        for :func:`open_graph`.
    device, threads : as for :func:`open_graph`.
    new : called as new(config, height, width, classes), returns a native refiner in any state.
        None: a new refiner is made for each picture.

    Raises
    ------
    BundleError : the bundle's weights are damaged. Also what :func:`open_graph` raises.
    """
    trained, own = trained_state(bundle), bundle.refine()

    def starting_trained(create: Any, config: RefineConfig) -> Make:
        """The argument ``make`` of ``refine_with``. Its refiners start from the trained weights if
        ``config`` describes the network of the bundle."""
        return maker(create, config, trained if _same_network(config, own) else None)

    if backend == "native":

        def native(config: RefineConfig) -> Make:
            def create(height: int, width: int, count: int | None) -> Refiner:
                if new is not None:
                    return new(config, height, width, count)
                options = config.options()
                return Refiner(
                    height, width, classes=count, device=device, threads=threads, **options
                )

            return starting_trained(create, config)

        return BundleRefinement(native, None, (), None)

    step, final = (
        open_graph(bundle, name, backend=backend, device=device, threads=threads)
        for name in ("refine_step", "refine_map")
    )

    def graphs(config: RefineConfig) -> Make:
        def create(height: int, width: int, count: int | None) -> GraphRefiner:
            # The graphs depend on these options alone, not on the working size.
            options = RefineOptions(**config.options())
            return GraphRefiner(
                step.engine, final.engine, options, height=height, width=width, classes=count
            )

        return starting_trained(create, config)

    shape = next(p.shape for p in step.engine.inputs if p.name == "image")[2:]
    height, width = shape
    fixed = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    return BundleRefinement(graphs, step.text, (step.engine, final.engine), fixed)


def trained_state(bundle: Bundle) -> parameters.State | None:
    """The weights that were trained before the export; None where the seed makes them.

    Raises
    ------
    BundleError : the file is damaged, or its weights are those of another network.
    """
    if "cnn" not in bundle.manifest["graphs"]:
        return None
    state = bundle.tensors(bundle.manifest["init"])
    rows = state["conv3.bias"].size if "conv3.bias" in state else 1
    try:
        parameters.flatten(bundle.refine(), rows, state)  # names and shapes
    except InputError as error:
        raise BundleError(
            f"{bundle.name}/init.safetensors: {error}", fix="export the bundle again"
        ) from error
    return state


def starts_trained(bundle: Bundle, config: RefineConfig) -> bool:
    """Whether a refinement by ``config`` starts from the bundle's trained weights."""
    return "cnn" in bundle.manifest["graphs"] and _same_network(config, bundle.refine())


def self_test(
    bundle: Bundle, prior: Any, refinement: BundleRefinement, *, when: str, run_by: tuple[str, ...]
) -> dict[str, float] | None:
    """Compare the outputs on this machine with the golden vectors.

    Parameters
    ----------
    bundle : the bundle.
    prior, refinement : of the bundle, on the backends that are tested.
    when : "always"; "once": only if the test has not been passed yet with this bundle and
        ``run_by`` on this machine; or "never".
    run_by : names of the backends.

    Returns
    -------
    What :func:`runtime.bundle.golden.compare` measured for the last golden picture; None when
    nothing was run.

    Raises
    ------
    BundleError : the outputs differ from the golden ones.
    InputError : another value of ``when``.
    """
    if when not in ("once", "always", "never"):
        raise InputError(
            f"self_test is {when!r}; wanted 'once', 'always' or 'never'", fix="self_test='once'"
        )
    if when == "never" or (when == "once" and golden.was_passed(bundle, *run_by)):
        return None
    config, result = bundle.refine(), {}
    for entry in bundle.manifest["golden"]:
        result = golden.compare(
            bundle.tensors(entry),
            entry["steps"],
            prior,
            config,
            refinement.make(replace(config, steps=entry["steps"])),
            warm=starts_trained(bundle, config),
            name=bundle.name,
        )
    golden.remember(bundle, result, *run_by)
    return result


def _same_network(one: RefineConfig, two: RefineConfig) -> bool:
    """Whether the weights for one configuration fit the network of the other."""
    names = ("objective", "channels", "blocks", "skip", "final_bn")
    return all(getattr(one, name) == getattr(two, name) for name in names)
