"""python -m runtime check: compare a bundle's outputs on this machine with its golden vectors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from runtime.bundle import golden
from runtime.bundle.open import (
    fitting_engine,
    open_graph,
    open_prior,
    open_refinement,
    starts_trained,
)
from runtime.bundle.read import Bundle
from runtime.device.driver import (
    cuda_devices,
    cuda_problem,
    parse_device,
    platform_tag,
)
from runtime.engines.onnx_runtime import import_onnxruntime
from runtime.errors import (
    BundleError,
    EngineMismatch,
    ExitCode,
    InputError,
    MissingBackend,
    SdkError,
)
from runtime.tools.inspect import read_all
from runtime.tools.output import WIDTH, as_json, listed, pairs, print_json, say, size, wrapped


class _Checks:
    """The results of all checks. Unless ``quiet``, each is printed as soon as its check ends."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.done: list[dict[str, Any]] = []
        self.failed: list[SdkError] = []

    def make(
        self, name: str, work: Callable[..., Any], *arguments: Any, may_miss: bool = False
    ) -> Any:
        """Make one check, print its line and keep its result.

        Parameters
        ----------
        name : the check's name in the line.
        work : called with ``arguments``; returns None, a text or numbers for the line, or raises an
            SdkError if the check fails.
        may_miss : the check does not fail, but is "not run here", if a device or package is missing
            or an engine was built for another device.

        Returns
        -------
        What ``work`` returns, or None if the check's state is not "ok".
        """
        result: dict[str, Any] = {"check": name, "state": "ok"}
        out = None
        try:
            out = work(*arguments)
        except SdkError as error:
            missing = isinstance(error, MissingBackend)
            result |= {"state": "MISSING" if missing else "FAILED"} | as_json(error)
            if may_miss and (missing or isinstance(error, EngineMismatch)):
                result["state"] = "not run here"
            else:
                self.failed.append(error)
        if isinstance(out, dict):
            result["numbers"] = out
        detail = result.get("error") or (pairs(out) if isinstance(out, dict) else out)
        result["detail"] = detail if isinstance(detail, str) else ""
        self.done.append(result)
        if not self.quiet:
            text = result["state"] + (f": {result['detail']}" if result["detail"] else "")
            say(f"  {line}" for line in _columns(name, text))
            if result.get("fix") and result["state"] != "not run here":
                say(f"  {line}" for line in _columns("", f"fix: {result['fix']}"))
        return out if result["state"] == "ok" else None

    def names(self, *states: str) -> list[str]:
        """Return the names of the checks in these states, as "ok" or "FAILED"."""
        return [check["check"] for check in self.done if check["state"] in states]

    def count(self, state: str) -> int:
        """Return the number of checks in one state, as "ok" or "FAILED"."""
        return len(self.names(state))

    def exit_code(self) -> ExitCode:
        """Return the exit code: BUNDLE if a check of the bundle failed, else MISSING if a library,
        a driver or a GPU is missing, else FAILURE if the device failed or the operating system
        refuses to read a file, else DONE."""
        codes = {
            ExitCode.BUNDLE
            if isinstance(error, InputError) and not isinstance(error.__cause__, OSError)
            else error.exit_code
            for error in self.failed
        }
        return max(codes, default=ExitCode.DONE)


def _columns(name: str, text: str) -> Iterator[str]:
    """Yield the lines of a check: its name in the first column, its text in the second."""
    head = f"{name:36}"
    for line in wrapped(text, WIDTH - 38):
        yield head + line
        head = " " * 36


def run_check(args: argparse.Namespace) -> int:
    """Run the command check.

    Returns
    -------
    ExitCode.DONE, BUNDLE, MISSING or FAILURE; see ``_Checks.exit_code``.

    Raises
    ------
    InputError : the bundle's folder does not exist, or ``args.device`` names no device.
    BundleError : the manifest cannot be read.
    """
    _, index = parse_device(args.device)
    bundle = Bundle.open(args.bundle)
    checks = _Checks(quiet=args.json)
    files = read_all(bundle)[0]
    for file in files:
        checks.make(file["file"], _file_fits, bundle, file)
    checks.make("environment", _environment)
    if not checks.failed:
        for name in bundle.manifest["graphs"]:
            checks.make(f"graph {name}", _graph_fits, bundle, name, args.device)
    not_run = sum(file["role"] == "engine" and file["ok"] for file in files)
    if checks.failed:
        checks.make("golden", _cannot_run, checks.names("FAILED", "MISSING"), may_miss=True)
    else:
        on_cpu, on_device = {"backend": "native"}, {"backend": "onnx", "device": args.device}
        for refine in (on_cpu, on_device):
            name = f"golden, refined by {refine['backend']}"
            checks.make(name, _golden, bundle, {"device": args.device}, refine)
        not_run = _check_engines(bundle, checks, index, required=args.engines)
    code = checks.exit_code()
    good, left = checks.count("ok"), checks.count("not run here")
    bad, missing = checks.count("FAILED"), checks.count("MISSING")
    if args.json:
        document = {"bundle": str(bundle.path), "ok": not code, "device": args.device}
        document["engines_not_run"] = not_run
        print_json(document | {"checks": checks.done} | as_json(next(iter(checks.failed), None)))
    else:
        verdict = "FAILED" if bad else "is not wholly checked" if missing else "is sound"
        if not_run and verdict == "is sound":
            engines = "1 engine was" if not_run == 1 else f"{not_run} engines were"
            verdict += f", but {engines} not run"
        counts = ((good, "ok"), (bad, "failed"), (missing, "missing"), (left, "not run here"))
        numbers = ", ".join(f"{count} {state}" for count, state in counts if count)
        say([f"{bundle.name} {verdict}: {numbers}"])
    return code


