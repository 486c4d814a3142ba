"""python -m runtime: doctor | inspect BUNDLE | check BUNDLE | build BUNDLE."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.read import Bundle
from runtime.bundle.write import add_engine
from runtime.cli import Bar, Parser, capabilities, gpu_index, run, some_path, workspace_bytes
from runtime.core.config import RefineConfig
from runtime.device.driver import (
    cuda_absence,
    cuda_devices,
    cuda_problem,
    parse_device,
    platform_tag,
)
from runtime.errors import BundleError, EngineMismatch, InputError, MissingBackend, SdkError

WIDTH, COLUMN = 100, 14
_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failure, 2 usage, 3 verification failed,
    4 something missing, 5 bundle, 130 interrupted."""
    args = _parser().parse_args(argv)
    return run(lambda: int(args.run(args)), as_json=args.json)


def _parser() -> Parser:
    parser = Parser("python -m runtime", description="What this machine and a bundle can do.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    doctor = commands.add_parser("doctor", help="what is installed here, and what is wrong with it")
    inspect = commands.add_parser("inspect", help="what is in a bundle; needs no TensorRT")
    check = commands.add_parser("check", help="whether a bundle gives its golden answers here")
    engines = commands.add_parser("build", help="build the engines that a bundle lacks here")
    for command, work in (
        (doctor, _doctor),
        (inspect, _inspect),
        (check, _check),
        (engines, _build),
    ):
        command.set_defaults(run=work)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if command is not doctor:
            command.add_argument("bundle", metavar="BUNDLE", type=some_path, help="its folder")
    check.add_argument("--device", default="cpu", help="where graphs run: cpu, cuda, cuda:1")
    check.add_argument("--engines", action="store_true", help="fail unless every engine runs here")
    engines.add_argument("--target", choices=["trt", "rtx"], help="the bundle's own by default")
    engines.add_argument("--device", default="0", help="GPU to build on: 0, cuda:0")
    engines.add_argument("--compute-capability", metavar="LIST", help="for rtx: 8.6,8.9,12.0")
    engines.add_argument("--workspace", help="GiB (2), MiB (2048M) or auto; the bundle's own")
    engines.add_argument(
        "--timing-cache", type=some_path, metavar="FILE", help="read and written (trt)"
    )
    engines.add_argument("--force", action="store_true", help="also what is up to date")
    engines.add_argument("--dry-run", action="store_true", help="only say what would be built")
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from runtime.doctor import render, report

    found = report()
    if args.json:
        _print_json(found)
    else:
        _say(render(found).splitlines())
    return int(any(problem["kind"] == "broken" for problem in found["problems"]))


# --- inspect -----------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    files, problem = _read_all(bundle)
    if args.json:
        document = {
            "bundle": str(bundle.path),
            "ok": problem is None,
            "manifest": bundle.manifest,
            "refine_changes": bundle.refine().changes(),
            "files": files,
        }
        _print_json(document | _told(problem))
        return problem.exit_code if problem else 0
    _say(_described(bundle, {f["file"]: f for f in files}))
    if problem:
        raise problem
    return 0


def _read_all(bundle: Bundle) -> tuple[list[dict[str, Any]], SdkError | None]:
    """Read every file against its hash: what each is, and the first problem."""
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
                        f"{bundle.name}/{entry['file']} says that version {header.version} built "
                        f"it, the manifest says {entry['version']}",
                        fix=f"python -m runtime build --force {bundle.path}",
                    )
        except SdkError as error:
            problem = error
            first = first or error
        out.append(found | {"ok": problem is None} | _told(problem))
    return out, first


