"""The command line of the trainer: its help, its result, and each error before the training."""

import fcntl
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
from permissions import obeyed
from training import TINY, Terminal, draw_pictures, tiny_backbone, train, trained

from export.__main__ import main
from export.train.log import draw_curves
from export.train.run import open_run, read_entry

ROOT = Path(__file__).parents[3]
SHORT = (*TINY, "--steps", "4", "--every", "2", "--log-every", "2", "--batch", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("command") / "pictures", 6)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("command") / "run", *SHORT)


def start(data, out, *words):
    return train("segunify", "--data", data, "-o", out, *SHORT, *words)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def test_help_lists_the_methods_and_does_not_import_torch():
    program = "import sys, export.train.__main__ as m\ntry: m.main(['--help'])\n"
    program += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "segunify" in done.stdout and "name the clusters" in done.stdout
    assert done.stdout.endswith("False\n") and not done.stderr


def test_the_help_of_the_exporter_names_the_trainer(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m export train --help" in " ".join(capsys.readouterr().out.split())


def test_the_help_of_segunify_has_its_defaults():
    text = " ".join(train("segunify", "--help").out.split())
    for part in (
        "need no change", "form (segunify)", "projector (True)", "code (64)", "channels (0.2)",
        "assignments (0.1)", "teacher (0.998)",
    ):  # fmt: skip
        assert part in text, part


def test_usage_errors():
    assert train().refused(2, "METHOD")
    assert train("segunif").refused(2, "did you mean segunify?")
    assert train("segunify", "-o", "x", "--step", "3").refused(2, "did you mean --steps?")
    for name in ("tpu", ""):
        ended = train("segunify", "-o", "x", "--device", name)
        assert ended.refused(2, f"device is '{name}'") and ended.err.count("\n") == 2
    assert train("segunify", "--data", "x").refused(2, "-o")


def test_the_result_for_people(data, tmp_path):
    words = ("--data", data, "-o", tmp_path / "my run", *SHORT)
    ended = train("segunify", *words, curves=draw_curves)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"saved    {tmp_path / 'my run'}/  (step 4, ")
    assert lines[0].endswith(" s in all)")
    assert lines[1].startswith("losses   loss ") and ", within " in lines[1]
    assert f"python -m export train name '{tmp_path / 'my run'}' --labels DIR" in lines[2]
    assert f"python -m export --model '{tmp_path / 'my run'}' -o NAME.bundle" in lines[3]
    assert "  20 %  step 1, loss" in ended.err and " 100 %  step 4, loss" in ended.err
    assert "shifts: 0.300 within" in ended.err
    assert {"run.json", "checkpoint.safetensors", "log.csv", "curves.png", "lock"} == files(
        tmp_path / "my run"
    ).keys()
    assert cv2.imread(str(tmp_path / "my run/curves.png")).shape[1] == 800


def test_a_bar_on_a_terminal_has_the_loss_and_the_time_left(data, tmp_path):
    words = ("segunify", "--data", data, "-o", tmp_path / "run", *SHORT)
    ended = train(*words, stream=Terminal)
    bars = ended.err.split("\r")
    assert ended.code == 0 and "step 1, loss" not in ended.err
    assert re.search(r"segunify: 100%.* 4/4 \[\d+:\d+<\d+:\d+.*, loss -?\d", bars[-1]), bars
    more = train("segunify", "-o", tmp_path / "run", "--resume", "--steps", "5", stream=Terminal)
    assert "4/5" in more.err and "5/5" in more.err and "1/5" not in more.err
    assert "\r" not in train(*words[:-1], "3", "-q", "--resume", stream=Terminal).err


def test_the_progress_of_a_resumed_run(data, tmp_path, monkeypatch):
    """6 of 20 steps were made before, so that 40 % are done after step 8. The clock, which is read
    at the start and for each line, goes on by 10 seconds each time."""
    run = trained(data, tmp_path / "run", *SHORT, "--steps", "6")
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__)
    monkeypatch.setattr("export.train.__main__.time", clock)
    ended = train("segunify", "-o", run, "--resume", "--steps", "20")
    lines = [line for line in ended.err.splitlines() if " %  step " in line]
    assert lines[0].startswith("   40 %  step 8, loss ") and lines[0].endswith(", 60 s left")
    assert len(lines) == 7 and lines[-1].endswith(", 0 s left")


