"""log.csv and curves.png."""

import cv2
import pytest

from export.train.log import Log, cut_log, draw_curves, last_step
from runtime.errors import BundleError, InputError

pytest.importorskip("matplotlib", reason="the losses are drawn by matplotlib")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def test_a_row_has_the_means_since_the_last_one(path):
    log = Log(path, scored=True)
    log.add({"data": 1.0, "within": 0.5})
    log.add({"data": 2.0, "within": -0.5})
    means = {"loss": 1.5, "data": 1.5, "within": 0.0}
    assert log.write(2, seconds=0.125) == means
    log.add({"data": 0.1, "within": 0.2})
    pending = log.pending
    assert pending == {"count": 1, "sums": {"loss": 0.1 + 0.2, "data": 0.1, "within": 0.2}}
    again = Log(path, pending, scored=True)
    again.add({"data": 1 / 3, "within": 0.0})
    again.write(4, seconds=7.0, score=0.25, durable=True)
    assert path.read_text() == (
        "step,loss,data,within,held_out,seconds\n"
        "2,1.5,1.5,0,,0.12\n"
        "4,0.31666667,0.21666667,0.1,0.25,7.00\n"
    )


def test_rows_after_a_step_are_cut(path):
    rows = ["step,loss,seconds\n", "10,1,1\n", "20,2,2\n", "25,2,2\n"]
    for step, left in [(25, 4), (30, 4), (24, 3), (20, 3), (19, 2), (0, 1)]:
        path.write_text("".join(rows))
        cut_log(path, step)
        assert path.read_text() == "".join(rows[:left]), step


def test_a_torn_row_is_cut(path):
    head = "step,loss,seconds\n10,1,1\n"
    for torn in ("20,2", "20,2,2", "2", "\0\0\0\0"):
        path.write_text(head + torn)
        cut_log(path, 20)
        assert path.read_text() == head, repr(torn)
    for torn in ("", "st", "step,loss,seconds"):
        path.write_text(torn)
        cut_log(path, 20)
        assert path.read_text() == "", repr(torn)
    path.unlink()
    cut_log(path, 20)
    assert not path.exists()


def test_a_log_that_is_no_file(path):
    path.mkdir()
    with pytest.raises(InputError, match="is a folder"):
        cut_log(path, 1)
    with pytest.raises(InputError, match=r"log\.csv cannot be written"):
        Log(path).write(1, seconds=0)


def test_the_curves_have_a_panel_for_each_column(path, tmp_path):
    log = Log(path, scored=True)
    for step in range(1, 41):
        log.add({"data": 1 / step, "within": 0.01})
        log.write(step, seconds=step, score=0.5 if step % 10 == 0 else None)
    draw_curves(path, tmp_path / "curves.png", "a method, 40 steps")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.shape == (740, 800, 3)
    blue = (abs(picture.astype(int) - [178, 114, 0]).sum(-1) < 60).any(1)
    orange = (abs(picture.astype(int) - [0, 94, 213]).sum(-1) < 60).any(1)
    panels = [
        [i for i in range(1, 740) if colour[i] and not colour[i - 1]] for colour in (blue, orange)
    ]
    assert len(panels[0]) >= 3 and panels[1] and max(panels[0]) < min(panels[1])
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_curves_are_drawn_over_the_steps(path, tmp_path, monkeypatch):
    drawn = []
    log = Log(path, scored=True)
    for step in (10, 20, 40):
        log.add({"data": step / 4})
        log.write(step, seconds=1, score=0.5 if step == 20 else None)
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda _, x, y, **_k: drawn.append((x, y)))
    draw_curves(path, tmp_path / "curves.png", "a method, 40 steps")
    means = ([10, 20, 40], [2.5, 5, 10])
    assert drawn == [means, means, ([20], [0.5])]


def test_curves_that_cannot_be_written(path, tmp_path):
    log = Log(path)
    log.add({"data": 1.0})
    log.write(1, seconds=1)
    with pytest.raises(InputError, match=r"curves\.png cannot be written"):
        draw_curves(path, tmp_path / "no" / "curves.png", "title")


def test_a_log_without_rows_has_no_curves(path, tmp_path):
    draw_curves(path, tmp_path / "curves.png", "title")
    path.write_text("step,loss,seconds\n")
    draw_curves(path, tmp_path / "curves.png", "title")
    assert not (tmp_path / "curves.png").exists()


def test_a_damaged_log_is_an_error_and_keeps_its_rows(path, tmp_path):
    head, rows = "step,loss,seconds\n", "10,1,1\n20,2,2\n"
    cases = [(2, head + row + "\n" + rows) for row in ("1,x,0", "x,1,0", "1,1,0,5,6", "")]
    cases += [(2, head + row + "\n") for row in ("\xff", "1,\0,2", "1,,2", "-1,1,1", "0,1,1")]
    cases += [(3, head + "10,1,1\n" + row + "\n20,2,2\n") for row in ("10,1,1", "9,1,1", "1,1")]
    cases += [(1, first + rows) for first in ("", "\xef\xbb\xbf" + head, "other\n", "\n")]
    cases += [(1, first + rows) for first in ("step,a,a,seconds\n", "step,loss,seconds\r\n")]
    for line, text in cases:
        path.write_bytes(text.encode("latin-1"))
        for use in (
            lambda: draw_curves(path, tmp_path / "curves.png", "title"),
            lambda: cut_log(path, 10),
            lambda: last_step(path),
        ):
            with pytest.raises(BundleError, match=rf"log\.csv is damaged: line {line}: "):
                use()
        assert path.read_bytes() == text.encode("latin-1"), text


def test_the_last_step(path):
    assert last_step(path) == 0
    for text, step in [("", 0), ("step,loss,seconds\n", 0), ("step,loss,seconds\n3,1,1\n4", 3)]:
        path.write_text(text)
        assert last_step(path) == step, text
