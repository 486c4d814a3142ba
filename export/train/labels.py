"""Labels of pictures: which file has the labels of a picture, and which class an id stands for."""

from __future__ import annotations

import io
import json
import re
import stat
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.engines.named_files import read_regular
from runtime.errors import InputError
from runtime.files import shown, stat_of
from runtime.pictures.label_map import decode_labels
from runtime.pictures.limits import check_size
from runtime.pictures.load import load_image
from runtime.prior.names import class_names, names_in

MISSING = 0.05  # largest share of pictures that may have no labels
_LARGEST = 2**16 - 1  # id of a class
_SHOWN = 10  # names in a message
_RESERVED = re.compile(r"cluster [0-9]+")  # names of clusters without a class
_FIX = 'write a JSON list of names, a JSON object {"id": "name"}, or one name per line'


@dataclass(frozen=True)
class Classes:
    """The names of the classes, and the class that each id in the labels stands for.

    Parameters
    ----------
    names : of the classes, all different.
    of_id : the class number of each id. Several ids may stand for one class.
    """

    names: tuple[str, ...]
    of_id: dict[int, int]

    @classmethod
    def read(cls, path: Path) -> Classes:
        """Read the classes from a file.

        Parameters
        ----------
        path : a file with a JSON list of names or one name per line, for the ids 0, 1, 2 and so on;
            or with a JSON object {"id": "name"}. Ids that have the same name are one class.

        Raises
        ------
        InputError : the file cannot be read or contains something else; an id is no whole number
            from 0 to 65535, or is named twice; a name is empty, or of the form "cluster 7", which
            is the name of a cluster without a class.

        Example
        -------
        >>> Classes.read(Path("27.json")).names  # {"1": "person", "2": "vehicle", "3": "vehicle"}
        ('person', 'vehicle')
        """
        where = shown(path)
        try:
            text = read_regular(path, "a file with names of classes").decode("utf-8-sig").rstrip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is no text in UTF-8", fix=_FIX) from error
        try:
            value = json.loads(text, object_pairs_hook=tuple)  # a dict would drop equal keys
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, tuple):
            ids = [_id(key, where) for key, _ in value]
            if len({*ids}) < len(ids):
                raise InputError(f"{where} contains an id twice", fix="leave one of them out")
            found = class_names([name for _, name in value], where)
        else:
            found = names_in(text, where) if text else []
            ids = [*range(len(found))]
            if len(found) > _LARGEST + 1:
                raise InputError(
                    f"{where} contains {len(found)} names; wanted at most {_LARGEST + 1}, because "
                    f"the ids of classes are 0 to {_LARGEST}",
                    fix="leave out the names that no pixel has",
                )
        if not found:
            raise InputError(f"{where} contains no names", fix=_FIX)
        for name in found:
            if not name.strip() or _RESERVED.fullmatch(name):
                raise InputError(
                    f"{where}: a class has the name {name!r}",
                    fix="choose another name; those like 'cluster 7' are of clusters without a "
                    "class",
                )
        names = tuple(dict.fromkeys(found))
        numbers = {name: number for number, name in enumerate(names)}
        return cls(names, {i: numbers[name] for i, name in zip(ids, found, strict=True)})

    def numbers(self, ids: np.ndarray, ignore: int | None = None) -> np.ndarray:
        """The class number of each pixel.

        Parameters
        ----------
        ids : (H, W) integer, of :func:`read_ids`.
        ignore : the id of pixels without labels.

        Returns
        -------
        (H, W) int32: -1 for ``ignore``, and the number of classes for an id that is in no class.
        """
        table = np.full(_LARGEST + 2, len(self.names), np.int32)
        table[[*self.of_id]] = [*self.of_id.values()]
        known = (ids >= 0) & (ids <= _LARGEST)
        numbers = table[np.where(known, ids, _LARGEST + 1)]
        return numbers if ignore is None else np.where(ids == ignore, -1, numbers)


def _id(key: str, where: str) -> int:
    """The id that a key of a JSON object contains."""
    if not re.fullmatch("[0-9]{1,5}", key) or int(key) > _LARGEST:
        raise InputError(
            f"{where}: {key[:40]!r} is no id of a class; wanted a whole number, 0 to {_LARGEST}",
            fix='write the object as {"0": "road", "7": "sky"}',
        )
    return int(key)


