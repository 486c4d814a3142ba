"""The HTML page."""

import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import page, reading


def test_report_is_one_page_that_needs_nothing_else(measured, tmp_path):
    assert command.main(["report", str(measured), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == 3 and "not measured (give --labels" in text
    assert not re.search(r'(src|href)="(?!#)', text) and "@import" not in text
    for word in ("paced 20/s, 2 steps", "load_average", "Environment", "back-to-back"):
        assert word in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (Debian package)")
def test_the_page_opens_in_a_browser(measured, tmp_path):
    shot = tmp_path / "page.png"
    page_url = (measured / "latency.html").resolve().as_uri()
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,3000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page_url],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    picture = cv2.imread(str(shot))
    assert picture is not None, done.stderr[-500:]
    assert picture.shape[0] == 3000 and len(np.unique(picture[600:2600].reshape(-1, 3), axis=0)) > 8


def test_quality_is_drawn_with_its_front(measured):
    document = reading.load(measured / "latency.json")
    for i, found in enumerate(document["rows"]):
        found["quality"] = {"what": "mIoU", "value": 0.5 + 0.01 * i}
    assert page.render({"a": document}).count("<svg") == 4
    assert page.pareto([(5, 0.5), (1, 0.2), (3, 0.6), (2, 0.2), (9, 0.6)]) == [1, 2]


def test_labels_of_points_do_not_lie_on_each_other():
    taken = []
    for _ in range(5):
        up = next(n for n in (4, -11, 13, -20, 22, -29, 31) if page.is_free(4, n, taken))
        taken.append((4, up))
    assert len(set(taken)) == 5 and page.is_free(40, 4, taken)


def bar_row(**stages):
    return {"name": f"row of {len(stages)}", "stage_p50_ms": stages}


def test_a_new_stage_has_its_part_of_the_bar():
    """Stages are those that the rows name, whatever they are."""
    rows = [
        bar_row(prior=5.0, upload=3.0, refine=2.0, unaccounted=1.0),
        bar_row(prior=4.0, download=2.5, unaccounted=0.5),
    ]
    rows[0]["stage_p50_ms"] |= {"queue": 9.0, "refine per step": 1.0, "refine, device time": 1.5}
    figure = page.draw_waterfall(rows)
    (axis,) = figure.axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["prior", "upload", "refine", "download", "unaccounted"]
    widths = {0: 0.0, 1: 0.0}
    for part in axis.patches:
        widths[round(part.get_y() + part.get_height() / 2)] += part.get_width()
    assert widths == {0: 11.0, 1: 7.0}
    said = [text.get_text() for text in axis.texts]
    assert said == [" 11.0 ms", " 7.0 ms"]


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_every_stage_has_a_colour_of_its_own(count):
    names = [f"stage {i}" for i in range(count)]
    colours = page.stage_colours([*names, "unaccounted"])
    assert list(colours) == [*names, "unaccounted"] and colours["unaccounted"] == page.GREY
    assert len(set(colours.values())) == count + 1
