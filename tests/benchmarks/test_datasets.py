"""The loaders: their choice of pictures on a made-up data set, and the real one where it is."""

import json
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
from cases import case
from scipy.io import savemat

from benchmarks.quality import datasets, run
from runtime.errors import InputError, MissingBackend

needs_data = pytest.mark.skipif(
    datasets.data_root() is None, reason="developer data set absent: set SEG_DATA=/path/to/data"
)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a data set in which pixel (0, 0) of a file is its number. No test may change it."""
    tmp_path = tmp_path_factory.mktemp("data")
    pixel = np.zeros((2, 3), np.uint8)
    for i in range(92):
        red = np.dstack([pixel, pixel, pixel + i])  # OpenCV writes BGR
        write(tmp_path / f"camvid/train/{i:03}.png", red)
        write(tmp_path / f"camvid/trainannot/{i:03}.png", pixel + i % 12)
    for sequence, frames in (("blackswan", 50), ("car-shadow", 40), ("dog", 60)):
        for i in range(frames):
            write(tmp_path / f"davis/frames/{sequence}/{i:05}.jpg", pixel)
            write(tmp_path / f"davis/masks/{sequence}/{i:05}.png", pixel + 255 * (i % 2))
    for i in range(20):
        write(tmp_path / f"coco_mini/images/{i:03}.jpg", pixel)
        write(tmp_path / f"coco_mini/semantic_masks/{i:03}.png", np.uint8([[0, 7, 9]]))
    categories = [(7, "sky"), (9, "animal")]
    entry = {
        "supercategories": ["sky", "animal"],
        "categories": [{"id": i, "supercategory": name} for i, name in categories],
    }
    (tmp_path / "coco_mini/categories.json").write_text(json.dumps(entry))
    people = np.empty((1, 2), object)
    for k in range(2):
        people[0, k] = {"Segmentation": np.full((2, 3), k + 1, np.uint16)}
    for i in range(100):
        write(tmp_path / f"bsds500/images/val/{i:03}.jpg", pixel)
        truth = tmp_path / f"bsds500/groundTruth/val/{i:03}.mat"
        truth.parent.mkdir(parents=True, exist_ok=True)
        savemat(truth, {"groundTruth": people})
    return tmp_path


@pytest.fixture
def fake(made, monkeypatch):
    """Let SEG_DATA name the made data set."""
    monkeypatch.setenv("SEG_DATA", str(made))


@pytest.fixture
def changeable(made, monkeypatch, tmp_path):
    """Let SEG_DATA name a copy of the made data set, which the test may change."""
    shutil.copytree(made, tmp_path / "data", copy_function=shutil.copyfile)
    monkeypatch.setenv("SEG_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def numbers(pictures):
    return [int(picture.image_path.stem) for picture in pictures]


def test_camvid_splits(fake):
    assert numbers(datasets.camvid()) == list(range(0, 92, 8))
    assert numbers(datasets.camvid(split="other")) == list(range(3, 92, 8))


def test_camvid_splits_are_disjoint(fake):
    for count in (1, 2, 5, 12, 30, 45, 46):
        chosen = numbers(datasets.camvid(count)) + numbers(datasets.camvid(count, split="other"))
        with case(count):
            assert len(set(chosen)) == 2 * count


def test_camvid_reads_rgb_and_its_own_truth(fake):
    frame = datasets.camvid()[2]
    assert frame.name == "016"
    np.testing.assert_array_equal(frame.image()[0, 0], [16, 0, 0])
    assert frame.truth().dtype == np.uint8 and frame.truth().shape == (2, 3)
    assert (frame.truth() == 16 % 12).all()


def test_camvid_is_split_by_drive(changeable):
    pixel = np.zeros((2, 3), np.uint8)
    for name in ("0001TP_1", "0006R0_f2", "0016E5_3", "0016E5_4"):
        write(changeable / f"camvid/train/{name}.png", pixel)
        write(changeable / f"camvid/trainannot/{name}.png", pixel)
    assert [f.name for f in datasets.camvid_drive("trained")] == ["0016E5_3", "0016E5_4"]
    assert [f.sequence for f in datasets.camvid_drive("held_out")] == ["0001TP", "0006R0"]
    with pytest.raises(InputError, match="split: expected one of trained, held_out, got 'dev'"):
        datasets.camvid_drive("dev")


def test_coco_is_split_by_the_hash_of_names(fake):
    trained, held = (datasets.coco_mini(part) for part in ("trained", "held_out"))
    assert numbers(held) == [2, 3, 5, 6, 9, 13, 15]
    assert sorted(numbers(trained) + numbers(held)) == list(range(20))
    with pytest.raises(InputError, match="split: expected one of trained, held_out, got 'val'"):
        datasets.coco_mini("val")


def test_coco_categories_become_classes(fake):
    names, table = datasets.coco_classes()
    assert names == ("animal", "sky")
    np.testing.assert_array_equal(table[[0, 7, 9, 8]], [datasets.COCO_VOID, 1, 0, 27])
    truth = datasets.coco_mini("trained")[0].truth()
    assert truth.dtype == np.uint8
    np.testing.assert_array_equal(truth, [[datasets.COCO_VOID, 1, 0]])


def test_a_damaged_coco_is_named(changeable):
    first = datasets.coco_mini("trained")[0]
    write(first.truth_path, np.uint8([[7, 8]]))
    with pytest.raises(InputError, match=r"has category 8, which categories\.json lacks"):
        first.truth()
    write(first.truth_path, np.uint16([[7, 700]]))
    with pytest.raises(InputError, match="has category 700, which"):
        first.truth()
    file = changeable / "coco_mini/categories.json"
    for text in ("{", "[]", '{"supercategories": [], "categories": [{"id": 3}]}'):
        file.write_text(text)
        with case(text), pytest.raises(InputError, match="is not the list of COCO's categories"):
            datasets.coco_classes()
    file.unlink()
    with pytest.raises(InputError, match=r"no .*categories\.json"):
        datasets.coco_classes()


def test_davis_takes_every_step_th_frame_of_each_sequence(fake):
    frames = datasets.davis(20)
    assert [f.name for f in frames[:3]] == [f"blackswan/000{i}" for i in ("00", "20", "40")]
    assert [f.sequence for f in frames] == ["blackswan"] * 3 + ["car-shadow"] * 2 + ["dog"] * 3
    assert len(datasets.davis()) == 6 + 5 + 7
    masks = [frame.mask() for frame in datasets.davis(1)[:2]]
    assert masks[0].dtype == bool and not masks[0].any() and masks[1].all()


def test_more_pictures_in_the_data_set_change_no_choice(changeable):
    """More pictures beside the loaders' folders, and in folders inside them, are not chosen."""

    def chosen():
        pictures = [*datasets.camvid(), *datasets.davis(), *datasets.davis(1), *datasets.bsds()]
        return [(picture.name, picture.image_path, picture.truth_path) for picture in pictures]

    before, pixel = chosen(), np.zeros((2, 3), np.uint8)
    for name in ("camvid/train/._000.png", "davis/frames/dog/._00000.jpg", "davis/frames/.DS_Store",
                 "bsds500/images/val/.a.jpg", "davis/frames/notes.jpg"):  # fmt: skip
        (changeable / name).write_bytes(b"\0\5\x16\7")
    write(changeable / "davis/frames/.more/00000.jpg", pixel)
    for i in range(101):
        for part in ("val", "valannot", "test", "testannot"):
            write(changeable / f"camvid/{part}/{i:03}.png", pixel)
    for i in range(20):
        write(changeable / f"davis_more/frames/bear/{i:05}.jpg", pixel)
        write(changeable / f"davis_more/masks/bear/{i:05}.png", pixel)
        for folder in ("camvid/train", "davis/frames/dog", "bsds500/images/val"):
            write(changeable / folder / f"more/{i:03}.jpg", pixel)
            write(changeable / folder / f"more/{i:03}.png", pixel)
    assert chosen() == before


