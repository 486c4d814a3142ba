"""The command published: stored rows, pooled scores, maps after fewer steps, and interruptions."""

import json
from itertools import chain

import numpy as np
import pytest
from cases import case

savemat = pytest.importorskip("scipy.io", reason="SciPy writes the truth").savemat

import runtime  # noqa: E402 (after importorskip)
from benchmarks import __main__ as command  # noqa: E402
from benchmarks.quality import datasets, evaluators, protocols, published  # noqa: E402
from benchmarks.quality.published import COLUMNS, TRUTH, Form  # noqa: E402
from runtime.core.resize import working_picture  # noqa: E402
from runtime.prior.kmeans import KMeansPrior  # noqa: E402
from sdk import CrfConfig, RefineConfig, Segmenter  # noqa: E402
from sdk.image import encode_image  # noqa: E402

HEIGHT, WIDTH, PICTURES = 40, 56, 3
GROUPS = (
    (
        Form("truth", "dynaguide", 0.5, (2,), truth=True),
        Form("dynaguide", "dynaguide", 0.5, (2, 12), (14,), final=True),
    ),
    (
        Form("dynaseg", "dynaseg_fsf", 1.0, (2,)),
        Form("truth", "dynaguide", 0.5, (), (3,), truth=True),
    ),
    (Form("dynaseg", "dynaseg_fsf", 1.0, (), (5,)),),
)
ROWS = {
    "dynaguide, 2 steps": 3, "dynaguide, 12 steps": 3, "dynaguide, 14 steps": 1,
    "dynaguide, 2 steps + guided filter": 3, "dynaseg, 2 steps": 3, "dynaseg, 5 steps": 1,
    "truth, 2 steps": 3, "truth, 3 steps": 1,
}  # fmt: skip
SCORES = (*published.SCORES, "mean")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set with the folders of BSDS500: three pictures of noise and colours, with three
    annotators each, whose region numbers have gaps."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("images", "groundTruth"):
        (root / "bsds500" / folder / "val").mkdir(parents=True)
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        people = np.empty((1, 3), object)
        for k in range(3):
            cells = np.add.outer(
                np.arange(HEIGHT) * (number + 2) // HEIGHT * 9, np.arange(WIDTH) * (2 + k) // WIDTH
            )
            people[0, k] = {"Segmentation": (cells + 1).astype(np.uint16)}
        colours = rng.integers(0, 256, (100, 3))
        pixels = (colours[cells] + rng.integers(-40, 41, (HEIGHT, WIDTH, 3))).clip(0, 255)
        name = root / f"bsds500/images/val/{number}00.jpg"
        name.write_bytes(encode_image(pixels.astype(np.uint8), ".jpg"))
        savemat(root / f"bsds500/groundTruth/val/{number}00.mat", {"groundTruth": people})
    return root


@pytest.fixture(autouse=True)
def small(root, monkeypatch):
    """The made data set, and few steps."""
    monkeypatch.setenv("SEG_DATA", str(root))
    monkeypatch.setattr(published, "GROUPS", GROUPS)


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """The file of a whole run."""
    out = tmp_path_factory.mktemp("out") / "p.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEG_DATA", str(root))
        patch.setattr(published, "GROUPS", GROUPS)
        assert command.main([*WORDS, "-o", str(out)]) == 0
    return out


WORDS = ["published", "--pictures", str(PICTURES), "--long", "1"]


def read(path):
    return published.unpacked(json.loads(path.read_text()))


def pictures():
    return datasets.bsds(PICTURES)


def guide_of(item, preset, size, truth):
    """The guide of a form: labels of k-means or of the annotator with most regions, or None."""
    if preset == "dynaseg_fsf":
        return None
    if not truth:
        return KMeansPrior()(None, working_picture(item.image(), *size))
    finest = max(item.annotators(), key=lambda regions: len(np.unique(regions)))
    ids = np.searchsorted(np.unique(finest), finest)
    return protocols.nearest(ids, *size).astype(np.int32)


def map_after(item, form, steps):
    """The map of a refinement that ends after ``steps``, at full size."""
    config = RefineConfig.preset(form.preset, scale=form.scale, steps=steps)
    low = working_picture(item.image(), *config.working_size(HEIGHT, WIDTH))
    guide = guide_of(item, form.preset, low.shape[:2], form.truth)
    refiner = runtime.Refiner(*low.shape[:2], threads=1, **config.options())
    return protocols.nearest(refiner.run(low, guide).labels, HEIGHT, WIDTH)


