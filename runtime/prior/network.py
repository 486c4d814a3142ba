"""A frozen segmentation network as a prior, and the conversion of its output to a guide."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.checks import as_numbers, on_gpu, shown_value
from runtime.core import classes_cuda
from runtime.core.guide import Guide
from runtime.core.resize import resize
from runtime.core.resize import resized as resized_planes
from runtime.device import transfer
from runtime.device.choose import module_of
from runtime.engines.onnx import load_engine
from runtime.engines.output_warnings import OutputWarning
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError
from runtime.prior.names import names_in
from runtime.prior.preprocess import Preprocess, are_sides
from runtime.prior.reading import (
    KIND_NOTES,
    Form,
    contradicts,
    described,
    find_form,
    find_kind,
    kind_named,
    standard,
)


class Engine(Protocol):
    """The part of an engine (``OnnxEngine``, ``TensorRTEngine``) that a prior uses."""

    backend: str
    inputs: list[Port]
    outputs: list[Port]
    metadata: dict[str, str]
    warnings: Any  # a list or deque of OutputWarning

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]: ...

    def gpu_input(self, shape: tuple[int, ...]) -> transfer.Buffer | None:
        """Return memory on the GPU for an input of this shape, or None if the engine owns none."""

    def on_gpu(self, array: Any) -> list[transfer.Buffer]:
        """Run the network on an input on the GPU, and return the outputs on the GPU."""


class NetworkPrior:
    """A frozen segmentation network, and the conversion of pictures to its input.

    The input is (1, 3, h, w) float32 or float16. The output is (1, C, h', w') scores before or
    after soft-max, (1, h', w') labels, or another form that :mod:`runtime.prior.reading` reads. The
    first picture decides the form, and the kind of the values if ``output`` is None.

    Parameters
    ----------
    engine : the network.
    preprocess : makes the input from a picture.
    names : the name of each class, or None. One name is that of the foreground.
    output : "logits", "probabilities" (the soft-max is in the graph) or "labels"; None: the values
        of the first picture decide.
    name : what messages call the network.

    Attributes
    ----------
    gpu : the number of the GPU on which the prior takes uploaded pictures; None: it takes pictures
        on the host.

    Raises
    ------
    BundleError : the network has other inputs.
    """

    def __init__(
        self,
        engine: Engine,
        preprocess: Preprocess,
        *,
        names: list[str] | None = None,
        output: str | None = None,
        name: str = "the prior",
    ) -> None:
        check_input(engine.inputs, name)
        self.engine, self.preprocess, self.names = engine, preprocess, two_names(names)
        self.output, self.name, self.backend = output, name, engine.backend
        half = engine.inputs[0].dtype == "tensor(float16)"  # made on the host
        self.gpu: int | None = None if half else getattr(engine, "gpu", None)
        self._form: Form | None = None
        self._guessed = False  # whether values, and no statement, decided ``output``

    @classmethod
    def from_onnx(
        cls,
        path: str | os.PathLike[str],
        *,
        imgsz: int | tuple[int, int] | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> NetworkPrior:
        """Load an .onnx file. Its metadata_props describe the input and the output.

        These are the keys that :meth:`Preprocess.from_metadata` reads; ``classes`` or ``names``,
        which :func:`runtime.prior.names.names_in` reads; and ``output``, which
        :func:`runtime.prior.reading.kind_named` reads.

        Parameters
        ----------
        imgsz : input size instead of the metadata's: (height, width), or the long side.
        threads, device : as for :class:`runtime.OnnxEngine`.

        Raises
        ------
        BundleError : the file is no ONNX model, or its inputs or metadata do not fit.
        InputError : the file or the GPU does not exist, or the network does not allow ``imgsz``.
        MissingBackend, DeviceError : as for :class:`runtime.OnnxEngine`.
        """
        engine, name = load_engine(path, threads=threads, device=device), Path(path).name
        check_input(engine.inputs, name)
        fixed = fixed_size(engine.inputs[0])
        preprocess = Preprocess.from_metadata(engine.metadata, name, fixed)
        if imgsz is not None:
            preprocess = with_input_size(preprocess, imgsz, fixed, name)
        names = names_of(engine.metadata, name)
        return cls(
            engine, preprocess, names=names, output=kind_of(engine.metadata, name), name=name
        )

    def __call__(self, picture: Any, low: Any) -> np.ndarray | Guide:
        """Return the guide of one picture.

        Parameters
        ----------
        picture : (H, W, 3) uint8 RGB on the host; or, if ``gpu`` is a number, the result of
            :func:`runtime.device.transfer.upload` on that GPU.
        low : the picture at working size. Only its shape is used, and only for a picture on a GPU.

        Returns
        -------
        (h', w', C) float32 probabilities or (h', w') int32 labels on the host, at the size of the
        network's output. For a picture on the GPU it is a Guide of probabilities on that GPU, at
        working size; but what is not (1, C, h', w') float32 scores of several classes, and the
        outputs that decide their kind, are copied to the host and returned as above.

        Raises
        ------
        BundleError : the output has another form than ``output`` says, or is not finite.
        InputError : the network's input would have too many pixels.
        DeviceError : the device fails, or its memory is full.
        """
        if on_gpu(picture):
            return self._guide_on_gpu(picture, low.shape[:2])
        x = self.preprocess(picture)
        return self._guide(self.engine(x), x.shape[2:])

    def _guide_on_gpu(self, picture: Any, size: tuple[int, int]) -> np.ndarray | Guide:
        """Return the guide of an uploaded picture. Preprocessing, network and soft-max run on the
        picture's GPU."""
        assert self.gpu is not None
        p, engine = self.preprocess, self.engine
        own = p.size(*picture.shape[:2])
        to = engine.gpu_input((1, 3, *own))
        x = network_input(picture, own, p.mean, p.std, p.color == "bgr", to)
        outputs = engine.on_gpu(x)
        form = self._find_form(outputs, own)
        out = outputs[form.output]
        scores = form.plain and out.dtype == np.float32 and len(out.shape) == 4
        if self.output is None or not scores:
            return self._to_guide(form.planes(out.numpy(), self.name))
        self._check_names(out.shape[1])
        guide = soft_guide(out, self.output != "probabilities", self.gpu)
        if not np.isfinite(classes_cuda.shares(guide)).all():
            return self._to_guide(out.numpy()[0])  # says what is wrong, or changes the decision
        note = getattr(engine, "one_class", None)
        if note is not None and out.shape[2] * out.shape[3] > 1:
            if len(classes_cuda.winners(guide)) == 1:
                note()
        return Guide(resized_planes(guide, size))

    def guide(self, out: np.ndarray) -> np.ndarray:
        """Convert an output of the network to a guide: (h', w', C) float32 probabilities or
        (h', w') int32 labels.

        Parameters
        ----------
        out : (1, C, h', w') scores or (1, h', w') labels.

        Raises
        ------
        BundleError : another shape or dtype, NaN or infinity, another number of classes than
            ``names``, or values that are not what the prior's ``output`` says.
        """
        form = find_form(described([""], [out]), out.shape[-2:], name=self.name)
        return self._to_guide(form.planes(out, self.name))

    def _guide(self, outputs: list[np.ndarray], own: tuple[int, int]) -> np.ndarray:
        """Convert the network's outputs on the host to a guide. ``own`` is (h, w) of its input."""
        form = self._find_form(outputs, own)
        return self._to_guide(form.planes(outputs[form.output], self.name))

    def _find_form(self, outputs: list[Any], own: tuple[int, int]) -> Form:
        """Return the form of the outputs, which the first picture decides."""
        if self._form is None:
            self._form = find_form(
                described([port.name for port in self.engine.outputs], outputs),
                own,
                name=self.name,
                names=self.names,
                kind=self.output,
                chosen=self.engine.metadata.get("output_name"),
            )
            if self._form.note:
                self._note(self._form.note)
        return self._form

    def _to_guide(self, planes: np.ndarray) -> np.ndarray:
        """Convert (C, h', w') values of the network to a guide."""
        kind = self.output or self._decide(planes)
        if self._guessed and kind is not None and contradicts(planes, kind):
            self._note(f"the output has values that are no {kind}; from now on it is logits")
            self.output = kind = "logits"
        values = standard(planes, kind, name=self.name)
        if values.ndim == 2:
            return values
        self._check_names(len(values))
        if kind == "logits":
            values = np.exp(values - values.max(0))
        return np.ascontiguousarray((values / values.sum(0)).transpose(1, 2, 0))

    def _decide(self, planes: np.ndarray) -> str | None:
        """Return the kind of the values (C, h', w'). From now on it is ``output``, unless these
        values leave it open, until later values contradict it."""
        self.output, self._guessed = find_kind([planes], name=self.name), True
        note = KIND_NOTES.get((self.output or "", len(planes) > 1))
        if note and planes.dtype.kind == "f":
            self._note(note)
        return self.output

    def _note(self, message: str) -> None:
        """Add a warning to the result of the picture that is computed now."""
        self.engine.warnings.append(OutputWarning(self.name, message))

    def _check_names(self, classes: int) -> None:
        if self.names is not None and len(self.names) != classes:
            raise BundleError(
                f"{self.name} returned {classes} classes, but has {len(self.names)} names: "
                + ", ".join(self.names)[:200],
                fix="name each class once: metadata 'classes' of an .onnx file",
            )


