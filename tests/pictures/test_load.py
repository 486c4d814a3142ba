"""runtime/pictures/load.py: file objects, pictures of PIL, grey arrays, and what is no source."""

import array
import io
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from cases import case
from PIL import Image

from runtime.errors import InputError
from runtime.pictures import load
from runtime.pictures.load import load_image


def smooth(height=40, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3, y * 4, x + y], axis=-1).astype(np.uint8)


def png(picture=None):
    picture = smooth() if picture is None else picture
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def same(source, wanted, **options):
    picture, notes = load_image(source, **options)
    assert picture.dtype == np.uint8 and picture.flags.c_contiguous and picture.flags.writeable
    assert np.array_equal(picture, wanted)
    return notes


# File objects


def test_a_file_object_is_read_from_its_position_and_stays_open(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"header" + png())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("a.png", b"header" + png())
    with (
        path.open("rb") as file, path.open("rb", buffering=0) as raw,
        tempfile.SpooledTemporaryFile() as spooled, zipfile.ZipFile(tmp_path / "a.zip") as packed,
        packed.open("a.png") as member,
    ):  # fmt: skip
        spooled.write(b"header" + png())
        for source in (file, raw, spooled, member, io.BytesIO(b"header" + png())):
            with case(type(source).__name__):
                source.seek(6)
                assert same(source, smooth(), color="bgr") == []
                assert not source.closed and source.read() == b""
                with pytest.raises(InputError, match=r"(?s)no bytes after its.*source\.seek\(0\)"):
                    load_image(source)


class Pieces:
    """A file that returns a few bytes at a time, as a network connection does."""

    def __init__(self, data):
        self.data = io.BytesIO(data)

    def read(self, size=-1):
        return self.data.read(min(size, 7))


def test_a_file_object_may_return_less_than_asked():
    same(Pieces(png()), smooth())


def test_what_is_no_file_of_bytes(tmp_path):
    class Asynchronous:
        async def read(self, size):
            return b""

    class NoSize:
        def read(self):
            return b""

    path = tmp_path / "a.png"
    path.write_bytes(png())
    closed = path.open("rb")
    closed.close()
    with path.open() as text, path.open("ab") as appended, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the coroutine is never awaited
        for source, reason in [
            (text, r"a\.png cannot be read"), (io.StringIO("x"), r"read\(\) returned a str"),
            (appended, "cannot be read: .*read"), (closed, r"cannot be read: .* closed file"),
            (Asynchronous(), r"read\(\) returned a coroutine"),
            (cv2.VideoCapture(), r"read\(\) returned a tuple"), (NoSize(), "source cannot be read"),
        ]:  # fmt: skip
            with case(reason), pytest.raises(InputError, match=reason) as caught:
                load_image(source)
            assert "open(path, 'rb')" in caught.value.fix


# Other holders of bytes


def test_holders_of_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.seek(9)  # a buffer is read as a whole
        for source in (mapped, bytearray(png()), memoryview(png()), array.array("B", png())):
            with case(type(source).__name__):
                same(source, smooth())
    same(memoryview(smooth()), smooth())


def test_bytes_that_look_like_a_path_say_so():
    for data in (b"street.jpg", "straße.jpg".encode()[:4], b"/tmp/a b.png"):
        with case(data), pytest.raises(InputError, match=r"pass it as text: source\.decode\(\)"):
            load_image(data)
    with pytest.raises(InputError) as caught:
        load_image(b"\0" * 100)
    assert "decode()" not in caught.value.fix


# Paths and URLs


def test_a_pipe_is_read_and_a_device_is_not(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(png()))
    writer.start()
    same(pipe, smooth())
    writer.join()
    for device in ("/dev/zero", "/dev/urandom", "/dev/null"):
        with case(device), pytest.raises(InputError, match=f"{device} is a device or a socket"):
            load_image(device)


def test_standard_input_is_a_path():
    program = (
        "from runtime.pictures.load import load_image; print(load_image('/dev/stdin')[0].sum())"
    )
    run = subprocess.run([sys.executable, "-c", program], input=png(), capture_output=True)
    assert run.returncode == 0 and int(run.stdout) == smooth().sum(), run.stderr


def test_files_without_an_end_are_read_up_to_a_limit(tmp_path, monkeypatch):
    class Endless:
        def __init__(self, start):
            self.start, self.bytes = start, 0

        def read(self, size):
            start = b"" if self.bytes else self.start
            self.bytes += size
            return start + bytes(size - len(start))

    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(2**31)  # a sparse file
    with pytest.raises(InputError, match=r"large\.png has more than 2147483647 bytes"):
        load_image(large)
    monkeypatch.setattr(load, "MOST_BYTES", 2**25)
    for source in (Endless(b"\xff\xd8\xff"), bytes(2**25 + 1)):
        with pytest.raises(InputError, match="source has more than 33554432 bytes"):
            load_image(source)

    junk = Endless(b"")
    with pytest.raises(InputError, match="source is not a picture"):
        load_image(junk)
    assert junk.bytes < 1000


