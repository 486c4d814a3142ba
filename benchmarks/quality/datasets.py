"""The developer data set: pictures of CamVid, COCO, DAVIS and BSDS500 with truth, and networks.

The data set is not part of the project. It is in the folder that SEG_DATA names, or else in
``../shared/data`` beside the repository; its README names sources and licences.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.files import class_numbers
from benchmarks.quality.matlab import label_matrix, matlab_array, wrong_form
from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of
from runtime.opencv import cv2
from runtime.pictures.files import picture_files
from runtime.pictures.load import load_image

if TYPE_CHECKING:
    from runtime.prior.network import NetworkPrior

CAMVID_CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree",
    "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
CAMVID_VOID = len(CAMVID_CLASSES)
CAMVID_SEQUENCES = {"trained": ("0016E5",), "held_out": ("0001TP", "0006R0")}
COCO_CLASSES = 27
COCO_VOID = 255
CITYSCAPES_TO_CAMVID = {
    "sky": "Sky", "building": "Building", "pole": "Pole", "traffic light": "Pole",
    "road": "Road", "sidewalk": "Pavement", "vegetation": "Tree", "terrain": "Tree",
    "traffic sign": "SignSymbol", "wall": "Fence", "fence": "Fence",
    "car": "Car", "truck": "Car", "bus": "Car", "train": "Car", "person": "Pedestrian",
    "rider": "Bicyclist", "motorcycle": "Bicyclist", "bicycle": "Bicyclist",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture and the file of its truth. The files are read when a method needs them.

    Parameters
    ----------
    name : unique in its data set.
    image_path, truth_path : the files.
    """

    name: str
    image_path: Path
    truth_path: Path

    def image(self) -> np.ndarray:
        """Read the picture: (H, W, 3) uint8 RGB.

        Raises
        ------
        InputError : the file is missing or damaged.
        """
        return load_image(self.image_path)[0]


class CamvidFrame(Picture):
    """A frame of CamVid."""

    @property
    def sequence(self) -> str:
        """The name of the drive that the frame is of, as "0016E5"."""
        return self.name.partition("_")[0]

    def truth(self) -> np.ndarray:
        """Read the classes: (H, W) uint8, indices into CAMVID_CLASSES, or CAMVID_VOID.

        Raises
        ------
        InputError : the file is missing or damaged.
        """
        return class_numbers(self.truth_path)


class CocoPicture(Picture):
    """A picture of COCO with the classes of its panoptic annotation."""

    def truth(self) -> np.ndarray:
        """Read the classes: (H, W) uint8, indices into the names that :func:`coco_classes` returns,
        or COCO_VOID.

        Raises
        ------
        InputError : the file is missing or damaged, or it contains an unknown category.
        """
        categories = class_numbers(self.truth_path)
        classes = coco_classes()[1][np.minimum(categories, 255)]
        if (unknown := categories[classes == COCO_CLASSES]).size:
            raise InputError(
                f"{shown(self.truth_path)} has category {unknown[0]}, which categories.json lacks",
                fix="copy the data set again",
            )
        return classes


class DavisFrame(Picture):
    """A frame of a DAVIS sequence."""

    @property
    def sequence(self) -> str:
        """The name of the sequence, as "dog"."""
        return self.image_path.parent.name

    def mask(self) -> np.ndarray:
        """Read the foreground: (H, W) bool.

        Raises
        ------
        InputError : the file is missing or damaged.
        """
        return class_numbers(self.truth_path, cv2.IMREAD_GRAYSCALE) > 0


class BsdsPicture(Picture):
    """A picture of BSDS500."""

    def annotators(self) -> list[np.ndarray]:
        """Read the regions that 4 to 9 people have drawn; they have no classes.

        Returns
        -------
        For each person (H, W) int32, numbers of regions from 1.

        Raises
        ------
        InputError : the file is missing or damaged, or has another form.
        MissingBackend : SciPy is not installed.
        """
        key = "groundTruth"
        people = matlab_array(self.truth_path, key)
        try:
            maps = [person["Segmentation"][0, 0] for person in people[0]]
        except (LookupError, ValueError, TypeError) as error:
            raise wrong_form(self.truth_path, key) from error
        found = [label_matrix(numbers, self.truth_path, key) for numbers in maps]
        if len({regions.shape for regions in found}) != 1:
            raise wrong_form(self.truth_path, key)
        return found


def data_root() -> Path | None:
    """Find the data set: SEG_DATA if set, else ../shared/data beside the repository, else None.

    Raises
    ------
    InputError : SEG_DATA names no folder.
    """
    if named := os.environ.get("SEG_DATA"):
        if not _is_folder(Path(named)):
            raise InputError(
                f"SEG_DATA: expected a folder, got {named}", fix="set SEG_DATA=/path/to/data"
            )
        return Path(named)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return beside if _is_folder(beside) else None


