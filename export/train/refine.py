"""Training of the refinement network beforehand, as a method: its settings, options and steps.

The network is trained on pictures of one camera, with the prior's guides in place of labels. The
objective is that of ``runtime.refine``; one step on one picture changes the weights as one step of
the runtime. Only making a :class:`Refine` imports torch.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.train.labels import Classes, some
from runtime.checks import is_number, shown_value
from runtime.core.config import PRESETS, RefineConfig
from runtime.core.guide import Guide
from runtime.core.refiner import Refiner
from runtime.errors import InputError
from runtime.files import shown
from runtime.prior.reading import KINDS
from runtime.tools.cli import some_path

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from export.train.guides import GuideBatches, Guided
    from export.train.method import Parts, Start

AUGMENTS = ("none", "light")
REFINES = ("residual", "fast")
DEFAULTS: dict[str, Any] = {"batch": 1, "lr": 0.05, "epochs": 4, "every": 50}
SELECTS = ("last", "energy", "cold")
LOG = logging.getLogger("dg.train")


@dataclass(frozen=True, kw_only=True)
class RefineTraining:
    """The settings of the training, beside those of the loop.

    Parameters
    ----------
    scale, blocks, channels : of the refinement, as in :class:`runtime.RefineConfig`. All other
        settings of the refinement are its defaults.
    seed : of the initial weights.
    augment : "none", or "light": a random crop, and another brightness, contrast and gamma.
    decay : D of the term D / 2 times the sum of all squared weights and biases of the last layer,
        whose gradient is added in each step. With 0 for all of them the output is the prior. 0 to
        1000.
    label_weight : of the cross-entropy with labels, 0 to 1000; 0: there are no labels.

    Raises
    ------
    InputError : values out of range.

    Example
    -------
    >>> RefineTraining(scale=0.25).refine.working_size(360, 480)
    (90, 120)
    """

    scale: float = RefineConfig.scale
    blocks: int = RefineConfig.blocks
    channels: int = 32
    seed: int = 0
    augment: str = "none"
    decay: float = 0.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        try:
            _ = self.refine  # is checked when it is made
        except InputError as error:
            name = error.message.partition(" ")[0]
            fix = error.fix or f"leave --{name} out; its default is {getattr(type(self), name)}"
            raise InputError(error.message, fix=fix) from error
        if self.augment not in AUGMENTS:
            raise InputError(
                f"augment is {shown_value(self.augment)}; wanted one of {', '.join(AUGMENTS)}",
                fix="--augment none",
            )
        for name in ("decay", "label_weight"):
            value = getattr(self, name)
            if not is_number(value, 0, 1000):
                option = name.replace("_", "-")
                raise InputError(
                    f"{option} is {shown_value(value)}; wanted a number from 0 to 1000",
                    fix=f"--{option} {0.01 if name == 'decay' else 1}",
                )

    @property
    def refine(self) -> RefineConfig:
        """The settings of the refinement that the network is trained for."""
        return RefineConfig(
            scale=self.scale, blocks=self.blocks, channels=self.channels, seed=self.seed
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the method to the parser of ``python -m export train refine``."""
    own = RefineTraining()
    what = parser.add_argument_group("prior and refinement")
    what.add_argument(
        "--model",
        type=lambda text: text if text == "kmeans" else _absolute(text),
        metavar="PRIOR",
        help="the prior whose guides are trained on: an ONNX file, or a bundle with a network",
    )
    for name, metavar, text in (
        ("--mean", "R,G,B", "colours with which the network of a file was trained, in [0, 1]"),
        ("--std", "R,G,B", "deviations of these colours"),
        ("--names", "LIST", "its classes: a,b,c, a JSON list, or a file with one per line"),
        ("--output", "KIND", f"what it returns: {', '.join(KINDS)}"),
        ("--output-name", "NAME", "which of several outputs to take"),
    ):
        what.add_argument(name, metavar=metavar, help=f"{text} (the file states it)")
    what.add_argument(
        "--refine", choices=REFINES, default="residual", help="named settings (%(default)s)"
    )
    what.add_argument(
        "--scale", type=float, help="working size, relative to the picture's (that of --refine)"
    )
    what.add_argument("--blocks", type=int, default=own.blocks, help="hidden layers (%(default)s)")
    what.add_argument(
        "--channels", type=int, default=own.channels, help="of a hidden layer (%(default)s)"
    )
    how = parser.add_argument_group("how the network is trained")
    how.add_argument(
        "--augment",
        choices=AUGMENTS,
        default=own.augment,
        help="light: random crops, and another brightness, contrast and gamma (%(default)s)",
    )
    how.add_argument(
        "--decay",
        type=float,
        default=own.decay,
        help="of the last layer towards zero, which is the prior (%(default)g)",
    )
    labels = parser.add_argument_group("labels, if some pictures have them")
    labels.add_argument(
        "--labels", type=_absolute, metavar="DIR", help="STEM.png or .npy for the picture STEM.jpg"
    )
    labels.add_argument(
        "--classes",
        type=_absolute,
        metavar="FILE",
        help="the prior's class of each id in the labels, by its name; other ids have no label",
    )
    labels.add_argument(
        "--label-weight", type=float, help="of their cross-entropy (1), with --labels"
    )


