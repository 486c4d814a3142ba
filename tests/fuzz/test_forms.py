"""Outputs of networks: any shapes and dtypes are read or refused, and what is read does not depend
on names that say nothing, on the order of the outputs, or on axes of length 1."""

import numpy as np
from fuzzing import inputs, limits, refusal
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.engines.port import Port
from runtime.errors import BundleError
from runtime.prior.network import NetworkPrior, as_probabilities
from runtime.prior.preprocess import Preprocess
from runtime.prior.reading import described, find_form, find_kind, fits, standard

DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "bool", "complex64", "object")
SIDES = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 12, 16, 24, 32, 63, 64, 65, 128])
SHAPES = st.lists(SIDES, max_size=6).map(tuple)
PLAIN = ["out", "y", "scores", "", "logits", "é", "1"]  # names that say nothing
OTHER = ["aux", "edges", "depth_map", "confidence"]
OUTPUTS = st.lists(
    st.tuples(st.sampled_from(PLAIN + OTHER), SHAPES, st.sampled_from(DTYPES)), max_size=4
)
PICTURES = st.sampled_from([(64, 64), (32, 64), (24, 32), (63, 65), (1, 1), (128, 12)])
NAMES = st.none() | st.integers(0, 8).map(lambda n: [f"class {i}" for i in range(n)])
KINDS = st.sampled_from([None, "logits", "probabilities", "labels"])


def found_in(outputs, picture, **options):
    """The form, or None if the outputs are refused."""
    return refusal(lambda: find_form(outputs, picture, **options), BundleError)


@st.composite
def maps(draw):
    """(outputs, picture): one of the outputs is a segmentation of the picture."""
    picture = draw(PICTURES)
    scale = draw(st.sampled_from([1, 2, 4]))
    h, w = (max(1, side // scale) for side in picture)
    count = draw(st.integers(1, 5))
    shape = draw(st.sampled_from([(1, count, h, w), (1, h, w, count), (1, h, w), (h, w)]))
    outputs = draw(OUTPUTS)
    here = draw(st.integers(0, len(outputs)))
    outputs.insert(here, (draw(st.sampled_from(PLAIN)), shape, draw(st.sampled_from(DTYPES[:6]))))
    return outputs, picture


@inputs(300)
@given(case=maps() | st.tuples(OUTPUTS, PICTURES), names=NAMES, kind=KINDS, chosen=st.booleans())
def test_any_outputs_are_read_or_refused(case, names, kind, chosen):
    outputs, picture = case
    chosen = outputs[-1][0] if chosen and outputs else None
    with limits(seconds=0.5):
        form = found_in(outputs, picture, names=names, kind=kind, chosen=chosen)
    if form is None:
        return
    _, shape, dtype = outputs[form.output]
    assert fits(form.size, picture) and form.channels >= 1
    planes = form.planes(np.zeros(shape, dtype))
    assert planes.shape == (form.channels, *form.size)
    assert form.channels == 1 or dtype.startswith("float")


@inputs(250)
@given(case=maps(), names=NAMES, kind=KINDS, data=st.data())
def test_what_is_read_does_not_depend_on_what_says_nothing(case, names, kind, data):
    outputs, picture = case
    form = found_in(outputs, picture, names=names, kind=kind)
    renamed = [
        (data.draw(st.sampled_from(PLAIN)) if name in PLAIN else name, shape, dtype)
        for name, shape, dtype in outputs
    ]
    other = found_in(renamed, picture, names=names, kind=kind)
    assert (form is None) == (other is None)
    if form is not None:
        assert other.output == form.output and other.size == form.size
    assume(form is not None)
    # An axis of length 1 in front says nothing. A second one in front of (h, w) is a channel.
    longer = [
        (name, (1, *shape) if number == form.output and len(shape) > 2 else shape, dtype)
        for number, (name, shape, dtype) in enumerate(outputs)
    ]
    other = found_in(longer, picture, names=names, kind=kind)
    assert other is not None and (other.output, other.channels) == (form.output, form.channels)


@inputs(100)
@given(
    picture=PICTURES,
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES[:3]),
    known=st.booleans(),
)
def test_transposed_scores_are_the_same_scores(picture, count, dtype, known):
    assume(count not in picture and min(picture) > 5)
    rng = np.random.default_rng(count)
    first = rng.random((1, count, *picture)).astype(dtype)
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    names = [f"class {i}" for i in range(count)] if known and count > 1 else None
    forms = [find_form(described(["x"], [out]), picture, names=names) for out in (first, last)]
    planes = [form.planes(out) for form, out in zip(forms, (first, last), strict=True)]
    np.testing.assert_array_equal(*planes)


@st.composite
def arrays(draw):
    """(C, h, w) values that are near to labels, probabilities, masks or logits."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    dtype = draw(
        st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", "int8"])
    )
    low, high = draw(st.sampled_from([(0, 1), (0, 2), (-1, 3), (0, 255), (-9, 9), (0, 5000)]))
    values = rng.uniform(low, high, shape)
    if draw(st.booleans()):
        values = np.rint(values)
    if draw(st.booleans()) and shape[0] > 1:
        values = np.abs(values) / np.maximum(np.abs(values).sum(0), 1e-9)
    with np.errstate(all="ignore"):
        values = values.astype(dtype)
    if values.dtype.kind == "f":
        odd = draw(st.sampled_from([None, None, np.nan, np.inf, -0.0, 1e30, 65504.0]))
        if odd is not None:
            with np.errstate(all="ignore"):
                values.flat[draw(st.integers(0, values.size - 1))] = odd
    return values


@inputs(250)
@given(planes=arrays(), kind=KINDS)
def test_any_values_are_standard_or_refused(planes, kind):
    with limits(seconds=0.5), np.errstate(all="ignore"):
        found = refusal(lambda: find_kind([planes]), BundleError)
        for one in {kind, found}:
            values = refusal(lambda one=one: standard(planes, one), BundleError)
            if values is None:
                continue
            assert values.flags.owndata or values.base is not None
            if values.ndim == 2:
                assert values.dtype == np.int32 and -1 <= values.min() and values.max() < 4096
                assert values.shape == planes.shape[1:]
                as_probabilities(values, 3, 5)
            else:
                assert values.dtype == np.float32 and values.shape[1:] == planes.shape[1:]
                assert len(values) == max(2, len(planes)) and np.isfinite(values).all()


class Network:
    """An engine that returns one array."""

    def __init__(self, out):
        self.backend, self.metadata, self.warnings, self.out = "test", {}, [], out
        self.inputs = [Port("x", (1, 3, None, None), "tensor(float)")]
        self.outputs = [Port("y", out.shape, "tensor(float)")]

    def __call__(self, *arrays):
        return [self.out]


@inputs(150)
@given(planes=arrays(), kind=KINDS, names=NAMES, last=st.booleans())
def test_a_prior_returns_a_guide_or_refuses(planes, kind, names, last):
    out = planes[None].transpose(0, 2, 3, 1) if last else planes[None]
    height, width = planes.shape[1:]
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), height=height, width=width)
    prior = NetworkPrior(Network(out), preprocess, names=names, output=kind)
    picture = np.zeros((height, width, 3), np.uint8)
    with limits(seconds=0.5), np.errstate(all="ignore"):
        guide = refusal(lambda: prior(picture, picture), BundleError)
    if guide is None:
        return
    if guide.ndim == 2:
        assert guide.dtype == np.int32 and guide.min() >= -1
    else:
        assert guide.dtype == np.float32 and guide.min() >= 0 and np.isfinite(guide).all()
        np.testing.assert_allclose(guide.sum(-1), 1, atol=1e-3)
