"""Which normalisation and padding EfficientNet-Lite0's weights were trained with.

    python -m benchmarks backbone [-o results.json]

The network with its classifier names every fifth frame of the DAVIS sequences whose object has
classes in ImageNet-1k (top-1). The row with the most right frames is the best. These are few frames
of six videos, so a second measure, without labels, is printed too, and ranks equal rows: how far
the inputs of the batch normalisations are from the means and variances of the training, which the
weights contain. It is computed on the middle of each picture of coco_mini.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import environment
from benchmarks.quality import datasets
from benchmarks.table import as_markdown, check_out, write_json
from runtime.core.resize import resize
from runtime.errors import InputError
from runtime.pictures.files import picture_files
from runtime.pictures.load import load_image
from runtime.tools.cli import Parser, out_path, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from export.backbones.efficientnet_lite import Lite0

STEP = 5  # of the frames
SIDE, SHORT = 224, 256  # the middle of SIDE x SIDE pixels of a picture whose short side is SHORT
# Beach wagon, cab, convertible, jeep, limousine, minivan, Model T, pickup, racing car, sports car.
_CARS = frozenset({436, 468, 511, 609, 627, 656, 661, 717, 751, 817})
# The numbers of the accepted ImageNet-1k classes. The sequences breakdance, kite-surf and soapbox
# have no such class.
SEQUENCES = {
    "davis/frames/blackswan": frozenset({100}),  # black swan
    "davis/frames/car-shadow": _CARS,
    "davis/frames/dog": frozenset(range(151, 269)),  # all breeds
    "davis_more/frames/drift-chicane": _CARS,
    "davis_more/frames/horsejump-high": frozenset({339}),  # sorrel, the only class of horses
    "davis_more/frames/scooter-black": frozenset({665, 670}),  # moped, motor scooter
}
NORMALISATIONS = {  # mean and std of colours in [0, 1]
    "(x - 127) / 128": ((127 / 255,) * 3, (128 / 255,) * 3),
    "(x - 127.5) / 127.5": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "x / 255": ((0.0,) * 3, (1.0,) * 3),
}
PADDINGS = {"symmetric": False, "TensorFlow's SAME": True}
PHOTOS = "coco_mini/images"


def crops(folder: Path, step: int) -> np.ndarray:
    """The middle of every ``step``-th picture of a folder: (n, 224, 224, 3) uint8.

    Raises
    ------
    InputError : the folder or a picture is missing or damaged.
    """
    found = []
    for path in picture_files([folder])[::step]:
        picture = load_image(path)[0]
        scale = SHORT / min(picture.shape[:2])
        height, width = (round(side * scale) for side in picture.shape[:2])
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        found.append(resize(picture, height, width)[top : top + SIDE, left : left + SIDE])
    return np.stack(found)


def scores(logits: Tensor, accepted: frozenset[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each row of logits (n, 1000): whether the highest is of an accepted class, and the
    logarithm of the probability of all accepted classes together."""
    right = np.isin(logits.argmax(1).numpy(), list(accepted))
    log_p = logits.log_softmax(1)[:, sorted(accepted)].logsumexp(1)
    return right, log_p.numpy()


def distance(network: Lite0, images: Tensor) -> float:
    """How far a network's batch normalisations are from their training: the mean, over all layers
    and their channels, of (mean(x) - running mean)^2 / running variance.

    Parameters
    ----------
    images : (n, 3, 224, 224) float32, normalised.
    """
    import torch

    found = []

    def hook(layer: Any, inputs: Any, _: Any) -> None:
        gap = inputs[0].mean((0, 2, 3)) - layer.running_mean
        found.append((gap**2 / (layer.running_var + layer.eps)).mean())

    layers = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    network.classes(images)
    for each in hooks:
        each.remove()
    return float(torch.stack(found).mean())


def as_input(pictures: np.ndarray, normalisation: str) -> Tensor:
    """Pictures (n, h, w, 3) uint8 as a network's input (n, 3, h, w) float32."""
    import torch

    mean, std = NORMALISATIONS[normalisation]
    x = (pictures.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def measure(root: Path) -> list[dict[str, Any]]:
    """A row for each padding and normalisation, the best first.

    Parameters
    ----------
    root : the developer data set, which contains the folders of SEQUENCES.

    Raises
    ------
    InputError : pictures are missing.
    MissingBackend : PyTorch or the package of the weights is not installed.
    """
    from export.backbones.load import check_torch

    check_torch()
    from export.backbones.efficientnet_lite import lite0

    pictures = {name: crops(root / name, STEP) for name in SEQUENCES}
    photos = crops(root / PHOTOS, 1)
    rows = []
    for padding, same in progress_bar(iterable=PADDINGS.items(), desc="paddings", disable=None):
        network, _ = lite0(dilated=False, same=same)
        for normalisation in NORMALISATIONS:
            right, log_p, named = [], [], {}
            for name, crop in pictures.items():
                logits = network.classes(as_input(crop, normalisation))
                hits, values = scores(logits, SEQUENCES[name])
                right.append(hits)
                log_p.append(values)
                named[Path(name).name] = f"{hits.sum()} of {hits.size}"
            row: dict[str, Any] = {"padding": padding, "normalisation": normalisation}
            row["top-1"] = round(float(np.concatenate(right).mean()), 4)
            row["log p"] = round(float(np.concatenate(log_p).mean()), 4)
            row["distance"] = round(distance(network, as_input(photos, normalisation)), 5)
            rows.append(row | named)
    return sorted(rows, key=lambda row: (-row["top-1"], row["distance"]))


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code.

    Raises
    ------
    InputError : pictures that are missing; the caller prints it.
    """
    parser = Parser("python -m benchmarks backbone", description=__doc__)
    parser.add_argument("-o", "--out", type=out_path, help="file for the results (JSON)")
    args = parser.parse_args(argv)
    check_out(args.out)
    root = datasets.data_root()
    if root is None:
        raise InputError("the developer data set is missing", fix="set SEG_DATA=/path/to/data")
    rows = measure(root)
    print(as_markdown(rows))
    if args.out:
        classes = {Path(name).name: sorted(accepted) for name, accepted in SEQUENCES.items()}
        document = {"environment": environment.describe(), "classes": classes, "rows": rows}
        write_json(args.out, document)
    return 0