def prior_path(name: str) -> Path:
    """Locate a prior network, such as ``espnetv2_s0.5_cityscapes_512x256.onnx``.

    Raises
    ------
    InputError : the data set has no such file.
    """
    return _locate("priors", name)


def guide_of(network: NetworkPrior, picture: np.ndarray) -> np.ndarray:
    """The network's output for a picture (H, W, 3) uint8, at its own size: (h, w, C) float32
    probabilities or (h, w) int32 labels."""
    guide = network(picture, picture)
    assert isinstance(guide, np.ndarray)  # it is on the host, as the picture is
    return guide


def clip_path(name: str) -> Path:
    """Locate a short video, such as ``sam2_bedroom.mp4``.

    Raises
    ------
    InputError : the data set has no such file.
    """
    return _locate("clips", name)


def camvid(count: int = 12, *, split: str = "dev") -> list[CamvidFrame]:
    """Pick frames of CamVid's training part, evenly spaced in name order.

    The two splits share no frame. With n frames and h = n // (2 count), the frames of `dev` have
    the numbers ``np.linspace(0, n - 1 - h, count)``. The frames of `other` are h numbers later,
    about halfway between those of `dev`. So of 92 frames, `dev` has 0, 8, ... 88 and `other` 3, 11,
    ... 91.

    Parameters
    ----------
    count : number of frames, at most half of all.
    split : "dev" or "other".

    Raises
    ------
    InputError : ``count`` or ``split`` is another value, or the data set is missing.
    """
    _check_split(split, ("dev", "other"))
    frames = [
        CamvidFrame(path.stem, path, _locate("camvid", "trainannot", path.name))
        for path in _pictures(_locate("camvid", "train"), ".png")
    ]
    half = len(frames) // (2 * max(count, 1))
    if half == 0:
        raise InputError(
            f"count: expected at most half of {len(frames)} frames, got {count}",
            fix=f"use {len(frames) // 2} or fewer",
        )
    return _spread(frames[: len(frames) - half] if split == "dev" else frames[half:], count)


def camvid_drive(part: str) -> list[CamvidFrame]:
    """List the frames of CamVid's training part by the drive that they are of.

    Frames of one drive show the same street, so that a random choice of frames would hold out
    pictures that are nearly those that are trained on. "trained": the 51 frames of drive 0016E5, by
    day. "held_out": the 25 frames of 0006R0, by day, and the 16 frames of 0001TP, at dusk.

    Parameters
    ----------
    part : "trained" or "held_out".

    Raises
    ------
    InputError : ``part`` is another value, or the data set is missing.
    """
    _check_split(part, tuple(CAMVID_SEQUENCES))
    frames = [
        CamvidFrame(path.stem, path, _locate("camvid", "trainannot", path.name))
        for path in _pictures(_locate("camvid", "train"), ".png")
    ]
    return [frame for frame in frames if frame.sequence in CAMVID_SEQUENCES[part]]


def camvid_val() -> list[CamvidFrame]:
    """List all frames of CamVid's val part, which is a part of drive 0016E5.

    Raises
    ------
    InputError : the data set is missing.
    """
    return [
        CamvidFrame(path.stem, path, _locate("camvid", "valannot", path.name))
        for path in _pictures(_locate("camvid", "val"), ".png")
    ]


def coco_mini(part: str) -> list[CocoPicture]:
    """List pictures of COCO train2017. Their truth has 27 classes, the supercategories of the
    panoptic categories, so a score on them is named "COCO-panoptic-derived 27".

    A picture belongs to "trained" if the SHA-256 of its name, as a number, has a remainder of 0, 1
    or 2 modulo 5, else to "held_out": 60 and 40 pictures.

    Parameters
    ----------
    part : "trained" or "held_out".

    Raises
    ------
    InputError : ``part`` is another value, or the data set is missing.
    """
    _check_split(part, ("trained", "held_out"))
    masks = _locate("coco_mini", "semantic_masks")
    return [
        CocoPicture(path.stem, path, masks / f"{path.stem}.png")
        for path in _pictures(_locate("coco_mini", "images"), ".jpg")
        if (int(hashlib.sha256(path.stem.encode()).hexdigest(), 16) % 5 < 3) == (part == "trained")
    ]


