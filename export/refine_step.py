"""The refinement as ONNX graphs: one step with its gradient and SGD update, and the final map.

The graphs follow the rules of runtime/core/reference.py node by node. They have opset 18 and
standard operators only, so that ONNX Runtime and TensorRT both take them. Maps are (1, C, H, W).
Sums over pixels are computed along W first and then along H: ONNX Runtime is a hundred times less
exact when it reduces both at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from export.onnx_graph import FAR, FLOAT, INT32, INT64, Graph, Value
from runtime.checks import check_count
from runtime.core import parameters
from runtime.core.constants import (
    LEAST_AREA,
    LEAST_BALANCED,
    LEAST_DEVIATION,
    NEVER,
    NORM_EPS,
    PAIR_NEIGHBOURS,
    RUNNING_SHARE,
    SMALLEST_PRIOR,
    SPATIAL_NEIGHBOURS,
)
from runtime.core.options import RefineOptions
from runtime.errors import InputError

if TYPE_CHECKING:
    import onnx


class _Picture:
    """The inputs that both graphs share, and the picture's size as tensors.

    Attributes
    ----------
    plane, map : the shapes (1, 1, H, W) and (1, -1, H, W) for operators that take a shape.
    size : (H, W) as floats.
    n : the number of pixels as a float.
    """

    def __init__(
        self,
        g: Graph,
        options: RefineOptions,
        classes: int | None,
        height: int | None,
        width: int | None,
        guided: bool,
    ) -> None:
        self.dims = (height or "height", width or "width")
        self.classes = classes or "classes"
        self.image = g.input("image", FLOAT, (1, 3, *self.dims))
        self.guide = None
        if guided:
            self.guide = g.input("guide", FLOAT, (1, self.classes, *self.dims))
        if height and width:
            self.plane = g.constant((1, 1, height, width))
            self.map = g.constant((1, -1, height, width))
            self.size = g.constant(np.array([height, width], np.float32))
            self.n = g.constant(float(height * width))
            return
        size = g.op("Slice", g.op("Shape", self.image), (2,), (4,), (0,))
        self.plane = g.op("Concat", (1, 1), size, axis=0)
        self.map = g.op("Concat", (1, -1), size, axis=0)
        self.size = g.op("Cast", size, to=FLOAT)
        self.n = g.op("ReduceProd", self.size, (0,), keepdims=0)

    def pairs(self, g: Graph, offsets: Sequence[tuple[int, int]]) -> Value:
        """(D,): how many pixels have a neighbour at each offset."""
        reach = np.array([(abs(dy), abs(dx)) for dy, dx in offsets], np.float32)
        left = g.op("Max", self.size - reach, 0.0)
        return g.op("ReduceProd", left, (1,), keepdims=0)


class _Network:
    """Forward and backward pass, as in runtime/core/reference.py.

    Attributes
    ----------
    names : the suffixes of the 3x3 convolutions and their batch norms: "1", "2.0", ...
    statistics, norms : of each batch norm, by name: mean and variance of the map; centred map,
        1 / deviation, and scale. The backward pass needs them.
    inputs, active : by suffix, the input of each convolution and the output of each ReLU.
    """

    def __init__(
        self,
        g: Graph,
        picture: _Picture,
        options: RefineOptions,
        shapes: Mapping[str, tuple],
        flat: Value,
        classes: int | None,
    ) -> None:
        self.g, self.picture, self.options, self.shapes = g, picture, options, shapes
        self.w = self._unpack(flat, classes)
        self.names = ["1", *(f"2.{i}" for i in range(options.blocks - 1))]
        self.statistics: dict[str, tuple[Value, Value]] = {}
        self.norms: dict[str, tuple[Value, Value, Value]] = {}
        self.inputs: dict[str, Value] = {}
        self.active: dict[str, Value] = {}

    def _unpack(self, flat: Value, classes: int | None) -> dict[str, Value]:
        """The named tensors in the flat vector. If ``classes`` is None, the last two, conv3's
        weight and bias, have a free size."""
        g = self.g
        sizes = [int(np.prod(s)) for s in self.shapes.values()]
        if classes is None:  # the vector ends with conv3: (classes, channels), then (classes,)
            channels = self.shapes["conv3.weight"][1]
            fixed = sum(sizes[:-2])
            parts = g.split(g.op("Slice", flat, (0,), (fixed,), (0,)), sizes[:-2])
            # These rows only divide the elements in the ratio channels : 1.
            rows = g.reshape(g.op("Slice", flat, (fixed,), (FAR,), (0,)), channels + 1, -1)
            parts += g.split(rows, (channels, 1))
        else:
            parts = g.split(flat, sizes)
        out = {}
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            if name.startswith("bn"):
                part = g.reshape(part, 1, -1, 1, 1)
            elif name.startswith("conv3"):  # a matrix and a column
                part = g.reshape(part, -1, shape[1] if len(shape) == 4 else 1)
            elif len(shape) == 4:
                part = g.reshape(part, *shape)
            out[name] = part
        return out

    def _conv(self, x: Value, name: str) -> Value:
        """The 3x3 convolution ``name`` of a map."""
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return self.g.op("Conv", x, weight, bias, kernel_shape=[3, 3], pads=[1] * 4)

    def _norm(self, x: Value, name: str, running: Mapping[str, Any] | None) -> Value:
        """The batch norm ``name`` of a map; ``running`` None means by the map's own statistics."""
        g = self.g
        if running is None:
            mean = g.mean(x)
            centred = x - mean
            var = g.mean(centred * centred)
        else:
            mean, var = running[f"{name}.running_mean"], running[f"{name}.running_var"]
            centred = x - mean
        self.statistics[name] = (mean, var)
        inverse = 1.0 / g.op("Sqrt", g.op("Add", var, NORM_EPS))
        scale = self.w[f"{name}.weight"] * inverse
        self.norms[name] = (centred, inverse, scale)
        return centred * scale + self.w[f"{name}.bias"]

    def forward(self, x: Value, running: Mapping[str, Any] | None = None) -> Value:
        """(1, K, H, W), the output of the last layer. ``running`` is as for ``_norm``."""
        g, o = self.g, self.options
        h, first = x, None
        for n in self.names:
            self.inputs[n] = h
            z = self._conv(h, f"conv{n}")
            first = first or z
            self.active[n] = g.op("Relu", z)
            h = self._norm(self.active[n], f"bn{n}", running)
        if o.skip != "none":
            h = h + (first if o.skip == "shared" else self._conv(x, "skip"))
        self.inputs["3"] = h
        # The 1x1 convolution is a matrix product: TensorRT convolves fixed channel numbers only.
        columns = g.op("Flatten", h, axis=2)
        r = g.op("Gemm", self.w["conv3.weight"], columns, self.w["conv3.bias"])
        r = g.op("Reshape", r, self.picture.map)
        return r if o.final_bn == "none" else self._norm(r, "bn3", running)

    def backward(self, dr: Value) -> Value:
        """The gradient of the flat weights, from ``dr``, that of the response map."""
        g, o = self.g, self.options
        gradient: dict[str, Value] = {}
        if o.final_bn != "none":
            dr = self._norm_backward(dr, "bn3", gradient)
        self._conv_gradient(dr, "conv3", self.inputs["3"], gradient)
        d = g.op("Gemm", self.w["conv3.weight"], g.op("Flatten", dr, axis=2), transA=1)
        d = d_top = g.op("Reshape", d, self.picture.map)
        if o.skip == "own":
            self._conv_gradient(d_top, "skip", self.inputs["1"], gradient)
        for n in reversed(self.names):
            d = self._norm_backward(d, f"bn{n}", gradient) * g.op("Sign", self.active[n])
            if n == "1":
                # The shared skip is the same convolution, so that the two gradients are added.
                d = d + d_top if o.skip == "shared" else d
                self._conv_gradient(d, "conv1", self.inputs["1"], gradient)
                break
            self._conv_gradient(d, f"conv{n}", self.inputs[n], gradient)
            weight = self.w[f"conv{n}.weight"]
            turned = g.op("Slice", weight, (-1, -1), (-FAR, -FAR), (2, 3), (-1, -1))
            turned = g.op("Transpose", turned, perm=[1, 0, 2, 3])
            d = g.op("Conv", d, turned, kernel_shape=[3, 3], pads=[1] * 4)
        flat = [g.reshape(gradient[name], -1) for name in self.shapes]
        return g.op("Concat", *flat, axis=0)

    def _norm_backward(self, dy: Value, name: str, gradient: dict[str, Value]) -> Value:
        """The gradient of a batch norm's input, from ``dy``, that of its output. Adds its weight
        and bias gradient to ``gradient``."""
        g = self.g
        centred, inverse, scale = self.norms[name]
        shift, slope = g.mean(dy), g.mean(dy * centred)
        gradient[f"{name}.bias"] = shift * self.picture.n
        gradient[f"{name}.weight"] = slope * inverse * self.picture.n
        return (dy - shift - centred * (slope * inverse * inverse)) * scale

    def _conv_gradient(self, dz: Value, name: str, x: Value, gradient: dict[str, Value]) -> None:
        """Add a convolution's weight and bias gradient to ``gradient``, from ``dz``, that of its
        output. A 3x3 weight's is a matrix product with the nine shifted inputs."""
        g = self.g
        gradient[f"{name}.bias"] = g.sum(dz)
        rows = g.op("Flatten", dz, axis=2)
        if name == "conv3":
            columns = g.op("Flatten", x, axis=2)
            gradient["conv3.weight"] = g.op("Gemm", rows, columns, transB=1)
            return
        n_out, n_in = self.shapes[f"{name}.weight"][:2]
        if x.name not in g.patches:
            padded = g.pad(x, 1)
            shifts = [g.shifted(padded, 1, i - 1, j - 1) for i in range(3) for j in range(3)]
            if n_in < 16:  # one product for all nine shifts, because each has few channels
                shifts = [g.op("Concat", *shifts, axis=1)]
            g.patches[x.name] = [g.op("Flatten", s, axis=2) for s in shifts]
        parts = [g.op("Gemm", rows, s, transB=1) for s in g.patches[x.name]]
        taps = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=1)
        by_tap = g.reshape(taps, n_out, 9, n_in)
        gradient[f"{name}.weight"] = g.op("Transpose", by_tap, perm=[0, 2, 1])


