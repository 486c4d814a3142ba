"""python -m export guides: a folder of masks from a prior, and the same labels as the prior's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from cases import case
from one_layer_networks import NAMES, nearest_colour, onnx, save
from permissions import obeyed
from PIL import Image
from trained_runs import replace_backbones, write_run

from export.__main__ import main
from export.guides.network import open_source
from export.guides.write import write_guides
from export.train.guide_source import GuideSource
from runtime.errors import BundleError, DeviceError, InputError
from runtime.prior.guide_list import GuideList
from sdk import Segmenter

META = {"input_size": {"width": 48, "height": 48}, "size_multiple": 4, "classes": NAMES}


def scene(number, height=40, width=60):
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder with prior.onnx and photos/: a.png, b.png, left/a.jpg."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "prior.onnx", *nearest_colour(), **META)
    (tmp_path / "photos/left").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "left/a.jpg")):
        Image.fromarray(scene(number)).save(tmp_path / "photos" / name)
    return tmp_path


def guides(*words, model="prior.onnx", out="masks"):
    return main(["guides", "--model", str(model), "--data", "photos", "-o", out, *words])


def written(out="masks"):
    """The files of a folder, without hidden ones, and when they were written."""
    from pathlib import Path

    files = [p for p in Path(out).rglob("*") if p.is_file()]
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in files}


def test_hard_guides_are_labels_of_the_prior(place, capsys):
    assert guides("-q") == 0
    out, err = capsys.readouterr()
    assert out == "3 guides written, 0 unchanged, 0 pictures broken -> masks\n" and not err
    assert set(written()) == {"a.png", "b.png", "left/a.png", "guides.json"}
    found = GuideList.read(place / "masks")
    assert found.names == NAMES and found.options == {"soft": False}
    assert found.model["name"] == "prior.onnx" and len(found.model["sha256"]) == 64
    source = open_source("prior.onnx")
    for name in found.pictures:
        with case(name):
            result = Segmenter("masks")(f"photos/{name}")
            guide = source.own_guide(result.image).argmax(-1)

            def labels(_, guide=guide):
                return guide

            labels.names = NAMES
            wanted = Segmenter(labels)(result.image)
            np.testing.assert_array_equal(result.labels, wanted.labels)
            assert result.names == NAMES
            file = found.pictures[name]["file"]
            stored = cv2.imread(str(place / "masks" / file), cv2.IMREAD_UNCHANGED)
            assert stored.dtype == np.uint16
            np.testing.assert_array_equal(stored, guide)


def test_soft_guides_are_the_priors_within_float16(place):
    assert guides("--soft", "-q", "--workers", "2") == 0
    assert set(written()) == {
        "a.safetensors",
        "b.safetensors",
        "left/a.safetensors",
        "guides.json",
    }
    own, stored = (Segmenter(prior, refine=None) for prior in ("prior.onnx", "masks"))
    for name in ("a.png", "b.png", "left/a.jpg"):
        with case(name):
            wanted, found = own(f"photos/{name}"), stored(f"photos/{name}")
            np.testing.assert_allclose(found.confidence, wanted.confidence, atol=2e-3)
            sure = wanted.confidence > 0.51
            assert sure.mean() > 0.5
            np.testing.assert_array_equal(found.labels[sure], wanted.labels[sure])


def test_networks_of_labels_keep_unknown_pixels(place):
    tail = [("ArgMax", {"axis": 1, "keepdims": 0}), ("Sub", {}, np.array([1], np.int64))]
    save(place / "l.onnx", *nearest_colour(), tail=tail, out=onnx.TensorProto.INT64, **META)
    assert guides("-q", model="l.onnx") == 0
    stored = cv2.imread("masks/a.png", cv2.IMREAD_UNCHANGED)
    wanted = open_source("l.onnx").own_guide(scene(0))
    assert (wanted == -1).any() and ((stored == 65535) == (wanted == -1)).all()
    for name in ("a.png", "left/a.jpg"):
        own, masks = (Segmenter(p)(f"photos/{name}").labels for p in ("l.onnx", "masks"))
        np.testing.assert_array_equal(masks, own)
    with pytest.raises(InputError, match=r"l.onnx returns labels, and soft guides are prob"):
        write_guides(open_source("l.onnx"), place / "photos", place / "m", soft=True)


def test_finished_pictures_are_skipped(place, capsys):
    assert guides("-q") == 0
    before = written()
    Image.fromarray(scene(9)).save("photos/b.png")
    Image.fromarray(scene(8)).save("photos/new.png")
    (place / "masks/a.png").unlink()
    capsys.readouterr()
    assert guides("-q") == 0
    assert capsys.readouterr().out.startswith("3 guides written, 1 unchanged, 0 pictures")
    after = written()
    assert after["left/a.png"] == before["left/a.png"] and after["b.png"] != before["b.png"]
    assert Segmenter("masks")("photos/new.png").names == NAMES


def test_other_guides_are_not_mixed(place, capsys):
    assert guides("-q") == 0
    weight, bias = nearest_colour()
    save(place / "other.onnx", 2 * weight, bias, **META)
    for words, model, match in [
        (["--soft"], "prior.onnx", "would be of prior.onnx: soft is True, not False\n"),
        (
            [],
            "other.onnx",
            "masks contains guides of prior.onnx, and these would be of other.onnx: "
            "sha256 differs\n",
        ),
        (
            ["--names", "a,b,c,d"],
            "prior.onnx",
            "stated names is ['a', 'b', 'c', 'd'], not None; names is ['a', 'b', ",
        ),
    ]:
        with case(model, words):
            before = written()
            assert guides("-q", *words, model=model) == 1
            err = capsys.readouterr().err
            assert match in err and "fix: choose another folder: -o MASKS; or remove" in err
            assert written() == before


def test_another_folder_of_pictures_is_not_mixed_in(place, capsys):
    assert guides("-q") == 0
    before = written()
    for number, name in enumerate(("a.png", "b.png", "left/a.jpg"), 7):
        (place / "second" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number)).save(place / "second" / name)
    (place / "third").mkdir()
    Image.fromarray(scene(7)).save(place / "third/x.png")
    for data in ("second", "third"):
        with (
            case(data),
            pytest.raises(InputError, match="the guides of 3 pictures, and none of") as e,
        ):
            write_guides(open_source("prior.onnx"), place / data, place / "masks")
        assert f"is in {place / data}, or all have changed" in e.value.message
        assert e.value.fix.startswith(
            "choose another folder: -o MASKS; or remove the old guides: rm"
        )
        assert written() == before


def test_the_only_picture_may_change(place):
    source, data, out = open_source("prior.onnx"), place / "photos/left", place / "masks"
    assert not write_guides(source, data, out).broken
    Image.fromarray(scene(9)).save(data / "a.jpg")
    assert write_guides(source, data, out).skipped == 0
    assert Segmenter("masks")("photos/left/a.jpg").names == NAMES


def test_pictures_that_were_removed_keep_their_guides(place, capsys):
    assert guides("-q") == 0
    (place / "photos/b.png").rename(place / "b.png")
    (place / "photos/left/a.jpg").unlink()
    before = written()
    capsys.readouterr()
    assert guides("-q") == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 guides written, 1 unchanged")
    assert err == (
        "warning: masks contains guides of 2 pictures that photos does not contain: b.png, "
        "left/a.jpg\n"
    )
    assert {**written(), "guides.json": 0} == {**before, "guides.json": 0}
    assert Segmenter("masks")("b.png").names == NAMES
    Image.fromarray(scene(7)).save("photos/b.jpg")  # its guide takes the place of that of b.png
    assert guides("-q") == 0
    assert {*GuideList.read(place / "masks").pictures} == {"a.png", "b.jpg", "left/a.jpg"}


def test_files_that_were_changed_are_written_again(place, capsys):
    assert guides("-q") == 0
    right = {name: (place / "masks" / name).read_bytes() for name in ("a.png", "b.png")}
    (place / "masks/a.png").write_bytes(b"")
    (place / "masks/b.png").write_bytes(right["a.png"])
    (place / "masks/left/a.png").unlink()
    (place / "masks/left/a.png").mkdir()
    with pytest.raises(InputError, match=r"masks/b.png was changed after guides.json was"):
        Segmenter("masks")("photos/b.png")
    capsys.readouterr()
    assert guides("-q") == 1
    out, err = capsys.readouterr()
    assert out.startswith("2 guides written, 0 unchanged, 1 pictures broken")
    assert "masks/left/a.png is a folder" in err
    assert {name: (place / "masks" / name).read_bytes() for name in right} == right
    listed = json.loads((place / "masks/guides.json").read_text())
    listed["pictures"]["a.png"]["file"] = "b.png"
    (place / "masks/guides.json").write_text(json.dumps(listed))
    (place / "masks/left/a.png").rmdir()
    assert guides("-q") == 0
    assert GuideList.read(place / "masks").pictures["a.png"]["file"] == "a.png"


def test_a_picture_that_was_exchanged_and_restored(place):
    """The guide of the other picture was written, and the process was killed before guides.json."""
    assert guides("-q") == 0
    picture, mask, listed = (
        place / n for n in ("photos/b.png", "masks/b.png", "masks/guides.json")
    )
    before, right, old = picture.read_bytes(), mask.read_bytes(), listed.read_bytes()
    Image.fromarray(scene(9)).save(picture)
    assert guides("-q") == 0 and mask.read_bytes() != right
    picture.write_bytes(before)
    listed.write_bytes(old)
    assert guides("-q") == 0 and mask.read_bytes() == right


def test_links_to_folders_of_pictures_are_followed(place):
    (place / "photos/left").rename(place / "elsewhere")
    (place / "photos/left").symlink_to(place / "elsewhere")
    (place / "elsewhere/back").symlink_to(place / "photos")
    assert guides("-q") == 0
    assert set(written()) == {"a.png", "b.png", "left/a.png", "guides.json"}


def test_a_name_that_is_too_long_for_its_mask(place, capsys):
    Image.fromarray(scene(5)).save(f"photos/{'x' * 247}.png")
    assert guides("-q", "--soft") == 1
    out, err = capsys.readouterr()
    assert out.startswith("3 guides written, 0 unchanged, 1 pictures broken")
    assert "cannot be written" in err and "choose a shorter name" in err


def test_broken_pictures_are_listed_and_the_others_are_written(place, capsys):
    (place / "photos/c.png").write_bytes(b"no picture")
    (place / "photos/left/b.png").symlink_to("gone.png")
    for again in range(2):
        with case(again):
            assert guides("-q") == 1
            out, err = capsys.readouterr()
            assert "2 pictures broken" in out and out[0] == "30"[again]
            assert "photos/c.png is not a picture" in err
            assert "photos/left/b.png is a link whose target does not exist" in err
    Image.fromarray(scene(5)).save("photos/c.png")
    (place / "photos/left/b.png").unlink()
    assert guides("-q") == 0
    assert len(GuideList.read(place / "masks").pictures) == 4


def test_a_guide_that_fails_is_the_error_of_its_picture(place, monkeypatch):
    source, data, out = open_source("prior.onnx"), place / "photos", place / "masks"
    assert not write_guides(source, data, out).broken
    Image.fromarray(scene(9)).save("photos/b.png")
    monkeypatch.setattr(GuideSource, "own_guide", lambda self, picture: failing())

    def failing():
        assert (place / "masks/guides.json").exists()
        raise BundleError("prior.onnx returned NaN", fix="train longer")

    done = write_guides(source, data, out)
    assert done.skipped == 2 and [*done.broken] == ["b.png"]
    assert done.broken["b.png"].message.endswith("photos/b.png: prior.onnx returned NaN")
    assert "b.png" not in GuideList.read(out).pictures
    assert [*write_guides(source, data, place / "new").broken] == ["a.png", "b.png", "left/a.jpg"]


def test_hidden_files_and_links(place, capsys):
    (place / "photos/.hidden").mkdir()
    for name in (".hidden/x.png", ".x.png"):
        Image.fromarray(scene(5)).save(place / "photos" / name)
    (place / "masks").mkdir()
    (place / "masks/.keep").touch()
    assert guides("-q", "--mean", "0.4", "0.4", "0.4") == 0
    assert set(written()) == {".keep", "a.png", "b.png", "left/a.png", "guides.json"}
    capsys.readouterr()
    assert guides("-q") == 1
    assert "preprocess mean is [0.485, 0.456, 0.406], not [" in capsys.readouterr().err
    (place / "link").symlink_to(place / "photos/left")
    assert guides("-q", out="link/masks") == 1
    assert "link/masks is inside the folder of the pictures" in capsys.readouterr().err
    with obeyed():
        (place / "photos/closed").mkdir(mode=0)
        assert guides("-q") == 1
        assert "photos/closed cannot be read: Permission denied" in capsys.readouterr().err


def test_wrong_folders(place, capsys):
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full/x.png").write_bytes(b"")
    source = open_source("prior.onnx")
    for data, out, match in [
        ("gone", "m", "data is gone, which does not exist"),
        ("prior.onnx", "m", "data is prior.onnx, which is no folder"),
        ("empty", "m", "no pictures in empty; wanted"),
        ("photos", "photos", "photos is inside the folder of the pictures"),
        ("photos", "photos/masks", "photos/masks is inside the folder of the pictures"),
        ("photos", "full", "full contains x.png and no guides.json"),
        ("photos", "prior.onnx", "prior.onnx is no folder"),
        ("photos", "no/masks", "no/masks cannot be created"),
    ]:
        with case(data, out), pytest.raises(InputError, match=match) as caught:
            write_guides(
                source,
                place.joinpath(data).relative_to(place),
                place.joinpath(out).relative_to(place),
            )
        assert caught.value.fix
    Image.fromarray(scene(0)).save("photos/b.jpg")
    with pytest.raises(InputError, match=r"contains b.jpg and b.png, whose guides would be one"):
        write_guides(source, place / "photos", place / "m")
    for workers in (0, 257):
        with pytest.raises(InputError, match="workers is"):
            write_guides(source, place / "photos", place / "m", workers=workers)
    for model, match in [
        ("difseg", "model is 'difseg', which is no model's name and no path that exists"),
        ("gone.onnx", "gone.onnx does not exist"),
        ("empty", "empty"),
    ]:
        with case(model):
            assert guides("-q", model=model) != 0
            assert match in capsys.readouterr().err


KILLED = """
import os, signal
from pathlib import Path
from export.guides.network import open_source
from export.guides.write import write_guides
def progress(done, of):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
write_guides(open_source("prior.onnx"), Path("photos"), Path("masks"), every=0, progress=progress)
"""


def test_a_killed_process_is_continued(place, capsys):
    done = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(GuideList.read(place / "masks").pictures) == 2
    assert guides("-q") == 0
    assert capsys.readouterr().out.startswith("1 guides written, 2 unchanged")
    assert len(GuideList.read(place / "masks").pictures) == 3


WRITING = """
import sys
from pathlib import Path
from export.guides.network import open_source
from export.guides.write import write_guides
def progress(done, of):
    print(done, flush=True)
    sys.stdin.read()
