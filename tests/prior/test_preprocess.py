"""runtime/prior/preprocess.py against plain NumPy, its place in the manifest, and every refusal."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from cases import case

from runtime.errors import BundleError, InputError
from runtime.prior.network import with_input_size
from runtime.prior.preprocess import MAX_PIXELS, MAX_SIDE, Preprocess, are_sides, read_json

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ONE_GREY = 1 / 255
META = {"mean": "[0.5, 0.4, 0.3]", "std": "[0.2, 0.3, 0.4]"}


def make(**options):
    return Preprocess(**({"mean": MEAN, "std": STD, "height": 12, "width": 16} | options))


def plain(**options):
    """Values in [0, 1] come out."""
    return make(mean=(0, 0, 0), std=(1, 1, 1), **options)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def averaged(picture, factor_y, factor_x):
    height, width = picture.shape[0] // factor_y, picture.shape[1] // factor_x
    return picture.reshape(height, factor_y, width, factor_x, 3).mean((1, 3)) / 255


def bilinear(picture, height, width):
    """Between pixel centres, the border repeated, in float64."""

    def weights(n, m):
        x = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        low = np.minimum(np.floor(x).astype(int), n - 1)
        out = np.zeros((m, n))
        out[np.arange(m), low] += 1 - (x - low)
        out[np.arange(m), np.minimum(low + 1, n - 1)] += x - low
        return out

    rows, columns = weights(picture.shape[0], height), weights(picture.shape[1], width)
    return np.einsum("yi,xj,ijc->yxc", rows, columns, picture / 255)


def expected(values, color="rgb", mean=MEAN, std=STD):
    values = values[..., ::-1] if color == "bgr" else values
    return ((values - np.array(mean)) / np.array(std)).transpose(2, 0, 1)[None]


def test_averages_by_whole_factors():
    for factors in [(1, 1), (2, 2), (3, 3), (4, 2), (1, 5), (7, 1)]:
        for color in ["rgb", "bgr"]:
            with case(color, factors):
                picture = noise(12 * factors[0], 16 * factors[1])
                x = make(color=color)(picture)
                assert x.shape == (1, 3, 12, 16) and x.dtype == np.float32 and x.flags.c_contiguous
                difference = np.abs(x - expected(averaged(picture, *factors), color))
                assert difference.max() <= (0.51 if factors != (1, 1) else 0.001) * ONE_GREY / min(
                    STD
                )


def test_interpolates_between_pixel_centres():
    for size in [(12, 8), (6, 16), (5, 7), (1, 16), (12, 1), (1, 1), (11, 15)]:
        for color in ["rgb", "bgr"]:
            with case(color, size):
                picture = noise(*size)
                x = make(color=color)(picture)
                difference = np.abs(x - expected(bilinear(picture, 12, 16), color))
                assert difference.max() <= 1.01 * ONE_GREY / min(STD)


def test_one_side_grows_the_other_shrinks():
    """Then it interpolates, in both."""
    picture = noise(6, 32)
    assert np.abs(plain()(picture)[0].transpose(1, 2, 0) - bilinear(picture, 12, 16)).max() < 0.005


def test_odd_sizes_keep_the_mean_and_the_range():
    for size in [(13, 17), (37, 23), (101, 16), (12, 999), (1000, 1001)]:
        with case(size):
            picture = noise(*size)
            x = plain()(picture)
            assert x.shape == (1, 3, 12, 16) and 0 <= x.min() <= x.max() <= 1
            if min(size[0] / 12, size[1] / 16) >= 1:
                assert np.abs(x.mean((0, 2, 3)) - picture.mean((0, 1)) / 255).max() < 0.005


def test_one_colour_stays_exact():
    for size in [(1, 1), (12, 16), (24, 32), (7, 50)]:
        for value in [0, 1, 128, 255]:
            with case(value, size):
                picture = np.full((*size, 3), value, np.uint8)
                wanted = (np.float32(value) / 255 - np.float32(MEAN)) / np.float32(STD)
                assert np.array_equal(make()(picture)[0, :, 5, 5], wanted)


def test_each_plane_has_its_own_numbers():
    picture = np.zeros((12, 16, 3), np.uint8)
    picture[...] = (51, 102, 255)
    rgb = make(mean=(0, 0.4, 0.5), std=(1, 2, 0.25))(picture)[0, :, 0, 0]
    assert np.allclose(rgb, [0.2, 0, 2], atol=1e-6)
    bgr = make(mean=(0, 0.4, 0.5), std=(1, 2, 0.25), color="bgr")(picture)[0, :, 0, 0]
    assert np.allclose(bgr, [1, 0, -1.2], atol=1e-6)


def test_the_picture_is_left_alone():
    picture = noise(12, 16)
    before = picture.copy()
    make()(picture)
    make(color="bgr")(picture[::-1])  # a view
    assert np.array_equal(picture, before)


def test_long_side():
    for options, picture, size in [
        ({"long_side": 64}, (30, 60), (32, 64)),
        ({"long_side": 64}, (60, 30), (64, 32)),  # portrait
        ({"long_side": 64, "multiple": 16}, (30, 100), (16, 64)),
        ({"long_side": 64, "multiple": 32}, (480, 640), (64, 64)),  # 48 is rounded to even: 2 * 32
        ({"long_side": 64, "minimum": 40}, (10, 640), (40, 64)),
        ({"long_side": 64, "multiple": 32, "minimum": 40}, (10, 640), (64, 64)),
        ({"long_side": 64}, (1, 1), (64, 64)),
        ({"long_side": 64}, (1, 1000), (1, 64)),
        ({"long_side": 1}, (480, 640), (1, 1)),
    ]:
        with case(options, picture, size):
            pp = plain(resize="long_side", height=None, width=None, **options)
            assert pp.size(*picture) == size
            assert pp(noise(*picture)).shape == (1, 3, *size)


def test_stretch_does_not_ask_the_picture():
    for picture in [(1, 1), (30, 60), (999, 2)]:
        with case(picture):
            assert make(long_side=7, multiple=5, minimum=99).size(*picture) == (12, 16)


def test_through_the_manifest_and_back():
    for pp in [
        make(),
        make(color="bgr", mean=(0, 1, 2), std=[1, 2, 3]),
        make(resize="long_side", height=None, width=None, long_side=300, multiple=32, minimum=64),
        make(resize="long_side", long_side=300),
    ]:
        with case(pp):
            entry = json.loads(json.dumps(pp.to_manifest()))
            again = Preprocess.from_manifest(entry)
            assert again == pp and again.to_manifest() == entry
            assert np.array_equal(again(noise(30, 50)), pp(noise(30, 50)))
            assert (
                entry["layout"] == "NCHW float32" and entry["order"] == "resize, 1/255, normalise"
            )


# Refusals


def test_options_that_are_refused():
    for options, match in [
        ({"color": "RGB"}, r"color is 'RGB'; wanted one of \('rgb', 'bgr'\)"),
        ({"color": ["rgb"]}, r"color is \['rgb'\]; wanted"),
        ({"resize": "letterbox"}, "resize is 'letterbox'; wanted one of"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; wanted one of"),
        ({"mean": (0, 0)}, r"mean is \(0, 0\); wanted three numbers"),
        ({"mean": (0, 0, 0, 0)}, "mean is .*; wanted three numbers"),
        ({"mean": "000"}, "mean is 000; wanted three numbers"),
        ({"mean": 0.5}, "mean is 0.5; wanted three numbers"),
        ({"mean": None}, "mean is None; wanted three numbers"),
        ({"mean": (0, 0, float("nan"))}, "mean is .*; wanted finite numbers"),
        ({"mean": (0, 0, float("-inf"))}, "mean is .*; wanted finite numbers"),
        ({"mean": (0, 0, 10**400)}, "mean is .*; wanted finite numbers"),
        ({"mean": (0, 0, True)}, "mean is .*; wanted three numbers"),
        ({"std": (1, 1, 0)}, r"std is \(1, 1, 0\); wanted numbers above 0"),
        ({"std": (1, 1, -1)}, "std is .*; wanted numbers above 0"),
        ({"mean": (123, 116, 103)}, r"(?s)wanted numbers for values in \[0, 1\].*fix: divide them"),
        ({"std": (58, 57, 57)}, r"std is .*; wanted numbers for values in \[0, 1\]"),
        ({"height": None}, "height, width, long_side, .* are None, 16, 512, 1, 1; wanted 1 to"),
        ({"width": None}, "are 12, None, 512, 1, 1; wanted 1 to 32768"),
        ({"height": 0}, "are 0, 16"),
        ({"height": 1.0}, "are 1.0, 16"),
        ({"width": MAX_SIDE + 1}, "are 12, 32769"),
        ({"long_side": 0}, "are 12, 16, 0"),
        ({"multiple": -2}, "are 12, 16, 512, -2"),
        ({"minimum": True}, "are 12, 16, 512, 1, True"),
        ({"resize": "long_side", "height": "x"}, "are x, 16"),
        ({"resize": "long_side", "height": None}, "are None, 16"),
    ]:
        with case(options):
            with pytest.raises(InputError, match=match):
                make(**options)
            entry = make().to_manifest() | {
                k: list(v) if isinstance(v, tuple) else v for k, v in options.items()
            }
            with pytest.raises(
                BundleError, match=r"(?s)^manifest: preprocess: .*\n  fix: export the bun"
            ):
                Preprocess.from_manifest(entry)


def test_inputs_that_are_too_large():
    assert MAX_PIXELS < MAX_SIDE**2
    side = int(MAX_PIXELS**0.5)
    assert make(height=side, width=side).size(1, 1) == (side, side)
    for pp in (make(height=side + 1, width=side), plain(resize="long_side", long_side=MAX_SIDE)):
        with pytest.raises(InputError, match=r"would have \d+ x \d+ pixels; .*\n.*smaller imgsz"):
            pp.size(100, 100)
    assert plain(resize="long_side", long_side=MAX_SIDE).size(1, 100) == (328, MAX_SIDE)


def test_manifest_entries_that_are_refused():
    for entry, match in [
        (None, "preprocess has None; wanted color, height"),
        ([], r"preprocess has \[\]; wanted"),
        (["mean"], r"preprocess has \['mean'\]; wanted"),
        ({}, r"preprocess has {}; wanted"),
        (make().to_manifest() | {"extra": 1}, r"preprocess has \['color', 'extra'"),
        ({k: v for k, v in make().to_manifest().items() if k != "std"}, "preprocess has"),
        (
            make().to_manifest() | {"layout": "NHWC"},
            "preprocess names an order or layout that this ver",
        ),
        (
            make().to_manifest() | {"order": None},
            "preprocess names an order or layout that this version",
        ),
        (make().to_manifest() | {"color": "x" * 10**6}, "preprocess: color is 'xxx"),
        (make().to_manifest() | {"x" * 10**6: 1}, "preprocess has"),
    ]:
        with case(match):
            with pytest.raises(
                BundleError, match=rf"(?s)^manifest: {match}.*\n  fix: export the bund"
            ) as e:
                Preprocess.from_manifest(entry)
            assert len(str(e.value)) < 1000


# Metadata of ONNX files (what loading a network does with it is in tests/sdk/test_prior.py)


def test_from_metadata():
    pp = Preprocess.from_metadata(META, "m.onnx")
    assert pp == replace(
        make(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), resize="long_side", height=None, width=None
    )
    more = META | {
        "input_size": '{"width": 64, "height": 48}',
        "size_multiple": "16",
        "minimum_size": "32",
        "input_layout": "NCHW BGR",
    }
    pp = Preprocess.from_metadata(more, "m.onnx")
    assert (pp.long_side, pp.multiple, pp.minimum, pp.color) == (64, 16, 32, "bgr")
    pp = Preprocess.from_metadata(more, "m.onnx", (40, 50))
    assert pp.resize == "stretch" and pp.size(7, 7) == (40, 50)


def test_metadata_that_is_refused():
    for change, fixed, match in [
        ({"mean": None}, None, "m.onnx does not say how to normalise .* 'mean' is missing"),
        ({"std": None}, None, "m.onnx does not say how to normalise .* 'std' is missing"),
        ({"mean": "[0, 0]"}, None, r"m.onnx: metadata 'mean' is \[0, 0\]; wanted three numbers"),
        ({"mean": "[123, 0, 0]"}, None, "metadata 'mean' is .*; wanted numbers for values in"),
        ({"mean": "[1e999, 0, 0]"}, None, "metadata 'mean' is .*; wanted finite numbers"),
        ({"std": "[1, 1, 0]"}, None, "metadata 'std' is .*; wanted numbers above 0"),
        ({"std": "0.2"}, None, "metadata 'std' is 0.2; wanted three numbers"),
        ({"mean": "a"}, None, "m.onnx: metadata 'mean' is a; wanted three numbers"),
        ({"mean": "[" * 100_000}, None, r"metadata 'mean' is \[{80}; wanted three numbers"),
        ({"mean": "\x1b[2J"}, None, r"metadata 'mean' is '\\x1b\[2J'; wanted three numbers"),
        ({"input_size": "[" + "1, " * 999 + "1]"}, None, r"'input_size' is [\[1, ]{80}; wanted"),
        ({"size_multiple": "\n" * 999 + "0"}, None, r"'size_multiple' is '(\\n){80}'; wanted"),
        ({"input_size": "5"}, None, "metadata 'input_size' is 5; wanted {\"width\": W"),
        ({"input_size": "{}"}, None, "metadata 'input_size' is {}"),
        ({"input_size": '{"w": 5}'}, None, "metadata 'input_size' is"),
        ({"input_size": '{"width": 0}'}, None, "metadata 'input_size' is"),
        ({"size_multiple": "0"}, None, "metadata 'size_multiple' is 0; wanted a number, 1 to"),
        ({"minimum_size": "[]"}, None, r"metadata 'minimum_size' is \[\]; wanted a number"),
        ({}, (MAX_SIDE + 1, 5), "m.onnx has a fixed input of 32769 x 5; wanted 1 to 32768"),
        ({}, (0, 5), "m.onnx has a fixed input of 0 x 5"),
    ]:
        with case(match, fixed):
            metadata = {k: v for k, v in (META | change).items() if v is not None}
            with pytest.raises(BundleError, match=rf"(?s)^.*{match}.*\n  fix: ") as error:
                Preprocess.from_metadata(metadata, "m.onnx", fixed)
            assert str(error.value).count("fix: ") == 1


def test_a_size_of_0_is_mended_by_an_export():
    with pytest.raises(BundleError, match=r"fix: 0 stands for a free size; .* m\.onnx sets"):
        Preprocess.from_metadata(META, "m.onnx", (0, 5))


def test_numbers_of_numpy():
    plain = make()
    numpy = make(
        mean=np.array(plain.mean), std=[np.float64(n) for n in plain.std], height=np.int64(12),
        width=np.array(16), long_side=np.int32(512),
    )  # fmt: skip
    assert numpy == plain and json.dumps(numpy.to_manifest()) == json.dumps(plain.to_manifest())
    free = make(resize="long_side", height=None, width=None)
    for imgsz in [(24, 32), [24, 32], np.array([24, 32]), (np.int64(24), 32)]:
        with case(imgsz):
            sized = with_input_size(free, imgsz, None, "x")
            assert type(sized.height) is int and sized.size(5, 5) == (24, 32)
            assert with_input_size(sized, imgsz, (24, 32), "x") == sized
    assert with_input_size(free, np.int64(64), None, "x").size(32, 64) == (32, 64)
    for number, imgsz in enumerate([[24, 32, 1], [], (24.0, 32), np.zeros((2, 2)), 10**5000]):
        with case(number):
            with pytest.raises(InputError, match=r"imgsz is .{1,110}; wanted \(height, width\)"):
                with_input_size(free, imgsz, None, "x")


def test_metadata_without_brackets():
    for text in ("0.5, 0.4, 0.3", "(0.5,0.4,0.3)", "0.5 0.4 0.3", "[.5 .4 .3]", " 5e-1,.4\t0.3,\n"):
        with case(text):
            pp = Preprocess.from_metadata(META | {"mean": text}, "m.onnx")
            assert (pp.mean, pp.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_the_fix_shows_a_value_that_is_taken():
    for key, wrong in [
        ("mean", "0.5 0.5 x"),
        ("mean", "0.5, 0.5, ٠"),
        ("mean", "[0.5, 0.5, 0.5"),
        ("mean", "0.5, 0.5, 0_1"),
        ("std", "{"),
        ("input_size", "96x128"),
        ("input_size", "512"),
        ("size_multiple", "32px"),
        ("size_multiple", "0"),
        ("minimum_size", "1.5"),
        ("input_layout", "NHWC"),
    ]:
        with case(key, wrong):
            with pytest.raises(BundleError) as error:
                Preprocess.from_metadata(META | {key: wrong}, "m.onnx")
            found = re.search("entry.key == '(.*)', set entry.value = '(.*)', for", error.value.fix)
            assert found is not None and found[1] == key, error.value.fix
            assert Preprocess.from_metadata(META | {key: found[2]}, "m.onnx")


def test_small_things():
    assert read_json({}, "m", "key", 5) == 5 and read_json({"key": "[1]"}, "m", "key", 5) == [1]
    assert are_sides([1, MAX_SIDE]) and are_sides([])
    for wrong in (0, -1, MAX_SIDE + 1, 1.0, True, None, "1"):
        assert not are_sides([1, wrong])
