"""Every path that the exporter takes: names that are not UTF-8, paths that the operating system
refuses, and files as folders contain them."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
from cases import case
from exporting import export, files
from permissions import obeyed
from unusable_paths import NOT_UTF8, bad_paths, locked, removed_folder

from export.pack import export_bundle
from runtime.bundle.manifest import MANIFEST
from runtime.bundle.read import Bundle
from runtime.errors import InputError

SIZE = ("--imgsz", "48x72")


def read_doors(colours, photos):
    """option -> the words before the path, for each option that names files to read."""
    network = ("--model", colours, *SIZE, "--pictures", photos)
    return {
        "--model": ("--model",),
        "--weights": ("--model", "segformer", "--weights"),
        "--init": (*network, "--init"),
        "--pictures": ("--model", colours, *SIZE, "--pictures"),
        "--data": (*network, "--int8", "--data"),
    }


def write_doors(colours, photos):
    """The same for each option that names a file or folder to write."""
    network = ("--model", colours, *SIZE, "--pictures", photos)
    return {
        "-o": (*network, "-o"),
        "--triton": (*network, "--triton"),
        "--timing-cache": (*network, "--target", "trt", "--timing-cache"),
    }


def refused_early(ended, *texts):
    """One sentence with a fix, before the network is frozen."""
    assert ended.refused(1, "\n  fix: ", *texts)
    assert "freeze" not in ended.err, ended.err
    return True


def test_paths_that_the_operating_system_refuses(tmp_path, colours, photos, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "bad").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    bads = bad_paths(tmp_path / "bad", ".onnx")
    with obeyed():
        for option, words in read_doors(colours, photos).items():
            for bad in bads:
                with case(option, bad.kind):
                    reason = bad.reason
                    if option == "--weights" and reason == "does not exist":
                        reason = "which is no folder here"
                    assert refused_early(export(*words, bad.path), bad.path[:100], reason)
        for option, words in write_doors(colours, photos).items():
            for bad in bads[2:] if option != "-o" else bads[1:]:
                with case(option, bad.kind):
                    reason = bad.reason if bad.kind != "below a file" else "Not a directory"
                    assert refused_early(export(*words, bad.path), bad.path[:100], reason)
    assert files(tmp_path / "work") == {}


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, colours, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.onnx")
    os.symlink("/dev/zero", "device.onnx")
    os.mkdir("folder.onnx")
    doors = read_doors(colours, photos) | write_doors(colours, photos)
    for option in ("--model", "--init", "--timing-cache"):
        for kind, text in [("pipe", "a pipe"), ("device", "a device"), ("folder", "a folder")]:
            with case(option, kind):
                ended = export(*doors[option], f"{kind}.onnx")
                assert refused_early(ended, f"{kind}.onnx is a", text, "wanted a")


def test_a_removed_working_folder(tmp_path, colours, photos):
    with removed_folder(tmp_path / "gone"):
        doors = read_doors(colours, photos) | write_doors(colours, photos)
        for option, words in doors.items():
            with case(option):
                path = "x.onnx" if option == "--model" else "x"
                if option == "--weights":
                    assert refused_early(export(*words, path), "current folder was removed")
                else:
                    assert refused_early(export(*words, path), path)
        out = tmp_path / "out.bundle"
        assert export(*doors["-o"], out, "--triton", tmp_path / "t").code == 0
    Bundle.open(out).check_files()


def test_a_bundle_whose_name_has_a_line_break(tmp_path):
    out = tmp_path / "a\nb.bundle"
    assert export("--model", "kmeans", "-q", "-o", out).code == 0
    assert json.loads((out / MANIFEST).read_bytes())["name"] == r"a\nb.bundle"


def test_names_that_are_not_utf8(tmp_path, colours, photos):
    """Files keep their names; the manifest and what is printed are UTF-8."""
    folder = tmp_path / NOT_UTF8
    shutil.copytree(photos, folder / "photos")
    for i in range(4):
        (folder / f"photos/{i}.png").rename(folder / f"photos/{i}{NOT_UTF8}.png")
    model = shutil.copy(colours, folder / f"{NOT_UTF8}.onnx")
    out, triton = folder / f"b {NOT_UTF8}.bundle", folder / "triton models"
    words = ("--model", model, *SIZE, "--int8", "--data", folder / "photos", "-q", "-o", out)
    ended = export(*words, "--triton", triton)
    assert ended.code == 0 and ended.err == ""
    ended.out.encode()
    shown = r"b caf\xe9.bundle'"
    assert f"predict PICTURE --prior $'{tmp_path}/caf\\xe9/{shown}" in ended.out
    text = (out / MANIFEST).read_bytes().decode()
    text.encode()
    manifest = json.loads(text)
    assert manifest["name"] == r"b caf\udce9.bundle"
    assert manifest["model"]["name"] == r"caf\udce9"
    assert manifest["verification"]["pictures"] == [r"2caf\udce9.png"]
    assert manifest["recipe"]["command"].endswith(f"$'b caf\\xe9.bundle' --triton '{triton.name}'")
    Bundle.open(out).check_files()
    assert [*files(triton)] == [
        r"b_caf\udce9",
        r"b_caf\udce9/1",
        r"b_caf\udce9/1/model.onnx",
        r"b_caf\udce9/config.pbtxt",
    ]
    ended = export(*words, "--json")
    document = json.loads(ended.out)
    json.dumps(document, ensure_ascii=False).encode()
    assert document["bundle"].endswith(r"b caf\udce9.bundle")


def test_a_name_that_is_not_utf8_on_the_command_line(colours):
    for option, text in [
        ("--names", "which contains control characters or broken letters"),
        ("--output-name", r"output-name is 'road,caf\udce9', which is not UTF-8"),
    ]:
        with case(option):
            assert refused_early(export("--model", colours, option, f"road,{NOT_UTF8}"), text)


def test_a_bundle_of_a_model_whose_name_is_not_utf8(tmp_path, colours, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(colours, f"{NOT_UTF8}.onnx")
    assert export("--model", f"{NOT_UTF8}.onnx", *SIZE, "--pictures", photos, "-q").code == 0
    assert Bundle.open(r"caf\udce9.bundle").name == r"caf\udce9.bundle"


def test_a_checkpoint_whose_name_is_not_utf8(tmp_path, checkpoint):
    from export.models.load import load_model

    model = load_model("segformer", shutil.copytree(checkpoint, tmp_path / NOT_UTF8))
    assert model.name == r"caf\udce9" and model.trained


def test_temporary_files_in_a_folder_that_is_not_utf8(tmp_path, colours, photos, monkeypatch):
    (tmp_path / NOT_UTF8).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / NOT_UTF8))
    words = ("--model", colours, *SIZE, "--int8", "--data", photos, "-o", tmp_path / "b")
    assert export(*words).refused(1, r"caf\udce9, has a name that is not UTF-8", "TMPDIR=/tmp")


def test_a_bundle_in_the_current_folder_is_called_as_the_folder(tmp_path, colours, monkeypatch):
    (tmp_path / "city").mkdir()
    monkeypatch.chdir(tmp_path / "city")
    assert export("--model", colours, *SIZE, "-q", "-o", ".").code == 0
    assert Bundle.open(tmp_path / "city").manifest["name"] == "city"


def test_names_with_signs_of_shells_and_urls(tmp_path, colours, photos):
    for name in ("a b", "#1", "100%", "!x", "a%20b", "$HOME", "-x", "日本", "it's"):
        with case(name):
            folder = tmp_path / name
            shutil.copytree(photos, folder)
            model = shutil.copy(colours, folder / f"{name}.ONNX")
            out = folder / f"{name}.bundle"
            words = (f"--model={model}", *SIZE, "--pictures", folder, folder / "1.png")
            ended = export(*words, f"-o{out}", "-q", "--triton", folder / "tri ton")
            assert ended.code == 0, ended
            manifest = Bundle.open(out).manifest
            assert manifest["model"]["name"] == name
            assert manifest["verification"]["pictures"] == [
                "0.png", "1.png", "2.png", "3.png", "1.png",
            ]  # fmt: skip
            import shlex

            line = next(line for line in ended.out.splitlines() if line.startswith("next"))
            assert shlex.split(line)[-1] == str(out)
            line = next(line for line in ended.out.splitlines() if line.startswith("triton"))
            assert shlex.split(line)[-1] == str(folder / "tri ton")
            assert shlex.split(manifest["recipe"]["command"])[3] == f"--model={name}.ONNX"


def test_hidden_files_are_left_out(tmp_path, colours, photos):
    """A Mac writes ._NAME beside each file; these are no pictures."""
    folder = tmp_path / "p"
    shutil.copytree(photos, folder)
    for name in ("._0.png", "._1.png", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\26\7Mac OS X")
    words = ("--model", colours, *SIZE, "-q", "-o", tmp_path / "b")
    for more in (("--pictures", folder), ("--int8", "--data", folder)):
        with case(more[-2]):
            ended = export(*words, *more)
            assert ended.code == 0, ended
    done = Bundle.open(tmp_path / "b").manifest["verification"]
    assert len(done["calibration"]["sha256"]) == 3 and done["pictures"] == ["2.png"]


def test_pictures_are_read_as_the_sdk_reads_them(tmp_path, colours, photos, caplog):
    """Damaged ones are refused, and what the SDK warns of is logged."""
    folder = tmp_path / "p"
    shutil.copytree(photos, folder)
    deep = np.full((48, 72, 3), 257 * 100, np.uint16)
    for name in ("4.png", "5.png"):
        assert cv2.imwrite(str(folder / name), deep)
    assert cv2.imwrite(str(folder / "6.png"), np.full((48, 72, 4), 100, np.uint8))
    words = ("--model", colours, *SIZE, "-q", "-o", tmp_path / "b")
    for more in (("--pictures", folder), ("--pictures", photos, "--int8", "--data", folder)):
        with case(more[-2]):
            caplog.clear()
            assert export(*words, *more).code == 0
            lines = [record.message for record in caplog.records if record.name == "dg.export"]
            assert len(lines) == 2
            assert lines[0].startswith("2 pictures: 4.png, 5.png: The picture has 16 bits")
            assert lines[1].startswith("1 picture: 6.png: The alpha channel")
    cut = (folder / "0.png").read_bytes()[:-20]
    floats = cv2.imencode(".tiff", np.zeros((4, 4, 3), np.float32))[1].tobytes()
    for data, reason in [(cut, "truncated PNG"), (floats, "wanted 8 or 16 bits")]:
        (tmp_path / "bad.png").write_bytes(data)
        for more in (
            ("--pictures", tmp_path / "bad.png"),
            ("--pictures", photos, "--int8", "--data", tmp_path / "bad.png"),
        ):
            with case(reason, more[-2]):
                assert export(*words, *more).refused(1, "bad.png ", reason)


def test_a_full_disk_leaves_nothing(tmp_path, colours, photos, monkeypatch):
    import resource

    monkeypatch.chdir(tmp_path)
    words = ("--model", colours, *SIZE, "--pictures", photos, "-q", "-o", "b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        for more in ((), ("--int8", "--data", photos)):
            assert export(*words, *more).refused(1, "cannot be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == {}


def test_the_bundle_in_place_of_the_model(tmp_path, colours, photos, plain):
    """The folder of the model is left alone, unless it is a bundle."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(colours, folder)
    words = ("--model", folder / colours.name, "--pictures", photos, "-o", folder)
    assert refused_early(export(*words), "exists and is no bundle; it is left alone")
    shutil.rmtree(folder)
    shutil.copytree(plain[1], folder)
    ended = export("--model", folder / "prior.onnx", "--pictures", photos, "-o", folder, "-q")
    assert ended.code == 0
    Bundle.open(folder).check_files()


