"""Draw docs/images/flicker.webp: how often labels change from frame to frame, with and without a
stream.

    python examples/flicker.py docs/images/flicker.webp [NOISE]

The clip is synthetic: a camera moves in a circle over the demo photo. The frames have noise (NOISE
is its standard deviation, of 255 levels; 25 without the argument), and their brightness differs
from the photo's by up to 10 %. The camera moves by whole pixels. So for each pixel of a frame that
the frame before shows, too, the place in the frame before is known. "flicker" is the share of these
pixels whose label changes.

Columns: the frame; k-means of each frame alone; ten steps of refinement of each frame alone; a
stream, whose frames start from the weights of the frame before and run two steps. White pixels of
the lower row have changed their label. K-means numbers the clusters of each frame anew. So for
frames that are segmented alone, the numbers are matched to those of the frame before (as a stream
does), so that exchanged numbers do not count as flicker; the script prints the shares with and
without this. The script needs the extra `demo`: scikit-image contains the photo, and Pillow and
SciPy are installed with it.
"""

import argparse
import io
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from runtime.files import check_place, write_atomic
from runtime.pictures.files import demo_photo
from sdk import SdkError, Segmenter

FRAMES, HEIGHT, WIDTH = 36, 288, 384
NOISE, LIGHT = 25.0, 0.1  # standard deviation; largest relative change of brightness
SHOWN = (256, 192)  # width and height of a panel
MILLISECONDS = 150  # for which a frame is shown


def make_clip(noise):
    """Frames (HEIGHT, WIDTH, 3) uint8, and each one's corner in the photo, (row, column)."""
    photo, random = demo_photo().astype(np.float32), np.random.default_rng(0)
    frames, corners = [], []
    for angle in np.linspace(0, 2 * np.pi, FRAMES, endpoint=False):
        y = round((photo.shape[0] - HEIGHT) / 4 * (1 - np.cos(angle)))
        x = round((photo.shape[1] - WIDTH) / 2 * (1 + np.sin(angle)))
        seen = photo[y : y + HEIGHT, x : x + WIDTH] * (1 + LIGHT * random.uniform(-1, 1))
        seen = seen + random.normal(0, noise, seen.shape)
        frames.append(np.clip(np.rint(seen), 0, 255).astype(np.uint8))
        corners.append((y, x))
    return frames, corners


def common(corner, other):
    """The part of the frame at ``corner`` that the frame at ``other`` shows, too: two slices."""
    return tuple(
        slice(max(b - a, 0), size + min(b - a, 0))
        for a, b, size in zip(corner, other, (HEIGHT, WIDTH), strict=True)
    )


def matched(results, corners):
    """The results with new cluster numbers: those with the largest overlap with the clusters of the
    same numbers in the frame before."""
    out = [results[0]]
    for result, (before, here) in zip(results[1:], pairwise(corners), strict=True):
        old, new = out[-1].labels[common(before, here)], result.labels[common(here, before)]
        count = 1 + max(old.max(), result.labels.max())
        overlap = np.bincount(new.ravel() * count + old.ravel(), minlength=count * count)
        numbers = linear_sum_assignment(overlap.reshape(count, count), maximize=True)[1]
        out.append(replace(result, labels=numbers.astype(np.int32)[result.labels]))
    return out


def changes(results, corners):
    """For each frame but the first (HEIGHT, WIDTH) uint8, 1 where the label has changed; and, as a
    mean, the share of these pixels among the pixels that both frames show."""
    maps, shares = [], []
    for (old, new), (before, here) in zip(pairwise(results), pairwise(corners), strict=True):
        changed = np.zeros((HEIGHT, WIDTH), np.uint8)
        inside = common(here, before)
        changed[inside] = old.labels[common(before, here)] != new.labels[inside]
        maps.append(changed)
        shares.append(changed[inside].mean())
    return maps, float(np.mean(shares))


def panel(picture):
    """The picture, resized to SHOWN."""
    return cv2.resize(picture, SHOWN, interpolation=cv2.INTER_AREA)


def white(height, *lines):
    """A white panel of ``height`` with lines of text."""
    drawn, font = np.full((height, SHOWN[0], 3), 255, np.uint8), cv2.FONT_HERSHEY_SIMPLEX
    for i, line in enumerate(lines):
        cv2.putText(drawn, line, (4, 17 + 20 * i), font, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return drawn


def main(path, noise):
    frames, corners = make_clip(noise)
    prior, refined = Segmenter("kmeans", refine=None, filter=None), Segmenter("kmeans")
    results = {
        "k-means": [prior(frame) for frame in frames],
        "10 steps from scratch": [refined(frame) for frame in frames],
        "stream, 2 steps": list(refined.stream(frames, warm_steps=2)),
    }
    note = white(
        SHOWN[1], "white below the pictures:", "the label has changed since", "the frame before"
    )
    columns = [[np.concatenate([white(24, "frame"), panel(f), note]) for f in frames[1:]]]
    for name, found in results.items():
        _, as_numbered = changes(found, corners)
        if not name.startswith("stream"):
            found = matched(found, corners)
        maps, share = changes(found, corners)
        print(f"{name:22} flicker {share:6.2%}, without matching numbers {as_numbered:6.2%}")
        head = white(24, f"{name}: {share:.1%}")
        columns.append(
            [
                np.concatenate([head, panel(r.overlay()), panel(np.dstack([255 * m] * 3))])
                for r, m in zip(found[1:], maps, strict=True)
            ]
        )
    pages = [Image.fromarray(np.concatenate(row, axis=1)) for row in zip(*columns, strict=True)]
    data = io.BytesIO()
    options = {"duration": MILLISECONDS, "loop": 0, "quality": 20, "method": 6}
    pages[0].save(data, "WEBP", save_all=True, append_images=pages[1:], **options)
    write_atomic(path, data.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws how often labels change between frames.")
    parser.add_argument("path", type=Path, help="animated picture to write: .webp")
    parser.add_argument("noise", type=float, nargs="?", default=NOISE, help="%(default)s of 255")
    args = parser.parse_args()
    try:
        check_place(args.path, pipe=True)
    except SdkError as error:  # the text says what is wrong, and the fix
        sys.exit(f"error: {error}")
    main(args.path, args.noise)
