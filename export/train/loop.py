"""The loop: one step after the other, with checkpoints from which a run is resumed bit for bit."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.train.checkpoint import pack, restore, write_checkpoint
from export.train.config import MEASURES, LoopConfig
from export.train.log import Log, cut_log, draw_curves
from export.train.method import Batches, Method
from export.train.run import BEST, CHECKPOINT, CURVES, LOG_FILE, Checkpoint, resume_command
from runtime.errors import DeviceError, ExitCode, SdkError, first_line
from runtime.files import file_error, shown, stat_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class Interrupted(SdkError):
    """The user has ended the training; a checkpoint was written."""

    exit_code = ExitCode.INTERRUPTED


def seed_torch(seed: int, number: int) -> None:
    """Seed torch's global random numbers, so that they depend on ``seed`` and ``number`` alone.

    No state of a random generator has to be stored in a checkpoint: number 0 is for the initial
    weights, and number n for the n-th update.

    Example
    -------
    >>> seed_torch(0, number=1)
    >>> first = torch.rand(1)
    >>> seed_torch(0, number=1)
    >>> torch.equal(torch.rand(1), first)
    True
    """
    import torch

    words = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def train(
    method: Method,
    batches: Batches,
    config: LoopConfig,
    folder: Path,
    *,
    held: Batches | None = None,
    resumed: Checkpoint | None = None,
    score: Callable[[], float] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train until the last step, and write log, checkpoints and curves into the folder of the run.

    The result depends on the method, the batches, the config and, in its last bits, on the device,
    the number of threads and the versions of the libraries. On the CPU no bit of it depends on how
    often the training was interrupted and resumed. A GPU may sum in another order each time.

    Parameters
    ----------
    method : its module is on the device.
    batches : what the steps are made on.
    folder : of the run, which :func:`export.train.folder.claimed` has locked.
    held : the held-out pictures that ``score`` reads; the broken ones are named too.
    resumed : the checkpoint to start from; None starts at step 0.
    score : computes the value by which config.select chooses a checkpoint;
        :data:`export.train.config.MEASURES` says whether the lowest or the highest is best. None
        chooses the last checkpoint.
    stopped : whether the user has ended the training; asked after each step.
    report : called as report(step, loss) after each step.

    Returns
    -------
    The state of the last checkpoint, see :class:`export.train.run.Checkpoint`.

    Raises
    ------
    Interrupted : ``stopped`` was true; a checkpoint of the last step is written.
    SdkError : a loss, a score or a weight is not finite; the last checkpoint is kept.
    DeviceError : there is too little memory, or the GPU fails; the last checkpoint is kept.
    InputError : too many pictures are broken, or a file cannot be written.

    Example
    -------
    >>> with claimed(Path("runs/city"), resume=False):
    ...     train(method, batches, LoopConfig(steps=1000), Path("runs/city"))["step"]
    1000
    """
    optimiser = method.optimiser(config.lr)
    method.module.train()
    losses: dict[str, float] = {}
    first, before, best, broken = 0, 0.0, None, {}
    if resumed is not None:
        restore(resumed, method.module, optimiser, folder)
        state = resumed.state
        first, before, best = state["step"], state["seconds"], state["best"]
        losses, broken = state["losses"], state["broken"]
    else:
        _remove_log(folder / LOG_FILE)
    cut_log(folder / LOG_FILE, first)
    if resumed is not None and best is not None and best["step"] == first:
        # A kill may have come before best.safetensors was written.
        write_checkpoint(folder, pack(method.module, optimiser, state), BEST)
    log = Log(folder / LOG_FILE, resumed and resumed.state["log"], scored=score is not None)
    start = time.monotonic()
    with closing(batches.batches(first, config.steps)) as steps:
        for step in range(first + 1, config.steps + 1):
            with device_errors(f"in step {step}", folder):
                terms = _update(method, optimiser, next(steps), config, step, folder)
            log.add(terms)
            report(step, sum(terms.values()))
            due, stop = step % config.every == 0 or step == config.steps, stopped()
            value = None
            if due and score is not None:
                with device_errors(f"in step {step}", folder):
                    value = score()
                _check_score(value, method, config, step, folder)
            seconds = before + time.monotonic() - start
            if due or step % config.log_every == 0:
                losses = log.write(step, seconds=seconds, score=value, durable=due or stop)
            if not (due or stop):
                continue
            better = value is not None and (
                best is None or MEASURES[config.select].is_better(value, best["value"])
            )
            if better:
                best = {"step": step, "value": value}
            found = batches.broken | (held.broken if held else {})
            broken = {str(file): reason for file, reason in found.items()} | broken
            state = {
                "step": step,
                "broken": broken,
                "losses": losses,
                "seconds": seconds,
                "log": log.pending,
                "best": best,
            }
            try:
                data = pack(method.module, optimiser, state)
            except SdkError as error:
                raise SdkError(
                    f"{error.message}; {_kept(folder)}", fix=_again(method, folder)
                ) from error
            # The last checkpoint first: until it is written, the older best one is needed.
            write_checkpoint(folder, data)
            if better:
                write_checkpoint(folder, data, BEST)
            title = f"{method.name}, {step} step{'s' * (step > 1)}"
            draw_curves(folder / LOG_FILE, folder / CURVES, title)
            if stop and step < config.steps:
                raise Interrupted(
                    f"interrupted; the checkpoint of step {step} is in {shown(folder)}",
                    fix=resume_command(method.name, folder),
                )
    return state


