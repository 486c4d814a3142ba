"""sdk/__main__.py: exit codes and what goes where.

Most tests call main(); what depends on the process is run as one.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case
from dg_commands import PICTURE, files, labels_of, picture_file, plain_environment, strict
from drawn_pictures import quadrants
from permissions import obeyed

import sdk.__main__
from runtime.errors import InputError
from sdk.__main__ import main, timing_table

# What it writes and says


def test_predict_writes_an_overlay_and_labels(work, capsys):
    assert main(["predict", "good.png"]) == 0
    assert files(work / "out") == ["good_labels.png", "good_overlay.png"]
    labels = labels_of(work / "out", "good")
    assert labels.shape == (48, 64) and len(np.unique(labels)) == 4
    assert cv2.imread(str(work / "out/good_overlay.png")).shape == (48, 64, 3)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("good.png: 4 regions, ") and out.count("\n") == 1
    assert out.endswith("ms -> out/good_overlay.png, out/good_labels.png\n")


def test_demo_of_a_picture_prints_where_the_time_went(work, capsys):
    assert main(["demo", "good.png", "-o", "a/b"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and files(work / "a") == ["b/good_labels.png", "b/good_overlay.png"]
    lines = out.splitlines()
    assert lines[0].startswith("64 x 48 pixels, refined at 32 x 24, opencv-kmeans + cpu-")
    assert lines[1] == "10 steps (steps), 4 labels, 4 regions"
    stages = [line.split()[0] for line in lines[2:10]]
    assert stages == ["decode", "preprocess", "prior", "refine", "filter", "postprocess",
                      "unaccounted", "total"]  # fmt: skip
    assert lines[9].endswith("100.0 %")
    assert lines[10:] == ["overlay  a/b/good_overlay.png", "labels   a/b/good_labels.png"]


def test_demo_takes_its_own_photo(work, capsys):
    pytest.importorskip("skimage", reason="the demo photo comes with scikit-image")
    assert main(["demo", "--refine", "fast", "--steps", "1"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("512 x 512 pixels, refined at 128 x 128")
    assert files(work / "out") == ["demo_labels.png", "demo_overlay.png"]


def test_timing_table():
    lines = timing_table({"decode": 1.0, "unaccounted": 0.25, "total": 5.0}).splitlines()
    assert [line.split() for line in lines] == [
        ["decode", "1.0", "ms", "20.0", "%"],
        ["unaccounted", "0.2", "ms", "5.0", "%"],
        ["total", "5.0", "ms", "100.0", "%"],
    ]
    assert len(set(map(len, lines))) == 1  # aligned


def test_console_script_agrees_with_main(work):
    assert main(["predict", "good.png", "-o", "a"]) == 0
    script = Path(sys.executable).parent / "dg"
    if not script.exists():
        pytest.skip("the console script dg is not installed beside this interpreter")
    command = [script, "predict", "good.png", "-o", "b"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith("good.png: 4 regions")
    assert (work / "a/good_labels.png").read_bytes() == (work / "b/good_labels.png").read_bytes()


def test_json_is_one_document(work, capsys):
    picture_file(work / "alpha.png", np.dstack([PICTURE, PICTURE[..., 0]]))
    (work / "bad.png").write_bytes(b"no picture")
    assert main(["predict", "good.png", "bad.png", "alpha.png", "--json"]) == 1
    out, err = capsys.readouterr()
    good, bad, alpha = strict(out)
    assert good["picture"] == "good.png" and good["size"] == {"height": 48, "width": 64}
    assert (good["overlay"], good["labels"]) == ("out/good_overlay.png", "out/good_labels.png")
    assert len(good["segments"]) == 4 and sum(s["area"] for s in good["segments"]) == 48 * 64
    assert set(good["timings"]) > {"refine", "unaccounted", "total"} and good["warnings"] == []
    assert good["stats"]["stop_reason"] == "steps" and good["device"] == "cpu"
    assert set(bad) == {"picture", "error"} and "is not a picture" in bad["error"]
    assert "alpha channel was dropped" in alpha["warnings"][0]
    assert "error: bad.png is not a picture" in err and "warning: alpha.png: The alpha" in err


def test_coco_is_valid_over_all_pictures(work, capsys):
    picture_file(work / "second.png", np.ascontiguousarray(quadrants(30, 40)[0][:, :20]))
    assert main(["predict", "good.png", "second.png", "--coco", "--json"]) == 0
    strict(capsys.readouterr().out)
    coco = strict((work / "out/annotations.json").read_text())
    assert coco["images"] == [
        {"id": 1, "file_name": "good.png", "height": 48, "width": 64},
        {"id": 2, "file_name": "second.png", "height": 30, "width": 20},
    ]
    ids = [a["id"] for a in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1)) and len(ids) == 4 + 2
    categories = [c["id"] for c in coco["categories"]]
    assert categories == sorted(set(categories))
    covered = {image["id"]: 0 for image in coco["images"]}
    sizes = {image["id"]: [image["height"], image["width"]] for image in coco["images"]}
    for a in coco["annotations"]:
        assert a["category_id"] in categories and a["segmentation"]["size"] == sizes[a["image_id"]]
        counts = a["segmentation"]["counts"]
        assert sum(counts) == np.prod(sizes[a["image_id"]]) and sum(counts[1::2]) == a["area"]
        covered[a["image_id"]] += a["area"]
    assert covered == {1: 48 * 64, 2: 30 * 20}


def test_coco_is_not_written_unasked_or_for_nothing(work, capsys):
    (work / "bad.png").write_bytes(b"no picture")
    assert main(["predict", "bad.png", "--coco"]) == 1
    assert main(["predict", "good.png"]) == 0
    assert files(work / "out") == ["good_labels.png", "good_overlay.png"]
    assert capsys.readouterr().out.startswith("good.png")


def test_options_reach_the_segmenter(work, capsys):
    for options, steps in [
        ([], 10),
        (["--refine", "none"], 0),
        (["--steps", "0"], 0),
        (["--steps", "3"], 3),
        (["--refine", "fast"], 10),
        (["--refine", "dynaguide", "--steps", "2"], 2),
        (["--refine", "dynaguide_code", "--steps", "2", "--seed", "5"], 2),
        (["--refine", "dynaseg_fsf", "--steps", "2"], 2),
        (["--refine", "dynaseg_scf", "--steps", "2"], 2),
        (["--no-filter"], 10),
        (["--no-filter", "--refine", "none", "--threads", "1", "--min-area", "0"], 0),
        (["--seed", "7", "--threads", "2"], 10),
    ]:
        with case(*options):
            assert main(["predict", "good.png", "--json", *options]) == 0
            (document,) = strict(capsys.readouterr().out)
            assert document["stats"]["steps"] == steps
            assert (document["stats"]["stop_reason"] == "no refinement") == ("none" in options)


def test_no_filter_min_area_and_seed_change_something(work, capsys):
    rng = np.random.default_rng(0)
    noisy = np.clip(PICTURE + rng.normal(0, 40, (48, 64, 3)), 0, 255).astype(np.uint8)
    picture_file(work / "noisy.png", noisy)

    def run(*options):
        assert main(["predict", "noisy.png", "--json", "--steps", "2", *options]) == 0
        return strict(capsys.readouterr().out)[0]

    plain = run("--min-area", "0")
    assert run("--min-area", "0", "--no-filter")["segments"] != plain["segments"]
    assert len(run("--min-area", "200")["segments"]) < len(plain["segments"])
    assert run("--seed", "1")["stats"]["losses"] != plain["stats"]["losses"]


def test_options_that_would_be_ignored_are_refused(work, capsys):
    for options in (["--steps", "5"], ["--seed", "1"]):
        assert main(["predict", "good.png", "--refine", "none", *options]) in (1, 2), options
    assert "refine" in capsys.readouterr().err


# Exit codes


def test_usage_errors_are_2(work, capsys):
    for arguments in [
        [],
        ["fly"],
        ["predict"],
        ["predict", "good.png", "--refine", "magic"],
        ["predict", "good.png", "--steps", "many"],
        ["predict", "good.png", "--unknown"],
        ["demo", "good.png", "other.png"],
        *(["predict", "good.png", "--imgsz", s] for s in ("big", "4x5x6", "4x", "x", "", "4.5")),
    ]:
        with case(*arguments):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and "\n  fix: " in err
            assert not (work / "out").exists()


def test_help_is_0_on_stdout(capsys):
    for arguments in [["--help"], ["demo", "--help"], ["predict", "-h"]]:
        with case(*arguments):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            out, err = capsys.readouterr()
            assert stop.value.code == 0 and err == "" and out.startswith("usage: dg")


def test_failures_are_1_with_one_error(work, capsys):
    for command in ["predict", "demo"]:
        for arguments, message in [
            (["missing.png"], "missing.png does not exist"),
            (
                ["good.png", "--prior", "resnet"],
                "prior is 'resnet', which does not exist; wanted 'kmeans', a bundle",
            ),
            (["good.png", "--prior", "no.onnx"], "no.onnx does not exist"),
            (["good.png", "--steps", "-1"], "steps is -1; wanted 0 to 1000000\n  fix: --steps 0"),
            (["good.png", "--threads", "0"], "threads is 0; wanted 1 to 1024"),
            (["good.png", "--min-area", "-1"], "min_area is -1; wanted 0 to"),
            (["good.png", "--imgsz", "0"], "imgsz is 0; wanted (height, width) or the long side"),
            (["good.png", "--imgsz", "4x-5"], "imgsz is (4, -5); wanted (height, width)"),
        ]:
            with case(command, *arguments):
                assert main([command, *arguments]) == 1
                out, err = capsys.readouterr()
                assert out == "" and err.startswith("error: ") and message in err
                assert err.count("error: ") == 1 and "Traceback" not in err
                assert not (work / "out").exists() or files(work / "out") == []


def test_imgsz_in_both_forms(work, monkeypatch):
    seen = []

    def segmenter(prior, *, imgsz, **_):
        seen.append(imgsz)
        raise InputError("far enough")

    monkeypatch.setattr(sdk.__main__, "Segmenter", segmenter)
    for text in ("512", "368x480", "368X480"):
        assert main(["predict", "good.png", "--imgsz", text]) == 1
    assert seen == [512, (368, 480), (368, 480)]


def test_missing_packages_are_4(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["demo"]) == 4
    assert "fix: pip install 'dynaguide-edge[demo]'" in capsys.readouterr().err
    onnx = pytest.importorskip("onnx", reason="makes the network: pip install onnx")
    info = [onnx.helper.make_tensor_value_info(n, 1, [1, 3, "h", "w"]) for n in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    onnx.save(onnx.helper.make_model(graph), work / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["predict", "good.png", "--prior", "m.onnx"]) == 4
    out, err = capsys.readouterr()
    assert out == "" and "ONNX Runtime is needed to run m.onnx" in err and "fix: pip inst" in err


def test_model_files_that_cannot_be_used_are_5(work, capsys):
    for content, message in [
        (b"", "m.onnx has 0 bytes"),
        (b"not a network", "m.onnx"),
        (None, "city.bundle is no bundle: it has no manifest.json"),
    ]:
        with case(message):
            if content is None:
                (work / "city.bundle").mkdir()
            else:
                (work / "m.onnx").write_bytes(content)
            prior = "city.bundle" if content is None else "m.onnx"
            assert main(["predict", "good.png", "--prior", prior]) == 5
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and message in err
            assert files(work / "out") == []


def test_out_of_memory_is_1_with_advice(work, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(sdk.__main__, "_segment", exhausted)
    assert main(["predict", "good.png"]) == 1
    err = capsys.readouterr().err
    assert "error: good.png: out of memory\n  fix: close other programs, or use a sm" in err


# Interrupted, unwritable, closed


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_130_at_once_and_leaves_nothing(work):
    """Two processes, one with every output, are interrupted at the same time."""
    rng = np.random.default_rng(0)
    picture_file(work / "long.png", rng.integers(0, 256, (400, 400, 3), dtype=np.uint8))
    command = [sys.executable, "-m", "sdk", "predict", "long.png", "--refine", "dynaguide"]
    options = {"plain": [], "all": ["--json", "--coco"]}
    processes = {
        out: subprocess.Popen(
            [*command, "-o", out, *more],
            cwd=work,
            env=plain_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A runner that is a background job ignores the signal, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for out, more in options.items()
    }
    try:
        deadline = time.monotonic() + 600
        while not all((work / out).is_dir() for out in processes):  # made before any work is done
            assert not any(p.poll() for p in processes.values()) and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.7)  # in the middle of about 100 s of steps
        for process in processes.values():
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        # all steps would take longer on any machine
        answers = {out: p.communicate(timeout=60) for out, p in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for out, process in processes.items():
        with case(out):
            assert process.returncode == 130
            assert answers[out] == ("", "error: interrupted\n  fix: run the command again\n")
            assert files(work / out) == []


def test_interrupt_between_two_pictures_keeps_the_first(work, capsys, monkeypatch):
    picture_file(work / "second.png")
    segment = sdk.__main__._segment

    def interrupted(seg, source, name):
        if name == "second":
            raise KeyboardInterrupt
        return segment(seg, source, name)

    monkeypatch.setattr(sdk.__main__, "_segment", interrupted)
    assert main(["predict", "good.png", "second.png"]) == 130
    assert files(work / "out") == ["good_labels.png", "good_overlay.png"]
    assert capsys.readouterr().err == "error: interrupted\n  fix: run the command again\n"


def test_folder_that_cannot_be_made(work, capsys):
    for out in ["good.png", "good.png/below", "good.png/a/b"]:
        with case(out):
            before = (work / "good.png").read_bytes()
            assert main(["predict", "good.png", "-o", out]) == 1
            stdout, stderr = capsys.readouterr()
            assert stdout == "" and stderr.startswith("error: ") and out in stderr
            assert "fix: choose another folder" in stderr
            assert files(work) == ["good.png"] and (work / "good.png").read_bytes() == before


def test_folder_without_permission(work, capsys):
    (work / "out").mkdir(mode=0o500)
    with obeyed():
        assert main(["predict", "good.png"]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_disk_that_fills_up_leaves_whole_files_only(work, capsys, monkeypatch):
    """The n-th replacement fails: the overlay, the labels, the annotations. Or the first file."""
    replace = os.replace
    for full_at in range(3):
        calls = []

        def full(*arguments, calls=calls, full_at=full_at):
            calls.append(1)
            if len(calls) > full_at:
                raise OSError(28, "No space left on device")
            replace(*arguments)

        monkeypatch.setattr(os, "replace", full)
        with case("full at", full_at):
            assert main(["predict", "good.png", "--coco", "-o", f"out{full_at}"]) == 1
            err = capsys.readouterr().err
            assert "No space left on device" in err and "Traceback" not in err
            written = ["good_labels.png", "good_overlay.png"]
            assert files(work / f"out{full_at}") == sorted(written[::-1][:full_at])
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full())
    assert main(["predict", "good.png", "-o", "probe"]) == 1
    assert "folder probe cannot be created or written: No space left" in capsys.readouterr().err


def test_two_pictures_of_one_name_are_refused_before_any_work(work, capsys):
    picture_file(work / "good.jpg")
    (work / "sub").mkdir()
    picture_file(work / "sub/good.png")
    for pictures in (["good.png", "good.jpg"], ["good.png", "sub/good.png"], ["good.png"] * 2):
        assert main(["predict", *pictures]) == 1
        err = capsys.readouterr().err
        assert "two pictures have the same name" in err and "fix: run them one by one" in err
        assert files(work / "out") == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_reader_that_has_gone_gives_no_traceback(work):
    """Three processes at the same time write to a pipe that nobody reads."""
    read, written = os.pipe()
    os.close(read)
    commands = {"a": ["predict"], "b": ["predict", "--json"], "c": ["demo"]}
    processes = {
        out: subprocess.Popen(
            [sys.executable, "-m", "sdk", *words, "good.png", "-o", out],
            cwd=work,
            env=plain_environment(),
            stdout=written,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out, words in commands.items()
    }
    os.close(written)
    for out, process in processes.items():
        _, err = process.communicate(timeout=600)
        with case(*commands[out]):
            assert (process.returncode, err) == (1, "")
            assert "good_labels.png" in files(work / out)
