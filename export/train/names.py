"""names.json of a run: which class each cluster of its head was matched with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.train.matching import Matching
from export.train.run import NAMES
from runtime.checks import is_count, is_number
from runtime.engines.named_files import read_regular, shell_word
from runtime.errors import BundleError, InputError
from runtime.files import one_line, shown, stat_of, write_atomic
from runtime.prior.names import class_names

SCHEMA = "dg-names/1"


def head_sha256(state: Mapping[str, np.ndarray]) -> str:
    """The sha256 of the tensors of a head, with their names and shapes, in hexadecimal. It says
    which checkpoint the names belong to.

    Example
    -------
    >>> head_sha256(run.head()[0])
    """
    digest = hashlib.sha256()
    for name, array in sorted(state.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cluster_names(matching: Matching, classes: Sequence[str]) -> list[str]:
    """The name of each cluster: that of its class, or "cluster 7" for one without a class. No two
    are equal.

    Example
    -------
    >>> cluster_names(match(np.array([[0, 9], [0, 1], [8, 0]])), ["road", "sky"])
    ['sky', 'cluster 1', 'road']
    """
    return [
        classes[number] if number >= 0 else f"cluster {cluster}"
        for cluster, number in enumerate(matching.cluster_to_class)
    ]


def names_entry(
    matching: Matching,
    counts: np.ndarray,
    classes: Sequence[str],
    *,
    pictures: int,
    trained_on: bool,
    labels: str,
    head: str,
) -> dict[str, Any]:
    """The contents of names.json.

    Parameters
    ----------
    matching, counts : of :func:`export.train.matching.match`, and its argument (K, C).
    classes : the names of the C classes.
    pictures : the number of pictures that were counted.
    trained_on : whether they are the pictures that the head was trained on, without labels.
    labels : the name of the folder with the labels, without the folders above it.
    head : :func:`head_sha256` of the head whose clusters were matched.

    Example
    -------
    >>> counts = np.array([[1, 9], [8, 0]])
    >>> classes, head = ["road", "sky"], "0" * 64
    >>> names_entry(
    ...     match(counts), counts, classes, pictures=1, trained_on=False, labels="gt", head=head
    ... )["names"]
    ['sky', 'road']
    """
    return {
        "schema": SCHEMA,
        "names": cluster_names(matching, classes),
        "classes": list(classes),
        "cluster_to_class": list(matching.cluster_to_class),
        "accuracy": matching.accuracy,
        "miou": matching.miou,
        "iou": list(matching.iou),
        "pictures": pictures,
        "trained_on": trained_on,
        "labels": one_line(labels),
        "head": head,
        "counts": counts.tolist(),
    }


def write_names(run: Path, entry: Mapping[str, Any]) -> None:
    """Write names.json into the folder of a run, whole or not at all.

    Raises
    ------
    InputError : the file cannot be written.
    """
    write_atomic(run / NAMES, json.dumps(entry).encode() + b"\n")


def read_names(run: Path, head: str, clusters: int) -> dict[str, Any] | None:
    """Read names.json of a run.

    Parameters
    ----------
    run : the folder.
    head : :func:`head_sha256` of the head that is used.
    clusters : of that head.

    Returns
    -------
    What :func:`names_entry` has made; None if the run has no names.json.

    Raises
    ------
    BundleError : the file is damaged or has another form.
    InputError : the names are those of another checkpoint; or the file cannot be read.

    Example
    -------
    >>> run = trained_run(Path("runs/city"))
    >>> read_names(Path("runs/city"), run.head, run.clusters)["names"][:2]
    ['road', 'sky']
    """
    path = run / NAMES
    if stat_of(path) is None:
        return None
    again = f"python -m export train name {shell_word(str(run))} --labels DIR --classes FILE"
    fix = f"name the clusters again: {again}; or remove {NAMES}"
    data = read_regular(path, "the names of a run")
    try:
        entry = json.loads(data)
        sound = entry["schema"] == SCHEMA and is_count(entry["pictures"], 1, 2**31)
        sound = sound and all(is_number(entry[key], 0, 1) for key in ("accuracy", "miou"))
        sound = sound and isinstance(entry["labels"], str) and isinstance(entry["head"], str)
        sound = sound and isinstance(entry["trained_on"], bool)
        names = class_names(entry["names"], NAMES)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{shown(path)} is damaged", fix=fix) from error
    if not sound or len({*names}) < len(names):
        raise BundleError(f"{shown(path)} is damaged", fix=fix)
    if entry["head"] != head or len(names) != clusters:
        raise InputError(
            f"{shown(path)} has the names of another checkpoint: the training was continued after "
            "the clusters were named",
            fix=fix,
        )
    return entry
