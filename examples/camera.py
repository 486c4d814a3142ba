"""Segment a camera live. With a display, the program draws into a window; otherwise it prints a
line for each frame. Ctrl-C, or q in the window, ends the program.

    python examples/camera.py [CAMERA NUMBER or VIDEO] [PRIOR.onnx or BUNDLE]
"""

import argparse
import os
import sys
from contextlib import suppress

import cv2

from sdk import SdkError, Segmenter

parser = argparse.ArgumentParser(description="Segments a camera live.")
parser.add_argument("source", nargs="?", default="0", help="camera number, video or URL (0)")
parser.add_argument("prior", nargs="?", default="kmeans", help="PRIOR.onnx or BUNDLE (kmeans)")
args = parser.parse_args()


def show(result, display):
    """Draw or print a result; return False if the user has pressed q, else True."""
    frame = result.frame
    for event in frame.events:
        print(f"frame {frame.index}: {event}")
    if display:
        cv2.imshow("camera", cv2.cvtColor(result.overlay(), cv2.COLOR_RGB2BGR))
        return cv2.waitKey(1) != ord("q")
    print(f"frame {frame.index}: {len(result.segments)} regions, "
          f"{result.timings['total']:.0f} ms, {frame.dropped} dropped", flush=True)  # fmt: skip
    return True


try:
    segmenter = Segmenter(args.prior, refine="fast")  # refines at a quarter of the picture's size
    source = int(args.source) if args.source.isdigit() else args.source
    display = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    with suppress(KeyboardInterrupt):
        for result in segmenter.stream(source, warm_steps=1):
            if not show(result, display):
                break
except SdkError as error:  # the text says what is wrong, and the fix
    sys.exit(f"error: {error}")
except BrokenPipeError:  # the reader of the lines has ended, as head does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
