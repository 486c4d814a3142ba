"""Label maps: PNG files whose values or palette indices are labels."""

import io

import numpy as np
import pytest
from cases import case
from PIL import Image

from runtime.errors import InputError
from runtime.pictures.label_map import decode_labels

LABELS = np.random.default_rng(0).integers(0, 250, (37, 53)).astype(np.uint8)


def png(picture, **options):
    file = io.BytesIO()
    picture.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def palette(labels, colours):
    picture = Image.fromarray(labels).convert("L")
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette(colours)
    return picture


def test_values_and_indices_are_returned_as_they_are_in_the_file():
    colours = np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes()
    deep = LABELS.astype(np.uint16) * 257 + 3
    few = LABELS % 3
    for name, data, wanted in [
        ("grey", png(Image.fromarray(LABELS)), LABELS),
        ("grey, 255 is transparent", png(Image.fromarray(LABELS), transparency=7), LABELS),
        ("16 bits", png(Image.fromarray(deep)), deep),
        ("palette", png(palette(LABELS, colours)), LABELS),
        ("palette, transparent", png(palette(LABELS, colours), transparency=7), LABELS),
        ("palette of 2 bits", png(palette(few, colours[:9]), bits=2), few),
        ("palette of 4 bits", png(palette(LABELS % 16, colours[:48]), bits=4), LABELS % 16),
        ("palette of 1 bit", png(palette(LABELS % 2, colours[:6]), bits=1), LABELS % 2),
        ("palette of one colour", png(palette(LABELS, b"\0" * 768)), LABELS),
    ]:
        with case(name):
            found = decode_labels(data, "a.png")
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


def test_other_files_are_refused():
    good = png(Image.fromarray(LABELS))
    broken = bytearray(good)
    broken[len(good) // 2] ^= 255
    for data, match in [
        (png(Image.fromarray(LABELS).convert("RGB")), "a.png is a PNG of several channels; wanted"),
        (png(Image.fromarray(LABELS).convert("LA")), "a.png is a PNG of several channels; wanted"),
        (png(Image.fromarray(LABELS > 9)), "a.png is a grey PNG of 1 bit; wanted"),
        (png(Image.fromarray(LABELS), format="TIFF"), "a.png is a TIFF file; wanted a PNG"),
        (png(Image.fromarray(LABELS), format="JPEG"), "a.png is a JPEG file; wanted a PNG"),
        (bytes(broken), "a.png is a damaged PNG"),
        (good[: len(good) // 2], "a.png"),
        (b"no picture", "a.png is not a picture"),
    ]:
        with case(match), pytest.raises(InputError, match=match):
            decode_labels(data, "a.png")
