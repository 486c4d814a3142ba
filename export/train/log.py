"""log.csv: the losses of a run, row by row; and curves.png, which shows them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.engines.named_files import read_regular
from runtime.errors import BundleError, MissingBackend, first_line
from runtime.files import file_error, replace_file, shown, stat_of

SCORE, SECONDS = "held_out", "seconds"
_INK, _LINE, _DOT = "#1a1a1a", "#0072b2", "#d55e00"  # Okabe and Ito's colours


class Log:
    """log.csv: a row has the step, the means of the loss and of its terms over the steps since the
    last row, what --select has computed on held-out pictures, and the seconds of training.

    Parameters
    ----------
    path : of the file. Rows are added to it.
    pending : the sums of steps that are in no row yet, of :attr:`pending`; None for no steps.
    scored : whether the rows have the column "held_out".

    Example
    -------
    >>> log = Log(folder / "log.csv")
    >>> log.add({"data": 0.5, "within": 0.1})
    >>> log.write(1, seconds=0.2, durable=True)
    {'loss': 0.6, 'data': 0.5, 'within': 0.1}
    """

    def __init__(
        self, path: Path, pending: Mapping[str, Any] | None = None, *, scored: bool = False
    ) -> None:
        self.path, self.scored = path, scored
        self.count: int = pending["count"] if pending else 0
        self.sums: dict[str, float] = dict(pending["sums"]) if pending else {}

    @property
    def pending(self) -> dict[str, Any]:
        """The sums of the steps that are in no row yet, for a checkpoint."""
        return {"count": self.count, "sums": dict(self.sums)}

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the terms of one step."""
        self.count += 1
        for name, value in {"loss": sum(losses.values()), **losses}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def write(
        self, step: int, *, seconds: float, score: float | None = None, durable: bool = False
    ) -> dict[str, float]:
        """Write a row, with the header before the first one.

        Parameters
        ----------
        step : updates that were made.
        seconds : of training.
        score : of the held-out pictures.
        durable : return only after the row is on the disk.

        Returns
        -------
        The means of the loss and of its terms.

        Raises
        ------
        InputError : the file cannot be written.
        """
        means = {name: total / self.count for name, total in self.sums.items()}
        row = {"step": str(step)} | {name: f"{value:.8g}" for name, value in means.items()}
        if self.scored:
            row[SCORE] = "" if score is None else f"{score:.8g}"
        row[SECONDS] = f"{seconds:.2f}"
        try:
            with self.path.open("ab") as file:
                if not file.tell():
                    file.write(f"{','.join(row)}\n".encode())
                file.write(f"{','.join(row.values())}\n".encode())
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise file_error("written", self.path, error) from error
        self.count, self.sums = 0, {}
        return means


def cut_log(path: Path, step: int) -> None:
    """Remove the rows after a step, which a run that is resumed writes again, and a last line that
    was not written whole.

    Raises
    ------
    InputError : the file cannot be read or written.
    BundleError : it is damaged; then nothing is changed.

    Example
    -------
    >>> cut_log(Path("runs/city/log.csv"), 500)
    >>> last_step(Path("runs/city/log.csv"))
    500
    """
    if stat_of(path) is None:
        return
    data, table = _read(path)
    kept = table[:1] + [row for row in table[1:] if int(row[0]) <= step]
    cut = "".join(f"{','.join(row)}\n" for row in kept).encode()
    if cut != data:
        try:
            replace_file(path, cut, durable=True)
        except OSError as error:
            raise file_error("written", path, error) from error


def last_step(path: Path) -> int:
    """The step of the last row of log.csv; 0 if it has no row, or does not exist.

    Raises
    ------
    InputError : the file cannot be read.
    BundleError : it is damaged.

    Example
    -------
    >>> last_step(Path("runs/city/log.csv"))
    3000
    """
    table = [] if stat_of(path) is None else _read(path)[1]
    return int(table[-1][0]) if len(table) > 1 else 0


def _read(path: Path) -> tuple[bytes, list[list[str]]]:
    """The bytes of log.csv, and the fields of its lines, of which the first one is the header. A
    last line that was not written whole is left out; BundleError for other damage."""
    data = read_regular(path, "the log of a run")
    lines, last = data.split(b"\n")[:-1], 0
    table: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = line.decode("ascii").split(",")
            if number == 1:
                if (row[0], row[-1]) != ("step", SECONDS) or len({*row}) < len(row):
                    raise ValueError("the first line is no header")
            else:
                last = _checked_step(row, table[0], last)
        except ValueError as error:
            raise BundleError(
                f"{shown(path)} is damaged: line {number}: {first_line(error)}",
                fix="restore it from a copy; or remove it, then --resume: its rows are lost",
            ) from error
        table.append(row)
    return data, table


def _checked_step(row: list[str], header: list[str], before: int) -> int:
    """The step of a row; ValueError unless the row fits the header and the step before it."""
    if len(row) != len(header):
        raise ValueError(f"it has {len(row)} values; wanted {len(header)}")
    if not re.fullmatch("[0-9]{1,10}", row[0]) or int(row[0]) <= before:
        raise ValueError(f"its step is {row[0][:20]!r}; wanted a whole number above {before}")
    for name, value in zip(header, row, strict=True):
        if value or name != SCORE:
            float(value)
    return int(row[0])


def check_matplotlib() -> None:
    """Check that the curves can be drawn.

    Raises
    ------
    MissingBackend : matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingBackend(
            f"matplotlib is needed to draw the losses, but {error}",
            fix="pip install 'dynaguide-edge[train]'",
        ) from error


def draw_curves(log: Path, out: Path, title: str) -> None:
    """Draw the columns of log.csv over the steps, one below the other, as a PNG.

    Parameters
    ----------
    log : log.csv. Nothing is drawn if it has no row, or does not exist.
    out : the picture, which is replaced whole or not at all.
    title : a line above the curves.

    Raises
    ------
    InputError : a file cannot be read or written.
    BundleError : the log is damaged.

    Example
    -------
    >>> draw_curves(Path("runs/city/log.csv"), Path("curves.png"), "segunify, 3000 steps")
    """
    columns = _columns(log)
    if not columns:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 1 + 1.6 * len(columns)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
    for (name, points), panel in zip(columns.items(), panels, strict=True):
        few = len(points) < 30
        panel.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_DOT if name == SCORE else _LINE,
            marker="o" if few else None,
            markersize=3,
            linewidth=1.4,
        )
        panel.set_ylabel("held-out\npictures" if name == SCORE else name, color=_INK)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_locator(MaxNLocator(4))
    panels[-1].set_xlabel("step", color=_INK)
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.align_ylabels()
    figure.suptitle(title, color=_INK, fontsize=11)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, dpi=100, format="png")
    try:
        replace_file(out, picture.getvalue())
    except OSError as error:
        raise file_error("written", out, error) from error


def _columns(log: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of each column of log.csv but the seconds."""
    if stat_of(log) is None:
        return {}
    table = _read(log)[1]
    columns: dict[str, list[tuple[int, float]]] = {}
    for row in table[1:]:
        for name, value in zip(table[0][1:-1], row[1:-1], strict=True):
            points = columns.setdefault(name, [])
            if value:
                points.append((int(row[0]), float(value)))
    return columns
