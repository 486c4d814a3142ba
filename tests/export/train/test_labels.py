"""export/train/labels.py: files of labels and of classes, good and bad."""

import io
import json
import shutil
import struct

import numpy as np
import pytest
from cases import case

from export.train.labels import Classes, LabelSet, read_ids
from runtime.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="label PNGs are written by Pillow")


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_classes_in_every_spelling(tmp_path):
    for value in (["road", "sky"], "road\nsky\n", "road\r\nsky", {"0": "road", "1": "sky"}):
        with case(value):
            found = Classes.read(write(tmp_path / "c", value))
            assert found == Classes(("road", "sky"), {0: 0, 1: 1})


def test_ids_of_one_name_are_one_class(tmp_path):
    value = {"1": "person", "7": "vehicle", "3": "vehicle", "255": "person"}
    found = Classes.read(write(tmp_path / "c", value))
    assert found.names == ("person", "vehicle")
    assert found.of_id == {1: 0, 7: 1, 3: 1, 255: 0}
    ids = np.array([[1, 3, 7], [255, 0, 65535]], np.uint16)
    assert found.numbers(ids).tolist() == [[0, 1, 1], [0, 2, 2]]  # 2: in no class
    assert found.numbers(ids, ignore=0).tolist() == [[0, 1, 1], [0, -1, 2]]
    assert found.numbers(ids, ignore=255).tolist() == [[0, 1, 1], [-1, 2, 2]]
    far = np.array([[-1, 10**12, -(2**63)]])
    assert found.numbers(far, ignore=-1).tolist() == [[-1, 2, 2]]
    assert found.numbers(ids).dtype == np.int32
    largest = Classes.read(write(tmp_path / "c", {"65535": "road", "0": "sky"}))
    assert largest.numbers(ids).tolist() == [[2, 2, 2], [2, 1, 0]]


def test_classes_that_are_refused(tmp_path):
    for value, match in (
        ("", "contains no names"),
        ("  \n ", "contains no names"),
        ({}, "contains no names"),
        ([], "contains no names"),
        ("[1, 2]", "wanted a list of texts"),
        ({"road": "0"}, "'road' is no id of a class; wanted a whole number, 0 to 65535"),
        ({"65536": "road"}, "'65536' is no id"),
        ({"1": "road", "01": "sky"}, "contains an id twice"),
        ('{"0": "road", "0": "sky"}', "contains an id twice"),
        ('{"0": {"1": "road"}}', "wanted a list of texts"),
        ([str(i) for i in range(65537)], "contains 65537 names; wanted at most 65536, because"),
        ("\n".join("a" * 65538), "contains 65538 names; wanted at most 65536"),
        ({"1": 2}, "wanted a list of texts"),
        (["road", ""], "a class has the name ''"),
        (["road", "cluster 7"], "a class has the name 'cluster 7'"),
        (["a\x07"], "control characters"),
    ):
        with case(value), pytest.raises(InputError, match=match):
            Classes.read(write(tmp_path / "c", value))
    (tmp_path / "c").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="is no text in UTF-8"):
        Classes.read(tmp_path / "c")
    with pytest.raises(InputError, match="does not exist"):
        Classes.read(tmp_path / "none")
    most = Classes.read(write(tmp_path / "c", [str(i) for i in range(65536)]))
    assert most.numbers(np.array([[65535, 65536]])).tolist() == [[65535, 65536]]


def png(path, array, mode=None, **options):
    picture = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    picture.save(path, "PNG", **options)
    return path


def test_ids_of_every_kind_of_file(tmp_path, rng):
    small = rng.integers(0, 256, (5, 7)).astype(np.uint8)
    large = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
    np.save(tmp_path / "a.npy", large.astype(np.int64) - 9)
    shutil.copy(tmp_path / "a.npy", tmp_path / "b.NPY")
    palette = Image.fromarray(small)
    palette.putpalette([*range(255, -1, -1)] * 3)  # colours that are not the indices
    palette.save(tmp_path / "p.png")
    few = Image.fromarray(small % 4)
    few.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
    few.save(tmp_path / "few.png", bits=2)
    for path, wanted in (
        (png(tmp_path / "8.png", small), small),
        (png(tmp_path / "16.png", large), large),
        (tmp_path / "p.png", small),
        (tmp_path / "few.png", small % 4),
        (tmp_path / "a.npy", large.astype(np.int64) - 9),
        (tmp_path / "b.NPY", large.astype(np.int64) - 9),
    ):
        with case(path.name):
            np.testing.assert_array_equal(read_ids(path), wanted)


def test_the_largest_labels(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((5, 7), np.uint8))
    for path in (png(tmp_path / "a.png", np.zeros((5, 7), np.uint8)), tmp_path / "a.npy"):
        with case(path.suffix):
            monkeypatch.setattr("runtime.pictures.limits.MAX_PIXELS", 35)
            assert read_ids(path).shape == (5, 7)
            monkeypatch.setattr("runtime.pictures.limits.MAX_PIXELS", 34)
            with pytest.raises(InputError, match=f"{path.name} has 7 x 5 pixels, .* most 34\n"):
                read_ids(path)


def test_arrays_of_every_order_and_version(tmp_path):
    ids = np.arange(35).reshape(5, 7)
    for array in (ids, np.asfortranarray(ids), ids.astype(">u2"), ids > 9):
        for version in ((1, 0), (2, 0)):
            with case(array.dtype, array.flags.c_contiguous, version):
                with (tmp_path / "a.npy").open("wb") as file:
                    np.lib.format.write_array(file, array, version)
                np.testing.assert_array_equal(read_ids(tmp_path / "a.npy"), array)


