"""Draw docs/images/filters_drawn.jpg and filters_photo.jpg: the guided filter, the dense CRF and
the refinement, each with its default settings, on the same picture and the same prior.

    python examples/filters.py docs/images

The first sheet shows five drawn pictures whose right labels are known; wrong pixels are red. Their
priors have half the height and width of the picture. The pictures are chosen such that the methods
differ. They are no measurement: docs/quality.md measures. The second sheet shows the demo photo.
Its prior is five regions that were outlined by hand, averaged over cells of 32 x 32 pixels. The
script needs the extra `demo`: scikit-image contains the photo.
"""

import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from runtime.files import check_place, write_atomic
from runtime.pictures.files import demo_photo
from sdk import CrfConfig, SdkError, Segmenter

HEIGHT, WIDTH = 96, 144  # of a drawn picture
Y, X = np.mgrid[:HEIGHT, :WIDTH]
METHODS = {
    "prior": {"refine": None, "filter": None},
    "guided filter": {"refine": None},
    "dense CRF": {"refine": None, "filter": CrfConfig()},
    "refinement": {},
}
COLOURS = np.array([[66, 133, 244], [234, 150, 40], [52, 168, 83], [200, 40, 160]], np.uint8)
WRONG = np.array([230, 20, 20], np.uint8)

# Outlines in the demo photo, (x, y): flag, head, suit, helmet, shuttle. 0 is everything else.
OUTLINES = (
    (1, "0,0 38,0 62,88 80,130 95,205 70,235 45,290 25,380 22,511 0,511"),
    (3, "120,200 150,152 185,148 190,180 253,185 296,215 338,240 362,335 300,400 285,440 280,511 "
        "105,511 20,430 30,320 62,250"),
    (3, "395,343 440,355 480,390 497,450 500,511 278,511 283,440 310,385 350,350"),
    (2, "154,90 162,55 195,28 230,15 270,22 296,52 301,85 292,120 272,136 255,172 255,190 187,190 "
        "186,165 180,130 165,120"),
    (4, "383,100 398,25 412,0 428,0 438,45 452,40 456,110 456,270 480,278 370,287 366,260 352,222 "
        "380,190"),
)  # fmt: skip
PHOTO_COLOURS = np.array(
    [[110, 110, 110], [66, 133, 244], [234, 190, 40], [52, 168, 83], [200, 40, 160]], np.uint8
)
SHOWN = np.s_[:300, 128:512]  # the part of the demo photo that the sheet shows


def ellipse(x, y, width, height):
    """Where an ellipse with these half axes is: (HEIGHT, WIDTH) bool."""
    return ((X - x) / width) ** 2 + ((Y - y) / height) ** 2 < 1


def paint(labels, colours):
    """A picture (HEIGHT, WIDTH, 3) float64 in [0, 255] with one colour for each label."""
    return np.array(colours, float)[labels]


