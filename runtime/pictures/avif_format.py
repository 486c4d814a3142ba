"""The headers of AVIF files: boxes that describe pictures, which are AV1 frames."""

from __future__ import annotations

from typing import NamedTuple

from runtime.pictures.jpeg2000_format import boxes
from runtime.pictures.limits import File, Header

_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0")
# The EXIF orientation of a turn by so many quarters to the left, without and with a flip after it.
_TURNED = ({0: 1, 1: 8, 2: 3, 3: 6}, {0: 4, 1: 5, 2: 2, 3: 7})
# libavif takes a time that grows with the square of the number of items, 15 s for 60,000. A grid of
# 16384 x 16384 pixels with an alpha channel has 8192 items if its cells have 256 x 256 pixels.
_ITEMS = 2**13 + 256


class _Item(NamedTuple):
    """One item of a file: a picture, a grid of pictures, or metadata."""

    kind: bytes
    start: int  # of its data, or 0
    properties: list[tuple[bytes, int, int]]  # boxes: kind, start and end


def read_avif(file: File) -> Header:
    """Read the header of an AVIF file.

    libavif scales a frame to the size that the boxes state, so the frame may not be smaller. A
    picture of one colour needs 300 bytes, so the file has no least size.

    Raises
    ------
    InputError : a picture has too many pixels, its frame is smaller, or the file has too many
        items.
    """
    header, animation = None, file.data[8:12] == b"avis"
    for kind, start, end in boxes(file, 0, len(file.data)):
        if kind == b"meta":
            header = _read_meta(file, start + 4, end)
        elif kind == b"moov":
            for track, first, last in boxes(file, start, end):
                if track == b"trak":
                    found = _read_track(file, first, last)
                    header = found if animation and found and not header else header
    if header is None:
        raise file.damaged("it contains no picture")
    return header


def _read_meta(file: File, start: int, end: int) -> Header:
    """Check the pictures that a box "meta" describes; return the header of the primary one."""
    found = {kind: (first, last) for kind, first, last in boxes(file, start, end)}
    if not found.keys() >= {b"pitm", b"iinf", b"iloc", b"iprp"}:
        raise file.damaged("a box is missing")
    primary = file.uint(found[b"pitm"][0] + 4, 4 if file.uint(found[b"pitm"][0], 1) else 2)
    items = _items(file, found)
    alpha, frames = False, set[tuple[int, tuple[int, int] | None]]()
    for item in items.values():
        size = None
        for kind, first, last in item.properties:
            if kind == b"ispe":
                size = file.size(file.uint(first + 8, 4), file.uint(first + 4, 4))
            elif kind == b"auxC":
                alpha |= file.data[first + 4 : last].startswith(_ALPHA)
        if item.kind == b"av01" and item.start:
            frames.add((item.start, size))
    for start, size in frames:
        _check_frame(file, start, size)
    if primary not in items:
        raise file.damaged("it contains no picture")
    return _header(file, items[primary], alpha)


def _header(file: File, item: _Item, alpha: bool) -> Header:
    """Return the header of the primary item."""
    boxes_of = {kind: start for kind, start, _ in reversed(item.properties)}
    if b"ispe" not in boxes_of:
        raise file.damaged("it states no size")
    height, width = file.uint(boxes_of[b"ispe"] + 8, 4), file.uint(boxes_of[b"ispe"] + 4, 4)
    bits, channels = 8, 3
    if b"av1C" in boxes_of:
        flags = file.uint(boxes_of[b"av1C"] + 2, 1)
        bits, channels = _bits(flags), 1 if flags & 0x10 else 3
    elif b"pixi" in boxes_of:  # a grid states the channels and their bits
        channels, bits = file.uint(boxes_of[b"pixi"] + 4, 1), file.uint(boxes_of[b"pixi"] + 5, 1)
    quarters = file.uint(boxes_of[b"irot"], 1) & 3 if b"irot" in boxes_of else 0
    flip = b"imir" in boxes_of
    if flip and file.uint(boxes_of[b"imir"], 1) & 1:  # left to right: half a turn, then top down
        quarters = (quarters + 2) % 4
    return Header("AVIF", height, width, bits, channels + alpha, alpha, _TURNED[flip][quarters])


def _items(file: File, found: dict[bytes, tuple[int, int]]) -> dict[int, _Item]:
    """Return the items of a file by their numbers."""
    kinds: dict[int, bytes] = {}
    start, end = found[b"iinf"]
    first = start + (6 if file.uint(start, 1) == 0 else 8)
    for number, (kind, body, _) in enumerate(boxes(file, first, end), 1):
        _check_items(file, number)
        version = file.uint(body, 1)
        if kind == b"infe" and version >= 2:
            wide = 4 if version > 2 else 2
            kinds[file.uint(body + 4, wide)] = file.data[body + 6 + wide : body + 10 + wide]
    starts, linked = _starts(file, found), _properties(file, *found[b"iprp"])
    return {
        number: _Item(kind, starts.get(number, 0), linked.get(number, []))
        for number, kind in kinds.items()
    }


def _check_items(file: File, count: int) -> None:
    """Refuse a file with more than _ITEMS items, or with so many entries about items."""
    if count > _ITEMS:
        raise file.damaged(f"it has more than {_ITEMS} items")