def _residual_input(g: Graph, p: _Picture) -> Value:
    """(1, 5, H, W): standardised RGB, and x and y in [-1, 1]."""
    centred = p.image - g.mean(p.image)
    deviation = g.op("Max", g.op("Sqrt", g.mean(centred * centred)), LEAST_DEVIATION)

    def coordinate(axis: int) -> Value:
        length = g.op("Slice", p.plane, (axis,), (axis + 1,), (0,))
        last = g.op("Cast", length, to=FLOAT) - 1.0
        index = g.op("Range", 0, g.op("Squeeze", length, (0,)), 1)
        line = g.op("Cast", index, to=FLOAT) * 2.0 / g.op("Max", last, 1.0)
        line = line - g.op("Min", last, 1.0)  # 0 for a single pixel
        line = g.reshape(line, *((1, 1, 1, -1) if axis == 3 else (1, 1, -1, 1)))
        return g.op("Expand", line, p.plane)

    return g.op("Concat", centred / deviation, coordinate(3), coordinate(2), axis=1)


def _response(
    g: Graph, p: _Picture, net: _Network, running: Mapping[str, Value] | None = None
) -> Value:
    """The response map. For the residual objective it is the logarithm of the guide plus the
    network's output; for the others it is the network's output."""
    if not parameters.objective_of(net.options).channels_follow_classes:
        return net.forward(p.image, running)
    assert p.guide is not None
    # A class whose guide is 0 everywhere takes no part, so that an engine for more classes can be
    # used for fewer.
    absent = 1.0 - g.op("Sign", g.over_pixels("ReduceMax", p.guide))
    net.w["conv3.bias"] = net.w["conv3.bias"] + g.reshape(absent, -1, 1) * NEVER
    correction = net.forward(_residual_input(g, p), running)
    return correction + g.op("Log", g.op("Max", p.guide, SMALLEST_PRIOR))