def _absolute(text: str) -> str:
    """A path that is right in any current folder."""
    return os.path.abspath(some_path(text))


def check(args: argparse.Namespace) -> RefineTraining:
    """The settings that the command line names. It reads no prior, so that a wrong option is
    reported before.

    Raises
    ------
    InputError : no prior, one of --labels and --classes without the other, --label-weight without
        them, or values out of range.
    """
    if args.model is None:
        raise InputError(
            "model is not set; wanted the prior whose guides are trained on",
            fix="--model PRIOR.onnx, or --model with a bundle that has a network",
        )
    if (args.labels is None) != (args.classes is None):
        raise InputError(
            "labels need both the folder of the labels and the file of the classes",
            fix="--labels DIR --classes FILE, or leave both out",
        )
    if args.labels is None and args.label_weight is not None:
        raise InputError(
            "label-weight is for pictures with labels, and there are none",
            fix="--labels DIR --classes FILE, or leave --label-weight out",
        )
    weight = 1.0 if args.label_weight is None else args.label_weight
    scale = PRESETS[args.refine].get("scale", RefineConfig.scale)
    return RefineTraining(
        scale=scale if args.scale is None else args.scale,
        blocks=args.blocks,
        channels=args.channels,
        seed=args.seed,
        augment=args.augment,
        decay=args.decay,
        label_weight=0.0 if args.labels is None else weight,
    )


def prepare(start: Start) -> Parts:
    """Open the prior and make what the loop needs.

    Raises
    ------
    InputError : the prior or the labels cannot be used, or the prior changed since the run was
        started.
    BundleError, MissingBackend, DeviceError : the prior is damaged or cannot run.
    """
    from export.models.stated import Stated
    from export.train.guide_source import open_guide_source, reopen
    from export.train.guides import GuideBatches, PictureLabels, input_sizes
    from export.train.method import Parts

    args, config, entry = start.args, start.config, start.entry
    if entry is None:
        stated = Stated.from_words(
            mean=None if args.mean is None else [args.mean],
            std=None if args.std is None else [args.std],
            names=args.names,
            output=args.output,
            output_name=args.output_name,
        )
        source = open_guide_source(args.model, stated, threads=config.threads)
        if source.has_weights:
            LOG.warning(
                "the training starts from the weights of --seed %d, not from the trained "
                "refinement weights in %s",
                args.seed, source.name,
            )  # fmt: skip
        method = Refine(check(args), source.classes)
        sizes = input_sizes(start.files, source)
    else:
        source = reopen(entry["prior"], args.model, threads=config.threads)
        method = from_settings(entry["settings"], source.classes)
        sizes = entry["prior"]["sizes"]
    method.module.to(config.device)
    labels = None
    if args.labels is not None:
        numbers = label_numbers(Path(args.classes), source.classes, source.names)
        labels = PictureLabels.find(start.files, Path(args.labels), numbers)

    def batches(files: list[Path], **options: Any) -> GuideBatches:
        return GuideBatches(
            files, source, method.config.refine, seed=config.seed, cache=start.cache,
            broken=start.broken(files), device=config.device, **options,
        )  # fmt: skip

    trained = batches(
        start.files, batch=config.batch, workers=config.workers, augment=method.config.augment,
        labels=labels,
    )  # fmt: skip
    held = batches(start.held, batch=1) if start.held else None
    score = None
    if held is not None and config.select == "energy":
        score = objective_score(method, held)
    elif held is not None:
        score = cold_score(method, held, config.threads)
    name, version = source.library.split()
    made = {"settings": method.settings(), "prior": source.entry() | {"sizes": sizes}}
    return Parts(method, trained, score, held, made, {name: version})