def _starts(file: File, found: dict[bytes, tuple[int, int]]) -> dict[int, int]:
    """Return where the data of each item begins: in the file, or in the box "idat"."""
    start, end = found[b"iloc"]
    inside = found.get(b"idat", (0, 0))[0]
    version, sizes = file.uint(start, 1), file.uint(start + 4, 2)
    wide = 4 if version == 2 else 2
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    index = index if version else 0
    count, position, starts = file.uint(start + 6, wide), start + 6 + wide, {}
    _check_items(file, count)
    for _ in range(count):
        if position >= end:
            raise file.damaged("the box iloc is too short")
        number, position, method = file.uint(position, wide), position + wide, 0
        if version:
            method, position = file.uint(position, 2) & 15, position + 2
        position += 2
        origin, extents = file.uint(position, base), file.uint(position + base, 2)
        position += base + 2
        if extents and method <= 1:
            starts[number] = origin + file.uint(position + index, offset) + method * inside
        position += extents * (index + offset + length)
    return starts


def _properties(file: File, start: int, end: int) -> dict[int, list[tuple[bytes, int, int]]]:
    """Return the properties of each item: the kind, the start and the end of a box."""
    known: list[tuple[bytes, int, int]] = []
    linked: dict[int, list[tuple[bytes, int, int]]] = {}
    for kind, first, last in boxes(file, start, end):
        if kind == b"ipco":
            known = list(boxes(file, first, last))
        elif kind == b"ipma":
            wide = 4 if file.uint(first, 1) else 2
            step = 2 if file.uint(first + 3, 1) & 1 else 1
            count, position = file.uint(first + 4, 4), first + 8
            _check_items(file, count)
            for _ in range(count):
                if position >= last:
                    raise file.damaged("the box ipma is too short")
                number, places = file.uint(position, wide), file.uint(position + wide, 1)
                position += wide + 1
                for _ in range(places):
                    place = file.uint(position, step) & (0x7FFF if step == 2 else 0x7F)
                    if 1 <= place <= len(known):
                        linked.setdefault(number, []).append(known[place - 1])
                    position += step
    return linked


def _read_track(file: File, start: int, end: int) -> Header | None:
    """Check the sizes that a track of an animation states; return its header if it has pictures."""
    size, coded, chunk, flags = None, None, 0, 0
    todo = [(start, end)]
    while todo:
        for kind, first, last in boxes(file, *todo.pop()):
            if kind in (b"mdia", b"minf", b"stbl"):
                todo.append((first, last))
            elif kind == b"tkhd":  # 16 bits behind the point
                size = file.size(file.uint(last - 4, 2), file.uint(last - 8, 2))
            elif kind == b"stsd" and file.data[first + 12 : first + 16] == b"av01":
                coded = file.size(file.uint(first + 42, 2), file.uint(first + 40, 2))
                place = file.data.find(b"av1C", first, last)
                flags = file.uint(place + 6, 1) if place > 0 else 0
            elif kind == b"stco":
                chunk = file.uint(first + 8, 4)
            elif kind == b"co64":
                chunk = file.uint(first + 8, 8)
    if not coded:
        return None
    if coded != size:
        raise file.damaged(f"a track states the sizes {size} and {coded}")
    if chunk:
        _check_frame(file, chunk, coded)
    return Header("AVIF", *coded, _bits(flags), 1 if flags & 0x10 else 3)


def _bits(flags: int) -> int:
    """Return the bits per channel; ``flags`` is the third byte of the box "av1C"."""
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _check_frame(file: File, start: int, size: tuple[int, int] | None) -> None:
    """Check that the sequence header of AV1 data states at least a size."""
    if size is None:
        raise file.damaged("a picture states no size")
    position = start
    for _ in range(4):
        flags = file.uint(position, 1)
        position += 2 if flags & 4 else 1
        length = shift = 0
        while flags & 2 and shift < 56:  # 7 bits in each byte, the least significant byte first
            byte = file.uint(position, 1)
            length, shift, position = length | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                break
        if flags >> 3 & 15 == 1:  # a sequence header
            height, width = file.size(*_sequence_size(file, position))
            if height < size[0] or width < size[1]:
                raise file.damaged(
                    f"it states {size[1]} x {size[0]} pixels, its frame {width} x {height}"
                )
            return
        position += length
    raise file.damaged("a picture does not begin with a sequence header")


def _sequence_size(file: File, position: int) -> tuple[int, int]:
    """Return (height, width) of a sequence header of AV1."""
    data = file.data[position : position + 1024].ljust(1024, b"\0")
    bits, at = int.from_bytes(data, "big"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (8 * len(data) - at) & ((1 << count) - 1)

    take(4)  # profile, still picture
    if take(1):  # the short form
        take(5)
    else:
        delay = 0
        has_model = False
        if take(1):  # timing
            take(64)
            if take(1):
                zeros = 0
                while not take(1) and zeros < 32:
                    zeros += 1
                take(zeros)
            has_model = bool(take(1))
            if has_model:
                delay = take(5) + 1
                take(42)
        has_display = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if has_model and take(1):
                take(2 * delay + 1)
            if has_display and take(1):
                take(4)
    wide, high = take(4) + 1, take(4) + 1
    width = take(wide) + 1
    return take(high) + 1, width