def test_the_result_as_json(data, tmp_path):
    ended = start(data, tmp_path / "run", "--json", "-q")
    assert ended.code == 0 and ended.err == ""
    document = json.loads(ended.out)
    assert document["run"] == str(tmp_path / "run") and document["method"] == "segunify"
    assert document["step"] == document["steps"] == 4 and document["seconds"] > 0
    assert document["losses"].keys() == {"loss", "within", "across", "data"}
    assert document["best"] is None and document["broken"] == {}
    failed = start(data, tmp_path / "run", "--json")
    assert failed.code == 1 and "contains a run" in json.loads(failed.out)["error"]


def test_a_backbone_without_trained_weights_is_named(data, tmp_path):
    def random(*words):
        return tiny_backbone(*words, trained=False)

    words = ("--data", data, "-o", tmp_path / "run", *SHORT, "-q")
    assert (
        "WARNING: the backbone has RANDOM weights" in train("segunify", *words, backbone=random).err
    )


ERRORS = [
    (("--steps", "0"), 1, "steps is 0; wanted a whole number from 1"),
    (("--batch", "5000"), 1, "--batch 4096"),
    (("--lr", "0"), 1, "lr is 0.0; wanted a number above 0"),
    (("--lr", "nan"), 1, "lr is nan; wanted a number above 0"),
    (("--seed", "-1"), 1, "seed is -1"),
    (("--imgsz", "36"), 1, "imgsz is 36; wanted a multiple of 8"),
    (("--imgsz", "8"), 1, "imgsz is 8; wanted 16 to 4096"),
    (("--holdout", "0.2"), 1, "add --select energy"),
    (("--select", "energy", "--holdout", "0.9"), 1, "holdout is 0.9; wanted above 0"),
    (("--select", "energy", "--holdout", "0.1"), 1, "one picture is held out"),
    (("--select", "labels"), 1, "--labels FOLDER --classes FILE"),
    (("--labels", "x"), 1, "--labels FOLDER --classes FILE"),
    (("--device", "cuda:7"), 4, "device is cuda:7, but torch finds"),
]


EARLY = [
    ("--clusters 1", "clusters is 1; wanted", "--clusters 27"),
    ("--dim 1", "dim is 1; wanted", "--dim 64"),
    ("--ema 2", "ema is 2.0; wanted", "--ema 0.998"),
    ("--dropout nan", "dropout is nan; wanted", "--dropout 0.2"),
    ("--intra-shift nan", "intra_shift is nan; wanted", "--intra-shift 0.1"),
    ("--temperature 0", "temperature is 0.0; wanted a number from 0.001", "--temperature 0.1"),
    ("--batch 1", "the batch has one view", "--batch 2"),
    ("--cache-limit nan", "cache-limit is nan; wanted GiB", "--cache-limit 20"),
    ("--threads 3", "threads is 3; wanted at most 2, the processors", "--threads 2"),
]


@pytest.mark.parametrize(("words", "text", "fix"), EARLY, ids=[e[0] for e in EARLY])
def test_options_are_checked_before_the_backbone_is_loaded(
    data, tmp_path, monkeypatch, words, text, fix
):
    monkeypatch.setattr("export.train.start.default_threads", lambda: 2)
    words = ("--data", data, "-o", tmp_path / "run", *SHORT, *words.split())
    assert train("segunify", *words, backbone=None).refused(1, text, f"fix: {fix}")
    assert files(tmp_path / "run") is None


def test_a_run_of_a_machine_with_more_processors_is_resumed(data, tmp_path, monkeypatch):
    run = trained(data, tmp_path / "run", *SHORT)
    entry = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(entry | {"loop": entry["loop"] | {"threads": 64}}))
    monkeypatch.setattr("export.train.start.default_threads", lambda: 1)
    words = ("segunify", "-o", run, "--resume", "--steps", "5", "-q")
    assert train(*words).refused(1, "threads is 64; wanted at most 1", "--threads 1")
    assert train(*words, "--threads", "1").code == 0