def _described(bundle: Bundle, files: Mapping[str, Any]) -> Iterator[str]:
    """Everything that the manifest says, for a person."""
    m = bundle.manifest
    total = sum(f["size"] for f in files.values())
    bad = sum(not f["ok"] for f in files.values())
    verdict = f"{bad} DAMAGED" if bad else "every sha256 OK"
    yield f"{m['name']}   {_size(total)} in {len(files)} files, {verdict}"
    prior, model = m["prior"], m["model"]
    if prior["kind"] == "kmeans":
        what = f"kmeans, {prior['clusters']} clusters, temperature {prior['temperature']:g}"
    else:
        trained = "trained" if model["trained"] else "UNTRAINED: its labels mean nothing"
        what = f"{model['name']}, {trained}; gives {prior['output']}"
    names = m["classes"]
    yield from _rows(
        ("created", f"{m['created']} by dynaguide-edge {m['sdk']}"),
        ("prior", what),
        ("licence", f"{m['licence']['text']}  ({_file(files, m['licence'])})"),
        ("preprocess", _preprocess_words(bundle)),
        ("classes", "without names" if names is None else f"{len(names)}: {_list(names, 200)}"),
        ("refine", _refine_words(bundle.refine())),
        ("weights", _file(files, m["init"])),
    )
    yield from ("", "graphs")
    for name, graph in m["graphs"].items():
        kept = graph["kept_fp32"]
        yield from _rows(
            (name, f"{_file(files, graph)}  opset {graph['opset']}  {graph['precision']}"),
            *_port_rows(graph),
            *([("  kept FP32", _list(kept, 12))] if kept else []),
        )
    yield from ("", "engines" if m["engines"] else "no engines")
    for engine in m["engines"]:
        yield from _rows(
            (engine["graph"], f"{engine['key']}  {_engine_words(engine)}"),
            ("  file", _file(files, engine)),
            ("  plan", _plan_words(files[engine["file"]])),
            ("  receipt", _receipt_words(engine["receipt"])),
            ("  built", _pairs({"in": f"{engine['seconds']:.1f} s", **engine["flags"]})),
            *_port_rows(engine),
        )
    yield from ("", "golden")
    for golden in m["golden"]:
        yield from _rows(("", f"{_file(files, golden)}  {golden['steps']} steps"))
    yield from ("", "verification")
    yield from _rows(*_flat(m["verification"]))
    yield from ("", "recipe")
    yield f"  {m['recipe'].get('command') or 'not recorded'}"  # one line, to be copied


def _preprocess_words(bundle: Bundle) -> str:
    pp = bundle.preprocess()
    if pp is None:
        return "none: the prior sees the picture at the refinement's size"
    size = f"stretch to {pp.height} x {pp.width}"
    if pp.resize == "long_side":
        size = f"long side to {pp.long_side}, both sides multiples of {pp.multiple}"
        size += f", at least {pp.minimum}" if pp.minimum > 1 else ""
    mean, std = (" ".join(f"{x:g}" for x in triple) for triple in (pp.mean, pp.std))
    return (
        f"{size} ({pp.interpolation}; bilinear where it grows); {pp.color.upper()} / 255, "
        f"minus {mean}, over {std}; 1 x 3 x h x w float32"
    )


def _refine_words(config: RefineConfig) -> str:
    changes = config.changes()
    changes.pop("objective", None)
    changes.setdefault("steps", [config.steps])
    words = [
        f"{name} {values[0]}" + (f" (default {values[1]})" if values[1:] else "")
        for name, values in changes.items()
    ]
    return "; ".join([config.objective, *words])


def _engine_words(engine: Mapping[str, Any]) -> str:
    gpus = f"compute capability {', '.join(engine['compute_capabilities']) or 'unknown'}"
    if engine["gpu_name"]:
        gpus = f"{engine['gpu_name']} alone ({gpus})"
    l4t = f", L4T {engine['l4t']}" if engine["l4t"] else ""
    title = f"{_TITLES[engine['runtime']]} {engine['version']}"
    return f"{title} for {gpus}{l4t}, built on {engine['platform']}"


def _plan_words(file: Mapping[str, Any]) -> str:
    header = file.get("header")
    if not file["ok"]:
        return file["error"]
    if header is None:
        return "its header is of an unknown layout"
    return f"its header says version {header['version']}, {header['size']} bytes"


def _receipt_words(receipt: Mapping[str, Any]) -> str:
    """Shares of layers, and of convolutions and matrix products, by precision."""
    parts = []
    for key, title in (("layers", "layers"), ("matrix", "convolutions and matrix products")):
        counts = receipt.get(key)
        numbers = counts if isinstance(counts, dict) else {}
        numbers = {k: v for k, v in numbers.items() if type(v) is int and 0 < v < 2**53}
        total = sum(numbers.values())
        told = [
            f"{v / total:.0%} {k}" for k, v in sorted(numbers.items(), key=lambda pair: -pair[1])
        ]
        if told:
            parts.append(f"{total} {title}: {', '.join(told)}")
    return f"{'; '.join(parts) or 'no layers counted'} (by the {receipt.get('source', '?')})"