def _exponentials(g: Graph, r: Value) -> tuple[Value, Value, Value]:
    """r minus its largest channel; its exponential; and the exponential's sum over channels."""
    t = r - g.over_channels("ReduceMax", r)
    e = g.op("Exp", t)
    return t, e, g.over_channels("ReduceSum", e)


def _count(g: Graph, present: Value) -> Value:
    """(1,), the number of labels in use, which are 1 in ``present`` while the others are 0. It is
    also the output ``clusters``."""
    count = g.op("ReduceSum", g.reshape(present, -1), (0,), keepdims=1)
    g.op("Cast", count, to=INT64, name="clusters")
    g.output("clusters", INT64, (1,))
    return count


def _affinities(
    g: Graph, p: _Picture, options: RefineOptions, offsets: Sequence[tuple[int, int]]
) -> Value:
    """(1, D, H, W): affinity to the neighbour at each offset; 0 for pixels without this neighbour.
    It is divided by the number of pairs of the offset and by the number of offsets."""
    border = max(options.offsets)
    # The border has a colour so far from any other that its affinity is exactly 0.
    padded = g.pad(p.image, border, 2.0 + 100 * options.sigma)
    squares = []
    for dy, dx in offsets:
        difference = g.shifted(padded, border, dy, dx) - p.image
        squares.append(g.over_channels("ReduceSum", difference * difference))
    square = g.op("Concat", *squares, axis=1)
    e = g.op("Exp", square * (-0.5 / options.sigma**2))
    pairs = g.op("Max", p.pairs(g, offsets), 1.0) * float(len(offsets))
    return e / g.reshape(pairs, 1, -1, 1, 1)


