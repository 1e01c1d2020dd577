"""How sure a mean is, and a difference of two.

A metric is a mean over things that are not independent: the tokens of one answer, the sentences of one word. What is
independent is kept whole. A `Tally` holds for each *unit* (an answer, a word) its sum and its count; the mean is the
sum of all sums over the sum of all counts.

The bootstrap (Efron 1979) draws as many units as there are, with replacement, and takes the mean anew; of many such
means, 95 % lie between the 2.5th and the 97.5th percentile. For a difference both sides are drawn together, unit by
unit, because both answered the same questions: what is hard for both then says nothing about their difference.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

DRAWS = 10_000


class Tally(dict[Hashable, tuple[float, float]]):
    """unit -> (sum, count)"""

    def add(self, unit: Hashable, value: float, count: float = 1) -> None:
        total, n = self.get(unit, (0.0, 0.0))
        self[unit] = (total + value, n + count)

    @property
    def mean(self) -> float:
        """NaN if nothing was counted."""
        totals, counts = np.array([*self.values()] or [(0.0, 0.0)]).sum(axis=0)
        return float(totals / counts) if counts else float("nan")


def difference(base: Tally, tuned: Tally, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of tuned.mean - base.mean; units of only one side count there alone. NaN without any."""
    units = [*dict.fromkeys([*base, *tuned])]
    if not base or not tuned:
        return float("nan"), float("nan")
    sides = np.array([[side.get(unit, (0.0, 0.0)) for unit in units] for side in (base, tuned)])
    drawn = np.random.default_rng(seed).multinomial(len(units), [1 / len(units)] * len(units), size=DRAWS)
    totals, counts = (drawn @ sides[..., i].T for i in (0, 1))  # [draws, 2]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals / counts
    low, high = np.nanpercentile(means[:, 1] - means[:, 0], [2.5, 97.5])
    return float(low), float(high)
