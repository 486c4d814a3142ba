"""DiffSeg: the segments of a picture from the self-attention of Stable Diffusion."""

from __future__ import annotations

import argparse
import math
import re
import threading
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checks import as_numbers, check_bytes, check_count, check_positive, shown_value
from runtime.core.resize import resize
from runtime.errors import InputError

_CROPS = ("whole", "square")
_DTYPES = ("float32", "float16", "bfloat16")
_MULTIPLE = 64  # of the sides of the input: 8 of the VAE, 8 of the U-Net
_LONGEST = 64  # the largest ratio of the sides of a picture


@dataclass(frozen=True)
class DiffSegOptions:
    """How pictures are segmented.

    Parameters
    ----------
    crop : "whole", the whole picture; or "square", the centre square of the published program, so
        that pixels outside of it are unknown.
    size : the side of the square that the network gets, in pixels, a multiple of 64 from 64 to
        1024. A whole picture gets about as many pixels, at its own aspect ratio.
    timestep : of the diffusion, 0 to 999.
    grid : anchors on each side of a square, 1 to 64.
    threshold : maps nearer than this, in nats, are merged: one value, or one for each round.
    rounds : of merging, 1 to 20.
    kmeans : whether proposals are refined by k-means.
    device : "cpu", or a GPU such as "cuda:0".
    dtype : of the network: "float32", "float16" or "bfloat16". The maps are always float32.

    Raises
    ------
    InputError : a value is none of these.
    """

    crop: str = "whole"
    size: int = 512
    timestep: int = 300
    grid: int = 16
    threshold: float | tuple[float, ...] = 0.9
    rounds: int = 3
    kmeans: bool = False
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, choices in (("crop", _CROPS), ("dtype", _DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {shown_value(getattr(self, name))}; wanted {', '.join(choices)}",
                    fix=f"--{name} {choices[0]}",
                )
        for name, low, high in (
            ("size", _MULTIPLE, 1024),
            ("timestep", 0, 999),
            ("grid", 1, 64),
            ("rounds", 1, 20),
        ):
            object.__setattr__(self, name, check_count(name, getattr(self, name), low, high))
        if self.size % _MULTIPLE:
            raise InputError(
                f"size is {self.size}; wanted a multiple of {_MULTIPLE}",
                fix=f"--size {round(self.size / _MULTIPLE) * _MULTIPLE}",
            )
        if not isinstance(self.kmeans, bool):
            raise InputError(f"kmeans is {shown_value(self.kmeans)}; wanted True or False")
        values = as_numbers(self.threshold)
        if isinstance(values, tuple):
            if len(values) != self.rounds:
                raise InputError(
                    f"threshold has {len(values)} values, and there are {self.rounds} rounds",
                    fix=f"state one value, or --rounds {max(1, len(values))}",
                )
            values = tuple(check_positive("threshold", value) for value in values)
        else:
            values = check_positive("threshold", values)
        object.__setattr__(self, "threshold", values)
        if not isinstance(self.device, str) or not re.fullmatch(
            r"cpu|cuda:[0-9]{1,3}", self.device
        ):
            raise InputError(
                f"device is {shown_value(self.device)}; wanted cpu, or a GPU such as cuda:0",
                fix="--device cpu",
            )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each round."""
        if isinstance(self.threshold, tuple):
            return self.threshold
        return (self.threshold,) * self.rounds


def add_options(parser: Any) -> None:
    """Add the options of DiffSeg to a parser of the command line."""
    default = DiffSegOptions()
    parser.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="Stable Diffusion 1.x or 2.x of diffusers"
    )
    parser.add_argument(
        "--crop", choices=_CROPS, default=default.crop,
        help="the picture, or its centre square; other pixels are unknown (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, default=default.size,
        help="side of the square in pixels; a whole picture has as many pixels (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[default.threshold], metavar="NATS",
        help="maps nearer than this are merged; one value or one for each round "
        f"({default.threshold})",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=default.rounds, help="rounds of merging (%(default)s)"
    )
    parser.add_argument(
        "--grid", type=int, default=default.grid,
        help="anchors on each side of a square (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timestep", type=int, default=default.timestep,
        help="of the diffusion, 0 to 999 (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--kmeans", action="store_true", help="refine the segments by k-means")
    parser.add_argument("--device", default=default.device, help="cpu or cuda:0 (%(default)s)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default=default.dtype, help="of the network (%(default)s)"
    )


def from_arguments(args: argparse.Namespace) -> DiffSeg:
    """Make the model from the options of the command line.

    Raises
    ------
    InputError : no folder is named. Also the errors of :class:`DiffSeg`.
    """
    if args.weights is None:
        raise InputError(
            "DiffSeg needs the weights of Stable Diffusion, and no folder is named",
            fix="--weights FOLDER with a local Stable Diffusion 1.x or 2.x of diffusers",
        )
    threshold = args.threshold[0] if len(args.threshold) == 1 else tuple(args.threshold)
    names = ("crop", "size", "timestep", "grid", "rounds", "kmeans", "device", "dtype")
    options = {name: getattr(args, name) for name in names}
    return DiffSeg(args.weights, DiffSegOptions(threshold=threshold, **options))


class DiffSeg:
    """DiffSeg (Tian et al., CVPR 2024, "Diffuse, Attend, and Segment"): a prior without training,
    text or classes. It is a GuideModel of :mod:`export.guides.write`, and a callable for
    :class:`sdk.Segmenter`.

    Labels have no meaning that pictures share: ``names`` is None. The folder is loaded here; a call
    stores nothing, and calls of several threads run one after another.

    Parameters
    ----------
    folder : Stable Diffusion 1.x or 2.x as diffusers writes it; nothing is downloaded.
    options : how pictures are segmented.

    Attributes
    ----------
    network : the loaded networks.

    Raises
    ------
    InputError, BundleError, MissingBackend, DeviceError : those of
        :class:`export.guides.stable_diffusion.StableDiffusion`.

    Example
    -------
    >>> model = DiffSeg(Path("sd-1.4"), DiffSegOptions(threshold=1.1))
    >>> model.own_guide(picture).shape  # picture: (480, 640, 3) uint8
    (443, 591)
    >>> Segmenter(model)("street.jpg")
    """

    name = "diffseg"
    output = "labels"
    names: list[str] | None = None

    def __init__(self, folder: Path, options: DiffSegOptions | None = None) -> None:
        from export.backbones.load import check_torch

        check_torch()
        from export.guides.stable_diffusion import StableDiffusion

        self.folder, self.options = Path(folder), options or DiffSegOptions()
        self.network = StableDiffusion(
            self.folder, device=self.options.device, dtype=self.options.dtype
        )
        self._alone = threading.Lock()

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The same as :meth:`own_guide`."""
        return self.own_guide(picture)

    def own_guide(self, picture: np.ndarray) -> np.ndarray:
        """The segments of a picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.

        Returns
        -------
        (h, w) int32 in the aspect ratio of the picture: labels 0, 1, ...; -1 outside of the centre
        square with ``crop="square"``. The square is ``size`` x ``size``; a whole picture has about
        ``size`` * ``size`` pixels.

        Raises
        ------
        InputError : the picture is no such array, or one side is more than 64 times the other, or
            float16 is not enough for the weights, so that the attention is not finite.
        """
        picture = check_bytes("picture", picture)
        height, width = picture.shape[:2]
        if max(height, width) > _LONGEST * min(height, width):
            raise InputError(
                f"picture has {height} x {width} pixels; DiffSeg wants sides of which one is at "
                f"most {_LONGEST} times the other",
                fix="cut the picture into parts",
            )
        size = self.options.size
        if self.options.crop == "whole":
            scale = size / math.sqrt(height * width)
            return self._segments(picture, input_size(height, width, size), scale)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = np.ascontiguousarray(picture[top : top + side, left : left + side])
        scale = size / side
        guide = np.full((round(height * scale), round(width * scale)), -1, np.int32)
        top, left = ((n - size) // 2 for n in guide.shape)
        guide[top : top + size, left : left + size] = self._segments(square, (size, size), scale)
        return guide

    def _segments(self, picture: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
        """The labels of a picture that the network gets at ``size``, at ``scale`` times the
        picture's own size. InputError if the attention is not finite."""
        import torch

        from export.guides.merging import anchors, merge, refine, suppress

        height, width = size
        with self._alone, torch.no_grad():
            found = self.network.attention(
                np.ascontiguousarray(resize(picture, height, width)), self.options.timestep
            )
            maps = found.aggregate()
            del found
            if not math.isfinite(float(maps.sum())):
                raise InputError(
                    f"the attention is not finite with {self.options.dtype} weights",
                    fix="--dtype float32; with float32, copy the folder of the weights again",
                )
            starts = anchors(height // 8, width // 8, self.options.grid).to(maps.device)
            proposals = merge(maps, starts, self.options.thresholds)
            if self.options.kmeans:
                proposals = refine(maps, proposals)
            shape = tuple(max(1, round(side * scale)) for side in picture.shape[:2])
            labels = suppress(proposals, (height // 8, width // 8), shape)
        return labels.cpu().numpy()

    @cached_property
    def _sha256(self) -> str:
        from export.guides.stable_diffusion import sha256_of

        return sha256_of(self.folder)

    def entry(self) -> dict[str, Any]:
        """What guides.json stores of the model. The files of the folder are read for their sha256
        at the first call; they must be those that were loaded. The device and the number of threads
        are left out: they change last bits of the maps, and a label where two segments are equal up
        to these bits.

        Raises
        ------
        InputError : a file of the folder cannot be read.
        """
        options = asdict(self.options)
        del options["device"]
        return {
            "kind": self.name,
            "source": str(self.folder.absolute()),
            "sha256": self._sha256,
            "output": self.output,
            "options": options,
        }


def input_size(height: int, width: int, size: int) -> tuple[int, int]:
    """The size that the network gets of a whole picture: about ``size`` * ``size`` pixels in the
    picture's aspect ratio, each side rounded to a multiple of 64, at least 64.

    Parameters
    ----------
    height, width : of the picture in pixels.
    size : side of a square picture's input.

    Example
    -------
    >>> input_size(321, 481, 512)
    (448, 640)
    """
    ratio = math.sqrt(height / width)
    rows, columns = (max(1, round(size * side / _MULTIPLE)) for side in (ratio, 1 / ratio))
    return rows * _MULTIPLE, columns * _MULTIPLE
