"""Models that are links: the caches of model hubs, mounted folders, and hostile links.

A hub's cache has one file for each content, blobs/HASH, and a link to it for each name,
snapshots/REVISION/NAME.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from cases import case
from onnx_files import BESIDE, external, in_initializer, model_of, onnx

from runtime import load_engine
from runtime.engines.onnx_file import check_file
from runtime.errors import BundleError, InputError


def hub(cache, name="model.onnx", weights=None):
    """A cache with a model and its weights; return the path of the model in its snapshot."""
    blobs, folder = cache / "blobs", (cache / "snapshots/12ab" / name).parent
    blobs.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (blobs / "hash_of_model").write_bytes(in_initializer("model.onnx_data").SerializeToString())
    (blobs / "hash_of_data").write_bytes(BESIDE.tobytes() if weights is None else weights)
    for link, blob in [
        (cache / "snapshots/12ab" / name, "model"),
        (folder / "model.onnx_data", "data"),
    ]:
        link.symlink_to(os.path.relpath(blobs / f"hash_of_{blob}", folder))
    return cache / "snapshots/12ab" / name


def assert_loads(path):
    with load_engine(path) as engine:
        assert engine.name == path.name
        assert np.array_equal(engine()[0], BESIDE)


def test_a_hub_cache_loads(tmp_path, monkeypatch):
    for name in ["model.onnx", "onnx/fp32/model.onnx"]:
        with case(name), monkeypatch.context() as patch:
            cache = tmp_path / name.replace("/", "--")
            path = hub(cache, name)
            assert_loads(path)
            assert check_file(path) == (path, {"model.onnx_data": cache / "blobs/hash_of_data"})
            patch.chdir(path.parent)  # the same file by a relative path
            assert_loads(Path("model.onnx"))


def test_weights_that_are_a_link_beside_a_copied_model_load(tmp_path):
    """ONNX Runtime 1.31 itself refuses this one."""
    path = hub(tmp_path / "cache")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert_loads(path)


def test_a_link_to_a_model_finds_the_weights_beside_the_model(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "model.onnx").write_bytes(in_initializer("model.onnx_data").SerializeToString())
    (real / "model.onnx_data").write_bytes(BESIDE.tobytes())
    here = tmp_path / "here"
    here.mkdir()
    for number, target in enumerate(["../real/model.onnx", str(hub(tmp_path / "cache")), "0.onnx"]):
        with case(target):
            (here / f"{number}.onnx").symlink_to(target)
            assert_loads(here / f"{number}.onnx")


def test_a_link_beside_some_of_the_weights_finds_the_model_with_all_of_them(tmp_path):
    for folder in ("real", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.bin").write_bytes(BESIDE.tobytes())
    (tmp_path / "real/v.bin").write_bytes(BESIDE.tobytes())
    weights = [external("w.bin", "w"), external("v.bin", "v")]
    both = model_of([onnx.helper.make_node("Max", ["w", "v"], ["y"])], initializers=weights)
    (tmp_path / "real/model.onnx").write_bytes(both.SerializeToString())
    (tmp_path / "here/model.onnx").symlink_to("../real/model.onnx")
    assert_loads(tmp_path / "here/model.onnx")


def test_a_mounted_folder_loads(tmp_path):
    """Kubernetes mounts files as links to ..data/NAME, where ..data is a link to a folder."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..data").symlink_to("..2026")
    data = in_initializer("model.onnx_data").SerializeToString()
    (tmp_path / "..2026/model.onnx").write_bytes(data)
    (tmp_path / "..2026/model.onnx_data").write_bytes(BESIDE.tobytes())
    for name in ("model.onnx", "model.onnx_data"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert_loads(tmp_path / "model.onnx")


def test_links_out_of_the_cache_are_refused(tmp_path, not_opened):
    secret = tmp_path / "secret"
    secret.write_bytes(BESIDE.tobytes())
    path = hub(tmp_path / "models--net")
    hub(tmp_path / "models--other")
    (path.parents[1] / "34cd").mkdir()
    (path.parents[1] / "34cd/data").write_bytes(BESIDE.tobytes())
    (path.parents[2] / "blobs/out").symlink_to(secret)
    (path.parents[2] / "blobs/below").mkdir()
    (path.parents[2] / "blobs/below/data").write_bytes(BESIDE.tobytes())
    link = path.parent / "model.onnx_data"
    for target in [
        "/etc/passwd",
        str(secret),
        "../../../secret",
        "../../../models--other/blobs/hash_of_data",
        "../34cd/data",
        "../../blobs/out",
        "../../blobs/below/data",
    ]:
        with case(target):
            link.unlink()
            link.symlink_to(target)
            with pytest.raises(BundleError) as caught:
                load_engine(path)
            message = "keeps weights in 'model.onnx_data', which is a link to "
            assert message + str(link.resolve()) in str(caught.value)
            assert "replace the link with a copy" in caught.value.fix


def test_no_cache_is_the_home_or_reaches_outside(tmp_path, not_opened, monkeypatch):
    path = hub(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(BundleError, match="outside its own folder"):
        load_engine(path)
    path = hub(tmp_path / "cache")
    (tmp_path / "cache/blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "cache/blobs").symlink_to("../elsewhere")  # the whole folder leads out
    with pytest.raises(BundleError, match="outside its own folder"):
        load_engine(path)


def test_weights_that_are_no_file_are_named(tmp_path, not_opened):
    path = hub(tmp_path / "cache")
    link, blobs = path.parent / "model.onnx_data", tmp_path / "cache/blobs"
    os.mkfifo(blobs / "fifo")
    (blobs / "folder").mkdir()
    (blobs / "loop").symlink_to("loop")
    for target, what in [
        ("gone", "and is missing"),
        ("fifo", "and is no file"),
        ("folder", "and is no file"),
        ("loop", ""),
    ]:
        with case(target):
            link.unlink()
            link.symlink_to(f"../../blobs/{target}")
            with pytest.raises(
                BundleError, match=r"needs its weights file 'model.onnx_data'"
            ) as got:
                load_engine(path)
            assert what in str(got.value) and "together with its weights file" in got.value.fix
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(BundleError, match=r"'model.onnx_data', which is no file"):
        load_engine(path)
    path.unlink()
    path.symlink_to("model.onnx")
    with pytest.raises(InputError, match="cannot be read: Too many levels of symbolic links"):
        load_engine(path)


def test_damaged_weights_of_a_cache_are_an_error(tmp_path):
    for content in (b"", b"1234"):
        with case(len(content)):
            path = hub(tmp_path / f"cache{len(content)}", weights=content)
            with pytest.raises(BundleError, match=r"model.onnx cannot be loaded"):
                load_engine(path)
