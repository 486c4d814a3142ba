"""Write the contents of latency documents as one HTML page, which loads no other file.

    python -m benchmarks report DIR [-o PAGE.html]

The command reads all JSON files in DIR and in the folders below that `benchmarks latency` wrote.
"""

from __future__ import annotations

import argparse
import colorsys
import html
import io
import json
import os
import sys
from typing import Any

import numpy as np

from benchmarks.latency import document as documents
from benchmarks.latency import reading, web_table
from runtime.errors import InputError, MissingBackend
from runtime.files import file_error, real_path, shown, write_atomic
from runtime.tools.cli import Parser, out_path, some_path

GREY = "#8A8A8A"
COLOURS = (  # by Okabe and Ito: people with any colour vision can distinguish them
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", GREY, "#B8A900",
)  # fmt: skip
INK = "#1b1b1c"  # of lines and texts in figures; the page's text colour replaces it
STYLE = f"""
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: {web_table.WIDTH}px; margin: 2em auto;
  padding: 0 16px; background: #fff; color: #1a1a1a }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere }} h2 {{ font-size: 1.2em; margin-top: 2em }}
figure {{ margin: 1em 0 }} svg {{ width: 100%; height: auto }}
figcaption, li, .below {{ font-size: 13px; color: #444; overflow-wrap: anywhere }}
.bad {{ color: #b00020 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181c; color: #e6e6e6 }}
  figcaption, li, .below {{ color: #b5b5b5 }} .bad {{ color: #ff8a8a }} }}
{web_table.STYLE}"""


def _check_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingBackend(
            "the page's plots need matplotlib", fix="pip install 'dynaguide-edge[bench]'"
        ) from error


def _figure(width: float, height: float, rows: int = 1) -> Any:
    """A figure of ``width`` times ``height`` inches, and its ``rows`` axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """A figure as SVG, with the page's text colour in place of INK."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dg", "font.size": 9}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    return text.replace(INK, "currentColor")


def distributions(rows: list[dict[str, Any]]) -> str:
    """The histograms of all samples, one for each row, with the row's percentiles; as SVG."""
    figure, axes = _figure(9, 0.6 + 1.15 * len(rows), len(rows))
    ends = [t for r in rows for t in r["total_ms"]]
    logarithmic = max(ends) > 10 * min(ends)
    edges = np.linspace(min(ends) * 0.98, max(ends) * 1.02, 90)
    if logarithmic:
        edges = np.geomspace(min(ends) * 0.95, max(ends) * 1.05, 90)
    for axis, row in zip(axes, rows, strict=True):
        axis.hist(row["total_ms"], edges, color=COLOURS[0])
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        for i, (name, found) in enumerate(row["summary"]["percentiles"].items()):
            if found["value"] is not None:
                colour = COLOURS[(5, 3, 1, 2)[i % 4]]
                axis.axvline(found["value"], color=colour, label=f"{name} {found['value']:.1f} ms")
        axis.set_title(f"{row['name']} (n={len(row['total_ms'])})", loc="left", fontsize=9)
        axis.set_yticks([])
        if axis.get_legend_handles_labels()[1]:
            axis.legend(
                frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 0.9)
            )
    axes[-1].set_xlabel("milliseconds" + (", logarithmic" if logarithmic else ""))
    return _svg(figure)


def waterfall(rows: list[dict[str, Any]]) -> str:
    """A bar for each row, composed of the medians of its stages; as SVG."""
    return _svg(draw_waterfall(rows))


