"""Metadata of ONNX files: any text is read or refused in one sentence, and every spelling of a
value is read as that value."""

import json

import numpy as np
from fuzzing import CHANGES, DAMAGES, ODD, Raw, changed, damaged, inputs, limits, refusal, written
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BundleError, InputError
from runtime.prior.names import class_names, names_in
from runtime.prior.network import kind_of, names_of
from runtime.prior.preprocess import MAX_PIXELS, Preprocess, numbers_in
from runtime.prior.reading import KINDS

VALID = {
    "mean": "[0.485, 0.456, 0.406]",
    "std": "0.229,0.224,0.225",
    "input_size": '{"width": 512, "height": 256}',
    "size_multiple": "32",
    "minimum_size": "32",
    "input_layout": "NCHW RGB",
    "output": "logits",
    "classes": '{"0": "road", "1": "sky", "2": "tree"}',
}
NAMES = [
    ["road", "sky", "tree"],
    {"0": "road", "1": "sky"},
    {"id2label": {"0": "road", "1": "sky"}, "label2id": {"road": 0, "sky": 1}},
]
LITERALS = [
    "{}",
    "({},)",
    "b{}",
    "({}",
    "-{}",
    "{{{}}}",
    "{}+{}",
    "[{}][0]",
    "\ufeff{}",
    "{},",
    "'{}'",
]
LETTERS = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\x85\u2028\u2029,")
NAME = st.text(LETTERS, min_size=1, max_size=12).map(str.strip).filter(bool)


def words(value):
    """The value of a JSON text with the values of Raw in it, as a text of a file."""
    return value if isinstance(value, str) else written(value)


@inputs(400)
@given(
    key=st.sampled_from([*VALID, "names"]),
    document=st.sampled_from(NAMES),
    changes=CHANGES,
    damages=DAMAGES,
    how=st.integers(0, 4),
    around=st.sampled_from(LITERALS),
    size=st.tuples(st.integers(1, 2**16), st.integers(1, 2**16)),
    fixed=st.none() | st.tuples(st.integers(-1, 2**17), st.integers(-1, 2**17)),
)
def test_any_text_is_read_or_refused(key, document, changes, damages, how, around, size, fixed):
    if how == 0:
        text = damaged(VALID.get(key, "a,b").encode(), damages).decode("utf-8", "surrogateescape")
    elif how == 1:
        text = words(changes[0][2])
    elif how == 2:
        text = written(changed(document, changes))
    elif how == 3:
        text = around.replace("{}", written(changed(document, changes)))
    else:
        text = written(changed([0.25, 0.25, 0.25], changes))
    metadata = VALID | {key: text}
    with limits(seconds=2.0):
        found = refusal(lambda: Preprocess.from_metadata(metadata, "x.onnx", fixed), BundleError)
        names = refusal(lambda: names_of(metadata, "x.onnx"), BundleError)
        kind = refusal(lambda: kind_of(metadata, "x.onnx"), BundleError)
    if found is not None:
        assert Preprocess.from_manifest(json.loads(json.dumps(found.to_manifest()))) == found
        sides = refusal(lambda: found.size(*size), InputError)
        assert sides is None or (min(sides) >= 1 and sides[0] * sides[1] <= MAX_PIXELS)
    if names is not None:
        assert all(type(name) is str for name in names)
        assert names_in(json.dumps(names), "again") == names
        "".join(names).encode()
    assert kind in (None, *KINDS)


@inputs(200)
@given(names=st.lists(NAME, min_size=1, max_size=9), form=st.integers(0, 9))
def test_names_are_read_back_from_every_form(names, form):
    numbered = dict(enumerate(names))
    value = [
        names,
        tuple(names),
        np.array(names),
        numbered,
        {str(k): name for k, name in reversed(numbered.items())},
        {"id2label": numbered},
        json.dumps(names),
        json.dumps(names, ensure_ascii=False, indent=1),
        json.dumps({"id2label": numbered}),
        repr(numbered),
    ][form]
    assert class_names(value, "x") == names
    if isinstance(value, str):
        assert names_in(value, "x") == names


@inputs(100)
@given(
    names=st.lists(NAME, min_size=1, max_size=9), sign=st.sampled_from([",", ", ", "\n", "\r\n"])
)
def test_names_are_read_back_from_plain_text(names, sign):
    """A plain text that is no value of JSON or Python, and begins with no bracket."""
    text = sign.join(names)
    found = refusal(lambda: names_in(text, "x"), InputError)
    if found is not None and text[0] not in "[{(\"'":
        assert found == names


@inputs(100)
@given(
    numbers=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=4),
    sign=st.sampled_from([",", ", ", " ", "\t", "\n"]),
    around=st.sampled_from(["[{}]", "({})", "{}", " {} ", "[ {}, ]"]),
    form=st.sampled_from([repr, "{:.17e}".format, "{:+.17g}".format]),
)
def test_numbers_are_read_back_from_every_form(numbers, sign, around, form):
    text = around.replace("{}", sign.join(map(form, numbers)))
    assert numbers_in(text) == tuple(numbers)


@inputs(100)
@given(value=st.sampled_from(ODD) | st.text(max_size=20))
def test_numbers_of_other_texts(value):
    text = value.text if isinstance(value, Raw) else str(value)
    with limits(seconds=0.5):
        found = numbers_in(text)
    assert found is None or (text.strip().isascii() and all(type(n) is float for n in found))
