"""Draws docs/images/demo.jpg: the demo photo, its k-means prior, and the default result.

Both label maps have their small regions merged alike.

python examples/panels.py docs/images/demo.jpg
"""

import sys
from pathlib import Path

import numpy as np

from runtime.files import write_atomic
from sdk import Segmenter
from sdk.__main__ import demo_photo
from sdk.image import encode_image

photo = demo_photo()
prior = Segmenter("kmeans", refine=None, filter=None)(photo)
refined = Segmenter("kmeans")(photo)
panels = np.concatenate([photo, prior.overlay(), refined.overlay()], axis=1)
path = Path(sys.argv[1])
write_atomic(path, encode_image(np.ascontiguousarray(panels[::2, ::2]), path.suffix))
