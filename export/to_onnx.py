"""Freeze a prior into one ONNX file that contains everything and that any runtime can load."""

from __future__ import annotations

import io
import json
import logging
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from export.frozen import Frozen
from export.inference import check_not_training, check_valid, precision_of, store_unknown_types
from export.models import PriorModel
from export.ports import fix_ports
from runtime.engines.onnx_runtime import telemetry_off
from runtime.errors import (
    BundleError,
    InputError,
    MissingBackend,
    VerificationFailed,
    first_line,
)
from runtime.prior.preprocess import MAX_SIDE, Preprocess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import ModelProto

INPUT, OUTPUT = "images", "logits"  # names for modules; ONNX files keep their own names
# Largest difference that simplifying may make, relative to the largest score. Folding a layer into
# another rounds its weights again, which changes weights of lower precision more.
_CLOSE, _CLOSE_LOW = 1e-4, 1e-2
_STANDARD = ("", "ai.onnx")


def freeze(
    model: PriorModel,
    *,
    imgsz: tuple[int, int] | None = None,
    dynamic: bool = False,
    opset: int | None = None,
    simplify: bool = True,
) -> bytes:
    """The bytes of :func:`frozen_graph` with the same arguments, which raises the same errors.

    Example
    -------
    >>> Path("prior.onnx").write_bytes(freeze(segformer(Path("segformer-b0"))))
    """
    with frozen_graph(model, imgsz=imgsz, dynamic=dynamic, opset=opset, simplify=simplify) as graph:
        return graph.data


def frozen_graph(
    model: PriorModel,
    *,
    imgsz: tuple[int, int] | None = None,
    dynamic: bool = False,
    opset: int | None = None,
    simplify: bool = True,
) -> Frozen:
    """A prior as one ONNX graph: batch 1, weights inside, standard operators, checked.

    The graph contains no paths and no stack traces of the machine that made it. The same model has
    the same bytes with the same versions of torch and onnx. The metadata_props describe the input
    and the output, so that the file works without a bundle: ``Segmenter("prior.onnx")``.

    Parameters
    ----------
    model : a network.
    imgsz : (height, width) of the input in pixels, instead of the model's own.
    dynamic : leave height and width free.
    opset : version of the ONNX operators for modules, instead of the model's own; ONNX files keep
        theirs.
    simplify : let onnxslim fold constants and fuse operators, and compare the output before and
        after that.

    Returns
    -------
    The graph; the caller closes it.

    Raises
    ------
    InputError : K-means, which is no network; operators outside of the ONNX standard; a size that
        the network does not allow; a network with several inputs; a module that fails, that torch
        cannot export, or whose output has the wrong form.
    BundleError : bytes that are no ONNX; a network in training mode, one that onnx's checker
        refuses, or one of 2 GiB and more.
    VerificationFailed : simplifying changed the output, or the output is not finite.
    MissingBackend : torch, onnxscript, onnx or onnxslim is not installed.

    Example
    -------
    >>> with frozen_graph(segformer(), imgsz=(256, 512)) as graph:
    ...     graph.inputs[0].shape
    (1, 3, 256, 512)
    """
    preprocess = frozen_preprocess(model, imgsz=imgsz, dynamic=dynamic)
    imgsz = imgsz or model.fixed_size
    check_onnx()
    import onnx.inliner

    if model.module is not None:
        graph = _trace(model, imgsz, dynamic, opset or model.opset)
    else:
        graph = onnx.inliner.inline_local_functions(_parsed(model))
    check_not_training(graph, model.name)
    foreign = sorted(
        {f"{n.domain}.{n.op_type}" for n in graph.graph.node if n.domain not in _STANDARD}
    )
    if foreign:
        raise InputError(
            f"{model.name} has operators outside of the ONNX standard: {', '.join(foreign)}",
            fix="export it again without fusing for ONNX Runtime, before quantising",
        )
    fix_ports(graph, model.name, imgsz, dynamic=dynamic, multiple=preprocess.multiple)
    _strip(graph)
    original = graph
    if simplify:
        graph = _simplified(graph)
    _set_metadata(graph, model, preprocess, imgsz)
    frozen = Frozen(model.name, graph)
    with ExitStack() as on_error:
        on_error.callback(frozen.close)
        if simplify:
            _check_simplified(original, frozen, imgsz)
        check_valid(frozen.model, model.name, full=True)
        _check_names(frozen.model, model)
        on_error.pop_all()
    return frozen