def from_settings(settings: dict[str, Any], classes: int) -> Refine:
    """The method as :meth:`Refine.settings` describes it, with the weights of its seed; ``classes``
    are those of the prior.

    Raises
    ------
    InputError : settings that are missing, unknown or out of range.
    """
    try:
        config = RefineTraining(**settings)
    except TypeError as error:
        raise InputError(
            f"settings of refine: {error}", fix="train again with this version"
        ) from error
    return Refine(config, classes)


class Refine:
    """The training of the refinement network, as :class:`export.train.method.Method` describes
    methods. A batch is a list of :class:`export.train.guides.Guided`.

    Parameters
    ----------
    config : the settings.
    classes : C of the prior.

    Example
    -------
    >>> method = Refine(RefineTraining(), classes=19)
    >>> sum(method.losses(pictures).values()).backward()
    """

    name = "refine"

    def __init__(self, config: RefineTraining, classes: int) -> None:
        from export.models.refinement import RefinementNet

        self.config = config
        self.module = RefinementNet(config.refine, classes)

    def optimiser(self, lr: float) -> Optimizer:
        """SGD with the momentum of the refinement; the last layer decays as the settings say."""
        from torch.optim import SGD

        last = [*self.module.conv3.parameters()]
        others = [p for n, p in self.module.named_parameters() if not n.startswith("conv3.")]
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": last, "weight_decay": self.config.decay},
        ]
        return SGD(groups, lr=lr, momentum=self.config.refine.momentum)

    def scores(self, picture: Guided) -> Tensor:
        """The scores (K, h, w) of the picture's own classes, equation (11) of docs/algorithm.md.
        Their soft-max is what ``runtime.refine`` computes without a step."""
        from export.models.refinement import inputs
        from export.train.residual import scores

        x = inputs(picture.image[None])
        return scores(self.module(x, picture.classes)[0], picture.guide)

    def losses(self, batch: Sequence[Guided]) -> dict[str, Tensor]:
        """The objective on the pictures of a batch: {"guide", "pair"}, scalars, each the mean of
        the pictures; and "labels" if the settings have a weight for them.

        "pair" and "labels" contain their weights. "labels" is the mean of the cross-entropy over
        those pixels of a picture that have the label of a class that takes part, and 0 without
        such pixels.
        """
        parts = [self._picture_losses(picture) for picture in batch]
        return {name: reduce(add, (p[name] for p in parts)) / len(parts) for name in parts[0]}

    def _picture_losses(self, picture: Guided) -> dict[str, Tensor]:
        import torch

        from export.train.residual import residual_terms

        z = self.scores(picture)
        with torch.autocast(z.device.type, enabled=False):
            terms = residual_terms(z.float(), picture.image, picture.guide, self.config.refine)
            if self.config.label_weight:
                terms["labels"] = self.config.label_weight * self._label_loss(z, picture)
        return terms

    def _label_loss(self, z: Tensor, picture: Guided) -> Tensor:
        import torch
        from torch.nn import functional

        if picture.labels is None:
            return z.new_zeros(())
        channel = z.new_full((self.module.conv3.out_channels + 1,), -1, dtype=torch.int64)
        channel[picture.classes] = torch.arange(len(z), device=z.device)
        target = channel[picture.labels]  # a label of -1 selects the last entry, which is -1
        total = functional.cross_entropy(
            z[None].float(), target[None], ignore_index=-1, reduction="sum"
        )
        return total / (target >= 0).sum().clamp_min(1)

    def before_update(self) -> None:
        """Nothing is changed beside the weights."""

    def held_out(self, batch: Sequence[Guided]) -> float:
        """The objective on pictures that are not trained on, without labels: the mean."""
        import torch

        from export.train.residual import residual_terms

        config = self.config.refine
        with torch.no_grad():
            terms = [residual_terms(self.scores(p), p.image, p.guide, config) for p in batch]
        return float(np.mean([float(sum(term.values())) for term in terms]))

    def settings(self) -> dict[str, Any]:
        """The settings as :func:`from_settings` reads them."""
        return asdict(self.config)