def _residual_losses(g: Graph, p: _Picture, options: RefineOptions, z: Value) -> Value:
    """The gradient of the response map ``z`` by the residual objective (equations 12 and 13). Adds
    the output ``losses`` and, if the options need them, ``labels`` and ``clusters``."""
    q = p.guide
    assert q is not None
    offsets = [(a * s, b * s) for s in options.offsets for a, b in PAIR_NEIGHBOURS]
    border = max(options.offsets)

    area = g.mean(q)
    weight = g.op("Pow", g.op("Max", area, LEAST_AREA), -options.balance)
    balanced = g.over_channels("ReduceSum", weight * area)
    weight = weight / (g.op("Max", balanced, LEAST_BALANCED) * p.n)
    target = q * weight * g.over_channels("ReduceMax", q)
    mass = g.over_channels("ReduceSum", target)

    if options.min_labels or options.silhouette or options.early_stop:
        labels = g.op("ArgMax", z, axis=1, keepdims=1)
        if options.early_stop:
            g.op("Cast", g.op("Squeeze", labels, (1,)), to=INT32, name="labels")
            g.output("labels", INT32, (1, *p.dims))
        index = g.op("Range", 0, g.op("Squeeze", g.op("Slice", g.op("Shape", z), (1,), (2,))), 1)
        own = g.op("Cast", g.op("Equal", labels, g.reshape(index, 1, -1, 1, 1)), to=FLOAT)
        _count(g, g.over_pixels("ReduceMax", own))

    t, e, total = _exponentials(g, z)
    probability = e / total
    affinity = _affinities(g, p, options, offsets)
    forth = g.split(affinity, [1] * len(offsets), axis=1)
    back = g.pad(affinity, border)
    padded = g.pad(probability, border)
    near = None  # sum of affinity * probability of the neighbour, over both signs of each offset
    for i, (dy, dx) in enumerate(offsets):
        starts = (i, border - dy, border - dx)
        ends = (i + 1, *(-d - border if d > -border else FAR for d in (dy, dx)))
        behind = g.op("Slice", back, starts, ends, (1, 2, 3))
        both = (forth[i] * g.shifted(padded, border, dy, dx)) + (
            behind * g.shifted(padded, border, -dy, -dx)
        )
        near = both if near is None else near + both
    assert near is not None
    agreement = g.over_channels("ReduceSum", probability * near)

    # The sum counts each pair twice, from both of its pixels.
    possible = g.reshape(g.sum(g.over_channels("ReduceSum", affinity)), 1)
    pair = possible - g.reshape(g.sum(agreement), 1) * 0.5
    cross_entropy = mass * g.op("Log", total) - g.over_channels("ReduceSum", target * t)
    guide_loss = g.reshape(g.sum(cross_entropy), 1)
    lam = float(options.lam)
    zero = np.zeros(1, np.float32)
    g.op("Concat", guide_loss + pair * lam, zero, pair, guide_loss, axis=0, name="losses")
    return probability * (mass + agreement * lam - near * lam) - target


