"""The specification of the native functions in NumPy: for any float dtype, clear and slow.

A native function of the same name computes the same values; its arguments for speed (threads, isa)
and its layout of the guided filter's coefficients differ. Maps are (H, W, C); weights are PyTorch's
(out, in, kh, kw). A gradient is named d plus the name of its variable: dr is the gradient of the
losses by r. Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.core.constants import (
    CHECK_EVERY,
    CHECKS,
    LEAST_AREA,
    LEAST_BALANCED,
    LEAST_DEVIATION,
    LOSS_CHANGE,
    MAPPING_STEPS,
    NORM_EPS,
    PAIR_NEIGHBOURS,
    RUNNING_SHARE,
    SMALLEST_PRIOR,
    SPATIAL_NEIGHBOURS,
)
from runtime.core.options import RefineOptions
from runtime.core.parameters import objective_of

Array = np.ndarray


def _shifted(x: Array, dy: int, dx: int) -> Array:
    """Shift a map: the result at row i, column j is x at row i + dy, column j + dx, or zero outside
    the map."""
    h, w = x.shape[:2]
    out = np.zeros_like(x)
    if abs(dy) < h and abs(dx) < w:
        here, there = neighbours((h, w), dy, dx)
        out[here] = x[there]
    return out


def neighbours(
    shape: tuple[int, ...], dy: int, dx: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return two indices of a map: of all pixels n that have a neighbour n + (dy, dx), and of these
    neighbours."""
    h, w = shape[:2]
    ys, yt = slice(max(-dy, 0), h - max(dy, 0)), slice(max(dy, 0), h - max(-dy, 0))
    xs, xt = slice(max(-dx, 0), w - max(dx, 0)), slice(max(dx, 0), w - max(-dx, 0))
    if abs(dy) >= h or abs(dx) >= w:
        return (slice(0), slice(0)), (slice(0), slice(0))
    return (ys, xs), (yt, xt)


# --- layers ------------------------------------------------------------------------------------


def conv(x: Array, weight: Array, bias: Array, relu: bool = False) -> Array:
    """Convolution with stride 1, zero padding and kernel 1 or 3, then ReLU if ``relu``."""
    r = weight.shape[2] // 2
    y = sum(
        _shifted(x, i - r, j - r) @ weight[:, :, i, j].T
        for i in range(2 * r + 1)
        for j in range(2 * r + 1)
    )
    y = y + bias
    return np.maximum(y, 0) if relu else y


