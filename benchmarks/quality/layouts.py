"""The truth of published data sets in the folders as they are distributed.

Each layout finds the files of the truth below a folder and reads one of them. The data sets are not
part of the project.
"""

from __future__ import annotations

import json
import stat
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from benchmarks.files import class_numbers
from benchmarks.quality.datasets import BsdsPicture
from benchmarks.quality.matlab import label_matrix, matlab_array
from benchmarks.quality.predictions import codes, contents, files_below, stored
from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of
from runtime.opencv import cv2

IGNORED = 255  # the class of pixels that are not scored

# COCO-Stuff's ids 0 to 181 of each of the 27 classes, whose order is that of PiCIE (Cho et al.,
# CVPR 2021) and STEGO (Hamilton et al., ICLR 2022): 12 classes of things, then 15 of stuff.
COCO27: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("electronic", (*range(71, 77),)),
    ("appliance", (*range(77, 83),)),
    ("food", (*range(51, 61),)),
    ("furniture", (*range(61, 71),)),
    ("indoor", (*range(83, 91),)),
    ("kitchen", (*range(43, 51),)),
    ("accessory", (*range(25, 33),)),
    ("animal", (*range(15, 25),)),
    ("outdoor", (*range(9, 15),)),
    ("person", (0,)),
    ("sports", (*range(33, 43),)),
    ("vehicle", (*range(1, 9),)),
    ("ceiling", (101, 102)),
    ("floor", (100, *range(113, 118))),
    ("food-stuff", (120, 121, 152, 169)),
    ("furniture-stuff", (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164)),
    ("raw-material", (99, 131, 138, 142)),
    ("textile", (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167)),
    ("wall", (*range(170, 177),)),
    ("window", (179, 180)),
    ("building", (94, 95, 127, 150, 157, 165)),
    ("ground", (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158)),
    ("plant", (93, 96, 118, 123, 128, 133, 141, 162, 168)),
    ("sky", (105, 156)),
    ("solid", (126, 134, 149, 159, 161, 181)),
    ("structural", (98, 112, 137, 145, 163)),
    ("water", (119, 147, 154, 177, 178)),
)
FIRST_STUFF = 12  # of the 27 classes

CITYSCAPES = range(7, 34)  # the ids of Cityscapes that are classes 0 to 26, in this order

# The classes of ISPRS Potsdam, with the numbers of IIC (Ji et al., ICCV 2019): road, building, low
# vegetation, tree, car, clutter; their colours, and the class of Potsdam-3 of each.
POTSDAM_COLOURS = np.array(
    [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)], np.uint8
)
POTSDAM_CLASSES = (0, 1, 2, 2, 0, 1)


class Truth(NamedTuple):
    """A picture that has a truth.

    Parameters
    ----------
    name : the path of the picture without suffix, below the folder of pictures, as "dog/00000".
    source : the file of the truth; or the truth itself, if one file contains those of all pictures.
    """

    name: str
    source: Any


class Layout(NamedTuple):
    """How a data set is distributed.

    Parameters
    ----------
    find : from the folder and the part to the pictures that have a truth.
    read : from the source of a truth to the truth.
    split : the part that publications score; "" if the folder has no parts.
    pictures : the numbers of pictures that publications score, one for each data set.
    """

    find: Callable[[Path, str], list[Truth]]
    read: Callable[[Any], Any]
    split: str = ""
    pictures: tuple[int, ...] = ()


class Boxes(NamedTuple):
    """The objects of a picture.

    Parameters
    ----------
    size : height and width of the picture.
    boxes : (N, 4) float64: left, top, right and bottom edge of each, in pixels from the corner of
        the picture.
    """

    size: tuple[int, int]
    boxes: np.ndarray


