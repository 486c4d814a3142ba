"""Hostile inputs that hypothesis makes from valid ones, and the limits that hold for each input.

A run of the tests takes the same inputs each time, about 5,000 in all. By hand, SEG_FUZZ=20 takes
20 times as many, and SEG_FUZZ_SEED=N draws other inputs.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import time
import tracemalloc
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from runtime.errors import SdkError

TIMES = float(os.environ.get("SEG_FUZZ") or 1)
SEED = os.environ.get("SEG_FUZZ_SEED")
HANG = 20  # seconds of processor time


def inputs(count: int):
    """Decorate a test: it takes ``count`` inputs, times SEG_FUZZ."""

    def decorate(test):
        test = settings(
            max_examples=round(count * TIMES),
            derandomize=SEED is None,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # By hand the input is reported as it was drawn, because a smaller one takes minutes.
            phases=(Phase.explicit, Phase.generate) if TIMES > 1 else tuple(Phase),
            report_multiple_bugs=False,
        )(test)
        return test if SEED is None else seed(int(SEED))(test)

    return decorate


@contextmanager
def limits(seconds: float, peak: int | None = None):
    """Fail if the block takes more processor time of its thread, or allocates more bytes at once,
    than this."""

    def bark(*_):
        raise AssertionError(f"the input takes more than {HANG} s")

    before = signal.signal(signal.SIGPROF, bark)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    if peak is not None:
        tracemalloc.start()
    gc.disable()  # collecting what hypothesis allocates takes longer than most inputs
    start = time.thread_time()
    try:
        yield
        spent = time.thread_time() - start
        most = tracemalloc.get_traced_memory()[1] if peak is not None else 0
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if peak is not None:
            tracemalloc.stop()
    assert spent < seconds, f"the input took {spent:.2f} s"
    assert peak is None or most < peak, f"the input allocated {most} bytes"


def refusal(call, *kinds: type[SdkError], longest: int = 3000) -> Any:
    """Return the result of ``call``, or None after one of these errors, whose message has at most
    ``longest`` letters."""
    try:
        return call()
    except kinds as error:
        assert 0 < len(error.message) <= longest and "\n" not in error.fix, error
        str(error).encode()  # it can be written to any log in UTF-8
        return None


# Values of JSON


class Raw:
    """A text that is written into JSON as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Raw({self.text[:20]!r}... {len(self.text)})"


class Again:
    """A key that an object of JSON contains a second time."""

    def __init__(self, key: Any) -> None:
        self.key = key


ODD = [
    *(
        0,
        1,
        -1,
        2**31,
        -(2**31),
        2**63,
        2**64,
        10**100,
        0.5,
        -0.5,
        1e308,
        5e-324,
        True,
        False,
        None,
    ),
    *(Raw(text) for text in ("1e999", "-1e999", "NaN", "Infinity", "-0", "1.0", "1E0", "9" * 5000)),
    *(Raw(text) for text in ("[" * 50_000 + "]" * 50_000, '{"a":' * 30 + "1" + "}" * 30, "", "01")),
    *(
        "",
        " ",
        "\n",
        "\0",
        "\x1b[2J",
        "\ud800",
        "\udfff\ud800",
        "é",
        "٣",
        "²",
        "0x10",
        "1_0",
        "NaN",
    ),
    *("a" * 300, "x" * 110_000, "../x", "/etc/passwd", "a/b/c", "cpu", "float32", "1e5", "-1"),
    *([], {}, [[]], [None], {"": None}, {"0": {}}, [0] * 2000, {str(i): i for i in range(300)}),
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(), max_size=8),
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 8), VALUES), min_size=1, max_size=4
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value inside lists and objects: (its container, its key)."""
    out = []
    todo = [value]
    while todo:
        box = todo.pop()
        keys = list(box) if isinstance(box, dict) else range(len(box))
        for key in keys:
            out.append((box, key))
            if isinstance(box[key], (dict, list)) and len(out) < 5000:
                todo.append(box[key])
    return out


def changed(document: Any, changes: list[tuple[int, int, Any]]) -> Any:
    """A copy of a JSON document after ``changes``: (which place, which kind, a new value)."""
    top = [copy.deepcopy(document)]
    for place, kind, new in changes:
        value = copy.deepcopy(new)
        places = _places(top)
        box, key = places[place % len(places)]
        other_box, other_key = places[(place * 7 + 3) % len(places)]
        if kind <= 2:
            box[key] = value
        elif kind == 3 and box is not top:
            del box[key]
        elif kind == 4:  # the value of another place, so that both have the right form
            box[key] = copy.deepcopy(other_box[other_key])
        elif kind == 5 and isinstance(box, dict):
            box[Again(key)] = value
        elif kind == 6 and isinstance(box, dict):
            box[value if isinstance(value, str) else "other"] = box.pop(key)
        elif kind == 7:
            box[key] = [box[key]] * (1 + place % 3)
        elif kind == 8 and isinstance(box, list) and box is not top:
            box.insert(key, copy.deepcopy(box[key]))
        elif isinstance(box, dict):  # the same keys in another order
            for name in sorted(box, key=str):
                box[name] = box.pop(name)
    return top[0]


def written(value: Any) -> str:
    """A JSON text; values of Raw are written as they are, keys of Again a second time."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        pairs = (
            f"{json.dumps(str(k.key if isinstance(k, Again) else k))}: {written(v)}"
            for k, v in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


# Bytes


DAMAGES = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=5,
)
_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


def damaged(data: bytes, damages: list[tuple[int, int, int]]) -> bytes:
    """The bytes after ``damages``: (where, which kind, a number)."""
    out = bytearray(data)
    for where, kind, number in damages:
        i = where % (len(out) + 1)
        if kind in (0, 1) and where % 3:  # most headers are at the start
            i %= 64
        j = min(len(out), i + (1, 2, 4, 8, 64, 500)[number % 6])
        if kind == 0 and i < len(out):
            out[i] = number % 256
        elif kind == 1:
            width = (1, 2, 4, 8)[number % 4]
            wanted = _NUMBERS[number // 8 % len(_NUMBERS)] % 256**width
            order = "big" if number & 4 else "little"
            out[i : i + width] = wanted.to_bytes(width, order)
        elif kind == 2 and i < len(out):
            out[i] ^= 1 << number % 8
        elif kind == 3:
            del out[i:]
        elif kind == 4:
            del out[i:j]
        elif kind == 5:
            out[i:i] = out[i:j]
        elif kind == 6:
            out[i:j] = bytes(j - i)
        elif kind == 7:
            out[i:j] = b"\xff" * (j - i)
        elif kind == 8:
            out += out[i:] or data
        else:
            out[i:i] = number.to_bytes(4, "big")
    return bytes(out)
