"""Files of formats that are not read: the message names the format, and the fix suits it."""

import struct

import pytest
import stated_pictures as stated
from cases import case
from picture_files import encode, smooth
from PIL import Image

from runtime.errors import InputError
from runtime.pictures.header import read_header

NAME = "  fix: name a picture file; docs/pictures.md lists the formats"


def mode(name):
    return Image.fromarray(smooth()).convert(name)


def icon(side):
    return encode(mode("RGB").resize((side, side)), "ICO", sizes=[(side, side)])


def test_files_of_other_formats_are_refused_by_name():
    for data, match in (
        (b"hello world", f"not a picture that can be read: it is text or a file of an.*{NAME}"),
        (b"\x80\x02abc", f"not a picture that can be read: it begins with 80 02 61 62 63\n{NAME}"),
        (b"", "begins with nothing"),
        (b"\x7fELF\2\1\1\0", f"is a program\n{NAME}"),
        (b"MZ\x90\0\3\0", f"is a program\n{NAME}"),
        *((encode(mode(n), "TGA"), "is a TGA file\n  fix: convert") for n in ("L", "P", "RGB")),
        (encode(mode("RGBA"), "TGA", compression="tga_rle", id_section=b"a"), "is a TGA file"),
        *((icon(side), "is an ICO") for side in (16, 64, 256)),
        (b"SIMPLE  =                    T", "is a FITS file\n  fix: convert"),
        (b"id=ImageMagick  version=1.0", "is a MIFF file\n  fix: convert"),
        (b"/* XPM */\nstatic char *x[] = {", "is an XPM file\n  fix: convert"),
        (b"\xff\xd8\xff\xf7\0\x0b\x08\0\x20", "is a JPEG-LS file, .*fix: convert it to PNG"),
        (stated.jpeg(8, 8, frame=0xF7), "is a JPEG-LS"),
        (stated.jpeg(8, 0), r"is a JPEG that is not read: it .* \(DNL\).*fix: save"),
        (b"BMW drives", "is text"),
        (box_of(b"heic"), "is a HEIC file"),
        (box_of(b"mif1"), "is a HEIC file"),
        (box_of(b"isom"), "is an MP4 video or another file of boxes"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is a JPEG XL file"),
        (b"\xff\x0a\xfa", "is a JPEG XL file"),
        (b"\x76\x2f\x31\x01", "is an OpenEXR file"),
        (b"8BPS\0\1", "is a Photoshop file"),
        (b"%PDF-1.7", "is a PDF"),
        (b"qoif\0", "is a QOI file"),
        (b"\0\0\1\0\1\0", "is an ICO"),
        (b"RIFF\0\0\0\0AVI LIST", "is a video"),
        (b"\x1aE\xdf\xa3", "is a video"),
        (bytes(128) + b"DICM", "is a DICOM file"),
        (b"PK\3\4", "is an archive or a compressed file.*fix: unpack it"),
        (b"\x1f\x8b\x08", "is an archive"),
        (b"\x93NUMPY\1\0", r"is a NumPy file.*np\.load"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", r"AppleDouble file of macOS.*begin with \._"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>", f"is an HTML page\n{NAME}"),
        (b"<svg xmlns", "is an SVG"),
        (b"<?xml version", "is an SVG or XML"),
        (b"data:image/png;base64,", "text in Base64.*b64decode"),
        (b"iVBORw0KGgoAAAANSUhEUg", "text in Base64"),
        (b"/9j/4AAQ", "text in Base64"),
    ):
        with case(match, data[:60]), pytest.raises(InputError, match=rf"(?s)^it .*{match}"):
            read_header(data, "it")


def box_of(brand):
    return struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0" + brand + b"mif1"