def _port_rows(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ports = [(kind, p) for kind in ("inputs", "outputs") for p in entry[kind]]
    widest = min(max((len(p["name"]) for _, p in ports), default=0), 30)
    for kind, p in ports:
        shape = " x ".join("any" if n == -1 else str(n) for n in p["shape"]) or "one number"
        yield f"  {kind[:-1]}", f"{p['name']:{widest}}  {p['dtype']:8} {shape}"


def _flat(value: Mapping[str, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """A row for the plain values of each mapping in a mapping."""
    nested = {k: v for k, v in value.items() if isinstance(v, dict) and depth < 4}
    plain = {k: v for k, v in value.items() if k not in nested}
    if plain:
        yield name, _pairs(plain)
    for key, inner in nested.items():
        yield from _flat(inner, f"{name} {key}".strip(), depth + 1)


def _pairs(values: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return _list(value, 4)
        if value is None:
            return "default"
        return f"{value:.4g}" if isinstance(value, float) else str(value)[:80]

    return ", ".join(f"{name} {text(value)}" for name, value in values.items())


def _list(members: Sequence[Any], most: int) -> str:
    more = f", ... ({len(members)} in all)" if len(members) > most else ""
    return ", ".join(str(member)[:80] for member in members[:most]) + more


def _file(files: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    found = files[entry["file"]]
    state = "OK" if found["ok"] else "DAMAGED"
    return f"{entry['file']}  {_size(entry['size'])}  sha256 {entry['sha256'][:12]} {state}"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    """Name and text in two columns, wrapped."""
    for name, text in rows:
        head = f"  {name:{COLUMN - 2}}"
        if not head.endswith(" "):  # no room for the text beside it
            yield head
            head = " " * COLUMN
        for line in _wrapped(text, WIDTH - COLUMN):
            yield head + line
            head = " " * COLUMN


def _wrapped(text: str, width: int) -> list[str]:
    kept = textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=True
    )
    return kept or [""]


# --- check -------------------------------------------------------------------------------------


class _Checks:
    """The checks that were made; each is printed as soon as it is known."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.done: list[dict[str, Any]] = []
        self.failed: list[SdkError] = []

    def make(
        self, name: str, work: Callable[..., Any], *arguments: Any, may_miss: bool = False
    ) -> Any:
        """What ``work`` gives: None, or a text or numbers for the line. With ``may_miss``, a device
        or a package that is not here, or is another one, is no failure."""
        told: dict[str, Any] = {"check": name, "state": "ok"}
        out = None
        try:
            out = work(*arguments)
        except SdkError as error:
            missing = isinstance(error, MissingBackend)
            told |= {"state": "MISSING" if missing else "FAILED"} | _told(error)
            if may_miss and (missing or isinstance(error, EngineMismatch)):
                told["state"] = "not run here"
            else:
                self.failed.append(error)
        if isinstance(out, dict):
            told["numbers"] = out
        detail = told.get("error") or (_pairs(out) if isinstance(out, dict) else out)
        told["detail"] = detail if isinstance(detail, str) else ""
        self.done.append(told)
        if not self.quiet:
            text = told["state"] + (f": {told['detail']}" if told["detail"] else "")
            _say(f"  {line}" for line in _columns(name, text))
            if told.get("fix") and told["state"] != "not run here":
                _say(f"  {line}" for line in _columns("", f"fix: {told['fix']}"))
        return out if told["state"] == "ok" else None

    def count(self, state: str) -> int:
        return sum(check["state"] == state for check in self.done)

    def exit_code(self) -> int:
        """5 for a bundle that is bad, 4 where something is missing, 1 where the device fails."""
        codes = {5 if isinstance(error, InputError) else error.exit_code for error in self.failed}
        return max(codes, default=0)


def _columns(name: str, text: str) -> Iterator[str]:
    head = f"{name:36}"
    for line in _wrapped(text, WIDTH - 38):
        yield head + line
        head = " " * 36


def _check(args: argparse.Namespace) -> int:
    _, index = parse_device(args.device)
    bundle = Bundle.open(args.bundle)
    checks = _Checks(quiet=args.json)
    for file in _read_all(bundle)[0]:
        checks.make(file["file"], _file_fits, file)
    checks.make("environment", _environment)
    if not checks.failed:
        for name in bundle.manifest["graphs"]:
            checks.make(f"graph {name}", _graph_fits, bundle, name, args.device)
    if checks.failed:
        checks.make("golden", _not_asked, may_miss=True)
    else:
        on_cpu, on_device = {"backend": "native"}, {"backend": "onnx", "device": args.device}
        for refine in (on_cpu, on_device):
            name = f"golden, refined by {refine['backend']}"
            checks.make(name, _golden, bundle, {"device": args.device}, refine)
        _check_engines(bundle, checks, index, required=args.engines)
    code = checks.exit_code()
    good, left = checks.count("ok"), checks.count("not run here")
    bad, missing = checks.count("FAILED"), checks.count("MISSING")
    if args.json:
        document = {"bundle": str(bundle.path), "ok": not code, "device": args.device}
        _print_json(document | {"checks": checks.done} | _told(next(iter(checks.failed), None)))
    else:
        verdict = "FAILED" if bad else "is not wholly checked" if missing else "is sound"
        counts = ((good, "ok"), (bad, "failed"), (missing, "missing"), (left, "not run here"))
        told = ", ".join(f"{count} {state}" for count, state in counts if count)
        _say([f"{bundle.name} {verdict}: {told}"])
    return code


def _file_fits(file: Mapping[str, Any]) -> str:
    if not file["ok"]:
        raise BundleError(file["error"], fix=file["fix"])
    return f"sha256 {file['sha256'][:12]}, {_size(file['size'])}"


def _not_asked() -> None:
    raise MissingBackend("what is damaged or lacks something gives no answers")


def _environment() -> str:
    """What the checks run on."""
    from runtime.device.choose import target

    try:
        import onnxruntime
    except ImportError as error:
        raise MissingBackend(
            f"ONNX Runtime is needed to check a bundle, but {error}", fix="pip install onnxruntime"
        ) from error
    gpus = ", ".join(f"{g.name} ({g.compute_capability})" for g in cuda_devices())
    return (
        f"{platform_tag()}, core {target()}, ONNX Runtime {onnxruntime.__version__}, "
        f"{gpus or f'no GPU: {cuda_absence()}'}"
    )


def _graph_fits(bundle: Bundle, name: str, device: str) -> str:
    from runtime.bundle import open

    loaded = open.open_graph(bundle, name, backend="onnx", device=device)
    loaded.engine.close()
    return f"{loaded.text}, inputs and outputs fit"


def _golden(bundle: Bundle, prior: dict[str, Any], refine: dict[str, Any]) -> dict[str, float]:
    """The golden vectors' worst numbers, with ``prior`` and ``refine`` as runtime/bundle/open.py takes
    them."""
    from runtime.bundle import golden, open

    opened, _ = open.open_prior(bundle, **prior)
    refinement, config = open.open_refinement(bundle, **refine), bundle.refine()
    worst: dict[str, float] = {}
    for entry in bundle.manifest["golden"]:
        steps, arrays = entry["steps"], bundle.tensors(entry)
        height, width, *_ = (*arrays.get("labels", np.zeros(0)).shape, 0, 0)
        if refinement.size not in (None, (height, width)):
            raise EngineMismatch(
                f"the golden picture is refined at {height} x {width}, the engines take "
                f"{refinement.size[0]} x {refinement.size[1]} alone"
            )
        result = golden.compare(
            arrays,
            steps,
            opened,
            config,
            refinement.make(replace(config, steps=steps)),
            warm=open.starts_trained(bundle, config),
            name=f"{bundle.name}/{entry['file']}",
        )
        for key, value in result.items():
            pick = max if key in ("input", "losses") else min
            worst[key] = pick(value, worst.get(key, value))
    return worst


def _check_engines(bundle: Bundle, checks: _Checks, index: int, *, required: bool) -> None:
    """Load the engines that fit this machine, and ask them for the golden answers."""
    from runtime.bundle.engines import RUNTIMES

    engines = bundle.manifest["engines"]
    if required and not engines:
        checks.make("engines", _no_engines, bundle)
    for target, name in RUNTIMES.items():
        here = {"backend": target, "device": f"cuda:{index}"}
        loaded = set()
        for entry in engines:
            title = f"engine {entry['graph']} {entry['key']}"
            if entry["runtime"] == name and checks.make(
                title, _engine_fits, bundle, entry, target, index, may_miss=not required
            ):
                loaded.add(entry["graph"])
        refines = {"refine_step", "refine_map"} <= loaded
        if "prior" in loaded or refines:
            prior, refine = here if "prior" in loaded else {}, here if refines else {}
            title = f"golden, on {target} engines"
            checks.make(title, _golden, bundle, prior, refine, may_miss=not required)


def _engine_fits(bundle: Bundle, entry: Mapping[str, Any], target: str, index: int) -> str:
    from runtime.bundle import open

    problem = cuda_problem()
    if problem is not None:
        why = str(problem).partition("\n")[0]
        raise MissingBackend(f"no GPU: {why}", fix=problem.fix) from problem
    found = open.fitting_engine(bundle, entry["graph"], target, index)
    if found["key"] != entry["key"]:
        raise EngineMismatch(f"engine {found['key']} is the one for this GPU")
    loaded = open.open_graph(bundle, entry["graph"], backend=target, device=f"cuda:{index}")
    loaded.engine.close()
    return f"{loaded.text}, inputs and outputs fit"


def _no_engines(bundle: Bundle) -> None:
    raise MissingBackend(
        f"{bundle.name} has no engines", fix=f"python -m runtime build {bundle.path}"
    )


# --- build -------------------------------------------------------------------------------------


def _build(args: argparse.Namespace) -> int:
    from runtime.bundle import engines

    start = time.perf_counter()
    bundle, index = Bundle.open(args.bundle), gpu_index(args.device)
    gpus = cuda_devices()
    if gpus and index >= len(gpus):
        raise InputError(f"device is {index}; wanted 0 to {len(gpus) - 1}")
    engines.check_recipe(bundle.manifest)
    recipe = dict(bundle.manifest["recipe"])
    if args.workspace is not None:
        recipe["workspace"] = workspace_bytes(args.workspace)
    if args.compute_capability is not None:
        recipe["compute_capabilities"] = list(capabilities(args.compute_capability))
    manifest = {**bundle.manifest, "recipe": recipe}
    graphs = dict(engines.graph_bytes(bundle))
    wanted, skipped = _wanted(manifest, graphs, args.target, index)
    if "tensorrt_rtx" in {entry["runtime"] for entry in wanted}:
        engines.check_targets(["rtx"], recipe["compute_capabilities"])
    if args.timing_cache and "tensorrt" not in {entry["runtime"] for entry in wanted}:
        raise InputError(
            "timing-cache is for target trt; TensorRT for RTX times nothing while it builds",
            fix="leave it out",
        )
    reasons = [_why(bundle, entry, args.force) for entry in wanted]
    todo = [(entry, why) for entry, why in zip(wanted, reasons, strict=True) if why]
    kept = [entry for entry, why in zip(wanted, reasons, strict=True) if not why]
    document: dict[str, Any] = {
        "bundle": str(bundle.path),
        "built": [],
        "up_to_date": [entry["key"] for entry in kept],
        "not_built_here": skipped,
        "to_build": [{k: e[k] for k in ("graph", "key", "runtime")} | {"why": w} for e, w in todo],
    }
    for problem in skipped:
        print(f"not built here: {problem['target']}: {problem['error']}", file=sys.stderr)
    lines = [_told_engine("up to date", entry) for entry in kept]
    if args.dry_run:
        lines += [_told_engine("would build", entry, f"why: {why}") for entry, why in todo]
        _finish(args.json, document, lines)
        return 0
    plans, cache = [], _Cache(args.timing_cache)
    with Bar() as bar:
        for entry, why in todo:
            bar.say(f"build {entry['graph']} with {_TITLES[entry['runtime']]} ({why})")
            timed = entry["runtime"] == "tensorrt"
            whole, plan, times = engines.build(
                entry,
                graphs[entry["graph"]],
                bundle.manifest["graphs"][entry["graph"]]["precision"],
                device=index,
                timing_cache=cache.times if timed else None,
                progress=bar.progress,
            )
            if timed:
                cache.write(times)
            plans.append((whole, plan))
    for whole, plan in plans:  # all or none: an interrupted build has changed nothing
        bundle = add_engine(bundle, whole, plan)
        document["built"].append(whole)
        file = f"{whole['file']}, {_size(whole['size'])}, {whole['seconds']:.1f} s"
        lines.append(_told_engine("built", whole, file, _receipt_words(whole["receipt"])))
    document["seconds"] = round(time.perf_counter() - start, 3)
    document["next"] = f"python -m runtime check {bundle.path}"
    lines.append(f"{len(plans)} built, {len(kept)} up to date, {document['seconds']:.1f} s")
    lines.append(f"next         {document['next']}")
    _finish(args.json, document, lines)
    return 0


def _told_engine(state: str, entry: Mapping[str, Any], *more: str) -> str:
    head = f"{state:13}{entry['graph']} {entry['key']}"
    return "\n".join([head, *(f"{'':13}{line}" for line in (_engine_words(entry), *more))])


class _Cache:
    """TensorRT's timings, in a file that need not be there yet."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.times: bytes | None = None
        if path is None:
            return
        if not path.parent.is_dir():  # said now, not after the build
            raise InputError(f"timing cache {path} has no folder", fix=f"mkdir -p {path.parent}")
        try:
            self.times = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise InputError(f"timing cache {path} cannot be read: {error.strerror}") from error

    def write(self, times: bytes | None) -> None:
        """Rename a new file into place."""
        if self.path is None or times is None:
            return
        self.times = times
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            try:
                partial.write_bytes(times)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"timing cache {self.path} cannot be written: {error.strerror}"
            ) from error


def _wanted(
    manifest: Mapping[str, Any], graphs: Mapping[str, bytes], target: str | None, index: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every engine for the targets, and the targets that cannot be built here. Without ``target``,
    those of the recipe, else "trt"; one of them must be buildable."""
    from runtime.bundle.engines import RUNTIMES, wanted_engines

    named = manifest["recipe"].get("targets")
    listed = [t for t in RUNTIMES if isinstance(named, list) and t in named]
    targets = [target] if target else listed or ["trt"]
    wanted: list[dict[str, Any]] = []
    missing: list[tuple[str, MissingBackend]] = []
    for name in targets:
        try:
            wanted += wanted_engines(manifest, graphs, name, device=index)
        except MissingBackend as error:
            missing.append((name, error))
    if missing and not wanted:
        first = missing[0][1]
        if target is None and not listed:
            raise MissingBackend(
                f"the bundle names no target with engines, and {_told(first)['error']}",
                fix=f"{first.fix}; or choose --target rtx",
            ) from first
        raise first
    return wanted, [{"target": name, **_told(absence)} for name, absence in missing]


def _why(bundle: Bundle, entry: Mapping[str, Any], force: bool) -> str:
    """Why an engine has to be built; nothing where the bundle has it."""
    own = [
        e
        for e in bundle.manifest["engines"]
        if e["graph"] == entry["graph"] and e["runtime"] == entry["runtime"]
    ]
    if not own:
        return "the bundle has none"
    same = next((e for e in own if e["key"] == entry["key"]), None)
    if same is None:
        return _differences(own[-1], entry)
    try:
        bundle.read(same)
    except BundleError as error:
        return str(error).partition("\n")[0]
    return "--force" if force else ""


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What became of a stale engine, as in "TensorRT 10.3.0 -> 10.7.0"."""
    titles = {
        "version": _TITLES[new["runtime"]],
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


# --- output ------------------------------------------------------------------------------------


def _told(problem: SdkError | None) -> dict[str, str]:
    """An error as JSON has it."""
    if problem is None:
        return {}
    return {"error": str(problem).partition("\n  fix: ")[0], "fix": problem.fix}


def _finish(as_json: bool, document: Mapping[str, Any], lines: Iterable[str]) -> None:
    if as_json:
        _print_json(document)
    else:
        _say(lines)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy's numbers, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a JSON document")


def _say(lines: Iterable[str]) -> None:
    """Print; what a terminal would obey or cannot show is replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in (line for text in lines for line in text.splitlines() or [""]):
        shown = "".join(c if c.isprintable() else "?" for c in line)
        print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)


if __name__ == "__main__":
    sys.exit(main())
