"""Signals that end a process, sent to the trainer in the middle of a step."""

import os
import signal
import sys

import pytest
from training import TINY, draw_pictures, train

from export.train.run import read_checkpoint
from export.train.segunify import SegUnify

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHORT = (*TINY, "--steps", "6", "--every", "2", "--batch", "2", "-q")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("signals") / "pictures", 4)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that do nothing, so that a signal which the trainer does not handle ends nothing."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    ours = {number: lambda *_: None for number in NUMBERS}
    for number, handler in ours.items():
        signal.signal(number, handler)
    yield ours
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def send(monkeypatch):
    """A function that lets signals arrive in the third step of each training."""
    before_update = SegUnify.before_update

    def at_the_third_step(*numbers):
        steps = 0

        def update(self):
            nonlocal steps
            steps += 1
            for number in numbers if steps == 3 else ():
                os.kill(os.getpid(), number)
            before_update(self)

        monkeypatch.setattr(SegUnify, "before_update", update)

    return at_the_third_step


@pytest.mark.parametrize("number", NUMBERS, ids=[n.name for n in NUMBERS])
def test_the_first_signal_ends_the_training_with_a_checkpoint(
    data, tmp_path, handlers, send, number
):
    send(number)
    ended = train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT)
    assert ended.refused(130, "the checkpoint of step 3 is in")
    assert read_checkpoint(tmp_path / "run").step == 3
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers


def test_the_second_signal_ends_it_at_once(data, tmp_path, handlers, send):
    send(signal.SIGTERM, signal.SIGINT)
    ended = train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT)
    assert ended.refused(130, "interrupted") and "step 3" not in ended.err
    assert read_checkpoint(tmp_path / "run").step == 2
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers


def test_a_signal_that_was_ignored_stays_so(data, tmp_path, send):
    """As after nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send(signal.SIGHUP)
    assert train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT).code == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_ctrl_c_while_modules_are_imported(monkeypatch):
    class Interrupts:
        @staticmethod
        def find_spec(name, *_):
            if name == "export.train.__main__":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "export.train.__main__")
    monkeypatch.setattr(sys, "meta_path", [Interrupts, *sys.meta_path])
    assert train("segunify").refused(130, "error: interrupted")
    ended = train("segunify", "--json")
    assert ended.code == 130 and '"error": "interrupted"' in ended.out
