"""Picture files that state a size, made byte by byte: headers, and as little data as wanted."""

import struct
import zlib

CODES = b"\x00\x01\x04\x04"  # GIF: clear, 0, end, in codes of 9 bits


def png_chunk(kind, body):
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *, chunks=b"", bits=8, colour=2, data=None):
    """Return a PNG file; ``chunks`` are written between the header and the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000) if data is None else data
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + chunks
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


def png_frame(width, height):
    """Return the chunk that states the size of a frame of an animation."""
    return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 10, 0, 0))


def jpeg(width, height, *, scans=1, frame=0xC0, data=b"\0" * 8, more=b""):
    """Return a grey JPEG file; each scan has ``data``."""
    stated = struct.pack(">HBHHBBBB", 11, 8, height, width, 1, 1, 0x11, 0)
    tables = b"\xff\xdb\0\x43\0" + b"\1" * 64
    for place in (b"\0", b"\x10"):
        tables += b"\xff\xc4\0\x14" + place + b"\1" + bytes(15) + b"\0"
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 63, 0) + data
    start = b"\xff\xd8" + tables + b"\xff" + bytes([frame]) + stated
    return start + more + scan * scans + b"\xff\xd9"


def gif(width, height, frame=(1, 1), *, data=CODES, flags=0):
    """Return a GIF file with one picture of ``frame``, as (width, height)."""
    blocks = b"".join(
        bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)
    )
    control = b"!\xf9\4" + bytes([flags]) + b"\0\0\0\0"
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + control
    return start + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x08" + blocks + b"\0;"


def bmp(width, height, *, bits=24, compression=0, data=b"\0\1", version=40):
    """Return a BMP file; the default data are the end of run lengths."""
    palette = bytes(4 << bits if bits <= 8 else 0)
    if version == 12:
        stated = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        stated = struct.pack("<IiiHHIIiiII", version, width, height, 1, bits, compression, *[0] * 5)
    stated = stated.ljust(version, b"\0")
    start = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + version + len(palette))
    return start + stated + palette + data


def tiff(width, height, tags=None, *, data=b"", order="<", big=False):
    """Return a TIFF file of one grey strip of ``data``; ``tags`` adds or replaces lists of numbers,
    or leaves a tag out that is None."""
    entries = {256: [width], 257: [height], 258: [8], 259: [1], 262: [1], 277: [1], 278: [height]}
    entries |= {273: [16], 279: [len(data)]} | (tags or {})
    entries = {tag: entries[tag] for tag in sorted(entries) if entries[tag] is not None}
    number, field = ("Q", 8) if big else ("I", 4)
    place = 16 + len(data)
    end, body, later = place + (16 + 20 * len(entries) if big else 6 + 12 * len(entries)), b"", b""
    for tag, values in entries.items():
        raw = struct.pack(f"{order}{len(values)}I", *values)
        if len(raw) > field:
            raw, later = struct.pack(order + number, end + len(later)), later + raw
        body += struct.pack(order + "HH" + number, tag, 4, len(values)) + raw.ljust(field, b"\0")
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    start += struct.pack(order + "HHQ", 8, 0, place) if big else struct.pack(order + "I", place)
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    return start.ljust(16, b"\0") + data + count + body + bytes(field) + later


def webp(*chunks):
    """Return a WebP file of (kind, body) pairs."""
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_canvas(width, height, flags=0):
    """Return the chunk that states the size of a canvas; flag 2 is an animation."""
    sizes = struct.pack("<II", width - 1, height - 1)
    return b"VP8X", bytes([flags, 0, 0, 0]) + sizes[:3] + sizes[4:7]


def webp_lossy(width, height):
    """Return the chunk of a lossy picture, without its data."""
    return b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(10)


def webp_lossless(width, height):
    """Return the chunk of a lossless picture of one colour."""
    sizes = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return b"VP8L", b"\x2f" + sizes + b"\x07\x10\x11\x11\x88\x88\x08\x08"


def webp_frame(width, height, inner):
    """Return the chunk of a frame of an animation; ``inner`` is its picture, a chunk."""
    sizes = struct.pack("<II", width - 1, height - 1)
    kind, data = inner
    data += b"\0" * (len(data) % 2)
    picture = kind + struct.pack("<I", len(data)) + data
    return b"ANMF", bytes(6) + sizes[:3] + sizes[4:7] + b"\x64\0\0\0" + picture


def jpeg2000(
    width,
    height,
    *,
    tile=None,
    channels=1,
    block=4,
    precincts=b"",
    levels=5,
    later=b"",
    data=bytes(100),
):
    """Return a codestream of JPEG 2000 with one tile-part: ``block`` is the exponent of the width
    of a code block minus 2, ``precincts`` a byte of two exponents for each level. ``later`` is
    written into the header of the tile, and ``data`` are its coded data."""
    tile = tile or (width, height)
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, *tile, 0, 0, channels)
    size += b"\7\1\1" * channels
    style = bytes([bool(precincts), 0, 0, 1, 0, levels, block, block, 0, 1]) + precincts
    steps = b"\x40" * (2 + 3 * levels)
    markers = b"".join(
        marker + struct.pack(">H", 2 + len(body)) + body
        for marker, body in ((b"\xff\x51", size), (b"\xff\x52", style), (b"\xff\x5c", steps))
    )
    size = 14 + len(later) + len(data)
    part = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, size, 0, 1) + later + b"\xff\x93" + data
    return b"\xff\x4f" + markers + part + b"\xff\xd9"


def box(kind, *parts):
    """Return a box of JPEG 2000, AVIF and MP4 files."""
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def jp2(width, height, codestream, *more):
    """Return a JPEG 2000 file: boxes that state a size, ``more`` boxes and a codestream."""
    size = box(b"ihdr", struct.pack(">IIHBBBB", height, width, 1, 7, 7, 0, 0))
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", size, *more) + box(b"jp2c", codestream)


def sequence_header(width, height):
    """Return AV1 data that consist of a sequence header in the short form."""
    bits = "000" + "1" + "1" + "00000" + f"{15:04b}" + f"{15:04b}"
    bits += f"{width - 1:016b}{height - 1:016b}"
    bits += "0" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big") + bytes(4)
    return b"\x0a" + bytes([len(body)]) + body


def avif(width, height, frame=None, *, inside=False, more=(), items=1):
    """Return an AVIF file: the boxes state a size, the AV1 data that of ``frame``. With ``inside``
    the data are in the box "idat". ``more`` are properties of the picture. ``items`` is the number
    of items, of which only the first has data."""
    data = sequence_header(*(frame or (width, height)))
    properties = [box(b"ispe", struct.pack(">III", 0, width, height)), box(b"av1C", b"\x81\0\0\0")]
    properties += more
    links = bytes([len(properties), *range(1, len(properties) + 1)])
    start = box(b"ftyp", b"avif\0\0\0\0avifmif1")

    def entry(item):
        return box(b"infe", b"\2\0\0\0", struct.pack(">HH", item, 0), b"av01\0")

    def meta(place):
        where = struct.pack(">HII", 1, place, len(data))  # the number of extents, the first one
        where = struct.pack(">HHH" if inside else ">HH", 1, *[1] * inside, 0) + where
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), struct.pack(">H", 1)),
            box(b"iloc", bytes([int(inside), 0, 0, 0]), b"\x44\0", struct.pack(">H", 1), where),
            box(b"iinf", bytes(4), struct.pack(">H", items), *map(entry, range(1, items + 1))),
            box(
                b"iprp",
                box(b"ipco", *properties),
                box(b"ipma", bytes(4), struct.pack(">I", 1), b"\0\1", links),
            ),
            box(b"idat", data) if inside else b"",
        )

    if inside:
        return start + meta(0)
    return start + meta(len(start) + len(meta(0)) + 8) + box(b"mdat", data)


def avif_track(width, height, coded, frame):
    """Return an AVIF animation: the track, its samples and its first frame state three sizes."""
    start = box(b"ftyp", b"avis\0\0\0\0avisavif")
    data = box(b"mdat", sequence_header(*frame))
    entry = box(
        b"av01", bytes(24), struct.pack(">HH", *coded), bytes(50), box(b"av1C", b"\x81\0\0\0")
    )
    table = box(
        b"stbl",
        box(b"stsd", bytes(4), struct.pack(">I", 1), entry),
        box(b"stco", bytes(4), struct.pack(">II", 1, len(start) + 8)),
    )
    head = box(b"tkhd", bytes(76), struct.pack(">HHHH", width, 0, height, 0))
    return start + data + box(b"moov", box(b"trak", head, box(b"mdia", box(b"minf", table))))


def pam(width, height, depth=3):
    """Return the header of a PAM file."""
    return b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH %d\nMAXVAL 255\nENDHDR\n" % (width, height, depth)


def sun_raster(width, height, bits=24, encoding=1):
    """Return the header of a Sun raster file."""
    return struct.pack(">8I", 0x59A66A95, width, height, bits, 0, encoding, 0, 0)
