"""A table as HTML that fits the page: a table that would be too wide is cut into several."""

from __future__ import annotations

import html
import re

WIDTH = 1040  # CSS pixels that the page leaves for a table, in a window of 1100
FONT, HEAD, SMALL = 13, 12, 11  # CSS pixels: of cells, of headers, of intervals in brackets
# Mean width of a word's characters divided by the font's size, at most: plain and bold.
_CHARACTER, _BOLD = 0.64, 0.7
_PADDING = 12  # CSS pixels of a cell, left and right together
_FIRST = 112  # least CSS pixels of the first column
_NUMBER = re.compile(r"-|[-+]?\d[\d.,e+-]*%?( \[.*\])?")

STYLE = f"""
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: {FONT}px; font-variant-numeric: tabular-nums;
  margin: .5em 0 }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3em {_PADDING / 2:g}px; text-align: left;
  vertical-align: top }}
th {{ vertical-align: bottom; font-size: {HEAD}px }}
td:first-child {{ min-width: {_FIRST - _PADDING}px }}
.number {{ text-align: right }}
td small {{ font-size: {SMALL}px; opacity: .8; white-space: nowrap }}
.tight small {{ white-space: normal }}
.facts td {{ overflow-wrap: anywhere }} .facts th {{ white-space: nowrap; vertical-align: top }}
@media (prefers-color-scheme: dark) {{ td, th {{ border-color: #444 }} }}
"""


def as_html(lines: list[dict[str, str]], below: str = "") -> str:
    """A table, or several that repeat the first column, if one would be wider than WIDTH.

    Parameters
    ----------
    lines : rows of cells by column. A cell "26.2 [25.6, 28.0]" is written in two lines.
    below : a sentence that is written below the table; "" for none.
    """
    columns = list(dict.fromkeys(name for line in lines for name in line))
    tight = least_width(columns, lines, whole=True) > WIDTH
    tables = "".join(_table(part, lines, tight) for part in parts(columns, lines))
    return tables + (f"<p class=below>{html.escape(below)}</p>" if below else "")


def parts(columns: list[str], lines: list[dict[str, str]]) -> list[list[str]]:
    """The columns of each table: the first column, and as many others as fit WIDTH, at least
    one."""
    first, *others = columns
    found = [[first]]
    for name in others:
        if len(found[-1]) > 1 and least_width([*found[-1], name], lines) > WIDTH:
            found.append([first])
        found[-1].append(name)
    return found


def least_width(columns: list[str], lines: list[dict[str, str]], *, whole: bool = False) -> float:
    """The least width of a table of these columns in CSS pixels: the longest word of each column,
    and the padding. With ``whole``, an interval in brackets counts as one word."""
    total = 0.0
    for i, name in enumerate(columns):
        width = max((_BOLD * HEAD * len(word) for word in name.split()), default=0.0)
        for line in lines:
            value, bracket, rest = line.get(name, "").partition(" [")
            width = max([width, *map(_word, value.split())])
            pieces = [f"[{rest}"] if whole else f"[{rest}".split()
            width = max([width, *(_word(piece, SMALL) for piece in pieces if bracket)])
        total += max(width + _PADDING, _FIRST * (i == 0))
    return total


def _word(text: str, size: int = FONT) -> float:
    """The width of a word in CSS pixels, at most."""
    return _CHARACTER * size * len(text)


def _table(columns: list[str], lines: list[dict[str, str]], tight: bool) -> str:
    kinds = {}
    for name in columns:
        cells = [line[name] for line in lines if line.get(name)]
        numbers = cells and all(_NUMBER.fullmatch(cell) for cell in cells)
        kinds[name] = " class=number" if numbers else ""
    rows = ["<tr>" + "".join(f"<th{kinds[name]}>{html.escape(name)}" for name in columns)]
    for line in lines:
        made = (f"<td{kinds[name]}>{_cell(line.get(name, ''))}" for name in columns)
        rows.append("<tr>" + "".join(made))
    kind = " class=tight" if tight else ""
    return f"<div class=wide><table{kind}>{''.join(rows)}</table></div>"


def _cell(text: str) -> str:
    value, bracket, rest = html.escape(text).partition(" [")
    return f"{value}<br><small>[{rest}</small>" if bracket else value