def frozen_preprocess(
    model: PriorModel, *, imgsz: tuple[int, int] | None = None, dynamic: bool = False
) -> Preprocess:
    """How pictures become the input of :func:`frozen_graph` with the same arguments.

    A network of fixed size stretches pictures to that size. A network of free size keeps their
    aspect and takes the long side of ``imgsz``.

    Parameters
    ----------
    model : a network.
    imgsz : (height, width) in pixels, instead of the model's own.
    dynamic : height and width stay free.

    Raises
    ------
    InputError : the model is no network, or a network of free size does not take ``imgsz``.

    Example
    -------
    >>> frozen_preprocess(segformer(), dynamic=True).resize
    'long_side'
    """
    own = model.preprocess
    if own is None:
        raise InputError(
            f"{model.name} is no network; there is nothing to freeze",
            fix="choose another --model, or export it as it is",
        )
    height, width = imgsz or model.fixed_size
    if any(n % own.multiple or n < own.minimum for n in (height, width)) and dynamic:
        raise InputError(
            f"imgsz is {(height, width)}; {model.name} of free size wants multiples of "
            f"{own.multiple}, at least {own.minimum}",
            fix="choose another --imgsz, or drop --dynamic",
        )
    if not dynamic:
        return replace(own, height=height, width=width)
    return replace(own, resize="long_side", long_side=max(height, width), height=None, width=None)


def _parsed(model: PriorModel) -> ModelProto:
    """The model's ONNX graph. BundleError if its bytes are none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_from_string(model.onnx or b"")
        for node in graph.graph.node:
            for text in (node.name, node.op_type, *node.input, *node.output):
                if isinstance(text, bytes):  # protobuf returns what is no UTF-8 as bytes
                    text.decode()
    except (DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{model.name} is no ONNX model: {first_line(error)}",
            fix="export it again; PriorModel(onnx=...) wants the bytes of an .onnx file",
        ) from error
    return graph


def _trace(model: PriorModel, imgsz: tuple[int, int], dynamic: bool, opset: int) -> ModelProto:
    """The module as an ONNX graph, by torch's exporter. InputError if torch cannot export it."""
    try:
        import onnxscript  # noqa: F401  (torch would report only later that it is missing)
        import torch
    except ImportError as error:
        raise _missing("torch", error) from error
    assert model.module is not None and model.preprocess is not None
    shapes = None
    if dynamic:
        least = model.preprocess.minimum
        free = [torch.export.Dim(n, min=least, max=MAX_SIDE) for n in ("height", "width")]
        shapes = ({2: free[0], 3: free[1]},)
    # The example is noise, because zeros could hide branches that depend on values.
    example = torch.rand(1, 3, *imgsz, generator=torch.Generator().manual_seed(0))
    _check_answer(model, example)
    try:
        with _quiet():
            program = torch.onnx.export(
                model.module.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"torch cannot export {model.name} at {imgsz}: {reason}",
            fix=("try a fixed size (no --dynamic), or " if dynamic else "")
            + "export it yourself and pass --model PATH.onnx",
        ) from error
    assert program is not None  # with dynamo=True torch always returns a program
    return program.model_proto


