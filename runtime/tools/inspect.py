"""python -m runtime inspect: print a bundle's manifest as text, and check the hash of its files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.bundle.open import starts_trained
from runtime.bundle.read import Bundle
from runtime.engines.recipe import EngineRecipe, engine_graphs
from runtime.errors import BundleError, ExitCode, SdkError
from runtime.tools.output import (
    as_json,
    engine_words,
    listed,
    pairs,
    print_json,
    receipt_words,
    rows,
    say,
    size,
)

_CHOSEN = {  # how the checkpoint was chosen, in words
    "last": "the last",
    "energy": "by energy",
    "cold": "by agreement with a cold refinement",
    "labels": "by labels",
}


def run_inspect(args: argparse.Namespace) -> int:
    """Run the command inspect.

    Returns
    -------
    ExitCode.DONE; with --json, BUNDLE if a file is damaged.

    Raises
    ------
    BundleError : the manifest cannot be read, or (without --json) a file is damaged.
    InputError : the bundle's folder does not exist.

    Example
    -------
    >>> run_inspect(argparse.Namespace(bundle="city.bundle", json=False))  # prints the manifest
    """
    bundle = Bundle.open(args.bundle)
    files, problem = read_all(bundle)
    if args.json:
        document = {
            "bundle": str(bundle.path),
            "ok": problem is None,
            "manifest": bundle.manifest,
            "refine_changes": bundle.refine().changes(),
            "files": files,
            "trtexec": _trtexec(bundle),
        }
        print_json(document | as_json(problem))
        return problem.exit_code if problem else ExitCode.DONE
    say(_described(bundle, {f["file"]: f for f in files}))
    if problem:
        raise problem
    return ExitCode.DONE


def read_all(bundle: Bundle) -> tuple[list[dict[str, Any]], SdkError | None]:
    """Read every file of a bundle and compare it with its hash.

    Returns
    -------
    A dict for each file: "role", "file", "size", "sha256" and "ok"; of an engine that could be read
    also "header", of a damaged file also "error" and "fix". And the first problem, or None.

    Example
    -------
    >>> files, problem = read_all(Bundle.open("city.bundle"))
    >>> [file["file"] for file in files if not file["ok"]]
    []
    """
    from runtime.engines.plan import read_header

    manifest, out, first = bundle.manifest, [], None
    entries = [("graph", e) for e in manifest["graphs"].values()]
    entries += [("init", manifest["init"]), *(("engine", e) for e in manifest["engines"])]
    entries += [*(("golden", e) for e in manifest["golden"]), ("licence", manifest["licence"])]
    for role, entry in entries:
        found: dict[str, Any] = {"role": role, **{k: entry[k] for k in ("file", "size", "sha256")}}
        problem: SdkError | None = None
        try:
            data = bundle.read(entry)
            if role == "engine":
                header = read_header(data)
                found["header"] = header._asdict() if header else None
                if header and header.version != entry["version"]:
                    raise BundleError(
                        f"the header of {bundle.name}/{entry['file']} says that version "
                        f"{header.version} built it, the manifest says {entry['version']}",
                        fix=f"python -m runtime build --force {bundle.path}",
                    )
        except SdkError as error:
            problem = error
            first = first or error
        out.append(found | {"ok": problem is None} | as_json(problem))
    return out, first


def _described(bundle: Bundle, files: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that describe a manifest."""
    m = bundle.manifest
    total = sum(f["size"] for f in files.values())
    bad = sum(not f["ok"] for f in files.values())
    verdict = f"{bad} DAMAGED" if bad else "every sha256 OK"
    yield f"{m['name']}   {size(total)} in {len(files)} files, {verdict}"
    prior, model = m["prior"], m["model"]
    if prior["kind"] == "kmeans":
        prior_text = f"kmeans, {prior['clusters']} clusters, temperature {prior['temperature']:g}"
    else:
        # That a file has weights does not say that somebody trained them.
        untrained = "" if model["trained"] else ", UNTRAINED: its labels mean nothing"
        prior_text = f"{model['name']}{untrained}; returns {prior['output']}"
    names = m["classes"]
    yield from rows(
        ("created", f"{m['created']} by dynaguide-edge {m['sdk']}"),
        ("prior", prior_text),
        *((k, _training_words(model[k])) for k in ("training", "refinement") if k in model),
        ("licence", f"{m['licence']['text']}  ({_file(files, m['licence'])})"),
        ("preprocess", _preprocess_words(bundle)),
        ("classes", "without names" if names is None else f"{len(names)}: {listed(names, 200)}"),
        ("refine", _refine_words(bundle)),
        ("weights", f"{_weights_words(bundle)}  ({_file(files, m['init'])})"),
    )
    yield from ("", "graphs")
    for name, graph in m["graphs"].items():
        kept = graph["kept_fp32"]
        yield from rows(
            (name, f"{_file(files, graph)}  opset {graph['opset']}  {graph['precision']}"),
            *_port_rows(graph),
            *([("  kept FP32", listed(kept, 12))] if kept else []),
        )
    if commands := _trtexec(bundle):
        yield from ("", "trtexec: commands that build engines of TensorRT outside of the bundle")
        yield from _trtexec_notes(m)
        yield from (f"  {command}" for command in commands.values())  # not wrapped, to be copied
    yield from ("", _engines_title(m))
    for engine in m["engines"]:
        yield from rows(
            (engine["graph"], f"{engine['key']}  {engine_words(engine)}"),
            ("  file", _file(files, engine)),
            ("  plan", _plan_words(files[engine["file"]])),
            ("  receipt", receipt_words(engine["receipt"])),
            (
                "  built",
                pairs({"in": f"{engine['seconds']:.1f} s", **_flag_words(engine["flags"])}),
            ),
            *_port_rows(engine),
        )
    yield from ("", "golden")
    for golden in m["golden"]:
        yield from rows(("", f"{_file(files, golden)}  {golden['steps']} steps"))
    yield from ("", "verification")
    yield from _verification(m["verification"])
    yield from ("", "recipe")
    yield f"  {m['recipe'].get('command') or 'not recorded'}"  # not wrapped, so users can copy it