def state(module: Module) -> dict[str, np.ndarray]:
    """The weights of a network as ``runtime.refine(initial=...)`` takes them.

    They have no momenta, which are then zero. The running statistics are those of a new network:
    the residual objective uses each picture's own.

    Parameters
    ----------
    module : :class:`export.models.refinement.RefinementNet`.

    Example
    -------
    >>> runtime.refine(image, guide, steps=0, initial=state(method.module))
    """
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def objective_score(method: Refine, held: GuideBatches) -> Callable[[], float]:
    """A function that returns the objective on held-out pictures; the lowest is best.

    Parameters
    ----------
    method : whose module is trained.
    held : the held-out pictures, without augmentation.

    Example
    -------
    >>> objective_score(method, held)()
    0.41
    """
    return lambda: float(np.mean([method.held_out(held.of([i])) for i in range(held.reads.views)]))


def cold_score(method: Refine, held: GuideBatches, threads: int) -> Callable[[], float]:
    """A function that returns the share of labels, from 0 to 1, by which the network without a step
    differs from a refinement that starts cold; the lowest is best.

    The cold refinement has the steps of the settings' :class:`runtime.RefineConfig`, and begins
    with the weights of the seed. It is computed here once for each picture, at the working size.

    Parameters
    ----------
    method, held : as for :func:`objective_score`.
    threads : of the CPU.

    Example
    -------
    >>> cold_score(method, held, threads=2)()
    0.03
    """
    import torch

    config = method.config.refine
    LOG.info("refine %d held-out pictures cold, in %d steps each", held.reads.views, config.steps)

    def cold(picture: Guided) -> np.ndarray:
        image, guide = (
            np.ascontiguousarray(t.cpu().numpy().transpose(1, 2, 0))
            for t in (picture.image, picture.guide)
        )
        shape = guide.shape
        refiner = Refiner(*shape[:2], classes=shape[2], threads=threads, **config.options())
        # With one class no step can change a label.
        result = refiner.run(image, Guide(guide), steps=0 if shape[2] == 1 else None)
        return result.labels.astype(np.uint16)

    wanted = [cold(held.of([i])[0]) for i in range(held.reads.views)]

    def differs(number: int) -> float:
        with torch.no_grad():
            labels = method.scores(held.of([number])[0]).argmax(0).cpu().numpy()
        return float((labels != wanted[number]).mean())

    return lambda: float(np.mean([differs(i) for i in range(held.reads.views)]))


def label_numbers(file: Path, classes: int, names: Sequence[str] | None) -> dict[int, int]:
    """The prior's class of each id in the labels. Pixels with another id count as unknown.

    Parameters
    ----------
    file : as for :meth:`export.train.labels.Classes.read`.
    classes : the number of the prior's classes.
    names : theirs. A name in the file is that of the prior's class. Without names, an id in the
        file is the number of the prior's class.

    Raises
    ------
    InputError : the file cannot be used; it names a class that the prior does not have; or, for a
        prior without names, it has an id that is no number of a class.

    Example
    -------
    >>> label_numbers(Path("ids.json"), 3, ["road", "car", "sky"])  # {"7": "road", "23": "sky"}
    {7: 0, 23: 2}
    """
    own = Classes.read(file)
    if names:
        numbers = {name: number for number, name in enumerate(names)}
        wrong = [name for name in own.names if name not in numbers]
        found = {i: numbers.get(own.names[k], -1) for i, k in own.of_id.items()}
        wanted = f"the prior has {some(names)}"
    else:
        wrong = [f"id {i}" for i in own.of_id if i >= classes]
        found = {i: i for i in own.of_id}
        wanted = f"the prior has no names, and its classes have the numbers 0 to {classes - 1}"
    if wrong:
        raise InputError(
            f"{shown(file)} does not fit the prior: it has {some(wrong)}; {wanted}",
            fix="write the prior's classes into the file, and leave the others out: pixels of "
            "other ids count as unknown",
        )
    return found
