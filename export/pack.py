"""From a prior to a bundle: freeze, verify, build engines, and write all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runtime
from export import check, check_prior
from export.frozen import Frozen
from export.half import to_half
from export.inference import precision_of
from export.int8 import to_int8
from export.models import PriorModel
from export.models.base import check_size
from export.options import ExportOptions, check_use, refinement_of
from export.pictures import Pictures, choose_pictures, each_picture
from export.refine_step import build_map, build_step
from export.sizes import FreeSizes
from export.standard_output import Standard, standardised
from export.to_onnx import check_onnx, frozen_graph, frozen_preprocess
from runtime.bundle import engines, golden
from runtime.bundle.manifest import (
    file_entry,
    golden_entry,
    graph_entry,
    kmeans_prior,
    licence_entry,
    make_manifest,
    network_prior,
)
from runtime.bundle.read import Bundle
from runtime.bundle.write import check_replaceable, write_bundle
from runtime.core import parameters
from runtime.core.config import RefineConfig
from runtime.core.refiner import Make, Refiner, maker
from runtime.core.resize import working_picture
from runtime.engines.named_files import read_regular, shell_word, utf8_text
from runtime.engines.onnx import OnnxEngine
from runtime.engines.recipe import ENGINES, EngineRecipe, engine_graphs
from runtime.engines.timing_cache import TimingCache
from runtime.errors import DeviceError, InputError, MissingBackend
from runtime.files import one_line, shown, stat_of
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior, as_probabilities
from runtime.prior.preprocess import Preprocess
from runtime.tensors import load_tensors

KMEANS_SIZE = (480, 640)  # (height, width) that engines are made for with k-means
GOLDEN = "golden/000.safetensors"
Say = Callable[[str], None]


class Exported(NamedTuple):
    """A written bundle.

    Parameters
    ----------
    bundle : the bundle.
    missing : the error that says why engines that were asked for are not in the bundle; None when
        all are.
    frozen_size : whether the input has a fixed size that the .onnx file leaves free.
    """

    bundle: Bundle
    missing: MissingBackend | DeviceError | None
    frozen_size: bool = False


def export_bundle(
    model: PriorModel,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    say: Say = lambda line: None,
    progress: engines.Progress | None = None,
) -> Exported:
    """Freeze a prior and the refinement network into a bundle.

    Parameters
    ----------
    model : the prior.
    out : the bundle's folder. An older bundle there is replaced.
    options : what to export; the defaults when None.
    say : called with a line of text before each long piece of work.
    progress : called as progress(phase, fraction) while an engine is built, fraction from 0 to 1.

    Raises
    ------
    VerificationFailed : the output of a graph differs too much from the original's, or an engine
        computes in another precision.
    MissingBackend : a package is not installed. If only TensorRT or its GPU is missing, or the
        GPU's driver fails before an engine is built, the bundle is written without those engines,
        and the result says so.
    DeviceError : there is too little memory, or the GPU fails while an engine is built.
    InputError, BundleError : a model, picture or option that cannot be used. No error leaves a part
        of a bundle.

    Example
    -------
    >>> model = onnx_file(Path("prior.onnx"))
    >>> export_bundle(model, "city.bundle", ExportOptions(half=True)).bundle.path
    PosixPath('city.bundle')
    """
    options, out = options or ExportOptions(), Path(out)
    check_replaceable(out)
    check_onnx()
    check_use(options, model)
    engines.check_device(options.targets, options.device)
    built = ENGINES[options.engines] if model.preprocess else ENGINES["refine"]
    asked = options.engine.compute_capabilities
    engines.check_targets(options.targets, asked, built, options.precision)
    config = refinement_of(options, model)
    # Unusable files are reported before the work.
    timings = TimingCache(options.timing_cache)
    initial = model.initial if options.initial is None else _initial(options.initial)
    pictures, calibration = choose_pictures(options)
    photo = pictures.arrays[0]
    size = options.imgsz or (KMEANS_SIZE if model.preprocess is None else model.fixed_size)
    working = None if options.dynamic else config.working_size(*size)
    low = working_picture(photo, *(working or config.working_size(*photo.shape[:2])))
    notes: list[str] = []
    frozen_size = False
    if model.preprocess is None:
        pictures = pictures._replace(arrays=[photo], names=pictures.names[:1])
        prior = _kmeans(options, photo, low)
    else:
        with _opened(model) as original:
            inputs = original.inputs if original is not None else []
            sides = [n for port in inputs for n in port.shape[2:]]
            frozen_size = not options.dynamic and not all(isinstance(n, int) for n in sides)
            model, notes = _standard(model, options, pictures.arrays)
            prior = _network(model, options, size, pictures, calibration, say)
    guide = as_probabilities(prior.guide, *low.shape[:2])
    classes = _classes(model, guide)
    say(f"export and verify the {config.objective} step")
    refinement = _refinement(config, low, guide, classes, initial)
    graphs = prior.graphs | refinement.graphs

    files = {f"{name}.onnx": graph.data for name, graph in graphs.items()}
    files["init.safetensors"] = _tensors(refinement.state)
    arrays, golden_steps = golden.make(
        photo,
        prior.guide,
        config,
        native(replace(config, steps=refinement.steps), refinement.trained),
        low=low,
        warm=refinement.trained is not None,
        network_input=prior.input,
    )
    files[GOLDEN] = _tensors(arrays)
    files["LICENSE.model"] = f"{model.name}: {model.licence}\n".encode()
    manifest = make_manifest(
        name=one_line(out.name or Path(os.path.realpath(out)).name),
        sdk=runtime.__version__,
        model={"name": model.name, "trained": model.trained}
        | ({} if model.training is None else {"training": model.training})
        | ({} if model.refinement is None else {"refinement": model.refinement}),
        prior=prior.entry,
        preprocess=prior.preprocess,
        classes=model.names,
        graphs={
            name: graph_entry(
                f"{name}.onnx",
                graph.data,
                opset=graph.opset,
                inputs=graph.inputs,
                outputs=graph.outputs,
                **(prior.detail if name == "prior" else {}),
            )
            for name, graph in graphs.items()
        },
        refine=config,
        init=file_entry("init.safetensors", files["init.safetensors"]),
        golden=[golden_entry(GOLDEN, files[GOLDEN], golden_steps)],
        verification={
            "pictures": pictures.names,
            "pictures_note": pictures.note,
            "allow_one_class": options.allow_one_class,
            "output": notes,
            **prior.verification,
            **refinement.verification,
        },
        recipe={
            "command": options.command,
            "targets": list(options.targets),
            **({} if options.engines == "all" else {"engines": options.engines}),
            **replace(options.engine, dynamic=options.dynamic).to_manifest(
                {
                    name: _shapes(name, graph, options, config, size, classes)
                    for name, graph in graphs.items()
                }
            ),
        },
        licence=licence_entry("LICENSE.model", files["LICENSE.model"], model.licence),
    )
    data = {name: graph.data for name, graph in graphs.items()}
    missing = _build_engines(manifest, data, files, options, timings, say, progress)
    say(f"write {out}")
    return Exported(write_bundle(out, manifest, files), missing, frozen_size)


@dataclass(frozen=True)
class _Prior:
    """A prior that was frozen and verified, and its output for the first picture.

    Parameters
    ----------
    entry : the prior's entry in the manifest.
    guide : its output, (h, w, C) float32 probabilities or (h, w) int32 labels.
    input : (1, 3, h, w) float32, the picture as the input of the network; None for k-means.
    preprocess : from a picture to the input; None for k-means.
    graphs : {"prior": graph} for a network, empty for k-means.
    detail : the graph's precision and the nodes that stay FP32; empty for FP32 and k-means.
    verification : what the checks measured.
    """

    entry: dict[str, Any]
    guide: np.ndarray
    input: np.ndarray | None = None
    preprocess: Preprocess | None = None
    graphs: dict[str, Frozen] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)


def _kmeans(options: ExportOptions, picture: np.ndarray, low: np.ndarray) -> _Prior:
    """K-means, which has nothing to freeze. InputError for an option that only networks have."""
    if options.half or options.int8:
        raise InputError("half and int8 are for networks; kmeans has none", fix="leave it out")
    prior = KMeansPrior()
    guide = prior(picture, low)
    found = check_prior.one_class([guide])
    return _Prior(
        kmeans_prior(prior.clusters, prior.temperature),
        guide,
        verification={"one_class": found} if found else {},
    )


@contextmanager
def _opened(model: PriorModel) -> Iterator[OnnxEngine | None]:
    """A block in which the session of an ONNX file is open, so that it is opened only once."""
    if model.onnx is None:
        yield None
    else:
        with Frozen(model.name, data=model.onnx) as original:
            yield original.engine


def _standard(
    model: PriorModel, options: ExportOptions, pictures: Sequence[np.ndarray]
) -> Standard:
    """The network with the one output that bundles have, as the outputs for the pictures say. Also
    a network of free size runs at the usual size here; other sizes are verified later."""
    preprocess = frozen_preprocess(model, imgsz=options.imgsz)
    return standardised(model, [preprocess(picture) for picture in pictures])


def _network(
    model: PriorModel,
    options: ExportOptions,
    size: tuple[int, int],
    pictures: Pictures,
    calibration: Sequence[Path],
    say: Say,
) -> _Prior:
    """The network: frozen, in the precision asked for, and verified. ONNX Runtime opens each of its
    graphs only once, because the golden vectors use the outputs that the check computed."""
    say(f"freeze {model.name}")
    preprocess = frozen_preprocess(model, imgsz=options.imgsz, dynamic=options.dynamic)
    _check_profile(options, size, preprocess, model.name)
    with frozen_graph(
        model,
        imgsz=options.imgsz,
        dynamic=options.dynamic,
        opset=options.opset,
        simplify=options.simplify,
    ) as frozen:
        final, detail = _lower(frozen, preprocess, options, calibration, say)
        verification = {}
        if "calibration" in detail:
            verification["calibration"] = detail.pop("calibration")
        say(f"verify the prior on {pictures}")
        with final:
            checked = check_prior.check_prior(
                model,
                frozen,
                final,
                detail.get("precision", "fp32"),
                preprocess,
                pictures,
                min_agreement=options.min_agreement,
                sizes=FreeSizes(preprocess, options.min_shape, options.max_shape)
                if options.dynamic
                else None,
                allow_one_class=options.allow_one_class,
            )
            if checked.one_class:
                verification["one_class"] = checked.one_class
            prior = NetworkPrior(
                final.engine, preprocess, names=model.names, output=model.output, name=model.name
            )
    assert model.output is not None  # _standard has decided it
    return _Prior(
        network_prior(model.output),
        prior.guide(checked.output),
        checked.input,
        preprocess,
        {"prior": final},
        detail,
        verification | {"prior": checked.report},
    )


@dataclass(frozen=True)
class _Refinement:
    """The graphs of a refinement, verified.

    Parameters
    ----------
    graphs : by their names in the manifest.
    state : weights that a refinement starts from.
    trained : the same weights if they were trained before the export; None if the seed made them.
    steps : the number of refinement steps of the golden vectors.
    verification : what the checks measured.
    """

    graphs: dict[str, Frozen]
    state: parameters.State
    trained: parameters.State | None
    steps: int
    verification: dict[str, Any]


def _refinement(
    config: RefineConfig,
    low: np.ndarray,
    guide: np.ndarray,
    classes: int,
    trained: parameters.State | None,
) -> _Refinement:
    """Build and verify the graphs of the refinement.

    ``low`` (h, w, 3) float32 is the first picture at working size and ``guide`` its guide there,
    with ``classes`` classes in all. ``trained`` are the weights of a file, if the user named one.
    """
    step = Frozen("refine_step.onnx", build_step(config))
    final = Frozen("refine_map.onnx", build_map(config))
    channels = parameters.channel_count(config, classes) or 1
    if trained is None:
        state = parameters.initial_state(config, channels)
    else:
        flat = parameters.flatten(config, channels, trained)
        state = trained = parameters.unflatten(config, channels, *flat)
    steps = golden.step_count(config)
    graphs = {"refine_step": step, "refine_map": final}
    with step, final:
        measured = check.check_refinement(config, step, final, low, guide, trained, steps)
    verification = {"refine": measured}
    if trained is not None:
        with Frozen("cnn.onnx", build_map(config, state=trained)) as cnn:
            verification["cnn"] = check.check_cnn(config, cnn, trained, low, guide)
        graphs["cnn"] = cnn
    return _Refinement(graphs, state, trained, steps, verification)


def native(config: RefineConfig, initial: parameters.State | None) -> Make:
    """The argument ``make`` of :func:`runtime.core.refiner.refine_with` that makes refiners of the
    native core.

    Parameters
    ----------
    config : the refinement.
    initial : weights for all classes of the guide to start from; the seed's when None.
    """
    return maker(
        lambda h, w, count: Refiner(h, w, classes=count, **config.options()), config, initial
    )


def _lower(
    frozen: Frozen,
    preprocess: Preprocess,
    options: ExportOptions,
    calibration: Sequence[Path],
    say: Say,
) -> tuple[Frozen, dict[str, Any]]:
    """The prior in the precision asked for, which is ``frozen`` itself without --half and --int8;
    and what the manifest says of it. ``calibration`` are the files to calibrate INT8 with.
    InputError if its weights are FP16 or INT8 already."""
    name = f"{frozen.name} in {options.precision}"
    own = precision_of(frozen.model)
    if own != "fp32" and (options.half or options.int8):
        raise InputError(
            f"{frozen.name} has {own.upper()} weights already; --half and --int8 want FP32",
            fix="leave them out, or export the network in FP32",
        )
    if options.int8:
        say(f"calibrate INT8 on {len(calibration)} picture{'s' * (len(calibration) != 1)}")
        feeds = (preprocess(picture) for picture in each_picture(calibration))
        data, receipt = to_int8(frozen.data, feeds, half=options.half)
        digests = [
            file_entry(file.name, read_regular(file, "a picture"))["sha256"] for file in calibration
        ]
        return Frozen(name, data=data), {
            "precision": options.precision,
            "kept_fp32": receipt["kept"],
            "calibration": {"method": receipt["method"], "sha256": digests},
        }
    if options.half:
        say("convert to FP16")
        data, kept = to_half(frozen.data)
        return Frozen(name, data=data), {"precision": "fp16", "kept_fp32": kept}
    return frozen, {"precision": own}


def _check_profile(
    options: ExportOptions, size: tuple[int, int], preprocess: Preprocess, name: str
) -> None:
    """InputError unless least size <= usual size <= largest size, and the network ``name`` takes
    these sizes."""
    low, high = options.min_shape or size, options.max_shape or size
    for option, came, bound, small, large in (
        ("min-shape", low, "at most", low, size),
        ("max-shape", high, "at least", size, high),
    ):
        if any(a > b for a, b in zip(small, large, strict=True)):
            raise InputError(
                f"{option} is {came}; wanted {bound} {size}, the usual size",
                fix="change it, or set the usual size by --opt-shape",
            )
        if options.dynamic:
            check_size(came, preprocess, name, option)


def _classes(model: PriorModel, guide: np.ndarray) -> int:
    """The number of classes of the guide."""
    if model.names:
        return len(model.names)
    return guide.shape[2] if guide.ndim == 3 else int(guide.max()) + 1


def _initial(path: Path) -> parameters.State:
    """The trained weights in a file. InputError for the folder of a run."""
    if stat_of(path / "run.json") is not None:
        raise InputError(
            f"init is {shown(path)}, a run of the trainer; wanted a file of trained weights",
            fix=f"--model {shell_word(str(path))} exports the run with its prior",
        )
    return load_tensors(read_regular(path, "a file of trained weights"), utf8_text(path.name))


def _tensors(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file with these arrays."""
    from safetensors.numpy import save

    # np.ascontiguousarray would change the shape () of a counter to (1,).
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _shapes(
    name: str,
    graph: Frozen,
    options: ExportOptions,
    config: RefineConfig,
    size: tuple[int, int],
    classes: int,
) -> dict[str, list[list[int]]]:
    """Least, usual and largest shape of each input that has free dimensions. ``size`` is the usual
    size of pictures, (height, width)."""
    sizes = [options.min_shape or size, size, options.max_shape or size]
    if name != "prior":
        sizes = [config.working_size(*s) for s in sizes]
    weights, buffers = parameters.shapes(config, parameters.channel_count(config, classes) or 1)
    lengths = {
        "classes": classes,
        "parameters": sum(int(np.prod(s)) for s in weights.values()),
        "buffers": sum(int(np.prod(s)) for s in buffers.values()),
    }
    out = {}
    for port in graph.inputs:
        if all(isinstance(n, int) for n in port.shape):
            continue
        three = []
        for height, width in sizes:
            free = iter((height, width))
            three.append(
                [
                    n if isinstance(n, int) else lengths[n] if n in lengths else next(free)
                    for n in port.shape
                ]
            )
        out[port.name] = three
    return out


