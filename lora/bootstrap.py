"""How sure a mean is, and a difference of two.

A metric is a mean over things that are not independent: the tokens of one answer, the sentences of one word. They are
kept together: a `Tally` holds for each *unit* (an answer, a word) its sum and its count, and the mean is the sum of all
sums over the sum of all counts. (Lists share held-out words. So an interval over lists says how other lists of *these*
words would do; how other words would do, the metrics that are counted by word say.)

The bootstrap (Efron 1979) draws as many units as there are, with replacement, and takes the mean anew; of many such
means, 95 % lie between the 2.5th and the 97.5th percentile. For a difference both sides are drawn together, unit by
unit, because both answered the same questions: what is hard for both then says nothing about their difference.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

DRAWS, BLOCK = 10_000, 100


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
    """The 95 % interval of tuned.mean - base.mean; a unit of one side only counts there alone.

    NaN, unknown, if a side is empty or there is but one unit. Where all units agree the interval has no width: what was
    never seen to vary cannot be drawn.
    """
    units = [*dict.fromkeys([*base, *tuned])]
    if not base or not tuned or len(units) < 2:
        return float("nan"), float("nan")
    sides = np.array([[side.get(unit, (0.0, 0.0)) for unit in units] for side in (base, tuned)])
    rng = np.random.default_rng(seed)
    changes = []
    for _ in range(DRAWS // BLOCK):
        drawn = rng.multinomial(len(units), [1 / len(units)] * len(units), size=BLOCK)
        totals, counts = (drawn @ sides[..., i].T for i in (0, 1))  # [BLOCK, 2]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = totals / counts
        changes.append(means[:, 1] - means[:, 0])
    low, high = np.nanpercentile(np.concatenate(changes), [2.5, 97.5])
    return float(low), float(high)