def listed(path: Path) -> list[str]:
    """Read a list of names: the lines of a text file that are not empty.

    Raises
    ------
    InputError : the file cannot be read, or contains no name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise file_error("read", path, error) from error
    if not (names := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"{shown(path)} contains no name", fix="write one name in each line")
    return names


def chosen(truths: list[Truth], lines: Sequence[str]) -> list[Truth]:
    """Keep the pictures that the lines of a list name, in the order of ``truths``.

    A line is the name of a picture, its stem, or a folder of pictures. It can have a suffix of
    pictures, as in the list of COCO20K, folders before the name, and words after the first, as in
    the lists of DAVIS: "/JPEGImages/480p/dog/00000.jpg /Annotations/480p/dog/00000.png".

    Raises
    ------
    InputError : a line fits no picture.
    """
    by_word: dict[str, list[int]] = defaultdict(list)
    for i, truth in enumerate(truths):
        path = Path(truth.name)
        for word in {truth.name, path.name, path.parent.as_posix()} - {"."}:
            by_word[word].append(i)
    full = {truth.name: [i] for i, truth in enumerate(truths)}
    kept: set[int] = set()
    for line in lines:
        ways = [way for text in (line, line.split()[0]) for way in _ways(text, by_word, full)]
        if not ways:
            raise InputError(
                f"the list names {line}, of which there is no truth",
                fix=f"write names without suffix, such as {truths[0].name}",
            )
        kept.update(ways[0])
    return [truths[i] for i in sorted(kept)]


def _ways(
    text: str, by_word: dict[str, list[int]], full: dict[str, list[int]]
) -> Iterator[list[int]]:
    """The pictures that a text names: as it is, or without folders before a full name."""
    if text.lower().endswith((".jpg", ".jpeg", ".png")):
        text = text.rpartition(".")[0]
    if text in by_word:
        yield by_word[text]
    parts = text.split("/")
    for first in range(1, len(parts)):
        if (name := "/".join(parts[first:])) in full:
            yield full[name]


def _bsds500(data: Path, split: str) -> list[Truth]:
    roots = ("", "data", "BSDS500/data", "BSR/BSDS500/data")
    folder = _one_folder(data, [f"{root}/groundTruth/{split}".lstrip("/") for root in roots])
    return [Truth(path.stem, path) for path in files_below(folder, ".mat")]


def _annotators(path: Path) -> list[np.ndarray]:
    return BsdsPicture(path.stem, path, path).annotators()


def _voc(data: Path, split: str, kind: str, folder: str, suffix: str) -> list[Truth]:
    places = ("", "VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012")
    root = _one_folder(data, [f"{place}/{folder}".lstrip("/") for place in places]).parent
    lines = listed(root / "ImageSets" / kind / f"{split}.txt")
    names = [line.split()[0] for line in lines]
    return [Truth(name, root / folder / f"{name}{suffix}") for name in names]


def _voc2012(data: Path, split: str) -> list[Truth]:
    return _voc(data, split, "Segmentation", "SegmentationClass", ".png")


def _corloc(data: Path, split: str) -> list[Truth]:
    return _voc(data, split, "Main", "Annotations", ".xml")


def _palette() -> np.ndarray:
    """VOC's colours (256, 3) uint8: bit 3 i + c of the number is bit 7 - i of channel c."""
    numbers = np.arange(256)[:, None]
    channels = np.arange(3)
    bits = [((numbers >> (3 * i + channels)) & 1) << (7 - i) for i in range(3)]
    return np.sum(bits, axis=0).astype(np.uint8)


def _voc_classes(path: Path) -> np.ndarray:
    classes = _classes(path, stored(path), range(256), _palette())
    if (classes == IGNORED).all():
        raise InputError(
            f"{shown(path)} has no pixel to score", fix="leave the picture out by --list"
        )
    return classes


