"""GuideSource: the frozen network whose guides a refinement network is trained on."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.models.stated import Stated
from runtime.bundle.open import open_prior
from runtime.bundle.read import Bundle
from runtime.checks import check_guide
from runtime.engines.named_files import shell_word, utf8_text
from runtime.engines.onnx import load_engine
from runtime.engines.onnx_file import check_file
from runtime.engines.onnx_runtime import import_onnxruntime
from runtime.errors import BundleError, InputError
from runtime.files import file_error, here, shown, stat_of
from runtime.prior.network import (
    NetworkPrior,
    as_probabilities,
    check_input,
    fixed_size,
    kind_of,
    names_of,
)
from runtime.prior.preprocess import Preprocess
from runtime.prior.reading import MOST_LABELS

_PLACE = ("name", "source")  # what a move of the files changes in the entry
_DAMAGED = "copy the run again, or train again with another -o"
_NO_KMEANS = (
    "k-means has no classes: the number of a cluster means something else in each picture, and "
    "weights that are trained on many pictures would correct nothing"
)


@dataclass(frozen=True)
class GuideSource:
    """A frozen network, on the CPU, and what run.json says of it; :func:`open_guide_source` makes
    it. Guides have the bits of those that ``sdk.Segmenter`` computes with the same number of
    threads.

    Parameters
    ----------
    prior : the network. Its input and the kind of its output are known.
    kind : "onnx" or "bundle".
    source : the absolute path of the file or folder.
    sha256 : of the .onnx file, followed by its files of weights; of a bundle that of prior.onnx.
    classes : C, the number of classes, at least 2.
    output : "logits", "probabilities" or "labels".
    threads : most threads of ONNX Runtime; None: all processors.
    stated : what the user has said of an .onnx file.

    Example
    -------
    >>> open_guide_source("prior.onnx").guide(picture, 180, 240).shape
    (180, 240, 19)
    """

    prior: NetworkPrior
    kind: str
    source: str
    sha256: str
    classes: int
    output: str
    threads: int | None
    stated: Stated

    @property
    def has_weights(self) -> bool:
        """Whether the prior is a bundle with trained weights of a refinement network, too."""
        return self.kind == "bundle" and "cnn" in Bundle.open(self.source).manifest["graphs"]

    @property
    def name(self) -> str:
        """The name of the file or folder."""
        return utf8_text(Path(self.source).name)

    @property
    def names(self) -> list[str] | None:
        """The names of the classes, or None."""
        return self.prior.names

    @property
    def library(self) -> str:
        """What computes the guides, such as "onnxruntime 1.22.0"."""
        return f"onnxruntime {import_onnxruntime('compute guides').__version__}"

    def entry(self) -> dict[str, Any]:
        """What run.json stores of the prior, beside the sizes of its inputs, and from which
        :func:`reopen` opens it again."""
        stated = {name: value for name, value in vars(self.stated).items() if value is not None}
        return {
            "kind": self.kind,
            "name": self.name,
            "source": utf8_text(self.source),
            "sha256": self.sha256,
            "classes": self.classes,
            "names": self.names,
            "output": self.output,
            "preprocess": self.prior.preprocess.to_manifest(),
            "stated": {k: v if isinstance(v, str) else list(v) for k, v in stated.items()},
        }

    def check_same(self, entry: Mapping[str, Any]) -> None:
        """Check that this is the prior of a run, wherever its files lie.

        Parameters
        ----------
        entry : "prior" of the run's run.json.

        Raises
        ------
        InputError : it is another one; the message names what differs.
        BundleError : it is the same, but the entry says something else of it.
        """
        own = self.entry()
        other = [name for name in own if name not in _PLACE and own[name] != entry.get(name)]
        if other and not {"kind", "sha256"} & {*other}:
            raise BundleError(
                f"run.json does not describe the prior {shown(self.source)}: {', '.join(other)}",
                fix=_DAMAGED,
            )
        if other:
            raise InputError(
                f"the prior {shown(self.source)} changed since the run was started: "
                f"{', '.join(other)}",
                fix="restore its files, or train again with another -o",
            )

    @property
    def key(self) -> list[Any]:
        """All that can change the guide of a picture, its last bits included, as JSON."""
        entry = {name: value for name, value in self.entry().items() if name not in _PLACE}
        return [entry, self.library, self.prior.backend, self.threads]

    def guide(self, picture: np.ndarray, height: int, width: int) -> np.ndarray:
        """The guide of a picture at its working size.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.
        height, width : of the guide in pixels.

        Returns
        -------
        (height, width, C) float32. Each pixel sums to 1, to 0 where a network of labels returns
        -1, and to a number between where labels of another size were averaged.

        Raises
        ------
        BundleError : the network's output is not finite, or has another form than before.
        InputError : the output is no such values as the first ones, or the picture has too many
            pixels.
        UnknownGuide : the guide is unknown everywhere.

        Example
        -------
        >>> source.guide(picture, 180, 240).shape
        (180, 240, 20)
        """
        guide = as_probabilities(self.own_guide(picture), height, width)
        if guide.ndim == 2:
            return np.eye(self.classes + 1, self.classes, dtype=np.float32)[guide]  # row -1 is zero
        return np.pad(guide, ((0, 0), (0, 0), (0, self.classes - guide.shape[2])))

    def own_guide(self, picture: np.ndarray) -> np.ndarray:
        """The guide of a picture at the size of the network's output.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB.

        Returns
        -------
        (h, w, C) float32, whose pixels sum to 1; or (h, w) int32 labels with -1 = unknown.

        Raises
        ------
        BundleError, InputError, UnknownGuide : as for :meth:`guide`.

        Example
        -------
        >>> source.own_guide(picture).shape
        (128, 128, 20)
        """
        found = np.asarray(self.prior(picture, None))
        if self.prior.output != self.output:
            raise InputError(
                f"{self.name} returned values that are no {self.output}, as the first ones were",
                fix="say what it returns: --output logits (or probabilities, labels)",
            )
        guide = check_guide(found, *found.shape[:2])
        last = int(guide.max()) if guide.ndim == 2 else guide.shape[2] - 1
        if last >= self.classes:
            raise InputError(
                f"{self.name} returned the label {last}, but has only {self.classes} names",
                fix="name each class once: --names",
            )
        return guide


def open_guide_source(
    model: str, stated: Stated | None = None, *, threads: int | None = None
) -> GuideSource:
    """Open the prior that ``--model`` names.

    Parameters
    ----------
    model : the path of an .onnx file, or of a bundle whose prior is a network, of any precision.
        It runs on ONNX Runtime on the CPU.
    stated : facts about an .onnx file that its metadata lacks, or that replace it: mean, std,
        names, output and output_name, as for ``python -m export``.
    threads : most threads of ONNX Runtime; all processors when None.

    Raises
    ------
    InputError : no such file, k-means, facts for a bundle, or labels without names of the classes.
    BundleError : a file that is damaged, or metadata that is missing or does not fit.
    MissingBackend, DeviceError : ONNX Runtime is not installed, or fails.

    Example
    -------
    >>> source = open_guide_source("prior.onnx", Stated(names=["road", "sky"]))
    """
    stated = stated or Stated()
    if model == "kmeans":
        raise InputError(_NO_KMEANS, fix="--model PATH.onnx, or the bundle of a network")
    found = None if "://" in model else stat_of(model)
    if found is not None and stat.S_ISDIR(found.st_mode):
        kind, (prior, sha256) = "bundle", _bundle(Path(model), stated, threads)
    elif Path(model).suffix.lower() == ".onnx":
        kind, (prior, sha256) = "onnx", _onnx(Path(model), stated, threads)
    else:
        gone = "" if found is not None else ", which does not exist"
        raise InputError(
            f"model is {shown(model)!r}{gone}; wanted an .onnx file or a bundle folder",
            fix=f"--model PATH.onnx or NAME.bundle; the current folder is {here()}",
        )
    output, classes = _described(prior)
    if classes > MOST_LABELS:
        raise InputError(
            f"{prior.name} has {classes} classes; wanted at most {MOST_LABELS}",
            fix="--model with a prior of fewer classes",
        )
    return GuideSource(
        prior, kind, os.path.abspath(model), sha256, classes, output, threads, stated
    )


def reopen(
    entry: Mapping[str, Any], place: str | None = None, *, threads: int | None = None
) -> GuideSource:
    """Open the prior of a run again.

    Parameters
    ----------
    entry : "prior" of its run.json.
    place : the path of the prior, if it was moved since.
    threads : as for :func:`open_guide_source`.

    Raises
    ------
    InputError : the prior does not exist or has changed. Also what :func:`open_guide_source`
        raises.
    BundleError : the entry is wrong.

    Example
    -------
    >>> reopen(read_entry(Path("runs/camera"))["prior"]).classes
    19
    """
    model = entry["source"] if place is None else place
    if model != "kmeans" and stat_of(model) is None:
        raise InputError(
            f"the prior {shown(model)} of the run does not exist",
            fix="name its place: --model PATH for train, --weights PATH for python -m export",
        )
    words: dict[str, Any] = {
        k: v if isinstance(v, str) else tuple(v) for k, v in entry["stated"].items()
    }
    try:
        stated = Stated(**words)
    except InputError as error:
        raise BundleError(f"run.json: prior: stated: {error.message}", fix=_DAMAGED) from error
    source = open_guide_source(model, stated, threads=threads)
    source.check_same(entry)
    for size in entry.get("sizes", ()):
        if not _is_input(size, source.prior.preprocess):
            raise BundleError(
                f"run.json: prior: sizes: no picture has {size[0]} x {size[1]} pixels as the input "
                f"of {source.name}",
                fix=_DAMAGED,
            )
    return source


def _is_input(size: Sequence[int], preprocess: Preprocess) -> bool:
    """Whether a picture can have this size as the input of a network."""
    square, multiple = preprocess.size(1, 1), preprocess.multiple
    if square == preprocess.size(1, 2):  # all pictures have the same size
        return (*size,) == square
    # The longer side is the same for all pictures, but for the rounding of a half.
    longer = abs(max(size) - square[0]) <= multiple
    return longer and all(n % multiple == 0 and n >= preprocess.minimum for n in size)


def _onnx(path: Path, stated: Stated, threads: int | None) -> tuple[NetworkPrior, str]:
    """The network in an .onnx file, as NetworkPrior.from_onnx opens it, with what the user has
    stated; and the hash of its files."""
    engine, name = load_engine(path, threads=threads), utf8_text(path.name)
    engine.metadata.update(stated.metadata())
    check_input(engine.inputs, name)
    preprocess = Preprocess.from_metadata(engine.metadata, name, fixed_size(engine.inputs[0]))
    names, output = names_of(engine.metadata, name), kind_of(engine.metadata, name)
    prior = NetworkPrior(engine, preprocess, names=names, output=output, name=name)
    model, weights = check_file(path)
    state = hashlib.sha256()
    for file in (model, *(weights[location] for location in sorted(weights))):
        try:
            with file.open("rb") as opened:
                while part := opened.read(2**20):
                    state.update(part)
        except OSError as error:
            raise file_error("read", file, error) from error
    return prior, state.hexdigest()


def _bundle(folder: Path, stated: Stated, threads: int | None) -> tuple[NetworkPrior, str]:
    """The network of a bundle, and the hash of its prior.onnx."""
    if stat_of(folder / "manifest.json") is None and stat_of(folder / "run.json") is not None:
        raise InputError(
            f"model is {shown(folder)}, a run of the trainer, which is not exported yet",
            fix=f"python -m export --model {shell_word(str(folder))} -o NAME.bundle",
        )
    bundle = Bundle.open(folder)
    if bundle.manifest["prior"]["kind"] == "kmeans":
        raise InputError(
            f"{shown(folder)} is a bundle of k-means; {_NO_KMEANS}",
            fix="--model PATH.onnx, or the bundle of a network",
        )
    if stated.options:
        raise InputError(
            f"{', '.join(stated.options)}: the bundle {shown(folder)} states these itself",
            fix="leave them out",
        )
    prior, _ = open_prior(bundle, threads=threads)
    assert isinstance(prior, NetworkPrior)  # its kind is not "kmeans"
    return prior, bundle.manifest["graphs"]["prior"]["sha256"]


def _described(prior: NetworkPrior) -> tuple[str, int]:
    """The kind of the output of a network and the number of its classes. Without a statement, the
    values for a picture of grey steps decide, so that they never depend on the order of pictures.

    Raises
    ------
    InputError : the values leave the kind open, or are labels without names.
    BundleError : the output is none that a prior may have.
    """
    grey = np.linspace(0, 255, 128).astype(np.uint8)
    guide = np.asarray(prior(np.repeat(np.tile(grey, (96, 1))[..., None], 3, 2), None))
    if prior.output is None:
        raise InputError(
            f"{prior.name} returned one channel of zeros and ones, which are labels or "
            "probabilities",
            fix="--output labels or --output probabilities",
        )
    if guide.ndim == 3:
        return prior.output, guide.shape[2]
    if prior.names is None:
        raise InputError(
            f"{prior.name} returns labels and no names, so the number of classes is not known",
            fix="--names road,sky,tree, or a file with a name in each line",
        )
    return prior.output, len(prior.names)
