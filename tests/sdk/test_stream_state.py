"""The state of a stream: saved, loaded and refused; clusters and classes keep their numbers."""

import os
from itertools import pairwise

import cv2
import numpy as np
import pytest
from cases import case
from clips import HEIGHT, WIDTH, Prior, clip, events, followed

from runtime.core.classes import frequent_classes, match_classes, restricted
from runtime.errors import BundleError, InputError
from runtime.prior.kmeans import KMeansPrior
from sdk import RefineConfig, Segmenter, StreamState

# --- state ---------------------------------------------------------------------------------------


def test_state_saved_and_loaded_goes_on_as_if_nothing_had_happened(tmp_path):
    frames, truths = clip(8)
    whole = followed(frames, Prior(truths))
    state = StreamState()
    followed(frames[:5], Prior(truths), state=state)
    state.save(tmp_path / "a.safetensors")
    loaded = StreamState.load(tmp_path / "a.safetensors")
    assert loaded.frames == 5
    rest = followed(frames[5:], Prior(truths[5:]), state=loaded)
    assert [r.frame.start for r in rest] == ["warm"] * 3
    prior = Prior(truths)
    prior.at = 5  # its noise goes by the frame
    rest = followed(frames[5:], prior, state=StreamState.load(tmp_path / "a.safetensors"))
    for x, y in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(x.labels, y.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_empty_state_can_be_saved(tmp_path):
    StreamState().save(tmp_path / "a.safetensors")
    assert vars(StreamState.load(tmp_path / "a.safetensors")) == vars(StreamState())


def test_reset_starts_cold():
    frames, truths = clip(4)
    state = StreamState()
    followed(frames[:2], Prior(truths), state=state)
    state.reset()
    assert vars(state) == vars(StreamState())
    assert followed(frames[2:], Prior(truths[2:]), state=state)[0].frame.start == "cold"


def spoiled(tmp_path):
    """Files that are no state, by what is wrong with them."""
    from safetensors.numpy import load, save

    frames, truths = clip(2)
    state = StreamState()
    followed(frames, Prior(truths), state=state)
    state.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    arrays = load(data)
    files = {"empty": b"", "cut": data[: len(data) // 2], "text": b"hello" * 9}
    changes = {
        "no counts": {"counts": None},
        "negative counts": {"counts": np.array([-1, 0, 0])},
        "no labels": {"labels": None},
        "labels of another type": {"labels": arrays["labels"].astype(np.float32)},
        "guide of another size": {"guide": arrays["guide"][1:].copy()},
        "equal classes": {"classes": np.zeros_like(arrays["classes"])},
        "negative class": {"classes": arrays["classes"] - 1},
        "NaN colours": {"colours": np.full(512, np.nan, np.float32)},
        "NaN weights": {"weights.bn1.bias": np.full(32, np.nan, np.float32)},
        "trained weights without digits": {"trained": np.frombuffer(b"g" * 64, np.uint8)},
        "trained weights with too few digits": {"trained": np.frombuffer(b"a" * 63, np.uint8)},
        "trained weights in another text": {"trained": np.full(64, 200, np.uint8)},
        "trained weights as numbers": {"trained": np.full(64, 97.0)},
        "no head": {"weights.conv3.bias": None},
        "names that are none": {"names": np.frombuffer(b"{}", np.uint8)},
        "something else": {"else": np.zeros(3)},
        "deep names": {"names": np.frombuffer(b"[" * 10_000 + b"]" * 10_000, np.uint8)},
        "a class that no prior has": {"classes": np.array([0, 1, 2, 4096], np.int32)},
        "a huge class": {"classes": np.array([0, 1, 2, 2**31 - 1], np.int32)},
        "labels that no prior has": {"labels": arrays["labels"] + 4096},
        "a guide that no prior has": {"guide": np.full_like(arrays["guide"], 2**31 - 1)},
        "a frame to come": {"seen": arrays["seen"] + 3},
        "a frame before the first": {"seen": arrays["seen"] - 3},
        "colours above 1": {"colours": np.full(512, 1e30, np.float32)},
        "too many frames": {"counts": np.array([2**63 - 1, 0, 0])},
        "one count": {"counts": np.array(2)},
        "fewer rows than classes": {
            name: arrays[name][:2].copy() for name in arrays if ".conv3." in name
        },
    }
    for name, change in changes.items():
        files[name] = save({k: v for k, v in (arrays | change).items() if v is not None})
    return files


def test_files_that_are_no_state(tmp_path):
    for name, data in spoiled(tmp_path).items():
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(BundleError, match=r"no (stream's state|safetensors file)"):
            StreamState.load(tmp_path / "bad")
            raise AssertionError(name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(b"")
    os.truncate(tmp_path / "huge", 2**40)
    for name, error, match in [
        ("none", InputError, "none does not exist"),
        (".", InputError, "cannot be read: Is a directory"),
        ("x" * 300, InputError, "cannot be read: File name too long"),
        ("a\0b", InputError, "cannot be read: embedded null"),
        ("pipe", InputError, "pipe is no regular file; wanted a stream's state"),
        ("huge", BundleError, "huge is no stream's state"),
    ]:
        with case(name), pytest.raises(error, match=match):
            StreamState.load(tmp_path / name)


def test_a_state_of_another_network_is_refused(tmp_path):
    frames, truths = clip(2)
    state = StreamState()
    followed(frames, Prior(truths), state=state)
    with pytest.raises(InputError, match="the state is of another network"):
        followed(frames, Prior(truths), refine=RefineConfig(channels=16), state=state)


# --- permanence ----------------------------------------------------------------------------------


def test_clusters_keep_their_numbers():
    frames, truths = clip(10)
    shuffled = [np.random.default_rng(i).permutation(4)[t] for i, t in enumerate(truths)]
    results = followed(frames, Prior(shuffled, names=None))
    for before, after in pairwise(results):
        assert (before.labels == after.labels).mean() > 0.9
    alone = followed(frames, Prior(shuffled, names=None), refine=None)
    assert min((a.labels == b.labels).mean() for a, b in pairwise(alone)) > 0.85


def test_colour_clusters_keep_their_numbers():
    frames, _ = clip(8)
    kmeans, turns = KMeansPrior(), [np.random.default_rng(i).permutation(5) for i in range(8)]

    def prior(picture):
        low = cv2.resize(picture, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
        return kmeans(picture, low.astype(np.float32) / 255)[..., turns.pop()]

    results = followed(frames, prior)
    changed = [(a.labels != b.labels).mean() for a, b in pairwise(results)]
    assert max(changed) < 0.1


def test_a_cluster_that_the_refinement_removes_keeps_its_number():
    """It would come back as a new class in every frame, with a channel each."""
    frames, truths = clip(10, box=False)
    rng = np.random.default_rng(0)
    names = [rng.permutation(4) for _ in frames]  # a prior whose numbers mean nothing
    guides = []
    for truth, name in zip(truths, names, strict=True):
        truth = truth.copy()
        truth[rng.random(truth.shape) < 0.03] = 2  # specks, which the refinement takes away
        guides.append(name[truth].astype(np.int32))
    state, told = StreamState(), iter(guides)
    results = list(Segmenter(lambda picture: next(told)).stream(frames, state=state))
    assert len(state.classes) == 4 and not events(results)
    speck = state.classes[[(results[-1].labels == c).sum() < 200 for c in state.classes]]
    assert len(speck) >= 1  # it was removed indeed


def test_match_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (8, 9)).astype(np.int32)
    ids = np.array([4, 7, 9], np.int32)
    known = ids[labels]
    turn = np.array([2, 0, 1])
    guide = np.eye(3, dtype=np.float32)[turn[labels]]
    np.testing.assert_array_equal(match_classes(guide, [known], ids).argmax(-1), known)
    np.testing.assert_array_equal(match_classes(turn[labels].astype(np.int32), [known], ids), known)
    fewer = match_classes(np.minimum(labels, 1), [known], ids)
    assert set(np.unique(fewer)) <= {4, 7, 9} and (fewer[labels == 0] == 4).all()
    more = np.where(rng.random((8, 9)) < 0.3, 3, labels).astype(np.int32)
    matched = match_classes(more, [known], ids)
    assert set(np.unique(matched)) == {0, 4, 7, 9} and (matched == 0).sum() == (more == 3).sum()
    fresh = match_classes(labels, [np.full_like(known, 9)], np.array([4, 9], np.int32))
    assert set(np.unique(fresh)) == {0, 4, 9}  # 4 is free, a third number is not known
    unknown = np.where(labels == 1, -1, labels).astype(np.int32)
    assert (match_classes(unknown, [known], ids)[labels == 1] == -1).all()


def test_restricted_to_classes_that_are_not_there():
    guide = np.array([[[0.5, 0.25, 0.25], [0, 0, 1]]], np.float32)
    soft = restricted(guide, np.array([1, 0, 8], np.int32))
    np.testing.assert_allclose(soft, [[[1 / 3, 2 / 3, 0], [0, 0, 0]]], rtol=1e-6)
    hard = restricted(np.array([[0, 2, -1]], np.int32), np.array([2, 5], np.int32))
    np.testing.assert_array_equal(hard, [[[0, 0], [1, 0], [0, 0]]])
    assert frequent_classes(np.array([[0, 2, -1]], np.int32)).tolist() == [0, 2]