def _classes(
    path: Path, found: np.ndarray, numbers: Sequence[int], colours: np.ndarray | None = None
) -> np.ndarray:
    """The classes of pixels: (H, W) uint8.

    Parameters
    ----------
    found : what the file contains: (H, W) integer, or (H, W, 3) uint8 RGB.
    numbers : the class of each number that a grey file has; IGNORED remains IGNORED.
    colours : (N, 3) uint8 RGB, of the numbers 0 to N - 1 in a file with colours; None if the data
        set has grey files only.
    """
    labels = found
    table = {i: i for i in range(256)}
    if found.ndim == 3:
        labels = codes(found)
        listed_colours = () if colours is None else codes(colours).tolist()
        table = dict(zip(listed_colours, range(256), strict=False))
    known = {key: numbers[i] for key, i in table.items() if i < len(numbers)}
    if found.ndim == 2:
        known |= {IGNORED: IGNORED}
    values, index = np.unique(labels, return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in known]:
        first = unknown[0]
        what = f"colour {tuple(first >> i & 255 for i in (0, 8, 16))}"
        raise InputError(
            f"{shown(path)} has the {what if found.ndim == 3 else f'number {first}'}, which is no"
            " class of the data set",
            fix="use the label pictures as they are distributed",
        )
    classes = np.array([known[value] for value in values.tolist()], np.uint8)
    return classes[index].reshape(labels.shape)


def _coco27(data: Path, split: str) -> list[Truth]:
    folders = ("annotations", "stuffthingmaps_trainval2017", "stuffthingmaps")
    places = [f"{folder}/{split}" for folder in folders]
    if all(stat_of(data / place) is None for place in places):
        places.append(split)  # the folder in which the archive was unpacked
    folder = _one_folder(data, places)
    return [Truth(path.stem, path) for path in files_below(folder, ".png")]


def _coco_classes(path: Path) -> np.ndarray:
    classes = {i: n for n, (_, ids) in enumerate(COCO27) for i in ids}
    return _classes(path, stored(path), [classes[i] for i in range(182)])


def _cityscapes27(data: Path, split: str) -> list[Truth]:
    folder = _one_folder(data, [f"gtFine/{split}", f"gtFine_trainvaltest/gtFine/{split}"])
    end = "_gtFine_labelIds"
    return [
        Truth(f"{path.parent.name}/{path.stem.removesuffix(end)}_leftImg8bit", path)
        for path in files_below(folder, ".png")
        if path.stem.endswith(end)
    ]


def _cityscapes_classes(path: Path) -> np.ndarray:
    classes = [i - CITYSCAPES[0] if i in CITYSCAPES else IGNORED for i in range(34)]
    return _classes(path, stored(path), classes)


def _potsdam3(data: Path, split: str) -> list[Truth]:
    folder = _one_folder(data, ["5_Labels_all", "labels", "gt"])
    files = [path for suffix in (".png", ".tif", ".mat") for path in files_below(folder, suffix)]
    return [Truth(path.stem.removesuffix("_label"), path) for path in files]


def _potsdam_classes(path: Path) -> np.ndarray:
    """Read a tile: a picture, or a file of IIC's tiles, whose array "gt" has the six numbers."""
    if path.suffix.lower() == ".mat":
        numbers = label_matrix(matlab_array(path, "gt"), path, "gt")
    else:
        numbers = stored(path)
    return _classes(path, numbers, POTSDAM_CLASSES, POTSDAM_COLOURS)


def _saliency(data: Path, split: str) -> list[Truth]:
    kinds = ("DUTS-TE-Mask", "ground_truth_mask", "pixelwiseGT-new-PNG")
    roots = ("", "DUTS-TE", "ECSSD", "DUT-OMRON")
    folder = _one_folder(data, [f"{root}/{kind}".lstrip("/") for kind in kinds for root in roots])
    return [Truth(path.stem, path) for path in files_below(folder, ".png")]


def _foreground(path: Path) -> np.ndarray:
    return class_numbers(path, cv2.IMREAD_GRAYSCALE) > 127


def _davis(data: Path, split: str) -> list[Truth]:
    folder = _one_folder(data, ["Annotations/480p", "DAVIS/Annotations/480p", "masks"])
    files = files_below(folder, ".png")
    return [Truth(path.relative_to(folder).with_suffix("").as_posix(), path) for path in files]


