"""The headers of JPEG 2000 files: boxes around a codestream, or the codestream alone."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.errors import InputError
from runtime.pictures.limits import FREE_PIXELS, File, Header

# OpenJPEG allocates about 10 kB for each tile, 2 kB for each precinct and 0.4 kB for each code
# block before it decodes. So many of each are allowed whatever the size of the picture is, and one
# more for each so many pixels. Code blocks of 64 x 64 pixels, the usual size, are always allowed.
_FREE_TILES, _FREE_PRECINCTS, _FREE_BLOCKS = 256, 2**12, 2**17
# The second bytes of the markers that OpenJPEG knows in a header. It searches an unknown marker for
# known ones, which a walk by lengths would not see.
_MARKERS = frozenset(
    b"\x50\x52\x53\x55\x57\x58\x59\x5c\x5d\x5e\x5f\x60\x61\x63\x64\x74\x75\x77\x78\x90\x93"
)
_TILE_PIXELS, _PRECINCT_PIXELS, _BLOCK_PIXELS = 2**10, 2**10, 2**12
_BLOCK_BYTES = 4  # one more code block is allowed for each so many bytes of coded data


def boxes(file: File, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the start and the end of the content of each box between two positions.

    Raises
    ------
    InputError : a box ends behind the end of the file or of the box around it.
    """
    while start + 8 <= end:
        length, kind, body = file.uint(start, 4), file.data[start + 4 : start + 8], start + 8
        if length == 1:
            length, body = file.uint(body, 8), body + 8
        stop = start + length if length else end
        file.wants(stop)
        if not body <= stop <= end:
            raise file.damaged("the length of a box is wrong")
        yield kind, body, stop
        start = stop


def read_jpeg2000(file: File) -> Header:
    """Read the header of a JPEG 2000 file.

    A picture of one colour needs 200 bytes, so the file has no least size, but a decoder allocates
    memory for each tile, precinct and code block, so their numbers are limited.

    Raises
    ------
    InputError : the picture has too many pixels, tiles, precincts, code blocks or channels, no
        coded data, or values of more than 16 bits or below 0.
    """
    if file.data[:4] == b"\xff\x4f\xff\x51":
        return _codestream(file, 0, None)
    alpha: bool | None = None
    for kind, start, end in boxes(file, 0, len(file.data)):
        if kind == b"jp2h":
            for inner, body, last in boxes(file, start, end):
                if inner == b"ihdr":
                    file.size(file.uint(body, 4), file.uint(body + 4, 4))
                elif inner == b"pclr" and file.uint(body + 2, 1) > 4:  # OpenJPEG allocates them all
                    raise file.damaged("its palette has more than 4 channels")
                elif inner == b"cdef":  # channels: number, type (1 and 2 are alpha), place
                    count = min(file.uint(body, 2), (last - body - 2) // 6)
                    types = (file.uint(body + 4 + 6 * i, 2) for i in range(count))
                    alpha = any(word in (1, 2) for word in types)
        elif kind == b"jp2c":
            return _codestream(file, start, alpha)
    raise file.damaged("it contains no codestream")


def _codestream(file: File, start: int, alpha: bool | None) -> Header:
    """Read the codestream at ``start``; ``alpha`` is what the boxes say, or None."""
    body = start + 6  # behind the markers SOC and SIZ and the length
    if file.data[start : start + 4] != b"\xff\x4f\xff\x51":
        raise file.damaged("its codestream does not begin with a size")
    right, bottom, left, top, *tile = (file.uint(body + at, 4) for at in range(2, 34, 4))
    height, width = file.size(bottom - top, right - left)
    tile_width, tile_height, tile_left, tile_top = tile
    channels, bits = file.uint(body + 34, 2), (file.uint(body + 36, 1) & 0x7F) + 1
    if not 1 <= channels <= 4:
        raise InputError(
            f"{file.name} has {channels} channels per pixel, wanted 1 to 4",
            fix="select the channels and pass the array",
        )
    signed = file.uint(body + 36, 1) > 0x7F
    if signed or bits > 16:
        raise file.unsuited(f"{'int' if signed else 'uint'}{bits}")
    if not tile_width or not tile_height:
        raise file.damaged("its tiles have no size")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _FREE_TILES + height * width // _TILE_PIXELS:
        raise file.damaged(f"it has {tiles} tiles for {width} x {height} pixels")
    if height * width > FREE_PIXELS:
        file.wants(14 * tiles)  # each tile has at least the markers SOT and SOD
    styles, coded = _coding_styles(file, body + 36 + 3 * channels)
    for style in styles:
        _check_style(file, style, (height, width, channels), coded)
    if not coded:
        raise file.damaged("its tiles contain no data")
    return Header(
        "JPEG 2000", height, width, bits, channels, channels in (2, 4) if alpha is None else alpha
    )


def _coding_styles(file: File, position: int) -> tuple[set[bytes], int]:
    """Return the coding styles of the picture, its tiles and its channels, from their levels on,
    and the number of bytes of coded data."""
    data, tile_end, coded = file.data, 0, 0
    styles: set[bytes] = set()
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xD9:
        marker, length = data[position + 1], file.uint(position + 2, 2)
        body, end = position + 4, position + 2 + length
        if marker not in _MARKERS or len(styles) > 64:
            raise file.damaged(f"it contains the marker {marker:02X} in a wrong place")
        if marker == 0x93:  # the data of a part of a tile
            body -= 2  # this marker has no length
            end = max(tile_end, body)
            coded += min(end, len(data)) - body
        elif length < 2:
            raise file.damaged("the length of a marker is too small")
        elif marker == 0x90:  # a part of a tile begins
            size = file.uint(body + 2, 4)
            tile_end = position + size if size else len(data) - 2  # without the end marker
        elif marker == 0x52:
            styles.add(data[body : body + 1] + data[body + 5 : end])
        elif marker == 0x53:  # of one channel
            styles.add(data[body + 1 : end])
        position = end
    return styles, coded


def _check_style(file: File, style: bytes, shape: tuple[int, int, int], coded: int) -> None:
    """Check the numbers of precincts and code blocks of a picture of ``shape``, which is (height,
    width, channels), with ``coded`` bytes of coded data. The bytes of ``style`` are: flags, levels,
    exponents of the width and height of a code block minus 2, two others, and exponents of the
    precincts."""
    height, width, channels = shape
    if len(style) < 6:
        raise file.damaged("a coding style is too short")
    levels, block = style[1], 4 + (style[2] & 15) + (style[3] & 15)
    if levels > 32 or block > 12:
        raise file.damaged(f"it states {levels} levels and code blocks of 2**{block} pixels")
    sizes = style[6 : 7 + levels] if style[0] & 1 else b""
    precincts = 0
    for level, size in zip(range(levels, -1, -1), sizes, strict=False):
        rows, columns = -(-height >> level), -(-width >> level)
        precincts += -(-rows >> (size >> 4)) * -(-columns >> (size & 15))
    values = height * width * channels
    # The data of a precinct begin with a header of at least one byte.
    if precincts * channels > _FREE_PRECINCTS + min(values // _PRECINCT_PIXELS, coded):
        raise file.damaged(f"it has {precincts} precincts for {width} x {height} pixels")
    blocks = (-(-height >> (style[3] & 15) + 2)) * (-(-width >> (style[2] & 15) + 2)) * channels
    if blocks > _FREE_BLOCKS + values // _BLOCK_PIXELS + coded // _BLOCK_BYTES:
        raise file.damaged(f"it has code blocks of {2**block} pixels, and {coded} bytes of data")
