"""Statistics of latency samples. All samples count: none is removed or clipped.

Samples are 1-D float64 arrays in the order in which they were measured. Percentiles are
nearest-rank: each is one of the samples. Shares ``q`` are in (0, 1): 0.99 is p99.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

ERROR = 0.05  # share of the intervals that may miss the true percentile
CORRELATED = 0.2  # samples with a larger lag-1 autocorrelation count as dependent
RESAMPLES = 999  # bootstrap samples
FEW = 20  # a run with fewer samples is unstable
SPREAD, DRIFT, WINDOWS = 0.10, 0.05, 0.10  # the largest values of a stable run; see instability
OUTLIER = 3.5  # samples above this modified z-score (Iglewicz and Hoaglin, 1993) are listed


@dataclass(frozen=True)
class Estimate:
    """A percentile with its 95 % interval, in the samples' unit. ``how`` the interval is computed:
    "order statistics" or "block bootstrap"."""

    value: float
    low: float
    high: float
    how: str


def percentile(samples: np.ndarray, q: float) -> float:
    """The smallest sample s such that at least a share q of the samples is at most s."""
    ordered = np.sort(samples)
    return float(ordered[_rank(len(ordered), q)])


def needed(q: float) -> int:
    """The fewest independent samples whose smallest and largest enclose percentile q with 95 %
    confidence: q^n + (1 - q)^n <= 0.05. 6 for the median, 29 for p90, 59 for p95, 299 for p99."""
    n = 2
    while q**n + (1 - q) ** n > ERROR:
        n += 1
    return n


def ranks(n: int, q: float) -> tuple[int, int]:
    """The shortest pair of 0-based ranks of n ordered samples that enclose percentile q with at
    least 95 % confidence, whatever the distribution: the number of samples below it is
    binomial(n, q). n must be at least needed(q)."""
    # below[k]: probability that at most k samples are below the percentile.
    below = binom.cdf(np.arange(n), n, q)
    # The lower end is above the percentile if at most ``low`` samples are below the percentile.
    low = np.arange(n)
    rest = ERROR - below  # the probability with which the upper end may be below the percentile
    high = np.searchsorted(below, 1 - rest)
    width = np.where((rest >= 0) & (high < n), high - low, n)
    best = np.lexsort((np.abs(high + low - 2 * n * q), width))[0]
    return int(low[best]), int(high[best])


def lag1(samples: np.ndarray) -> float:
    """The correlation of neighbouring samples, in [-1, 1]; 0 if they are constant or under 3."""
    return float(autocorrelation(samples)[1]) if len(samples) > 2 else 0.0


def autocorrelation(samples: np.ndarray) -> np.ndarray:
    """The autocorrelation at each lag, (n,): 1 at lag 0; of constant samples 0 at all others."""
    n = len(samples)
    centred = samples - samples.mean()
    spectrum = np.fft.rfft(centred, 2 * n)
    product = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n]
    if product[0] <= 1e-12 * n * max(1e-300, float(np.mean(samples)) ** 2):
        return np.eye(1, n)[0]
    return np.asarray(product / product[0])


def resampled(samples: np.ndarray, q: float, *, seed: int = 0) -> np.ndarray:
    """(RESAMPLES,) percentiles q of circular block bootstrap samples. The length of the blocks
    follows Carlstein's rule (1986) from the lag-1 autocorrelation; it is 1 for independent
    samples."""
    n, rng = len(samples), np.random.default_rng(seed)
    rho = min(max(lag1(samples), 0.0), 0.97)
    block = 1
    if rho > CORRELATED:
        block = min(n, math.ceil((2 * rho / (1 - rho**2)) ** (2 / 3) * n ** (1 / 3)))
    count = -(-n // block)
    steps, rank = np.arange(block), _rank(n, q)
    out = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        starts = rng.integers(0, n, count)
        index = ((starts[:, None] + steps).ravel()[:n]) % n
        out[i] = np.partition(samples[index], rank)[rank]
    return out


def independent(samples: np.ndarray) -> int:
    """The number of independent samples with as much information as these n samples: n, or, if
    neighbours correlate by rho > CORRELATED, n (1 - rho) / (1 + rho) (Bayley and Hammersley, 1946,
    for a first-order process)."""
    rho = min(lag1(samples), 0.99)
    n = len(samples)
    return n if rho <= CORRELATED else max(1, int(n * (1 - rho) / (1 + rho)))


def estimate(samples: np.ndarray, q: float) -> Estimate | None:
    """Percentile q with its interval, or None if independent(samples) < needed(q).

    If neighbours correlate, the interval is that of a block bootstrap. For a high percentile this
    interval is too narrow: its end cannot exceed the largest sample, and few samples are so large.
    So the interval is widened to the order statistics of independent(samples) samples.
    """
    n, worth = len(samples), independent(samples)
    if worth < needed(q):
        return None
    ordered, value = np.sort(samples), percentile(samples, q)
    first, last = ranks(worth, q)
    if worth == n:
        return Estimate(value, float(ordered[first]), float(ordered[last]), "order statistics")
    first, last = first * n // worth, min(n - 1, -(-(last + 1) * n // worth) - 1)
    low, high = np.percentile(resampled(samples, q), [50 * ERROR, 100 - 50 * ERROR])
    ends = min(float(low), float(ordered[first])), max(float(high), float(ordered[last]))
    return Estimate(value, *ends, "block bootstrap")


def outliers(samples: np.ndarray) -> np.ndarray:
    """The indices of samples far above the median. Outliers are listed, but never removed."""
    median = np.median(samples)
    deviation = max(float(np.median(np.abs(samples - median))), 0.005 * float(median))
    return np.flatnonzero(0.6745 * (samples - median) / deviation > OUTLIER)


def period(samples: np.ndarray) -> int | None:
    """The number of samples after which the latency repeats itself, as 12 if every 12th frame is
    slow; None if it does not."""
    n = len(samples)
    most = n // 4
    if most < 3:
        return None
    r = autocorrelation(samples)
    floor = max(0.3, 4 / math.sqrt(n))
    peaks = [
        k for k in range(2, most) if r[k] > floor and r[k] > r[k - 1] and r[k] >= r[k + 1]
    ]  # fmt: skip
    if not peaks:
        return None
    best = max(r[k] for k in peaks)
    first = next(k for k in peaks if r[k] > 0.8 * best)
    return first if min(r[1:first]) < r[first] / 2 else None


def instability(samples: np.ndarray) -> list[str]:
    """The reasons why the run is unstable, a phrase for each; empty for a stable run."""
    n = len(samples)
    if n < FEW:
        return [f"only {n} samples"]
    reasons = []
    spread = float(samples.std() / samples.mean())
    if spread > SPREAD:
        reasons.append(f"spread {spread:.1%} (standard deviation / mean, limit {SPREAD:.0%})")
    fifths = np.array_split(samples, 5)
    drift = float(np.median(fifths[-1]) / np.median(fifths[0])) - 1
    if abs(drift) > DRIFT:
        reasons.append(f"drift {drift:+.1%} from the first to the last fifth (limit {DRIFT:.0%})")
    windows = [float(np.mean(f)) for f in fifths[-3:]]
    apart = max(windows) / min(windows) - 1
    if apart > WINDOWS:
        reasons.append(f"the last three windows differ by {apart:.1%} (limit {WINDOWS:.0%})")
    return reasons


def summary(samples: np.ndarray, percentiles: list[float]) -> dict[str, Any]:
    """All statistics of a row's samples. ``percentiles`` are in per cent, from 1 to 99.99.

    Without samples, only "n", "percentiles" (empty) and "unstable" are there.
    """
    out: dict[str, Any] = {"n": len(samples), "percentiles": {}}
    if not len(samples):
        return out | {"unstable": ["no samples"]}
    worth = out["independent"] = independent(samples)
    for p in percentiles:
        found = estimate(samples, p / 100)
        out["percentiles"][f"p{p:g}"] = (
            vars(found) if found else {"n": worth, "need": needed(p / 100), "value": None}
        )
    out |= {"mean": float(samples.mean()), "min": float(samples.min())}
    out |= {"max": float(samples.max()), "std": float(samples.std())}
    out |= {"lag1": lag1(samples), "period": period(samples)}
    return out | {"outliers": outliers(samples).tolist(), "unstable": instability(samples)}


def _rank(n: int, q: float) -> int:
    """The 0-based rank of percentile q among n ordered samples."""
    return min(n - 1, max(0, math.ceil(q * n - 1e-9) - 1))
