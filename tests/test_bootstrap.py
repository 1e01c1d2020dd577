"""lora/bootstrap.py against scipy's bootstrap."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from lora.bootstrap import Tally, difference


def tally(values, counts) -> Tally:
    made = Tally()
    for unit, (value, count) in enumerate(zip(values, counts, strict=True)):
        made.add(unit, value, count)
    return made


def test_a_mean_weighs_counts():
    made = Tally()
    for unit, value, count in (("a", 1, 1), ("b", 10, 4), ("a", 2, 1)):
        made.add(unit, value, count)
    assert made == {"a": (3, 2), "b": (10, 4)}
    assert made.mean == pytest.approx(13 / 6)
    assert math.isnan(Tally().mean)


@pytest.mark.parametrize("equal_counts", [True, False])
def test_interval_is_scipys(equal_counts):
    rng = np.random.default_rng(1)
    counts = np.full(60, 5) if equal_counts else rng.integers(1, 9, 60)
    base = rng.normal(3, 1, 60) * counts
    tuned = base * 0.8 + rng.normal(0, 0.5, 60) * counts
    low, high = difference(tally(base, counts), tally(tuned, counts))

    def statistic(base, tuned, counts, axis):
        return (tuned.sum(axis) - base.sum(axis)) / counts.sum(axis)

    want = bootstrap(
        (base, tuned, counts), statistic, paired=True, vectorized=True, method="percentile", n_resamples=10_000, rng=2
    )
    width = high - low
    assert low == pytest.approx(want.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(want.confidence_interval.high, abs=0.05 * width)


def test_sides_are_drawn_together():
    """Units differ much, their differences little: the interval is that of the differences."""
    rng = np.random.default_rng(3)
    base = rng.normal(0, 100, 200)
    low, high = difference(tally(base, np.ones(200)), tally(base + rng.normal(1, 0.1, 200), np.ones(200)))
    assert 0.9 < low < 1 < high < 1.1


def test_units_of_one_side():
    """A word whose sentences are missing on one side counts on the other: here it moves the base's mean from 1 to 3."""
    low, high = difference(tally([1] * 50 + [5] * 50, [1] * 100), tally([3] * 50, [1] * 50))
    assert -0.6 < low < 0 < high < 0.6


def test_unknown_intervals():
    """One unit says nothing of how units vary, and an empty side nothing at all."""
    for base in (Tally(), tally([1], [1])):
        assert all(map(math.isnan, difference(base, tally([1], [1]))))