def noisy(picture, deviation):
    """The picture as uint8, with Gaussian noise of this standard deviation, in levels."""
    noise = np.random.default_rng(1).normal(0, deviation, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def soft(labels, classes, confidence, blur):
    """Blurred probabilities (HEIGHT / 2, WIDTH / 2, classes) whose arg max is about ``labels``."""
    hot = cv2.GaussianBlur(np.eye(classes, dtype=np.float32)[labels], (0, 0), blur)
    half = cv2.resize(hot, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
    return (confidence * half + (1 - confidence) / classes).astype(np.float32)


def spots():
    truth = ellipse(72, 48, 46, 34).astype(int)
    guess, random = truth.copy(), np.random.default_rng(8)
    for _ in range(16):
        x, y, radius = random.uniform((0, 0, 3), (WIDTH, HEIGHT, 7))
        guess[ellipse(x, y, radius, radius)] = 1 - truth[int(y), int(x)]
    picture = noisy(paint(truth, [(96, 120, 150), (176, 120, 70)]), 1.5)
    return picture, soft(guess, 2, 0.6, 1.0), truth


def coarse_prior():
    truth = (X > 72 + 20 * np.sin(Y / 10)).astype(int)
    light = np.linspace(-10, 10, WIDTH)[:, None]  # from left to right
    picture = noisy(paint(truth, [(126, 132, 140), (136, 139, 140)]) + light, 1.0)
    cells = cv2.resize(truth.astype(np.float32), (9, 6), interpolation=cv2.INTER_AREA)  # of 16 x 16
    right = 0.9 * cv2.resize(cells, (WIDTH // 2, HEIGHT // 2)) + 0.05
    return picture, np.stack([1 - right, right], axis=-1), truth


def large_area():
    truth = ellipse(72, 48, 48, 36).astype(int)
    guess = truth.copy()
    guess[(X > 78) & (Y < 46)] = 0
    picture = noisy(paint(truth, [(92, 122, 84), (160, 120, 96)]), 25)
    return picture, soft(guess, 2, 0.4, 2.0), truth


def thin_object():
    large, ground = np.zeros((8 * HEIGHT, 8 * WIDTH), np.uint8), (Y > 70).astype(int)
    for begin, end in (((30, 4), (44, 92)), ((100, 6), (92, 90)), ((6, 30), (138, 18))):
        cv2.line(large, [8 * n for n in begin], [8 * n for n in end], 255, 16)  # 2 pixels wide
    cover = cv2.resize(large, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)[..., None] / 255
    truth = np.where(cover[..., 0] > 0.5, 2, ground)
    picture = paint(ground, [(140, 150, 120), (120, 112, 100)])
    picture = noisy(picture + cover * ((110, 112, 104) - picture), 14)
    return picture, soft(truth, 3, 0.95, 0.5), truth


def same_colour():
    box = (abs(X - 112) < 14) & (abs(Y - 48) < 14)
    disc = ellipse(46, 48, 28, 28)
    picture = noisy(paint(disc.astype(int), [(120, 122, 124), (170, 90, 80)]), 4)
    truth = (disc | box).astype(int)
    return picture, soft(truth, 2, 0.7, 1.5), truth


SCENES = {
    "1  wrong spots, even colours": spots,
    "2  coarse prior, little contrast": coarse_prior,
    "3  large wrong area, much noise": large_area,
    "4  thin object, noise": thin_object,
    "5  square of the ground's colour": same_colour,
}


def segment(picture, probabilities, method):
    """Labels (H, W) int32 of the prior ``probabilities`` by one of METHODS."""
    return Segmenter(lambda _: probabilities, **METHODS[method])(picture).labels


def outlined(picture, labels):
    """The picture under PHOTO_COLOURS of the labels, with white lines between them."""
    drawn = cv2.addWeighted(picture, 0.4, PHOTO_COLOURS[labels], 0.6, 0)
    drawn[:, :-1][labels[:, :-1] != labels[:, 1:]] = 255
    drawn[:-1][labels[:-1] != labels[1:]] = 255
    return drawn


def panel(picture, text, zoom):
    """The picture, enlarged, below a white strip with a text."""
    large = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    strip = np.full((26, large.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.concatenate([strip, large]), 0, 4, 2, 2, 0, value=(255,) * 3)


def drawn_sheet():
    """One row for each of SCENES: picture, prior, and the three methods."""
    rows = []
    for title, scene in SCENES.items():
        picture, probabilities, truth = scene()
        row = [panel(picture, title, 2)]
        for method in METHODS:
            labels = segment(picture, probabilities, method)
            shown = np.where((labels == truth)[..., None], COLOURS[labels], WRONG)
            row.append(panel(shown, f"{method}: {np.mean(labels != truth):.1%} wrong", 2))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def photo_prior(photo):
    """The regions of OUTLINES (512, 512) uint8, and their prior (16, 16, 5) float32."""
    regions = np.zeros(photo.shape[:2], np.uint8)
    for label, outline in OUTLINES:
        points = [[int(n) for n in point.split(",")] for point in outline.split()]
        cv2.fillPoly(regions, [np.array(points)], label)
    hot = np.eye(5, dtype=np.float32)[regions]
    return regions, 0.8 * cv2.resize(hot, (16, 16), interpolation=cv2.INTER_AREA) + np.float32(0.04)


def photo_sheet():
    """Two rows of three panels: photo, outlines, prior, and the three methods."""
    photo = demo_photo()
    regions, probabilities = photo_prior(photo)
    shown = outlined(photo, regions)
    panels = [panel(photo[SHOWN], "photo", 1), panel(shown[SHOWN], "outlined by hand", 1)]
    for method in METHODS:
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            labels = segment(photo, probabilities, method)
            seconds.append(time.perf_counter() - begin)
        text = method if method == "prior" else f"{method}: {min(seconds):.2f} s for 512 x 512"
        shown = outlined(photo, labels)
        panels.append(panel(shown[SHOWN], text, 1))
    rows = (np.concatenate(row, axis=1) for row in (panels[:3], panels[3:]))
    return np.concatenate(list(rows))


def main(folder):
    """Write both sheets."""
    sheets = {"filters_drawn.jpg": drawn_sheet, "filters_photo.jpg": photo_sheet}
    for name in sheets:
        check_place(folder / name)
    for name, draw in sheets.items():
        options = [cv2.IMWRITE_JPEG_QUALITY, 60]
        _, data = cv2.imencode(".jpg", cv2.cvtColor(draw(), cv2.COLOR_RGB2BGR), options)
        write_atomic(folder / name, data.tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws what each of the three methods changes.")
    parser.add_argument("folder", type=Path, help="folder in which the two pictures are written")
    try:
        main(parser.parse_args().folder)
    except SdkError as error:  # the text says what is wrong, and the fix
        sys.exit(f"error: {error}")
