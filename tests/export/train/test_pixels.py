"""PixelBatches: how pictures are changed at random; the same numbers make the same pictures."""

import colorsys
import itertools
import sys

import numpy as np
import pytest
import torch
from cases import case
from drawn_pictures import photo_like
from tiny_features import children, many_files, seven_pictures, spoil

from export.train import pixels
from export.train.pixels import (
    PixelBatches,
    augmented,
    brightness,
    contrast,
    saturation,
    turned_hue,
)
from export.train.views import ViewRule, view_pixels
from runtime.errors import InputError
from runtime.pictures.load import load_image

SIZE = 32
FACTORS = (0.0, 0.6, 0.8, 1.0, 1.2, 1.4)
TURNS = (-1.0, -0.5, -0.1, -0.037, 0.0, 0.02, 0.1, 0.5, 1.0)


def colours():
    """Black, white, greys, the six full colours, nearly equal channels, and random ones: (7, 9, 3)
    float32 in [0, 1]."""
    corners = [*itertools.product((0, 255), repeat=3)]
    others = [(128, 128, 128), (1, 1, 1), (254, 255, 255), (7, 6, 7), (200, 200, 10), (1, 0, 0)]
    random = np.random.default_rng(0).integers(0, 256, (63 - 14, 3)).tolist()
    return np.float32([*corners, *others, *random]).reshape(7, 9, 3) / 255


def each_pixel(function, picture):
    """The picture of the function of each pixel's R, G, B in float64."""
    rows = [[function(*map(float, pixel)) for pixel in row] for row in picture]
    return np.array(rows)


def luma(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


def cut_off(*values):
    return [min(1.0, max(0.0, value)) for value in values]


def turned(r, g, b, turn):
    hue, s, v = colorsys.rgb_to_hsv(r, g, b)
    return colorsys.hsv_to_rgb((hue + turn) % 1, s, v)


def brightened(r, g, b, f):
    return cut_off(f * r, f * g, f * b)


def saturated(r, g, b, f):
    grey = luma(r, g, b)
    return cut_off(*(grey + f * (x - grey) for x in (r, g, b)))


def contrasted(picture, f):
    mean = np.mean([luma(*map(float, pixel)) for row in picture for pixel in row])
    return each_pixel(lambda *rgb: cut_off(*(mean + f * (x - mean) for x in rgb)), picture)


def test_each_change_equals_a_slow_form():
    picture = colours()
    before = picture.copy()
    for factor in FACTORS:
        expected = {
            brightness: each_pixel(lambda *rgb, f=factor: brightened(*rgb, f), picture),
            saturation: each_pixel(lambda *rgb, f=factor: saturated(*rgb, f), picture),
            contrast: contrasted(picture, factor),
        }
        for change, slow in expected.items():
            with case(change.__name__, factor):
                fast = change(picture, factor)
                assert fast.dtype == np.float32 and fast.shape == picture.shape
                assert np.abs(fast - slow).max() < 3e-7
    for turn in TURNS:
        with case("turned_hue", turn):
            fast = turned_hue(picture, turn)
            slow = each_pixel(lambda *rgb, t=turn: turned(*rgb, t), picture)
            assert fast.dtype == np.float32 and fast.shape == picture.shape
            assert np.abs(fast - slow).max() < 2e-6
    assert np.array_equal(picture, before)


def test_grey_pixels_have_no_hue_and_no_saturation():
    grey = np.repeat(np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7, 1), 3, axis=2)
    for turn in TURNS:
        assert np.abs(turned_hue(grey, turn) - grey).max() < 1e-7
    for factor in FACTORS:
        assert np.abs(saturation(grey, factor) - grey).max() < 3e-7


def unchanged(picture, size, count):
    """Draw ``count`` squares of as many pixels as the result; return (top, left, flipped) of those
    with unchanged colours."""
    squares = {}
    high, wide = picture.shape[0] - size, picture.shape[1] - size
    for top, left in itertools.product(range(high + 1), range(wide + 1)):
        square = picture[top : top + size, left : left + size]
        squares[square.tobytes()] = top, left, False
        squares[square[:, ::-1].tobytes()] = top, left, True
    found = (augmented(picture, size, np.random.default_rng([0, 0, i])) for i in range(count))
    return [squares[square.tobytes()] for square in found if square.tobytes() in squares]


def test_squares_are_anywhere_and_half_of_them_mirrored():
    """320/335 of a side of 34 is 32; 40 has more room on the other axis."""
    for shape, room in (((34, 40), (2, 8)), ((40, 34), (8, 2)), ((34, 34), (2, 2))):
        with case(shape):
            found = unchanged(photo_like(*shape), SIZE, 1000)
            assert 120 < len(found) < 200  # a share of (1 - 0.8) (1 - 0.2)
            tops, lefts, flips = map(list, zip(*found, strict=True))
            assert set(tops) == {*range(room[0] + 1)} and set(lefts) == {*range(room[1] + 1)}
            assert 0.4 < np.mean(flips) < 0.6


