"""sdk/__main__.py with pictures of every kind, most of them bad, and one of 25 megapixels."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case
from dg_commands import PICTURE, dg, files, labels_of, picture_file, plain_environment, strict
from drawn_pictures import quadrants
from PIL import Image

from sdk.__main__ import main

GIB = 2**30


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


def test_pictures_of_every_kind(work, capsys):
    """``demo`` reads pictures as ``predict`` does: one kind of each outcome shows this."""
    chosen = [("predict", name) for name in KINDS]
    chosen += [("demo", name) for name in ("half.jpg", "huge.png", "rgba.png", "rotated.jpg")]
    for command, name in chosen:
        content, size, words = KINDS[name]
        (work / name).write_bytes(content)
        out = work / f"{command} {name}"
        with case(command, name):
            code = main([command, name, "-o", str(out)])
            said, err = capsys.readouterr()
            assert "Traceback" not in err and words in err
            if size is None:
                assert (code, said, files(out)) == (1, "", [])
                assert err.startswith(f"error: {name} ") and err.count("error: ") == 1
            else:
                assert code == 0 and labels_of(out, Path(name).stem).shape == size
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
    kinds = ("half.jpg", "zero.png", "huge.png", "jpeg.jpg", "deep.png", "rgba.png", "cmyk.jpg",
             "rotated.jpg", "picture.webp", "one.png")  # fmt: skip
    chosen = {n: KINDS[n] for n in kinds}
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
    assert "m.onnx returned NaN or infinite scores" in err
    good, black, later = strict(out)
    assert "error" not in good and "error" in black and "error" not in later


# Twenty-five megapixels

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
def test_memory_is_bounded_by_the_size_of_the_picture(work, record_property):
    """The bounds are those of 43 and of 5 bytes for each pixel, with all that the process loads."""
    side = 5000
    large = cv2.resize(quadrants(100, 100)[0], (side, side), interpolation=cv2.INTER_NEAREST)
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
    print(f"25 megapixels: {peak / GIB:.2f} GiB, {seconds:.1f} s")
    assert (code, err) == (0, "")
    (document,) = strict(out)
    assert document["size"] == {"height": side, "width": side}
    assert document["stats"]["working_size"] == [512, 512] and len(document["segments"]) == 4
    assert files(work / "out") == ["large_labels.png", "large_overlay.png"]
    assert 0.125 * GIB < peak < 1 * GIB  # the arrays of the result alone are 0.35 GiB


def test_an_input_is_not_overwritten_by_an_output(work, capsys):
    picture_file(work / "good_overlay.png")
    before = (work / "good_overlay.png").read_bytes()
    assert main(["predict", "good.png", "good_overlay.png", "-o", "."]) == 1
    assert "good_overlay.png would be overwritten by an output" in capsys.readouterr().err
    assert (work / "good_overlay.png").read_bytes() == before
    picture_file(work / "good.png")
    (work / "good.png").rename(work / "annotations.json")
    assert main(["predict", "annotations.json", "-o", ".", "--coco"]) == 1
    assert "annotations.json would be overwritten by an output" in capsys.readouterr().err
