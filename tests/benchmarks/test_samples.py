"""The latency statistics on distributions whose answers are known."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the statistics need SciPy")

from benchmarks.latency import samples

TRIALS = 400


def test_percentiles_are_samples():
    x = np.array([5.0, 1, 4, 2, 3])
    assert [samples.percentile(x, q) for q in (0.2, 0.21, 0.5, 0.9, 0.99)] == [1, 2, 3, 5, 5]
    assert samples.percentile(np.arange(1.0, 101), 0.99) == 99
    assert samples.percentile(np.arange(1.0, 101), 0.07) == 7  # 0.07 * 100 is 7.000000000000001


def test_how_many_samples_a_percentile_needs():
    assert [samples.needed(q) for q in (0.5, 0.9, 0.95, 0.99, 0.999)] == [6, 29, 59, 299, 2995]


def test_ranks_hold_the_percentile_by_the_binomial_law():
    from math import comb

    for q, n in (
        *((0.5, 6), (0.5, 7), (0.5, 100), (0.9, 29), (0.95, 59)),
        *((0.99, 299), (0.99, 1000), (0.1, 29)),
    ):
        low, high = samples.ranks(n, q)
        below = [comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
        assert 0 <= low < high < n, (q, n)
        assert sum(below[low + 1 : high + 1]) >= 0.95, (q, n)
        for narrower in range(n - (high - low) + 1):  # no shorter pair is enough
            end = narrower + high - low - 1
            assert sum(below[narrower + 1 : end + 1]) < 0.95, (q, n)


def test_95_of_100_intervals_hold_the_truth():
    from scipy import stats

    laws = {"exponential": stats.expon, "normal": stats.norm, "uniform": stats.uniform}
    for law, known in laws.items():
        for q, n in ((0.5, 40), (0.9, 60), (0.99, 320)):
            truth, rng, hits = known.ppf(q), np.random.default_rng(1), 0
            for _ in range(TRIALS):
                x = np.sort(getattr(rng, law)(size=n))
                low, high = samples.ranks(n, q)
                hits += x[low] <= truth <= x[high]
            assert 0.93 <= hits / TRIALS <= 1.0, (law, q, n)


def correlated(rng, n, rho):
    noise = rng.standard_normal(n + 50) * np.sqrt(1 - rho**2)
    x = np.zeros(n + 50)
    for i in range(1, n + 50):
        x[i] = rho * x[i - 1] + noise[i]
    return 20 + x[50:]


def test_samples_that_correlate_are_worth_fewer():
    rng = np.random.default_rng(0)
    assert samples.independent(20 + rng.standard_normal(500)) == 500
    assert 40 <= samples.independent(correlated(rng, 500, 0.8)) <= 75  # 500 * 0.2 / 1.8 = 56
    assert samples.estimate(correlated(rng, 500, 0.8), 0.99) is None  # 56, but p99 needs 299
    assert samples.estimate(correlated(rng, 500, 0.8), 0.5).how == "block bootstrap"
    assert samples.estimate(20 + rng.standard_normal(500), 0.5).how == "order statistics"


def test_intervals_of_samples_that_correlate_hold_the_truth_too():
    from scipy import stats

    for rho, n, q in ((0.8, 400, 0.5), (0.8, 1000, 0.9), (0.5, 100, 0.5), (0.3, 700, 0.99)):
        rng = np.random.default_rng(0)
        found = [samples.estimate(correlated(rng, n, rho), q) for _ in range(100)]
        found = [e for e in found if e is not None]
        truth = 20 + stats.norm.ppf(q)
        assert len(found) > 30, (rho, n, q)
        assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.92, (rho, n, q)


def test_too_few_samples_give_no_percentile():
    x = np.random.default_rng(0).random(100)
    assert samples.estimate(x, 0.99) is None
    assert samples.summary(x, [99.0])["percentiles"] == {
        "p99": {"n": 100, "need": 299, "value": None}
    }
    assert samples.summary(np.empty(0), [50.0])["unstable"] == ["no samples"]


def test_autocorrelation():
    rng = np.random.default_rng(0)
    assert abs(samples.lag1(rng.random(5000))) < 0.05
    assert abs(samples.lag1(correlated(rng, 5000, 0.6)) - 0.6) < 0.05
    assert samples.lag1(np.full(100, 3.0)) == 0 and samples.lag1(np.ones(2)) == 0
    x = rng.random(50)
    centred = x - x.mean()
    exact = [(centred[: 50 - k] * centred[k:]).sum() / (centred**2).sum() for k in range(50)]
    np.testing.assert_allclose(samples.autocorrelation(x), exact, atol=1e-12)


def test_a_slow_frame_every_twelfth_is_found():
    rng = np.random.default_rng(0)
    x = 28 + rng.standard_normal(300)
    assert samples.period(x) is None
    x[::12] += 170
    assert samples.period(x) == 12
    assert samples.outliers(x).tolist() == list(range(0, 300, 12))
    assert samples.period(correlated(rng, 600, 0.9)) is None
    assert samples.period(np.full(100, 2.0)) is None


def test_outliers_stay_in_every_figure():
    x = np.full(100, 10.0)
    x[17] = 90
    found = samples.summary(x, [50.0])
    assert found["outliers"] == [17] and found["max"] == 90 and found["mean"] == 10.8


def test_what_makes_a_run_unstable():
    for reason, x in (
        ("only 19 samples", np.ones(19)),
        ("spread", np.tile([8.0, 12.0], 50)),
        ("drift", np.linspace(10, 11, 100)),
        ("last three windows", np.concatenate([np.full(80, 10.0), np.full(20, 11.5)])),
    ):
        assert any(reason in r for r in samples.instability(x)), reason


def test_a_quiet_run_is_stable():
    assert not samples.instability(10 + 0.2 * np.random.default_rng(0).standard_normal(200))