def _build_engines(
    manifest: dict[str, Any],
    graphs: dict[str, bytes],
    files: dict[str, bytes],
    options: ExportOptions,
    timings: TimingCache,
    say: Say,
    progress: engines.Progress | None,
) -> MissingBackend | DeviceError | None:
    """Add the engines that this machine can build to ``manifest`` and ``files``. Return the error
    that says why the others were not built; None if all were built."""
    missing: MissingBackend | DeviceError | None = None
    recipes = EngineRecipe.from_manifest(manifest)
    graphs = {name: graphs[name] for name in engine_graphs(manifest)}
    for target in options.targets:
        if target == "onnx":
            continue
        try:
            entries = engines.wanted_engines(recipes, graphs, target, device=options.device)
            engines.check_start(entries, options.device)
        except (MissingBackend, DeviceError) as error:  # DeviceError: driver or library fails
            missing = error
            continue
        timed = target == "trt"
        for entry in entries:
            say(f"build {entry['graph']} for {target}")
            whole, plan, times = engines.build(
                entry,
                graphs[entry["graph"]],
                manifest["graphs"][entry["graph"]]["precision"],
                device=options.device,
                timing_cache=timings.times if timed else None,
                progress=progress,
            )
            if timed:
                timings.write(times)
            manifest["engines"].append(whole)
            files[whole["file"]] = plan
    return missing