@pytest.mark.parametrize(("words", "code", "text"), ERRORS, ids=[" ".join(e[0]) for e in ERRORS])
def test_an_error_before_the_training_leaves_nothing(data, tmp_path, words, code, text):
    assert start(data, tmp_path / "run", *words).refused(code, text)
    assert files(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    assert start(data, tmp_path / "run", *words).refused(code, text)
    assert files(tmp_path / "run") == {}


def test_pictures_that_cannot_be_used(tmp_path):
    out = tmp_path / "run"
    assert train("segunify", "-o", out, *SHORT).refused(1, "data is not set", "--data FOLDER")
    assert start(tmp_path / "no", out).refused(1, "no does not exist")
    (tmp_path / "empty").mkdir()
    assert start(tmp_path / "empty", out).refused(1, "no pictures in", "empty")
    broken = draw_pictures(tmp_path / "broken", 6, broken=[2])
    assert start(broken, out).refused(1, "1 of 6 pictures cannot be used", "02.png")


def test_a_picture_is_listed_once(data, tmp_path):
    out, picture = tmp_path / "run", data / "03.png"
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "picture.png").symlink_to(picture)
    for words in (
        [f"{data},{data}"], [data, "--data", picture], [data, tmp_path / "link"], [picture] * 2,
        [tmp_path / "picture.png", data],
    ):  # fmt: skip
        ended = train("segunify", "-o", out, *SHORT, "--data", *words)
        assert ended.refused(1, ".png is listed twice in ", "once in --data"), words


def test_a_backbone_that_cannot_be_used(data, tmp_path):
    from export.backbones.load import load_backbone

    words = ("--data", data, "-o", tmp_path / "run", *SHORT)
    for name in (tmp_path / "no", "efficientnet-lite9"):
        ended = train("segunify", *words, "--backbone", name, backbone=load_backbone)
        assert ended.refused(1, Path(name).name)
    assert files(tmp_path / "run") is None


def test_folders_with_commas_and_several_folders(tmp_path):
    one, two = (draw_pictures(tmp_path / name, 3) for name in ("a,b", "c"))
    run = trained(one, tmp_path / "one", *SHORT)
    assert read_entry(run)["files"] == 3
    assert train("segunify", "-o", run, "--resume").code == 0
    draw_pictures(tmp_path / "d", 3)
    run = trained(f"{two},{tmp_path / 'd'}", tmp_path / "two", *SHORT)
    assert read_entry(run)["data"] == [str(two), str(tmp_path / "d")]
    assert read_entry(run)["files"] == 6
    words = ("--data", two, tmp_path / "d", "-o", tmp_path / "three", *SHORT)
    assert train("segunify", *words).code == 0
    assert read_entry(tmp_path / "three")["data"] == [str(two), str(tmp_path / "d")]
    assert train("segunify", "--data", f"{two},", "-o", tmp_path / "four").code == 2
    words = ("--data", two, "--data", tmp_path / "d", "-o", tmp_path / "five", *SHORT)
    assert train("segunify", *words).code == 0
    assert read_entry(tmp_path / "five")["data"] == [str(two), str(tmp_path / "d")]
    again = train("segunify", "-o", tmp_path / "five", "--resume", *words[:4], "--steps", "5")
    assert again.code == 0, again.err


def test_a_folder_that_is_not_free(data, whole, tmp_path):
    before = files(whole)
    ended = start(data, whole)
    assert ended.refused(1, f"{whole} contains a run", "--resume continues it")
    assert files(whole) == before
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("x")
    assert start(data, out).refused(1, "contains other files: notes.txt", "choose another -o")
    (out / "notes.txt").rename(out / "log.csv")
    assert start(data, out).refused(1, "contains the rest of a run: log.csv")
    assert start(data, out / "log.csv").refused(1, "log.csv is no folder")
    assert files(out).keys() == {"log.csv"}


def test_a_run_that_ended_before_its_first_checkpoint_is_started_again(tmp_path, whole):
    """The command that failed works after its cause was mended, also with other options. The log of
    the first run had other columns."""
    data = draw_pictures(tmp_path / "pictures", 6)
    run, more = tmp_path / "run", ("--batch", "4")
    run.mkdir()
    (run / "log.csv").write_text("step,loss,more,seconds\n1,1,1,1\n2,1,1,1\n")
    (run / ".0123456789abcdef.tmp.safetensors").write_bytes(b"x")
    (run / "lock").touch()
    shutil.copy(whole / "run.json", run)
    before = files(run)
    for change, others in (
        ({"notes.txt": b"x"}, "contains other files: notes.txt"),
        ({"names.json": b"x"}, "checkpoint.safetensors is missing, but it was written: names"),
    ):
        for name, content in change.items():
            (run / name).write_bytes(content)
        assert others in start(data, run, *more).err and files(run) == before | change
        (run / name).unlink()
    assert start(data, run, "--batch", "1").refused(1, "the batch has one view")
    (data / "03.png").write_bytes(b"")
    assert start(data, run, *more).refused(1, "1 of 6 pictures cannot be used", "remove them and")
    assert read_entry(run) == read_entry(whole)
    (data / "03.png").unlink()
    ended = start(data, run, *more)
    assert ended.code == 0, ended.err
    assert (run / "log.csv").read_text().startswith("step,loss,within")
    assert read_entry(run)["loop"]["batch"] == 4 and open_run(run).done == 4
    assert not [name for name in files(run) if name.startswith(".")]
    assert start(data, run).refused(1, f"{run} contains a run", "--resume continues it")


