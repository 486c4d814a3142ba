"""The command-line options of the profiler."""

import subprocess
import sys

import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks.latency import document as documents
from benchmarks.latency import options
from runtime.errors import InputError


def test_words_numbers_and_sizes():
    assert options.numbers("50,99,50", "percentile", 1, 99.99) == [50, 99]
    assert options.size_of("480x640") == (480, 640)
    for wrong in ("", "a", "0", "50,,60", "nan"):
        with pytest.raises(InputError, match="percentile is"):
            options.numbers(wrong, "percentile", 1, 99.99)
    for wrong in ("480", "0x5", "4x4x4", "ax5", "-1x5"):
        with pytest.raises(InputError, match="imgsz is"):
            options.size_of(wrong)
    with pytest.raises(InputError, match="mode is 'fast'"):
        options.words("paced,fast", "mode", documents.MODES)


def test_bad_options_are_usage_errors(capsys):
    for argv, message in (
        (["--picture", "a.png", "--video", "b.mp4"], "both given"),
        (["-o", "http://h/x"], "it is a URL; wanted a path: outputs are files"),
        (["--mode", "paced"], "paced needs a rate"),
        (["--mode", ""], "mode is ''"),
        (["--mode", "foo"], "mode is 'foo'"),
        (["--refine", "1.5"], "whole numbers of steps"),
        (["--refine", "0,x"], "refine is '0,x'"),
        (["--refine=-1"], "refine is '-1'"),
        (["--rate", "0"], "--rate: it is '0'"),
        (["--duration", "nan"], "--duration: it is 'nan'"),
        (["--duration=-1"], "--duration: it is '-1'"),
        (["--percentile", "50,200"], "percentile is '50,200'"),
        (["--imgsz", "5"], "imgsz is '5'"),
        (["--peer", "yolo"], "peer is 'yolo'"),
        (["--export", "pdf"], "export is 'pdf'"),
        (["--labels", "x.png"], "--labels needs --picture"),
        (["--preset", "nothing"], "nothing"),
        (["--threads", "0"], "threads"),
        (["-o", ""], "it is empty; wanted a path"),
        (["--rate", "9", "--mode", "stream"], "--rate is for --mode paced"),
        (["--export", "json"], "--export needs a folder"),
        (["--peer", "torch-eager", "--refine", "0"], "is for refinements; wanted --refine"),
        (["--scale", "1.5"], "--scale: it is '1.5'"),
        (["--scale", "0.5", "--refine", "0"], "--scale is for the native refinement"),
        (["--device", "foo"], "device is 'foo'"),
        (["--imgsz", "99999x99999"], "up to 16384"),
        (["--imgsz", "\u00b2x3"], "imgsz is '\u00b2x3'; wanted HEIGHTxWIDTH"),
        (["--imgsz", "9" * 5000 + "x3"], "wanted HEIGHTxWIDTH"),
        (["--durations", "1"], "did you mean --duration?"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main(["latency", *argv])
        told = capsys.readouterr()
        assert end.value.code == 2 and message in told.err and not told.out, argv


def test_an_unknown_benchmark_is_a_usage_error(capsys):
    for argv, message in (
        (["nope"], "error: there is no benchmark 'nope'\n  fix: see: python -m benchmarks --help"),
        (["rtsp://me:secret@h/x"], "error: there is no benchmark 'rtsp://h/x'\n  fix: see:"),
        (["latncy"], "error: there is no benchmark 'latncy'\n  fix: did you mean latency?"),
        ([], "error: no benchmark is named\n  fix: see: python -m benchmarks --help"),
    ):
        assert command.main(argv) == 2, argv
        told = capsys.readouterr()
        assert message in told.err and told.err.startswith("usage: ") and not told.out, argv
    assert command.main(["--help"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: python -m benchmarks {latency,") and not told.err
    assert len({*command.COMMANDS}) == len(command.COMMANDS)


def test_a_full_disk_behind_the_help_is_one_line():
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("error: stdout") and "No space left on device\n" in run.stderr
    assert "Traceback" not in run.stderr
