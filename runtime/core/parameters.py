"""The objectives, and the refinement network's tensors: names, shapes, order and initial values.

Names, order and layout (out, in, kh, kw) are PyTorch's, so that PyTorch loads the weights and
buffers with ``strict=True``. The native core reads the same numbers from three flat vectors:
parameters, momenta and buffers (runtime/csrc/network.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.checks import is_count, shown_value
from runtime.core.options import RefineOptions
from runtime.errors import InputError

State = dict[str, np.ndarray]  # tensors by name: weights, buffers, momenta, batch counters
MOST_BATCHES = 2**53  # the limit for a batch norm's counter of batches
_FIX = (
    "use weights and settings that belong together: objective, channels, blocks, skip, final_bn "
    "and the number of classes decide which tensors a network has"
)


@dataclass(frozen=True)
class Objective:
    """The properties of an objective. Other modules read these instead of comparing names.

    Attributes
    ----------
    native : the objective's number in runtime/csrc/network.h.
    inputs : channels of the network's input: RGB, and for residual also the coordinates.
    channels_follow_classes : the response map has one channel for each class of the guide and
        starts as the guide, so a guide is required. Otherwise its channels are clusters, which have
        no fixed meaning.
    takes_guide : the objective as published has a guide loss. If False, the SDK passes no guide,
        and the graphs of a bundle have no input for one.
    maps_clusters : the objective as published maps the classes of the guide to clusters.
    losses : name of each loss -> its column among the four losses that each step records.
    golden_steps : most steps of a golden vector. The published objectives get few: their losses
        have kinks, and a value that rounding moves across a kink changes all later steps.
    update_tolerance : largest relative error of one step's update against float64 at export. It is
        larger for the objectives with kinks (docs/architecture.md).
    """

    native: int
    inputs: int
    channels_follow_classes: bool
    takes_guide: bool
    maps_clusters: bool
    losses: Mapping[str, int]
    golden_steps: int
    update_tolerance: float

    @property
    def takes_soft_guide(self) -> bool:
        """Whether the objective always uses the guide's probabilities, without ``soft_guide``."""
        return self.channels_follow_classes


_CLUSTER_LOSSES = {"total": 0, "similarity": 1, "spatial": 2, "guide": 3}
OBJECTIVES = {
    "residual": Objective(
        native=0,
        inputs=5,
        channels_follow_classes=True,
        takes_guide=True,
        maps_clusters=False,
        losses={"total": 0, "pair": 2, "guide": 3},
        golden_steps=10,
        update_tolerance=5e-5,
    ),
    "dynaguide": Objective(
        native=1,
        inputs=3,
        channels_follow_classes=False,
        takes_guide=True,
        maps_clusters=True,
        losses=_CLUSTER_LOSSES,
        golden_steps=3,
        update_tolerance=1e-3,
    ),
    "dynaseg": Objective(
        native=1,
        inputs=3,
        channels_follow_classes=False,
        takes_guide=False,
        maps_clusters=False,
        losses=_CLUSTER_LOSSES,
        golden_steps=3,
        update_tolerance=1e-3,
    ),
}


def objective_of(options: RefineOptions) -> Objective:
    """Return the properties of the options' objective.

    Example
    -------
    >>> objective_of(RefineOptions()).channels_follow_classes
    True
    """
    return OBJECTIVES[options.objective]


def channel_count(options: RefineOptions, classes: int | None) -> int | None:
    """Return the number of channels of the response map.

    For residual this is ``classes``, the number of classes of the guide, which may be None
    (unknown). For the other objectives it is the option ``channels``.

    Example
    -------
    >>> channel_count(RefineOptions(), 19), channel_count(RefineOptions(objective="dynaseg"), None)
    (19, 100)
    """
    return classes if objective_of(options).channels_follow_classes else options.channels or 1


