"""What the batch-size study's test accuracies say, with Student-t intervals.

All intervals are over seeds, for the hyper-parameters that the searches found: how much
another search would change these is not in them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
BySeed = Mapping[int, float]


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float  # over the seeds
    half: float | None  # half the width of the interval; None for a single seed
    seeds: int  # how many there are

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is on that side of 0, otherwise 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and ``t_{0.975, n-1} s / √n``, Student's interval at 95 %."""
    if not values:
        raise ValueError("values is empty; wanted at least one number.")
    x, n = np.asarray(values, np.float64), len(values)
    if n < 2:
        return Estimate(float(x[0]), None, 1)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n)
    return Estimate(float(x.mean()), float(half), n)


def paired(ours: BySeed, theirs: BySeed) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def slope(leads: Mapping[int, BySeed]) -> Estimate | None:
    """How a lead changes with every doubling of the batch.

    A line through the leads against ``log2 B`` is fitted to each seed, by least
    squares; the estimate is that of the seeds' slopes. A seed's runs share their
    initial parameters at all batch sizes and need not be independent.
    """
    sizes = sorted(leads)
    common = [s for s in leads[sizes[0]] if all(s in leads[b] for b in sizes)]
    if len(sizes) < 2 or not common:
        return None
    x = np.log2(sizes)
    x = x - x.mean()
    lines = [x @ [leads[b][s] for b in sizes] / (x @ x) for s in sorted(common)]
    return estimate([float(line) for line in lines])
