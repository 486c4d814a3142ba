"""Draw docs/images/demo.jpg: the demo photo, the labels of k-means, and the default result, at half
the photo's size.

    python examples/panels.py docs/images/demo.jpg

Small regions are merged in both label maps.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from runtime.files import check_place, write_atomic
from runtime.pictures.files import demo_photo
from sdk import SdkError, Segmenter
from sdk.image import encode_image

parser = argparse.ArgumentParser(description="Draws the demo photo, its prior and the result.")
parser.add_argument("path", type=Path, help="picture to write: .jpg or .png")
path = parser.parse_args().path
try:
    check_place(path, pipe=True)
except SdkError as error:  # the text says what is wrong, and the fix
    sys.exit(f"error: {error}")
photo = demo_photo()
prior = Segmenter("kmeans", refine=None, filter=None)(photo)
refined = Segmenter("kmeans")(photo)
panels = np.concatenate([photo, prior.overlay(), refined.overlay()], axis=1)
write_atomic(path, encode_image(np.ascontiguousarray(panels[::2, ::2]), path.suffix))
