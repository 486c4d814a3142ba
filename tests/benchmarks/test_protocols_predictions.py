"""Predictions of the command protocol: which files they are, and what they contain."""

import json

import cv2
import numpy as np
import pytest
from cases import case

from benchmarks import __main__ as command
from benchmarks.quality import layouts, predictions
from benchmarks.quality.layouts import Truth
from runtime.errors import InputError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found_names(root, names, every=None):
    found, unused = predictions.find(root, names, every or names)
    return [p.relative_to(root).as_posix() for p in found], unused


def test_predictions_are_found_by_path_or_stem(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "b/2.PNG", "deep/c/3.png", ".hidden.png", "4.txt")
    names = ["a/1.png", "b/2.PNG", "deep/c/3.png"]
    assert found_names(tmp_path, ["a/1", "x/2", "3"], ["a/1", "b/1", "x/2", "3"]) == (names, 1)
    with pytest.raises(InputError, match=r"picture x/1 has 2 predictions: .*a/1.png, .*b/1.png"):
        found_names(tmp_path, ["x/1"])
    with pytest.raises(InputError, match=r"picture 2 has 2 predictions: .*2.png, .*b/2.PNG"):
        touch(tmp_path, "2.png")
        found_names(tmp_path, ["2"])
    with pytest.raises(InputError, match=r"2 of 2 pictures have no prediction .*first is x/3"):
        found_names(tmp_path, ["x/3", "y/3"])  # a stem that two pictures share
    with pytest.raises(InputError, match="does not exist"):
        found_names(tmp_path / "none", ["a"])


def test_the_files_that_predict_writes(tmp_path):
    touch(tmp_path, "5_labels.png", "5_overlay.png", "deep/1_labels.png", "x_labels.png", "x.png")
    touch(tmp_path, "_labels.png")
    names = ["5", "deep/1", "x", "x_labels"]
    expected = ["5_labels.png", "deep/1_labels.png", "x.png", "x_labels.png"]
    assert found_names(tmp_path, names) == (expected, 2)
    with pytest.raises(InputError, match=r"picture x has 2 predictions"):
        found_names(tmp_path, ["x"])


def test_the_file_of_another_picture_is_never_taken(tmp_path):
    """Also if the other picture is not scored."""
    touch(tmp_path, "bear/0.png")
    with pytest.raises(InputError, match=r"1 of 1 pictures have no prediction"):
        found_names(tmp_path, ["dog/0"], ["bear/0", "dog/0"])
    touch(tmp_path, "0.png", "a/7.png")
    with pytest.raises(InputError, match=r"1 of 1 pictures have no prediction"):
        found_names(tmp_path, ["dog/0"], ["bear/0", "dog/0"])
    with pytest.raises(InputError, match=r"the first is b/7"):
        found_names(tmp_path, ["b/7"], ["b/7", "a/7"])


def test_linked_folders_are_read_and_hidden_ones_are_not(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root, "a/1.png", "a/png", "a/xpng", ".trash/2.png", ".trash/deep/2.png")
    touch(other, "3.png")
    for place in ("linked", "again"):
        (root / place).symlink_to(other)
    (other / "up").symlink_to(root)  # a circle
    (root / "a/self").symlink_to(root / "a")
    names = [p.relative_to(root).as_posix() for p in predictions.files_below(root, ".png")]
    assert names == ["a/1.png", "again/3.png", "linked/3.png"]


def scored(capsys, root, *argv):
    paths = ["--data", str(root), "--predictions", str(root / "found"), "--json"]
    code = command.main(["protocol", *argv, *paths])
    return code, json.loads(capsys.readouterr().out)


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def test_masks_have_eight_bits_and_the_whole_range(tmp_path, capsys):
    mask = 255 * np.eye(4, dtype=np.uint8)
    save(tmp_path / "ECSSD/ground_truth_mask/1.png", mask)
    for wrong, message in (
        (mask // 255, "no values but 0 and 1"), (mask.astype(np.uint16), "16 bits"),
        (np.dstack([mask] * 3), "several channels"),
    ):  # fmt: skip
        save(tmp_path / "found/1.png", wrong)
        code, document = scored(capsys, tmp_path, "saliency")
        assert code == 1 and message in document["error"]
        assert document["fix"] == "save mask * 255 as an 8-bit grey PNG"
    save(tmp_path / "found/1.png", mask // 5 * 4)
    assert set(predictions.grey_mask(tmp_path / "found/1.png").ravel()) == {0, 204 / 255}
    save(tmp_path / "found/1.png", 0 * mask)  # a black mask is one
    assert scored(capsys, tmp_path, "saliency")[1]["scores"]["IoU"] == 0


def chosen(names, *lines):
    return [t.name for t in layouts.chosen([Truth(name, None) for name in names], lines)]


def test_lines_of_a_list_choose_pictures():
    names = ["bear/0", "dog/0", "dog/1", "train2014/x_9", "top", "with space"]
    for lines, expected in (
        (["dog"], ["dog/0", "dog/1"]),
        (["dog/1", "bear"], ["bear/0", "dog/1"]),
        (["0"], ["bear/0", "dog/0"]),
        (["train2014/x_9.jpg"], ["train2014/x_9"]),
        (["x_9.JPEG", "x_9"], ["train2014/x_9"]),
        (["/JPEGImages/480p/dog/1.jpg /Annotations/480p/dog/1.png"], ["dog/1"]),
        (["images/val/top.jpg"], ["top"]),
        (["with space"], ["with space"]),
        (["top 1"], ["top"]),
    ):
        with case(str(lines)):
            assert chosen(names, *lines) == expected
    for line in (".", "cat", "x/dog", "x/0", "top/", "with"):
        with case(line), pytest.raises(InputError, match=f"the list names {line}, of"):
            chosen(names, line)


def test_a_list_is_a_file_of_lines(tmp_path, capsys):
    for name in ("dog/0", "bear/0"):
        save(tmp_path / f"Annotations/480p/{name}.png", np.eye(4, dtype=np.uint8))
        save(tmp_path / f"found/{name}.png", np.eye(4, dtype=np.uint8))
    path = tmp_path / "names.txt"
    argv = ["davis", "--list", str(path)]
    for text in ("dog\n", "\ufeffdog", "\r\n dog/0.png x \r\n\r\n"):
        path.write_text(text, encoding="utf-8")
        code, document = scored(capsys, tmp_path, *argv)
        assert code == 0 and document["pictures"] == 1 and document["unused predictions"] == 1
        assert document["scores"]["IoU"] == 1  # of values of 1
    path.write_text("cat")
    assert "the list names cat" in scored(capsys, tmp_path, *argv)[1]["error"]
    path.write_text(" \n")
    assert "contains no name" in scored(capsys, tmp_path, *argv)[1]["error"]
    path.write_bytes(b"\xff\xfe\x00")
    assert "names.txt cannot be read" in scored(capsys, tmp_path, *argv)[1]["error"]
    path.unlink()
    assert "names.txt does not exist" in scored(capsys, tmp_path, *argv)[1]["error"]
