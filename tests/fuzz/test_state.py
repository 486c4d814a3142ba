"""Hostile files of a stream's state: refused in one sentence, or valid, saved again, and used."""

import json

import numpy as np
import pytest
from fuzzing import CHANGES, DAMAGES, changed, damaged, inputs, limits, refusal, written
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.options import RefineOptions
from runtime.core.parameters import initial_state
from runtime.errors import BundleError, InputError
from sdk import RefineConfig, Segmenter, StreamState

pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
from safetensors.numpy import load, save

CONFIG = RefineConfig(channels=4, steps=1, scale=1.0)
SIZE = (16, 24)
NAMES = ["ground", "ball", "sky"]
TRUTH = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) // 40 % 3
PICTURE = np.repeat((TRUTH * 80).astype(np.uint8)[..., None], 3, axis=-1)
DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64")
EXTREMES = [0, 1, -1, 2, 255, 4096, 2**31 - 1, 2**62, np.nan, np.inf, -np.inf, 1e30, 1e-30]


def prior(picture):
    return TRUTH


prior.names = NAMES


def rewritten(arrays):
    """The bytes of a safetensors file."""
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


@pytest.fixture(scope="module")
def valid():
    """The bytes of a state after one frame."""
    state = StreamState(
        frames=1,
        names=NAMES,
        weights=initial_state(RefineOptions(**CONFIG.options()), 3),
        classes=np.arange(3, dtype=np.int32),
        seen=np.zeros(3, np.int64),
        labels=TRUTH.astype(np.int32),
        guide=TRUTH.astype(np.int32),
        colours=np.full(512, 1 / 512, np.float32),
    )
    arrays = {f"weights.{k}": v for k, v in state.weights.items()}
    arrays |= {k: getattr(state, k) for k in ("classes", "seen", "labels", "guide", "colours")}
    arrays["counts"] = np.array([1, 0, 0], np.int64)
    arrays["names"] = np.frombuffer(json.dumps(NAMES).encode(), np.uint8)
    arrays["trained"] = np.frombuffer(b"0123456789abcdef" * 4, np.uint8)
    return rewritten(arrays)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("states") / "cam.safetensors"


def check(data, path):
    """Load the bytes; what is accepted is saved, loaded and used for a frame."""
    path.write_bytes(data)
    with limits(seconds=1.0):
        state = refusal(lambda: StreamState.load(path), BundleError)
    if state is None:
        return
    state.save(path)
    again = StreamState.load(path)
    assert (again.frames, again.owed, again.doubt) == (state.frames, state.owed, state.doubt)
    assert (again.names, again.trained) == (state.names, state.trained)
    again.trained = None  # this Segmenter has initial weights, and the rest has to be reached
    segmenter = Segmenter(prior, refine=CONFIG, filter=None, min_area=0, threads=1)

    def frame():
        return list(segmenter.stream([PICTURE], state=again, cold_steps=1, warm_steps=1))

    with limits(seconds=2.0):
        results = refusal(frame, InputError)
    if results is not None:
        assert results[0].labels.shape == SIZE and results[0].labels.max() < 4096


@inputs(250)
@given(changes=CHANGES, wrapped=st.booleans())
def test_changed_headers(valid, path, changes, wrapped):
    """Names, dtypes, shapes and offsets of the tensors."""
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])
    if wrapped:  # one entry, so that the others remain valid
        name = sorted(header)[changes[0][0] % len(header)]
        header[name] = changed(header[name], changes)
        document = header
    else:
        document = changed(header, changes)
    text = written(document).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    check(len(text).to_bytes(8, "little") + text + valid[8 + size :], path)


@inputs(150)
@given(
    spots=st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 10**6), st.sampled_from(EXTREMES)),
        min_size=1,
        max_size=3,
    ),
    kind=st.integers(0, 6),
)
def test_changed_arrays(valid, path, spots, kind):
    """Values, dtypes and shapes of the arrays of a file that is otherwise valid."""
    arrays = load(valid)
    for which, place, value in spots:
        name = sorted(arrays)[which % len(arrays)]
        array = arrays[name]
        with np.errstate(all="ignore"):
            if kind <= 2 and array.size:
                array = array.copy()
                array.flat[place % array.size] = np.array([value]).astype(array.dtype)[0]
            elif kind == 3:
                array = array.astype(["i4", "i8", "f4", "f8", "u1", "?"][place % 6])
            elif kind == 4:
                array = array.reshape(-1)[: place % (array.size + 1)]
            elif kind == 5:
                array = array.reshape([array.shape, (1, *array.shape), (-1, 1)][place % 3])
            else:
                array = np.repeat(np.atleast_1d(array), 1 + place % 3, axis=0)
        arrays[name] = array
    check(rewritten(arrays), path)


@inputs(100)
@given(changes=CHANGES)
def test_changed_names(valid, path, changes):
    """The JSON inside the array of names."""
    text = written(changed(NAMES, changes)).encode(errors="surrogatepass")
    check(save(load(valid) | {"names": np.frombuffer(text or b" ", np.uint8)}), path)


@inputs(100)
@given(damages=DAMAGES)
def test_damaged_bytes(valid, path, damages):
    check(damaged(valid, damages), path)
