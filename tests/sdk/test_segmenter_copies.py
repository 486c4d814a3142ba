"""A Segmenter and its parts are pickled and copied; a pool of processes gives equal labels."""

import copy
import json
import multiprocessing
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cases import case
from drawn_pictures import photo_like, quadrants
from segmenting import assert_same

from runtime.bundle.read import Bundle
from runtime.errors import BundleError, InputError
from sdk import FilterConfig, FrameInfo, RefineConfig, Segmenter, StreamState

OPTIONS = {
    "refine": RefineConfig(steps=2, channels=8), "filter": FilterConfig(radius=3), "min_area": 9,
    "threads": 1,
}  # fmt: skip


def largest_channel():
    """A callable prior that can be pickled, with attributes."""
    prior = partial(np.argmax, axis=-1)
    prior.names, prior.unknown = ["red", "green", "blue"], 2
    return prior


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The name of an .onnx file in the current folder."""
    pytest.importorskip("onnx", reason="the network is made with onnx: pip install onnx")
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
    from one_layer_networks import nearest_colour, save

    monkeypatch.chdir(tmp_path)
    save(tmp_path / "n.onnx", *nearest_colour(), classes=json.dumps(list("abcd")))
    return "n.onnx"


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """The name of a bundle in the current folder."""
    pytest.importorskip("onnx", reason="the bundle is made with onnx: pip install onnx")
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
    from bundles import tiny_bundle

    monkeypatch.chdir(tmp_path)
    tiny_bundle(tmp_path / "b.bundle", with_network=True)
    return "b.bundle"


def settings(segmenter):
    info = segmenter.info()
    info["bundle"] = Path(info.get("bundle", "")).name  # the path of a copy is absolute
    return (
        segmenter.refine, segmenter.filter, segmenter.min_area, segmenter.device,
        segmenter.threads, segmenter.prior.names, info,
    )  # fmt: skip


def check_copies(segmenter, tmp_path, monkeypatch):
    """Copies have the settings of ``segmenter`` and give the same result, in another folder too."""
    picture = quadrants(40, 60)[0]
    before = segmenter(picture)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    once = pickle.loads(pickle.dumps(segmenter))
    for found in (once, pickle.loads(pickle.dumps(once)), copy.deepcopy(segmenter)):
        assert found is not segmenter and found.prior is not segmenter.prior
        assert settings(found) == settings(segmenter)
        assert_same(found(picture), before)
    shallow = copy.copy(segmenter)  # as clone() makes it
    assert shallow.prior is segmenter.prior and settings(shallow) == settings(segmenter)
    assert_same(shallow(picture), before)
    assert_same(pickle.loads(pickle.dumps(shallow))(picture), before)


def test_a_segmenter_of_k_means_or_a_callable(tmp_path, monkeypatch):
    for number, prior in enumerate(("kmeans", largest_channel())):
        with case(str(prior)):
            (tmp_path / str(number)).mkdir()
            check_copies(Segmenter(prior, **OPTIONS), tmp_path / str(number), monkeypatch)


def test_a_segmenter_of_a_network(network, tmp_path, monkeypatch):
    for number, prior in enumerate((network, Path(network))):
        monkeypatch.chdir(tmp_path)
        (tmp_path / str(number)).mkdir()
        segmenter = Segmenter(prior, imgsz=np.array([24, 36]), **OPTIONS)
        check_copies(segmenter, tmp_path / str(number), monkeypatch)


def test_a_segmenter_of_a_bundle(bundle, tmp_path, monkeypatch):
    for number, prior in enumerate((bundle, Bundle.open(bundle))):
        monkeypatch.chdir(tmp_path)
        (tmp_path / str(number)).mkdir()
        check_copies(Segmenter(prior, self_test="always"), tmp_path / str(number), monkeypatch)
    again = pickle.loads(pickle.dumps(prior))
    assert again == prior == copy.deepcopy(prior) and type(again) is Bundle


def test_a_relative_path_is_the_file_that_was_opened(network, tmp_path, monkeypatch):
    """A link and ".." in the path are not resolved as text, which would name another file."""
    (tmp_path / "real/deep").mkdir(parents=True)
    os.rename(network, tmp_path / "real/n.onnx")
    os.symlink(tmp_path / "real/deep", tmp_path / "link")
    data = pickle.dumps(Segmenter("link/../n.onnx", refine=None))
    monkeypatch.chdir("/")
    assert pickle.loads(data).prior.names == list("abcd")
    os.remove(tmp_path / "real/n.onnx")
    with pytest.raises((InputError, BundleError), match=r"n\.onnx does not exist"):
        pickle.loads(data)


def test_a_pool_of_processes_gives_equal_labels(network, tmp_path, monkeypatch):
    pictures = [photo_like(24, 36), quadrants(40, 60)[0]]
    segmenters = [Segmenter("kmeans", **OPTIONS), Segmenter(network, **OPTIONS)]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for segmenter in segmenters:
            for picture, found in zip(pictures, pool.map(segmenter, pictures), strict=True):
                assert_same(found, segmenter(picture))
        with pytest.raises(InputError) as caught:
            pool.map(segmenters[0], [b"no picture"])
    assert str(caught.value).count("fix:") == 1


def test_threads_and_submitted_pictures_remain_with_the_first():
    with Segmenter("kmeans", **OPTIONS) as segmenter:
        future = segmenter.submit(photo_like(24, 36))
        for found in (pickle.loads(pickle.dumps(segmenter)), copy.deepcopy(segmenter)):
            with found:
                assert_same(found.submit(photo_like(24, 36)).result(), future.result())


def test_closing_a_clone_leaves_the_threads_of_the_first():
    picture = photo_like(24, 36)
    with Segmenter("kmeans", **OPTIONS) as segmenter:
        expected = segmenter.submit(picture).result()
        for clone in (segmenter.clone(), copy.copy(segmenter)):
            with clone:
                assert_same(clone.submit(picture).result(), expected)
            assert_same(segmenter.submit(picture).result(), expected)


def test_a_prior_that_pickle_refuses_is_named():
    for prior in (lambda picture: picture[..., 0] // 128, lambda picture: None):
        segmenter = Segmenter(prior)
        with pytest.raises((pickle.PicklingError, AttributeError), match="<lambda>"):
            pickle.dumps(segmenter)
        assert copy.deepcopy(segmenter).prior.function is prior  # copy keeps functions


def test_results_and_states(tmp_path):
    state = StreamState()
    segmenter = Segmenter(largest_channel(), **OPTIONS)
    frames = [photo_like(24, 36)] * 3
    _, second = segmenter.stream(frames[:2], state=state)
    for found in (pickle.loads(pickle.dumps(second)), copy.deepcopy(second), copy.copy(second)):
        assert_same(found, second)
        assert found.frame == second.frame == FrameInfo(**vars(found.frame))
        assert found.to_json() == second.to_json() and found.segments == second.segments
    states = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state)]
    (expected,) = segmenter.stream(frames[2:], state=state)
    for found in states:
        assert found.frames == 2
        (third,) = segmenter.stream(frames[2:], state=found)
        assert_same(third, expected)
        assert third.frame.start == "warm"


def test_numbers_of_numpy_in_every_argument(network):
    plain = Segmenter(network, imgsz=(24, 36), min_area=9, threads=1)
    given = Segmenter(
        network, imgsz=[np.int64(24), np.array(36)], min_area=np.int32(9), threads=np.uint8(1)
    )
    assert settings(given) == settings(plain) and type(given.min_area) is int
    long_side = Segmenter(network, imgsz=np.int64(36))
    picture = quadrants(40, 60)[0]
    assert_same(given(picture), plain(picture))
    assert_same(long_side(picture), Segmenter(network, imgsz=36)(picture))
    list(plain.stream(
        [picture], warm_steps=np.int64(1), cold_steps=np.int8(2), budget_ms=np.float32(500),
        rate=np.int64(100), timeout=np.array(5),
    ))  # fmt: skip