def test_files_that_are_no_labels(tmp_path, rng):
    colours = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(colours).save(jpeg, "JPEG")
    good = png(tmp_path / "good.png", colours[..., 0]).read_bytes()

    def npy(name, array):
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    def raw(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    def header(text):
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    def form(shape, descr="'<i4'"):
        return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n")

    archive = io.BytesIO()
    np.savez(archive, ids=colours[..., 0])
    for path, match in (
        (png(tmp_path / "rgb.png", colours), "is a PNG of several channels.*colours are no labels"),
        (png(tmp_path / "la.png", colours[..., 0], "LA"), "is a PNG of several channels"),
        (png(tmp_path / "bits.png", colours[..., 0] > 99), "is a grey PNG of 1 bit; wanted"),
        (raw("jpeg.png", jpeg.getvalue()), "is a JPEG file; wanted a PNG"),
        (raw("empty.png", b""), "is not a picture that can be read"),
        (raw("half.png", good[:60]), "is a truncated PNG"),
        (npy("colours.npy", colours), r"contains \(5, 7, 3\) uint8; wanted \(H, W\) integers"),
        (npy("floats.npy", colours[..., 0] / 2), r"contains \(5, 7\) float64"),
        (npy("empty.npy", np.zeros((0, 3), int)), r"contains \(0, 3\)"),
        (npy("objects.npy", np.array([[{}]])), r"contains \(1, 1\) object"),
        *(
            (raw(f"{number}.npy", data), "is no .npy file, or is a damaged one\n.*numpy.save")
            for number, data in enumerate(
                (
                    b"road",
                    b"",
                    archive.getvalue(),
                    b"PK\x03\x04 and damage",
                    header("(((("),
                    header("{[]: 3}"),
                    header("  1\n 2"),
                    header("-" * 9000 + "1"),
                    header("\0"),
                    form("3"),
                    form((1, 1), "'O', "),
                    b"\x93NUMPY\x03\x00\xff\xff\xff\xff{",
                )
            )
        ),
        (raw("huge.npy", form((10**6, 10**6))), "1000000 x 1000000 pixels, wanted at most 2684354"),
        (raw("long.npy", form((10**30, 3))), "pixels, wanted at most 268435456"),
        (raw("less.npy", form((-1, 3))), r"contains \(-1, 3\) int32; wanted"),
        (raw("cut.npy", form((2, 3)) + b"a" * 23), "is a truncated .npy file: it states 2 x 3 p"),
    ):
        with case(path.name, match), pytest.raises(InputError, match=f"(?s){match}"):
            read_ids(path)


def test_pairs_are_found_by_their_stems(tmp_path):
    pictures = [tmp_path / f"{i}.jpg" for i in range(40)]
    labels = tmp_path / "labels"
    labels.mkdir()
    for i in range(38):
        (labels / f"{i}.{'npy' if i % 2 else 'PNG'}").touch()
    (labels / "39.txt").touch()
    found = LabelSet.find(pictures, labels)
    assert len(found.pairs) == 38 and found.missing == ("38.jpg", "39.jpg")
    assert found.pairs[1] == (pictures[1], labels / "1.npy")
    (labels / "1.npy").unlink()
    with pytest.raises(InputError, match=r"3 of 40 pictures have no .*: 1.jpg, 38.jpg, 39"):
        LabelSet.find(pictures, labels)
    with pytest.raises(InputError, match=r"35 of 40 .*0.jpg.* and 25 more\n  fix: .*--data"):
        for i in range(36):
            for path in labels.glob(f"{i}.*"):
                path.unlink()
        (labels / "0.png").touch()
        (labels / "35.png").touch()
        (labels / "34.png").touch()
        LabelSet.find(pictures, labels)


def test_of_100_pictures_five_may_have_no_labels(tmp_path):
    pictures = [tmp_path / f"{i}.jpg" for i in range(100)]
    labels = tmp_path / "labels"
    labels.mkdir()
    for i in range(5, 100):
        (labels / f"{i}.png").touch()
    assert len(LabelSet.find(pictures, labels).missing) == 5
    (labels / "5.png").unlink()
    with pytest.raises(InputError, match="6 of 100 pictures have no labels"):
        LabelSet.find(pictures, labels)


def test_folders_that_do_not_fit(tmp_path):
    pictures = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    labels = tmp_path / "labels"
    with pytest.raises(InputError, match="labels, which does not exist"):
        LabelSet.find(pictures, labels)
    labels.touch()
    with pytest.raises(InputError, match="labels, which is no folder"):
        LabelSet.find(pictures, labels)
    labels.unlink()
    labels.mkdir()
    with pytest.raises(InputError, match=r"0 of 2 pictures, as a.jpg, have .* label files is 0\n"):
        LabelSet.find(pictures, labels)
    (labels / "x.png").touch()
    with pytest.raises(InputError, match=r"number of label files is 1, as x.png"):
        LabelSet.find(pictures, labels)
    for name in ("a.png", "b.png"):
        (labels / name).touch()
    with pytest.raises(InputError, match="have the same stem"):
        LabelSet.find([*pictures, tmp_path / "more" / "a.png"], labels)
    (labels / "a.npy").touch()
    with pytest.raises(InputError, match=r"contains a.npy and a.png; wanted one file"):
        LabelSet.find(pictures, labels)


def test_labels_of_another_size(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    picture = png(tmp_path / "a.png", np.zeros((6, 8, 3), np.uint8))
    png(labels / "a.png", np.zeros((8, 6), np.uint8))
    with pytest.raises(InputError, match=r"labels/a.png has 8 x 6 pixels, and .*a.png 6 x 8"):
        next(LabelSet.find([picture], labels).read(Classes(("x",), {0: 0}), None))
