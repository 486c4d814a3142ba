"""The inputs of a latency run: pictures, their true labels, and hashes of pictures and model."""

from __future__ import annotations

import argparse
import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.files import class_numbers, video_frames
from benchmarks.latency import document as documents
from runtime.bundle.manifest import MANIFEST
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.files import file_error, shown, stat_of
from runtime.opencv import cv2
from runtime.pictures.load import load_image
from runtime.urls import is_url, without_secrets
from sdk.prior import open_bundle

FRAMES = 64  # at most this many frames of a video are read; they are used forwards, then backwards


def load_pictures(args: argparse.Namespace) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Read the frames of --video, the pictures of --picture, or else a demo photo; and the true
    labels of --labels. With --imgsz, resize all of them to that size.

    Returns
    -------
    The pictures, (H, W, 3) uint8 RGB; and the class numbers of each picture, (H, W), or None
    without --labels.

    Raises
    ------
    InputError : a file is missing or cannot be read; or the number or a size of the labels differs
        from that of the pictures.
    """
    if args.video:
        if is_url(args.video):
            raise InputError(
                f"{shown(without_secrets(args.video))} is a URL, wanted a path: URLs are not read",
                fix="download the video and name its file",
            )
        pictures = video_frames(Path(args.video), FRAMES)
        # Append the frames backwards, without the two ends, so that the first frame can follow the
        # last one of the list without a jump.
        pictures += pictures[-2:0:-1]
    elif args.picture:
        pictures = [load_image(p)[0] for p in args.picture]
    else:
        from runtime.pictures.files import demo_photo

        pictures = [demo_photo()]
    size, truths = args.imgsz, None
    if args.labels:
        if len(args.labels) != len(pictures):
            raise InputError(
                f"--labels has {len(args.labels)} files, --picture {len(pictures)}",
                fix="name one label file for each picture, in the same order",
            )
        truths = []
        for path, picture in zip(args.labels, pictures, strict=True):
            truth = class_numbers(Path(path))
            if truth.shape != picture.shape[:2]:
                raise InputError(
                    f"{path} is {truth.shape[0]}x{truth.shape[1]}, its picture "
                    f"{picture.shape[0]}x{picture.shape[1]} (height x width)",
                    fix="give labels of the picture's own size; --imgsz resizes both",
                )
            height, width = size or truth.shape
            truths.append(cv2.resize(truth, (width, height), interpolation=cv2.INTER_NEAREST))
    if size:
        pictures = [resize(p, *size) for p in pictures]
    return pictures, truths


def hashes(prior: str) -> dict[str, str]:
    """Return {name of the model's file: its sha256}; {} if the prior is "kmeans" or no file.

    The file of a bundle is its manifest, which contains the sha256 of all other files. Of an ONNX
    model, external data files are not hashed.

    Raises
    ------
    BundleError : the prior is a folder, but not a bundle, or it is a damaged bundle.
    InputError : the file cannot be read.
    """
    path = Path(prior)
    bundle = open_bundle(prior)
    if bundle is None and prior == "kmeans":
        return {}
    file = path if bundle is None else bundle.path / MANIFEST
    found = stat_of(file)
    if found is None or not stat.S_ISREG(found.st_mode):
        return {}
    try:
        data = file.read_bytes()
    except OSError as error:
        raise file_error("read", file, error) from error
    return {documents.shown(str(file.relative_to(path.parent))): hash_of([data])}


def hash_of(parts: Iterable[np.ndarray | bytes]) -> str:
    """Return the sha256, in hexadecimal, of the bytes of all parts, joined in this order. A part is
    an array or bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()