def _engines_title(manifest: Mapping[str, Any]) -> str:
    """The line above the engines. It names the graphs of the export's --engines, if not all."""
    title = "engines" if manifest["engines"] else "no engines"
    if "engines" not in manifest["recipe"]:
        return title
    try:
        graphs = " and ".join(engine_graphs(manifest)) or "no graph"
    except BundleError as error:
        return f"{title}; {error.message}"
    return f"{title}; the export chose those of {graphs}"


def picture_words(names: Sequence[str], note: str = "") -> str:
    """Describe the pictures that an export was verified with, e.g. "1 picture: the demo photo".

    Parameters
    ----------
    names : the name of each picture. At most 4 are shown, and long names are shortened.
    note : words about all of them, e.g. "of --data, not used to calibrate".

    Example
    -------
    >>> picture_words(["1.png", "2.png"], "of --data")
    '2 pictures of --data: 1.png, 2.png'
    """
    count = f"{len(names)} picture" + ("s" if len(names) != 1 else "")
    shown = [name if len(name) <= 40 else f"{name[:20]}...{name[-17:]}" for name in names[:4]]
    more = ["..."] if len(names) > len(shown) else []
    return f"{count}{' ' + note if note else ''}: {', '.join(shown + more)}"


def _verification(done: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about the checks of the export."""
    names, note, notes = (done.get(key) for key in ("pictures", "pictures_note", "output"))
    # Older bundles have no note, and a stranger may have written anything.
    if isinstance(note, str) and isinstance(names, list):
        yield from rows(("pictures", picture_words([*map(str, names)], note[:80])))
        done = {k: v for k, v in done.items() if k not in ("pictures", "pictures_note")}
    if isinstance(notes, list):
        yield from rows(*(("output", str(text)[:400]) for text in notes))
        done = {k: v for k, v in done.items() if k != "output"}
    yield from rows(*_flat(done))


def _training_words(training: Mapping[str, Any]) -> str:
    """Describe how a head or a refinement network was trained: on what, how long, and what labels
    were used for."""
    what = training.get("backbone", training.get("prior"))
    features = f" ({what['features'][:80]})" if "features" in what else ""
    words = [
        f"{training['method']} on {what['name'][:80]}{features}, "
        f"{training['pictures']} pictures, step {training['step']} of {training['steps']} "
        f"({_CHOSEN[training['select']]}), seed {training['seed']}",
        f"labels used for {' and '.join(training['labels_used']) or 'nothing'}",
    ]
    if (names := training.get("names")) is not None:
        trained = "that were trained on, " if names["trained_on"] else ""
        words.append(
            f"names of {names['pictures']} pictures {trained}with labels in {names['labels']}: "
            f"accuracy {names['accuracy']:.3f}, mIoU {names['miou']:.3f}"
        )
    words += [f"{training['mask']} mask"] if "mask" in training else []
    return "; ".join(words + ["averaged with the mirror image"] * training.get("flip", False))


def _preprocess_words(bundle: Bundle) -> str:
    pp = bundle.preprocess()
    if pp is None:
        return "none: the prior uses the picture at the working size"
    size = f"stretch to {pp.height} x {pp.width}"
    if pp.resize == "long_side":
        size = f"long side to {pp.long_side}, both sides multiples of {pp.multiple}"
        size += f", at least {pp.minimum}" if pp.minimum > 1 else ""
    mean, std = (" ".join(f"{x:g}" for x in triple) for triple in (pp.mean, pp.std))
    return (
        f"{size} ({pp.interpolation}, or bilinear to enlarge); {pp.color.upper()} / 255, "
        f"minus {mean}, divided by {std}; 1 x 3 x h x w float32"
    )


def _refine_words(bundle: Bundle) -> str:
    """Describe the settings of the refinement. With trained weights the objective's default number
    of steps, which is for initial weights, means nothing."""
    config, words = bundle.refine(), []
    changes = config.changes()
    changes.pop("objective", None)
    changes.setdefault("steps", [config.steps])
    if starts_trained(bundle, config):
        del changes["steps"]
        words = [f"steps {config.steps}: from the trained weights"]
        if not config.steps:
            words = ["steps 0: the trained weights are used as they are"]
    words += [
        f"{name} {values[0]}" + (f" (default {values[1]})" if values[1:] else "")
        for name, values in changes.items()
    ]
    return "; ".join([config.objective, *words])


def _weights_words(bundle: Bundle) -> str:
    """Describe the weights that the refinement starts from."""
    config = bundle.refine()
    if not starts_trained(bundle, config):
        return f"drawn by seed {config.seed}"
    return "trained beforehand" + (", used without a step" if config.steps == 0 else "")


def _trtexec(bundle: Bundle) -> dict[str, str]:
    """The command of trtexec for each graph that the export chose to build engines for; none if the
    recipe does not say how to build."""
    try:
        recipes = EngineRecipe.from_manifest(bundle.manifest)
        chosen = engine_graphs(bundle.manifest)
    except SdkError:
        return {}
    graphs = bundle.manifest["graphs"]
    return {
        name: recipes[name].trtexec(
            str(bundle.path / graphs[name]["file"]), f"{name}.engine", graphs[name]["precision"]
        )
        for name in chosen
    }


def _trtexec_notes(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about the commands of trtexec; the recipe says how to build."""
    if "rtx" in manifest["recipe"]["targets"]:
        yield "  note: trtexec does not build engines of TensorRT for RTX"
    shapes = [r.shapes for r in EngineRecipe.from_manifest(manifest).values() if r.dynamic]
    if any(s and all(low == high for low, _, high in s.values()) for s in shapes):
        yield "  note: the recipe has one size; for a range add --minShapes and --maxShapes"


def _flag_words(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of an engine's build, with the workspace in GiB."""
    workspace = flags.get("workspace")
    words = (
        f"{workspace / 2**30:.4g} GiB"
        if type(workspace) is int and workspace < 2**50
        else workspace
    )
    return {**flags, **({"workspace": words} if "workspace" in flags else {})}


def _plan_words(file: Mapping[str, Any]) -> str:
    """Describe the header of an engine's file; ``file`` is from read_all."""
    header = file.get("header")
    if not file["ok"]:
        return file["error"]
    if header is None:
        return "the layout of its header is unknown"
    return f"its header says version {header['version']}, {header['size']} bytes"


def _port_rows(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a row for each input and output: its name, type and shape."""
    ports = [(kind, p) for kind in ("inputs", "outputs") for p in entry[kind]]
    widest = min(max((len(p["name"]) for _, p in ports), default=0), 30)
    for kind, p in ports:
        shape = " x ".join("any" if n == -1 else str(n) for n in p["shape"]) or "one number"
        yield f"  {kind[:-1]}", f"{p['name']:{widest}}  {p['dtype']:8} {shape}"


def _flat(value: Mapping[str, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield a row for ``value`` and for each mapping inside it, to a depth of 4: the path of keys,
    and the values that are not mappings themselves."""
    nested = {k: v for k, v in value.items() if isinstance(v, dict) and depth < 4}
    plain = {k: v for k, v in value.items() if k not in nested}
    if plain:
        yield name, pairs(plain)
    for key, inner in nested.items():
        yield from _flat(inner, f"{name} {key}".strip(), depth + 1)


def _file(files: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Describe the file of an entry: its name, its size and whether its hash is right."""
    found = files[entry["file"]]
    state = "OK" if found["ok"] else "DAMAGED"
    return f"{entry['file']}  {size(entry['size'])}  sha256 {entry['sha256'][:12]} {state}"
