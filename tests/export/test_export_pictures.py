"""Which pictures an export is verified with, which calibrate INT8, and how reports name them."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from cases import case
from exporting import ROOT, export

from export import check_prior
from export.options import ExportOptions
from export.pictures import choose_pictures
from runtime.__main__ import main as runtime_main
from runtime.bundle.manifest import MANIFEST, file_entry, seal
from runtime.bundle.read import Bundle
from runtime.errors import InputError
from runtime.tools.inspect import picture_words

pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
pytest.importorskip("onnxslim", reason="needs onnxslim")


def folder_of(path, count):
    """A folder with ``count`` drawn pictures, all of them different."""
    from scenes import scene

    path.mkdir()
    for seed in range(count):
        picture = (255 * scene(48, 72, seed=seed)[0]).astype(np.uint8)
        assert cv2.imwrite(str(path / f"{seed:02d}.png"), picture[..., ::-1])
    return path


@pytest.fixture(scope="module")
def data(work):
    return folder_of(work / "data", 12)


def chosen(*data, **options):
    return choose_pictures(ExportOptions(int8=True, data=data, **options))


def test_pictures_of_data_are_held_out(tmp_path, colours, data, capsys):
    words = ("--model", colours, "--imgsz", "48x72", "--int8", "--data", data, "-o", tmp_path / "b")
    ended = export(*words, "-q", "--json")
    assert ended.code == 0
    manifest = json.loads(ended.out)["manifest"]
    done, held = manifest["verification"], ["02.png", "06.png", "10.png"]
    assert done["pictures"] == held and done["prior"]["pictures"] == 3
    assert done["prior"]["int8"]["worst_picture"] in held
    digests = {
        path.name: file_entry("", path.read_bytes())["sha256"] for path in sorted(data.iterdir())
    }
    others = [digest for name, digest in digests.items() if name not in held]
    assert done["calibration"]["sha256"] == others
    # the golden vector is the first of them
    golden = Bundle.open(tmp_path / "b").tensors(manifest["golden"][0])["picture"]
    assert np.array_equal(golden, cv2.imread(str(data / "02.png"))[..., ::-1])
    text = "3 pictures of --data, not used to calibrate: 02.png, 06.png, 10.png"
    assert f"verify   on {text}\n" in export(*words, "-q").out
    assert runtime_main(["inspect", str(tmp_path / "b")]) == 0
    assert f"  pictures    {text}\n" in capsys.readouterr().out


def test_how_many_are_held_out(tmp_path):
    for count, held in [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (32, 8), (40, 8)]:
        with case(count):
            pictures, files = chosen(folder_of(tmp_path / str(count), count))
            names = {path.name for path in files}
            if held:
                assert len(pictures.names) == len(pictures.arrays) == held
                assert not names & {*pictures.names}
                numbers = [int(name[:2]) for name in pictures.names]
                gaps = np.diff([-numbers[0] - 1, *numbers, 2 * count - 1 - numbers[-1]])
                assert gaps.max() - gaps.min() <= 2  # they are spread evenly
            else:
                assert (
                    str(pictures) == "1 picture (--data has fewer than 4 pictures): the demo photo"
                )
                assert pictures.arrays[0].shape == (512, 512, 3)
            assert len(names) == count - held


def test_a_share_of_data(data):
    for fraction, count in [(0.5, 6), (1.0, 9), (0.001, 1)]:
        with case(fraction):
            pictures, files = chosen(data, fraction=fraction)
            assert pictures.names == ["02.png", "06.png", "10.png"]
            assert len(files) == count and files[0].name == "00.png"


def test_a_file_that_is_named_twice(tmp_path, data):
    (tmp_path / "link.png").symlink_to(data / "02.png")
    pictures, files = chosen(data, data / "02.png", data / "06.png", tmp_path / "link.png")
    assert pictures.names == ["02.png", "06.png", "10.png"] and len(files) == 9
    assert not {"02.png", "06.png", "link.png"} & {path.name for path in files}


def test_pictures_that_the_user_names(tmp_path, data):
    other = folder_of(tmp_path / "other", 2)
    pictures, files = chosen(data, pictures=(other,))
    assert str(pictures) == "2 pictures: 00.png, 01.png" and len(files) == 12
    pictures, files = chosen(data, pictures=(data / "03.png", data / "05.png", other))
    assert str(pictures) == (
        "4 pictures (2 of them also used to calibrate): 03.png, 05.png, 00.png, 01.png"
    )
    assert len(files) == 12
    with pytest.raises(InputError, match="does not exist"):
        chosen(data, pictures=(tmp_path / "nowhere.png",))
    pictures, files = choose_pictures(ExportOptions(pictures=(other,)))
    assert pictures.names == ["00.png", "01.png"] and files == []


def test_names_are_shortened_in_text_alone(tmp_path, colours, data):
    source, long = (data / "00.png").read_bytes(), "a" * 200 + ".png"
    folder = tmp_path / "p"
    folder.mkdir()
    names = [long, *"bcde"]
    for name in names:
        (folder / name).write_bytes(source)
    shown = [folder / name for name in names]
    words = ("--model", colours, "--imgsz", "48x72", "--pictures", *shown)
    ended = export(*words, "-q", "-o", tmp_path / "b")
    assert f"verify   on 5 pictures: {'a' * 20}...{'a' * 13}.png, b, c, d, ...\n" in ended.out
    assert Bundle.open(tmp_path / "b").manifest["verification"]["pictures"] == names


def test_one_picture_to_calibrate_with(tmp_path, colours, data):
    words = ("--model", colours, "--imgsz", "48x72", "--int8", "--data", data / "00.png")
    ended = export(*words, "--pictures", data / "01.png", "-o", tmp_path / "b")
    assert "calibrate INT8 on 1 picture ..." in ended.err, ended


def test_words_for_pictures():
    assert picture_words([]) == "0 pictures: "
    assert picture_words(["a.png"]) == "1 picture: a.png"
    assert picture_words(["a", "b"], "of --data") == "2 pictures of --data: a, b"
    assert picture_words([*"abcde"]) == "5 pictures: a, b, c, d, ..."


def test_inspect_of_bundles_with_other_reports(tmp_path, plain, capsys):
    """Older bundles name the arguments of --pictures, and a stranger may write anything."""
    for pictures, note, text in [
        (["photos", "more"], None, "pictures photos, more"),
        (7, "of --data", "pictures 7, pictures_note of --data"),
        ([3, {"a": 1}], "x" * 99, f"2 pictures {'x' * 80}: 3, {{'a': 1}}"),
    ]:
        with case(pictures):
            path = shutil.copytree(plain[1], tmp_path / "b", dirs_exist_ok=True)
            manifest = json.loads((path / MANIFEST).read_text())
            manifest["verification"] |= {"pictures": pictures, "pictures_note": note}
            if note is None:
                del manifest["verification"]["pictures_note"]
            (path / MANIFEST).write_text(json.dumps(seal(manifest)))
            assert runtime_main(["inspect", str(path)]) == 0
            assert text in " ".join(capsys.readouterr().out.split())


def test_names_that_a_terminal_or_a_manifest_cannot_hold(tmp_path, data):
    """A name that is no UTF-8, and a terminal that knows ASCII alone."""
    source = (data / "00.png").read_bytes()
    folder = os.fsencode(tmp_path / "p")
    os.mkdir(folder)
    for name in (b"caf\xe9.png", "日本.png".encode()):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(source)
    pictures, _ = choose_pictures(ExportOptions(pictures=(tmp_path / "p",)))
    assert sorted(pictures.names) == ["caf\\udce9.png", "日本.png"]
    words = ["--imgsz", "48x72", "--pictures", tmp_path / "p/日本.png", "-q", "-o", tmp_path / "b"]
    done = subprocess.run(
        [sys.executable, "-m", "export", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert "verify   on 1 picture: \\u65e5\\u672c.png\n" in done.stdout


def test_reports_of_the_demo_photo(tmp_path, colours):
    ended = export("--model", colours, "--imgsz", "48x72", "-q", "-o", tmp_path / "b")
    assert ended.code == 0 and "verify   on 1 picture: the demo photo\n" in ended.out
    done = Bundle.open(tmp_path / "b").manifest["verification"]
    assert done["pictures"] == ["the demo photo"] and done["pictures_note"] == ""


def test_a_refusal_names_the_pictures_and_what_to_do(tmp_path, colours, data, monkeypatch):
    for precision in ("fp16", "int8"):
        monkeypatch.setitem(check_prior.AGREEMENT, precision, 1.1)
    words = ("--model", colours, "--imgsz", "48x72", "-q", "-o", tmp_path / "b")
    ended = export(*words, "--int8", "--data", data)
    assert ended.refused(
        3,
        "of the labels agree with the original on 3 pictures of --data, not used to calibrate: "
        "02.png, 06.png, 10.png (worst ",
        "--pictures FILE...",
        "--data more pictures",
        "leave --int8 out",
    )
    worst = ended.err.partition("(worst ")[2].partition(")")[0]
    assert worst.split("%, ")[1] in ("02.png", "06.png", "10.png")
    ended = export(*words, "--half", "--pictures", data / "04.png")
    assert ended.refused(3, "on 1 picture: 04.png (worst ", "%, 04.png)", "--pictures FILE...")
    assert "--data" not in ended.err and "leave --half out" in ended.err
