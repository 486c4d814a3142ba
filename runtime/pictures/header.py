"""The header of a picture file: its format and its size, before OpenCV decodes the file."""

from __future__ import annotations

import re
from collections.abc import Callable

from runtime.errors import InputError
from runtime.pictures.avif_format import read_avif
from runtime.pictures.jpeg2000_format import read_jpeg2000
from runtime.pictures.limits import File, Header
from runtime.pictures.raw_formats import (
    read_bmp,
    read_pam,
    read_pnm,
    read_sun_raster,
    read_tiff,
)
from runtime.pictures.web_formats import read_gif, read_jpeg, read_png, read_webp

START = 256  # bytes of a file that show its format
_CONVERT = "convert it to PNG or JPEG"
_NO_PICTURE = "name a picture file; docs/pictures.md lists the formats"
_TIFF = rb"II[*+]\x00|MM\x00[*+]"
_FORMATS: tuple[tuple[str, bytes, Callable[[File], Header]], ...] = (
    ("JPEG", rb"\xff\xd8\xff", read_jpeg),
    ("PNG", rb"\x89PNG\r\n\x1a\n", read_png),
    ("TIFF", _TIFF, read_tiff),
    ("WebP", rb"RIFF....WEBP", read_webp),
    ("GIF", rb"GIF8[79]a", read_gif),
    ("BMP", rb"BM.{12}[\x0c-\xff]\x00\x00\x00", read_bmp),
    ("JPEG 2000", rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", read_jpeg2000),
    ("AVIF", rb"....ftyp(?=.{0,64}avi[fs])", read_avif),
    ("PNM", rb"P[1-6][\t-\r #]", read_pnm),
    ("PAM", rb"P7[\r\n]", read_pam),
    ("Sun raster", rb"\x59\xa6\x6a\x95", read_sun_raster),
)
_FLOAT = rb"#\?(?:RGBE|RADIANCE)|P[Ff][\t-\r ]"  # Radiance HDR and PFM
_OTHERS = (  # well-known files that are refused by name
    (rb"....ftyp(?:hei|hev|mif1|msf1)", "a HEIC file"),
    (rb"....ftyp", "an MP4 video or another file of boxes"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL file"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR file"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%PDF|%!PS", "a PDF or PostScript document"),
    (rb"qoif", "a QOI file"),
    # TGA: a kind with or without a palette, and at position 16 the bits per pixel.
    (
        rb".(?:\x00[\x02\x03\x0a\x0b]\x00{5}|\x01[\x01\x09].{5}).{8}[\x08\x0f\x10\x18\x20]",
        "a TGA file",
    ),
    (rb"\x00\x00[\x01\x02]\x00", "an ICO or CUR file"),
    (rb"SIMPLE  =", "a FITS file"),
    (rb"id=ImageMagick", "a MIFF file"),
    (rb"/\* XPM", "an XPM file"),
    (rb"\x7fELF|MZ.\x00|\xcf\xfa\xed\xfe", "a program"),
    (rb"RIFF....AVI |\x1aE\xdf\xa3", "a video"),
    (rb".{128}DICM", "a DICOM file"),
    (
        rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd",
        "an archive or a compressed file",
    ),
    (rb"\x93NUMPY", "a NumPy file"),
    (rb"\x00\x05\x16[\x00\x07]", "an AppleDouble file of macOS"),
    (rb"version https://git-lfs", "a Git LFS pointer, without the picture"),
    (rb"\s*(?i:<!doctype html|<html)", "an HTML page"),
    (rb"\s*(?i:<svg|<\?xml)", "an SVG or XML document"),
    (rb"data:image/|iVBORw0KGgo|/9j/|R0lGODlh|UklGR|Qk[0-9A-Za-z+/]{30}", "text in Base64"),
    (rb"[\t-\r -~]+\Z", "text or a file of an unknown format"),
)
_FIXES = {
    "a NumPy file": "pass the array: np.load(file)",
    "an AppleDouble file of macOS": "leave out the files whose names begin with ._",
    "a Git LFS pointer, without the picture": "git lfs pull",
    "text in Base64": "decode it first: base64.b64decode",
    "an archive or a compressed file": "unpack it",
    "a program": _NO_PICTURE,
    "an HTML page": _NO_PICTURE,
    "text or a file of an unknown format": _NO_PICTURE,
}


def read_header(data: bytes, name: str) -> Header:
    """Read the header of a picture file, and check all sizes that the file states.

    OpenCV allocates the whole picture before it checks the data. So a format that is not in the
    list is refused before OpenCV reads a byte, as is a picture of more than MAX_PIXELS pixels, and
    a file that is too short for its picture. Only the header is checked: a file that passes may
    be damaged. A legal file of a few hundred bytes may state MAX_PIXELS pixels of one colour in
    WebP, AVIF, JPEG 2000 and arithmetic JPEG; decoding takes 6 to 17 bytes of memory for a pixel.

    Parameters
    ----------
    data : the whole file.
    name : what messages call the file.

    Returns
    -------
    What the file states, of its first picture.

    Raises
    ------
    InputError : the format is unknown, the size is 0 or too large, the file is too short or
        damaged, or the values are not of 1 to 16 bits.

    Examples
    --------
    >>> read_header(Path("street.png").read_bytes(), "street.png").width
    """
    kind, read = format_of(data[:START], name)
    file = File(data, name, kind)
    header = read(file)
    if not 1 <= header.bits <= 16 or header.channels < 1:
        raise file.damaged(f"it states {header.channels} channels of {header.bits} bits")
    return header


def format_of(start: bytes, name: str) -> tuple[str, Callable[[File], Header]]:
    """Recognise the format of a picture file.

    Parameters
    ----------
    start : the first START bytes of the file, or all of a shorter one.
    name : what messages call the file.

    Returns
    -------
    The name of the format, and the function that reads its header.

    Raises
    ------
    InputError : the format is not in the list.
    """
    for kind, pattern, read in _FORMATS:
        if re.match(pattern, start, re.DOTALL):
            return kind, read
    if re.match(_FLOAT, start):
        raise File(start, name, "").unsuited("float32")
    for pattern, what in _OTHERS:
        if re.match(pattern, start, re.DOTALL):
            raise InputError(
                f"{name} is not a picture that can be read: it is {what}",
                fix=_FIXES.get(what, _CONVERT),
            )
    found = start[:8].hex(" ") or "nothing"
    raise InputError(
        f"{name} is not a picture that can be read: it begins with {found}", fix=_NO_PICTURE
    )