def _update(
    method: Method,
    optimiser: Optimizer,
    batch: Any,
    config: LoopConfig,
    step: int,
    folder: Path,
) -> dict[str, float]:
    """Make one update of the weights; returns the terms of the loss before it."""
    import torch

    seed_torch(config.seed, step)
    kind = torch.device(config.device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        terms = method.losses(batch)
    values = {name: float(term.detach()) for name, term in terms.items()}
    if not all(map(math.isfinite, values.values())):
        shown_terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
        # No --lr had an effect yet in the first step.
        frozen = "check the weights of the frozen network"
        fix = _again(method, folder) if step > 1 else frozen
        raise SdkError(
            f"the loss is not finite in step {step}: {shown_terms}; {_kept(folder)}",
            fix=fix + (", or train with --precision fp32" if config.precision == "bf16" else ""),
        )
    optimiser.zero_grad()
    reduce(add, terms.values()).backward()
    method.before_update()
    optimiser.step()
    return values


def _check_score(value: float, method: Method, config: LoopConfig, step: int, folder: Path) -> None:
    """SdkError for a score that is not finite."""
    if not math.isfinite(value):
        name = MEASURES[config.select].name
        raise SdkError(
            f"the {name} of the held-out pictures is {value:g} after step {step}; {_kept(folder)}",
            fix=f"{_again(method, folder)}, or with --select last",
        )


def _again(method: Method, folder: Path) -> str:
    """The command that trains with smaller steps."""
    decay = " or --decay" if method.settings().get("decay") else ""
    return f"train again with a smaller --lr{decay}" + _elsewhere(folder)


def _elsewhere(folder: Path) -> str:
    """What a new run needs besides: another folder, if this one has a checkpoint."""
    return " and another -o" if _has_checkpoint(folder) else ""


def _remove_log(path: Path) -> None:
    """Remove the log of a run that ended before its first checkpoint, which starts again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise file_error("removed", path, error) from error


def _kept(folder: Path) -> str:
    """What an error says about the checkpoint."""
    if _has_checkpoint(folder):
        return "the last checkpoint is kept"
    return "there is no checkpoint yet"


def _has_checkpoint(folder: Path) -> bool:
    return stat_of(folder / CHECKPOINT) is not None


@contextmanager
def device_errors(when: str, folder: Path) -> Iterator[None]:
    """A block whose lack of memory, and whose failure of the GPU, is one DeviceError.

    Parameters
    ----------
    when : what the program does, for the message, such as "in step 3".
    folder : of the run.

    Raises
    ------
    DeviceError : there is too little memory, or the GPU fails.

    Example
    -------
    >>> with device_errors("in step 3", folder): loss.backward()
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SdkError):
            raise
        if _NO_MEMORY.search(str(error)):
            raise DeviceError(
                f"out of memory {when}; {_kept(folder)}",
                fix="train again with a smaller --batch or --imgsz" + _elsewhere(folder),
            ) from error
        if re.search("CUDA|cuDNN", str(error)):
            raise DeviceError(
                f"the GPU failed {when}: {first_line(error)}; {_kept(folder)}",
                fix="python -m runtime doctor; then run the command again"
                + " with --resume" * _has_checkpoint(folder),
            ) from error
        raise
