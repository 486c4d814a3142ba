"""The pictures to score on: CamVid, DAVIS, BSDS500 and prior networks of the developer data set.

The set is not part of the project. It lies in the folder named by SEG_DATA, or else in
``../shared/data`` beside the repository; see the README there for sources and licences.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from runtime.errors import InputError, MissingBackend

CAMVID_CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree",
    "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
CAMVID_VOID = len(CAMVID_CLASSES)
CITYSCAPES_TO_CAMVID = {
    "sky": "Sky", "building": "Building", "pole": "Pole", "traffic light": "Pole",
    "road": "Road", "sidewalk": "Pavement", "vegetation": "Tree", "terrain": "Tree",
    "traffic sign": "SignSymbol", "wall": "Fence", "fence": "Fence",
    "car": "Car", "truck": "Car", "bus": "Car", "train": "Car", "person": "Pedestrian",
    "rider": "Bicyclist", "motorcycle": "Bicyclist", "bicycle": "Bicyclist",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture and where its truth lies; nothing is read before a method asks for it."""

    name: str
    image_path: Path
    truth_path: Path

    def image(self) -> np.ndarray:
        """Read the picture: (H, W, 3) uint8 RGB."""
        return cv2.cvtColor(_read(self.image_path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


class CamvidFrame(Picture):
    def truth(self) -> np.ndarray:
        """Read the classes: (H, W) uint8, indices into CAMVID_CLASSES, or CAMVID_VOID."""
        return _read(self.truth_path, cv2.IMREAD_UNCHANGED)


class DavisFrame(Picture):
    @property
    def sequence(self) -> str:
        return self.image_path.parent.name

    def mask(self) -> np.ndarray:
        """Read the foreground: (H, W) bool."""
        return _read(self.truth_path, cv2.IMREAD_GRAYSCALE) > 0


class BsdsPicture(Picture):
    def annotators(self) -> list[np.ndarray]:
        """Read what each of 4 to 9 people drew: (H, W) int32 region numbers from 1, no classes."""
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise MissingBackend(
                "scipy: needed to read BSDS500", fix="pip install 'dynaguide-edge[bench]'"
            ) from error
        people = loadmat(self.truth_path)["groundTruth"][0]
        return [person["Segmentation"][0, 0].astype(np.int32) for person in people]


def data_root() -> Path | None:
    """Find the data set: SEG_DATA if set, else ../shared/data beside the repository, else None."""
    if named := os.environ.get("SEG_DATA"):
        if not Path(named).is_dir():
            raise InputError(f"SEG_DATA: expected a folder, got {named}", fix="set SEG_DATA=...")
        return Path(named)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return beside if beside.is_dir() else None


def prior_path(name: str) -> Path:
    """Locate a prior network, such as ``espnetv2_s0.5_cityscapes_512x256.onnx``."""
    return _locate("priors", name)


def clip_path(name: str) -> Path:
    """Locate a short video, such as ``sam2_bedroom.mp4``."""
    return _locate("clips", name)


def camvid(count: int = 12, *, split: str = "dev") -> list[CamvidFrame]:
    """Pick frames of CamVid's training part, evenly spaced in name order.

    The two splits share no frame. With n frames and h = n // (2 count), `dev` is at
    ``np.linspace(0, n - 1 - h, count)`` and `other` h frames later, about halfway between them.
    So the 12 `dev` frames of 92 are numbers 0, 8, ... 88 and the `other` are 3, 11, ... 91.
    """
    _check_split(split, ("dev", "other"))
    frames = [
        CamvidFrame(path.stem, path, _locate("camvid", "trainannot", path.name))
        for path in sorted(_locate("camvid", "train").glob("*.png"))
    ]
    half = len(frames) // (2 * max(count, 1))
    if half == 0:
        raise InputError(f"count: expected at most half of {len(frames)} frames, got {count}")
    return _spread(frames[: len(frames) - half] if split == "dev" else frames[half:], count)


def davis(step: int = 9) -> list[DavisFrame]:
    """Take every `step`-th frame of blackswan, car-shadow and dog, from the first on.

    The default takes 6, 5 and 7 of their 50, 40 and 60 frames; 1 takes all, in order.
    """
    if step < 1:
        raise InputError(f"step: expected at least 1, got {step}")
    masks = _locate("davis", "masks")
    return [
        DavisFrame(f"{folder.name}/{path.stem}", path, masks / folder.name / f"{path.stem}.png")
        for folder in sorted(_locate("davis", "frames").iterdir())
        for path in sorted(folder.glob("*.jpg"))[::step]
    ]


def bsds(count: int = 12, *, split: str = "val") -> list[BsdsPicture]:
    """Pick pictures of BSDS500 at ``np.linspace(0, n - 1, count)`` in name order.

    `split` is "train" (200 pictures) or "val" (100); the test part is not in the data set.
    """
    _check_split(split, ("train", "val"))
    truths = _locate("bsds500", "groundTruth", split)
    pictures = [
        BsdsPicture(path.stem, path, truths / f"{path.stem}.mat")
        for path in sorted(_locate("bsds500", "images", split).glob("*.jpg"))
    ]
    return _spread(pictures, count)


def camvid_lookup(names: Sequence[str]) -> np.ndarray:
    """Make the table from a Cityscapes network's class indices to CamVid's: ``table[labels]``.

    Returns (len(names),) uint8; 255, which counts as an error, where CamVid has no such class.
    """
    found = (CITYSCAPES_TO_CAMVID.get(name) for name in names)
    return np.array([CAMVID_CLASSES.index(to) if to else 255 for to in found], np.uint8)


def _spread(items: list, count: int) -> list:
    if not 1 <= count <= len(items):
        raise InputError(f"count: expected 1 to {len(items)}, got {count}")
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _locate(*parts: str) -> Path:
    root = data_root()
    path = root.joinpath(*parts) if root else None
    if path is None or not path.exists():
        wanted = path or "/".join(parts)
        raise InputError(f"developer data set: no {wanted}", fix="set SEG_DATA=/path/to/data")
    return path


def _read(path: Path, flags: int) -> np.ndarray:
    image = cv2.imread(str(path), flags)
    if image is None:
        raise InputError(f"{path}: missing or not a picture")
    return image


def _check_split(split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise InputError(f"split: expected one of {', '.join(splits)}, got {split!r}")