def direct(maps, items, prefix):
    """The scores of label maps, or of their connected regions, by the protocol: "many-to-one" of
    the fine annotator, of the coarse one alone, and of each annotator alone."""
    if prefix:
        maps = [runtime.connected_regions(labels)[0] for labels in maps]
    truths = [item.annotators() for item in items]
    found = evaluators.score_regions(zip(maps, truths, strict=True), compat="dynaguide")
    found["many-to-one fine"] = found["compat dynaguide"]
    coarse = [[min(each, key=lambda regions: len(np.unique(regions)))] for each in truths]
    alone = evaluators.score_regions(zip(maps, coarse, strict=True), compat="dynaguide")
    found["many-to-one coarse"] = alone["compat dynaguide"]
    pairs = [(m, [t]) for m, each in zip(maps, truths, strict=True) for t in each]
    found["many-to-one all"] = evaluators.score_regions(pairs, compat="dynaguide")[
        "compat dynaguide"
    ]
    return found


def check(document, row, maps, items):
    for prefix in ("", "regions "):
        with case(f"{row} {prefix}"):
            rows = document["forms"][row]
            assert [*rows] == [item.name for item in items]
            found = published.summary(rows, document["regions"], prefix)
            expected = direct(maps, items, prefix)
            for name in (*SCORES, *(f"picture {part}" for part in published.PARTS)):
                assert found[name] == pytest.approx(expected[name], abs=6e-5), name


def test_stored_rows_reproduce_the_scores_of_refinements_that_end_there(done):
    """Also after step 10, when the mapping of the guide is frozen."""
    document, items = read(done), pictures()
    for form in chain(*GROUPS):
        for steps in (*form.steps, *form.more):
            used = items[:1] if steps in form.more else items
            maps = [map_after(item, form, steps) for item in used]
            check(document, form.row(steps), maps, used)


def test_stored_rows_reproduce_the_scores_of_the_segmenter(done):
    document, items = read(done), pictures()
    options = {
        "k-means": {"refine": None, "filter": None, "min_area": 0},
        "k-means + dense CRF": {"refine": None, "filter": CrfConfig()},
        "residual + guided filter": {},
        "dynaguide, 2 steps + guided filter": {"refine": RefineConfig.preset("dynaguide", steps=2)},
    }
    for row, own in options.items():
        maps = [Segmenter("kmeans", threads=1, **own)(item.image()).labels for item in items]
        check(document, row, maps, items)
    finest = [max(i.annotators(), key=lambda m: len(np.unique(m))) for i in items]
    check(document, TRUTH, finest, items)


def test_each_form_has_its_pictures_and_steps(done):
    document = read(done)
    assert document["settings"] == {
        "threads": 1, "pictures": ["000", "100", "200"], "long": ["000"]
    }  # fmt: skip
    forms = {row: len(own) for row, own in document["forms"].items()}
    assert forms == ROWS | dict.fromkeys((TRUTH, *published.PLAIN), 3)
    assert document["regions"]["000"] == [2 * (2 + 3 + 4), 8, 4]
    steps = {row: own["000"][COLUMNS.index("steps")] for row, own in document["forms"].items()}
    assert steps["dynaguide, 12 steps"] == 12 and steps["dynaguide, 14 steps"] == 14
    assert steps["dynaguide, 2 steps + guided filter"] == 2
    assert steps["residual + dense CRF"] == 10 and steps["k-means"] == 0


def test_a_refinement_that_stops_early_has_its_last_map():
    """DynaSeg stops when the map has at most three labels, as a map of three pixels has."""
    pixels = np.uint8([[[0, 0, 0], [255, 0, 0], [0, 255, 255]]])
    truth = np.int32([[0, 1, 1]])
    picture = published.Picture("a", pixels, [truth])
    form = Form("d", "dynaseg_fsf", 1.0, (1, 9))
    (_, first), (_, last) = published.refined_rows(form, picture, [1, 9], 1)
    assert first[:-1] == last[:-1] and last[COLUMNS.index("steps")] == 1
    refiner = runtime.Refiner(1, 3, **RefineConfig.preset("dynaseg_fsf", steps=9).options())
    labels = refiner.run(pixels / np.float32(255)).labels
    assert last[:-2] == picture.scores(labels, 1, 0)[:-2]


