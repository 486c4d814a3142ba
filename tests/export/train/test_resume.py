"""A run that was ended at any moment and resumed equals, bit for bit, one that was not."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training import MOMENTS, TINY, draw_pictures, log_rows, torch, train, trained

from export.train.run import BEST, open_run, read_checkpoint
from export.train.segunify import SegUnify

ROOT = Path(__file__).parents[3]
STEPS = (
    *("--select", "energy", "--holdout", "0.25"),
    "--steps",
    "12",
    "--every",
    "4",
    "--log-every",
    "3",
    "--batch",
    "4",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("resume") / "pictures", 12)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run without an interruption."""
    return trained(data, tmp_path_factory.mktemp("whole") / "run", *STEPS)


@pytest.fixture(scope="module")
def ended(data, tmp_path_factory):
    """{moment: (run, exit code, stderr)} of runs that were ended in processes of their own. One of
    them reads its pictures in one more process."""
    folder = tmp_path_factory.mktemp("ended")
    words = (folder, "segunify", "--data", data, *TINY, *STEPS, "-q")
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/training.py", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    codes = json.loads(done.stdout.splitlines()[-1])
    return {m: (folder / m, codes[m], (folder / f"{m}.txt").read_text()) for m in MOMENTS}


def same(run, other):
    """Both checkpoints, with the optimiser's state, and the logs are equal."""
    for file in ("checkpoint.safetensors", BEST):
        ours, wanted = read_checkpoint(run, file), read_checkpoint(other, file)
        assert ours.tensors.keys() == wanted.tensors.keys()
        assert any(key.startswith("optimiser.") for key in wanted.tensors)
        for key, array in wanted.tensors.items():
            assert ours.tensors[key].dtype == array.dtype
            assert np.array_equal(ours.tensors[key], array), (file, key)
        for key in ("step", "losses", "log", "best", "broken", "optimiser"):
            assert ours.state[key] == wanted.state[key], key
    assert log_rows(run) == log_rows(other)
    return True


def test_two_runs_are_equal_and_another_seed_is_not(data, whole, tmp_path):
    assert same(trained(data, tmp_path / "a", *STEPS), whole)
    other = open_run(trained(data, tmp_path / "b", *STEPS, "--seed", "1")).head()[0]
    first = open_run(whole).head()[0]
    assert not np.array_equal(other["student"], first["student"])


@pytest.mark.parametrize(
    ("moment", "step", "last_row"), [("step", 4, 6), ("rename", 4, 8), ("log", 8, 8)]
)
def test_after_kill_9(ended, whole, moment, step, last_row):
    run, code, text = ended[moment]
    assert code == -signal.SIGKILL, text
    assert read_checkpoint(run).step == step
    assert int(log_rows(run)[-1].split(",")[0]) == last_row
    assert any(p.name.startswith(".") for p in run.iterdir()) == (moment == "rename")
    workers = ("--workers", "0") if moment == "step" else ()
    again = train("segunify", "-o", run, "--resume", *workers)
    assert again.code == 0, again.err
    assert ("workers changed: the last bits" in again.err) == bool(workers)
    assert same(run, whole)
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("moment", ["SIGINT", "SIGTERM"])
def test_after_a_signal(ended, whole, moment):
    run, code, text = ended[moment]
    assert code == 130 and "Traceback" not in text, text
    assert "the checkpoint of step 5" in text
    assert f"python -m export train segunify -o {run} --resume" in text
    stopped = read_checkpoint(run)
    assert stopped.step == 5 and stopped.state["log"]["count"] == 1
    assert train("segunify", "-o", run, "--resume", "-q").code == 0
    assert same(run, whole)


def test_after_a_signal_in_each_step(data, whole, tmp_path, monkeypatch):
    """The clock goes on by one second in each step. A signal in the last step ends nothing."""
    run, before_update = tmp_path / "run", SegUnify.before_update

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)
        before_update(self)

    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("export.train.loop.time", clock)
    monkeypatch.setattr(SegUnify, "before_update", interrupt)
    words = ("segunify", "--data", data, "-o", run, *TINY, *STEPS, "-q")
    for step in range(1, 13):
        assert train(*words, *["--resume"][: step - 1]).code == (130 if step < 12 else 0)
        stopped = read_checkpoint(run)
        assert stopped.step == stopped.state["seconds"] == step
        if step >= 3:  # the losses are those of the last row
            loss = float(log_rows(run)[-1].split(",")[1])
            assert stopped.state["losses"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert same(run, whole)


def test_before_the_first_checkpoint(data, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "run.json", run)
    (run / "log.csv").write_text("".join((whole / "log.csv").read_text().splitlines(True)[:2]))
    assert train("segunify", "-o", run, "--resume", "-q").code == 0
    assert same(run, whole)


def test_more_steps_than_before(data, whole, tmp_path):
    short = trained(data, tmp_path / "run", *STEPS, "--steps", "8")
    assert open_run(short).checkpoint.step in (4, 8)
    assert train("segunify", "-o", short, "--resume", "--steps", "12", "-q").code == 0
    assert same(short, whole)
    assert open_run(short).entry["loop"]["steps"] == 12


def test_what_may_change_when_a_run_is_resumed(data, tmp_path):
    run, threads = trained(data, tmp_path / "run", *STEPS, "--steps", "4"), torch.get_num_threads()
    more = train("segunify", "-o", run, "--resume", "--steps", "8", "--every", "2")
    assert more.code == 0 and "changed" not in more.err
    assert open_run(run).entry["loop"]["every"] == 2
    try:
        more = train("segunify", "-o", run, "--resume", "--steps", "9", "--threads", "2")
    finally:
        torch.set_num_threads(threads)
    assert more.code == 0 and "WARNING: threads changed: the last bits" in more.err
