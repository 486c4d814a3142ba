"""python -m export train name: clusters get the names of classes, and names.json says how."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
from cases import case
from trained_runs import NAMES, ORDER, backbone, mosaic, replace_backbones, write_run

from export.__main__ import main
from export.train.names import cluster_names, head_sha256, read_names
from runtime.errors import BundleError, InputError

Image = pytest.importorskip("PIL.Image", reason="label PNGs are written by Pillow")
pytest.importorskip("scipy", reason="clusters are matched by scipy: pip install scipy")


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    replace_backbones(monkeypatch)


@pytest.fixture
def city(tmp_path):
    """A run, the pictures that it was trained on, their labels and the classes."""
    for folder in ("pictures", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        picture, truth = mosaic(i)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
        Image.fromarray(truth).save(tmp_path / "labels" / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    write_run(tmp_path / "run", [tmp_path / "pictures"])
    return tmp_path


def name(city, *more, classes=None):
    """Run the command; returns its exit code, stdout and stderr."""
    if classes is not None:
        (city / "classes.json").write_text(json.dumps(classes))
    words = [city / "run", "--labels", city / "labels", "--classes", city / "classes.json", *more]
    out, err = io.StringIO(), io.StringIO()
    logs = logging.StreamHandler(err)
    logging.getLogger("dg.train").addHandler(logs)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "name", *map(str, words)])
    logging.getLogger("dg.train").removeHandler(logs)
    return code, out.getvalue(), err.getvalue()


def stored(city):
    return json.loads((city / "run" / "names.json").read_text())


def relabel(city, change):
    """Change the labels of each picture."""
    for path in (city / "labels").iterdir():
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def test_known_clusters_get_their_names(city):
    code, out, err = name(city)
    assert code == 0, err
    found = stored(city)
    assert found["names"] == [NAMES[colour] for colour in ORDER]
    assert found["cluster_to_class"] == list(ORDER) and found["classes"] == NAMES
    assert found["pictures"] == 4 and found["labels"] == "labels"
    counts = np.array(found["counts"])
    assert counts.sum() == 4 * 96 * 128
    # Each field is one position of the features; only corners of fields have wrong pixels.
    right = sum(counts[k, ORDER[k]] for k in range(4))
    assert found["accuracy"] == pytest.approx(right / counts.sum()) and found["accuracy"] > 0.9
    assert 0.9 < found["miou"] < 1
    lines = out.splitlines()
    assert lines[0].split() == ["cluster", "name", "pixels", "right", "IoU"]
    assert [line.split()[1] for line in lines[1:5]] == found["names"]
    assert lines[5].startswith(f"accuracy {found['accuracy']:.3f}, mIoU {found['miou']:.3f} over")
    assert err.startswith("count the pixels of 4 pictures ...\n") and "100 %" in err


def test_the_table_says_how_large_and_how_right_each_cluster_is(city):
    """Sand has the label of brick, so half of the pixels of this class are in its cluster."""
    relabel(city, lambda truth: np.where(truth == 3, 0, truth).astype(np.uint8))
    code, out, err = name(city)
    assert code == 0, err
    found = stored(city)
    counts, lines = np.array(found["counts"]), out.splitlines()[1:5]
    for cluster, (line, one) in enumerate(zip(lines, found["cluster_to_class"], strict=True)):
        pixels = counts[cluster].sum()
        right = iou = "-"
        if one >= 0:
            hits = counts[cluster, one]
            right = f"{hits / pixels:.1%}"
            iou = f"{hits / (pixels + counts[:, one].sum() - hits):.3f}"
        assert line.split()[-3:] == [f"{pixels / counts.sum():.1%}", right, iou]


def test_a_backbone_that_was_moved(city, monkeypatch):
    def load(source, features):
        if source != "/new/colours.pth":
            raise InputError(f"{source} does not exist")
        return backbone(source=source)

    replace_backbones(monkeypatch, load)
    code, _, err = name(city)
    assert code == 1 and "colours.pth does not exist" in err
    assert name(city, "--weights", "/new/colours.pth")[0] == 0


def test_json_is_one_document(city):
    code, out, err = name(city, "--json", "-q")
    assert code == 0 and err == "", err
    document = json.loads(out)
    assert document["names"] == stored(city)["names"] and document["warnings"] == []
    assert document["run"] == str(city / "run") and document["outside"] == 0
    (city / "labels" / "0.png").write_bytes(b"")
    code, out, _ = name(city, "--json", "-q")
    assert code == 1 and "is not a picture that can be read" in json.loads(out)["error"]


def test_several_ids_of_one_class(city):
    relabel(city, lambda truth: truth * 10 + 3)
    merged = {"3": "wall", "13": "green", "23": "sea", "33": "wall"}
    code, out, err = name(city, classes=merged)
    assert code == 0, err
    found = stored(city)
    assert found["classes"] == ["wall", "green", "sea"]
    # "wall" is two clusters, of which one has the name
    assert sorted(set(found["names"]) & {"wall", "green", "sea"}) == ["green", "sea", "wall"]
    (other,) = [k for k, text in enumerate(found["names"]) if text.startswith("cluster ")]
    assert found["names"][other] == f"cluster {other}" and ORDER[other] in (0, 3)
    assert f"\n{other:7}  cluster {other}" in out and "no cluster has" not in err


def test_classes_without_a_cluster_are_listed(city):
    code, _, err = name(city, classes=[*NAMES, "snow", "ice"])
    assert code == 0 and "no cluster has the class snow, ice\n" in err
    found = stored(city)
    assert found["iou"][4:] == [None, None]
    assert found["miou"] == pytest.approx(np.mean(found["iou"][:4]))


def test_ids_outside_of_the_classes_are_told_and_ignored_ones_are_not(city):
    relabel(city, lambda truth: np.where(truth == 3, 255, truth).astype(np.uint8))
    truths = np.array([mosaic(i)[1] for i in range(4)])
    share = (truths == 3).mean()
    code, _, err = name(city, classes=NAMES[:3])
    assert code == 0
    assert f"{share:.1%} of the pixels have ids outside of the classes: 255; add" in err
    assert "by --ignore 255\n" in err
    before = stored(city)
    assert before["trained_on"] is True
    assert np.sum(before["counts"]) == (truths != 3).sum()
    code, _, err = name(city, "--ignore", "255", classes=NAMES[:3])
    assert code == 0 and "outside" not in err and stored(city) == before
    # an id of a class can be ignored, too
    assert name(city, "--ignore", "0")[0] == 0
    assert np.array(stored(city)["counts"])[:, 0].sum() == 0


def test_few_missing_labels_are_named(city):
    for i in range(4, 40):
        for folder in ("pictures", "labels"):
            (city / folder / f"{i}.png").symlink_to(city / folder / f"{i % 4}.png")
    (city / "labels" / "17.png").unlink()
    code, _, err = name(city)
    assert code == 0 and "1 picture has no labels: 17.png\n" in err
    assert stored(city)["pictures"] == 39


def test_other_pictures_than_those_of_the_training(city):
    (city / "pictures" / "x.png").write_bytes((city / "pictures" / "1.png").read_bytes())
    assert name(city)[0] == 1  # 1 of 5 has no labels
    data = [city / "pictures" / f"{i}.png" for i in range(2)]
    code, _, err = name(city, "--data", *data)
    assert code == 0, err
    assert stored(city)["pictures"] == 2 and stored(city)["trained_on"] is False


def test_errors_leave_the_older_names(city):
    assert name(city)[0] == 0
    before = (city / "run" / "names.json").read_bytes()
    for words, classes, text in (
        ((), {"77": "road"}, "no pixel of the labels in "),
        (("--data", city / "none"), NAMES, "none does not exist"),
        (("--weights", "/w"), {}, "contains no names"),
    ):
        with case(text):
            code, out, err = name(city, *words, classes=classes)
            assert code == 1 and out == "" and err.count("error: ") == 1 and text in err, err
            assert "  fix: " in err
    with pytest.raises(SystemExit, match="2"):
        name(city, "--ignore", "road")
    assert (city / "run" / "names.json").read_bytes() == before


def test_naming_changes_no_other_file(city):
    before = {path.name: path.read_bytes() for path in (city / "run").iterdir()}
    assert name(city)[0] == 0
    after = {path.name: path.read_bytes() for path in (city / "run").iterdir()}
    assert after.keys() - before.keys() == {"names.json"}
    assert {key: after[key] for key in before} == before


# names.json


def test_names_are_all_different():
    from export.train.matching import match

    matching = match(np.array([[0, 9], [0, 1], [8, 0], [1, 1]]))
    assert cluster_names(matching, ["road", "sky"]) == ["sky", "cluster 1", "road", "cluster 3"]


def test_the_hash_of_a_head_sees_names_shapes_and_values():
    state = {"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float32)}
    found = head_sha256(state)
    assert found == head_sha256(dict(reversed(state.items())))
    for other in (
        {"a": state["a"].reshape(2, 3), "b": state["b"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"] + 1, "b": state["b"]},
        {"a": state["a"].view(np.int32), "b": state["b"]},
        {"a": state["a"]},
    ):
        assert head_sha256(other) != found


def test_names_that_are_damaged_or_of_another_head(city):
    path, folder = city / "run" / "names.json", city / "run"
    assert read_names(folder, "x", 4) is None
    assert name(city)[0] == 0
    good = stored(city)
    assert read_names(folder, good["head"], 4) == good
    for head, clusters in (("0" * 64, 4), (good["head"], 5)):
        with pytest.raises(InputError, match=r"another checkpoint.*\n  fix: name the clus"):
            read_names(folder, head, clusters)
    for change in (
        {"schema": "dg-names/2"},
        {"names": ["a", "a", "b", "c"]},
        {"names": "abcd"},
        {"names": [1, 2, 3, 4]},
        {"accuracy": 1.5},
        {"miou": None},
        {"pictures": 0},
        {"labels": 3},
        {"head": None},
    ):
        path.write_text(json.dumps(good | change))
        with case(change), pytest.raises(BundleError, match=r"names.json is damaged"):
            read_names(folder, good["head"], 4)
    for text in ("", "[]", "{}", "{", "[" * 10**5, '"\\ud800"'):
        path.write_text(text)
        with case(text[:9]), pytest.raises(BundleError, match=r"names.json is damaged"):
            read_names(folder, good["head"], 4)
