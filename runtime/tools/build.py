"""python -m runtime build: build the engines that a bundle lacks on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from runtime.bundle.read import Bundle
from runtime.bundle.write import add_engine
from runtime.engines.recipe import EngineRecipe, engine_graphs
from runtime.engines.timing_cache import TimingCache
from runtime.errors import BundleError, DeviceError, InputError, MissingBackend, SdkError
from runtime.tools.cli import Bar, capabilities, gpu_index, workspace_bytes
from runtime.tools.output import TITLES, as_json, engine_words, finish, receipt_words, size


def run_build(args: argparse.Namespace) -> int:
    """Run the command build.

    Returns
    -------
    ExitCode.DONE; every failure is an exception.

    Raises
    ------
    InputError : an option is wrong, the GPU does not exist, or a file cannot be read or written.
    MissingBackend, DeviceError : no target can be built on this machine.
    BundleError : the bundle cannot be read, or TensorRT cannot build a graph.
    VerificationFailed : an engine does not compute in the precision of its graph.
    """
    from runtime.bundle import engines

    start = time.perf_counter()
    bundle, index = Bundle.open(args.bundle), gpu_index(args.device)
    recipes = EngineRecipe.from_manifest(bundle.manifest)
    listed = [t for t in engines.RUNTIMES if t in bundle.manifest["recipe"]["targets"]]
    targets = [args.target] if args.target else listed or ["trt"]
    _check_use(args, targets)
    engines.check_device(targets, index)
    changes: dict[str, Any] = {}
    if args.workspace is not None:
        changes["workspace"] = workspace_bytes(args.workspace)
    if args.compute_capability is not None:
        changes["compute_capabilities"] = capabilities(args.compute_capability)
    recipes = {graph: replace(recipe, **changes) for graph, recipe in recipes.items()}
    chosen = engine_graphs(bundle.manifest)
    graphs = {name: data for name, data in engines.graph_bytes(bundle) if name in chosen}
    wanted, skipped = _wanted(recipes, graphs, targets, index, chosen=bool(args.target or listed))
    for entry in wanted:
        if entry["runtime"] == "tensorrt_rtx":
            precision = bundle.manifest["graphs"].get("prior", {}).get("precision", "fp32")
            engines.check_targets(["rtx"], entry["compute_capabilities"], chosen, precision)
    reasons = [_reason(bundle, entry, args.force) for entry in wanted]
    todo = [(entry, reason) for entry, reason in zip(wanted, reasons, strict=True) if reason]
    kept = [entry for entry, reason in zip(wanted, reasons, strict=True) if not reason]
    document: dict[str, Any] = {
        "bundle": str(bundle.path),
        "built": [],
        "up_to_date": [entry["key"] for entry in kept],
        "not_built_here": skipped,
        "to_build": [{k: e[k] for k in ("graph", "key", "runtime")} | {"why": w} for e, w in todo],
    }
    for problem in skipped:
        print(f"not built here: {problem['target']}: {problem['error']}", file=sys.stderr)
    lines = [_engine_text("up to date", entry) for entry in kept]
    if args.dry_run:
        lines += [_engine_text("would build", entry, f"why: {reason}") for entry, reason in todo]
        finish(args.json, document, lines)
        return 0
    plans, cache = [], TimingCache(args.timing_cache)
    with Bar() as bar:
        for entry, reason in todo:
            bar.say(f"build {entry['graph']} with {TITLES[entry['runtime']]} ({reason})")
            timed = entry["runtime"] == "tensorrt"
            built, plan, times = engines.build(
                entry,
                graphs[entry["graph"]],
                bundle.manifest["graphs"][entry["graph"]]["precision"],
                device=index,
                timing_cache=cache.times if timed else None,
                progress=bar.progress,
            )
            if timed:
                cache.write(times)
            plans.append((built, plan))
    # The engines are added after the last one is built, so an interrupted build changes nothing.
    for built, plan in plans:
        bundle = add_engine(bundle, built, plan)
        document["built"].append(built)
        file = f"{built['file']}, {size(built['size'])}, {built['seconds']:.1f} s"
        lines.append(_engine_text("built", built, file, receipt_words(built["receipt"])))
    document["seconds"] = round(time.perf_counter() - start, 3)
    document["next"] = f"python -m runtime check {bundle.path}"
    lines.append(f"{len(plans)} built, {len(kept)} up to date, {document['seconds']:.1f} s")
    lines.append(f"next         {document['next']}")
    finish(args.json, document, lines)
    return 0


def _engine_text(state: str, entry: Mapping[str, Any], *more: str) -> str:
    """Describe an engine in several lines. The first line is the state, the graph and the key."""
    head = f"{state:13}{entry['graph']} {entry['key']}"
    return "\n".join([head, *(f"{'':13}{line}" for line in (engine_words(entry), *more))])


def _check_use(args: argparse.Namespace, targets: Sequence[str]) -> None:
    """InputError for an option that has no effect on these targets."""
    for given, name, target, why in (
        (args.timing_cache, "timing-cache", "trt", "TensorRT for RTX has no timing cache"),
        (args.compute_capability, "compute-capability", "rtx", "trt builds for the GPU it runs on"),
    ):
        if given is not None and target not in targets:
            raise InputError(f"{name} is for target {target}; {why}", fix=f"leave --{name} out")


def _wanted(
    recipes: Mapping[str, EngineRecipe],
    graphs: Mapping[str, bytes],
    targets: Sequence[str],
    index: int,
    *,
    chosen: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """List the engines to build, and the targets that cannot be built on this machine.

    Parameters
    ----------
    recipes, graphs : of the bundle, by the graph's name.
    targets : some of "trt" and "rtx".
    index : the number of the GPU.
    chosen : whether the user or the bundle names the targets.

    Returns
    -------
    The entries of the engines; and {"target", "error", "fix"} of each target that cannot be built.

    Raises
    ------
    MissingBackend, DeviceError : no target can be built on this machine.
    """
    from runtime.bundle.engines import check_start, wanted_engines

    wanted: list[dict[str, Any]] = []
    missing: list[tuple[str, SdkError]] = []
    for name in targets:
        try:
            entries = wanted_engines(recipes, graphs, name, device=index)
            check_start(entries, index)
            wanted += entries
        except (MissingBackend, DeviceError) as error:  # DeviceError: driver or library fails
            missing.append((name, error))
    if missing and not wanted:
        first = missing[0][1]
        if not chosen and isinstance(first, MissingBackend):
            raise MissingBackend(
                f"the bundle names no target with engines, and {as_json(first)['error']}",
                fix=f"{first.fix}; or choose --target rtx",
            ) from first
        raise first
    return wanted, [{"target": name, **as_json(absence)} for name, absence in missing]


def _reason(bundle: Bundle, entry: Mapping[str, Any], force: bool) -> str:
    """Return why an engine has to be built; "" if the bundle contains it undamaged and ``force`` is
    False."""
    own = [
        e
        for e in bundle.manifest["engines"]
        if e["graph"] == entry["graph"] and e["runtime"] == entry["runtime"]
    ]
    if not own:
        return "the bundle has no such engine"
    same = next((e for e in own if e["key"] == entry["key"]), None)
    if same is None:
        return _differences(own[-1], entry)
    try:
        bundle.read(same)
    except BundleError as error:
        return error.message
    return "--force" if force else ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in what a stale engine differs from the wanted one: "TensorRT 10.3.0 -> 10.7.0"."""
    titles = {
        "version": TITLES[new["runtime"]],
        "compute_capabilities": "compute capability",
        "gpu_name": "GPU",
        "l4t": "L4T",
    }

    def change(title: str, one: Any, two: Any) -> str:
        words = [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in (one, two)]
        return f"{title} {words[0]} -> {words[1]}"

    found = [change(titles[k], old[k], new[k]) for k in titles if old[k] != new[k]]
    flags = [(k, old["flags"].get(k), value) for k, value in new["flags"].items()]
    found += [change(name, one, two) for name, one, two in flags if one != two]
    found += ["other shapes"] if old["shapes"] != new["shapes"] else []
    return "; ".join(found) or "the graph has changed"