def coco_classes() -> tuple[tuple[str, ...], np.ndarray]:
    """Read the names of the 27 classes of :func:`coco_mini` and the table that maps categories.

    Returns
    -------
    The names in alphabetical order, and (256,) uint8: the class of each category, COCO_VOID for
    category 0, which marks pixels without a category, and COCO_CLASSES for unused numbers.

    Raises
    ------
    InputError : the file is missing, cannot be read or has another form.
    """
    path = _locate("coco_mini", "categories.json")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        names = tuple(sorted(entry["supercategories"]))
        table = np.full(256, COCO_CLASSES, np.uint8)
        table[0] = COCO_VOID
        for category in entry["categories"]:
            table[category["id"]] = names.index(category["supercategory"])
    except OSError as error:
        raise file_error("read", path, error) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{shown(path)} is not the list of COCO's categories: {error!r}",
            fix="copy the data set again",
        ) from error
    return names, table


def davis(step: int = 9, *, folder: str = "davis") -> list[DavisFrame]:
    """Pick every `step`-th frame of blackswan, car-shadow and dog, beginning with the first.

    The default picks 6, 5 and 7 of the sequences' 50, 40 and 60 frames; 1 picks all, in order.

    Parameters
    ----------
    folder : "davis", or "davis_more": 40 frames of each of six other sequences.

    Raises
    ------
    InputError : ``step`` is below 1, or the data set is missing.
    """
    if step < 1:
        raise InputError(f"step: expected at least 1, got {step}", fix="1 picks all frames")
    masks, frames = _locate(folder, "masks"), _locate(folder, "frames")
    try:
        names = sorted(name for name in os.listdir(frames) if not name.startswith("."))
    except OSError as error:
        raise file_error("read", frames, error) from error
    return [
        DavisFrame(f"{name}/{path.stem}", path, masks / name / f"{path.stem}.png")
        for name in names
        if _is_folder(frames / name)
        for path in _pictures(frames / name, ".jpg")[::step]
    ]


def bsds(count: int = 12, *, split: str = "val") -> list[BsdsPicture]:
    """Pick pictures of BSDS500 at ``np.linspace(0, n - 1, count)`` in name order.

    Parameters
    ----------
    count : number of pictures.
    split : "train" (200 pictures) or "val" (100); the test part is not in the data set.

    Raises
    ------
    InputError : ``count`` or ``split`` is another value, or the data set is missing.
    """
    _check_split(split, ("train", "val"))
    truths = _locate("bsds500", "groundTruth", split)
    pictures = [
        BsdsPicture(path.stem, path, truths / f"{path.stem}.mat")
        for path in _pictures(_locate("bsds500", "images", split), ".jpg")
    ]
    return _spread(pictures, count)


def camvid_lookup(names: Sequence[str]) -> np.ndarray:
    """Make a table that maps the classes of a Cityscapes network to CamVid's: ``table[labels]``.

    Parameters
    ----------
    names : the network's class names.

    Returns
    -------
    (len(names),) uint8: indices into CAMVID_CLASSES. A class that CamVid lacks becomes 255, which
    the metrics count as an error.
    """
    found = (CITYSCAPES_TO_CAMVID.get(name) for name in names)
    return np.array([CAMVID_CLASSES.index(to) if to else 255 for to in found], np.uint8)


def _spread(items: list, count: int) -> list:
    if not 1 <= count <= len(items):
        raise InputError(
            f"count: expected 1 to {len(items)}, got {count}", fix=f"use {len(items)} or fewer"
        )
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _locate(*parts: str) -> Path:
    root = data_root()
    path = root.joinpath(*parts) if root else None
    if path is None or stat_of(path) is None:
        wanted = path or "/".join(parts)
        raise InputError(f"developer data set: no {wanted}", fix="set SEG_DATA=/path/to/data")
    return path


def _is_folder(path: Path) -> bool:
    found = stat_of(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _pictures(folder: Path, suffix: str) -> list[Path]:
    """List pictures in the order of their names, in which published results chose from them."""
    return sorted(path for path in picture_files([folder]) if path.suffix == suffix)


def _check_split(split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise InputError(
            f"split: expected one of {', '.join(splits)}, got {split!r}", fix=f"use {splits[0]!r}"
        )


def boosting_folders() -> list[Path]:
    """The folders of the pictures for Boosting: those of coco_mini, and the train part of BSDS500.

    Raises
    ------
    InputError : the data set is missing.
    """
    return [_locate("coco_mini", "images"), _locate("bsds500", "images", "train")]


def coco_things(picture: CocoPicture) -> np.ndarray:
    """Read where the things of a picture are, such as people and cars, not sky: (H, W) bool.

    Raises
    ------
    InputError : a file is missing, cannot be read or has another form.
    """
    path = _locate("coco_mini", "categories.json")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        things = [category["id"] for category in entry["categories"] if category["isthing"]]
    except OSError as error:
        raise file_error("read", path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{shown(path)} is not the list of COCO's categories: {error!r}",
            fix="copy the data set again",
        ) from error
    return np.isin(class_numbers(picture.truth_path), things)