def _file_fits(bundle: Bundle, file: Mapping[str, Any]) -> str:
    """Raise the problem of a file, as read_all found it; otherwise describe the file. InputError if
    the operating system refuses to read the file."""
    if not file["ok"]:
        with suppress(BundleError):
            bundle.read(file)
        raise BundleError(file["error"], fix=file["fix"])
    return f"sha256 {file['sha256'][:12]}, {size(file['size'])}"


def _cannot_run(failed: list[str]) -> None:
    raise MissingBackend(
        f"the golden vectors were not compared, because these checks failed: {listed(failed, 8)}",
        fix="remove the causes of these failures, and check again",
    )


def _environment() -> str:
    """Describe the machine and the libraries that the checks use."""
    from runtime.device.choose import isa

    onnxruntime = import_onnxruntime("check a bundle")
    problem = cuda_problem()
    if problem is None:
        gpus = ", ".join(f"{g.name} ({g.compute_capability})" for g in cuda_devices())
    elif isinstance(problem, MissingBackend):
        gpus = f"no GPU: {problem.message}"
    else:  # The driver fails; the checks on the CPU do not need it.
        gpus = f"GPUs cannot be used: {problem.message}"
    return f"{platform_tag()}, core {isa()}, ONNX Runtime {onnxruntime.__version__}, {gpus}"


def _graph_fits(bundle: Bundle, name: str, device: str) -> str:
    """Load a graph on ONNX Runtime and describe it; open_graph checks its inputs and outputs."""
    loaded = open_graph(bundle, name, backend="onnx", device=device)
    loaded.engine.close()
    return f"{loaded.text}, inputs and outputs fit"


def _golden(bundle: Bundle, prior: dict[str, Any], refine: dict[str, Any]) -> dict[str, float]:
    """Compare all golden vectors and return the worst value of each number.

    Parameters
    ----------
    prior, refine : keyword arguments of open_prior and open_refinement (runtime.bundle.open).
    """
    opened, _ = open_prior(bundle, **prior)
    refinement, config = open_refinement(bundle, **refine), bundle.refine()
    worst: dict[str, float] = {}
    for entry in bundle.manifest["golden"]:
        steps, arrays = entry["steps"], bundle.tensors(entry)
        height, width, *_ = (*arrays.get("labels", np.zeros(0)).shape, 0, 0)
        if refinement.size not in (None, (height, width)):
            raise EngineMismatch(
                f"the golden picture is refined at {height} x {width}, the engines take only "
                f"{refinement.size[0]} x {refinement.size[1]}",
                fix="export the bundle again, with golden vectors of the engines' size",
            )
        result = golden.compare(
            arrays,
            steps,
            opened,
            config,
            refinement.make(replace(config, steps=steps)),
            warm=starts_trained(bundle, config),
            name=f"{bundle.name}/{entry['file']}",
        )
        for key, value in result.items():
            pick = max if key in ("input", "losses") else min
            worst[key] = pick(value, worst.get(key, value))
    return worst


def _check_engines(bundle: Bundle, checks: _Checks, index: int, *, required: bool) -> int:
    """Load the engines that fit this machine, and compare their outputs with the golden vectors.

    Parameters
    ----------
    index : the number of the GPU.
    required : an engine that this machine cannot run is a failure.

    Returns
    -------
    The number of engines that were not run.
    """
    from runtime.bundle.engines import RUNTIMES

    engines = bundle.manifest["engines"]
    if required and not engines:
        checks.make("engines", _no_engines, bundle)
    ran = 0
    for target, name in RUNTIMES.items():
        on_gpu = {"backend": target, "device": f"cuda:{index}"}
        loaded = set()
        for entry in engines:
            title = f"engine {entry['graph']} {entry['key']}"
            if entry["runtime"] == name and checks.make(
                title, _engine_fits, bundle, entry, target, index, may_miss=not required
            ):
                loaded.add(entry["graph"])
        refines = {"refine_step", "refine_map"} <= loaded
        if "prior" in loaded or refines:
            prior, refine = on_gpu if "prior" in loaded else {}, on_gpu if refines else {}
            title = f"golden, on {target} engines"
            checks.make(title, _golden, bundle, prior, refine, may_miss=not required)
            if title not in checks.names("not run here", "MISSING"):
                # The golden vectors do not need cnn, so loading it is its whole check.
                ran += len(loaded if refines else loaded & {"prior", "cnn"})
    return len(engines) - ran


def _engine_fits(bundle: Bundle, entry: Mapping[str, Any], target: str, index: int) -> str:
    """Load an engine, if it is the one that GPU ``index`` uses, and describe it."""
    problem = cuda_problem()
    if isinstance(problem, MissingBackend):
        raise MissingBackend(f"no GPU: {problem.message}", fix=problem.fix) from problem
    if problem is not None:  # the driver fails
        raise problem
    found = fitting_engine(bundle, entry["graph"], target, index)
    if found["key"] != entry["key"]:
        raise EngineMismatch(
            f"this GPU uses another engine of the bundle: {found['key']}",
            fix="leave --engines out: engines for other GPUs cannot run on this one",
        )
    loaded = open_graph(bundle, entry["graph"], backend=target, device=f"cuda:{index}")
    loaded.engine.close()
    return f"{loaded.text}, inputs and outputs fit"


def _no_engines(bundle: Bundle) -> None:
    raise MissingBackend(
        f"{bundle.name} has no engines", fix=f"python -m runtime build {bundle.path}"
    )
