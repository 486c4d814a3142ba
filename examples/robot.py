"""A control loop without a display: how much free floor lies left, ahead and right?

    python examples/robot.py CAMERA_OR_VIDEO BUNDLE_OR_ONNX FLOOR_CLASS[,FLOOR_CLASS...]

Steers once a frame; refines as far as 40 ms leave time (a prior may take longer by itself), and
goes on tomorrow from what it has learned today.
"""

import sys
from pathlib import Path

import numpy as np

from sdk import Segmenter, StreamState

if len(sys.argv) != 4:
    sys.exit(__doc__)
source, prior, floor = sys.argv[1:]
memory = Path("robot_state.safetensors")
state = StreamState.load(memory) if memory.exists() else StreamState()
segmenter = Segmenter(prior, refine="fast")
if segmenter.prior.names is None or not set(floor.split(",")) <= set(segmenter.prior.names):
    sys.exit(f"{prior} has these classes: {segmenter.prior.names}")
classes = [segmenter.prior.names.index(name) for name in floor.split(",")]

try:
    camera = int(source) if source.isdigit() else source
    for result in segmenter.stream(camera, budget_ms=40, state=state):
        free = np.isin(result.labels[result.labels.shape[0] // 2 :], classes)  # the lower half
        left, ahead, right = (part.mean() for part in np.array_split(free, 3, axis=1))
        turn = np.clip(right - left, -1, 1) if ahead < 0.5 else 0.0
        print(f"{result.frame.time:7.2f} s  free {left:4.0%} {ahead:4.0%} {right:4.0%}  "
              f"turn {turn:+.2f}  ({result.timings['total']:.0f} ms)")  # fmt: skip
except KeyboardInterrupt:
    pass
finally:
    if state.frames:
        state.save(memory)
