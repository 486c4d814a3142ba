"""A folder of masks as a prior: the guide of a picture is a file that was made beforehand."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from runtime.checks import UnknownGuide, check_count
from runtime.engines.named_files import read_regular
from runtime.errors import BundleError, InputError
from runtime.files import file_error, here, shown, stat_of, to_path
from runtime.pictures.label_map import decode_labels
from runtime.pictures.limits import AGAIN
from runtime.prior.guide_list import GUIDES, UNKNOWN, GuideList
from runtime.prior.names import class_names
from runtime.prior.network import two_names
from runtime.prior.reading import MOST_LABELS, check_sums, fits
from runtime.tensors import load_tensors

SOFT = ".safetensors"
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
TENSOR = "probabilities"  # the name of the tensor in a file of probabilities
_OTHERS = ("manifest.json", "run.json", "config.json")  # bundle, run of the trainer, checkpoint


class MasksPrior:
    """A prior that reads the guide of each picture from a folder of masks.

    The mask of photos/left/a.jpg is photos/left/a.png inside the folder, else left/a.png, else
    a.png if no other folder inside the folder contains a mask a. Hidden files are left out, and
    links to folders are followed. A mask is

    - a grey PNG of 8 or 16 bits, whose values are the labels; or a PNG with a palette, whose
      indices are the labels;
    - or a safetensors file with the tensor "probabilities", (h, w, C) float16 or float32, at least
      two classes, whose sum is 1 for each pixel; a pixel of zeros is unknown.

    It has the aspect ratio of the picture and any size. If the folder contains guides.json, which
    ``python -m export guides`` writes, the picture must be the very file whose guide was computed,
    and the mask the very file that was written; this also decides between several masks. The guide
    may then have another aspect ratio, as networks of a fixed input size return it.

    Parameters
    ----------
    folder : its files are listed once, when this object is made.
    names : the names of the classes, in any form that :func:`runtime.prior.names.class_names`
        reads; one name is that of the foreground, label 1; None: classes have numbers only.
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
        self.folder = Path(os.path.abspath(to_path(folder)))
        if not os.fspath(folder) or not is_mask_folder(self.folder):
            raise InputError(
                f"{shown(folder)!r} is no folder of masks",
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
            if not names:
                raise InputError("names of the masks: there are none", fix="leave names out")
        self.names: list[str] | None = names
        if unknown is not None:
            unknown = check_count("unknown", unknown, 0, UNKNOWN)
        self.unknown: int | None = unknown
        self._files: dict[str, list[str]] = {}  # by their names without folder and suffix
        for file in _masks(self.folder):
            self._files.setdefault(_parts(file)[-1], []).append(file)
        listed = self.list.pictures if self.list else {}
        self._listed = {_nfc(entry["file"]): (name, entry) for name, entry in listed.items()}

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
            has another aspect ratio, too large labels, or more classes than names; or the files of
            the picture or the mask differ from those that guides.json lists.
        UnknownGuide : the mask is unknown everywhere.
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
        if self.list is not None:
            self._check_listed(file, data)
        if mask.suffix.lower() == SOFT:
            if self.list is None and self.unknown is not None:
                raise InputError(
                    f"{shown(mask)} contains probabilities, which have no label {self.unknown} for "
                    "unknown pixels",
                    fix="leave --unknown out; a pixel whose probabilities are 0 is unknown",
                )
            guide = _probabilities(data, shown(mask))
        else:
            guide = _labels(data, shown(mask))
            if self.unknown is not None:
                guide[guide == self.unknown] = -1
            if guide.max() >= MOST_LABELS:
                raise InputError(
                    f"{shown(mask)} has the label {guide.max()}; wanted at most {MOST_LABELS - 1}",
                    fix=f"if it means unknown: --unknown {guide.max()}, or MasksPrior(folder, "
                    f"unknown={guide.max()}); else number the classes 0, 1, ...",
                )
        self._check(guide, mask)
        if self.list is None and not fits(guide.shape[:2], picture.shape[:2]):
            (h, w), (height, width) = guide.shape[:2], picture.shape[:2]
            raise InputError(
                f"the mask {shown(mask)} has {h} x {w} pixels, and its picture {shown(path)} "
                f"{height} x {width}; wanted the picture's aspect ratio",
                fix="save a mask of the whole picture, upright as the picture is shown",
            )
        return guide

    def _check(self, guide: np.ndarray, mask: Path) -> None:
        """Check that the guide in a mask has a known pixel, and not more classes than names."""
        if guide.max() <= (-1 if guide.ndim == 2 else 0):
            raise UnknownGuide(
                f"the mask {shown(mask)} is unknown everywhere",
                fix="label some of its pixels, or leave the picture out",
            )
        last = guide.shape[2] - 1 if guide.ndim == 3 else int(guide.max())
        if self.names is None or last < len(self.names):
            return
        what, fix = f"{last + 1} classes", "name each class once"
        if guide.ndim == 2:
            what, fix = f"the label {last}", "name each class once, from label 0 on"
            if self.unknown is None:
                fix += f"; or, if it means unknown: --unknown {last}"
        raise InputError(
            f"{shown(mask)} has {what}, and there are {len(self.names)} names: "
            + ", ".join(self.names)[:200],
            fix=fix,
        )

    def _find(self, path: Path) -> str:
        """Return the mask of a picture, by its path in the folder."""
        parts = _parts(os.path.abspath(path))
        named = self._files.get(parts[-1], [])  # all masks of the picture's name
        found = [file for file in named if _parts(file) == parts[-len(_parts(file)) :]]
        wanted = f"{parts[-1]}.png or {parts[-1]}{SOFT}, also in a folder {parts[-2]!r}"
        if not found:
            fix = "add its mask; python -m export guides writes those of a network"
            if self.list is not None:
                fix = "repeat python -m export guides, which writes the masks that are missing"
            raise InputError(
                f"{shown(path)} has no mask in {shown(self.folder)}; wanted {shown(wanted)}",
                fix=fix,
            )
        if self.list is not None:
            return self._listed_one(found, path)
        most = max(len(_parts(file)) for file in found)
        found = [file for file in found if len(_parts(file)) == most]
        if len(found) > 1:
            raise InputError(
                f"{shown(path)} has {len(found)} masks in {shown(self.folder)}: "
                f"{', '.join(map(shown, found))}; wanted one",
                fix="remove the others, or move them to another folder",
            )
        if most == 1 and len(named) > 1:
            raise InputError(
                f"{shown(self.folder)} contains {len(named)} masks of the name {shown(parts[-1])}, "
                f"and none is in a folder {shown(parts[-2])!r}, as {shown(path)} is: "
                f"{', '.join(map(shown, named[:5]))}",
                fix=f"move its mask to {shown('/'.join(parts[-2:]))}.png inside the folder",
            )
        return found[0]

    def _listed_one(self, files: list[str], path: Path) -> str:
        """Return the one of these masks that guides.json lists for the file of a picture."""
        listed = [file for file in files if _nfc(file) in self._listed]
        if not listed:
            raise InputError(
                f"{shown(self.folder / GUIDES)} does not list {shown(files[0])}, the mask of "
                f"{shown(path)}",
                fix="repeat python -m export guides, which finishes the folder",
            )
        sha256 = hashlib.sha256(read_regular(path, "a picture")).hexdigest()
        for file in listed:
            if self._listed[_nfc(file)][1]["sha256"] == sha256:
                return file
        raise InputError(
            f"{shown(path)} is not the picture {shown(self._listed[_nfc(listed[0])][0])} of "
            f"{shown(self.folder / GUIDES)}: its sha256 differs",
            fix="restore the picture, or repeat python -m export guides, which computes its guide "
            "again",
        )

    def _check_listed(self, file: str, data: bytes) -> None:
        """InputError if the content of a mask is not what guides.json lists."""
        if hashlib.sha256(data).hexdigest() != self._listed[_nfc(file)][1]["file_sha256"]:
            raise InputError(
                f"the mask {shown(self.folder / file)} was changed after {GUIDES} was written: its "
                "sha256 differs",
                fix="repeat python -m export guides, which writes it again",
            )


def is_mask_folder(folder: Path) -> bool:
    """Whether a folder contains masks: guides.json, or a PNG or safetensors file.
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
    return files_below(folder, (".png", SOFT))


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of the files in a folder and its folders, relative to it: first the files of
    a folder, then those of its folders, in the order of their names.

    Links to folders are followed, except to a folder that contains the link. Hidden files and
    folders are left out, and a folder that does not exist has no files.

    Parameters
    ----------
    suffixes : of the files, in small letters; their names may have capital ones.

    Raises
    ------
    InputError : the operating system refuses to list a folder.

    Example
    -------
    >>> [*files_below(Path("masks"), (".png",))]
    ['a.png', 'left/a.png']
    """
    return _below(folder, PurePath(), frozenset(), suffixes)


def _below(
    folder: Path, inside: PurePath, above: frozenset[str], suffixes: tuple[str, ...]
) -> Iterator[str]:
    """``inside`` is the path of ``folder`` that is yielded; ``above`` are the real paths of the
    folders around it."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise file_error("read", folder, error) from error
    for name, is_folder in found:
        if not is_folder and PurePath(name).suffix.lower() in suffixes:
            yield (inside / name).as_posix()
    for name, is_folder in found:
        if is_folder:
            yield from _below(folder / name, inside / name, above | {real}, suffixes)


def _parts(file: str) -> tuple[str, ...]:
    """Return the folders of a file and its name without suffix, in one spelling of accents. A
    number behind a point is no suffix: frame.001 and frame.002 are two names."""
    path = PurePath(_nfc(file))
    return path.parts if path.suffix[1:].isdigit() else path.with_suffix("").parts


def _nfc(text: str) -> str:
    """Return a path in one spelling of accents: macOS writes a letter and its accent as two
    characters, other systems mostly as one."""
    return unicodedata.normalize("NFC", text)


def _labels(data: bytes, name: str) -> np.ndarray:
    """Return the labels in the bytes of a PNG, (h, w) int32."""
    try:
        return decode_labels(data, name).astype(np.int32)
    except InputError as error:
        fix = "save the mask again" if error.fix == AGAIN else error.fix
        raise InputError(f"the mask {error.message}", fix=fix) from error


def _probabilities(data: bytes, name: str) -> np.ndarray:
    """Return the probabilities in the bytes of a safetensors file, (h, w, C) float32."""
    try:
        tensors = load_tensors(data, name)
    except BundleError as error:
        if isinstance(error.__cause__, KeyError):  # a type that NumPy does not have
            raise InputError(
                f"{name} contains values of type {error.__cause__}; wanted float16 or float32",
                fix="convert them: probabilities.half()",
            ) from error
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
    check_sums(found, f"{name} contains")
    return found.astype(np.float32)