def shapes(options: RefineOptions, classes: int) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Return name -> shape of every parameter, and of every batch-norm buffer, in the order of a
    state. ``classes`` is the number of channels of the response map.

    Example
    -------
    >>> shapes(RefineOptions(), 19)[0]["conv3.weight"]
    (19, 32, 1, 1)
    """
    parameters: dict[str, tuple] = {}
    buffers: dict[str, tuple] = {}

    def conv(name: str, kernel: int, n_in: int, n_out: int) -> None:
        parameters[f"{name}.weight"] = (n_out, n_in, kernel, kernel)
        parameters[f"{name}.bias"] = (n_out,)

    def norm(name: str, n: int) -> None:
        parameters[f"{name}.weight"] = parameters[f"{name}.bias"] = (n,)
        buffers[f"{name}.running_mean"] = buffers[f"{name}.running_var"] = (n,)

    channels = options.channels or 0
    conv("conv1", 3, objective_of(options).inputs, channels)
    norm("bn1", channels)
    for i in range(options.blocks - 1):
        conv(f"conv2.{i}", 3, channels, channels)
        norm(f"bn2.{i}", channels)
    if options.skip == "own":
        conv("skip", 3, objective_of(options).inputs, channels)
    conv("conv3", 1, channels, classes)
    if options.final_bn != "none":
        norm("bn3", classes)
    return parameters, buffers


def initial_state(options: RefineOptions, classes: int) -> State:
    """Return the state before the first step, from the option ``seed``.

    Convolutions follow PyTorch's default: weight and bias are uniform in +-1/sqrt(fan in). Batch
    norms have weight 1, bias 0, mean 0 and variance 1. Residual's last layer is zero, so that the
    first map is the guide. The random numbers are the top 24 bits of PCG64(seed), whose stream is
    the same in all versions of NumPy.

    Example
    -------
    >>> initial_state(RefineOptions(), 19)["conv3.bias"].any()
    False
    """
    parameters, buffers = shapes(options, classes)
    bits = np.random.PCG64(options.seed)
    follows = objective_of(options).channels_follow_classes
    state: State = {}
    bound = 1.0
    for name, shape in parameters.items():
        if name.startswith("bn"):
            state[name] = np.full(shape, float(name.endswith("weight")), np.float32)
            continue
        if name.endswith("weight"):
            bound = 1.0 / np.sqrt(np.prod(shape[1:]))
        raw = np.asarray(bits.random_raw(int(np.prod(shape)))) >> np.uint64(40)
        value = (raw.astype(np.float64) / 2**23 - 1.0) * bound
        state[name] = value.astype(np.float32).reshape(shape)
        if follows and name.startswith("conv3"):
            state[name] = np.zeros(shape, np.float32)
    for name, shape in buffers.items():
        state[name] = np.full(shape, float(name.endswith("var")), np.float32)
    for name in list(parameters):
        state[f"momentum.{name}"] = np.zeros_like(state[name])
    return state | _counters(buffers, 0)


def select_classes(
    options: RefineOptions, state: Mapping[str, np.ndarray], classes: np.ndarray | None
) -> State:
    """Return ``state`` with only those rows of the last layer that belong to ``classes``.

    All rows are kept if ``classes`` is None, and for objectives whose channels are clusters.

    Raises
    ------
    InputError : the state has fewer classes.

    Example
    -------
    >>> state = initial_state(RefineOptions(), 19)
    >>> select_classes(RefineOptions(), state, np.array([0, 7]))["conv3.bias"].shape
    (2,)
    """
    if classes is None or not objective_of(options).channels_follow_classes:
        return dict(state)
    head = [f"{m}conv3.{k}" for m in ("", "momentum.") for k in ("weight", "bias")]
    for name in head:
        if name in state and len(state[name]) <= int(np.max(classes)):
            raise InputError(
                f"state {name!r} is for {len(state[name])} classes; the guide has class "
                f"{int(np.max(classes))}",
                fix=_FIX,
            )
    return {k: v[classes] if k in head else v for k, v in state.items()}


def _counters(buffers: Mapping[str, tuple], batches: int) -> State:
    """Return PyTorch's counter of batches for each batch norm, with the value ``batches``."""
    norms = [n.removesuffix(".running_mean") for n in buffers if n.endswith("running_mean")]
    return {f"{n}.num_batches_tracked": np.asarray(batches, np.int64) for n in norms}


def flatten(
    options: RefineOptions, classes: int, state: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return parameters, momenta and batch-norm buffers of ``state`` as three flat float32 vectors,
    and the number of batches that its batch norms have counted.

    Momenta and counters that are missing are zero: a plain PyTorch state_dict has no momenta.

    Raises
    ------
    InputError : a name that is missing or unknown, a wrong shape, NaN or infinity, or a counter
        that is not one whole number of at least 0.

    Example
    -------
    >>> options = RefineOptions()
    >>> vectors = flatten(options, 4, initial_state(options, 4))
    >>> state = unflatten(options, 4, *vectors)
    """
    parameters, buffers = shapes(options, classes)
    wanted = {**parameters, **buffers}
    for name in (*parameters, *buffers):
        if name not in state:
            raise InputError(f"state has no {name!r}; wanted {', '.join(wanted)}", fix=_FIX)
    known = {*wanted, *(f"momentum.{n}" for n in parameters), *_counters(buffers, 0)}
    for name in state:
        if name not in known:
            raise InputError(f"state has {name!r}, which this network does not have", fix=_FIX)

    def flat(names: list[str], prefix: str = "") -> np.ndarray:
        parts = []
        for name in names:
            value = np.asarray(state.get(prefix + name, np.zeros(wanted[name])), np.float32)
            if value.shape != wanted[name]:
                raise InputError(
                    f"state {prefix + name!r} is {value.shape}; wanted {wanted[name]}", fix=_FIX
                )
            if not np.isfinite(value).all():
                raise InputError(
                    f"state {prefix + name!r} has NaN or infinite values",
                    fix="use weights that were saved before the training diverged",
                )
            parts.append(value.ravel())
        return np.concatenate(parts)

    batches = 0
    for name in _counters(buffers, 0).keys() & state.keys():
        count = np.asarray(state[name])
        if count.shape != () or not is_count(count[()], 0, MOST_BATCHES):
            raise InputError(
                f"state {name!r} is {shown_value(count)}; wanted a whole number of shape (), "
                f"0 to {MOST_BATCHES}",
                fix=f"leave {name!r} out, or save the tensor as PyTorch's state_dict contains it",
            )
        batches = max(batches, int(count))
    names = list(parameters)
    return flat(names), flat(names, "momentum."), flat(list(buffers)), batches


def unflatten(
    options: RefineOptions,
    classes: int,
    parameters: np.ndarray,
    momenta: np.ndarray,
    buffers: np.ndarray,
    batches: int,
) -> State:
    """Return the state from the results of :func:`flatten`, as copies.

    Example
    -------
    >>> state = unflatten(options, 4, *flatten(options, 4, state))
    """
    parameter_shapes, buffer_shapes = shapes(options, classes)

    def cut(vector: np.ndarray, wanted: dict[str, tuple], prefix: str = "") -> State:
        out: State = {}
        at = 0
        for name, shape in wanted.items():
            size = int(np.prod(shape))
            out[prefix + name] = vector[at : at + size].reshape(shape).copy()
            at += size
        return out

    return (
        cut(parameters, parameter_shapes)
        | cut(buffers, buffer_shapes)
        | cut(momenta, parameter_shapes, "momentum.")
        | _counters(buffer_shapes, batches)
    )