OTHERS = [
    {"lock": b"the key is under the mat"},
    {"lock": b"", "notes.txt": b"x"},
    {".0123456789abcdef.tmp.txt": b"x"},
    {".0123456789abcdef.tmp.json": b"x"},
    {"lock": b"", ".0123456789abcdef.tmp.safetensors": b"x", "log.csv": b"x"},
]


@pytest.mark.parametrize("others", OTHERS, ids=[" ".join(o) for o in OTHERS])
def test_no_file_of_a_folder_that_is_refused_is_removed(data, tmp_path, others):
    out = tmp_path / "run"
    out.mkdir()
    for name, content in others.items():
        (out / name).write_bytes(content)
    before = files(out)
    assert start(data, out).refused(1, f"{out} contains ", "choose another -o")
    assert train("segunify", "-o", out, "--resume").refused(1, "is no run")
    assert files(out) == before


def test_a_lock_that_was_there_before_remains_after_an_error(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "lock").touch()
    before = files(out)
    assert start(data, out, "--batch", "1").refused(1, "the batch has one view")
    assert files(out) == before
    (out / ".0123456789abcdef.tmp.json").write_bytes(b"{")
    assert start(data, out).code == 0  # a killed start has left such files
    assert not [name for name in files(out) if name.startswith(".")]


def test_temporary_files_of_a_killed_run_are_removed(data, tmp_path):
    run = trained(data, tmp_path / "run", *SHORT)
    (run / ".0123456789abcdef.tmp.safetensors").write_bytes(b"x")
    for name in (".hidden.tmp", ".0123456789abcdef.tmp.txt", ".0123456789abcdef.tmp"):
        (run / name).touch()
    assert train("segunify", "-o", run, "--resume").code == 0
    hidden = {name for name in files(run) if name.startswith(".")}
    assert hidden == {".hidden.tmp", ".0123456789abcdef.tmp.txt", ".0123456789abcdef.tmp"}


def test_a_lock_that_was_removed_before_it_was_locked(data, tmp_path, monkeypatch):
    """A process that fails removes the lock, while this one has it open; a third one makes a new
    lock, and may hold it."""
    out, lockf = tmp_path / "run", fcntl.lockf

    def late(*arguments):
        (out / "lock").unlink()
        (out / "new").touch()
        (out / "new").rename(out / "lock")
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", late)
    assert start(data, out).refused(1, "another process trains in")
    assert files(out).keys() == {"lock"}