def test_a_fifth_of_the_pictures_is_grey():
    squares = [augmented(photo_like(), 16, np.random.default_rng([1, i])) for i in range(1000)]
    greys = [square for square in squares if (square == square[..., :1]).all()]
    assert 160 < len(greys) < 240
    levels = [square for square in greys if np.ptp(square) > 20]
    assert len(levels) == len(greys)  # the colour is dropped, not the picture


def test_the_grey_of_a_picture_is_its_luma(monkeypatch):
    monkeypatch.setattr(pixels, "JITTER", 0)
    monkeypatch.setattr(pixels, "FLIP", 0)
    monkeypatch.setattr(pixels, "GREY", 1)
    square = augmented(np.full((9, 9, 3), (200, 40, 90), np.uint8), 16, np.random.default_rng(0))
    assert (square == round(luma(200, 40, 90))).all()


def test_the_jitter_uses_the_published_ranges_and_any_order(monkeypatch):
    calls = []

    def recorder(name):
        def change(picture, value):
            calls.append((name, value))
            return picture

        return change

    ranges = {
        "brightness": (0.6, 1.4), "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2), "turned_hue": (-0.1, 0.1),
    }  # fmt: skip
    for name in ranges:
        monkeypatch.setattr(pixels, name, recorder(name))
    for i in range(800):
        augmented(photo_like(20, 20), 16, np.random.default_rng([2, i]))
    groups = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert 600 < len(groups) < 680  # a share of 0.8
    assert {tuple(name for name, _ in group) for group in groups} == {
        *itertools.permutations(ranges)
    }
    for name, (low, high) in ranges.items():
        with case(name):
            values = np.array([value for called, value in calls if called == name])
            assert low <= values.min() < low + 0.02 * (high - low)
            assert high - 0.02 * (high - low) < values.max() <= high
            assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)


def test_the_colours_of_a_picture_are_those_of_the_changes(monkeypatch):
    """A picture with the four changes, from their slow forms and the values that were drawn."""
    calls = []
    slow = {
        "brightness": lambda x, f: each_pixel(lambda *rgb: brightened(*rgb, f), x),
        "saturation": lambda x, f: each_pixel(lambda *rgb: saturated(*rgb, f), x),
        "contrast": contrasted,
        "turned_hue": lambda x, t: each_pixel(lambda *rgb: turned(*rgb, t), x),
    }

    def recorder(name, change):
        return lambda picture, value: calls.append((name, value)) or change(picture, value)

    for name in slow:
        monkeypatch.setattr(pixels, name, recorder(name, getattr(pixels, name)))
    for name in ("FLIP", "GREY"):
        monkeypatch.setattr(pixels, name, 0)
    picture = np.rint(colours() * 255).astype(np.uint8)[:, :7]
    for seed in range(6):
        with case(seed):
            calls.clear()
            monkeypatch.setattr(pixels, "JITTER", 0)
            square = augmented(picture, 16, np.random.default_rng(seed)) / 255
            assert not calls
            monkeypatch.setattr(pixels, "JITTER", 1)
            found = augmented(picture, 16, np.random.default_rng(seed)) / 255
            assert len(calls) == 4
            for name, value in calls:
                square = slow[name](square, value)
            assert np.abs(found - square).max() < 0.502 / 255