def test_what_exists_and_what_is_locked(tmp_path, colours, photos, plain):
    words = ("--model", colours, *SIZE, "--pictures", photos, "-o", tmp_path / "b")
    (tmp_path / "b").write_text("mine")
    assert refused_early(export(*words), "exists and is no bundle; it is left alone")
    (tmp_path / "b").unlink()
    shutil.copytree(plain[1], tmp_path / "b")
    with locked(tmp_path / "b"):
        assert refused_early(export(*words), "b cannot be written: Permission denied")
    (tmp_path / "models").mkdir()
    doors = (("-o", tmp_path / "models/b"), ("-o", tmp_path / "b", "--triton", tmp_path / "models"))
    for mode in (0, 0o500):
        (tmp_path / "models").chmod(mode)
        with obeyed():
            for more in doors:
                with case(mode, more[-2]):
                    assert refused_early(export(*words, *more), "models/b", "Permission denied")


def test_a_zero_byte(colours):
    from export.models.load import load_model

    with pytest.raises(InputError, match="cannot be read: embedded null byte"):
        load_model("a\0b.onnx")
    with pytest.raises(InputError, match="cannot be written: embedded null byte"):
        export_bundle(load_model(str(colours)), "a\0b")


def test_what_was_saved_in_place_of_the_model(tmp_path, colours, checkpoint):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 99\n"
    page = b"<!DOCTYPE html><html>"
    for content, what in [(pointer, "is a Git LFS pointer"), (page, "is a web page")]:
        (tmp_path / "m.onnx").write_bytes(content)
        folder = shutil.copytree(checkpoint, tmp_path / "c", dirs_exist_ok=True)
        (folder / "model.safetensors").write_bytes(content)
        for words in [
            ("--model", tmp_path / "m.onnx"),
            ("--model", "segformer", "--weights", folder),
        ]:
            with case(what, words[1]):
                assert export(*words).refused(5, what, "\n  fix: ")


def test_an_address_is_no_path(tmp_path, colours):
    for words in [
        ("--model", "https://host/m.onnx"),
        ("--model", "https://host/m"),
        ("--model", colours, "--init", "https://host/i.safetensors"),
    ]:
        with case(words):
            assert export(*words).refused(1, "nothing is downloaded", "fix: download it")


def test_a_url_is_no_output():
    for option in ("-o", "--triton"):
        with case(option):
            ended = export("--model", "kmeans", option, "https://host/b.bundle")
            assert ended.refused(2, "it is a URL; wanted a path")
