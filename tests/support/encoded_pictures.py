"""Small valid files of every picture format that is read, for tests that damage them."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from runtime.pictures.decode import quiet_opencv

HEIGHT, WIDTH = 36, 52


def _picture(channels: int, dtype: str = "uint8") -> np.ndarray:
    """Bands of colour with noise: (HEIGHT, WIDTH, channels), or (HEIGHT, WIDTH) for one channel."""
    rng = np.random.default_rng(channels)
    values = np.arange(WIDTH)[None, :, None] * 4 + rng.integers(0, 40, (HEIGHT, WIDTH, channels))
    values = (values * (257 if dtype == "uint16" else 1)).astype(dtype)
    return values[..., 0] if channels == 1 else values


def _pillow(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def encoded() -> dict[str, bytes]:
    """name -> the bytes of a file. What this OpenCV or Pillow cannot write is left out."""
    grey, colour, alpha = (_picture(n) for n in (1, 3, 4))
    deep = _picture(3, "uint16")
    files = {}
    for suffix in ("jpg", "png", "bmp", "tiff", "webp", "jp2", "gif", "avif", "ppm", "pam", "sr"):
        for what, array in {"grey": grey, "colour": colour, "alpha": alpha, "deep": deep}.items():
            if what == "deep" and suffix not in ("png", "tiff", "jp2", "ppm", "pam"):
                continue
            if suffix in ("ppm", "sr", "jpg") and what == "alpha":
                continue
            try:
                with quiet_opencv():
                    written, data = cv2.imencode(f".{suffix}", array)
            except cv2.error:
                continue
            if written and len(data):
                files[f"{what}.{suffix}"] = data.tobytes()
    image = Image.fromarray(colour)
    exif = Image.Exif()
    exif[274] = 6
    for name, kind, options in [
        ("progressive.jpg", "JPEG", {"progressive": True}),
        ("turned.jpg", "JPEG", {"exif": exif, "quality": 95, "subsampling": 2}),
        ("turned.png", "PNG", {"exif": exif}),
        ("turned.webp", "WEBP", {"exif": exif}),
        ("lossless.webp", "WEBP", {"lossless": True}),
        ("lzw.tiff", "TIFF", {"compression": "tiff_lzw"}),
        ("deflate.tiff", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("packbits.tiff", "TIFF", {"compression": "packbits"}),
        ("turned.tiff", "TIFF", {"tiffinfo": {274: 6}}),
    ]:
        try:
            files[name] = _pillow(image, kind, **options)
        except (OSError, KeyError, ValueError):
            continue
    palette = image.quantize(16)
    files["palette.png"] = _pillow(palette, "PNG")
    files["palette.bmp"] = _pillow(palette, "BMP")
    files["palette.gif"] = _pillow(palette, "GIF", save_all=True, append_images=[palette])
    files["palette.tiff"] = _pillow(palette, "TIFF")
    files["cmyk.jpg"] = _pillow(image.convert("CMYK"), "JPEG")
    files["bits.png"] = _pillow(image.convert("1"), "PNG")
    files["bits.tiff"] = _pillow(image.convert("1"), "TIFF", compression="group4")
    files["text.pgm"] = b"P2 # comment\n3 2\n255\n0 1 2\n3 4 5\n"
    files["text.pbm"] = b"P1\n3 2\n0 1 0\n1 0 1\n"
    files["less.ppm"] = b"P6\n2 1\n100\n" + bytes(6)
    return files