def _mapped_clusters(g: Graph, options: RefineOptions, assign: Value, present: Value,
                     count: Value) -> Value:  # fmt: skip
    """(G,) the cluster of each class of the guide. ``assign`` is the input of :func:`build_step`;
    ``present`` has 1 for each cluster in use, and ``count`` is their number."""
    if options.mapping == "overlap":
        return assign
    clusters = options.channels or 1
    rank = np.arange(clusters, dtype=np.float32)[:, None]
    running = g.reshape(g.op("CumSum", g.reshape(present, -1), 0), 1, -1)
    # running[c] is how many of the clusters 0 to c are present. The j-th present cluster, counted
    # from 0, is the first c with running[c] > j. So c is how often running is at most j.
    before = g.op("Cast", g.op("LessOrEqual", running, rank), to=INT64)
    table = g.op("ReduceSum", before, (1,), keepdims=0)
    turn = g.op("Mod", assign, g.op("Cast", count, to=INT64))
    return g.op("Gather", table, turn)


def _cluster_losses(g: Graph, p: _Picture, options: RefineOptions, r: Value,
                    assign: Value | None) -> Value:  # fmt: skip
    """The gradient of the response map ``r`` by equations 3 to 8, times the number of pixels. Adds
    the outputs ``losses``, ``clusters`` and, if needed, ``labels`` and ``overlap``."""
    clusters = options.channels or 1
    t, e, total = _exponentials(g, r)
    labels = g.op("ArgMax", r, axis=1, keepdims=0)
    own = g.op("OneHot", labels, clusters, np.array([0, 1], np.float32), axis=1)
    present = g.over_pixels("ReduceMax", own)
    count = _count(g, present)
    if options.early_stop:
        g.op("Cast", labels, to=INT32, name="labels")
        g.output("labels", INT32, (1, *p.dims))

    log_total = g.op("Log", total)
    similarity = g.reshape(g.mean(log_total), 1)  # t is 0 for the label
    pull, target, guided = 1.0 / total, own, None
    if assign is not None:
        assert p.guide is not None
        mass = g.over_channels("ReduceSum", p.guide)
        # A soft guide's loss is the mean over all pixels; that of labels, over the known pixels.
        known = p.n if options.soft_guide else g.op("Max", g.reshape(g.sum(mass), 1), 1.0)
        strength = p.n / known
        cluster = _mapped_clusters(g, options, assign, present, count)
        column = g.op("OneHot", cluster, clusters, np.array([0, 1], np.float32), axis=0)
        columns = g.op("Gemm", column * strength, g.op("Flatten", p.guide, axis=2))
        target = own + g.op("Reshape", columns, p.map)
        pull = (mass * strength + 1.0) / total
        score = g.over_channels("ReduceSum", g.op("Gather", t, cluster, axis=1) * p.guide)
        guided = g.reshape(g.sum(mass * log_total - score) / known, 1)
        if options.mapping == "overlap":
            flat = [g.op("Flatten", m, axis=2) for m in (p.guide, own)]
            g.op("Gemm", *flat, transB=1, name="overlap")
            g.output("overlap", FLOAT, (p.classes, clusters))
    push, spatial = _spatial(g, p, options, r)
    weight = g.constant(np.full(1, options.mu, np.float32))
    if options.weighting != "fixed":
        weight = count / float(options.beta) if options.weighting == "fsf" else weight / count
    everything = similarity + weight * spatial
    if guided is None:
        guided = g.constant(np.zeros(1, np.float32))
    else:
        everything = everything + guided
    g.op("Concat", everything, similarity, spatial, guided, axis=0, name="losses")
    return e * pull - target + push * g.reshape(weight, 1, 1, 1, 1)