@dataclass(frozen=True)
class LabelSet:
    """Pictures, and the files with their labels.

    Parameters
    ----------
    pairs : the file of each picture, and that of its labels.
    missing : the names of the pictures without labels.
    """

    pairs: tuple[tuple[Path, Path], ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def find(cls, pictures: Sequence[Path], folder: Path) -> LabelSet:
        """Find the labels of pictures: the file STEM.png or STEM.npy for the picture STEM.jpg.

        Parameters
        ----------
        pictures : files.
        folder : of the labels.

        Raises
        ------
        InputError : the folder does not exist; no picture has labels, or more than MISSING of them
            have none; two pictures or two files of labels have the same stem.
        """
        found = stat_of(folder)
        if found is None or not stat.S_ISDIR(found.st_mode):
            what = "does not exist" if found is None else "is no folder"
            raise InputError(f"labels is {shown(folder)}, which {what}", fix="--labels DIR")
        files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in (".png", ".npy"):
                if path.stem in files:
                    raise InputError(
                        f"{shown(folder)} contains {shown(files[path.stem].name)} and "
                        f"{shown(path.name)}; wanted one file for each picture",
                        fix="remove one of them",
                    )
                files[path.stem] = path
        stems: dict[str, Path] = {}
        for path in pictures:
            if path.stem in stems:
                raise InputError(
                    f"{shown(stems[path.stem])} and {shown(path)} have the same stem, so that the "
                    "labels of both would be one file",
                    fix="rename one of them and its labels, or name one folder by --data",
                )
            stems[path.stem] = path
        pairs = tuple((path, files[stem]) for stem, path in stems.items() if stem in files)
        missing = tuple(path.name for stem, path in stems.items() if stem not in files)
        if not pairs:
            example = f", as {shown(next(iter(files.values())).name)}" if files else ""
            raise InputError(
                f"0 of {len(stems)} pictures, as {shown(pictures[0].name)}, have labels in "
                f"{shown(folder)}, where the number of label files is {len(files)}{example}",
                fix="name the labels STEM.png or STEM.npy for the picture STEM.jpg",
            )
        if len(missing) > MISSING * len(stems):
            raise InputError(
                f"{len(missing)} of {len(stems)} pictures have no labels in {shown(folder)}: "
                f"{some(missing)}",
                fix="name a folder with pictures that have labels: --data FOLDER",
            )
        return cls(pairs, missing)

    def read(
        self, classes: Classes, ignore: int | None = None, outside: set[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read the pictures and their labels, one pair after the other.

        Parameters
        ----------
        classes, ignore : as in :meth:`Classes.numbers`.
        outside : the ids that are in no class are added to it.

        Yields
        ------
        (H, W, 3) uint8 RGB, and what :meth:`Classes.numbers` returns for its labels.

        Raises
        ------
        InputError : a file cannot be read, contains something else, or the labels have another size
            than the picture.
        """
        for path, label in self.pairs:
            picture, _ = load_image(path)
            ids = read_ids(label)
            if ids.shape != picture.shape[:2]:
                (h, w), (height, width) = ids.shape, picture.shape[:2]
                raise InputError(
                    f"{shown(label)} has {h} x {w} pixels, and {shown(path)} {height} x {width}",
                    fix="resize the labels to the picture's size, to the nearest pixel",
                )
            numbers = classes.numbers(ids, ignore)
            if outside is not None:
                outside.update(np.unique(ids[numbers == len(classes.names)]).tolist())
            yield picture, numbers


def read_ids(path: Path) -> np.ndarray:
    """Read the ids of the pixels of a picture.

    Parameters
    ----------
    path : a PNG with one channel, of 8 or 16 bits or with a palette, whose values are the ids; or a
        .npy file with an array (H, W) of integers.

    Returns
    -------
    (H, W) integer.

    Raises
    ------
    InputError : the file cannot be read, is damaged, or contains something else.
    """
    data = read_regular(path, "a file with labels")
    if path.suffix.lower() == ".npy":
        return _array(data, path)
    return decode_labels(data, shown(path))


def _array(data: bytes, path: Path) -> np.ndarray:
    """The array in a .npy file. Its shape is checked before the values are read."""
    file, form = io.BytesIO(data), np.lib.format
    try:
        # Files of the third version contain names of fields, which integers do not have.
        old = form.read_magic(file) == (1, 0)
        read = form.read_array_header_1_0 if old else form.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except (
        ValueError,
        TypeError,
        SyntaxError,
        tokenize.TokenError,
        MemoryError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{shown(path)} is no .npy file, or is a damaged one", fix="save it by numpy.save"
        ) from error
    if len(shape) != 2 or dtype.kind not in "biu" or min(shape) < 1:
        raise InputError(
            f"{shown(path)} contains {shape} {dtype}; wanted (H, W) integers",
            fix="save the id of each pixel",
        )
    check_size(*shape, shown(path))
    count = shape[0] * shape[1]
    if len(data) - file.tell() < count * dtype.itemsize:
        raise InputError(
            f"{shown(path)} is a truncated .npy file: it states {shape[0]} x {shape[1]} pixels",
            fix="save it by numpy.save",
        )
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if by_columns else "C")


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more
