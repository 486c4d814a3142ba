"""A folder of masks as a prior: which file is the mask of a picture, its values, its errors."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from cases import case
from permissions import obeyed
from safetensors.numpy import save_file

from runtime.checks import UnknownGuide
from runtime.errors import InputError
from runtime.prior.guide_list import SCHEMA, GuideList
from runtime.prior.masks import MasksPrior, files_below, is_mask_folder
from sdk.image import encode_image

PICTURE = np.zeros((24, 36, 3), np.uint8)


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(np.asarray(labels), ".png"))


def number(n, dtype=np.uint8):
    return np.full((24, 36), n, dtype)


def soft(path, array, name="probabilities"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: array}, path)


def test_the_mask_has_the_stem_or_the_relative_path_of_its_picture(tmp_path):
    masks = tmp_path / "masks"
    write(masks / "a.png", number(1))
    write(masks / "left/b.png", number(2))
    write(masks / "right/b.png", number(3))
    write(masks / "deep/left/c.1.png", number(4))
    write(masks / ".hidden.png", number(5))
    write(masks / ".hidden/a.png", number(5))
    prior = MasksPrior(masks)
    for picture, wanted in [
        ("a.jpg", 1),
        ("x/y/a.tif", 1),
        ("x/left/b.jpg", 2),
        ("x/right/b.jpg", 3),
        ("x/deep/left/c.1.jpg", 4),
    ]:
        with case(picture):
            guide = prior(PICTURE, tmp_path / picture)
            assert guide.dtype == np.int32 and (guide == wanted).all()
    for picture in ["b.jpg", "x/b.jpg", "left/c.1.jpg", "c.jpg", ".hidden.jpg"]:
        with case(picture), pytest.raises(InputError, match=r"has no mask in .*; wanted") as caught:
            prior(PICTURE, tmp_path / picture)
        assert caught.value.fix.startswith("add its mask")


def test_two_candidates_are_one_error(tmp_path):
    for number_, (first, second) in enumerate(
        [("a.png", "a.PNG"), ("a.png", "a.safetensors"), ("x/a.png", "x/a.SAFETENSORS")]
    ):
        with case(first, second):
            masks = tmp_path / f"masks{number_}"
            write(masks / first, number(1))
            write(masks / second, number(1))
            with pytest.raises(InputError, match=r"has 2 masks in .*wanted one") as caught:
                MasksPrior(masks)(PICTURE, tmp_path / "x/a.jpg")
            assert first in caught.value.message and second in caught.value.message
            assert caught.value.fix.startswith("remove the others")


def test_the_mask_in_the_folder_of_the_picture_is_before_others(tmp_path):
    for file, label in (("a.png", 1), ("x/a.png", 2), ("y/x/a.png", 3), ("b.png", 4)):
        write(tmp_path / "masks" / file, number(label))
    prior = MasksPrior(tmp_path / "masks")
    for picture, wanted in [("x/a.jpg", 2), ("y/x/a.jpg", 3), ("z/x/a.jpg", 2), ("z/b.jpg", 4)]:
        with case(picture):
            assert (prior(PICTURE, tmp_path / picture) == wanted).all()
    for picture, folder in [("z/a.jpg", "z"), ("x/y/a.jpg", "y")]:
        with (
            case(picture),
            pytest.raises(InputError, match="contains 3 masks of the name a, ") as e,
        ):
            prior(PICTURE, tmp_path / picture)
        assert f"none is in a folder '{folder}', as" in e.value.message
        assert e.value.fix == f"move its mask to {folder}/a.png inside the folder"


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    masks, other = tmp_path / "masks", tmp_path / "other"
    write(other / "a.png", number(1))
    masks.mkdir()
    (masks / "left").symlink_to(other)
    (other / "back").symlink_to(masks)
    (masks / "self").symlink_to(masks)
    assert [*files_below(masks, (".png",))] == ["left/a.png"]
    assert (MasksPrior(masks)(PICTURE, tmp_path / "left/a.jpg") == 1).all()
    assert [*files_below(tmp_path / "gone", (".png",))] == []
    with obeyed():
        (other / "closed").mkdir(mode=0)
        with pytest.raises(InputError, match="closed cannot be read: Permission denied"):
            [*files_below(masks, (".png",))]


def test_accents_have_one_spelling(tmp_path):
    one, two = "caf\u00e9", "cafe\u0301"
    write(tmp_path / f"masks/{two}/{two}.png", number(1))
    prior = MasksPrior(tmp_path / "masks")
    assert (prior(PICTURE, tmp_path / f"{one}/{one}.jpg") == 1).all()


def test_masks_that_are_unknown_everywhere(tmp_path):
    write(tmp_path / "a.png", number(255))
    soft(tmp_path / "b.safetensors", np.zeros((12, 18, 2), np.float32))
    for name, unknown in (("a.png", 255), ("b.safetensors", None)):
        with case(name), pytest.raises(UnknownGuide, match=f"{name} is unknown everywhere") as e:
            MasksPrior(tmp_path, unknown=unknown)(PICTURE, tmp_path / f"{name[0]}.jpg")
        assert e.value.fix
    with pytest.raises(InputError, match=r"b.safetensors contains probabilities, which have no l"):
        MasksPrior(tmp_path, unknown=255)(PICTURE, tmp_path / "b.jpg")


def test_which_files_are_masks(tmp_path):
    """Not the pictures themselves, nor what is hidden."""
    for name in ("p/a.jpg", "p/a.tif", "p/.x/a.png", "p/.a.png", "p/a.txt"):
        write(tmp_path / name, number(9))
    assert not is_mask_folder(tmp_path / "p")
    write(tmp_path / "p/A.PNG", number(1))
    soft(tmp_path / "p/B.SAFETENSORS", np.full((12, 18, 2), 0.5, np.float32))
    prior = MasksPrior(tmp_path / "p")
    assert (prior(PICTURE, tmp_path / "A.jpg") == 1).all()
    assert prior(PICTURE, tmp_path / "B.jpg").shape == (12, 18, 2)


def test_a_number_behind_a_point_is_no_suffix(tmp_path):
    for frame in (1, 2):
        write(tmp_path / f"frame.00{frame}.png", number(frame))
    prior = MasksPrior(tmp_path)
    for frame in (1, 2):
        for name in (f"frame.00{frame}", f"frame.00{frame}.jpg"):
            with case(name):
                assert (prior(PICTURE, tmp_path / name) == frame).all()


def test_unknown_labels_at_the_ends(tmp_path):
    labels = np.concatenate([number(0)[:12], number(255)[:12]])
    write(tmp_path / "a.png", labels)
    for unknown, wanted in ((0, [-1, 255]), (254, [0, 255]), (255, [-1, 0])):
        with case(unknown):
            guide = MasksPrior(tmp_path, unknown=unknown)(PICTURE, tmp_path / "a.jpg")
            assert np.unique(guide).tolist() == wanted
    for label, right in ((4095, True), (4096, False)):
        write(tmp_path / "a.png", number(label, np.uint16))
        with case(label):
            if right:
                assert MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg").max() == 4095
                continue
            with pytest.raises(InputError, match="has the label 4096; wanted at most 4095"):
                MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")


def test_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "photos/x").mkdir(parents=True)
    for folder, label in (("x", 1), ("y", 2)):
        write(tmp_path / "masks" / folder / "a.png", number(label))
    monkeypatch.chdir(tmp_path / "photos/x")
    assert (MasksPrior("../../masks")(PICTURE, Path("a.jpg")) == 1).all()


def test_damaged_masks_are_named(tmp_path):
    write(tmp_path / "a.png", number(1))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"the mask .*/a.png is a truncated PNG") as caught:
        MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
    assert caught.value.fix == "save the mask again"


def test_a_picture_without_a_name(tmp_path):
    write(tmp_path / "a.png", number(1))
    with pytest.raises(InputError, match="a folder of masks needs pictures with names") as caught:
        MasksPrior(tmp_path)(PICTURE, None)
    assert "pass the path" in caught.value.fix


def test_unknown_labels_and_the_largest_one(tmp_path):
    labels = number(1, np.uint16)
    labels[0] = 65535
    write(tmp_path / "a.png", labels)
    guide = MasksPrior(tmp_path, unknown=65535)(PICTURE, tmp_path / "a.jpg")
    assert (guide[0] == -1).all() and (guide[1:] == 1).all()
    with pytest.raises(InputError, match="has the label 65535; wanted at most 4095") as caught:
        MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
    assert "--unknown 65535" in caught.value.fix


def test_any_size_of_the_aspect_ratio(tmp_path):
    for size, right in [
        ((24, 36), True),
        ((12, 18), True),
        ((5, 7), True),
        ((48, 72), True),
        ((36, 24), False),
        ((24, 24), False),
        ((48, 71), False),
    ]:
        with case(size):
            write(tmp_path / "a.png", np.ones(size, np.uint8))
            prior = MasksPrior(tmp_path)
            if right:
                assert prior(PICTURE, tmp_path / "a.jpg").shape == size
                continue
            with pytest.raises(InputError, match=f"has {size[0]} x {size[1]} pixels") as caught:
                prior(PICTURE, tmp_path / "a.jpg")
            assert "24 x 36; wanted the picture's aspect ratio" in caught.value.message


def test_probabilities(tmp_path):
    values = np.random.default_rng(0).random((12, 18, 3)).astype(np.float32)
    values /= values.sum(-1, keepdims=True)
    for dtype in (np.float16, np.float32):
        soft(tmp_path / "a.safetensors", values.astype(dtype))
        guide = MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
        assert guide.dtype == np.float32
        np.testing.assert_array_equal(guide, values.astype(dtype).astype(np.float32))


def test_wrong_probabilities(tmp_path):
    values = np.full((12, 18, 2), 0.5, np.float32)
    nan, negative, large, infinite = (values.copy() for _ in range(4))
    nan[0, 0, 0], negative[0, 0, 0], large[0, 0, 0], infinite[0, 0, 0] = np.nan, -1, 1, np.inf
    wanted = r"wanted \(h, w, C\) float16 or float32"
    for name, array, match in [
        ("scores", values, "contains the tensors scores; wanted probabilities alone"),
        ("probabilities", values[..., 0].copy(), wanted),
        ("probabilities", values[..., :1].copy(), wanted),
        ("probabilities", values.astype(np.float64), wanted),
        ("probabilities", nan, wanted),
        ("probabilities", negative, wanted),
        ("probabilities", infinite, wanted),
        ("probabilities", values[:0].copy(), wanted),
        ("probabilities", large, r"values whose sum over the classes is from 1 to 1.5; wanted pr"),
    ]:
        with case(name, array.dtype, array.shape):
            soft(tmp_path / "a.safetensors", array, name)
            with pytest.raises(InputError, match=match):
                MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
    save_file({"probabilities": values, "more": values}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"the tensors \w+, \w+; wanted probabilities alone"):
        MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
    header = b'{"probabilities":{"dtype":"BF16","shape":[1,1,2],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"contains values of type 'BF16'; wanted float16 or fl"):
        MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")
    (tmp_path / "a.safetensors").write_bytes(b"nothing of this kind")
    with pytest.raises(InputError, match="is no safetensors file, or is a damaged one"):
        MasksPrior(tmp_path)(PICTURE, tmp_path / "a.jpg")


def test_what_is_a_folder_of_masks(tmp_path):
    for name, files, is_one in [
        ("png", ["a.png"], True),
        ("deep", ["x/y/a.png"], True),
        ("soft", ["a.safetensors"], True),
        ("list", ["guides.json"], True),
        ("empty", [], False),
        ("texts", ["a.txt"], False),
        ("bundle", ["a.png", "manifest.json"], False),
        ("damaged bundle", ["prior.onnx", "init.safetensors"], False),
        ("checkpoint", ["config.json", "model.safetensors"], False),
        ("run", ["run.json", "checkpoint.safetensors", "curves.png"], False),
    ]:
        with case(name):
            folder = tmp_path / name
            folder.mkdir()
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(b"")
            assert is_mask_folder(folder) == is_one
            if not is_one:
                with pytest.raises(InputError, match="is no folder of masks") as caught:
                    MasksPrior(folder)
                assert caught.value.fix.startswith("name a folder")
    with pytest.raises(InputError, match="is no folder of masks"):
        MasksPrior(tmp_path / "gone")


def test_arguments_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.png", number(1))
    with pytest.raises(InputError, match="'' is no folder of masks"):
        MasksPrior("")
    for folder in (None, 5, ["masks"]):
        with case(folder), pytest.raises(InputError, match=r"path is a .*; wanted the name of"):
            MasksPrior(folder)
    assert MasksPrior(bytes(tmp_path)).folder == tmp_path


def test_names_fit_the_labels(tmp_path):
    for labels, match in [
        (number(2), "a.png has the label 2, and there are 2 names: road, sky"),
        (np.full((24, 36), 300, np.uint16), "a.png has the label 300, and there are 2 names"),
    ]:
        write(tmp_path / "a.png", labels)
        with case(match), pytest.raises(InputError, match=match) as caught:
            MasksPrior(tmp_path, names=["road", "sky"])(PICTURE, tmp_path / "a.jpg")
        assert f"--unknown {labels.max()}" in caught.value.fix
        with case(match), pytest.raises(InputError, match=match) as caught:
            MasksPrior(tmp_path, names=["road", "sky"], unknown=9)(PICTURE, tmp_path / "a.jpg")
        assert "--unknown" not in caught.value.fix
    soft(tmp_path / "b.safetensors", np.full((12, 18, 3), 1 / 3, np.float32))
    with pytest.raises(InputError, match=r"b.safetensors has 3 classes, and there are 2 names"):
        MasksPrior(tmp_path, names=["road", "sky"])(PICTURE, tmp_path / "b.jpg")


def test_names_and_unknown_are_checked(tmp_path):
    write(tmp_path / "a.png", number(1))
    with pytest.raises(InputError, match="names of the masks: there are none"):
        MasksPrior(tmp_path, names=[])
    assert MasksPrior(tmp_path, names="['road', 'sky']").names == ["road", "sky"]
    assert MasksPrior(tmp_path, names=["road"]).names == ["background", "road"]
    with pytest.raises(InputError, match="names of the masks"):
        MasksPrior(tmp_path, names=5)
    for unknown in (-1, 65536, 1.5):
        with case(unknown), pytest.raises(InputError, match="unknown is"):
            MasksPrior(tmp_path, unknown=unknown)


def entry_of(mask, file, picture):
    names = {"sha256": picture, "file_sha256": mask}
    hashes = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in names.items()}
    return {"file": file} | hashes


def listed(folder, picture, **changes):
    """guides.json of a.png for a picture."""
    entry = entry_of(folder / "a.png", "a.png", picture)
    found = GuideList({"name": "m"}, {"soft": False}, ["road", "sky"], {"a.jpg": entry})
    document = json.loads(found.to_json()) | changes
    (folder / "guides.json").write_text(json.dumps(document))


def test_the_list_names_the_pictures(tmp_path):
    masks, picture = tmp_path / "masks", tmp_path / "a.jpg"
    picture.write_bytes(b"one")
    labels = np.full((8, 8), 1, np.uint16)  # a square network's
    labels[0] = 65535
    write(masks / "a.png", labels)
    write(masks / "b.png", labels)
    listed(masks, picture)
    prior = MasksPrior(masks)
    assert prior.names == ["road", "sky"] and GuideList.read(masks).options == {"soft": False}
    guide = prior(PICTURE, picture)
    assert (guide[0] == -1).all() and (guide[1:] == 1).all()
    with pytest.raises(InputError, match=r"does not list b.png, the mask of .*b.jpg") as caught:
        prior(PICTURE, tmp_path / "b.jpg")
    assert "repeat python -m export guides" in caught.value.fix
    write(masks / "a.png", labels + 1)
    with pytest.raises(InputError, match=r"mask .*a.png was changed after guides.json was wr") as e:
        prior(PICTURE, picture)
    assert "repeat python -m export guides" in e.value.fix
    (masks / "a.png").unlink()
    with pytest.raises(InputError, match=r"a.jpg has no mask in .*masks; wanted a.png") as e:
        MasksPrior(masks)(PICTURE, picture)
    assert "repeat python -m export guides" in e.value.fix
    write(masks / "a.png", labels)
    picture.write_bytes(b"two")
    with pytest.raises(
        InputError, match=r"is not the picture a.jpg .*its sha256 differs"
    ) as caught:
        prior(PICTURE, picture)
    assert "restore the picture" in caught.value.fix
    for options in ({"unknown": 255}, {"names": ["a", "b"]}):
        with case(options), pytest.raises(InputError, match="states these itself"):
            MasksPrior(masks, **options)


def test_the_list_decides_between_masks(tmp_path):
    masks = tmp_path / "masks"
    entries = {}
    for number_, name in enumerate(("a", "left/a")):
        write(masks / f"{name}.png", number(number_, np.uint16))
        picture = tmp_path / f"photos/{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(name.encode())
        entries[f"{name}.jpg"] = entry_of(masks / f"{name}.png", f"{name}.png", picture)
    found = GuideList({"name": "m"}, {"soft": False}, None, entries)
    (masks / "guides.json").write_bytes(found.to_json())
    assert GuideList.read(masks) == found
    prior = MasksPrior(masks)
    for number_, name in enumerate(("a", "left/a")):
        with case(name):
            assert (prior(PICTURE, tmp_path / f"photos/{name}.jpg") == number_).all()


def test_a_damaged_list(tmp_path):
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"one")
    write(tmp_path / "a.png", number(1))
    (tmp_path / "guides.json").write_text("{")
    with pytest.raises(InputError, match=r"guides.json is no JSON document") as caught:
        MasksPrior(tmp_path)
    for text in ("[" * 100_000, "[]", '"text"'):
        (tmp_path / "guides.json").write_text(text)
        with case(text[:3]), pytest.raises(InputError, match=r"no JSON doc|has schema 'None'"):
            MasksPrior(tmp_path)
    assert f"remove it and compute its guides again: rm -r {tmp_path}" in caught.value.fix
    for changes, match in [
        ({"schema": "dg-guides/9"}, f"has schema 'dg-guides/9'; this version reads '{SCHEMA}'"),
        ({"model": 5}, "is damaged: model"),
        ({"options": None}, "is damaged: options"),
        ({"unknown": 255}, "is damaged: unknown"),
        ({"pictures": {"a.jpg": {"file": "a.png", "sha256": "?"}}}, "is damaged: pictures"),
        ({"pictures": {"a.jpg": {"file": "a.png", "sha256": "0" * 64}}}, "is damaged: pictures"),
        ({"pictures": {"a.jpg": {"file": 5, "sha256": "0" * 64}}}, "is damaged: pictures"),
        ({"pictures": []}, "is damaged: pictures"),
        ({"pictures": {"a.jpg": "a.png"}}, "is damaged: pictures"),
        ({"names": 7}, "guides.json: names is 7"),
    ]:
        with case(changes), pytest.raises(InputError, match=match):
            listed(tmp_path, picture, **changes)
            MasksPrior(tmp_path)