def _spatial(g: Graph, p: _Picture, options: RefineOptions, r: Value) -> tuple[Value, Value]:
    """The gradient of the continuity loss by ``r``, times the number of pixels, and the loss; both
    before the loss is weighted."""
    directions = SPATIAL_NEIGHBOURS if options.diagonals else SPATIAL_NEIGHBOURS[:2]
    clusters = options.channels or 1
    inside = g.pad(g.op("Expand", 1.0, p.plane), 1)
    pairs = g.op("Max", p.pairs(g, directions), 1.0) * float(clusters)
    scales = g.split(p.n / pairs, [1] * len(directions))
    padded, push, loss = g.pad(r, 1), None, None
    for (dy, dx), scale in zip(directions, scales, strict=True):
        difference = g.shifted(padded, 1, dy, dx) - r
        if options.continuity == "huber":
            slope = g.op("Clip", difference, -1.0, 1.0)
            value = difference - slope * 0.5
        else:
            slope, value = g.op("Sign", difference), difference
        # The gradients of a pair's two pixels are opposite: the update moves their values closer.
        near = slope * (g.shifted(inside, 1, dy, dx) * scale)
        both = g.shifted(g.pad(near, 1), 1, -dy, -dx) - near
        push = both if push is None else push + both
        part = g.over_channels("ReduceSum", near * value)
        loss = part if loss is None else loss + part
    assert push is not None and loss is not None
    return push, g.reshape(g.sum(loss), 1) / p.n


