"""A control loop without a display: how much floor is free to the left, ahead and to the right?

    python examples/robot.py CAMERA_OR_VIDEO BUNDLE_OR_ONNX FLOOR_CLASS[,FLOOR_CLASS...]

The program prints one steering value for each frame. Refinement steps that do not fit into the 40
ms of a frame are left out (a prior alone may take longer). At the end the state of the stream is
saved to robot_state.safetensors; the next start continues from this state.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from sdk import SdkError, Segmenter, StreamState

parser = argparse.ArgumentParser(description="Prints one steering value for each frame.")
parser.add_argument("source", help="camera number, video or URL")
parser.add_argument("prior", help="BUNDLE or PRIOR.onnx, with class names")
parser.add_argument("floor", help="names of the classes that are floor, with commas")
args = parser.parse_args()


def free_floor(labels, classes):
    """The shares of floor in the left, middle and right third of the picture's lower half."""
    free = np.isin(labels[labels.shape[0] // 2 :], classes)
    return [part.mean() for part in np.array_split(free, 3, axis=1)]


memory = Path("robot_state.safetensors")
state = StreamState()
try:
    if memory.exists():
        state = StreamState.load(memory)
    segmenter = Segmenter(args.prior, refine="fast")
    names = segmenter.prior.names
    if names is None:
        sys.exit(f"error: the classes of {args.prior} have no names")
    if not set(args.floor.split(",")) <= set(names):
        sys.exit(f"error: {args.prior} has these classes: {', '.join(names)}")
    classes = [names.index(name) for name in args.floor.split(",")]
    source = int(args.source) if args.source.isdigit() else args.source
    for result in segmenter.stream(source, budget_ms=40, state=state):
        left, ahead, right = free_floor(result.labels, classes)
        turn = np.clip(right - left, -1, 1) if ahead < 0.5 else 0.0
        print(f"{result.frame.time:7.2f} s  free {left:4.0%} {ahead:4.0%} {right:4.0%}  "
              f"turn {turn:+.2f}  ({result.timings['total']:.0f} ms)", flush=True)  # fmt: skip
except SdkError as error:  # the text says what is wrong, and the fix
    sys.exit(f"error: {error}")
except KeyboardInterrupt:
    pass
except BrokenPipeError:  # the reader of the lines has ended, as head does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
finally:
    if state.frames:
        state.save(memory)
