"""sdk/__main__.py: exit codes, what goes where, and pictures of every kind, most of them bad.

Most tests call main(); what depends on the process (signals, pipes, memory) runs in one.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_pictures import quadrants
from PIL import Image

import sdk.__main__
from runtime.errors import InputError
from sdk import StreamState
from sdk.__main__ import main, timing_table

GIB = 2**30
PICTURE = quadrants(48, 64)[0]


def picture_file(path, array=None, **options):
    """Write ``array`` (PICTURE when None) as the kind of picture that ``path`` names."""
    Image.fromarray(PICTURE if array is None else array).save(path, **options)
    return str(path)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder with one picture, good.png."""
    monkeypatch.chdir(tmp_path)
    picture_file(tmp_path / "good.png")
    return tmp_path


def plain_environment():
    """The user's: nothing that changes how Python buffers or warns."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def dg(*arguments, **options):
    """python -m sdk in a process of its own."""
    command = [sys.executable, "-m", "sdk", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 100, **options}
    return subprocess.run(command, env=plain_environment(), check=False, **options)


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))


def files(folder):
    """Names of all files, hidden and temporary ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def labels_of(folder, stem):
    return cv2.imread(str(folder / f"{stem}_labels.png"), cv2.IMREAD_UNCHANGED)


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


def test_process_and_console_script_agree_with_main(work):
    run = dg("predict", "good.png", "-o", "a", cwd=work)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith("good.png: 4 regions")
    script = Path(sys.executable).parent / "dg"
    if not script.exists():
        pytest.skip("the console script dg is not installed beside this interpreter")
    run = subprocess.run([script, "predict", "good.png", "-o", "b"], capture_output=True, cwd=work)
    assert run.returncode == 0
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


@pytest.mark.parametrize(
    ("options", "steps"),
    [
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
    ],
)
def test_options_reach_the_segmenter(work, capsys, options, steps):
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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["predict"],
        ["predict", "good.png", "--refine", "magic"],
        ["predict", "good.png", "--steps", "many"],
        ["predict", "good.png", "--unknown"],
        ["demo", "good.png", "other.png"],
        *(["predict", "good.png", "--imgsz", s] for s in ("big", "4x5x6", "4x", "x", "", "4.5")),
    ],
)
def test_usage_errors_are_2(work, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "\n  fix: " in err
    assert not (work / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["predict", "-h"]])
def test_help_is_0_on_stdout(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == "" and out.startswith("usage: dg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png does not exist"),
        (
            ["good.png", "--prior", "resnet"],
            "prior is 'resnet', which does not exist; wanted 'kmeans', a bundle",
        ),
        (["good.png", "--prior", "no.onnx"], "no.onnx does not exist or is no file"),
        (["good.png", "--steps", "-1"], "steps is -1; wanted a whole number from 0"),
        (["good.png", "--threads", "0"], "threads is 0; wanted 1 to 1024"),
        (["good.png", "--min-area", "-1"], "min_area is -1; wanted 0 to"),
        (["good.png", "--imgsz", "0"], "imgsz is 0; wanted (height, width) or the long side"),
        (["good.png", "--imgsz", "4x-5"], "imgsz is (4, -5); wanted (height, width)"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "demo"])
def test_failures_are_1_with_one_error(work, capsys, command, arguments, message):
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "m.onnx has 0 bytes"),
        (b"not a network", "m.onnx"),
        (None, "city.bundle is no bundle: it has no manifest.json"),
    ],
)
def test_model_files_that_cannot_be_used_are_5(work, capsys, content, message):
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
    assert (
        "error: out of memory\n  fix: close other programs, or use a sm" in capsys.readouterr().err
    )


# Interrupted, unwritable, closed


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("options", [[], ["--json", "--coco"]])
def test_ctrl_c_is_130_at_once_and_leaves_nothing(work, options):
    rng = np.random.default_rng(0)
    picture_file(work / "long.png", rng.integers(0, 256, (400, 400, 3), dtype=np.uint8))
    command = [sys.executable, "-m", "sdk", "predict", "long.png", "--refine", "dynaguide"]
    process = subprocess.Popen(
        [*command, *options],
        cwd=work,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a runner that is a background job ignores the signal, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not (work / "out").is_dir():  # made before any work is done
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1.5)  # in the middle of about 100 s of steps
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        waited = time.monotonic() - start
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n  fix: run it again\n")
    assert files(work / "out") == [] and waited < 2


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
    assert capsys.readouterr().err == "error: interrupted\n  fix: run it again\n"