def build_step(
    options: RefineOptions,
    *,
    classes: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> onnx.ModelProto:
    """One refinement step: forward, losses, backward and SGD update, as one ONNX graph.

    The inputs are float32 unless another type is named. ``image`` (1, 3, H, W) is RGB in [0, 1].
    ``guide`` (1, G, H, W) contains probabilities or one-hot labels, all 0 where nothing is known
    (not for dynaseg). ``assign`` (G,) int64 (for dynaguide) is the cluster of each class for
    mapping "overlap", or its rank among the classes present for "index_modulo". ``parameters``,
    ``momenta`` and ``buffers`` are the state as ``parameters.flatten`` returns it.

    The outputs are the state after the step, as ``parameters_out``, ``momenta_out`` and
    ``buffers_out``, and values of the state before the step: ``losses`` (4,), which are total,
    similarity, spatial or pair, and guide; and, where the options need them, ``clusters`` (1,)
    int64, the number of labels in use; ``labels`` (1, H, W) int32; and ``overlap`` (G, K), the
    number of pixels that each class shares with each label. With the residual objective a class
    whose guide is 0 everywhere takes no part: its score is 0.

    Parameters
    ----------
    options : of the refinement. The number of steps, the seed and the stop rules are not in the
        graph, because the host implements them.
    classes : number of classes of the guide; free when None.
    height, width : size of the picture in pixels; free when None.

    Raises
    ------
    InputError : ``classes``, ``height`` or ``width`` is out of its range.
    """
    _check_dimensions(classes, height, width)
    objective = parameters.objective_of(options)
    clusters = parameters.channel_count(options, classes)
    shapes, buffer_shapes = parameters.shapes(options, clusters or 1)
    g = Graph()
    p = _Picture(g, options, classes, height, width, objective.takes_guide)
    assign = None
    if objective.maps_clusters:
        assign = g.input("assign", INT64, (p.classes,))
    lengths = (_length(shapes) if clusters else "parameters", _length(buffer_shapes))
    weights = g.input("parameters", FLOAT, lengths[:1])
    momenta = g.input("momenta", FLOAT, lengths[:1])
    buffers = g.input("buffers", FLOAT, lengths[1:])

    net = _Network(g, p, options, shapes, weights, clusters)
    r = _response(g, p, net)
    if objective.channels_follow_classes:
        dr = _residual_losses(g, p, options, r)
    else:
        dr = _cluster_losses(g, p, options, r, assign)
    gradient = net.backward(dr)
    if not objective.channels_follow_classes:
        gradient = gradient / p.n
    velocity = g.op("Add", momenta * options.momentum, gradient, name="momenta_out")
    g.op("Sub", weights, velocity * float(options.lr or 0), name="parameters_out")
    g.op(
        "Add",
        buffers * (1 - RUNNING_SHARE),
        _statistics(g, p, net) * RUNNING_SHARE,
        name="buffers_out",
    )
    g.output("parameters_out", FLOAT, lengths[:1])
    g.output("momenta_out", FLOAT, lengths[:1])
    g.output("buffers_out", FLOAT, lengths[1:])
    g.output("losses", FLOAT, (4,))
    return g.model("refine_step", options, f"one {options.objective} refinement step")


def build_map(
    options: RefineOptions,
    *,
    classes: int | None = None,
    height: int | None = None,
    width: int | None = None,
    state: parameters.State | None = None,
) -> onnx.ModelProto:
    """Scores and labels of a refinement network, as an ONNX graph.

    The inputs are ``image``, ``guide`` (residual), ``parameters`` (without ``state``) and
    ``buffers`` (``final_bn`` "running", without ``state``), as in :func:`build_step`. The outputs
    are ``scores`` (1, K, H, W), the soft-max of the response map, and ``labels`` (1, H, W) int32,
    its arg max.

    Parameters
    ----------
    options, classes, height, width : as in :func:`build_step`.
    state : weights to store in the graph; batch norms then use their running statistics. None: the
        weights are an input, and batch norms use the picture's statistics, unless ``final_bn`` is
        "running".

    Raises
    ------
    InputError : a number is out of its range, or the state is that of another network.
    """
    _check_dimensions(classes, height, width)
    objective = parameters.objective_of(options)
    if state is not None and objective.channels_follow_classes:
        rows = len(state["conv3.weight"]) if "conv3.weight" in state else 1
        if classes not in (None, rows):
            raise InputError(
                f"classes is {classes}, but the state has {rows}; wanted the same",
                fix="leave classes out",
            )
        classes = rows
    clusters = parameters.channel_count(options, classes)
    shapes, buffer_shapes = parameters.shapes(options, clusters or 1)
    g = Graph()
    p = _Picture(g, options, classes, height, width, objective.channels_follow_classes)
    running = None
    if state is not None:
        flat = parameters.flatten(options, clusters or 1, state)
        weights, running = g.constant(flat[0]), g.constant(flat[2])
    else:
        length = _length(shapes) if clusters else "parameters"
        weights = g.input("parameters", FLOAT, (length,))
        if options.final_bn == "running":
            running = g.input("buffers", FLOAT, (_length(buffer_shapes),))
    net = _Network(g, p, options, shapes, weights, clusters)
    named = None
    if running is not None:
        parts = g.split(running, [int(np.prod(s)) for s in buffer_shapes.values()])
        columns = [g.reshape(part, 1, -1, 1, 1) for part in parts]
        named = dict(zip(buffer_shapes, columns, strict=True))
    r = _response(g, p, net, named)
    g.op("Softmax", r, axis=1, name="scores")
    g.op("Cast", g.op("ArgMax", r, axis=1, keepdims=0), to=INT32, name="labels")
    g.output("scores", FLOAT, (1, clusters or "classes", *p.dims))
    g.output("labels", INT32, (1, *p.dims))
    return g.model("refine_map", options, f"the map of a {options.objective} refinement network")


def _check_dimensions(classes: int | None, height: int | None, width: int | None) -> None:
    """InputError for a number that is out of its range."""
    for name, value, most in (
        ("classes", classes, 4096),
        ("height", height, 2**20),
        ("width", width, 2**20),
    ):
        if value is not None:
            check_count(name, value, 1, most)


def _length(shapes: Mapping[str, tuple]) -> int:
    """The number of elements of all these shapes."""
    return sum(int(np.prod(s)) for s in shapes.values())


def _statistics(g: Graph, p: _Picture, net: _Network) -> Value:
    """The batch norms' means and unbiased variances on this picture, in the order of the
    buffers."""
    unbiased = p.n / g.op("Max", p.n - 1.0, 1.0)
    flat = []
    for mean, var in net.statistics.values():
        flat += [g.reshape(mean, -1), g.reshape(var * unbiased, -1)]
    return g.op("Concat", *flat, axis=0)