def test_bsds_is_spread_from_first_to_last(fake):
    assert numbers(datasets.bsds(5)) == [0, 25, 50, 74, 99]
    first, second = datasets.bsds(1)[0].annotators()
    assert first.dtype == np.int32 and (first == 1).all() and (second == 2).all()


def test_names_are_not_ordered_by_their_numbers(changeable):
    """Results that are published depend on the choice."""
    for name in ("2", "10", "9"):
        write(changeable / f"bsds500/images/train/{name}.jpg", np.zeros((2, 3), np.uint8))
    (changeable / "bsds500/groundTruth/train").mkdir()
    assert numbers(datasets.bsds(3, split="train")) == [10, 2, 9]


def test_names_map_to_camvid_classes():
    table = datasets.camvid_lookup(["rider", "background", "sky", "terrain"])
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table, [10, 255, 0, 5])
    assert set(datasets.CITYSCAPES_TO_CAMVID.values()) == set(datasets.CAMVID_CLASSES)


def test_data_set_beside_the_repository_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("SEG_DATA", raising=False)
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "repo/benchmarks/quality/x.py"))
    assert datasets.data_root() is None
    beside = tmp_path / "shared" / "data"
    beside.mkdir(parents=True)
    assert datasets.data_root() == beside


def test_absent_data_set_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(datasets, "data_root", lambda: None)
    with pytest.raises(InputError, match=r"no camvid/train\n  fix: set SEG_DATA="):
        datasets.camvid()