def test_groups_are_run_one_after_the_other_and_long_pictures_first(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(published, "plain_row", lambda n, p, t: [0.0] * len(COLUMNS))
    monkeypatch.setattr(
        published, "refined_rows", lambda f, p, s, t: calls.append((f.name, p.name, s)) or []
    )
    assert command.main([*WORDS[:-1], "2"]) == 0
    assert calls == [
        ("truth", "000", [2]), ("dynaguide", "000", [2, 12, 14]),
        ("truth", "200", [2]), ("dynaguide", "200", [2, 12, 14]),
        ("truth", "100", [2]), ("dynaguide", "100", [2, 12]),
        ("dynaseg", "000", [2]), ("truth", "000", [3]), ("dynaseg", "200", [2]),
        ("truth", "200", [3]), ("dynaseg", "100", [2]),
        ("dynaseg", "000", [5]), ("dynaseg", "200", [5]),
    ]  # fmt: skip


def test_an_interrupted_run_continues_without_computing_rows_again(done, tmp_path, monkeypatch):
    """Each start is interrupted at its second refinement or plain form."""
    out, refinements = tmp_path / "p.json", []
    plain, refined = published.plain_row, published.refined_rows
    left = []

    def counted(function, *key):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        refinements.append(key)
        return function

    monkeypatch.setattr(published, "plain_row", lambda n, p, t: counted(plain, n, p.name)(n, p, t))
    monkeypatch.setattr(
        published, "refined_rows", lambda f, p, s, t: counted(refined, f, p.name)(f, p, s, t)
    )
    code, known = 130, 0
    while code:
        left[:] = [0] * 9
        code = command.main([*WORDS, "-o", str(out)])
        assert code in (0, 130)
        rows = sum(len(own) for own in read(out)["forms"].values())
        assert rows > known
        known = rows
    assert len(refinements) == len(set(refinements)) == 7 * PICTURES + 3 * PICTURES + 2

    def values(path):
        document = read(path)
        return document["regions"], {
            row: {name: own[:-1] for name, own in rows.items()}
            for row, rows in document["forms"].items()
        }

    assert values(out) == values(done)
    before = out.read_bytes()
    left.clear()
    assert command.main([*WORDS, "-o", str(out)]) == 0  # nothing remains to be computed
    assert out.read_bytes() == before


def test_a_refinement_whose_last_row_is_missing_runs_again(done, tmp_path):
    out = tmp_path / "p.json"
    document = read(done)
    missing = document["forms"]["dynaguide, 2 steps + guided filter"].pop("100")
    out.write_text(json.dumps(published.packed(document)))
    assert command.main([*WORDS, "-o", str(out)]) == 0
    again = read(out)["forms"]["dynaguide, 2 steps + guided filter"]["100"]
    assert again[:-1] == missing[:-1]


ROW = [0.5, 0.2, 0.8, 0.3, 0.4, 0.3, 0.6, 7]


def test_pooled_scores_weigh_pictures_by_their_regions():
    rows = {"a": [*ROW, *ROW, 20, 1.0], "b": [0.1, 0.4, 0.6, 0.5, 0.2, 0.5, 1, 9, *ROW, 10, 3.0]}
    found = published.summary(rows, {"a": [30, 10, 2], "b": [10, 10, 6]}, "")
    expected = {
        "all": 0.4, "fine": 0.3, "coarse": 0.65, "mean": 0.45, "picture all": 0.3,
        "picture fine": 0.3, "picture coarse": 0.7, "one-to-one": 0.4, "many-to-one all": 0.3,
        "many-to-one fine": 0.4, "many-to-one coarse": 0.8, "segments": 8, "steps": 15,
        "seconds": 2, "worst": "0.100 b",
    }  # fmt: skip
    assert found == {k: v if k == "worst" else pytest.approx(v) for k, v in expected.items()}
    assert published.summary(rows, {"a": [30, 10, 2], "b": [10, 10, 6]}, "regions ")["all"] == 0.5


def test_tables_of_all_pictures_and_of_the_long_ones(done, capsys):
    assert command.main(["published", "--table", str(done)]) == 0
    parts = capsys.readouterr().out.split("**")
    heads = ["labels, 3 pictures", "connected regions, 3 pictures"]
    assert parts[1::2] == [*heads, "labels, 1 pictures", "connected regions, 1 pictures"]
    assert "| dynaguide, 12 steps " in parts[2] and "14 steps" not in parts[2]
    assert "| dynaguide, 14 steps " in parts[6] and "| k-means " in parts[6]
    lines = parts[2].splitlines()
    forms = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert forms[:2] == [TRUTH, "k-means"] and forms[7:9] == [*ROWS][:2]
    document = read(done)
    rows = document["forms"]["k-means"]
    for part, prefix in ((parts[2], ""), (parts[4], "regions ")):
        line = next(line for line in part.splitlines() if line.startswith("| k-means  "))
        found = published.summary(rows, document["regions"], prefix)
        assert f"{found['all']:.3f}" in line and found["worst"] in line


def test_a_file_of_other_settings_or_columns_is_refused(done, tmp_path, capsys):
    out = tmp_path / "p.json"
    out.write_bytes(done.read_bytes())
    assert command.main([*WORDS[:-1], "2", "-o", str(out)]) == 1
    assert "has results of other settings" in capsys.readouterr().err
    document = json.loads(done.read_text())
    document["columns"][0] = "some"
    out.write_text(json.dumps(document))
    assert command.main(["published", "--table", str(out)]) == 1
    assert "is no result of this command" in capsys.readouterr().err


def test_wrong_numbers_are_refused(capsys):
    for words, message in (
        (["--pictures", "0"], "pictures is 0"),
        (["--pictures", "2", "--long", "3"], "long is 3"),
        (["--pictures", "2", "--threads", "0"], "threads is 0"),
        (["--pictures", "9"], "count: expected 1 to 3, got 9"),
    ):
        with case(message):
            assert command.main(["published", *words]) == 1
            assert message in capsys.readouterr().err