def draw_waterfall(rows: list[dict[str, Any]]) -> Any:
    """The figure of :func:`waterfall`. It shows every stage of a row except waiting ("queue")."""
    figure, (axis,) = _figure(9, 1.2 + 0.4 * len(rows))
    shown = stage_colours([name for name in documents.stages(rows) if name != "queue"])
    for at, row in enumerate(rows):
        left = 0.0
        for stage, colour in shown.items():
            width = max(0.0, row["stage_p50_ms"].get(stage, 0.0))
            axis.barh(at, width, left=left, color=colour, label=stage if at == 0 else None)
            left += width
        text = f"{left:.1f} ms"
        axis.annotate(text, (left, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("milliseconds, sum of the stages' medians (without waiting)")
    axis.legend(frameon=False, ncols=4, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def stage_colours(stages: list[str]) -> dict[str, str]:
    """A different colour for each stage. The first stages have the colours of COLOURS without GREY,
    which is the colour of "unaccounted"."""
    named = [name for name in stages if name != documents.REST]
    plain = [colour for colour in COLOURS if colour != GREY]
    more = len(named) - len(plain)
    hues = (colorsys.hsv_to_rgb((i + 0.5) / more, 0.5, 0.6) for i in range(more))
    plain += ["#" + "".join(f"{round(255 * part):02X}" for part in rgb) for rgb in hues]
    found = dict(zip(named, plain, strict=False)) | {documents.REST: GREY}
    return {name: found[name] for name in stages}


def over_time(rows: list[dict[str, Any]]) -> str:
    """All samples over the time at which they were taken, with rings around outliers; as SVG.
    Documents without these times are drawn over the numbers of the samples."""
    figure, axes = _figure(9, 0.6 + 1.3 * len(rows), len(rows))
    timed = all("start_s" in row for row in rows)
    for axis, row in zip(axes, rows, strict=True):
        at = row["start_s"] if timed else range(len(row["total_ms"]))
        axis.plot(at, row["total_ms"], ".", color=COLOURS[0], markersize=3)
        listed = row["summary"].get("outliers", [])
        axis.plot(
            [at[o["index"]] for o in listed],
            [o["ms"] for o in listed],
            "o",
            mfc="none",
            mec=COLOURS[5],
            markersize=6,
        )
        axis.set_title(row["name"], loc="left", fontsize=9)
        axis.set_ylabel("ms")
        axis.set_ylim(0, 1.12 * max(row["total_ms"]))
        axis.axhline(np.median(row["total_ms"]), color=GREY, linewidth=0.8)
    axes[-1].set_xlabel("seconds" if timed else "number of the sample")
    return _svg(figure)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """The indices of the points on the Pareto front, sorted by latency.

    Parameters
    ----------
    points : (latency, quality) of each. A point is on the front if no other point has a lower
        latency and at least its quality.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front, best = [], float("-inf")
    for i in order:
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def quality(rows: list[dict[str, Any]]) -> str:
    """The median latency of each row over its quality, with the Pareto front; as SVG."""
    figure, (axis,) = _figure(9, 4)
    points = [(float(np.median(r["total_ms"])), float(r["quality"]["value"])) for r in rows]
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    for mode, colour in zip(modes, COLOURS, strict=False):
        mine = [(p, r) for p, r in zip(points, rows, strict=True) if r["mode"] == mode]
        axis.plot(*zip(*(p for p, _ in mine), strict=True), "o", color=colour, label=mode)
    front = [points[i] for i in pareto(points)]
    if len(front) > 1:
        axis.plot(*zip(*front, strict=True), "--", color=GREY, label="Pareto front")
    axis.set_xlabel("milliseconds, median (labels: steps / threads)")
    axis.set_ylabel(rows[0]["quality"]["what"])
    axis.margins(x=0.15, y=0.15)
    axis.legend(frameon=False)
    figure.draw_without_rendering()  # this computes the places of the points
    taken: list[tuple[float, float]] = []
    for point, row in sorted(zip(points, rows, strict=True), key=lambda both: both[0]):
        x, y = axis.transData.transform(point) * 72 / figure.dpi
        free = (n for n in (4, -11, 13, -20, 22, -29, 31) if is_free(x + 4, y + n, taken))
        up = next(free, 4)
        taken.append((x + 4, y + up))
        text = f"{row['steps']}/{row['threads']}"
        axis.annotate(text, point, (4, up), textcoords="offset points", fontsize=7)
    return _svg(figure)


def is_free(x: float, y: float, taken: list[tuple[float, float]]) -> bool:
    """Whether a label at (x, y) touches none of the labels ``taken``; all in typographic points."""
    return all(abs(x - a) > 20 or abs(y - b) > 8 for a, b in taken)


def render(found: dict[str, dict[str, Any]]) -> str:
    """The page, as HTML.

    Parameters
    ----------
    found : documents by their names, as :func:`benchmarks.latency.reading.load` returns them.

    Raises
    ------
    MissingBackend : matplotlib is not installed.
    """
    _check_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rc("text", color=INK, parse_math=False)  # a "$" in a name begins no formula
        matplotlib.rc("axes", edgecolor=INK, labelcolor=INK, facecolor="none")
        matplotlib.rc("xtick", color=INK)
        matplotlib.rc("ytick", color=INK)
        matplotlib.rc("figure", facecolor="none")
        matplotlib.rc("savefig", facecolor="none")
        return _render(found)


def _render(found: dict[str, dict[str, Any]]) -> str:
    from benchmarks.latency.samples import needed

    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Latency</title>"]
    parts.append(f"<style>{STYLE}</style>")
    for name, document in found.items():
        parts.append(f"<h1>{html.escape(name)}: {html.escape(str(document['prior']))}</h1>")
        if document.get("partial"):
            parts.append("<p class=bad>Partial: the measurement was interrupted.</p>")
        parts.append(f"<p>Clock: {html.escape(document['scope'])}.</p>")
        below = documents.below(document)
        for title, lines in documents.tables(document).items():
            made = web_table.as_html(lines, below.get(title, ""))
            parts.append(f"<h2>{html.escape(title)}</h2>{made}")
        parts.append(f"<h2>Notes</h2><ul>{_notes(document)}</ul>")
        rows = [r for r in document["rows"] if r["total_ms"]]
        if rows:
            for title, draw in (
                ("Distribution", distributions),
                ("Stages", waterfall),
                ("Latency over time", over_time),
            ):
                parts.append(f"<h2>{title}</h2><figure>{draw(rows)}</figure>")
        parts.append("<h2>Latency and quality</h2>")
        enough = [r for r in rows if r["summary"]["independent"] >= needed(0.5)]
        rated = [r for r in enough if np.isfinite(r["quality"].get("value", np.nan))]
        if rated:
            parts.append(f"<figure>{quality(rated)}</figure>")
        else:
            parts.append(
                "<p>Quality: not measured (that needs --labels, or a bundle), or no row has enough "
                "samples.</p>"
            )
        parts.append("<h2>Environment</h2>" + _facts(document))
    return "\n".join(parts) + "</html>\n"


def _notes(document: dict[str, Any]) -> str:
    """The notes as items of a list, without the clock, which is above the tables. All notes of a
    row are one item."""
    items: dict[str, list[str]] = {}
    names = [row["name"] for row in document["rows"]]
    for note in documents.notes(document)[1:]:
        row = next((name for name in names if note.startswith(f"{name}: ")), "")
        items.setdefault(row or note, []).append(note[len(row) + 2 :] if row else "")
    made = ""
    for head, said in items.items():
        lines = "".join(f"<br>{html.escape(line)}" for line in said if line)
        made += f"<li><b>{html.escape(head)}</b>{lines}" if lines else f"<li>{html.escape(head)}"
    return made


def _facts(document: dict[str, Any]) -> str:
    """The table of the command, the environment and the hashes."""
    facts = {"command": " ".join(map(str, document["command"])), **document["environment"]}
    if "threads" in facts:
        facts["threads of the machine"] = facts.pop("threads")
    facts |= {f"sha256 of {k}": v for k, v in document["hashes"].items()}
    lines = "".join(
        f"<tr><th>{html.escape(k)}<td>{html.escape(v if isinstance(v, str) else json.dumps(v))}"
        for k, v in facts.items()
    )
    return f"<div class=wide><table class=facts>{lines}</table></div>"


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks report`; returns the exit code.

    Raises
    ------
    InputError : the folder does not exist or contains no result of `benchmarks latency`, the page
        would replace a JSON file of the folder, or the page cannot be written.
    MissingBackend : matplotlib is not installed.
    """
    parser = Parser(
        "python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=some_path, help="with JSON files of benchmarks latency")
    parser.add_argument("-o", "--out", type=out_path, help="(default: DIR/report.html)")
    args = parser.parse_args(argv)
    try:
        os.scandir(args.folder).close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{shown(args.folder)} is no folder",
            fix="python -m benchmarks latency -o DIR makes one",
        ) from error
    except OSError as error:
        raise file_error("read", args.folder, error) from error
    out = args.out or args.folder / "report.html"
    found = {}
    for path in sorted(args.folder.rglob("*.json")):
        inside = path.relative_to(args.folder)
        if any(part.startswith(".") for part in inside.parts):
            continue  # a hidden file, as macOS writes beside others
        if real_path(path) == real_path(out):
            raise InputError(
                f"{shown(out)} would be overwritten by the page", fix="choose another -o"
            )
        try:
            name = documents.shown(str(inside.with_suffix("")))
            found[name] = reading.load(path)
        except InputError as error:
            if "its schema" not in str(error):  # other benchmarks' results, and traces
                print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise InputError(
            f"{args.folder} holds no result of 'benchmarks latency'",
            fix=f"python -m benchmarks latency -o {args.folder}",
        )
    write_atomic(out, render(found).encode())
    print(documents.shown(str(out)))
    return 0
