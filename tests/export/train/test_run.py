"""Reading a run: what is no run, unfinished, damaged or hostile is one clear error."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save
from training import TINY, draw_pictures, train, trained

from export.train.run import (
    BEST,
    CHECKPOINT,
    ENTRY,
    files_sha256,
    open_run,
    read_checkpoint,
    read_entry,
)
from runtime.errors import BundleError, InputError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = draw_pictures(folder / "pictures", 4)
    return trained(data, folder / "run", "--steps", "2", "--batch", "2")


@pytest.fixture
def run(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "run")


def change(run, **fields):
    """Change fields of run.json; "loop.steps" is written as loop__steps."""
    entry = json.loads((run / ENTRY).read_text())
    for name, value in fields.items():
        *outer, key = name.split("__")
        place = entry
        for part in outer:
            place = place[part]
        place[key] = value
    (run / ENTRY).write_text(json.dumps(entry))


def parts(run):
    """The tensors and the state of the checkpoint."""
    found = read_checkpoint(run)
    return dict(found.tensors), json.loads(json.dumps(found.state))


def put(run, tensors, state, file=CHECKPOINT):
    text = state if isinstance(state, str) else json.dumps(state)
    (run / file).write_bytes(save(tensors, metadata={"state": text}))


def test_a_finished_run(whole):
    run = open_run(whole)
    arrays, step = run.head()
    assert step == 2 and run.entry["settings"]["clusters"] == 3
    assert arrays["student"].shape == (3, 4) and arrays["teacher"].dtype == np.float32
    assert run.entry["data"] == [str(whole.parent / "pictures")]
    assert run.entry["backbone"]["name"] == "tiny" and run.entry["views"] == {
        "size": 32,
        "crops": "centre",
    }
    assert run.entry["command"].startswith("python -m export train segunify --data ")
    assert {"dynaguide-edge", "python", "torch", "numpy", "opencv"} == run.entry["versions"].keys()
    assert TINY[0] in run.entry["command"]


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_run(tmp_path / "no")
    with pytest.raises(InputError, match=r"is no run: it has no run\.json"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is no folder; a run is one"):
        open_run(tmp_path / "file")


def test_an_unfinished_run(run):
    change(run, loop__steps=5)
    assert open_run(run).done == 2
    change(run, loop__select="energy", loop__holdout=0.5)
    with pytest.raises(InputError, match="has no checkpoint to choose yet: 2 of 5 steps"):
        open_run(run)
    change(run, loop__select="last", loop__holdout=0.0)
    (run / CHECKPOINT).unlink()
    with pytest.raises(InputError, match="has no checkpoint to choose yet: 0 of 5") as caught:
        open_run(run)
    assert caught.value.fix == f"python -m export train segunify -o {run} --resume"


HOSTILE = [
    ({"schema": "dg-run/2"}, "schema 'dg-run/2'; this version reads"),
    ({"schema": 3}, "schema 3"),
    ({"more": 1}, "missing or unknown fields: more"),
    ({"method": "../x"}, "method is '../x'; wanted one of segunify, boosting, refine"),
    ({"method": ["segunify"]}, "method is .*; wanted one of segunify"),
    ({"method": None}, "method is None; wanted one of"),
    ({"settings": []}, "settings is .*; wanted an object"),
    ({"options": {"clusters": [3]}}, "options is .*; wanted an object of texts and numbers"),
    ({"options": {"clusters": 10**400}}, "options is"),
    ({"data": "pictures"}, "data is 'pictures'; wanted a list of texts"),
    ({"data": []}, "data is .*; wanted a list of texts"),
    ({"files": 0}, "files is 0; wanted a whole number above 0"),
    ({"files": True}, "files is True"),
    ({"files_sha256": "AB" * 32}, "files_sha256 is"),
    ({"versions": {"torch": 2}}, "versions is .*; wanted an object of texts"),
    ({"command": "x" * 200_000}, "command is .*; wanted a text"),
    ({"backbone__stride": 0}, "backbone: stride is 0; wanted 1 to 1024"),
    ({"backbone__channels": 0}, "backbone: channels is 0; wanted 1 to 65536"),
    ({"backbone__channels": 65537}, "backbone: channels is 65537"),
    ({"backbone__mean": [0, 0]}, "backbone: mean is .*; wanted three numbers"),
    ({"backbone__std": [1, 1, "1"]}, "backbone: std is"),
    ({"backbone__trained": 1}, "backbone: trained is 1; wanted true or false"),
    ({"backbone__sha256": ""}, "backbone: sha256 is"),
    ({"backbone__more": ""}, "backbone: missing or unknown fields: more"),
    ({"views__size": 7}, "imgsz is 7; wanted 16 to 4096"),
    ({"views__crops": {}}, "crops is {}"),
    ({"views": {"side": 32}}, "views: missing or unknown fields: crops, side, size"),
    ({"views": {}}, "views: missing or unknown fields: crops, size"),
    ({"loop__steps": 0}, "steps is 0; wanted a whole number from 1"),
    ({"loop__batch": "32"}, "batch is '32'"),
    ({"loop__lr": -1}, "lr is -1; wanted a number above 0"),
    ({"loop__device": "cuda:0; rm"}, "device is 'cuda:0; rm'"),
    ({"loop__precision": "fp8"}, "precision is 'fp8'"),
    ({"loop__select": []}, "select is"),
    ({"loop__select": "cold", "loop__holdout": 0.1}, "select is cold; wanted one of last, energy"),
    ({"loop__holdout": 0.1}, "holdout is the share of pictures"),
    ({"loop__more": 1}, "loop: missing or unknown fields: more"),
    ({"loop": {}}, "loop: missing or unknown fields"),
    ({"settings": {}}, "settings: missing or unknown fields"),
    ({"settings__clusters": 1}, "clusters"),
    ({"settings__more": 1}, "settings: missing or unknown fields: more"),
]


@pytest.mark.parametrize(("fields", "match"), HOSTILE, ids=[text for _, text in HOSTILE])
def test_a_hostile_entry(run, fields, match):
    change(run, **fields)
    with pytest.raises(BundleError, match=match):
        read_entry(run)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[" * 10**5, "cannot be read"),
        (b"[1]", "is a list; wanted a JSON object"),
        (b'{"schema": NaN}', "NaN is no JSON number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read"),
        (b" " * 2**23, "at most 4194304"),
    ],
    ids=["empty", "not UTF-8", "deep", "list", "NaN", "long number", "large"],
)
def test_a_damaged_entry(run, data, match):
    (run / ENTRY).write_bytes(data)
    with pytest.raises(BundleError, match=match) as caught:
        read_entry(run)
    assert "copy the run again" in caught.value.fix


def test_an_entry_that_is_a_link_or_a_pipe(run, tmp_path):
    (run / ENTRY).rename(tmp_path / "other.json")
    (run / ENTRY).symlink_to(tmp_path / "other.json")
    with pytest.raises(BundleError, match="links are not followed"):
        read_entry(run)
    (run / ENTRY).unlink()
    os.mkfifo(run / ENTRY)
    with pytest.raises(BundleError, match="is no regular file"):
        read_entry(run)


STATES = [
    ({"step": -1}, "step is -1; wanted a whole number"),
    ({"step": 2.0}, "step is 2.0"),
    ({"step": 10**9 + 1}, "step is 1000000001"),
    ({"optimiser": []}, "optimiser is"),
    ({"broken": {"a.png": 1}}, "broken is .*; wanted an object of texts"),
    ({"losses": {"loss": "0"}}, "losses is .*; wanted an object of numbers"),
    ({"seconds": -1}, "seconds is -1"),
    ({"log": {"count": 0}}, "log is .*; wanted an object of count and sums"),
    ({"log": {"count": -1, "sums": {}}}, "log is"),
    ({"log": {"count": 1, "sums": {"loss": None}}}, "log is"),
    ({"best": {"step": 1}}, "best is .*; wanted null, or an object of step and value"),
    ({"best": {"step": 0.5, "value": 1}}, "best is"),
    ({"more": 0}, "missing or unknown fields: more"),
]


@pytest.mark.parametrize(("fields", "match"), STATES, ids=[text for _, text in STATES])
def test_a_hostile_state(run, fields, match):
    tensors, state = parts(run)
    put(run, tensors, state | fields)
    with pytest.raises(BundleError, match=match):
        read_checkpoint(run)


def test_a_hostile_checkpoint(run):
    tensors, state = parts(run)
    cases = [
        (save(tensors), "has no state"),
        (save(tensors, metadata={"state": "["}), "state cannot be read"),
        (save(tensors, metadata={"state": '{"step": Infinity}'}), "no JSON number"),
        (b"", "is no safetensors file"),
        (b"\xff" * 100, "is no safetensors file"),
        ((2**60).to_bytes(8, "little") + b"{}", "is no safetensors file"),
        ((run / CHECKPOINT).read_bytes()[:-1], "is no safetensors file"),
    ]
    for data, match in cases:
        (run / CHECKPOINT).write_bytes(data)
        with pytest.raises(BundleError, match=match):
            read_checkpoint(run)
    for change_of, match in [
        ({"other.a": np.zeros(1)}, "has a tensor 'other.a'"),
        ({"module.student": np.full((3, 4), np.nan, np.float32)}, "'module.student' has NaN"),
    ]:
        put(run, tensors | change_of, state)
        with pytest.raises(BundleError, match=match):
            read_checkpoint(run)
    put(run, {"optimiser.0.step": np.zeros(1)}, state)
    with pytest.raises(BundleError, match="has no tensor of a module"):
        read_checkpoint(run)
    (run / CHECKPOINT).unlink()
    with pytest.raises(BundleError, match=r"checkpoint.safetensors is missing"):
        read_checkpoint(run)
    with (run / CHECKPOINT).open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(BundleError, match="has 2147483648 bytes; wanted at most"):
        read_checkpoint(run)


def test_the_largest_checkpoint(run, monkeypatch):
    size = (run / CHECKPOINT).stat().st_size
    monkeypatch.setattr("export.train.run.MOST_BYTES", size)
    assert read_checkpoint(run).step == 2
    monkeypatch.setattr("export.train.run.MOST_BYTES", size - 1)
    with pytest.raises(BundleError, match=f"has {size} bytes; wanted at most {size - 1}"):
        read_checkpoint(run)


def test_the_best_checkpoint_is_the_one_that_was_chosen(run):
    change(run, loop__select="energy", loop__holdout=0.5)
    tensors, state = parts(run)
    put(run, tensors, state | {"best": {"step": 1, "value": 0.5}})
    with pytest.raises(BundleError, match=r"best.safetensors is missing"):
        open_run(run)
    put(run, tensors, state | {"step": 1}, BEST)
    assert (open_run(run).head()[1], open_run(run).done) == (1, 2)
    put(run, tensors, state | {"step": 2}, BEST)
    with pytest.raises(BundleError, match=r"best\.safetensors is of step 2, and step 1 was chosen"):
        open_run(run)
    # A kill between the two files: the last checkpoint is the chosen one.
    put(run, tensors, state | {"best": {"step": 2, "value": 0.5}})
    put(run, tensors, state | {"step": 1}, BEST)
    assert open_run(run).head()[1] == 2


LATER = [
    (BEST, b"", True),
    ("curves.png", b"", True),
    ("names.json", b"", True),
    ("log.csv", b"step,loss,seconds\n1,1,1\n2,1,1\n3,1,1\n", True),
    ("log.csv", b"step,loss,seconds\n1,1,1\n2,1,1\n", False),  # killed before the checkpoint
    ("log.csv", b"step,loss", False),
]


@pytest.mark.parametrize(("file", "data", "lost"), LATER)
def test_a_run_that_has_lost_its_checkpoint(whole, tmp_path, file, data, lost):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / ENTRY, run)
    change(run, loop__every=2, loop__steps=5)
    (run / file).write_bytes(data)
    if not lost:
        with pytest.raises(InputError, match="has no checkpoint to choose yet"):
            open_run(run)
        return
    text = rf"run/checkpoint\.safetensors is missing, but it was written: {file}"
    with pytest.raises(BundleError, match=text):
        open_run(run)
    ended = train("segunify", "-o", run, "--resume")
    assert ended.refused(5, "checkpoint.safetensors is missing", "copy the run again")
    assert (run / file).read_bytes() == data


def test_settings_that_do_not_fit_at_resume(run):
    change(run, settings__dim=1, loop__steps=5, options__dim=1)
    assert train("segunify", "-o", run, "--resume").refused(5, "dim is 1", "copy the run again")


def test_the_hash_of_the_files(tmp_path):
    folder = draw_pictures(tmp_path / "a", 3)
    files = sorted(folder.iterdir())
    first = files_sha256(files)
    assert first == files_sha256(sorted(shutil.copytree(folder, tmp_path / "b").iterdir()))
    assert first != files_sha256(files[::-1]) and first != files_sha256(files[:2])
    renamed = files[0].rename(folder / "0.png")
    assert first != files_sha256([renamed, *files[1:]])
    renamed.rename(files[0])
    assert first == files_sha256(files)
    files[0].write_bytes(b"x")
    assert first != files_sha256(files)
    files[0].unlink()
    without = files_sha256(files)
    assert without not in (first, files_sha256(files[1:]))
    for target in ("no", files[0].name):  # a broken link, and a link to itself
        files[0].symlink_to(target)
        assert files_sha256(files) == without
        files[0].unlink()


def test_a_loop_of_links_is_a_broken_picture(tmp_path):
    data = draw_pictures(tmp_path / "pictures", 24)
    (data / "05.png").unlink()
    (data / "05.png").symlink_to("05.png")
    words = ("--data", data, "-o", tmp_path / "run", *TINY, "--steps", "8", "--batch", "6")
    ended = train("segunify", *words)
    assert ended.code == 0 and ended.err.count("WARNING: ") == 1 and "05.png" in ended.err