def conv_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients by x, weight and bias."""
    r = weight.shape[2] // 2
    dx = np.zeros_like(x)
    dw = np.zeros_like(weight)
    for i in range(2 * r + 1):
        for j in range(2 * r + 1):
            dx += _shifted(dy, r - i, r - j) @ weight[:, :, i, j]
            dw[:, :, i, j] = np.einsum("hwo,hwi->oi", dy, _shifted(x, i - r, j - r))
    return dx, dw, dy.sum((0, 1))


def batch_norm(x: Array, gamma: Array, beta: Array, statistics: Any = None) -> tuple[Array, Any]:
    """Batch norm of one picture, and the (mean, variance) that it used: ``statistics``, or those of
    the picture if None."""
    mean, var = statistics if statistics is not None else (x.mean((0, 1)), x.var((0, 1)))
    xhat = (x - mean) / np.sqrt(var + x.dtype.type(NORM_EPS))
    return xhat * gamma + beta, (mean, var)


def batch_norm_backward(dy: Array, x: Array, gamma: Array) -> tuple[Array, Array, Array]:
    """Gradients by x, gamma and beta."""
    inv = 1 / np.sqrt(x.var((0, 1)) + x.dtype.type(NORM_EPS))
    xhat = (x - x.mean((0, 1))) * inv
    dgamma, dbeta = (dy * xhat).sum((0, 1)), dy.sum((0, 1))
    n = x.shape[0] * x.shape[1]
    return gamma * inv * (dy - dbeta / n - xhat * dgamma / n), dgamma, dbeta


def softmax(r: Array) -> tuple[Array, Array, Array]:
    """Probabilities, log-sum-exp and labels of a score map."""
    top = r.max(-1, keepdims=True)
    e = np.exp(r - top)
    total = e.sum(-1, keepdims=True)
    return e / total, (top + np.log(total))[..., 0], r.argmax(-1).astype(np.int32)


# --- losses ------------------------------------------------------------------------------------


def cluster_loss(
    r: Array, labels: Array, guide: Array | None, table: Array, self_weight: float,
    guide_weight: float,
) -> tuple[Array, float, float]:  # fmt: skip
    """Equations 3 and 8: cross-entropy to the map's own labels and to the mapped guide.

    ``table`` is the cluster of each class of the guide. Returns dr, which contains the weights, and
    the two sums over pixels, without the weights.
    """
    p, lse, _ = softmax(r)
    own = np.eye(r.shape[2], dtype=r.dtype)[labels]
    target = np.zeros_like(r)
    if guide is not None:
        if guide.ndim == 2:
            rows, columns = np.nonzero(guide >= 0)
            target[rows, columns, table[guide[rows, columns]]] = 1
        else:
            for k in range(guide.shape[2]):
                target[..., table[k]] += guide[..., k].astype(r.dtype)
    mass = target.sum(-1, keepdims=True)
    dr = self_weight * (p - own) + guide_weight * (mass * p - target)
    log_p = r - lse[..., None]
    return dr, float(-(own * log_p).sum()), float(-(target * log_p).sum())


def spatial_loss(r: Array, weight: float, scale: Array, huber: bool) -> tuple[Array, float]:
    """Equations 4 to 7: the sum over directions of scale * sum of h(difference).

    Returns dr, which contains ``weight``, and the sum, without ``weight``.
    """
    dr, loss = np.zeros_like(r), 0.0
    for (dy, dx), s in zip(SPATIAL_NEIGHBOURS, scale, strict=True):
        here, there = neighbours(r.shape, dy, dx)
        d = r[there] - r[here]
        if s == 0 or d.size == 0:
            continue
        a = np.abs(d)
        value = np.where(a < 1, 0.5 * d * d, a - 0.5) if huber else a
        slope = np.clip(d, -1, 1) if huber else np.sign(d)
        loss += float(value.sum()) * float(s)
        dr[there] += weight * s * slope
        dr[here] -= weight * s * slope
    return dr, loss


def affinity(image: Array, offsets: Array, sigma: float) -> Array:
    """exp(-|I_n - I_n+d|^2 / (2 sigma^2)) for each offset d, 0 where n + d is outside."""
    out = np.zeros((len(offsets), *image.shape[:2]), image.dtype)
    for plane, (dy, dx) in zip(out, offsets, strict=True):
        here, there = neighbours(image.shape, int(dy), int(dx))
        square = ((image[there] - image[here]) ** 2).sum(-1)
        plane[here] = np.exp(-square / (2 * sigma * sigma))
    return out


def residual_loss(
    z: Array, q: Array, confidence: Array, class_weight: Array, affinity: Array, offsets: Array,
    lam: float,
) -> tuple[Array, float, float]:  # fmt: skip
    """Equations 12 and 13. Each plane of ``affinity`` is already divided by its number of pairs and
    by the number of planes. Returns dz, which contains ``lam``, guide loss, and pair loss without
    ``lam``."""
    p, lse, _ = softmax(z)
    n = z.shape[0] * z.shape[1]
    target = class_weight * q * confidence[..., None] / n
    guide = float((target * (lse[..., None] - z)).sum())
    dp, loss = np.zeros_like(p), 0.0
    for e, (dy, dx) in zip(affinity, offsets, strict=True):
        here, there = neighbours(z.shape, int(dy), int(dx))
        e = e[here][..., None]
        loss += float((e * (1 - (p[here] * p[there]).sum(-1, keepdims=True))).sum())
        dp[here] -= e * p[there]
        dp[there] -= e * p[here]
    dz = target.sum(-1, keepdims=True) * p - target
    return dz + lam * p * (dp - (dp * p).sum(-1, keepdims=True)), guide, loss


def sgd_step(w: Array, v: Array, dw: Array, lr: float, momentum: float) -> tuple[Array, Array]:
    """One SGD step with momentum (equation 9): the new w and v."""
    v = v.dtype.type(momentum) * v + dw
    return w - w.dtype.type(lr) * v, v


# --- mappings ----------------------------------------------------------------------------------


def assign(cost: Array) -> Array:
    """Column of each row in the one-to-one assignment of least total cost (rows <= columns), by the
    Hungarian method with potentials u and v."""
    rows, columns = cost.shape
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, int)
    for r in range(1, rows + 1):
        row_of[0], j = r, 0
        least, used = np.full(columns + 1, np.inf), np.zeros(columns + 1, bool)
        came = np.zeros(columns + 1, int)
        while True:
            used[j] = True
            i = row_of[j]
            reduced = np.full(columns + 1, np.inf)
            reduced[1:] = cost[i - 1] - u[i] - v[1:]
            better = ~used & (reduced < least)
            least[better], came[better] = reduced[better], j
            j = int(np.argmin(np.where(used, np.inf, least)))
            delta = least[j]
            u[row_of[used]] += delta
            v[used] -= delta
            least[~used] -= delta
            if row_of[j] == 0:
                break
        while j:
            row_of[j], j = row_of[came[j]], came[j]
    out = np.zeros(rows, np.int32)
    for k in range(1, columns + 1):
        if row_of[k]:
            out[row_of[k] - 1] = k - 1
    return out


def overlap_mapping(guide: Array, labels: Array, classes: int, clusters: int) -> Array:
    """Class -> cluster by :func:`largest_overlap` of the guide with the labels."""
    one_hot = np.eye(clusters)[labels]
    soft = guide if guide.ndim == 3 else np.eye(classes + 1)[guide][..., :classes]
    return largest_overlap(np.einsum("hwc,hwk->ck", soft.astype(np.float64), one_hot))


def largest_overlap(area: Array, solve: Callable[[Array], Array] = assign) -> Array:
    """Row -> column, one to one, so that the sum of the areas is largest. If there are more rows
    than columns, each remaining row gets the column of its largest area. ``solve`` is
    :func:`assign`, or the native function of that name."""
    rows, columns = area.shape
    if rows <= columns:
        return solve(-area)
    mapping = area.argmax(1).astype(np.int32)
    mapping[solve(-area.T)] = np.arange(columns)
    return mapping


def modulo_mapping(guide: Array, labels: Array, classes: int) -> Array:
    """i-th class that occurs in the guide -> (i mod K')-th of the K' clusters that occur, both in
    increasing order. All classes of a guide of probabilities count as occurring."""
    present = np.arange(classes) if guide.ndim == 3 else np.unique(guide[guide >= 0])
    targets = np.unique(labels)
    mapping = np.zeros(classes, np.int32)
    mapping[present] = targets[np.arange(len(present)) % len(targets)]
    return mapping


# --- the network and its step ------------------------------------------------------------------


def residual_input(image: Array) -> Array:
    """Standardised RGB and coordinates in [-1, 1]: (H, W, 5)."""
    h, w = image.shape[:2]
    deviation = np.maximum(image.std((0, 1)), image.dtype.type(LEAST_DEVIATION))
    x = np.linspace(-1, 1, w) if w > 1 else np.zeros(1)
    y = np.linspace(-1, 1, h) if h > 1 else np.zeros(1)
    grid = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1).astype(image.dtype)
    return np.concatenate([(image - image.mean((0, 1))) / deviation, grid], -1)


def forward(
    options: RefineOptions, state: dict[str, Array], x: Array, prior: Array | None, running: bool
) -> tuple[Array, dict[str, Any]]:
    """The response map (for residual: plus the log prior), and the values that backward needs.

    ``running`` makes the batch norms use the running statistics of ``state``.
    """
    names = ["1", *(f"2.{i}" for i in range(options.blocks - 1))]
    cache: dict[str, Any] = {"x": x, "names": names, "norms": {}}

    def norm(a: Array, name: str) -> Array:
        fixed = (state[f"{name}.running_mean"], state[f"{name}.running_var"]) if running else None
        y, cache["norms"][name] = batch_norm(
            a, state[f"{name}.weight"], state[f"{name}.bias"], fixed
        )
        return y

    h = x
    for n in names:
        cache[f"in{n}"] = h
        cache[f"act{n}"] = conv(h, state[f"conv{n}.weight"], state[f"conv{n}.bias"], relu=True)
        h = norm(cache[f"act{n}"], f"bn{n}")
    if options.skip != "none":
        name = "skip" if options.skip == "own" else "conv1"
        h = h + conv(x, state[f"{name}.weight"], state[f"{name}.bias"])
    cache["top"] = h
    r = cache["head"] = conv(h, state["conv3.weight"], state["conv3.bias"])
    if options.final_bn != "none":
        r = norm(r, "bn3")
    return (r if prior is None else r + prior), cache


def backward(
    options: RefineOptions, state: dict[str, Array], cache: dict[str, Any], dr: Array
) -> dict[str, Array]:
    """Gradient of every parameter."""
    g: dict[str, Array] = {}
    if options.final_bn != "none":
        dr, g["bn3.weight"], g["bn3.bias"] = batch_norm_backward(
            dr, cache["head"], state["bn3.weight"]
        )
    d, g["conv3.weight"], g["conv3.bias"] = conv_backward(dr, cache["top"], state["conv3.weight"])
    skip = None
    if options.skip != "none":
        name = "skip" if options.skip == "own" else "conv1"
        skip = conv_backward(d, cache["x"], state[f"{name}.weight"])[1:]
    for n in reversed(cache["names"]):
        act = cache[f"act{n}"]
        d, g[f"bn{n}.weight"], g[f"bn{n}.bias"] = batch_norm_backward(
            d, act, state[f"bn{n}.weight"]
        )
        d, g[f"conv{n}.weight"], g[f"conv{n}.bias"] = conv_backward(
            d * (act > 0), cache[f"in{n}"], state[f"conv{n}.weight"]
        )
    if skip is not None:
        name = "skip" if options.skip == "own" else "conv1"
        g[f"{name}.weight"] = g.get(f"{name}.weight", 0) + skip[0]
        g[f"{name}.bias"] = g.get(f"{name}.bias", 0) + skip[1]
    return g


def prepare(options: RefineOptions, image: Array, guide: Array | None) -> dict[str, Any]:
    """The values of a picture that are the same in all steps: the network's input, and what the
    losses need."""
    h, w = image.shape[:2]
    if not objective_of(options).channels_follow_classes:
        known = 0
        if guide is not None:
            known = h * w if guide.ndim == 3 else int((guide >= 0).sum())
        return {"x": image, "prior": None, "known": known}
    assert guide is not None
    q = guide.astype(image.dtype)
    area = np.maximum(q.mean((0, 1)), LEAST_AREA) ** -options.balance
    weight = area / max(float((area * q.mean((0, 1))).sum()), LEAST_BALANCED)
    offsets = np.array([(a * s, b * s) for s in options.offsets for a, b in PAIR_NEIGHBOURS])
    pairs = np.array([max(h - dy, 0) * max(w - abs(dx), 0) for dy, dx in offsets])
    e = affinity(image, offsets, options.sigma)
    e /= np.maximum(pairs, 1)[:, None, None].astype(image.dtype) * len(offsets)
    return {
        "x": residual_input(image),
        "prior": np.log(np.maximum(q, image.dtype.type(SMALLEST_PRIOR))),
        "q": q,
        "confidence": q.max(-1),
        "class_weight": weight.astype(image.dtype),
        "affinity": e,
        "offsets": offsets,
    }


def losses(
    options: RefineOptions, r: Array, labels: Array, guide: Array | None, table: Array,
    fixed: dict[str, Any],
) -> tuple[Array, tuple[float, float, float, float]]:  # fmt: skip
    """dr, and the losses (total, similarity, spatial or pair, guide). Only the total contains the
    weights; residual's similarity is 0."""
    h, w, classes = r.shape
    if objective_of(options).channels_follow_classes:
        dz, guide_loss, pair_loss = residual_loss(
            r, fixed["q"], fixed["confidence"], fixed["class_weight"], fixed["affinity"],
            fixed["offsets"], options.lam,
        )  # fmt: skip
        return dz, (guide_loss + options.lam * pair_loss, 0.0, pair_loss, guide_loss)
    clusters = len(np.unique(labels))
    mu = float(options.mu or 0)
    weight = {"fixed": mu, "fsf": clusters / options.beta, "scf": mu / clusters}[
        str(options.weighting)
    ]
    used = SPATIAL_NEIGHBOURS if options.diagonals else SPATIAL_NEIGHBOURS[:2]
    pairs = [(h - dy) * (w - abs(dx)) if (dy, dx) in used else 0 for dy, dx in SPATIAL_NEIGHBOURS]
    scale = np.array([1 / (p * classes) if p > 0 else 0.0 for p in pairs], r.dtype)
    known = fixed["known"]
    dr, own, guided = cluster_loss(
        r, labels, guide if known else None, table, 1 / (h * w), 1 / known if known else 0.0
    )
    ds, spatial = spatial_loss(r, weight, scale, options.continuity == "huber")
    own, guided = own / (h * w), guided / known if known else 0.0
    return dr + ds, (own + guided + weight * spatial, own, spatial, guided)


class StopRules:
    """The rules that stop a loop after a step: few labels are left, or the map no longer changes.

    ``label_floor`` is the number of labels by the silhouette, 0 without that rule.
    """

    def __init__(self, options: RefineOptions, label_floor: int) -> None:
        least = options.min_labels or 0
        self._floor = max(least, label_floor)
        self._few = "silhouette" if label_floor >= least else "min_labels"
        self._same = options.early_stop  # share of equal labels that counts as no change
        self._checked: tuple[Any, float] | None = None  # labels and loss at the last check
        self._calm = 0  # consecutive checks without a change

    def after(self, step: int, clusters: int, labels: Any, loss: float) -> str:
        """Return the reason to stop after this step, or "" to continue. ``clusters`` is the number
        of labels in the map. ``labels`` are used only for the early stop."""
        if self._floor and clusters <= self._floor:
            return self._few
        if not self._same or step % CHECK_EVERY:
            return ""
        quiet = False
        if self._checked is not None:
            before, old = self._checked
            quiet = (before == labels).mean() >= self._same and abs(loss - old) < LOSS_CHANGE * abs(
                old
            )
        self._calm = self._calm + 1 if quiet else 0
        self._checked = labels, loss
        return "converged" if self._calm == CHECKS else ""


def run(
    options: RefineOptions, state: dict[str, Array], image: Array, guide: Array | None,
    label_floor: int = 0, steps: int | None = None,
) -> tuple[Array, Array, Array, Array, str, dict[str, Array]]:  # fmt: skip
    """Refine a picture.

    ``label_floor`` is as in :class:`StopRules`. ``steps`` replaces the option if it is not None.
    Returns scores, labels, losses (steps, 4), clusters per step, stop reason and state.
    """
    dtype = image.dtype
    state = {k: v.astype(dtype) if v.ndim else v for k, v in state.items()}
    parameters = [k.removeprefix("momentum.") for k in state if k.startswith("momentum.")]
    classes = state["conv3.weight"].shape[0]
    guide_classes = 0 if guide is None else guide.shape[2] if guide.ndim == 3 else guide.max() + 1
    fixed = prepare(options, image, guide)
    table = np.zeros(max(int(guide_classes), 1), np.int32)
    rows, counts, stop, kept = [], [], "steps", None
    rules = StopRules(options, label_floor)
    for step in range(options.steps or 0 if steps is None else steps):
        r, cache = forward(options, state, fixed["x"], fixed["prior"], False)
        labels = r.argmax(-1).astype(np.int32)
        clusters = len(np.unique(labels))
        if label_floor and clusters < label_floor and kept is not None:
            stop = "silhouette"
            break
        if (
            guide is not None
            and not objective_of(options).channels_follow_classes
            and fixed["known"]
        ):
            if options.mapping == "index_modulo":
                table = modulo_mapping(guide, labels, int(guide_classes))
            elif step < MAPPING_STEPS:
                table = overlap_mapping(guide, labels, int(guide_classes), classes)
        dr, values = losses(options, r, labels, guide, table, fixed)
        rows.append(values)
        counts.append(clusters)
        if not np.isfinite(values[0]):
            stop = "diverged"
            break
        gradient = backward(options, state, cache, dr)
        kept = dict(state)
        n = image.shape[0] * image.shape[1]
        for name, (mean, var) in cache["norms"].items():
            unbiased = var * n / (n - 1) if n > 1 else var
            for key, value in (("running_mean", mean), ("running_var", unbiased)):
                old = state[f"{name}.{key}"]
                state[f"{name}.{key}"] = ((1 - RUNNING_SHARE) * old + RUNNING_SHARE * value).astype(
                    dtype
                )
            state[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
        for name in parameters:
            state[name], state[f"momentum.{name}"] = sgd_step(
                state[name], state[f"momentum.{name}"], gradient[name], float(options.lr or 0),
                options.momentum,
            )  # fmt: skip
        reason = rules.after(step, clusters, labels, values[0])
        if reason:
            stop = reason
            break
    if stop == "diverged" and kept is not None:
        state = kept
    r, _ = forward(options, state, fixed["x"], fixed["prior"], False)
    if label_floor and len(np.unique(r.argmax(-1))) < label_floor and kept is not None:
        state, stop = kept, "silhouette"
        r, _ = forward(options, state, fixed["x"], fixed["prior"], False)
    if options.final_bn == "running":
        r, _ = forward(options, state, fixed["x"], fixed["prior"], True)
    p, _, labels = softmax(r)
    return p, labels, np.array(rows).reshape(-1, 4), np.array(counts, int), stop, state


# --- guided filter and regions -----------------------------------------------------------------


def box_mean(x: Array, radius: int) -> Array:
    """Mean over (2 radius + 1)^2 windows cut at the borders, by the O(r^2) definition."""
    h, w = x.shape[:2]
    out = np.zeros_like(x)
    for y in range(h):
        for c in range(w):
            window = x[max(y - radius, 0) : y + radius + 1, max(c - radius, 0) : c + radius + 1]
            out[y, c] = window.mean((0, 1))
    return out


def guided_coefficients(guidance: Array, values: Array, radius: int, eps: float) -> Array:
    """The coefficients a and b of He, Sun, Tang 2013, averaged over windows: (H, W, G + 1, K), the
    G rows of a before the row of b."""
    mean_g, mean_v = box_mean(guidance, radius), box_mean(values, radius)
    g = guidance.shape[2]
    outer = box_mean(guidance[..., :, None] * guidance[..., None, :], radius)
    cov = (
        outer - mean_g[..., :, None] * mean_g[..., None, :] + eps * np.eye(g, dtype=guidance.dtype)
    )
    cross = box_mean(guidance[..., :, None] * values[..., None, :], radius)
    cross = cross - mean_g[..., :, None] * mean_v[..., None, :]
    a = np.linalg.solve(cov, cross)
    b = mean_v - np.einsum("hwgk,hwg->hwk", a, mean_g)
    return box_mean(np.concatenate([a, b[..., None, :]], -2), radius)


def resize_bilinear(x: Array, height: int, width: int) -> Array:
    """Bilinear interpolation between pixel centres; border pixels are repeated outside."""

    def axis(n: int, low: int) -> tuple[Array, Array, Array]:
        p = np.clip((np.arange(n) + 0.5) * low / n - 0.5, 0, low - 1)
        i = p.astype(int)
        return i, np.minimum(i + 1, low - 1), p - i

    y0, y1, wy = axis(height, x.shape[0])
    x0, x1, wx = axis(width, x.shape[1])
    shape = (-1, *([1] * (x.ndim - 1)))
    wy, wx = wy.reshape(shape).astype(x.dtype), wx.reshape(shape[:-1]).astype(x.dtype)
    rows = x[y0] * (1 - wy) + x[y1] * wy
    return rows[:, x0] * (1 - wx) + rows[:, x1] * wx


def apply_coefficients(coefficients: Array, guidance: Array) -> Array:
    """a . guidance + b, with the coefficients interpolated to the guidance's size."""
    c = resize_bilinear(coefficients, *guidance.shape[:2])
    return np.einsum("hwgk,hwg->hwk", c[..., :-1, :], guidance) + c[..., -1, :]


def joint_upsample(coefficients: Array, image: Array) -> tuple[Array, Array]:
    """Labels and confidence in [0, 1] at the size of the uint8 ``image``. Coefficients with one
    row, b alone, are interpolated without guidance."""
    guidance = image.astype(coefficients.dtype) / 255
    if coefficients.shape[2] == 1:
        guidance = guidance[..., :0]
    values = apply_coefficients(coefficients, guidance)
    return values.argmax(-1).astype(np.int32), np.clip(values.max(-1), 0, 1)


def connected_regions(labels: Array) -> Array:
    """4-connected regions of equal label, numbered from 1 in the order of their first pixel."""
    h, w = labels.shape
    out = np.zeros((h, w), np.int32)
    count = 0
    for start in np.ndindex(h, w):
        if out[start]:
            continue
        count += 1
        stack = [start]
        out[start] = count
        while stack:
            y, x = stack.pop()
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < h and 0 <= u < w
                if inside and not out[v, u] and labels[v, u] == labels[start]:
                    out[v, u] = count
                    stack.append((v, u))
    return out