def test_wrong_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SEG_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"SEG_DATA: expected a folder, got .*nowhere"):
        datasets.data_root()
    monkeypatch.setenv("SEG_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"no .*priors/net.onnx\n  fix: set SEG_DATA="):
        datasets.prior_path("net.onnx")
    monkeypatch.setenv("SEG_DATA", "x" * 300)
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        datasets.data_root()


def test_files_of_the_data_set_that_cannot_be_read(changeable, monkeypatch):
    (changeable / "bsds500/groundTruth/val/000.mat").write_bytes(b"no MATLAB file" * 20)
    with pytest.raises(InputError, match=r"000.mat is no MATLAB file"):
        datasets.bsds(1)[0].annotators()
    (changeable / "bsds500/groundTruth/val/000.mat").unlink()
    with pytest.raises(InputError, match=r"000.mat does not exist"):
        datasets.bsds(1)[0].annotators()
    frame = datasets.camvid()[0]
    frame.truth_path.unlink()
    with pytest.raises(InputError, match=r"000.png does not exist"):
        frame.truth()

    def locked(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", locked)
    with pytest.raises(InputError, match="frames cannot be read: Permission denied"):
        datasets.davis()


def test_bad_choice_is_refused(fake):
    for call, message in (
        (lambda: datasets.camvid(split="test"), "split: expected one of dev, other, got 'test'"),
        (lambda: datasets.bsds(split="test"), "split: expected one of train, val, got 'test'"),
        (lambda: datasets.camvid(47), "count: expected at most half of 92 frames, got 47"),
        (lambda: datasets.camvid(0), "count: expected 1 to 46, got 0"),
        (lambda: datasets.bsds(101), "count: expected 1 to 100, got 101"),
        (lambda: datasets.davis(0), "step: expected at least 1, got 0"),
    ):
        with case(message), pytest.raises(InputError, match=message):
            call()


def test_broken_picture_is_named(changeable):
    (changeable / "camvid/train/000.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"000\.png is not a picture"):
        datasets.camvid()[0].image()


def test_missing_scipy_is_named(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingBackend, match=r"pip install 'dynaguide-edge\[bench\]'"):
        datasets.bsds(1)[0].annotators()


@pytest.mark.data
@needs_data
def test_real_camvid():
    for frame in datasets.camvid(2):
        assert frame.image().shape == (360, 480, 3) and frame.image().dtype == np.uint8
        assert frame.truth().shape == (360, 480)
        assert frame.truth().max() == datasets.CAMVID_VOID  # every frame has void


@pytest.mark.data
@needs_data
def test_real_camvid_by_drive():
    trained, held = (datasets.camvid_drive(part) for part in ("trained", "held_out"))
    assert (len(trained), len(held)) == (51, 41)
    assert {f.sequence for f in held} == {"0001TP", "0006R0"}


@pytest.mark.data
@needs_data
def test_real_coco_mini():
    trained, held = (datasets.coco_mini(part) for part in ("trained", "held_out"))
    assert (len(trained), len(held)) == (60, 40)
    assert len(datasets.coco_classes()[0]) == datasets.COCO_CLASSES
    for picture in trained[::20] + held[::20]:
        truth = picture.truth()
        assert truth.shape == picture.image().shape[:2]
        assert set(np.unique(truth)) <= {*range(datasets.COCO_CLASSES), datasets.COCO_VOID}


@pytest.mark.data
@needs_data
def test_real_davis():
    frames = datasets.davis()
    assert len(frames) == 18
    for frame in frames[::6]:
        assert frame.image().shape == (480, 854, 3) and frame.mask().shape == (480, 854)
        assert 0 < frame.mask().mean() < 0.5


@pytest.mark.data
@needs_data
def test_real_bsds():
    for picture in datasets.bsds(3):
        annotators = picture.annotators()
        assert 4 <= len(annotators) <= 9
        for labels in annotators:
            assert labels.shape == picture.image().shape[:2]
            np.testing.assert_array_equal(np.unique(labels), np.arange(1, labels.max() + 1))


@pytest.mark.data
@needs_data
def test_real_priors():
    assert datasets.prior_path("espnetv2_s0.5_cityscapes_512x256.onnx").is_file()


def test_an_unknown_set_is_refused():
    for words, name in (("foo", "'foo'"), ("davis,Camvid", "'Camvid'")):
        with case(words), pytest.raises(InputError, match=f"sets has {name}; wanted some of bsds,"):
            run.main(["--sets", words])
