"""A camera, segmented live:  python examples/camera.py [CAMERA NUMBER or VIDEO] [PRIOR.onnx]

Draws into a window where there is a display, else prints a line a frame. Ctrl-C ends it.
"""

import os
import sys
from contextlib import suppress

import cv2

from sdk import Segmenter

source = sys.argv[1] if len(sys.argv) > 1 else "0"
prior = sys.argv[2] if len(sys.argv) > 2 else "kmeans"
segmenter = Segmenter(prior, refine="fast")  # a quarter of the picture's size
display = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ

with suppress(KeyboardInterrupt):
    for result in segmenter.stream(int(source) if source.isdigit() else source, warm_steps=1):
        frame = result.frame
        for event in frame.events:
            print(f"frame {frame.index}: {event}")
        if display:
            cv2.imshow("camera", cv2.cvtColor(result.overlay(), cv2.COLOR_RGB2BGR))
            if cv2.waitKey(1) == ord("q"):
                break
        else:
            print(f"frame {frame.index}: {len(result.segments)} regions, "
                  f"{result.timings['total']:.0f} ms, {frame.dropped} dropped")  # fmt: skip