write_guides(open_source("prior.onnx"), Path("photos"), Path("masks"), progress=progress)
"""


def test_one_process_at_a_time_writes_a_folder(place, capsys):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for ends in (True, False):
        with (
            case(ends),
            subprocess.Popen([sys.executable, "-c", WRITING], **pipes) as other,
        ):
            other.stdout.readline()
            assert guides("-q") == 1
            err = capsys.readouterr().err
            assert "another process writes guides into masks\n  fix: wait until it ends, or" in err
            if ends:
                other.stdin.close()
            else:
                other.kill()
        assert guides("-q") == 0
        assert "3 unchanged" in capsys.readouterr().out or ends
        assert set(written()) == {"a.png", "b.png", "left/a.png", "guides.json"}
    assert len(GuideList.read(place / "masks").pictures) == 3


def test_ctrl_c_and_a_failing_device_keep_what_is_finished(place, monkeypatch, capsys):
    real, calls = GuideSource.own_guide, []

    def interrupted(self, picture):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, picture)

    monkeypatch.setattr(GuideSource, "own_guide", interrupted)
    assert guides("-q") == 130
    assert 1 <= len(GuideList.read(place / "masks").pictures) <= 3

    def fails(self, picture):
        raise DeviceError("the device is gone")

    monkeypatch.setattr(GuideSource, "own_guide", fails)
    Image.fromarray(scene(7)).save("photos/z.png")
    before = json.loads((place / "masks/guides.json").read_text())
    with pytest.raises(DeviceError, match="the device is gone"):
        write_guides(open_source("prior.onnx"), place / "photos", place / "masks")
    assert json.loads((place / "masks/guides.json").read_text()) == before


def test_a_second_ctrl_c_ends_the_waiting(place, monkeypatch):
    real, calls, ended = GuideSource.own_guide, [], threading.Event()

    def slow(self, picture):
        calls.append(picture)
        if len(calls) == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            ended.wait(10)
        return real(self, picture)

    Image.fromarray(scene(7)).save("photos/z.png")
    monkeypatch.setattr(GuideSource, "own_guide", slow)
    assert guides("-q") == 130
    assert not ended.is_set() and len(GuideList.read(place / "masks").pictures) == 2
    ended.set()
    for _ in range(500):  # Thread.join does not wait after a Ctrl-C
        if (place / "masks/z.png").exists():
            break
        time.sleep(0.01)
    assert (place / "masks/z.png").exists() and len(calls) == 3


def test_progress_and_warnings(place, capsys):
    for name in ("alpha", "beta"):
        Image.fromarray(scene(4)).convert("RGBA").save(f"photos/{name}.png")
    assert guides() == 0
    err = capsys.readouterr().err
    assert "compute guides ..." in err and "100 % 5 of 5" in err
    assert "warning: 2 pictures: alpha.png, beta.png: The alpha channel was dropped" in err
    save(place / "one.onnx", np.ones((1, 3)), **META | {"classes": ["object"]})
    assert guides(model="one.onnx", out="masks2") == 0
    assert "warning: one.onnx: " in capsys.readouterr().err


def test_a_checkpoint_folder_is_frozen_first(checkpoint, place):
    source = open_source(str(checkpoint))
    assert source.name == checkpoint.name and source.classes == 5
    assert source.prior.name == f"{checkpoint.name}.onnx"  # as messages begin
    done = write_guides(source, place / "photos", place / "masks", soft=True)
    assert not done.broken and done.pictures == 3
    again = write_guides(open_source(str(checkpoint)), place / "photos", place / "masks", soft=True)
    assert again.skipped == 3  # the same files are frozen to the same bytes
    assert len(Segmenter("masks")("photos/a.png").names) == 5


def test_a_bundle_and_runs(plain, place, tmp_path, monkeypatch):
    source = open_source(str(plain[1]))
    assert not write_guides(source, place / "photos", place / "b").broken
    assert Segmenter("b")("photos/left/a.jpg").names == NAMES

    replace_backbones(monkeypatch)
    run = write_run(tmp_path / "run", [tmp_path / "photos"])
    source = open_source(str(run))
    assert source.name == "run" and source.output == "probabilities"
    assert not write_guides(source, place / "photos", place / "r", soft=True).broken
    assert Segmenter("r", refine=None)("photos/a.png").labels.shape == (40, 60)


def test_the_guides_of_a_run_of_refine_are_its_priors(place):
    words = ["--data", "photos", "--steps", "1", "--no-cache", "-q", "-o", "camera"]
    assert main(["train", "refine", "--model", "prior.onnx", *words]) == 0
    with pytest.raises(InputError, match="camera is a run of refine, whose guides are those of"):
        open_source("camera")
