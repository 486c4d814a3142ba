"""A folder of masks as a prior: the guide of a picture is a file that was made beforehand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from runtime.checks import check_count
from runtime.engines.named_files import read_regular
from runtime.errors import BundleError, InputError
from runtime.files import file_error, here, shown, stat_of
from runtime.pictures.files import SUFFIXES
from runtime.pictures.label_map import decode_labels
from runtime.prior.guide_list import GUIDES, UNKNOWN, GuideList
from runtime.prior.names import class_names
from runtime.prior.network import two_names
from runtime.prior.reading import MOST_LABELS, fits
from runtime.tensors import load_tensors

SOFT = ".safetensors"
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
TENSOR = "probabilities"  # the name of the tensor in a file of probabilities
_OTHERS = ("manifest.json", "run.json", "config.json")  # bundle, run of the trainer, checkpoint


class MasksPrior:
    """A prior that reads the guide of each picture from a folder of masks.

    The mask of a picture is the file whose path inside the folder, without its suffix, is the end
    of the picture's path without its suffix: of photos/left/a.jpg it is left/a.png, or a.png.
    Hidden files are left out. A mask is

    - a grey PNG of 8 or 16 bits, whose values are the labels; or a PNG with a palette, whose
      indices are the labels;
    - or a safetensors file with the tensor "probabilities", (h, w, C) float16 or float32, at least
      two classes; a pixel of zeros is unknown.

    It has the aspect ratio of the picture and any size. If the folder contains guides.json, which
    ``python -m export guides`` writes, the picture must be the very file whose guide was computed;
    this also decides between several masks. The guide may then have another aspect ratio, as
    networks of a fixed input size return it.

    Parameters
    ----------
    folder : its files are listed once, when this object is made.
    names : the names of the classes, in any form that :func:`runtime.prior.names.class_names`
        reads; None: classes have numbers only.
    unknown : the label of unknown pixels, such as 255 in many data sets; None: there is none.

    Raises
    ------
    InputError : the folder does not exist, is a bundle or something else, or contains no masks;
        guides.json is damaged, or states names and unknown itself; or ``names`` or
        ``unknown`` cannot be used.

    Example
    -------
    >>> seg = Segmenter(MasksPrior("masks", names=["road", "sky"], unknown=255))
    """

    backend = "masks"
    gpu: int | None = None
    engine: Any = None
    unknown_fix = "say so: --unknown 255, or MasksPrior(folder, unknown=255)"

    def __init__(
        self, folder: str | os.PathLike[str], *, names: Any = None, unknown: int | None = None
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        if not is_mask_folder(self.folder):
            raise InputError(
                f"{shown(folder)} is no folder of masks",
                fix=f"name a folder with PNG or {SOFT} files; the current folder is {here()}",
            )
        self.list: GuideList | None = None
        if stat_of(self.folder / GUIDES) is not None:
            if names is not None or unknown is not None:
                raise InputError(
                    f"names and unknown: {shown(self.folder / GUIDES)} states these itself",
                    fix="leave them out",
                )
            self.list = GuideList.read(self.folder)
            names, unknown = self.list.names, UNKNOWN
        if names is not None:
            names = two_names(class_names(names, "names of the masks"))
        self.names: list[str] | None = names
        if unknown is not None:
            unknown = check_count("unknown", unknown, 0, UNKNOWN)
        self.unknown: int | None = unknown
        self._files: dict[str, list[str]] = {}  # by their paths in the folder without suffix
        for file in _masks(self.folder):
            self._files.setdefault(_stem(file), []).append(file)
        listed = self.list.pictures if self.list else {}
        self._listed = {entry["file"]: (name, entry["sha256"]) for name, entry in listed.items()}

    def __call__(self, picture: np.ndarray, path: Path | None) -> np.ndarray:
        """Return the guide of a picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.
        path : of its file; None for a picture that has none.

        Returns
        -------
        (h, w) int32 labels with -1 = unknown, or (h, w, C) float32 probabilities.

        Raises
        ------
        InputError : the picture has no path; it has no mask, or several; its mask cannot be read,
            has another aspect ratio, or has too large labels; or the picture's file is another one
            than that whose guide was computed.
        MissingBackend : safetensors is not installed.
        """
        if path is None:
            raise InputError(
                "a folder of masks needs pictures with names: this one is an array, a stream, the "
                "content of a file or the frame of a video",
                fix="pass the path of the picture's file, or the folder of the frames; or pass the "
                "masks by a callable prior",
            )
        file = self._find(path)
        mask = self.folder / file
        data = read_regular(mask, "a mask")
        if mask.suffix.lower() == SOFT:
            guide = _probabilities(data, shown(mask))
        else:
            guide = decode_labels(data, shown(mask)).astype(np.int32)
            if self.unknown is not None:
                guide[guide == self.unknown] = -1
            if guide.max() >= MOST_LABELS:
                raise InputError(
                    f"{shown(mask)} has the label {guide.max()}; wanted at most {MOST_LABELS - 1}",
                    fix=f"if it means unknown: --unknown {guide.max()}, or MasksPrior(folder, "
                    f"unknown={guide.max()}); else number the classes 0, 1, ...",
                )
        if self.list is None and not fits(guide.shape[:2], picture.shape[:2]):
            (h, w), (height, width) = guide.shape[:2], picture.shape[:2]
            raise InputError(
                f"the mask {shown(mask)} has {h} x {w} pixels, and its picture {shown(path)} "
                f"{height} x {width}; wanted the picture's aspect ratio",
                fix="save a mask of the whole picture, upright as the picture is shown",
            )
        return guide

    def _find(self, path: Path) -> str:
        """Return the mask of a picture, by its path in the folder."""
        parts = PurePath(os.path.abspath(path)).with_suffix("").parts
        ends = ["/".join(parts[first:]) for first in range(len(parts) - 1, 0, -1)]
        found = [file for end in ends for file in self._files.get(end, ())]
        if found and self.list is not None:
            return self._listed_one(found, path)
        if len(found) > 1:
            raise InputError(
                f"{shown(path)} has {len(found)} masks in {shown(self.folder)}: "
                f"{', '.join(map(shown, found))}; wanted one",
                fix="remove the others, or move them to another folder",
            )
        if not found:
            raise InputError(
                f"{shown(path)} has no mask in {shown(self.folder)}; wanted {shown(ends[0])}.png "
                f"or {shown(ends[0])}{SOFT}, also in a folder that has the name of the picture's",
                fix="add its mask; python -m export guides writes those of a network",
            )
        return found[0]

    def _listed_one(self, files: list[str], path: Path) -> str:
        """Return the one of these masks that guides.json lists for the file of a picture."""
        listed = [file for file in files if file in self._listed]
        if not listed:
            raise InputError(
                f"{shown(self.folder / GUIDES)} does not list {shown(files[0])}, the mask of "
                f"{shown(path)}",
                fix="run python -m export guides again, which finishes the folder",
            )
        sha256 = hashlib.sha256(read_regular(path, "a picture")).hexdigest()
        for file in listed:
            if self._listed[file][1] == sha256:
                return file
        raise InputError(
            f"{shown(path)} is not the picture {shown(self._listed[listed[0]][0])} of "
            f"{shown(self.folder / GUIDES)}: its sha256 differs",
            fix="restore the picture, or write the guides of these pictures into another "
            "folder: python -m export guides",
        )


def is_mask_folder(folder: Path) -> bool:
    """Whether a folder contains masks: guides.json, or a file that is a picture or probabilities.
    A bundle, a folder with an .onnx file, a run of the trainer and a checkpoint contain none.

    Raises
    ------
    InputError : the operating system refuses to list the folder.

    Example
    -------
    >>> is_mask_folder(Path("city.bundle"))
    False
    """
    if stat_of(folder / GUIDES) is not None:
        return True
    if any(stat_of(folder / name) is not None for name in _OTHERS) or any(folder.glob("*.onnx")):
        return False
    return next(_masks(folder), None) is not None


def _masks(folder: Path) -> Iterator[str]:
    """Yield the paths of the files in a folder and its folders that can be masks, relative to it
    and in order."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise file_error("read", error.filename or folder, error) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = PurePath(place).relative_to(folder)
        for name in sorted(names):
            if PurePath(name).suffix.lower() in (*SUFFIXES, SOFT) and not name.startswith("."):
                yield (inside / name).as_posix()


def _stem(file: str) -> str:
    return PurePath(file).with_suffix("").as_posix()


def _probabilities(data: bytes, name: str) -> np.ndarray:
    """Return the probabilities in the bytes of a safetensors file, (h, w, C) float32."""
    try:
        tensors = load_tensors(data, name)
    except BundleError as error:
        raise InputError(
            f"{name} is no safetensors file, or is a damaged one: {error.__cause__}",
            fix="write it again",
        ) from error
    found = tensors.get(TENSOR)
    if found is None or len(tensors) > 1:
        raise InputError(
            f"{name} contains the tensors {', '.join(tensors) or 'none'}; wanted {TENSOR} alone",
            fix=f'save_file({{"{TENSOR}": array}}, path)',
        )
    right = found.ndim == 3 and found.shape[2] > 1 and found.size and found.dtype in _FLOATS
    if not right or not np.isfinite(found).all() or found.min() < 0:
        raise InputError(
            f"{name}: {TENSOR} is {found.shape} {found.dtype}; wanted (h, w, C) float16 or "
            "float32, at least two classes, each value finite and not negative",
            fix="save probabilities, for example a soft-max over the last axis",
        )
    return found.astype(np.float32)
