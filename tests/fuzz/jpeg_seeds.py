"""Writes small JPEG files of many kinds into a folder, as the first inputs of tests/fuzz/jpeg.cpp:

python tests/fuzz/jpeg_seeds.py FOLDER
"""

import sys
from itertools import product
from pathlib import Path

import cv2
import numpy as np

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)
samplings = (0x411111, 0x221111, 0x211111, 0x121111, 0x111111)
for number, (sampling, restart, progressive, optimised) in enumerate(
    product(samplings, (0, 1, 3), (0, 1), (0, 1))
):
    height, width = rng.integers(1, 40, 2)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if number % 4 == 0:
        picture = picture[..., 0]
    options = {
        cv2.IMWRITE_JPEG_QUALITY: int(rng.integers(1, 101)),
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: sampling,
        cv2.IMWRITE_JPEG_RST_INTERVAL: restart,
        cv2.IMWRITE_JPEG_PROGRESSIVE: progressive,
        cv2.IMWRITE_JPEG_OPTIMIZE: optimised,
    }
    data = cv2.imencode(".jpg", picture, [n for pair in options.items() for n in pair])[1].tobytes()
    (folder / f"{number:02}.jpg").write_bytes(data)
    if not optimised:  # without its Huffman tables, like a frame of a Motion JPEG file
        start = data.index(b"\xff\xc4")
        (folder / f"{number:02}-mjpeg.jpg").write_bytes(
            data[:start] + data[data.index(b"\xff\xda") :]
        )