def as_probabilities(guide: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a guide to (height, width).

    Probabilities are averaged or interpolated. Labels that have this size are returned as int32
    labels. Labels of another size become probabilities: the share of each class in a pixel, so that
    unknown pixels lower the sum of a pixel.
    """
    if guide.ndim == 3:
        return resize(np.ascontiguousarray(guide, np.float32), height, width)
    if guide.shape == (height, width):
        return np.ascontiguousarray(guide, np.int32)
    out = np.zeros((height, width, int(guide.max()) + 1), np.float32)
    for k in np.unique(guide[guide >= 0]):  # one class at a time, to save memory
        out[..., k] = resize((guide == k).astype(np.float32)[..., None], height, width)[..., 0]
    return out


def with_input_size(
    preprocess: Preprocess, imgsz: Any, fixed: tuple[int, int] | None, name: str
) -> Preprocess:
    """Return ``preprocess`` with the user's input size ``imgsz``: (height, width) or the long side.
    ``fixed`` is the (height, width) of a network that has only this size, else None.

    Raises
    ------
    InputError : a size that the network does not allow.
    """
    check_imgsz(imgsz)
    imgsz = as_numbers(imgsz)
    if fixed is not None:
        if imgsz not in (fixed, max(fixed)):
            raise InputError(f"imgsz is {imgsz}, but {name} has a fixed input of {fixed}")
        return preprocess
    if not isinstance(imgsz, tuple):
        return replace(preprocess, resize="long_side", long_side=imgsz, height=None, width=None)
    if any(n % preprocess.multiple or n < preprocess.minimum for n in imgsz):
        raise InputError(
            f"imgsz is {imgsz}; {name} wants multiples of {preprocess.multiple}, "
            f"at least {preprocess.minimum}"
        )
    return replace(preprocess, resize="stretch", height=imgsz[0], width=imgsz[1])


def fixed_size(port: Port) -> tuple[int, int] | None:
    """Return (height, width) of an NCHW input, or None if one of them is not fixed."""
    height, width = port.shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def check_imgsz(imgsz: Any) -> None:
    """Check an input size: (height, width) or the long side, in pixels.

    Raises
    ------
    InputError : ``imgsz`` is neither of these, or a side is out of range.
    """
    imgsz = as_numbers(imgsz)
    sides = list(imgsz) if isinstance(imgsz, tuple) else [imgsz]
    if (isinstance(imgsz, tuple) and len(sides) != 2) or not are_sides(sides):
        raise InputError(f"imgsz is {shown_value(imgsz)}; wanted (height, width) or the long side")


def check_input(inputs: list[Port], name: str) -> None:
    """Check that a network has one input, (1, 3, h, w) float32 or float16.

    Parameters
    ----------
    inputs : of the network.
    name : what messages call the network.

    Raises
    ------
    BundleError : the network has other inputs.
    """
    came = ", ".join(f"{p.name} {p.shape} {p.dtype}" for p in inputs)
    shape = inputs[0].shape if inputs else ()
    floats = ("tensor(float)", "tensor(float16)")
    fits = len(inputs) == 1 and len(shape) == 4 and inputs[0].dtype in floats
    last = fits and shape[3] == 3 != shape[1]  # (1, h, w, 3)
    if (
        not fits
        or last
        or any(
            isinstance(n, int) and n != wanted for n, wanted in zip(shape[:2], (1, 3), strict=True)
        )
    ):
        fix = "export it again with one input: the picture, batch 1, three planes, float32"
        if last:
            fix = "convert it with channels first: tf2onnx has --inputs-as-nchw INPUT"
        elif 0 in shape:
            fix = f"0 stands for a free size; python -m export --model {name} mends it"
        elif fits and shape[1] == 3:
            fix = "export it again with batch 1, or with a free batch"
        raise BundleError(f"{name} wants inputs {came}; wanted one (1, 3, h, w) float32", fix=fix)


def two_names(names: list[str] | None) -> list[str] | None:
    """Return the names of the classes. One name is that of the foreground: a background is added,
    because no picture can be divided into one class."""
    return ["background", *names] if names is not None and len(names) == 1 else names


def names_of(metadata: Mapping[str, str], file: str) -> list[str] | None:
    """Return the names of the classes in the metadata_props ``classes`` or ``names`` of an .onnx
    file, or None if it has neither. ``file`` is the file's name in messages.

    Raises
    ------
    BundleError : the text is not what :func:`runtime.prior.names.names_in` reads.
    """
    for key in ("classes", "names"):
        if key in metadata:
            try:
                return two_names(names_in(metadata[key], f"{file}: metadata {key!r}"))
            except InputError as error:
                raise BundleError(error.message, fix=error.fix) from error
    return None


def kind_of(metadata: Mapping[str, str], file: str) -> str | None:
    """Return the kind of output that the metadata_props ``output`` of an .onnx file names, or None
    if the file does not have that key. ``file`` is the file's name in messages.

    Raises
    ------
    BundleError : the text names no kind of output.
    """
    text = metadata.get("output")
    return None if text is None else kind_named(text, f"{file}: metadata 'output'")


def network_input(
    picture: Any,
    size: tuple[int, int],
    mean: Any,
    std: Any,
    bgr: bool,
    to: transfer.Buffer | None = None,
) -> Any:
    """Compute the network's input from an uploaded picture, on its GPU.

    Returns (1, 3, h, w) float32, where (h, w) is ``size``, with the values that
    :class:`runtime.prior.preprocess.Preprocess` computes. If ``to`` is not None, the result is
    written to that memory.
    """
    return transfer.module_of_array(picture).network_input(
        picture, *size, mean, std, bgr, to, device=picture.device
    )


def soft_guide(scores: Any, exponents: bool, index: int) -> Any:
    """Compute (h, w, C) probabilities on GPU ``index`` from scores (1, C, h, w) float32: their
    soft-max if ``exponents``, else the scores, which are probabilities already, scaled to sum 1. A
    pixel becomes NaN if its scores are not finite, or are no probabilities without ``exponents``.
    """
    return module_of(f"cuda:{index}").soft_guide(scores, exponents, device=index)
