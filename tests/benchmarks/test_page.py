"""The HTML page of latency documents: its text, and how a browser shows it."""

import re
import shutil
import subprocess
import types

import cv2
import numpy as np
import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import document as documents
from benchmarks.latency import page, reading, web_table


def test_report_is_one_page_that_needs_nothing_else(measured, tmp_path):
    assert command.main(["report", str(measured), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == 3 and "not measured (that needs --labels" in text
    assert not re.search(r'(src|href)="(?!#)', text) and "@import" not in text
    for word in ("paced 20/s, 2 steps", "load_average", "Environment", "back-to-back"):
        assert word in text


def test_report_leaves_hidden_files_out(measured, tmp_path, capsys):
    for name in ("a.json", ".hidden/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((measured / "latency.json").read_bytes())
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7")
    assert command.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    page_text = (tmp_path / "report.html").read_text()
    assert ".hidden" not in page_text and "<svg" in page_text


def test_report_of_a_folder_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("none", "none is no folder\n  fix: python -m benchmarks latency -o DIR"),
        ("file", "file is no folder"),
        ("loop", "loop cannot be read: Too many levels of symbolic links"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        assert command.main(["report", str(tmp_path / name)]) == 1, name
        assert message in capsys.readouterr().err, name


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
    """The bars show every stage that the rows name, also one that the page does not know."""
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
    assert said == ["11.0 ms", "7.0 ms"]


def test_every_stage_has_a_colour_of_its_own():
    for count in (1, 7, 8, 30):
        names = [f"stage {i}" for i in range(count)]
        colours = page.stage_colours([*names, "unaccounted"])
        assert list(colours) == [*names, "unaccounted"], count
        assert colours["unaccounted"] == page.GREY, count
        assert len(set(colours.values())) == count + 1, count


def samples(n, *, seed=0, scale=1.0):
    return (scale * (20 + np.random.default_rng(seed).random(n))).round(3).tolist()


def document(counts, *, scale=1.0, percentiles=(50.0, 90.0, 95.0, 99.0), backends=("native",)):
    """A document of a paced row for each number of samples."""
    rows = []
    for i, n in enumerate(counts):
        made = documents.Row("paced", i, 2, rate=10.0, backend=backends[i % len(backends)])
        for at, ms in enumerate(samples(n, seed=i, scale=scale)):
            timings = {"decode": 0.1, "preprocess": 0.3, "prior": 9.0, "refine": ms - 10.5}
            timings |= {"filter": 0.5, "postprocess": 0.5}
            device = {"preprocess": 0.1, "refine": 5.0, "filter": 0.2}
            result = types.SimpleNamespace(
                timings=timings, stats={"steps": i, "device_ms": device if i == 1 else {}}
            )
            made.add(at, at, at + ms / 1e3, result, None)
        rows.append(documents.summarise(made, list(percentiles)))
    made = {"rows": rows, "environment": {"cpu": "x", "board": {"a": "b" * 300}}, "hashes": {}}
    made |= {"scope": "wall time", "device_time": "none", "prior": "kmeans", "command": ["x" * 400]}
    made["hashes"] = {"model.onnx": "0123456789abcdef" * 4}
    return made | {"memory": [], "power": [], "peers": [], "partial": False}


def test_too_few_samples_are_a_dash_and_one_line_below():
    made = document([400, 35, 5])
    text, html = documents.as_text(made), page.render({"a": made})
    line = "too few independent samples for this percentile; p50 needs 6, p90 needs 29, "
    for found in (text, html):
        assert found.count(line) == 1 and found.count("need 2") == found.count("n/a") == 0
        assert found.count("p99 needs 299.") == 1
    cells = documents.tables(made)[documents.LATENCY]
    assert [[line[f"p{p} ms"] == "-" for p in (50, 90, 95, 99)] for line in cells] == [
        [False] * 4, [False, False, True, True], [True] * 4
    ]  # fmt: skip
    assert not any("need" in cell for line in cells for cell in line.values())
    enough = page.render({"a": document([400])})
    assert "A dash" not in enough and "In brackets: the 95 % interval." in enough


def test_what_all_rows_share_is_said_once():
    same, several = document([40, 40]), document([40, 40], backends=("native", "onnx"))
    assert "ran" not in documents.tables(same)[documents.STAGES][0]
    assert documents.as_text(same).count("native on cpu, fp32") == 1
    assert documents.below(same)[documents.STAGES] == "All rows ran with native on cpu, fp32."
    ran = [line["ran"] for line in documents.tables(several)[documents.STAGES]]
    assert ran == ["native on cpu, fp32", "onnx on cpu, fp32"]
    assert documents.STAGES not in documents.below(several)


def test_tables_fit_a_window_of_1100_pixels():
    """Usual tables are whole; with many columns they are cut, and the first column is repeated."""
    for case, made, count in (
        ("usual", document([400, 35]), 2),
        ("slow", document([400, 35], scale=100), 2),
        ("two backends", document([400, 35], backends=("onnxruntime-cpu fp32", "native")), 3),
        ("16 percentiles", document([400], percentiles=np.linspace(20, 95, 16)), 3),
    ):
        found = 0
        for lines in documents.tables(made).values():
            columns = list(lines[0])
            parts = web_table.parts(columns, lines)
            found += len(parts)
            assert [name for part in parts for name in part[1:]] == columns[1:], case
            for part in parts:
                assert part[0] == columns[0] and len(part) > 1, case
                assert web_table.least_width(part, lines) <= web_table.WIDTH <= 1040, (case, part)
        assert found == count, case
    assert len(web_table.parts(["a", "b", "c"], [{"a": "x" * 500, "b": "y", "c": "z"}])) == 2


def test_cells_are_text_and_numbers_are_aligned():
    lines = [{"row": "<b>", "p50 ms": "1.5 [1.2, 1.9]", "quality": "not <measured>", "n": "-"}]
    found = web_table.as_html(lines, "p < 1")
    assert "<td>&lt;b&gt;" in found and "<td>not &lt;measured&gt;" in found
    assert "<td class=number>1.5<br><small>[1.2, 1.9]</small>" in found
    assert "<td class=number>-" in found and found.endswith("<p class=below>p &lt; 1</p>")


def test_figures_take_the_colours_of_the_page():
    """Lines and texts have the page's text colour, and nothing hides its background."""
    found = page.render({"a": document([40, 40])})
    assert "prefers-color-scheme: dark" in found and page.INK not in found
    for svg in re.findall("<svg.*?</svg>", found, re.DOTALL):
        assert "currentColor" in svg and "#ffffff" not in svg and "#000000" not in svg


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (Debian package)")
def test_a_browser_needs_no_scrolling_to_the_side(tmp_path):
    """At 1100 pixels, neither the page nor a table in it is wider than its place."""
    ask = "[document.documentElement, ...document.querySelectorAll('.wide')]"
    script = f"document.title = {ask}.map(e => e.scrollWidth - e.clientWidth)"
    for case, made in (
        ("usual", document([400, 35, 5])),
        ("slow", document([400, 35], scale=100, backends=("onnxruntime-cpu fp32", "native"))),
        ("16 percentiles", document([400], percentiles=np.linspace(20, 95, 16))),
    ):
        text = page.render({"a": made}).replace("</html>", f"<script>{script}</script></html>")
        (tmp_path / "page.html").write_text(text)
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,3000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             (tmp_path / "page.html").as_uri()],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        title = re.search("<title>([-0-9,]+)</title>", done.stdout)
        assert title, (case, done.stderr[-500:])
        beyond = list(map(int, title[1].split(",")))
        assert len(beyond) >= 4 and set(beyond) == {0}, case
