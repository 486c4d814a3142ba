"""The headers of TIFF, BMP, PNM, PAM and Sun raster files."""

from __future__ import annotations

import re

from runtime.errors import InputError
from runtime.pictures import tiff
from runtime.pictures.limits import FREE_PIXELS, File, Header

# The most bytes that one byte of a TIFF compression decodes to. The compressions are: 1 none, 5 LZW
# (codes of 12 bits for up to 4096 bytes), 7 JPEG (at least one bit for 64 values of up to two
# bytes), 8 and 32946 deflate, 32773 PackBits (two bytes repeat one 128 times).
_TIFF_SHRINK = {1: 1, 5: 2731, 7: 1024, 8: 1032, 32773: 64, 32946: 1032}
_CCITT = (2, 3, 4)  # fax compressions; G4 has at least one bit for each row
_TEXT = 2**16  # the header of a PNM or PAM file ends within so many bytes


def read_tiff(file: File) -> Header:
    """Read the header of the first picture of a TIFF file.

    A tile is decoded as a whole, so tiles count with the part outside the picture.

    Raises
    ------
    InputError : the picture or its tiles have too many pixels, too few bytes, other values than
        8 or 16 bits, or a compression that OpenCV does not read.
    """
    found = tiff.directory(file.data)
    value = found.value
    if tiff.WIDTH not in found.tags or tiff.HEIGHT not in found.tags:
        raise file.damaged("it states no size")
    height, width = file.size(value(tiff.HEIGHT, 0), value(tiff.WIDTH, 0))
    channels, compression = value(tiff.SAMPLES), value(tiff.COMPRESSION)
    photometric = value(tiff.PHOTOMETRIC, -1)
    if photometric in (32844, 32845):  # SGI LogL and LogLuv
        raise file.unsuited("float32")
    why, fix = tiff.problem(found)
    if why:
        raise InputError(f"{file.name} {why}", fix=fix)
    rows, columns = height, width
    if tiff.TILE_WIDTH in found.tags or tiff.TILE_HEIGHT in found.tags:
        tile = file.size(value(tiff.TILE_HEIGHT, 0), value(tiff.TILE_WIDTH, 0))
        rows, columns = (-(-s // t) * t for s, t in zip((height, width), tile, strict=True))
    bits = value(tiff.BITS)
    if compression in _CCITT:
        if rows * columns > FREE_PIXELS:
            file.wants(rows // 8)
    else:
        stored = rows * columns * (1 if photometric == 6 else channels) * bits // 8
        if compression == 1:
            file.wants(stored)
        elif rows * columns > FREE_PIXELS:
            file.wants(stored // _TIFF_SHRINK[compression])
    alpha = found.extra > 0 and value(tiff.EXTRA, 0) in (tiff.MULTIPLIED, tiff.STRAIGHT)
    return Header("TIFF", height, width, bits, channels, alpha, found.orientation)


def read_bmp(file: File) -> Header:
    """Read the header of a BMP file of any version. A negative height means top to bottom.

    Run lengths may leave out pixels; a large picture must state its pixels nevertheless.

    Raises
    ------
    InputError : the picture has too many pixels or too few bytes.
    """

    def signed(start: int) -> int:
        return (file.uint(start, 4, "little") ^ 2**31) - 2**31

    version = file.uint(14, 4, "little")
    if version == 12:
        stated = file.uint(20, 2, "little"), file.uint(18, 2, "little")
        bits, compression = file.uint(24, 2, "little"), 0
    else:
        stated = abs(signed(22)), signed(18)
        bits, compression = file.uint(28, 2, "little"), file.uint(30, 4, "little")
    height, width = file.size(*stated)
    if bits not in (1, 2, 4, 8, 16, 24, 32):
        raise file.damaged(f"it states {bits} bits per pixel")
    if compression in (1, 2):  # run lengths: two bytes state 255 pixels
        file.holds(height * width, 255 / 2)
    else:
        row = -(-width * bits // 32) * 4
        file.wants(file.uint(10, 4, "little") + row * (height - 1) + -(-width * bits // 8))
    masks = version >= 56 or (version >= 40 and compression == 6)
    alpha = bits == 32 and masks and file.uint(66, 4, "little") > 0
    channels = 1 if bits <= 8 else 3 + (bits == 32)
    return Header("BMP", height, width, min(bits, 8), channels, alpha)


def read_pnm(file: File) -> Header:
    """Read the header of a PBM, PGM or PPM file, "P1" to "P6".

    Raises
    ------
    InputError : the header is damaged, or the picture has too many pixels or too few bytes.
    """
    kind = file.data[1] - ord("0")
    numbers, position = [], 2
    for _ in range(2 if kind in (1, 4) else 3):
        number = re.compile(rb"(?:[\t-\r ]|#[^\r\n]*[\r\n])*([0-9]+)").match(
            file.data[:_TEXT], position
        )
        if not number:
            raise file.damaged("its header must consist of numbers")
        numbers.append(_integer(number[1]))
        position = number.end()
    height, width = file.size(numbers[1], numbers[0])
    channels, maximum = 3 if kind in (3, 6) else 1, (*numbers, 1)[2]
    if not 1 <= maximum <= 65535:
        raise file.damaged(f"its largest value is {maximum}, wanted 1 to 65535")
    bits = 1 if kind in (1, 4) else 8 if maximum < 256 else 16
    values = height * width * channels
    if kind == 4:
        file.wants(position + 1 + height * -(-width // 8))
    elif kind >= 5:
        file.wants(position + 1 + values * bits // 8)
    else:  # numbers in decimal, with a space between two of them
        file.wants(position + values * (1 if kind == 1 else 2))
    if maximum == 2**bits - 1 or (kind <= 3 and bits == 8):  # OpenCV scales 8 bits in decimal
        maximum = 0
    return Header("PNM", height, width, bits, channels, maximum=maximum)


def read_pam(file: File) -> Header:
    """Read the header of a PAM file, "P7".

    Raises
    ------
    InputError : the header is damaged, or the picture has too many pixels, too few bytes or more
        than 4 channels.
    """
    end = re.search(rb"[\r\n]ENDHDR[\r\n]", file.data[:_TEXT])
    if not end:
        raise file.damaged("its header has no line ENDHDR")
    fields: dict[bytes, bytes] = {}
    for line in re.split(rb"[\r\n]+", file.data[: end.start()]):
        key, _, text = line.strip().partition(b" ")
        if key in fields and key != b"TUPLTYPE":
            raise file.damaged("its header states a field twice")
        fields[key] = text.strip()
    names = (b"HEIGHT", b"WIDTH", b"DEPTH", b"MAXVAL")
    if not all(fields.get(name, b"").isdigit() for name in names):
        raise file.damaged("its header must state HEIGHT, WIDTH, DEPTH and MAXVAL")
    numbers = [_integer(fields[name]) for name in names]
    (height, width), (channels, maximum) = file.size(*numbers[:2]), numbers[2:]
    if not (1 <= channels <= 4 and 1 <= maximum <= 65535):
        raise file.damaged(f"its depth is {channels} and its largest value {maximum}")
    bits = 8 if maximum < 256 else 16
    file.wants(end.end() + height * width * channels * bits // 8)
    maximum = 0 if maximum == 2**bits - 1 else maximum
    return Header("PAM", height, width, bits, channels, channels in (2, 4), 1, maximum)


def _integer(digits: bytes) -> int:
    """Return the number that digits state; 10**10 stands for all larger ones."""
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= 10 else 10**10


def read_sun_raster(file: File) -> Header:
    """Read the header of a Sun raster file.

    Raises
    ------
    InputError : the picture has too many pixels or too few bytes.
    """
    width, height, bits, _, encoding, _, palette = (file.uint(at, 4) for at in range(4, 32, 4))
    height, width = file.size(height, width)
    if bits not in (1, 8, 24, 32):
        raise file.damaged(f"it states {bits} bits per pixel")
    if encoding == 2:  # run lengths: three bytes state 256
        file.holds(height * width * bits // 8, 256 / 3)
    else:
        file.wants(32 + palette + height * -(-width * bits // 16) * 2)
    return Header("Sun raster", height, width, min(bits, 8), -(-bits // 8))
