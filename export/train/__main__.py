"""The command python -m export train: train a head on the features of a frozen backbone."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from export.train import boosting, naming, on_backbone, refine, segunify
from export.train.config import MEASURES, PRECISIONS, LoopConfig
from export.train.folder import claimed
from export.train.loop import train
from export.train.run import (
    CHECKPOINT,
    ENTRY,
    Checkpoint,
    open_run,
    read_checkpoint,
    read_entry,
    resume_command,
    write_entry,
)
from export.train.start import listed_files, loop_config, prepare, steps_of
from runtime.device.driver import parse_device
from runtime.engines.named_files import shell_word, utf8_text
from runtime.errors import BundleError, ExitCode, InputError
from runtime.files import shown, stat_of
from runtime.tools.cli import (
    Parser,
    Paths,
    interrupt,
    option,
    out_path,
    printing,
    progress_bar,
    run,
    some_path,
)
from runtime.tools.output import finish

METHODS: dict[str, Any] = {"segunify": segunify, "boosting": boosting, "refine": refine}
_HELP = {
    "segunify": "find clusters in the features of a frozen backbone",
    "boosting": "find the object in the foreground by the features of a frozen backbone",
    "refine": "train the refinement of a prior on the pictures of a camera",
}
_SELECT_HELP = {
    "last": "the last checkpoint",
    "energy": "the one of the lowest energy on held-out pictures",
    "labels": "the one of the highest mIoU on them, which uses labels",
    "cold": "the one whose labels differ least from those of a refinement that starts cold",
}
# Options that do not change what is trained. The others must be those of a run that is resumed. The
# frozen network and the pictures may be at a new place; they are compared when they are found.
_FREE = ("steps", "every", "device", "workers", "threads", "backbone", "model", "data")
# Options that are not compared with run.json; the method is compared before them.
_LOCAL = (
    "out", "resume", "epochs", "cache", "cache_limit", "no_cache", "json", "quiet", "run", "method",
)  # fmt: skip
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOG = logging.getLogger("dg.train")


class _StoredParser(Parser):
    """A parser of options that run.json stores: a wrong one is a BundleError."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of an option."""
        raise BundleError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command of python -m export train.

    Parameters
    ----------
    argv : words of the command line after "train"; those of the process when None.

    Returns
    -------
    A :class:`runtime.errors.ExitCode`.
    """
    words = sys.argv[1:] if argv is None else argv
    return run(lambda: command(words), as_json="--json" in words)


def command(words: list[str]) -> int:
    """Run one command, whose errors are raised.

    Parameters
    ----------
    words : of the command line after "train".

    Returns
    -------
    A :class:`runtime.errors.ExitCode`.
    """
    args = _parser().parse_args(words)
    return args.run(args, words)


def _parser(
    method: str = "", defaults: Mapping[str, Any] | None = None, kind: type[Parser] = Parser
) -> Parser:
    """The parser of the command line. ``defaults`` replace the defaults of ``method``'s options."""
    parser = kind(
        "python -m export train",
        description="Train on a folder of pictures, without labels: a head on the features of a "
        "frozen backbone, or the refinement of a prior.",
        epilog="then: python -m export train name RUN, and python -m export --model RUN",
    )
    commands = parser.add_subparsers(required=True, metavar="METHOD")
    for name, module in METHODS.items():
        command = commands.add_parser(name, help=_HELP[name])
        _add_options(command, module)
        module.add_options(command)
        command.set_defaults(run=_train, method=name, **(defaults or {} if name == method else {}))
    command = commands.add_parser("name", help="name the clusters of a run by labelled pictures")
    naming.add_options(command)
    command.set_defaults(run=_name)
    return parser


