"""The command protocol on files of random pictures, beside slow loops that read them with PIL."""

import json
from itertools import permutations

import numpy as np
import pytest
from cases import case
from PIL import Image
from slow_protocols import drawn, pixels, slow_best, slow_f, slow_many_to_one, slow_one_to_one

from benchmarks import __main__ as command

NEAREST = Image.Resampling.NEAREST
SIZES = ((48, 75), (60, 44))  # height and width of two pictures


def write(path, array, palette=None):
    """Write a picture, and return it as a picture of PIL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array, np.uint8))
    if palette:
        picture = picture.convert("P")
        picture.putpalette(palette)
    picture.save(path)
    return picture


def scored(capsys, root, *argv):
    argv = ["protocol", *argv, "--data", str(root), "--predictions", str(root / "found"), "--json"]
    assert command.main(argv) == 0
    return json.loads(capsys.readouterr().out)["scores"]


def agreeing(rng, size, values, clusters):
    """A truth of blocks with some of the values, and clusters that often agree with it."""
    index = drawn(rng, len(values), size).repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    index = np.pad(index, [(0, n - m) for n, m in zip(size, index.shape, strict=True)], "wrap")
    noise = rng.integers(clusters, size=size)
    return np.array(values)[index], np.where(rng.random(size) < 0.7, index, noise)


def stego(picture):
    """Resize the shorter side to 320, and cut the middle."""
    width, height = picture.size
    scale = 320 / min(picture.size)
    large = picture.resize((int(width * scale), int(height * scale)), NEAREST)
    left, top = (round((n - 320) / 2) for n in large.size)
    return np.array(large.crop((left, top, left + 320, top + 320)))


def slow_scores(pairs, class_of):
    """Count each pixel that has a class, and try all matchings."""
    counts = {}
    for found, truth in pairs:
        for cell in zip(found.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if cell[1] in class_of:
                cell = cell[0], class_of[cell[1]]
                counts[cell] = counts.get(cell, 0) + 1
    clusters, classes = ({cell[i] for cell in counts} for i in (0, 1))
    padded = [*clusters, *range(-len(classes), 0)]
    ways = [dict(zip(classes, way, strict=True)) for way in permutations(padded, len(classes))]
    hits = [sum(counts.get((k, c), 0) for c, k in way.items()) for way in ways]
    way = ways[hits.index(max(hits))]
    ious = []
    for c, k in way.items():
        real = sum(n for cell, n in counts.items() if cell[1] == c)
        found = sum(n for cell, n in counts.items() if cell[0] == k)
        hit = counts.get((k, c), 0)
        ious.append(hit / (real + found - hit))
    return max(hits) / sum(counts.values()), np.mean(ious)


def test_clusters_of_coco_and_cityscapes(tmp_path, capsys):
    data = (
        ("coco27", "annotations/val2017/{}.png", "{}", {0: 9, 100: 13, 178: 26}, 255),
        (
            "cityscapes27", "gtFine/val/ulm/{}_gtFine_labelIds.png", "ulm/{}_leftImg8bit",
            {7: 0, 24: 17, 33: 26}, 6,
        ),
    )  # fmt: skip
    for name, place, found, class_of, void in data:
        with case(name):
            rng = np.random.default_rng(0)
            pairs = []
            for number, size in enumerate(SIZES):
                truth, clusters = agreeing(rng, size, [*class_of, void], 5)
                prediction = write(tmp_path / f"found/{found.format(number)}.png", clusters)
                truth = write(tmp_path / place.format(number), truth)
                pairs.append((stego(prediction), stego(truth)))
            acc, miou = slow_scores(pairs, class_of)
            scores = scored(capsys, tmp_path, name)
            assert 0.4 < acc < 0.9
            assert (scores["acc"], scores["mIoU"]) == pytest.approx((acc, miou))


def test_clusters_of_potsdam(tmp_path, capsys):
    colours = {  # of ISPRS, and the classes of Potsdam-3
        (255, 255, 255): 0, (0, 0, 255): 1, (0, 255, 255): 2, (0, 255, 0): 2, (255, 255, 0): 0,
        (255, 0, 0): 1,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(2):
        truth, clusters = agreeing(rng, (50, 50), [*range(6)], 6)
        prediction = write(tmp_path / f"found/{number}.png", clusters)
        tile = write(tmp_path / f"5_Labels_all/{number}_label.png", np.array([*colours])[truth])
        tile = np.array(tile.resize((224, 224), NEAREST)).reshape(-1, 3).tolist()
        classes = np.array([colours[tuple(colour)] for colour in tile])
        pairs.append((np.array(prediction.resize((224, 224), NEAREST)), classes))
    scores = scored(capsys, tmp_path, "potsdam3")
    expected = slow_scores(pairs, {0: 0, 1: 1, 2: 2})
    assert (scores["acc"], scores["mIoU"]) == pytest.approx(expected)


def test_masks_of_corloc_are_above_half(tmp_path, capsys):
    folder = tmp_path / "VOC2007"
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/trainval.txt").write_text("1\n2\n")
    text = (
        "<annotation><size><height>4</height><width>4</width></size><object><bndbox><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"
    )
    for number, grey in ((1, 127), (2, 128)):
        (folder / f"Annotations/{number}.xml").write_text(text)
        write(tmp_path / f"found/{number}.png", np.full((4, 4), grey))
    assert scored(capsys, tmp_path, "corloc") == {"CorLoc": 0.5, "empty": 0.5}


def test_regions_of_voc(tmp_path, capsys):
    """A truth with VOC's palette, as VOC distributes it."""
    palette = [
        sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for number in range(256)
        for channel in range(3)
    ]
    rng = np.random.default_rng(0)
    best, ones, manys = [], [], []
    for number in ("2007_1", "2007_2"):
        truth = np.array([0, 15, 255])[drawn(rng, 3)]
        clusters = drawn(rng, 4)
        write(tmp_path / f"VOC2012/SegmentationClass/{number}.png", truth, palette)
        write(tmp_path / f"found/{number}.png", clusters)
        true = pixels(truth, skip=255)
        valid = set().union(*true)
        found = [f & valid for f in pixels(clusters) if f & valid]
        best.append(slow_best(found, true))
        ones.append(slow_one_to_one(found, true))
        manys.append(slow_many_to_one(pixels(clusters), pixels(truth)))
    names = tmp_path / "VOC2012/ImageSets/Segmentation/val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("2007_1\n2007_2\n")
    scores = scored(capsys, tmp_path, "voc2012", "--compat", "dynaguide")
    assert scores["best IoU"] == pytest.approx(np.mean([v for part in best for v in part]))
    assert scores["one-to-one"] == pytest.approx(np.mean(ones))
    assert scores["compat dynaguide"] == pytest.approx(np.mean(manys))


def test_masks_of_duts(tmp_path, capsys):
    """Truths have grey edges: above 127 is the object."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(3):
        truth = rng.choice([0, 127, 128, 255], (6, 7))
        mask = (truth * 0.4 + rng.integers(150, size=truth.shape)).astype(np.uint8)
        write(tmp_path / f"DUTS-TE/DUTS-TE-Mask/{number}.png", truth)
        write(tmp_path / f"found/{number}.png", mask)
        pairs.append((mask / 255, truth > 127))
    scores = scored(capsys, tmp_path, "saliency")
    curves = [[slow_f(m, t, i / 255, 0.3) for i in range(1, 256)] for m, t in pairs]
    assert scores["max F (MOVE)"] == pytest.approx(np.mean(curves, axis=0).max())
    own = [max(slow_f(m, t, i / 255, 0.09) for i in range(1, 256)) for m, t in pairs]
    assert scores["max F (SelfMask)"] == pytest.approx(np.mean(own))
    assert scores["acc"] == pytest.approx(np.mean([((m > 0.5) == t).mean() for m, t in pairs]))
