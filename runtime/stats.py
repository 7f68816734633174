"""Statistics of samples: percentiles, intervals that assume no distribution, outliers, settling, runs.

Order of reduction: across ranks first, within each iteration (`reduce_ranks`), then over iterations
(`summarise`), and inference over run medians only (`run_interval`). Iterations of different runs are never
pooled: they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

PERCENTILES = (50, 90, 95, 99)
TAIL = 0.025  # probability left on either side of an interval
OUTLIER = 14.826  # an outlier has |x - median| / MAD above it: 10 sigma of a normal distribution
LISTED_OUTLIERS = 16
RESOLUTION_US = 1e-3  # what published times are rounded to
SETTLING = 0.02  # largest difference between the halves of a settled series
MINIMUM_RUNS = 3

# For a normal distribution, sigma is 1.4826 MAD, and sqrt(pi / 2) = 1.2533 mean absolute deviations.
_OUTLIER_SIGMAS = OUTLIER / 1.4826
_SIGMA_PER_MEAN_DEVIATION = math.sqrt(math.pi / 2)

# Student's t, 0.975 quantile, 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods,
# section 1.3.6.7.2, "Critical Values of the Student's t Distribution".
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Interval = dict[str, Any]  # {"low": float, "high": float} or {"null": reason}


def summarise(samples: Sequence[float]) -> dict[str, Any]:
    """Everything that is published of one series, in the form of the result schema's `stats`.

    Percentiles and medians are nearest-rank: always a value that was measured. Times in microseconds,
    rounded to the nanosecond. Raises ValueError when there is no sample or one is not finite.
    """
    if not samples:
        raise ValueError("no samples")
    if not all(map(math.isfinite, samples)):
        raise ValueError("a sample is not a finite number")
    # Rounded first: a difference in the last bit of a float is neither scatter nor an outlier.
    samples = [rounded(x) for x in samples]
    ordered = sorted(samples)
    centre, mean = percentile(ordered, 50), math.fsum(ordered) / len(ordered)
    deviations = sorted(rounded(abs(x - centre)) for x in ordered)
    mad = percentile(deviations, 50)
    return {
        "n": len(ordered),
        "min": ordered[0],
        **{f"p{p}": percentile(ordered, p) for p in PERCENTILES},
        "max": ordered[-1],
        "mean": rounded(mean),
        "mad": mad,
        "cv": _variation(ordered, mean),
        "intervals": {f"p{p}": quantile_interval(ordered, p) for p in PERCENTILES},
        "outliers": _outliers(samples, centre, _outlier_distance(deviations, mad)),
    }


def rounded(us: float) -> float:
    """To the nanosecond: finer than any clock here, and short in JSON."""
    return round(us, 3)  # RESOLUTION_US


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest-rank percentile of sorted values: element number ceil(percent / 100 * n), counted from 1."""
    return ordered[-(-percent * len(ordered) // 100) - 1]


def quantile_interval(ordered: Sequence[float], percent: int) -> Interval:
    """95 % equal-tailed interval of a percentile from sorted values, whatever their distribution.

    The bounds are order statistics (see `order_ranks`). They suppose independent samples; iterations are
    correlated, so this is a lower bound of the uncertainty.
    """
    ranks = order_ranks(len(ordered), percent)
    if ranks is None:
        need = smallest_n(percent)
        return {"null": f"{len(ordered)} samples; an interval of p{percent} needs {need}"}
    low, high = ranks
    return {"low": ordered[low - 1], "high": ordered[high - 1]}


@lru_cache(maxsize=4096)
def order_ranks(n: int, percent: int) -> tuple[int, int] | None:
    """Ranks (l, u), from 1, of the order statistics that bound a percentile, or None when n is too small.

    The number B of samples at or below the true q-quantile is binomial (n, q). x(l) lies above the quantile
    when B < l, x(u) below it when B >= u: l is the largest and u the smallest rank for which either happens
    with probability 2.5 % at most (David and Nagaraja, "Order Statistics", 3rd ed., section 7.1).
    """
    if n < smallest_n(percent):
        return None
    q = percent / 100
    low, below = 0, _binomial(0, n, q)
    while below <= TAIL:
        low += 1
        below += _binomial(low, n, q)
    high, above = n + 1, _binomial(n, n, q)
    while above <= TAIL:
        high -= 1
        above += _binomial(high - 1, n, q)
    return low, high


def smallest_n(percent: int) -> int:
    """The least number of samples whose extremes bound a percentile: q**n and (1-q)**n at most 2.5 %."""
    q = percent / 100
    return math.ceil(math.log(TAIL) / math.log(max(q, 1 - q)))


def reduce_ranks(per_rank: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Per iteration over ranks: "max" (what a layer waits for), "median", "min" (the skew-free floor) and
    "spread" (max - min). The median of an even number of ranks is the mean of the middle two.

    per_rank   one series of equal length for each rank; raises ValueError otherwise
    """
    lengths = {len(series) for series in per_rank}
    if len(lengths) != 1:
        raise ValueError(f"ranks have series of different lengths: {sorted(lengths)}")
    iterations = [sorted(values) for values in zip(*per_rank, strict=True)]
    middle = len(per_rank) // 2
    return {
        "max": [v[-1] for v in iterations],
        "median": [(v[middle] + v[-1 - middle]) / 2 for v in iterations],
        "min": [v[0] for v in iterations],
        "spread": [v[-1] - v[0] for v in iterations],
    }


def late_over_early(samples: Sequence[float]) -> float:
    """Median of the late half over the median of the early half, minus 1; compare with `SETTLING`.

    An odd sample in the middle belongs to neither half; a single sample has no halves and gives 0. An early
    median below the resolution of `rounded` counts as that resolution, so the answer is always finite.
    """
    half = len(samples) // 2
    if not half:
        return 0.0
    early = percentile(sorted(samples[:half]), 50)
    late = percentile(sorted(samples[-half:]), 50)
    return (late - early) / max(early, RESOLUTION_US)


def settled(samples: Sequence[float]) -> bool:
    """True unless the two halves differ by more than 2 % and by more than their scatter explains."""
    return unsettled_us(samples) <= 0


def unsettled_us(samples: Sequence[float]) -> float:
    """By how many microseconds the halves differ beyond what a settled series may: 0 or less where it is one.

    Scatter: three standard errors of the difference of two medians, each sqrt(pi/2) sigma / sqrt(n) (the
    large-sample efficiency of a normal distribution's median), sigma from the MAD of its half.
    """
    half = len(samples) // 2
    if not half:
        return 0.0
    drift = abs(late_over_early(samples))
    halves = [sorted(samples[:half]), sorted(samples[-half:])]
    early = max(percentile(halves[0], 50), RESOLUTION_US)
    errors = [_SIGMA_PER_MEAN_DEVIATION * _sigma(h) / math.sqrt(half) for h in halves]
    return min((drift - SETTLING) * early, drift * early - 3 * math.hypot(*errors))


def _sigma(ordered: Sequence[float]) -> float:
    """1.4826 MAD: the standard deviation of a normal distribution with this scatter."""
    centre = percentile(ordered, 50)
    return 1.4826 * percentile(sorted(abs(x - centre) for x in ordered), 50)


def run_centre(run_medians: Sequence[float]) -> float:
    """Geometric mean of the run medians: the point that `run_interval` lies around."""
    return math.exp(math.fsum(map(math.log, run_medians)) / len(run_medians))


def run_interval(run_medians: Sequence[float]) -> Interval:
    """95 % interval of the typical run: Student's t on the logarithms of the run medians, exponentiated.

    Run-to-run differences are relative (clocks, placement), hence the logarithm. Above 30 degrees of freedom
    the quantile of 30 is used, which is too wide rather than too narrow.
    """
    n = len(run_medians)
    if n < MINIMUM_RUNS:
        return {"null": f"no-inference: {n} run{'' if n == 1 else 's'}; an interval needs {MINIMUM_RUNS}"}
    if min(run_medians) <= 0:
        return {"null": "no-inference: a run median is not above 0"}
    logs = [math.log(m) for m in run_medians]
    mean = math.fsum(logs) / n
    variance = math.fsum((x - mean) ** 2 for x in logs) / (n - 1)
    half = _T_975[min(n - 1, len(_T_975)) - 1] * math.sqrt(variance / n)
    return {"low": math.exp(mean - half), "high": math.exp(mean + half)}


def _binomial(k: int, n: int, q: float) -> float:
    log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_ways + k * math.log(q) + (n - k) * math.log1p(-q))


def _variation(ordered: Sequence[float], mean: float) -> float | None:
    """Sample standard deviation over mean; None for one sample or mean 0, where there is none."""
    if len(ordered) < 2 or mean == 0:
        return None
    variance = math.fsum((x - mean) ** 2 for x in ordered) / (len(ordered) - 1)
    return round(math.sqrt(variance) / mean, 6)


def _outlier_distance(deviations: Sequence[float], mad: float) -> float:
    """How far from the median a sample may lie, at most, without being an outlier.

    When more than half of the samples are equal (a coarse clock) the MAD is 0 and the mean absolute deviation
    gives the scale instead, for the same number of standard deviations.
    """
    if mad > 0:
        return OUTLIER * mad
    mean_deviation = math.fsum(deviations) / len(deviations)
    return _OUTLIER_SIGMAS * _SIGMA_PER_MEAN_DEVIATION * mean_deviation


def _outliers(samples: Sequence[float], centre: float, distance: float) -> dict[str, Any]:
    """Flagged, never dropped. `largest` is the largest flagged value; of the indices the first 16."""
    found = [i for i, x in enumerate(samples) if abs(x - centre) > distance]
    largest = max(samples[i] for i in found) if found else None
    return {"count": len(found), "largest": largest, "indices": found[:LISTED_OUTLIERS]}