def test_a_folder_without_permission(data, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with obeyed():
        assert start(data, locked / "run").refused(1, "cannot be created: Permission denied")
        assert start(data, locked).refused(1, "cannot be written: Permission denied")


def test_a_lock_that_is_a_link_is_not_followed(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "lock").symlink_to(tmp_path / "elsewhere")
    assert start(data, out).refused(1, "contains other files: lock")
    shutil.rmtree(out)
    run = trained(data, out, *SHORT)
    (run / "lock").unlink()
    (run / "lock").symlink_to(tmp_path / "elsewhere")
    assert train("segunify", "-o", run, "--resume").refused(1, "lock cannot be written")
    assert not (tmp_path / "elsewhere").exists()


def test_two_processes_do_not_train_in_one_folder(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    program += "print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(out / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert start(data, out).refused(1, "another process trains in")
        other.stdin.close()
    assert start(data, out).code == 0


def test_a_finished_run_says_so(whole):
    before = files(whole)
    ended = train("segunify", "-o", whole, "--resume", backbone=None)
    assert ended.code == 0 and "is finished: all 4 steps were made" in ended.err
    assert f"kept     {whole}/  (step 4, " in ended.out and "nothing was trained)" in ended.out
    assert files(whole) == before
    document = json.loads(train("segunify", "-o", whole, "--resume", "--json", "-q").out)
    assert document["step"] == 4 and document["losses"]


CHANGES = [
    (("--clusters", "4"), "clusters is 4, not 3", "leave out --clusters"),
    (("--batch", "2", "--lr", "1"), "batch is 2, not 3; lr is 1.0, not 0.0001", "--batch, --lr"),
    (("--no-final-silu",), "final-silu is False, not True", "--final-silu"),
    (("--imgsz", "64"), "imgsz is 64, not 32", "--imgsz"),
    (("--crops", "five"), "crops is five, not centre", "--crops"),
    (("--data", "a", "b"), "data names 2 places, and the run was started with 1", "in the order"),
    (("--seed", "1"), "seed is 1, not 0", "leave out --seed"),
    (("--precision", "bf16"), "precision is bf16, not fp32", "--precision"),
    (("--log-every", "3"), "log-every is 3, not 2", "leave out --log-every"),
    (("--select", "energy"), "select is energy, not last", "--select"),
    (("--steps", "3"), "steps is 3; the run was started with 4", "a larger number"),
]


@pytest.mark.parametrize(("words", "text", "fix"), CHANGES, ids=[c[1] for c in CHANGES])
def test_a_resumed_run_keeps_its_options(data, tmp_path_factory, whole, words, text, fix):
    before = files(whole)
    assert train("segunify", "-o", whole, "--resume", *words).refused(1, text, fix)
    assert files(whole) == before


def test_a_resumed_run_needs_the_same_pictures_and_weights(tmp_path):
    data = draw_pictures(tmp_path / "pictures", 4)
    run = trained(data, tmp_path / "run", *SHORT)
    words = ("segunify", "-o", run, "--resume", "--steps", "6")
    gone = (*words, "--data", tmp_path / "elsewhere")
    assert train(*gone).refused(1, "elsewhere of the run do not exist", "--data FOLDER")

    def other(*words):
        from dataclasses import replace

        return replace(tiny_backbone(*words), sha256="cd" * 32)

    assert train(*words, backbone=other).refused(1, "changed since the run was started: sha256")
    gone = tmp_path / "gone"
    assert train(*words, "--backbone", gone).refused(1, "gone does not exist", "--backbone")
    gone.touch()
    moved = (*words, "--backbone", gone)
    assert train(*moved, backbone=other).refused(1, "changed since the run was started: sha256")
    assert train(*moved[:-3], "5", *moved[-2:]).code == 0
    assert read_entry(run)["backbone"]["source"] == str(gone)
    (data / "more.png").write_bytes((data / "00.png").read_bytes())
    assert train(*words).refused(1, "it had 4 files, now there are 5")
    (data / "more.png").unlink()
    assert train(*words).code == 0 and open_run(run).checkpoint.step == 6


def test_a_run_of_other_versions_is_resumed_with_a_warning(data, tmp_path):
    run = trained(data, tmp_path / "run", *SHORT)
    entry = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(entry | {"versions": {"torch": "0.1"}}))
    more = train("segunify", "-o", run, "--resume", "--steps", "6", "-q")
    assert more.code == 0 and "WARNING: now the versions are dynaguide-edge " in more.err
    assert read_entry(run)["versions"] == {"torch": "0.1"}
    assert read_entry(run)["command"] == entry["command"]


def test_ctrl_c_before_the_training_leaves_nothing(data, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    words = ("--data", data, "-o", tmp_path / "run", *SHORT)
    assert train("segunify", *words, backbone=interrupted).refused(130, "interrupted")
    assert files(tmp_path / "run") is None


def test_what_cannot_be_resumed(data, whole, tmp_path):
    assert train("segunify", "-o", tmp_path / "no", "--resume").refused(1, "no does not exist")
    assert train("segunify", "-o", tmp_path, "--resume").refused(1, "is no run")
    entry = json.loads((whole / "run.json").read_text())
    for change, code, text in [
        ({"method": "boosting"}, 5, "settings: missing or unknown fields"),
        ({"method": "other"}, 5, "method is 'other'; wanted one of segunify, boosting, refine"),
        ({"options": {}}, 5, "the options of another version of the program: clusters"),
        ({"schema": "dg-run/0"}, 5, "has schema 'dg-run/0'"),
        *[
            ({"options": entry["options"] | {name: value}}, 5, f"argument --{text}")
            for name, value, text in [
                ("preset", "zzz", "preset: invalid choice: 'zzz'"),
                ("clusters", "x", "clusters: invalid int value: 'x'"),
                ("dropout", True, "dropout: invalid float value"),
                ("final_silu", 3, "final-silu"),
            ]
        ],
        ({"loop": entry["loop"] | {"device": "cuda:9", "log_every": 2.0}}, 5, "log-every is 2.0"),
    ]:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/run.json").write_text(json.dumps(entry | change))
        assert train("segunify", "-o", tmp_path / "run", "--resume").refused(code, text)