@pytest.mark.parametrize("size", [16, 33])
def test_pictures_of_any_size_fill_the_square(size):
    for shape in ((1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (3, 17), (33, 47), (8, 2000)):
        with case(shape) as draw:
            colour = draw.integers(0, 256, 3, np.uint8)
            for seed in range(12):
                one = augmented(np.full((*shape, 3), colour), size, np.random.default_rng(seed))
                assert one.shape == (size, size, 3) and one.dtype == np.uint8
                assert one.flags.c_contiguous and (one == one[0, 0]).all()
                grey = np.repeat(draw.integers(0, 256, (*shape, 1), np.uint8), 3, axis=2)
                square = augmented(grey, size, np.random.default_rng(seed))
                assert np.ptp(square.astype(int), axis=2).max() <= 1


def test_the_square_is_resized_to_320_of_335_pixels_of_the_shorter_side(monkeypatch):
    """A ramp of 2 levels a pixel has 2 side / size levels a pixel afterwards."""
    monkeypatch.setattr(pixels, "JITTER", 0)
    monkeypatch.setattr(pixels, "GREY", 0)
    for shape, size, side in (((67, 100), 32, 64), ((100, 67), 16, 64), ((25, 60), 48, 24)):
        with case(shape, size):
            ramp = np.broadcast_to(2 * np.arange(shape[1])[:, None], (*shape, 3)).astype(np.uint8)
            square = augmented(ramp, size, np.random.default_rng(0))[size // 2, :, 0].astype(int)
            inner = square[2:-2]
            step = abs(inner[-1] - inner[0]) / (len(inner) - 1)
            assert abs(step - 2 * side / size) < 1.5 / (len(inner) - 1)


@pytest.fixture
def files(tmp_path):
    return seven_pictures(tmp_path)


def batches(files, first=0, last=6, **options):
    """The pictures of the steps ``first`` to ``last - 1``, as one list of tensors."""
    options = {"batch": 4, "seed": 3, "device": "cpu"} | options
    steps = PixelBatches(files, SIZE, **options).batches(first, last)
    return [tensor for step in steps for tensor in step]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the processes")
def test_workers_and_a_resumed_run_change_no_bit(files):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    plain = batches(files)
    assert same(plain, batches(files))
    for workers in (1, 2):
        with case(workers):
            assert same(plain, batches(files, workers=workers))
    assert same(plain[2 * 4 :], batches(files, first=4))
    before = {*children()}
    steps = PixelBatches(files, SIZE, batch=4, seed=3, device="cpu", workers=2).batches(0, 6)
    next(steps)
    assert len({*children()} - before) == 2
    steps.close()
    assert torch.equal(state, torch.get_rng_state())
    assert numpy_state == np.random.get_state()[1].tolist()


def test_a_batch_has_the_promised_form(files):
    for tensors in (batches(files), batches(files, augment=False)):
        for colours, offsets in zip(tensors[::2], tensors[1::2], strict=True):
            assert colours.shape == (4, 3, SIZE, SIZE) and colours.dtype == torch.float32
            assert colours.is_contiguous()
            levels = colours * 255
            assert torch.equal(levels.round() / 255, colours) and 0 <= colours.min()
            assert colours.max() <= 1
            assert offsets.shape == (4, 2) and offsets.dtype == torch.int64


def test_offsets_are_uniform_and_differ_by_picture_and_step(files):
    offsets = torch.cat(batches(files, last=60, batch=8)[1::2])
    for axis in (0, 1):
        values = offsets[:, axis]
        assert set(values.tolist()) == {*range(SIZE // 2 + 1)}
        assert abs(values.float().mean() - SIZE / 4) < 1
    assert len(offsets.unique(dim=0)) > 200  # of 480, at 289 places
    assert abs(np.corrcoef(offsets.T.numpy())[0, 1]) < 0.15


def test_a_picture_is_changed_in_another_way_each_time(files):
    colours = torch.cat(batches(files[:1], last=4, batch=2)[::2])
    assert len(colours.flatten(1).unique(dim=0)) == 8
    other = torch.cat(batches(files[:1], last=4, batch=2, seed=4)[::2])
    assert len(torch.cat([colours, other]).flatten(1).unique(dim=0)) == 16


def test_without_augmentation_the_middle_is_taken(files):
    data = PixelBatches(files, SIZE, batch=2, seed=0, device="cpu", augment=False)
    colours, offsets = data.of([5, 2])
    for row, view in enumerate((5, 2)):
        picture = view_pixels(load_image(files[view])[0], ViewRule(size=SIZE), 0)
        expected = np.float32(picture.transpose(2, 0, 1)) / np.float32(255)
        assert np.array_equal(colours[row].numpy(), expected)
    assert offsets.tolist() == [[8, 8], [8, 8]]
    assert data.views == 7 and data.spread.tolist() == [*range(7)]
    assert data.batch == 2 and data.files == files


def test_the_square_of_a_wide_picture_shows_its_colours_in_the_right_channels(tmp_path):
    path = seven_pictures(tmp_path)[0]
    for channel in range(3):
        with case(channel):
            picture = np.zeros((40, 90, 3), np.uint8)
            picture[..., channel] = 255
            assert pixels.cv2.imwrite(str(path), picture[..., ::-1])
            colours, _ = PixelBatches(
                [path], SIZE, batch=1, seed=0, device="cpu", augment=False
            ).of([0])
            assert (colours[0, channel] == 1).all() and colours.sum() == SIZE * SIZE


def test_broken_pictures_are_replaced(files):
    paths = many_files(files, 21)
    spoil(paths[8])
    data = PixelBatches(paths, SIZE, batch=21, seed=0, device="cpu")
    (batch,) = data.batches(0, 1)
    assert len(batch.pixels) == 21
    assert [*data.broken] == [paths[8]] and data.broken_indices == [8] and data.most_broken == 1
    known = PixelBatches(paths, SIZE, batch=21, seed=0, device="cpu", broken=[8])
    assert known.broken_indices == [8]
    assert same(batch, next(known.batches(0, 1)))


def test_warnings_of_pictures_are_logged(tmp_path, caplog):
    path = seven_pictures(tmp_path)[0]
    assert pixels.cv2.imwrite(str(path), np.full((40, 40, 4), 100, np.uint8))
    PixelBatches([path], SIZE, batch=1, seed=0, device="cpu").of([0])
    assert "alpha" in caplog.text


def test_what_is_refused(files):
    for size, text in ((33, "imgsz is 33; wanted an even number"), (8, "16 to 4096 pixels")):
        with case(size), pytest.raises(InputError, match=text):
            PixelBatches(files, size, batch=2, seed=0, device="cpu")
    with pytest.raises(InputError, match="no pictures"):
        PixelBatches([], SIZE, batch=2, seed=0, device="cpu")
