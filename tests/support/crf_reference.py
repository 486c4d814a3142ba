"""The dense CRF in float64: the exact sum over all pairs of pixels, and the permutohedral lattice.

Both have the definition of runtime.dense_crf and share no code with it. Imports NumPy only.
"""

import numpy as np


def exact_crf(image, probabilities, **options):
    """Return mean field with the exact kernels: N^2 numbers for N pixels, so for tiny pictures.

    image (H, W, 3) uint8; probabilities (H, W, K); options: those of runtime.dense_crf without
    out and threads. Returns (H, W, K) float64.
    """
    return _mean_field(exact_kernel, image, probabilities, **options)


def lattice_crf(image, probabilities, **options):
    """Return mean field with the kernels of the lattice; otherwise as exact_crf."""
    return _mean_field(lattice_kernel, image, probabilities, **options)


def pixel_features(image, sxy, srgb=None):
    """Return (H * W, 2) x, y / sxy or, with srgb, (H * W, 5) x, y / sxy and R, G, B / srgb."""
    height, width = image.shape[:2]
    y, x = np.divmod(np.arange(height * width), width)
    features = [x / sxy, y / sxy]
    if srgb is not None:
        features += [*(image.reshape(-1, 3) / srgb).T]
    return np.stack(features, -1)


def exact_kernel(features):
    """Return the function from values (N, K) to (N, K): sums weighted by exp(-distance^2 / 2)."""
    squares = (features**2).sum(-1)
    distance = squares[:, None] + squares - 2 * features @ features.T
    kernel = np.exp(-np.maximum(distance, 0) / 2)
    return lambda values: kernel @ values


def lattice_kernel(features):
    """Return the function that exact_kernel returns, approximated on the permutohedral lattice.

    Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice,
    Eurographics 2010; Kraehenbuehl, Koltun: Efficient Inference in Fully Connected CRFs with
    Gaussian Edge Potentials, NeurIPS 2011. The points of the lattice have d + 1 integer
    coordinates, which are equal modulo d + 1 and whose sum is 0.
    """
    n, d = features.shape
    corners, weights = _simplices(features)
    # A point is one number: its first d coordinates are the digits. Its neighbours fit too.
    lowest = corners.min((0, 1)) - d - 1
    base = corners.max((0, 1)) - lowest + d + 2
    assert np.prod(base.astype(float)) < 2**62, "the features are too far apart"
    units = np.cumprod([1, *base[:-1].tolist()])
    numbers, point = np.unique(((corners - lowest) * units).sum(-1), return_inverse=True)
    point = point.reshape(n, d + 1)
    neighbours = []
    for axis in range(d + 1):
        move = units.sum() - ((d + 1) * units[axis] if axis < d else 0)
        both = []
        for wanted in (numbers - move, numbers + move):
            at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
            both.append(np.where(numbers[at] == wanted, at, len(numbers)))  # absent: the last row
        neighbours.append(both)

    def kernel(values):
        total = np.zeros((len(numbers) + 1, values.shape[1]))  # the last row remains 0
        np.add.at(total, point, weights[..., None] * values[:, None])
        for before, after in neighbours:
            total[:-1] += (total[before] + total[after]) / 2
        return (weights[..., None] * total[point]).sum(1) / (1 + 2.0**-d)

    return kernel


def _simplices(features):
    """Return the corners (N, d + 1, d) of each pixel's simplex and their weights (N, d + 1).

    The last coordinate of a corner follows from the others.
    """
    n, d = features.shape
    i = np.arange(d)
    # Splat, blur and slice together have the variance 2/3 (d + 1)^2 along each direction.
    scaled = features * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2))
    above = np.cumsum(scaled[:, ::-1], 1)[:, ::-1]  # the sum of the features from i on
    place = np.zeros((n, d + 1))
    place[:, :d] = above
    place[:, 1:] -= (i + 1) * scaled
    nearest = np.round(place / (d + 1)).astype(int)
    rest = place - nearest * (d + 1)
    # Rank 0 is the largest rest, of equal ones the first. The corrections make the sum 0.
    rank = np.argsort(np.argsort(-rest, 1, kind="stable"), 1) + nearest.sum(1, keepdims=True)
    turn = (rank < 0).astype(int) - (rank > d)
    rank, nearest, rest = rank + turn * (d + 1), nearest + turn, rest - turn * (d + 1)
    by_rank = np.zeros((n, d + 1))
    np.put_along_axis(by_rank, rank, rest, 1)
    weights = np.zeros((n, d + 1))
    weights[:, 1:] = ((by_rank[:, :-1] - by_rank[:, 1:]) / (d + 1))[:, ::-1]
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    # Corner r is r higher in each coordinate, and d + 1 lower in those of the r lowest ranks.
    r = np.arange(d + 1)[:, None]
    corners = nearest[:, None] * (d + 1) + r - (d + 1) * (rank[:, None] > d - r)
    assert not corners.sum(-1).any() and (weights > -1e-6).all()
    return corners[..., :d], weights


def _mean_field(
    kernel_of,
    image,
    probabilities,
    *,
    steps=10,
    bilateral_weight=4.0,
    bilateral_sxy=67.0,
    bilateral_srgb=3.0,
    gaussian_weight=3.0,
    gaussian_sxy=1.0,
    floor=1e-5,
    compatibility=None,
):
    height, width, classes = probabilities.shape
    unary = -np.log(np.maximum(probabilities.reshape(-1, classes).astype(float), floor))
    penalty = 1 - np.eye(classes) if compatibility is None else np.asarray(compatibility, float)
    kernels = []
    for weight, sizes in (
        (gaussian_weight, (gaussian_sxy,)),
        (bilateral_weight, (bilateral_sxy, bilateral_srgb)),
    ):
        if weight > 0:
            kernel = kernel_of(pixel_features(image, *sizes))
            kernels.append((weight, kernel, 1 / np.sqrt(kernel(np.ones((len(unary), 1))))))
    q = _softmax(-unary)
    for _ in range(steps):
        energy = unary.copy()
        for weight, kernel, norm in kernels:
            energy += weight * (norm * kernel(norm * q)) @ penalty.T
        q = _softmax(-energy)
    return q.reshape(height, width, classes)


def _softmax(scores):
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