def test_a_large_file_that_is_no_picture_is_not_read_whole(tmp_path):
    junk = tmp_path / "junk.jpg"
    with junk.open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"junk\.jpg is not a picture"):
            load_image(junk)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_short_reads_and_errors_of_a_file_object():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    same(Slow(png()), smooth())
    for error in (EOFError("ended"), zlib.error("damaged"), RuntimeError("lost")):
        with case(repr(error)):
            broken = io.BytesIO()
            broken.read = Mock(side_effect=error)
            with pytest.raises(InputError, match=f"source cannot be read: {error}"):
                load_image(broken)


def test_urls_are_not_read_and_keep_their_password_to_themselves():
    for url, shown in [
        ("http://host/x.jpg", "http://host/x.jpg is a URL"),
        ("https://user:secret@host/x.jpg?token=secret", "https://host/x.jpg?token=*** is a URL"),
        ("rtsp://user:sec/ret@host/x", "rtsp://host/x is a URL"),
        ("https://user:secret?@host/x#secret", "https://host/x#*** is a URL"),
        ("http://u:p secret\nw@host", "http://host is a URL"),
        ("s3://bucket/x.jpg", "s3://bucket/x.jpg is a URL"),
        ("data:image/png;base64," + "QUJD" * 2000, "data:image/png;base64,QUJD"),
    ]:
        with case(url[:40]), pytest.raises(InputError) as caught:
            load_image(url)
        assert caught.value.message.startswith(shown) and "URLs are not read" in str(caught.value)
        assert "secret" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_path_that_looks_like_a_url_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data:1,2.png").write_bytes(png())
    for source in (Path("data:1,2.png"), "./data:1,2.png"):
        same(source, smooth())


def test_texts_that_are_no_path():
    for text, message in [
        ("", "source is an empty text"),
        ("QUJD" * 3000, r"cannot be read: File name too long\n.*passed as bytes"),
        ("no/such.jpg", r"no/such\.jpg does not exist"),
        (os.fspath(__file__) + "/a.jpg", "does not exist|Not a directory"),
    ]:
        with case(message), pytest.raises(InputError, match=message) as caught:
            load_image(text)
        assert len(str(caught.value)) < 600


# Pictures of PIL


def test_pictures_of_pil_in_every_mode():
    picture = Image.fromarray(smooth())
    for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "RGBa"):
        with case(mode):
            source = picture
            if mode in ("LA", "PA", "RGBa"):
                source = source.convert({"LA": "L", "PA": "P", "RGBa": "RGBA"}[mode])
            source = source.convert(mode)
            notes = same(source, np.asarray(source.convert("RGB")), color="bgr")
            assert [n.split(";")[0] for n in notes] == (
                ["The alpha channel was dropped"] if mode[-1] in "Aa" else []
            )
            assert source.mode == mode  # the user's picture is unchanged


