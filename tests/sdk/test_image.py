"""sdk/image.py: every kind of source, every refusal, and files that are whole or not there."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from cases import case
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import difference, encode, pillow_rgb, smooth
from PIL import Image

import runtime.pictures.decode
import runtime.pictures.limits
from runtime.errors import InputError
from runtime.files import write_atomic
from runtime.pictures.files import SUFFIXES
from runtime.pictures.limits import MAX_PIXELS
from runtime.pictures.load import load_image
from sdk.image import encode_image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(smooth(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


# Arrays


def test_array_comes_back_equal_contiguous_and_copied() -> None:
    for order in ["C", "F"]:
        with case(order):
            source = np.array(smooth(), order=order)
            picture, warnings = load_image(source)
            assert np.array_equal(picture, source) and picture.dtype == np.uint8
            assert picture.flags.c_contiguous and warnings == []
            picture[:] = 0
            assert np.array_equal(source, smooth())


def test_bgr_array_is_reversed_also_when_it_is_a_view() -> None:
    for view in [np.s_[:], np.s_[::-1, ::2], np.s_[:1, :1], np.s_[5:6]]:
        with case(view):
            source = smooth()[view]
            picture, _ = load_image(source, color="bgr")
            assert np.array_equal(picture, source[..., ::-1]) and picture.flags.c_contiguous
            assert not np.shares_memory(picture, source)


def test_read_only_array_is_accepted() -> None:
    source = smooth()
    source.flags.writeable = False
    assert np.array_equal(load_image(source)[0], source)
    assert np.array_equal(load_image(source, color="bgr")[0], source[..., ::-1])


def test_unknown_color_is_refused() -> None:
    with pytest.raises(InputError, match="color is 'RGB', wanted 'rgb' or 'bgr'"):
        load_image(smooth(), color="RGB")


NAN = np.full((4, 5, 3), np.nan, np.float32)


def test_other_arrays_are_refused_with_the_fix() -> None:
    for source, came, fix in [
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\) uint8", "check the crop or the camera"),
        (np.zeros(9, np.uint8), r"\(9,\) uint8", r"source\.tobytes\(\)"),
        (np.zeros((4, 5), np.uint16), r"\(4, 5\) uint16", r"cast .*source\.astype"),
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\) uint8", r"drop alpha: source\[\.\.\., :3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\) uint8", r"transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"\(2, 4, 5, 3\) uint8", ""),
        (np.zeros((4, 5, 3), np.float64), "float64 array", "by 255 and cast"),
        (NAN, "float32 array with NaN", "replace these values"),
        (np.zeros((3, 4, 5), np.float32), r"\(3, 4, 5\) float32", "transpose.*; multiply"),
        (np.zeros((4, 5, 3), np.uint16), "uint16", r"cast the values, .* 255]: source"),
        (np.zeros((4, 5, 3), bool), "bool", r"source\.astype\(np\.uint8\) \* 255"),
        (np.array(7, np.uint8), r"\(\) uint8", ""),
        (np.empty((4, 5, 3), object), "object", "and cast"),
    ]:
        with (
            case(came),
            pytest.raises(
                InputError, match=rf"(?s)source is a .*{came}.*wanted \(H, W, 3\).*{fix}"
            ),
        ):
            load_image(source)


def test_other_types_are_refused() -> None:
    for source in [None, 7, [[1, 2, 3]], {}, Image]:
        with (
            case(type(source).__name__),
            pytest.raises(InputError, match=f"source is a {type(source).__name__}, wanted a path"),
        ):
            load_image(source)


# Files that are read


def test_bytes_and_paths_give_the_same(tmp_path: Path) -> None:
    for wrap in [bytes, bytearray, memoryview]:
        with case(wrap.__name__):
            data = encode(smooth(), "PNG")
            path = tmp_path / "smooth picture é.png"
            path.write_bytes(data)
            for source in (wrap(data), path, str(path)):
                picture, warnings = load_image(source)
                assert np.array_equal(picture, smooth()) and warnings == []
                assert picture.flags.c_contiguous and picture.flags.writeable


def test_color_does_not_change_a_file() -> None:
    assert np.array_equal(load_image(encode(smooth(), "PNG"), color="bgr")[0], smooth())


def test_lossless_files_are_exact() -> None:
    for size in [(1, 1), (1, 17), (13, 1), (40, 64)]:
        for kind in ["PNG", "BMP", "TIFF", "PPM"]:
            with case(kind, size):
                assert np.array_equal(load_image(encode(smooth(*size), kind))[0], smooth(*size))


def test_lossless_webp_is_exact() -> None:
    assert np.array_equal(load_image(encode(smooth(), "WEBP", lossless=True))[0], smooth())


def test_bytes_after_the_end_are_ignored() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(smooth(), kind)
        assert np.array_equal(load_image(data + b"\xff\xd8garbage" * 9)[0], load_image(data)[0])


def test_end_marker_inside_a_thumbnail_is_not_the_end() -> None:
    data = encode(smooth(), "JPEG")
    data = data[:2] + b"\xff\xe5\x00\x06\xff\xd9\xff\xd9" + data[2:]  # an APP5 of 4 bytes
    assert difference(load_image(data)[0], pillow_rgb(data)) <= 2
    with pytest.raises(InputError, match="truncated JPEG"):
        load_image(data[:-2])


def test_100_megapixel_jpeg() -> None:
    picture = np.full((10_000, 10_000), 200, np.uint8)
    picture[-1, -16:] = 20
    loaded, warnings = load_image(cv2.imencode(".jpg", picture)[1].tobytes())
    assert loaded.shape == (10_000, 10_000, 3) and warnings == []
    assert difference(loaded[0, 0], np.full(3, 200, np.uint8)) <= 2
    assert difference(loaded[-1, -1], np.full(3, 20, np.uint8)) <= 40


# Files that are refused


def test_missing_file_folder_and_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"(?s)no\.jpg does not exist.*current folder is"):
        load_image(tmp_path / "no.jpg")
    with pytest.raises(InputError, match="is a folder, wanted a picture"):
        load_image(str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be read: .*null"):
        load_image("nul\0byte.png")

    def refuse(
        path: Path, mode: str
    ) -> None:  # file modes do not stop root, so the system is played
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied"):
        load_image(tmp_path / "locked.png")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(InputError, match=r"source \(0 bytes\) is empty"):
        load_image(b"")


def test_no_picture() -> None:
    for data in [b"hello world", b"\0" * 100, b"\xff\xd8", b"\x89PNG", b"BM"]:
        with (
            case(data),
            pytest.raises(InputError, match=r"not a picture.*\n  fix: name a picture file"),
        ):
            load_image(data)


def test_png_cut_anywhere_is_refused() -> None:
    data = encode(smooth(), "PNG")
    for end in range(8, len(data)):
        with pytest.raises(InputError, match="truncated PNG: its end marker is missing"):
            load_image(data[:end])


def test_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in [png_claiming, jpeg_claiming]:
        with case(make.__name__):
            monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
            with pytest.raises(
                InputError, match=f"60000 x 60000 pixels, wanted at most {MAX_PIXELS}"
            ):
                load_image(make(60000, 60000))


def test_too_many_pixels_are_refused_in_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.pictures.limits, "MAX_PIXELS", 40 * 64)
    load_image(encode(smooth(), "BMP"))
    monkeypatch.setattr(runtime.pictures.limits, "MAX_PIXELS", 40 * 64 - 1)
    for kind in ("BMP", "TIFF", "PNG", "JPEG"):
        with pytest.raises(InputError, match="has 64 x 40 pixels, wanted at most 2559"):
            load_image(encode(smooth(), kind))


def test_limits_of_opencv_become_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.pictures.limits, "MAX_SIDE", 2**21)
    wide = cv2.imencode(".bmp", np.zeros((1, 2**20 + 1, 3), np.uint8))[1].tobytes()
    with pytest.raises(
        InputError, match=r"(?s)OpenCV refuses source .*CV_IO_MAX_IMAGE.*fix: scale"
    ):
        load_image(wide)


WHOLE = {kind: encode(smooth(), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damage_never_raises_anything_else(kind: str, draw: st.DataObject) -> None:
    data = bytearray(WHOLE[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        picture, warnings = load_image(bytes(data))
    except InputError:
        return
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and isinstance(warnings, list)


def test_log_level_is_restored_by_the_last_of_many_threads() -> None:
    log = getattr(cv2.utils, "logging", cv2)
    level = log.getLogLevel()
    with runtime.pictures.decode.quiet_opencv():  # as if one thread were still decoding
        load_image(encode(smooth(), "PNG"))
        assert log.getLogLevel() == 0
    assert log.getLogLevel() == level
    data = [encode(smooth(), "PNG"), encode(smooth(), "TIFF")[:5000]]

    def work() -> None:
        for i in range(60):
            try:
                load_image(data[i % 2])
            except InputError:
                assert i % 2

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.getLogLevel() == level != 0


# Writing


def test_encoded_colour_is_read_back_exactly() -> None:
    for suffix in [".png", ".bmp", ".tif", ".tiff", ".webp", ".PNG"]:
        with case(suffix):
            assert np.array_equal(load_image(encode_image(smooth(), suffix))[0], smooth())


def test_encoded_jpeg_is_rgb_and_close() -> None:
    for suffix in (".jpg", ".jpeg"):
        data = encode_image(smooth(), suffix)
        assert difference(pillow_rgb(data), smooth()) <= 12


def test_encoded_grey_is_read_back_exactly() -> None:
    for suffix in [".png", ".tif"]:
        for dtype in [np.uint8, np.uint16]:
            with case(dtype.__name__, suffix):
                grey = (smooth()[..., 0].astype(dtype) * (200 if dtype == np.uint16 else 1))[:, ::2]
                back = np.asarray(Image.open(io.BytesIO(encode_image(grey, suffix))))
                assert back.dtype == dtype and np.array_equal(back, grey)


def test_encoding_leaves_the_array_alone() -> None:
    picture = smooth()
    encode_image(picture, ".png")
    assert np.array_equal(picture, smooth())


def test_unknown_suffix_lists_the_known() -> None:
    for suffix in ("", ".gif", "png"):
        with pytest.raises(InputError, match=rf"suffix is '{suffix}', wanted .*{SUFFIXES[-1]}"):
            encode_image(smooth(), suffix)


def test_other_arrays_are_not_encoded() -> None:
    for array in [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5), np.int32),
        np.zeros((4, 5, 3), np.uint16),
        np.zeros((0, 5), np.uint8),
    ]:
        with (
            case(array.shape, array.dtype),
            pytest.raises(
                InputError, match=rf"array is \({array.shape[0]}.* {array.dtype}, wanted"
            ),
        ):
            encode_image(array, ".png")


def test_16_bits_need_png_or_tiff() -> None:
    with pytest.raises(InputError, match=r"(?s)\.jpg cannot hold 16 bits.*use \.png or \.tif"):
        encode_image(np.zeros((4, 5), np.uint16), ".jpg")


def test_size_limits_of_a_file_type(capfd: pytest.CaptureFixture[str]) -> None:
    for suffix, width in [(".jpg", 65501), (".webp", 16384)]:
        with case(suffix, width):
            with pytest.raises(InputError, match=rf"cannot encode {width} x 1 pixels as \{suffix}"):
                encode_image(np.zeros((1, width, 3), np.uint8), suffix)
            assert capfd.readouterr().err == ""


def test_written_file_is_whole_replaced_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    for data in (b"first, longer", b"second"):
        write_atomic(str(path), data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]
    reference = tmp_path / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode  # the umask's, not a temporary's 0600


def test_missing_folder_file_as_folder_and_folder_as_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)folder .*no does not exist.*fix: mkdir -p .*no"):
        write_atomic(tmp_path / "no" / "out.bin", b"")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file, wanted a folder"):
        write_atomic(tmp_path / "file" / "out.bin", b"")
    with pytest.raises(InputError, match="is a folder, wanted a file name"):
        write_atomic(tmp_path, b"")


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (PermissionError(13, "Permission denied"), InputError, "(?s)cannot be written: Perm.*fix"),
        (OSError(28, "No space left on device"), InputError, "cannot be written: No space left"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_failure_keeps_the_old_file_and_removes_the_temporary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    match: str,
) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(len(list(tmp_path.iterdir())))
        raise error

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(raised, match=match):
        write_atomic(path, b"new")
    assert seen == [2]  # the temporary was there
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