def _check_answer(model: PriorModel, example: Any) -> None:
    """InputError unless the module takes ``example`` and returns one array of scores or labels."""
    import torch

    assert model.module is not None
    wanted = "one tensor: (1, C, h, w) scores or (1, h, w) labels"
    try:
        with torch.no_grad():
            answer = model.module.eval()(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = first_line(error)
        raise InputError(
            f"{model.name} fails on {tuple(example.shape)} float32: {reason}",
            fix="make module(torch.rand(1, 3, H, W)) run, and set H and W by --imgsz",
        ) from error
    if not isinstance(answer, torch.Tensor):
        raise InputError(
            f"{model.name} returns a {type(answer).__name__}; wanted {wanted}",
            fix="wrap it in a module whose forward returns the scores alone",
        )
    if answer.ndim not in (3, 4) or answer.shape[0] != 1:
        raise InputError(
            f"{model.name} returns {tuple(answer.shape)}; wanted {wanted}",
            fix="wrap it in a module whose forward returns one of these",
        )
    if answer.ndim == 4 and model.names and len(model.names) != answer.shape[1]:
        raise InputError(
            f"{model.name} returns {answer.shape[1]} classes, but has {len(model.names)} names",
            fix="pass one name for each class to PriorModel, or none",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which torch and onnxslim print nothing. They still raise exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip(graph: ModelProto) -> None:
    """Remove what describes the machine: documentation, stack traces, names of source files."""
    inner = graph.graph
    values = (*inner.input, *inner.output, *inner.value_info)
    for item in (graph, inner, *inner.node, *inner.initializer, *values):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for node in inner.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")


def _simplified(graph: ModelProto) -> ModelProto:
    """A copy of the graph, simplified by onnxslim."""
    import onnx

    telemetry_off()  # onnxslim imports ONNX Runtime
    try:
        import onnxslim
    except ImportError as error:
        raise _missing("onnxslim", error) from error
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)  # onnxslim changes its argument
    with _quiet():
        slim = onnxslim.slim(copy)
    _strip(slim)
    store_unknown_types(slim)
    return slim


def _check_simplified(original: ModelProto, slim: Frozen, imgsz: tuple[int, int]) -> None:
    """VerificationFailed unless both graphs return the same finite output for noise."""
    x = np.random.default_rng(0).standard_normal((1, 3, *imgsz), np.float32)
    with Frozen(slim.name, original) as before:
        wanted = before(x)[0]
    answer = slim(x)[0]
    if not np.isfinite(wanted).all():
        raise VerificationFailed(
            f"{slim.name} returns NaN or infinite scores", fix="check the network and its weights"
        )
    difference = _difference(wanted, answer)
    close = _CLOSE if precision_of(original) == "fp32" else _CLOSE_LOW
    if not difference <= close:
        raise VerificationFailed(
            f"simplifying {slim.name} changed its answer: relative difference {difference:.3g}, "
            f"allowed {close:g}",
            fix="export with --no-simplify",
        )


def _check_names(graph: ModelProto, model: PriorModel) -> None:
    """InputError unless an output of scores has a channel for each name."""
    dims = graph.graph.output[0].type.tensor_type.shape.dim
    channels = dims[1].dim_value if len(dims) == 4 and len(graph.graph.output) == 1 else 0
    if model.names and channels > 1 and len(model.names) != channels:
        names = ", ".join(model.names)
        raise InputError(
            f"{model.name} returns {channels} classes, but has {len(model.names)} names: "
            f"{names[:200]}",
            fix="name each class once: --names A,B,... or metadata 'classes'",
        )


def _difference(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference, relative to the largest value of ``before``; infinite if the shapes
    differ."""
    if before.shape != after.shape:
        return np.inf
    before, after = before.astype(np.float64), after.astype(np.float64)
    return float(np.abs(after - before).max() / (np.abs(before).max() or 1.0))


def _set_metadata(
    graph: ModelProto,
    model: PriorModel,
    preprocess: Preprocess,
    imgsz: tuple[int, int],
) -> None:
    """Set the metadata_props: keys that other programs read, and those that
    runtime/prior/preprocess.py reads."""
    import onnx

    height, width = imgsz
    props: dict[str, Any] = {
        "description": f"segmentation prior {model.name}"
        + ("" if model.trained else ", untrained: random weights"),
        "author": "dynaguide-edge",
        "version": "1",
        "license": model.licence,
        "task": "semantic-segmentation",
        "batch": 1,
        "imgsz": [height, width],
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "input_size": {"width": width, "height": height},
        "size_multiple": preprocess.multiple,
        "minimum_size": preprocess.minimum,
        "input_layout": f"NCHW {preprocess.color.upper()}",
    }
    if model.output is not None:
        props["output"] = model.output
    if model.names is not None:
        props["names"] = str(dict(enumerate(model.names)))  # a Python literal, as others write it
        props["classes"] = model.names
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in props.items()}
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, texts)
    graph.producer_name, graph.producer_version = "dynaguide-edge", ""
    graph.ClearField("domain")
    graph.ClearField("model_version")


def check_onnx() -> None:
    """Check that onnx can be imported: every export needs it.

    Raises
    ------
    MissingBackend : it cannot.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise _missing("onnx", error) from error


def _missing(package: str, error: ImportError) -> MissingBackend:
    """The error to raise for a package that is not installed."""
    return MissingBackend(
        f"{package} is needed to export, but {error}",
        fix="pip install 'dynaguide-edge[export]'",
    )