def test_transparency_of_a_palette_is_reported_as_in_a_file():
    file = io.BytesIO()
    Image.fromarray(smooth()).convert("P").save(file, "PNG", transparency=b"\0\7\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL warns of a conversion that loses transparency
        pixels, notes = load_image(Image.open(file))
    assert np.array_equal(pixels, load_image(file.getvalue())[0])
    assert notes == load_image(file.getvalue())[1] and "alpha" in notes[0]


def test_16_bits_of_pil_are_scaled_as_those_of_a_file():
    values = (np.arange(40 * 64).reshape(40, 64) * 25).astype(np.uint16)
    file = cv2.imencode(".png", values)[1].tobytes()
    for dtype in ("<u2", ">u2"):
        picture = Image.fromarray(values)
        if dtype == ">u2":
            data = values.astype(dtype).tobytes()
            picture = Image.frombytes("I;16B", (64, 40), data)
        pixels, notes = load_image(picture)
        assert np.array_equal(pixels, load_image(file)[0]) and notes == load_image(file)[1]
    for mode in ("I", "F"):
        with pytest.raises(InputError, match=f"mode {mode} and 4 x 3 pixels, wanted 8 or 16 bits"):
            load_image(Image.new(mode, (4, 3)))


def test_orientation_of_pil_is_not_applied_and_that_is_said():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(smooth()).save(file, "PNG", exif=exif)
    (note,) = same(Image.open(file), smooth())
    assert "EXIF orientation of the PIL picture is not applied" in note
    assert load_image(file.getvalue())[0].shape == (64, 40, 3)


def test_pictures_of_pil_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    closed = Image.open(path)
    closed.close()
    with Image.open(path) as left:
        pass
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    cut = Image.open(io.BytesIO(png(noise)[:4000]))
    for source in (closed, left, cut):
        with pytest.raises(InputError, match="of mode RGB and 64 x 40 pixels, which PIL cannot"):
            load_image(source)
    with pytest.raises(InputError, match="at least one pixel"):
        load_image(Image.new("RGB", (0, 5)))
    large = SimpleNamespace(mode="RGB", size=(2**15, 2**14), convert=None)  # is not decoded
    with pytest.raises(InputError, match="source has 32768 x 16384 pixels, wanted at most"):
        load_image(large)


# Arrays


def test_grey_arrays_are_copied_to_three_channels():
    grey = smooth()[..., 1]
    wanted = np.repeat(grey[..., None], 3, -1)
    for source in (grey, grey[..., None], grey.copy(), np.asfortranarray(grey)):
        for color in ("rgb", "bgr"):
            assert same(source, wanted, color=color) == []
    same(grey[::2, ::-3], wanted[::2, ::-3])
    same(np.ma.masked_array(grey, grey > 9), wanted)
    same(grey[:1, :1], wanted[:1, :1])
    small = grey[:7, :3].copy()  # a grey picture of three columns
    same(small, wanted[:7, :3])
    assert np.array_equal(small, grey[:7, :3])


class Tensor:
    """An object with ``__array__`` that is no array of NumPy."""

    def __init__(self, values, error=None):
        self.values, self.error = values, error

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise self.error
        return self.values


class OnGpu(Tensor):
    def __dlpack_device__(self):
        return 2, 0


def test_tensors_are_arrays():
    same(Tensor(smooth()), smooth())
    same(Tensor(smooth()), smooth()[..., ::-1], color="bgr")
    with pytest.raises(InputError, match=r"np\.asarray\(source\)\[0\]\.transpose\(1, 2, 0\)"):
        load_image(Tensor(smooth().transpose(2, 0, 1)[None]))
    with pytest.raises(InputError, match=r"a Tensor that NumPy cannot read: Use x\.detach\(\)"):
        load_image(Tensor(None, RuntimeError("Use x.detach()")))
    with pytest.raises(InputError, match=r"(?s)source is on a GPU; wanted.*x\.cpu\(\)"):
        load_image(OnGpu(smooth()))


WHOLE = np.full((4, 5, 3), 200, np.uint8)


def test_the_fix_of_an_array_makes_it_a_picture():
    """Each fix is evaluated: its result must be the picture."""
    for source, fix in [
        (WHOLE[None], "source[0]"),
        (WHOLE[None, None], "source[0][0]"),
        (WHOLE[..., :1][None], "source[0]"),
        (WHOLE[None, ..., 0], "source[0]"),
        (WHOLE.transpose(2, 0, 1), "source.transpose(1, 2, 0)"),
        (WHOLE.transpose(2, 0, 1)[None], "source[0].transpose(1, 2, 0)"),
        (np.dstack([WHOLE, WHOLE[..., :1]]), "drop alpha: source[..., :3]"),
        (WHOLE[..., :2], "drop alpha: source[..., 0]"),
        (WHOLE.astype(np.int64), "cast the values, which are in [0, 255]: source.astype(np.uint8)"),
        (WHOLE.astype(np.float32),
         "cast the values, which are in [0, 255]: source.astype(np.uint8)"),
        ((WHOLE / 255).astype(np.float16),
         "multiply values in [0, 1] by 255 and cast: (source * 255).astype(np.uint8)"),
        (WHOLE > 9, "for black and white: source.astype(np.uint8) * 255"),
    ]:  # fmt: skip
        with case(fix, source.dtype), pytest.raises(InputError) as caught:
            load_image(source)
        assert caught.value.fix == fix
        made = eval(fix.split(": ")[-1], {"source": source, "np": np})
        assert load_image(made)[0].shape == WHOLE.shape


def test_values_that_no_cast_makes_a_picture():
    nan = np.where(WHOLE[..., :1] > 0, np.float32("nan"), 0) + np.zeros((4, 5, 3), np.float32)
    for source, found, fix in [
        (
            np.full((4, 5, 3), 300, np.uint16),
            "values from 300 to 300",
            r"to 0\.\.255 and cast: np\.",
        ),
        (WHOLE / 100 - 3, "values from -1 to -1", "after undoing the normalisation"),
        (nan, "with NaN or infinity", "replace these values"),
        (WHOLE[None].repeat(2, 0), r"\(2, 4, 5, 3\)", r"one by one, as source\[0\]"),
        (WHOLE.astype(complex), "complex128", "scale the values"),
    ]:
        with case(fix), pytest.raises(InputError, match=f"(?s){found}.*fix: .*{fix}"):
            load_image(source)
    with pytest.raises(
        InputError, match=r"(?s)source is a list, wanted .*pass pictures one by one"
    ):
        load_image([WHOLE, WHOLE])
