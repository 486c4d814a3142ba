"""Networks of other forms become networks of the form that bundles have.

A bundle's prior has one output: (1, C, h, w) float32 scores of two and more classes, or (1, h, w)
int32 labels. What the output of a foreign network is, shapes and values decide, by the rules of
:mod:`runtime.prior.reading`; here a few operators are put behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from export.frozen import Frozen, serialised
from export.models import PriorModel
from runtime.errors import BundleError, VerificationFailed
from runtime.prior.network import two_names
from runtime.prior.reading import (
    KIND_NOTES,
    Form,
    core_axes,
    described,
    find_form,
    find_kind,
    standard,
)

if TYPE_CHECKING:
    from torch.nn import Module

_AXES_ARE_INPUTS = 13  # from this opset on, Squeeze and Unsqueeze take their axes as an input
# The largest difference behind the operators, relative to the largest value. In FP16 networks, ONNX
# Runtime leaves out the rounding before a Cast.
_CLOSE, _CLOSE_FP16 = 1e-6, 1e-2


class Standard(NamedTuple):
    """A network in the form of bundles, and how its output was read.

    Parameters
    ----------
    model : the network; the same object if nothing was to do.
    notes : a sentence for each decision that the network's metadata left open.
    """

    model: PriorModel
    notes: list[str]


def standardised(model: PriorModel, feeds: Sequence[np.ndarray]) -> Standard:
    """Put operators behind a network so that its output has the form of bundles.

    Parameters
    ----------
    model : a network. Its ``output`` may be None: the values of the outputs decide then.
    feeds : (1, 3, h, w) float32 each, the pictures to verify with.

    Raises
    ------
    BundleError : the outputs are no segmentation, or not what ``model.output`` says.
    VerificationFailed : an output is not finite, or the operators compute other values than the
        rules say.

    Example
    -------
    >>> model, notes = standardised(onnx_file(Path("prior.onnx")), [preprocess(picture)])
    >>> model.output
    'logits'
    """
    found = _outputs(model, feeds)
    if found is None:
        return Standard(model, [])
    names, runs = found
    outputs = described(names, runs[0])
    form = find_form(
        outputs,
        feeds[0].shape[2:],
        name=model.name,
        names=model.names,
        kind=model.output,
        chosen=model.output_name,
    )
    raw = [outputs[form.output] for outputs in runs]
    if not all(np.isfinite(out).all() for out in raw):
        raise VerificationFailed(
            f"{model.name} returns NaN or infinite scores", fix="check the network and its weights"
        )
    planes = [form.planes(out, model.name) for out in raw]
    kind = model.output or find_kind(planes, name=model.name)
    if kind is None:
        raise BundleError(
            f"{model.name} returned one channel of zeros and ones for all pictures, which are "
            "labels as well as probabilities",
            fix="--output labels, or --output probabilities; or name pictures with more classes: "
            "--pictures FILE...",
        )
    wanted = [standard(array, kind, name=model.name) for array in planes]
    notes = [form.note] if form.note else []
    note = KIND_NOTES.get((kind, len(planes[0]) > 1))
    if note and model.output is None and raw[0].dtype.kind == "f":
        notes.append(note)
    labels = wanted[0].ndim == 2
    told = replace(model, output=kind, output_name=None, names=two_names(model.names))
    if labels and told.names is not None:
        most = max(int(array.max()) for array in wanted)
        if most >= len(told.names):
            raise BundleError(
                f"{model.name} returned label {most}, but has {len(told.names)} names: "
                + ", ".join(told.names)[:200],
                fix="name each class once, from number 0 on: --names, or metadata 'classes'",
            )
    steps = _steps(form, raw[0], labels, kind)
    if len(outputs) == 1 and not any(steps[1:]):  # all but ``labels``
        return Standard(told, notes)
    if model.onnx is not None:
        told = replace(told, onnx=_with_operators(model, form.output, steps))
    else:
        told = replace(told, module=_with_module(model, steps))
    _check(told, feeds, wanted, _CLOSE_FP16 if raw[0].dtype == np.float16 else _CLOSE)
    return Standard(told, notes)


class _Steps(NamedTuple):
    """The operators behind an output, in this order.

    Parameters
    ----------
    labels : whether the output is labels, int32, or else scores, float32.
    cast : whether the output has another type than these.
    drop : the axes of length 1 to remove.
    order : the order of the axes after that; empty if it is right.
    insert : the axes of length 1 to add.
    foreground : the kind of the only channel, of which background and foreground are made; "" if
        there are several channels, or labels.
    """

    labels: bool
    cast: bool
    drop: list[int]
    order: list[int]
    insert: list[int]
    foreground: str


def _steps(form: Form, out: np.ndarray, labels: bool, kind: str) -> _Steps:
    """The operators that bring the output ``out`` to the form of bundles."""
    axes, order = [*core_axes(out.shape)], []
    insert = [0]
    if labels and len(axes) == 3:
        axes = axes[:2] if form.last else axes[1:]
    elif len(axes) == 2:
        insert = [0] if labels else [0, 1]
    elif form.last:
        order = [2, 0, 1]
    drop = [axis for axis in range(out.ndim) if axis not in axes]
    if drop == insert == [0]:  # the batch
        drop, insert, order = [], [], [0, 3, 1, 2] if order else []
    return _Steps(
        labels=labels,
        cast=out.dtype != (np.int32 if labels else np.float32),
        drop=drop,
        order=order,
        insert=insert,
        foreground=kind if form.channels == 1 and not labels else "",
    )


def _outputs(
    model: PriorModel, feeds: Sequence[np.ndarray]
) -> tuple[list[str], list[list[np.ndarray]]] | None:
    """The names of the outputs, and the outputs for each of ``feeds``. None for a module that does
    not run, or returns something else than one tensor: the exporter reports these later."""
    if model.onnx is not None:
        with Frozen(model.name, data=model.onnx) as network:
            return [port.name for port in network.outputs], [network(feed) for feed in feeds]
    import torch

    assert model.module is not None
    runs = []
    try:
        with torch.no_grad():
            for feed in feeds:
                out = model.module.eval()(torch.from_numpy(feed))
                if not isinstance(out, torch.Tensor) or out.ndim not in (3, 4):
                    return None
                runs.append([out.numpy()])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return [""], runs


def _check(
    model: PriorModel, feeds: Sequence[np.ndarray], wanted: Sequence[np.ndarray], close: float
) -> None:
    """VerificationFailed unless the network returns ``wanted`` for ``feeds``, (C, h, w) or (h, w)
    each. ``close`` is the largest difference relative to the largest value."""
    found = _outputs(model, feeds)
    assert found is not None
    for (out,), values in zip(found[1], wanted, strict=True):
        same = out.shape == (1, *values.shape) and out.dtype == values.dtype
        if not same or not np.abs(out[0] - values).max() <= close * max(1, np.abs(values).max()):
            raise VerificationFailed(
                f"{model.name}: the operators behind its output compute {out.shape} {out.dtype} "
                f"that differ from the output by more than {close:g}; wanted "
                f"{(1, *values.shape)} {values.dtype}",
                fix="report this network",
            )


def _with_operators(model: PriorModel, number: int, steps: _Steps) -> bytes:
    """The ONNX network with operators behind its output ``number``, which is then the only one."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = onnx.load_from_string(model.onnx or b"")
    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    inner = graph.graph
    taken = {name for node in inner.node for name in (*node.input, *node.output)}
    taken |= {item.name for item in (*inner.initializer, *inner.input, *inner.output)}
    fresh = (name for n in range(2**31) if (name := f"prior_{n}") not in taken)

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        inner.node.append(helper.make_node(operator, inputs, [next(fresh)], **attributes))
        return inner.node[-1].output[0]

    def constant(array: np.ndarray) -> str:
        inner.initializer.append(numpy_helper.from_array(array, next(fresh)))
        return inner.initializer[-1].name

    def with_axes(operator: str, x: str, axes: list[int]) -> str:
        if opset < _AXES_ARE_INPUTS:
            return add(operator, x, axes=axes)
        return add(operator, x, constant(np.array(axes, np.int64)))

    kind = TensorProto.INT32 if steps.labels else TensorProto.FLOAT
    value = inner.output[number].name
    if steps.cast:
        value = add("Cast", value, to=kind)
    if steps.drop:
        value = with_axes("Squeeze", value, steps.drop)
    if steps.order:
        value = add("Transpose", value, perm=steps.order)
    if steps.insert:
        value = with_axes("Unsqueeze", value, steps.insert)
    if steps.foreground:
        # The soft-max of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        whole = value if steps.foreground == "logits" else constant(np.ones(1, np.float32))
        value = add("Concat", add("Sub", whole, value), value, axis=1)
    del inner.output[:]
    inner.output.append(helper.make_tensor_value_info(value, kind, None))
    _prune(inner)
    return serialised(graph, model.name)


def _prune(graph: Any) -> None:
    """Remove the nodes and weights that no output needs. Inner graphs read values of the outer one,
    so that every name in them counts as needed."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_read_by(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _read_by(node: Any) -> Iterator[str]:
    """The names of the values that a node and its inner graphs read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (output.name for output in graph.output)


def _with_module(model: PriorModel, steps: _Steps) -> Module:
    """The PyTorch module with operators behind its output."""
    import torch

    class Standardised(torch.nn.Module):
        """A network whose output has the form of bundles."""

        def __init__(self, network: Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return (1, C, h, w) scores or (1, h, w) labels of a (1, 3, h, w) picture."""
            y = self.network(x)
            if steps.cast:
                y = y.to(torch.int32 if steps.labels else torch.float32)
            if steps.drop:
                y = y.squeeze(steps.drop)
            if steps.order:
                y = y.permute(steps.order)
            for axis in steps.insert:
                y = y.unsqueeze(axis)
            if steps.foreground:
                y = torch.cat([(y if steps.foreground == "logits" else 1) - y, y], 1)
            return y

    assert model.module is not None
    return Standardised(model.module.eval()).eval()