def _object(path: Path) -> np.ndarray:
    return class_numbers(path, cv2.IMREAD_GRAYSCALE) > 0


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses definitions, with which a small file of XML can make a huge text."""

    def doctype(self, name: str, public: str, system: str) -> NoReturn:
        raise ValueError("it has a DOCTYPE")


def _boxes(path: Path) -> Boxes:
    """Read the boxes of VOC: the first pixel has the number 1, and the last one is of the box."""
    text = contents(path)
    try:
        root = ElementTree.fromstring(text, ElementTree.XMLParser(target=_NoDoctype()))
        size = [int(root.findtext(f"size/{key}", "")) for key in ("height", "width")]
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [
            [float(box.findtext(key, "")) for key in corners]
            for box in root.iterfind("object/bndbox")
        ]
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(
            f"{shown(path)} is no annotation of VOC: {error}", fix="copy the data set again"
        ) from error
    return _checked((size[0], size[1]), np.array(boxes).reshape(-1, 4) - (1, 1, 0, 0), path)


def _checked(size: tuple[int, int], boxes: np.ndarray, path: Path) -> Boxes:
    if min(size) < 1 or not (np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all()):
        raise InputError(
            f"{shown(path)} has a picture without pixels, or a box whose right or lower edge is not"
            " right of or below the other",
            fix="copy the data set again",
        )
    return Boxes(size, boxes)


def _coco20k(data: Path, split: str) -> list[Truth]:
    """Read the boxes of COCO's instances. As in LOST's code (Simeoni et al., BMVC 2021), corners
    are rounded to whole pixels, and boxes around crowds are left out."""
    path = _one_folder(data, [f"annotations/instances_{split}.json"])
    text = contents(path)
    try:
        entry = json.loads(text, object_hook=_without_outline)
        pictures = [
            (e["id"], f"{split}/{Path(e['file_name']).stem}", (int(e["height"]), int(e["width"])))
            for e in entry["images"]
        ]
        boxes: dict[Any, list[list[int]]] = {number: [] for number, _, _ in pictures}
        for found in entry["annotations"]:
            if not found["iscrowd"]:
                left, top, width, height = found["bbox"]
                corners = left, top, left + width, top + height
                boxes[found["image_id"]].append([round(value) for value in corners])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{shown(path)} contains no instances of COCO: {error!r}", fix="copy the data set again"
        ) from error
    return [
        Truth(name, _checked(size, np.array(boxes[number], float).reshape(-1, 4), path))
        for number, name, size in pictures
    ]


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop the outline of an object, which is most of the file, as soon as it is read."""
    entry.pop("segmentation", None)
    return entry


LAYOUTS = {
    "bsds500": Layout(_bsds500, _annotators, "test", (200,)),
    "voc2012": Layout(_voc2012, _voc_classes, "val", (1449,)),
    "coco27": Layout(_coco27, _coco_classes, "val2017", (2175,)),
    "cityscapes27": Layout(_cityscapes27, _cityscapes_classes, "val", (500,)),
    "potsdam3": Layout(_potsdam3, _potsdam_classes, pictures=(855,)),
    "saliency": Layout(_saliency, _foreground, pictures=(1000, 5019, 5168)),
    "corloc": Layout(_corloc, _boxes, "trainval", (5011, 11540)),
    "coco20k": Layout(_coco20k, lambda boxes: boxes, "train2014", (19817,)),
    "davis": Layout(_davis, _object),
}


def _one_folder(data: Path, places: Sequence[str]) -> Path:
    """The only one of some folders or files below ``data`` that exists."""
    if (there := stat_of(data)) is None or not stat.S_ISDIR(there.st_mode):
        what = "does not exist" if there is None else "is a file, wanted a folder"
        raise InputError(f"{shown(data)} {what}", fix="check --data")
    found = [data / place for place in places if stat_of(data / place) is not None]
    if len(found) == 1:
        return found[0]
    wanted = ", ".join(places)
    if not found:
        raise InputError(
            f"{shown(data)} contains none of {wanted}",
            fix="check --data, the folder of the data set as it is distributed, and --split",
        )
    raise InputError(
        f"{shown(data)} contains {', '.join(map(shown, found))}; wanted one of them",
        fix="name the folder of one data set",
    )