def _add_options(parser: argparse.ArgumentParser, module: Any) -> None:
    """Add the options that all methods have, with the defaults of the method in ``module``."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "--data", nargs="+", action=Paths, metavar="FOLDER", help="pictures; no labels are needed"
    )
    what.add_argument("-o", "--out", type=out_path, required=True, help="folder of the run (RUN)")
    what.add_argument("--resume", action="store_true", help="continue the run in -o")

    loop = parser.add_argument_group("training")
    epochs = module.DEFAULTS.get("epochs")
    own = LoopConfig(**{k: v for k, v in module.DEFAULTS.items() if k != "epochs"})
    length = loop.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="updates" + f" ({own.steps})" * (epochs is None))
    length.add_argument(
        "--epochs",
        type=int,
        help="passes over all views to train on, rounded up to whole steps, instead of --steps"
        + f" ({epochs})" * (epochs is not None),
    )
    loop.add_argument("--batch", type=int, default=own.batch, help="views in a step (%(default)s)")
    loop.add_argument("--lr", type=float, default=own.lr, help="learning rate (%(default)s)")
    loop.add_argument("--seed", type=int, default=own.seed, help="of all random numbers (0)")
    loop.add_argument(
        "--device", type=option(_device), default="cpu", help="cpu, cuda:0 (%(default)s)"
    )
    loop.add_argument("--precision", choices=PRECISIONS, default=own.precision, help="(fp32)")
    loop.add_argument(
        "--workers", type=int, default=own.workers, help="processes that read pictures (0)"
    )
    loop.add_argument("--threads", type=int, help="threads of torch on the CPU (torch's default)")
    loop.add_argument(
        "--every", type=int, default=own.every, help="steps between checkpoints (%(default)s)"
    )
    loop.add_argument(
        "--log-every",
        type=int,
        default=own.log_every,
        help="steps between rows of log.csv (%(default)s)",
    )

    choice = parser.add_argument_group("choice of the checkpoint")
    choice.add_argument(
        "--select",
        choices=module.SELECTS,
        default=own.select,
        help="; ".join(f"{word}: {_SELECT_HELP[word]}" for word in module.SELECTS)
        + " (%(default)s)",
    )
    choice.add_argument(
        "--holdout", type=float, metavar="SHARE", help="pictures that only --select uses (0.1)"
    )
    if "labels" in module.SELECTS:
        choice.add_argument("--labels", type=_absolute, help="their folder, for --select labels")
        choice.add_argument("--classes", type=_absolute, help="their file, for --select labels")

    cache = parser.add_argument_group("cache of what the frozen network computes")
    cache.add_argument("--cache", type=out_path, metavar="DIR", help="its folder (the user's)")
    cache.add_argument(
        "--cache-limit", type=float, default=20.0, metavar="GIB", help="its size (%(default)s)"
    )
    cache.add_argument("--no-cache", action="store_true", help="store nothing")

    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="one JSON document on stdout")
    out.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _absolute(text: str) -> str:
    """A path that is right in any current folder."""
    return os.path.abspath(some_path(text))


def _device(text: str) -> str:
    """The device as torch names it, such as "cuda:0". InputError for another text."""
    kind, index = parse_device(text)
    return kind if kind == "cpu" else f"{kind}:{index}"


def _name(args: argparse.Namespace, _: list[str]) -> int:
    """Run the command name, whose warnings are printed."""
    with _printed_log(args.quiet):
        return naming.run(args)


def _train(args: argparse.Namespace, words: list[str]) -> int:
    """Train as ``args`` says, print the result, and return the exit code."""
    with _on_endings(interrupt), _printed_log(args.quiet):
        entry = read_entry(args.out) if args.resume else None
        if entry is not None:
            args = _resumed(args, words, entry)
        else:
            args.steps = _steps(args, lambda: len(listed_files(args, None)))
        config = loop_config(args, METHODS[args.method].SELECTS)
        with claimed(args.out, resume=args.resume):
            checkpoint = None
            if entry is not None and stat_of(args.out / CHECKPOINT) is not None:
                checkpoint = read_checkpoint(args.out)
                if checkpoint.state["best"] is not None:
                    open_run(args.out)  # checks the checkpoint that --select chose
                checkpoint = _moved(checkpoint, entry["data"], args.data)
            finished = checkpoint is not None and checkpoint.step >= config.steps
            if checkpoint is not None and finished:
                state = checkpoint.state
                LOG.info("%s is finished: all %d steps were made", shown(args.out), config.steps)
            else:
                state = _trained(args, words, config, entry, checkpoint)
    keys = ("step", "losses", "seconds", "best", "broken")
    document = {"run": utf8_text(str(args.out)), "method": args.method, "steps": config.steps}
    finish(args.json, document | {key: state[key] for key in keys}, _summary(args, state, finished))
    return ExitCode.DONE


def _steps(args: argparse.Namespace, files: Callable[[], int]) -> int:
    """The number of steps that the command line names, or else that the method has; ``files``
    returns the number of pictures."""
    if args.steps is not None:
        return args.steps
    module = METHODS[args.method]
    epochs = module.DEFAULTS.get("epochs") if args.epochs is None else args.epochs
    if epochs is None:
        return module.DEFAULTS.get("steps", LoopConfig.steps)
    views = module.view_rule(args).count if hasattr(module, "view_rule") else 1
    return steps_of(epochs, files(), views, args)


def _trained(
    args: argparse.Namespace,
    words: list[str],
    config: LoopConfig,
    entry: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Train in the folder, which is locked; ``entry`` and ``checkpoint`` are those of a run that is
    resumed. Returns the state of the last checkpoint."""
    method, batches, config, made, score, held = prepare(
        METHODS[args.method],
        args,
        config,
        listed_files(args, entry),
        command=" ".join(map(shell_word, ["python", "-m", "export", "train", *words])),
        options=_own_options(args),
        entry=entry,
        checkpoint=checkpoint,
    )
    first = checkpoint.step if checkpoint else 0
    with _stop_flag() as stopped, _Progress(args, first) as progress:

        def report(step: int, loss: float) -> None:
            # Not before, so that an error in the first step of all leaves no run behind.
            if step == first + 1 and made != entry:
                write_entry(args.out, made)
            progress.report(step, loss)

        return train(
            method, batches, config, args.out, held=held, resumed=checkpoint, score=score,
            stopped=stopped, report=report,
        )  # fmt: skip


