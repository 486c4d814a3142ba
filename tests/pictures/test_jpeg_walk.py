"""The walk over JPEG files agrees with libjpeg about which files lack blocks."""

import itertools
import re

import cv2
import numpy as np
import pytest
from cases import case

from runtime.device.choose import module_of

walk = module_of("cpu").walk_jpeg

SAMPLINGS = {  # of OpenCV's option: the blocks of one MCU, and its size in pixels
    0x411111: (6, 32, 8),
    0x221111: (6, 16, 16),
    0x211111: (4, 16, 8),
    0x121111: (4, 8, 16),
    0x111111: (3, 8, 8),
}
BLOCKS = "a part of its picture data is missing"
END = "its end marker is missing"
HEADER = "its header is damaged"
TABLE = "a Huffman table is missing or damaged"
NOTHING = "it contains no picture data"
CHANNEL = "a colour channel is missing"
CODE = "its picture data contains a wrong code"


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(array, sampling=0x221111, quality=90, restart=0, optimised=0, progressive=0):
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: sampling,
        cv2.IMWRITE_JPEG_RST_INTERVAL: restart,
        cv2.IMWRITE_JPEG_OPTIMIZE: optimised,
        cv2.IMWRITE_JPEG_PROGRESSIVE: progressive,
    }
    values = [value for pair in options.items() for value in pair]
    return cv2.imencode(".jpg", array, values)[1].tobytes()


def segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def coded_data(data):
    """The position behind the header of the first scan."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def restarts(data):
    """The positions of the restart markers."""
    start = coded_data(data)
    pairs = zip(range(start, len(data)), data[start:], data[start + 1 :], strict=False)
    return [n for n, a, b in pairs if a == 0xFF and 0xD0 <= b <= 0xD7]


@pytest.fixture
def libjpeg(capfd):
    """A function that decodes with OpenCV and returns what libjpeg prints."""

    def decode(data):
        capfd.readouterr()
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
        return capfd.readouterr().err

    return decode


def whole(data):
    result = walk(data)
    return result.problem == "" and result.found == result.wanted > 0


# Whole files


def test_every_option_of_the_encoder():
    sizes = [(1, 1), (7, 33), (8, 8), (16, 17), (31, 64), (70, 69)]
    for options in itertools.product(sizes, SAMPLINGS, (0, 1, 5), (0, 1), (1, 50, 95, 100)):
        (height, width), sampling, restart, optimised, quality = options
        with case(str(options)):
            result = walk(encode(picture(height, width), sampling, quality, restart, optimised))
            blocks, wide, high = SAMPLINGS[sampling]
            mcus = -(-width // wide) * -(-height // high)
            assert (result.coding, result.problem) == ("sequential", "")
            assert (result.width, result.height) == (width, height)
            assert result.found == result.wanted == blocks * mcus


def test_grey_files():
    for height, width in itertools.product((1, 8, 9, 70), repeat=2):
        with case(f"{height}x{width}"):
            result = walk(encode(picture(height, width)[..., 0]))
            assert result.found == result.wanted == -(-height // 8) * -(-width // 8)
            assert result.problem == ""


def three_scans():
    """A picture of three channels and a scan for each, made of three grey files; the scans."""
    files = [encode(picture(20, 30, seed)[..., 0]) for seed in range(3)]
    head = files[0][: files[0].index(b"\xff\xda")]
    frame = head.index(b"\xff\xc0")
    size = head[frame + 4 : frame + 9]  # the precision, the height and the width
    channels = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = head[:frame] + segment(0xC0, size + b"\3" + channels) + head[frame + 13 :]
    scans = []
    for number, data in enumerate(files, 1):
        scan = bytearray(data[data.index(b"\xff\xda") : -2])
        scan[5] = number
        scans.append(bytes(scan))
    return head, scans


def test_a_scan_for_each_channel(libjpeg):
    head, scans = three_scans()
    data = head + b"".join(scans) + b"\xff\xd9"
    assert libjpeg(data) == ""
    result = walk(data)
    assert (result.problem, result.found, result.wanted) == ("", 36, 36)


def test_a_channel_without_a_scan():
    head, scans = three_scans()
    result = walk(head + b"".join(scans[:2]) + b"\xff\xd9")
    assert (result.problem, result.found, result.wanted) == (CHANNEL, 24, 36)


def test_a_scan_that_ends_early(libjpeg):
    head, scans = three_scans()
    for number in range(3):
        with case(f"scan {number}"):
            cut = [scan[:-30] if n == number else scan for n, scan in enumerate(scans)]
            data = head + b"".join(cut) + b"\xff\xd9"
            assert "premature end" in libjpeg(data)
            result = walk(data)
            assert result.problem == BLOCKS
            assert result.found < result.wanted == 36


def test_a_frame_of_motion_jpeg_has_no_huffman_tables(libjpeg):
    data = encode(picture(40, 50))
    start, end = data.index(b"\xff\xc4"), data.index(b"\xff\xda")
    data = data[:start] + data[end:]
    assert libjpeg(data) == ""
    assert whole(data)


def test_what_legal_files_may_contain(libjpeg):
    data = encode(picture(40, 50), restart=2)
    start = data.index(b"\xff\xdb")
    thumbnail = segment(0xE1, b"Exif\0\0" + encode(picture(8, 8)))
    filled = data
    for marker in (b"\xff\xc0", b"\xff\xda", b"\xff\xd0", b"\xff\xd1", b"\xff\xd9"):
        filled = filled.replace(marker, b"\xff\xff\xff" + marker)
    tables = data[data.index(b"\xff\xc4") : data.index(b"\xff\xda")]
    legal = {
        "thumbnail": data[:start] + thumbnail + data[start:],
        "comment": data[:start] + segment(0xFE, b"\xff\xd9\xff\xda") + data[start:],
        "fill bytes": filled,
        "tables twice": data[:start] + tables + data[start:],
        "second picture": data + encode(picture(8, 8))[:-10],
        "bytes behind the end": data + b"\xff\xd8\xff\xda" + bytes(100),
    }
    for name, file in legal.items():
        with case(name):
            assert libjpeg(file) == ""
            assert whole(file)


def test_other_kinds_of_coding():
    progressive = encode(picture(40, 50), progressive=1)
    baseline = encode(picture(40, 50))
    kinds = {
        "progressive": progressive,
        "arithmetic": baseline.replace(b"\xff\xc0", b"\xff\xc9"),
        "lossless": baseline.replace(b"\xff\xc0", b"\xff\xc3"),
        "other": baseline.replace(b"\xff\xc0", b"\xff\xc5"),
    }
    for name, data in kinds.items():
        with case(name):
            result = walk(data)
            assert (result.coding, result.problem) == (name, "")
            assert (result.width, result.height) == (50, 40)
            assert (result.found, result.wanted) == (0, 0)
            if name != "other":
                assert walk(data[:-2]).problem == END


def test_a_height_behind_the_scan_is_not_read():
    """libjpeg does not read such files either."""
    data = bytearray(encode(picture(40, 50)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = b"\0\0"
    assert (walk(data).coding, walk(data).problem) == ("other", "")


# Damaged files


@pytest.mark.parametrize("restart", [0, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cut_file_with_an_end_marker(libjpeg, sampling, restart):
    data = encode(picture(37, 51), sampling, 60, restart)
    refused = 0
    for cut in range(coded_data(data), len(data) - 1, 7):
        with case(f"cut at {cut}"):
            file = data[:cut] + b"\xff\xd9"
            result = walk(file)
            missing = bool(re.search("premature end|instead of RST", libjpeg(file)))
            assert (result.problem == BLOCKS) == missing == (result.found < result.wanted)
            refused += missing
    assert refused > 20


def test_every_beginning_of_a_file_is_refused():
    for data in (encode(picture(9, 9), restart=1), encode(picture(9, 9), progressive=1)):
        for cut in range(len(data) - 1):
            with case(f"{cut} of {len(data)} bytes"):
                assert walk(data[:cut]).problem in (END, HEADER)


def test_files_with_wrong_bytes_agree_with_libjpeg(capfd):
    """libjpeg prints its first warning only, so files with another first warning prove nothing."""
    rng = np.random.default_rng(0)
    missing = fine = 0
    for number in range(1500):
        data = bytearray(encode(picture(*rng.integers(1, 60, 2)), *rng.choice([*SAMPLINGS], 1)))
        for place in rng.integers(coded_data(data), len(data) - 2, rng.integers(1, 3)):
            data[place] = rng.integers(0, 255)
        capfd.readouterr()
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        printed = capfd.readouterr().err
        with case(f"file {number}: {printed}"):
            if "premature end" in printed:
                missing += 1
                assert walk(data).problem == BLOCKS
            elif not printed:
                fine += 1
                assert walk(data).problem in ("", CODE)
    assert missing > 20
    assert fine > 100


def test_lost_repeated_and_changed_restart_markers():
    data = encode(picture(40, 50), restart=2)
    first, second, third = restarts(data)[:3]
    wanted = walk(data).wanted
    cases = {  # the intervals that libjpeg loses
        "one interval removed": (data[:first] + data[second:], 1),
        "two intervals removed": (data[:first] + data[third:], 2),
        "lost": (data[:second] + data[second + 2 :], 1),
        "repeated": (data[:second] + data[second : second + 2] + data[second:], 1),
        "a number far away": (data[: second + 1] + b"\xd5" + data[second + 2 :], 0),
        "no marker": (data[: second + 1] + b"\x05" + data[second + 2 :], 1),
        "a marker of a segment": (data[: second + 1] + b"\xe5" + data[second + 2 :], None),
    }
    for name, (file, lost) in cases.items():
        with case(name):
            result = walk(file)
            assert result.problem == (BLOCKS if lost != 0 else "")
            if lost is None:  # the scan ends there
                assert result.found == 2 * 2 * 6
            else:
                assert result.found == wanted - lost * 2 * 6


def test_restart_intervals_in_any_order_are_found_as_by_libjpeg():
    """libjpeg fills the second and third block of an interval that it does not find with 128."""
    rng = np.random.default_rng(0)
    data = encode(picture(48, 64)[..., 0], restart=3)
    places = [coded_data(data) - 2, *restarts(data), len(data) - 2]
    head, first = data[: places[0] + 2], data[places[0] + 2 : places[1]]
    intervals = [data[a:b] for a, b in itertools.pairwise(places[1:])]
    lost = set()
    for number in range(300):
        chosen = intervals.copy()
        for _ in range(rng.integers(1, 4)):
            place, other = rng.integers(0, len(chosen), 2)
            edit = rng.integers(0, 4)
            if edit == 0:
                del chosen[place]
            elif edit == 1:
                chosen.insert(other, chosen[place])
            elif edit == 2:
                chosen[place], chosen[other] = chosen[other], chosen[place]
            else:
                chosen[place] = bytes([0xFF, rng.integers(0xC0, 0xE0)]) + chosen[place][2:]
        file = head + first + b"".join(chosen) + b"\xff\xd9"
        decoded = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_GRAYSCALE)
        if decoded is None:  # a number of 0xc0 to 0xcf made a header
            continue
        blocks = decoded.reshape(6, 8, 8, 8).swapaxes(1, 2).reshape(16, 3, 64)
        with case(f"file {number}"):
            result = walk(file)
            assert result.found == 3 * (blocks[:, 1] != 128).any(1).sum()
            assert (result.problem == BLOCKS) == (result.found < 48)
        lost.add(48 - result.found)
    assert len(lost) > 8


def test_bytes_before_a_marker_are_no_missing_data(libjpeg):
    data = encode(picture(40, 50))
    file = data[:-2] + bytes(range(1, 21)) + data[-2:]
    assert "extraneous" in libjpeg(file)
    assert whole(file)


def test_a_code_that_is_in_no_table(libjpeg):
    data = encode(picture(8, 8)[..., 0])
    file = data[: coded_data(data)] + b"\xff\x00" * 5 + b"\xff\xd9"  # a code never has ones only
    assert "bad Huffman code" in libjpeg(file)
    result = walk(file)
    assert (result.problem, result.found, result.wanted) == (CODE, 1, 1)


def test_damaged_headers():
    data = encode(picture(40, 50))
    frame, scan, table = (data.index(bytes([0xFF, m])) for m in (0xC0, 0xDA, 0xC4))

    def changed(place, value):
        return data[:place] + bytes([value]) + data[place + 1 :]

    cases = {
        "no JPEG": (b"GIF89a", HEADER),
        "empty": (b"", HEADER),
        "two frames": (data[:scan] + data[frame : frame + 19] + data[scan:], HEADER),
        "a second start": (data[:frame] + b"\xff\xd8" + data[frame:], HEADER),
        "a reserved marker": (data[:frame] + b"\xff\xf0\0\2" + data[frame:], HEADER),
        "an interval of 3 bytes": (data[:frame] + segment(0xDD, b"\0\0\1") + data[frame:], HEADER),
        "no width": (data[: frame + 7] + b"\0\0" + data[frame + 9 :], HEADER),
        "9 bits": (changed(frame + 4, 9), HEADER),
        "a wrong number of channels": (changed(frame + 9, 2), HEADER),
        "no sampling": (changed(frame + 11, 0), HEADER),
        "sampling of 5": (changed(frame + 11, 0x51), HEADER),
        "12 blocks in an MCU": (changed(frame + 11, 0x44), HEADER),
        "an unknown channel": (changed(scan + 5, 9), HEADER),
        "a channel twice": (changed(scan + 7, 1), HEADER),
        "no channels in a scan": (changed(scan + 4, 0), HEADER),
        "a scan before the frame": (data[:frame] + data[frame + 19 :], HEADER),
        "an undefined table": (changed(scan + 6, 0x22), TABLE),
        "a table of number 9": (changed(scan + 6, 0x99), TABLE),
        "too many codes": (changed(table + 5, 3), TABLE),
        "a definition of number 4": (changed(table + 4, 4), TABLE),
        "a DC code of 16 bits": (changed(table + 21, 16), TABLE),
        "no scan": (data[:scan] + b"\xff\xd9", NOTHING),
        "no frame": (b"\xff\xd8\xff\xd9", NOTHING),
    }
    for name, (file, problem) in cases.items():
        with case(name):
            assert walk(file).problem == problem


def test_progressive_scans_of_one_channel_only():
    data = encode(picture(40, 50), progressive=1)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    assert walk(data[:first] + data[second:]).problem == CHANNEL  # without the DC coefficients


def test_a_small_file_of_a_huge_picture_ends_at_once():
    """Neither the blocks nor the restart intervals that are missing cost time."""
    data = bytearray(encode(picture(8, 8), restart=1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    result = walk(data)
    assert result.problem == BLOCKS
    assert (result.found, result.wanted) == (6, 4096 * 4096 * 6)


def test_buffers():
    data = encode(picture(40, 50))
    array = np.frombuffer(data, np.uint8)
    assert all(whole(buffer) for buffer in (data, bytearray(data), memoryview(data), array))
    with pytest.raises(ValueError, match="no contiguous buffer of bytes"):
        walk(array[::2])
    with pytest.raises(ValueError, match="no contiguous buffer of bytes"):
        walk(np.zeros(8, np.float32))