@pytest.mark.parametrize("out", ["good.png", "good.png/below", "good.png/a/b"])
def test_folder_that_cannot_be_made(work, capsys, out):
    before = (work / "good.png").read_bytes()
    assert main(["predict", "good.png", "-o", out]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("error: ") and out in stderr
    assert "fix: choose another folder" in stderr
    assert files(work) == ["good.png"] and (work / "good.png").read_bytes() == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission(work, capsys):
    (work / "out").mkdir(mode=0o500)
    assert main(["predict", "good.png"]) == 1
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("full_at", [0, 1, 2, 3])
def test_disk_that_fills_up_leaves_whole_files_only(work, capsys, monkeypatch, full_at):
    """The n-th replacement fails: the probe, the overlay, the labels, the annotations."""
    calls, replace = [], os.replace

    def full(*arguments):
        calls.append(1)
        if len(calls) > full_at:
            raise OSError(28, "No space left on device")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    assert main(["predict", "good.png", "--coco"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err
    written = ["good_labels.png", "good_overlay.png"]
    assert files(work / "out") == sorted(written[::-1][: max(0, full_at - 1)])


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
@pytest.mark.parametrize(
    "arguments",
    [["predict", "good.png"], ["predict", "good.png", "--json"], ["demo", "good.png"]],
)
def test_reader_that_has_gone_gives_no_traceback(work, arguments):
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sdk", *arguments]
    run = subprocess.run(
        command, cwd=work, env=plain_environment(), stdout=written, stderr=subprocess.PIPE
    )
    os.close(written)
    assert (run.returncode, run.stderr.decode()) == (1, "")
    assert "good_labels.png" in files(work / "out")


# Pictures of every kind


def kinds():
    """name -> (bytes, size of the labels or None when refused, words on stderr)."""

    def encoded(image, kind, **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    rgb = Image.fromarray(PICTURE)
    jpeg, png = encoded(rgb, "JPEG", quality=95), encoded(rgb, "PNG")
    deep = Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn
    size = (48, 64)
    return {
        "text.png": (b"this is not a picture", None, "is not a picture"),
        "html.jpg": (b"<!DOCTYPE html><title>404</title>", None, "is not a picture"),
        "random.jpg": (np.random.default_rng(0).bytes(5000), None, "is not a picture"),
        "zero.png": (b"", None, "is empty (0 bytes)"),
        "half.jpg": (jpeg[: len(jpeg) // 2], None, "is a truncated JPEG"),
        "half.png": (png[: len(png) // 2], None, "is a truncated PNG"),
        "header.jpg": (jpeg[:4], None, "is a truncated JPEG"),
        "huge.png": (png[:16] + b"\0\1\0\0\0\1\0\0" + png[24:], None, "has 65536 x 65536 pixels"),
        "jpeg.jpg": (jpeg, size, ""),
        "jpeg_named.png": (jpeg, size, ""),  # the content counts
        "deep.png": (encoded(deep, "PNG"), size, "16 bits per channel"),
        "grey.png": (encoded(rgb.convert("L"), "PNG"), size, ""),
        "grey.jpg": (encoded(rgb.convert("L"), "JPEG"), size, ""),
        "one_bit.png": (encoded(rgb.convert("1"), "PNG"), size, ""),
        "rgba.png": (encoded(rgb.convert("RGBA"), "PNG"), size, "alpha channel was dropped"),
        "grey_alpha.png": (encoded(rgb.convert("LA"), "PNG"), size, "alpha channel was dropped"),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), size, ""),
        "palette.png": (encoded(rgb.convert("P"), "PNG"), size, ""),
        "rotated.jpg": (encoded(rgb, "JPEG", exif=rotated), (64, 48), ""),
        "progressive.jpg": (encoded(rgb, "JPEG", progressive=True), size, ""),
        "picture.bmp": (encoded(rgb, "BMP"), size, ""),
        "picture.webp": (encoded(rgb, "WEBP"), size, ""),
        "picture.tif": (encoded(rgb, "TIFF"), size, ""),
        "one.png": (encoded(rgb.crop((0, 0, 1, 1)), "PNG"), (1, 1), ""),
        "wide.png": (encoded(rgb.resize((10_000, 1)), "PNG"), (1, 10_000), ""),
        "wide.jpg": (encoded(rgb.resize((10_000, 1)), "JPEG"), (1, 10_000), ""),
        "tall.png": (encoded(rgb.resize((1, 10_000)), "PNG"), (10_000, 1), ""),
    }


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("command", ["predict", "demo"])
def test_pictures_of_every_kind(work, capsys, command, name):
    content, size, words = KINDS[name]
    (work / name).write_bytes(content)
    code = main([command, name])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and words in err
    if size is None:
        assert (code, out, files(work / "out")) == (1, "", [])
        assert err.startswith(f"error: {name} ") and err.count("error: ") == 1
    else:
        assert code == 0 and labels_of(work / "out", Path(name).stem).shape == size
        assert err.startswith("warning: ") if words else err == ""


def test_rotation_turns_the_labels_with_the_picture(work):
    content, _, _ = KINDS["rotated.jpg"]
    (work / "rotated.jpg").write_bytes(content)
    (work / "plain.png").write_bytes(KINDS["palette.png"][0])
    assert main(["predict", "rotated.jpg", "plain.png"]) == 0
    turned, plain = (labels_of(work / "out", n) for n in ("rotated", "plain"))
    assert (turned == np.rot90(plain, -1)).mean() > 0.95


def test_every_kind_at_once_in_a_process(work):
    """Bad pictures among good ones: exit 1, the good ones written, nothing but errors said."""
    chosen = {n: k for n, k in KINDS.items() if n not in ("jpeg_named.png", "grey.jpg")}
    names = [f"{i}_{n}" for i, n in enumerate(chosen)]
    for name, (content, _, _) in zip(names, chosen.values(), strict=True):
        (work / name).write_bytes(content)
    run = dg("predict", *names, "missing.png", "--json", "--refine", "fast", cwd=work)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    documents = strict(run.stdout)
    assert [d["picture"] for d in documents] == [*names, "missing.png"]
    refused = [n for n, (_, size, _) in zip(names, chosen.values(), strict=True) if size is None]
    assert [d["picture"] for d in documents if "error" in d] == [*refused, "missing.png"]
    lines = run.stderr.splitlines()
    assert all(line.startswith(("error: ", "warning: ", "  fix: ")) for line in lines)
    assert sum(line.startswith("error: ") for line in lines) == len(refused) + 1
    good = [Path(n).stem for n in names if n not in refused]
    expected = [f"{stem}_{what}.png" for stem in good for what in ("labels", "overlay")]
    assert files(work / "out") == sorted(expected)


def test_a_network_that_fails_on_one_picture_does_not_lose_the_others(work, capsys):
    onnx = pytest.importorskip("onnx", reason="makes the network: pip install onnx")
    info = [onnx.helper.make_tensor_value_info(n, 1, [1, 3, "h", "w"]) for n in "xy"]
    node = onnx.helper.make_node("Log", ["x"], ["y"])  # black pixels become -infinity
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", info[:1], info[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.helper.set_model_props(model, {"mean": "[0, 0, 0]", "std": "[1, 1, 1]"})
    onnx.save(model, work / "m.onnx")
    picture_file(work / "black.png", np.zeros((20, 30, 3), np.uint8))
    picture_file(work / "later.png")
    arguments = ["good.png", "black.png", "later.png", "--prior", "m.onnx", "--imgsz", "32"]
    assert main(["predict", *arguments, "--json"]) in (1, 5)
    out, err = capsys.readouterr()
    assert "m.onnx gave NaN or infinite scores" in err
    good, black, later = strict(out)
    assert "error" not in good and "error" in black and "error" not in later


# A hundred megapixels

MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
run = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
seconds = time.perf_counter() - start
print(json.dumps([run.returncode, run.stdout, run.stderr, peak, seconds]))
"""


def memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.skipif(memory() < 8 * GIB, reason="needs 8 GiB of memory")
def test_a_hundred_megapixels_take_bounded_memory(work, record_property):
    large = cv2.resize(quadrants(100, 100)[0], (10_000, 10_000), interpolation=cv2.INTER_NEAREST)
    assert cv2.imwrite("large.jpg", large[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 20])
    del large
    command = [sys.executable, "-m", "sdk", "predict", "large.jpg", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=work,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    code, out, err, peak, seconds = json.loads(run.stdout)
    record_property("peak_gib", peak / GIB)
    record_property("seconds", seconds)
    print(f"100 megapixels: {peak / GIB:.2f} GiB, {seconds:.1f} s")
    assert (code, err) == (0, "")
    (document,) = strict(out)
    assert document["size"] == {"height": 10_000, "width": 10_000}
    assert document["stats"]["working_size"] == [512, 512] and len(document["segments"]) == 4
    assert files(work / "out") == ["large_labels.png", "large_overlay.png"]
    assert 0.5 * GIB < peak < 4 * GIB  # the arrays of the result alone are 1.4 GiB


def test_an_input_is_not_overwritten_by_an_output(work, capsys):
    picture_file(work / "good_overlay.png")
    before = (work / "good_overlay.png").read_bytes()
    assert main(["predict", "good.png", "good_overlay.png", "-o", "."]) == 1
    assert "good_overlay.png would be overwritten by an output" in capsys.readouterr().err
    assert (work / "good_overlay.png").read_bytes() == before


# --- stream --------------------------------------------------------------------------------------


def clip(path, count=12):
    """A small video: a disc that moves."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (64, 48))
    for i in range(count):
        frame = np.full((48, 64, 3), (40, 90, 160), np.uint8)
        cv2.circle(frame, (10 + 3 * i, 24), 9, (200, 60, 30), -1)
        writer.write(frame)
    writer.release()
    return path


def test_stream_writes_video_labels_json_and_state(tmp_path, capsys):
    source, save = clip(tmp_path / "a.avi"), tmp_path / "out.mp4"
    labels, state = tmp_path / "labels", tmp_path / "state.safetensors"
    command = ["stream", str(source), "--save", str(save), "--labels", str(labels), "--json",
               "--state", str(state), "--warm-steps", "1", "--cold-steps", "3"]  # fmt: skip
    assert main(command) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [d["frame"]["index"] for d in lines] == list(range(12))
    assert [d["stats"]["steps"] for d in lines] == [3] + [1] * 11
    assert "12 frames, 0 dropped, 1.2 steps a frame" in err
    assert [p.name for p in sorted(labels.iterdir())] == [f"{i:06d}.png" for i in range(12)]
    video = cv2.VideoCapture(str(save))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 12 and video.get(cv2.CAP_PROP_FPS) == 20
    assert video.read()[1].shape == (48, 64, 3)
    video.release()
    assert {p.name for p in tmp_path.iterdir()} == {"a.avi", "out.mp4", "labels", state.name}
    assert main([*command[:2], "--state", str(state), "--json", "--frames", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["frame"]["start"] == "warm"


@pytest.mark.parametrize(
    "arguments, message",
    [(("none.mp4",), "none.mp4 does not exist"), (("7777",), "camera 7777 cannot be opened"),
     (("a.avi", "--save", "out.txt"), "out.txt is no video; wanted .mp4"),
     (("a.avi", "--save", "none/out.mp4"), "none does not exist\n  fix: mkdir -p none"),
     (("a.avi", "--frames", "0"), "frames is 0"), (("a.avi", "--rate", "0"), "rate is 0"),
     (("a.avi", "--show"), "there is no display"),
     (("a.avi", "--state", "a.avi"), "a.avi would be overwritten"),
     (("a.avi", "--save", "a.avi"), "a.avi would be overwritten"),
     (("a.avi", "--state", "none/s"), "none does not exist\n  fix: mkdir -p"),
     (("rtsp://me:secret@127.0.0.1:9/x",), "rtsp://127.0.0.1:9/x cannot be opened")],
)  # fmt: skip
def test_stream_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    clip(tmp_path / "a.avi", 2)
    assert main(["stream", *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err and "secret" not in err and "Traceback" not in err and not out
    assert [p.name for p in tmp_path.iterdir()] == ["a.avi"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stream_keeps_what_it_has(tmp_path, number):
    for i in range(400):
        cv2.imwrite(str(tmp_path / f"{i}.png"), PICTURE)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "sdk", "stream", str(tmp_path), "--save", str(out / "a.mp4"),
         "--state", str(out / "s"), "--json", "--warm-steps", "50", "--drop", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(5):
        assert process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert sorted(p.name for p in out.iterdir()) == ["a.mp4", "s"]
    video = cv2.VideoCapture(str(out / "a.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) >= 5
    video.release()
    assert StreamState.load(out / "s").frames >= 5


def test_a_video_that_the_disk_could_not_hold_leaves_the_old_one(tmp_path):
    from sdk import Segmenter
    from sdk.record import Video

    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    result = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)(PICTURE)
    video = Video(path, 25.0)
    for _ in range(5):
        video.write(result)
    release = video._writer.release

    class Full:
        def release(self):
            release()
            (part,) = tmp_path.glob(".*")
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])

    video._writer = Full()
    with pytest.raises(InputError, match="could not be written whole"):
        video.close()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    for size in ((1, 1), (1, 30)):
        with pytest.raises(InputError, match="cannot be written"):
            small = Segmenter(lambda p: np.zeros(p.shape[:2], np.int32), refine=None)
            Video(tmp_path / "b.avi", 25.0).write(small(np.zeros((*size, 3), np.uint8)))


def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    cv2.imwrite(str(tmp_path / "0.png"), PICTURE)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sdk", "stream", str(tmp_path), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1 and "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