def _summary(args: argparse.Namespace, state: Mapping[str, Any], finished: bool) -> Iterator[str]:
    """Yield the lines that the training prints at its end; ``finished``: the run was so before."""
    out = shell_word(str(args.out))
    made = f"step {state['step']}, {state['seconds']:.0f} s in all"
    if finished:
        yield f"kept     {shown(args.out)}/  ({made}; nothing was trained)"
    else:
        yield f"saved    {shown(args.out)}/  ({made})"
    losses = ", ".join(f"{name} {value:.4g}" for name, value in state["losses"].items())
    yield f"losses   {losses}"
    if best := state["best"]:
        name = MEASURES[args.select].name
        yield f"selected step {best['step']}: {name} {best['value']:.4g} on held-out pictures"
    if broken := state["broken"]:
        # A reason names the file: the picture, or its labels.
        pictures = f"{len(broken)} broken picture{'s' * (len(broken) > 1)}"
        yield f"skipped  {pictures}: {'; '.join([*broken.values()][:3])}"
    if args.method == naming.METHOD:
        yield f"next     python -m export train name {out} --labels DIR --classes FILE"
    yield f"next     python -m export --model {out} -o NAME.bundle"


def _own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the method alone, for run.json."""
    own = Parser()
    METHODS[args.method].add_options(own)
    names = vars(own.parse_args([])).keys() - set(on_backbone.OPTIONS)
    return {name: getattr(args, name) for name in sorted(names)}


def _resumed(
    args: argparse.Namespace, words: list[str], entry: dict[str, Any]
) -> argparse.Namespace:
    """The options of a run that is resumed: those of run.json where ``words`` name none.

    InputError if an option that changes what is trained differs from that of the run.
    """
    if entry["method"] != args.method:
        raise InputError(
            f"{shown(args.out)} is a run of {entry['method']}, not of {args.method}",
            fix=resume_command(entry["method"], args.out),
        )
    known = vars(args).keys() - set(_LOCAL)
    views = on_backbone.stored_options(entry)
    stored = entry["loop"] | entry["options"] | {k: v for k, v in views.items() if k in known}
    stored["data"] = tuple(entry["data"])
    for name in {"labels", "classes"} - known:  # of LoopConfig; the method has no such option
        del stored[name]
    if stored.keys() != known:
        raise BundleError(
            f"{shown(args.out / ENTRY)} has the options of another version of the program: "
            f"{', '.join(sorted(stored.keys() ^ known)[:5])}",
            fix="resume it with that version, or train again with another -o",
        )
    stored |= _checked(args, {k: v for k, v in stored.items() if k not in ("data", "backbone")})
    # Not the steps, because the parser must see whether the words name them.
    defaults = {name: value for name, value in stored.items() if name != "steps"}
    args = _parser(args.method, defaults).parse_args(words)
    named = args.steps is not None or args.epochs is not None
    args.steps = _steps(args, lambda: entry["files"]) if named else stored["steps"]
    changed = [name for name, value in stored.items() if getattr(args, name) != value]
    if wrong := sorted(set(changed) - set(_FREE)):
        options = [name.replace("_", "-") for name in wrong]
        pairs = [
            f"{option} is {getattr(args, name)}, not {stored[name]}"
            for option, name in zip(options, wrong, strict=True)
        ]
        raise InputError(
            f"a run that is resumed keeps its options, but {'; '.join(pairs)}",
            fix=f"leave out {', '.join('--' + option for option in options)}",
        )
    if args.steps < stored["steps"]:
        raise InputError(
            f"steps is {args.steps}; the run was started with {stored['steps']}",
            fix="leave --steps and --epochs out, or state a larger number",
        )
    if inexact := [name for name in changed if name in ("device", "workers", "threads")]:
        LOG.warning(
            "%s changed: the last bits of the result may differ from those of a run without an "
            "interruption",
            " and ".join(inexact),
        )
    if len(args.data) != len(stored["data"]):
        raise InputError(
            f"data names {len(args.data)} places, and the run was started with "
            f"{len(stored['data'])}",
            fix="name the new place of each, in the order of: " + " ".join(entry["data"]),
        )
    return args


def _moved(checkpoint: Checkpoint, old: Sequence[str], new: Sequence[str]) -> Checkpoint:
    """The checkpoint with the present paths of its broken pictures, whose places were moved from
    ``old`` to ``new``."""
    places = dict(zip(old, new, strict=True))

    def moved(file: str) -> str:
        folder, name = os.path.split(file)
        return os.path.join(places[folder], name) if folder in places else places.get(file, file)

    broken = {moved(file): reason for file, reason in checkpoint.state["broken"].items()}
    return checkpoint._replace(state=checkpoint.state | {"broken": broken})


def _checked(args: argparse.Namespace, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Options of run.json as the parser reads them from a command line; BundleError for a value
    that an option cannot have."""
    words = [args.method, f"--out={args.out}"]
    for name, value in stored.items():
        word = name.replace("_", "-")
        if isinstance(value, bool) and isinstance(getattr(args, name), bool):
            words.append(f"--{word}" if value else f"--no-{word}")
        elif value is not None:
            words.append(f"--{word}={value}")
    try:
        found = vars(_parser(kind=_StoredParser).parse_args(words))
    except BundleError as error:
        raise BundleError(
            f"{shown(args.out / ENTRY)}: {error.message}",
            fix="copy the run again, or train again with another -o",
        ) from error
    return {name: found[name] for name in stored}


