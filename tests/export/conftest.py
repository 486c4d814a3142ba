"""Fixtures of the exporter's tests: a cache folder, pictures, small networks, a small bundle.

Modules that need onnx or torch are imported by the fixtures that use them, because a test that
needs neither can run without them.
"""

import json
import shutil
import socket

import cv2
import numpy as np
import pytest
from scenes import scene


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where passed golden tests are noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """torch computes these small networks in one thread, which is faster than many."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder for what all tests share. A test that changes a bundle copies it first."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def photos(work):
    """A folder with four drawn pictures of 96 x 144 pixels."""
    folder = work / "photos"
    folder.mkdir()
    for seed in range(4):
        picture = (255 * scene(96, 144, seed=seed)[0]).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{seed}.png"), picture[..., ::-1])
    return folder


@pytest.fixture(scope="session")
def photo(photos):
    return cv2.imread(str(photos / "1.png"))[..., ::-1].copy()


@pytest.fixture(scope="session")
def colours(work):
    """A network of free size that knows four colours."""
    from one_layer_networks import NAMES, nearest_colour, save

    return save(work / "colours.onnx", *nearest_colour(), classes=NAMES, licence="MIT")


@pytest.fixture(scope="session")
def checkpoint(work):
    from exporting import save_checkpoint

    return save_checkpoint(work / "hub" / "tiny")


@pytest.fixture(scope="session")
def checkpoint_onnx(work, checkpoint):
    """The checkpoint as an ONNX file: a test that takes it does not wait for torch's exporter."""
    from exporting import freeze_checkpoint

    return freeze_checkpoint(checkpoint, work / "tiny.onnx")


@pytest.fixture(scope="session")
def plain(work, colours, photos):
    """The command of a small bundle, and that bundle."""
    from exporting import export

    words = ("--model", colours, "--imgsz", "48x72", "--pictures", photos)
    path = work / "plain.bundle"
    assert export(*words, "-o", path, "-q").code == 0
    return words, path


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A tiny checkpoint in Hugging Face's format."""
    from checkpoints import NAMES, PREPROCESSOR
    from exporting import tiny_segformer

    folder = tmp_path_factory.mktemp("hub") / "tiny-segformer"
    network = tiny_segformer(NAMES, seed=1)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test of the exporter reaches the network. Processes of this machine are reached: torch
    passes tensors to workers by a local socket."""
    connect = socket.socket.connect

    def refuse(*_):
        raise AssertionError("tried to reach the network")

    def local(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def network():
    """A small network as an ONNX file's bytes, and pictures to feed it."""
    from graphs_of_precision import pictures, tiny

    data, pp = tiny()
    return data, pictures(pp)
