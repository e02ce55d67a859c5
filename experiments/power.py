"""Print how many seeds an effect needs: python experiments/power.py

Runs are paired by seed. Pairing buys little (Jordan, Calibrated Chaos, 2024), so the standard deviation of a difference
is taken as sqrt(2) times that of one arm. For the error of a test set of m images that is about sqrt(error / (2 m)), an
approximation of the same source.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

POWER = 0.8
STDS = (0.15, 0.25, 0.35, 0.5)  # of one arm, in points
DIFFERENCES = (0.2, 0.4, 0.7, 1.0, 1.4, 2.0)  # in points
MARGINS = (0.1, 0.2, 0.3, 0.5, 0.7)  # in points
LARGEST = 1000


# Quantiles of the uniform distribution: the mean of a function over them is an integral.
QUANTILES = (np.arange(2000) + 0.5) / 2000


def spread(n: int) -> np.ndarray:
    """Return equally likely standard deviations of n values whose true one is 1; their mean is independent of it."""
    return np.sqrt(stats.chi2.ppf(QUANTILES, n - 1) / (n - 1))


def power_of_difference(n: int, effect: float) -> float:
    """Return the probability that a two-sided paired t-test at 5 % sees an effect, in standard deviations."""
    critical, shift = stats.t.ppf(0.975, n - 1) * spread(n), effect * math.sqrt(n)
    return float((stats.norm.sf(critical - shift) + stats.norm.cdf(-critical - shift)).mean())


def power_of_equivalence(n: int, margin: float) -> float:
    """Return the probability that two one-sided tests at 5 % show no effect within a margin, if there is none.

    The margin is in standard deviations of the difference.
    """
    room = margin * math.sqrt(n) - stats.t.ppf(0.95, n - 1) * spread(n)
    return float(np.where(room > 0, 2 * stats.norm.cdf(room) - 1, 0).mean())


def seeds_needed(power: Callable[[int, float], float], size: float) -> int:
    """Return the fewest seeds with which a power function reaches `POWER`; `LARGEST` if that is not enough."""
    return next((n for n in range(2, LARGEST) if power(n, size) >= POWER), LARGEST)


def table(power: Callable[[int, float], float], sizes: tuple[float, ...], heading: str) -> str:
    """Return a table in Markdown: seeds per arm, by standard deviation of one arm and by size."""
    rows = [[heading, *map(str, sizes)], ["---"] * (len(sizes) + 1)]
    rows += [[f"{std}", *(f"{seeds_needed(power, size / std / math.sqrt(2))}" for size in sizes)] for std in STDS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables() -> list[str]:
    """Return the tables of both questions."""
    heading = "sd of one arm"
    return [table(power_of_difference, DIFFERENCES, heading), table(power_of_equivalence, MARGINS, heading)]


if __name__ == "__main__":
    print("\n".join(tables()))