@contextmanager
def _on_endings(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A block in which Ctrl-C, SIGTERM and SIGHUP call ``handler``."""
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    try:
        for number, old in before.items():
            if old is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """A block in which the first Ctrl-C, or another signal that ends the process, is noted, so that
    a checkpoint can be written; the second one interrupts. The value says whether it was noted."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    with _on_endings(note):
        yield lambda: bool(noted)


class _Progress:
    """How far the training is: a bar with loss and time left on a terminal, else a line for every
    10 %. Use it in a with statement."""

    def __init__(self, args: argparse.Namespace, first: int) -> None:
        self.quiet, self.steps, self.first = args.quiet, args.steps, first
        self.start, self.tenth = time.monotonic(), 10 * first // args.steps
        self.bar: Any = None
        if not args.quiet and sys.stderr.isatty():
            self.bar = progress_bar(total=args.steps, initial=first, desc=args.method, unit="step")

    def report(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            self.bar.update(1)
        elif not self.quiet and (tenth := 10 * step // self.steps) > self.tenth:
            self.tenth, used = tenth, time.monotonic() - self.start
            left = used / (step - self.first) * (self.steps - step)
            with printing():
                print(
                    f"  {10 * tenth:3d} %  step {step}, loss {loss:.4g}, {left:.0f} s left",
                    file=sys.stderr,
                )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class _Printer(logging.Handler):
    """Prints messages on stderr, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        from tqdm import tqdm

        start = "WARNING: " if record.levelno >= logging.WARNING else ""
        with printing():
            tqdm.write(f"{start}{record.getMessage()}", file=sys.stderr)


@contextmanager
def _printed_log(quiet: bool) -> Iterator[None]:
    """A block in which the messages of the training are printed; ``quiet``: the warnings alone."""
    handler, before = _Printer(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)


if __name__ == "__main__":
    sys.exit(main())
