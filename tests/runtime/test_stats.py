"""Statistics: by hand, against exact integer arithmetic, and by simulated coverage."""

import json
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.runtime import stats

SCHEMA = json.loads((Path(__file__).parents[2] / "schema" / "result.v1.json").read_text())
TIMES = st.lists(st.floats(0, 1e7), min_size=1, max_size=400)


def test_percentiles_are_nearest_rank() -> None:
    """By hand: of 15 20 35 40 50, p5 is 15, p30 and p40 are 20, p50 is 35, p100 is 50."""
    ordered = [15.0, 20.0, 35.0, 40.0, 50.0]

    found = [stats.percentile(ordered, p) for p in (5, 30, 40, 50, 100)]

    assert found == [15.0, 20.0, 20.0, 35.0, 50.0]


@pytest.mark.parametrize(("n", "percent", "rank"), [(20, 95, 19), (100, 99, 99), (64, 90, 58), (1, 99, 1)])
def test_a_percentile_that_falls_on_a_sample_is_that_sample(n: int, percent: int, rank: int) -> None:
    """ceil(0.95 * 20) is 19: rounding of floats must not make it 20."""
    assert rank == stats.percentile(range(1, n + 1), percent)


def exact_ranks(n: int, percent: int) -> tuple[int, int] | None:
    """order_ranks in integers: tails as numerators over 100**n, each at most 25/1000 of it."""
    mass = [math.comb(n, k) * percent**k * (100 - percent) ** (n - k) for k in range(n + 1)]
    limit = 100**n // 40
    low, below = 0, 0
    while below + mass[low] <= limit:
        below += mass[low]
        low += 1
    high, above = n + 1, 0
    while above + mass[high - 1] <= limit:
        high -= 1
        above += mass[high]
    return (low, high) if low >= 1 and high <= n else None


@pytest.mark.parametrize("percent", stats.PERCENTILES)
def test_interval_ranks_equal_exact_integer_arithmetic(percent: int) -> None:
    """Every n up to 120, then the sample sizes in use: no rounding decides a rank."""
    for n in [*range(1, 121), 192, 256, 367, 368, 448, 512, 1024]:
        assert exact_ranks(n, percent) == stats.order_ranks(n, percent), n


@pytest.mark.parametrize(("percent", "least"), [(50, 6), (90, 36), (95, 72), (99, 368)])
def test_an_interval_needs_its_least_number_of_samples(percent: int, least: int) -> None:
    """Equal-tailed minima: 0.5^6, 0.9^36, 0.95^72 and 0.99^368 are the first powers below 2.5 %."""
    assert least == stats.smallest_n(percent)
    assert stats.order_ranks(least, percent) is not None
    assert stats.order_ranks(least - 1, percent) is None
    interval = stats.quantile_interval([1.0] * (least - 1), percent)
    assert interval == {"null": f"{least - 1} samples; an interval of p{percent} needs {least}"}


@pytest.mark.parametrize(
    ("n", "percent", "expected"),
    [
        (6, 50, (1, 6)),
        (25, 50, (8, 18)),  # the two-sided 5 % sign test with n = 25 rejects up to 7
        (448, 99, (439, 448)),  # up to the maximum
        (2048, 50, (980, 1069)),  # 47.9 % to 52.2 %
        (2048, 99, (2018, 2037)),  # 98.5 % to 99.5 %
    ],
)
def test_interval_ranks_of_known_sizes(n: int, percent: int, expected: tuple[int, int]) -> None:
    """Order statistics that bound the percentile at 95 %, equal-tailed."""
    assert expected == stats.order_ranks(n, percent)


@pytest.mark.parametrize(("percent", "n"), [(50, 64), (90, 64), (95, 100), (99, 400)])
def test_the_interval_covers_the_true_quantile_as_often_as_it_says(percent: int, n: int) -> None:
    """1000 seeded exponential samples: each side misses 2.5 % plus three standard errors at most."""
    generator = random.Random(percent)
    truth = -math.log(1 - percent / 100)
    misses_below = misses_above = 0
    low, high = stats.order_ranks(n, percent) or (0, 0)
    for _ in range(1000):
        ordered = sorted(generator.expovariate(1.0) for _ in range(n))
        misses_below += ordered[low - 1] > truth
        misses_above += ordered[high - 1] < truth

    error = math.sqrt(0.025 * 0.975 / 1000)
    assert misses_below / 1000 < 0.025 + 3 * error
    assert misses_above / 1000 < 0.025 + 3 * error
    assert misses_below + misses_above > 0  # an interval that never misses is no 95 % interval


@settings(max_examples=60, deadline=None)
@given(TIMES)
def test_a_summary_is_ordered_contains_its_estimates_and_fits_the_schema(samples: list[float]) -> None:
    """min <= p50 <= p90 <= p95 <= p99 <= max, each interval round its percentile, and valid as `stats`."""
    found = stats.summarise(samples)

    line = [found[name] for name in ("min", "p50", "p90", "p95", "p99", "max")]
    assert all(a <= b for a, b in pairwise(line))
    assert found["min"] - 1e-3 <= found["mean"] <= found["max"] + 1e-3
    for name, interval in found["intervals"].items():
        assert "null" in interval or interval["low"] <= found[name] <= interval["high"]
    schema = {"$ref": "#/$defs/stats", "$defs": SCHEMA["$defs"]}
    jsonschema_rs.validator_for(schema).validate(found)


@settings(max_examples=60, deadline=None)
@given(TIMES, st.randoms(use_true_random=False))
def test_a_summary_does_not_depend_on_the_order_but_for_the_indices(
    samples: list[float], generator: random.Random
) -> None:
    """Statistics are of the set of samples; outlier indices point into the series."""
    shuffled = list(samples)
    generator.shuffle(shuffled)

    a, b = stats.summarise(samples), stats.summarise(shuffled)

    a["outliers"].pop("indices")
    b["outliers"].pop("indices")
    assert a == b


def test_the_summary_of_eight_samples_is_the_one_worked_out_by_hand() -> None:
    """Nearest rank 4 is 4; deviations 0 0 1 1 1 2 3 36, so MAD 1; mean 64/8; sd sqrt(1184/7)."""
    found = stats.summarise([3, 1, 2, 40, 5, 4, 5, 4])

    deviations = [5, 7, 6, 32, 3, 4, 3, 4]
    assert found == {
        "n": 8,
        "min": 1,
        "p50": 4,
        "p90": 40,
        "p95": 40,
        "p99": 40,
        "max": 40,
        "mean": 8.0,
        "mad": 1,
        "cv": round(math.sqrt(sum(d * d for d in deviations) / 7) / 8, 6),
        "intervals": {
            "p50": {"low": 1, "high": 40},
            "p90": {"null": "8 samples; an interval of p90 needs 36"},
            "p95": {"null": "8 samples; an interval of p95 needs 72"},
            "p99": {"null": "8 samples; an interval of p99 needs 368"},
        },
        "outliers": {"count": 1, "largest": 40, "indices": [3]},
    }


def test_outliers_are_flagged_beyond_ten_sigma_and_never_dropped() -> None:
    """MAD 1 round 100: 114.8 is inside 14.826, 114.9 and 85.1 are outside, and all of them count in n."""
    samples = [99.0, 100.0, 101.0] * 20 + [114.8, 114.9, 85.1]

    found = stats.summarise(samples)

    assert found["outliers"] == {"count": 2, "largest": 114.9, "indices": [61, 62]}
    assert (found["n"], found["min"], found["max"]) == (63, 85.1, 114.9)


def test_only_the_first_sixteen_outliers_are_listed() -> None:
    """The count is of all of them."""
    samples = [1.0, 1.1, 0.9] * 40 + [50.0 + i for i in range(20)]

    outliers = stats.summarise(samples)["outliers"]

    assert (20, 69.0, list(range(120, 136))) == (
        outliers["count"],
        outliers["largest"],
        outliers["indices"],
    )


def test_a_coarse_clock_gives_outliers_without_a_mad() -> None:
    """MAD 0: the mean absolute deviation is the scale. A 9 among 63 fives is flagged, frequent 5.5 is not."""
    assert stats.summarise([5.0] * 63 + [9.0])["outliers"] == {"count": 1, "largest": 9.0, "indices": [63]}
    assert stats.summarise([5.0] * 44 + [5.5] * 20)["outliers"]["count"] == 0
    assert stats.summarise([5.0] * 64)["outliers"] == {"count": 0, "largest": None, "indices": []}


def test_a_difference_in_the_last_bit_is_not_an_outlier() -> None:
    """Times are compared at the nanosecond they are published at."""
    assert stats.summarise([0.3] * 63 + [0.1 + 0.2])["outliers"]["count"] == 0


def test_cv_is_null_where_there_is_none() -> None:
    """A spread of zero everywhere has mean 0; a single sample has no deviation."""
    assert stats.summarise([0.0] * 10)["cv"] is None
    assert stats.summarise([7.0])["cv"] is None
    assert stats.summarise([7.0, 7.0])["cv"] == 0.0


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_no_samples_or_a_nan_is_refused(samples: list[float]) -> None:
    """An empty result is an error, not a zero."""
    with pytest.raises(ValueError, match="sample"):
        stats.summarise(samples)


def test_values_are_rounded_to_the_nanosecond() -> None:
    """Three decimals of a microsecond."""
    assert stats.rounded(12.3456789) == 12.346
    assert stats.summarise([1.00049, 1.0006])["max"] == 1.001


def test_ranks_are_reduced_within_each_iteration() -> None:
    """Four ranks, three iterations, by hand; the median of an even number is the mean of the middle two."""
    per_rank = [[1.0, 8.0, 5.0], [2.0, 6.0, 5.0], [9.0, 7.0, 5.0], [4.0, 1.0, 5.0]]

    assert stats.reduce_ranks(per_rank) == {
        "max": [9.0, 8.0, 5.0],
        "median": [3.0, 6.5, 5.0],
        "min": [1.0, 1.0, 5.0],
        "spread": [8.0, 7.0, 0.0],
    }


@pytest.mark.parametrize(("per_rank", "median"), [([[3.0, 1.0]], [3.0, 1.0]), ([[1.0], [5.0], [2.0]], [2.0])])
def test_an_odd_number_of_ranks_has_a_middle_one(per_rank: list[list[float]], median: list[float]) -> None:
    """One rank is its own maximum, median and minimum."""
    assert median == stats.reduce_ranks(per_rank)["median"]


@pytest.mark.parametrize("per_rank", [[], [[1.0, 2.0], [1.0]]])
def test_series_of_unequal_length_are_refused(per_rank: list[list[float]]) -> None:
    """Iteration i of one rank must be iteration i of all."""
    with pytest.raises(ValueError, match="different lengths"):
        stats.reduce_ranks(per_rank)


def test_a_series_that_still_warms_up_is_not_settled() -> None:
    """Late over early by hand: 10 10 9 | 5 5 9 is 5/10 - 1; 2 % is the limit, in both directions."""
    assert stats.late_over_early([10, 10, 9, 5, 5, 9]) == pytest.approx(-0.5)
    assert stats.late_over_early([100.0, 0.0, 102.0]) == pytest.approx(0.02)
    assert stats.settled([100.0] * 8 + [101.9] * 8)
    assert not stats.settled([100.0] * 8 + [102.1] * 8)
    assert not stats.settled([102.1] * 8 + [100.0] * 8)


def test_noise_alone_does_not_make_a_series_unsettled() -> None:
    """Halves of 32 samples with sigma 10 %: a 4 % gap of medians is within three standard errors (9.4 %), a
    20 % gap is not."""
    noise = [math.sin(12.9898 * i) * 14.0 for i in range(32)]
    early = [100.0 + x for x in noise]

    assert stats.settled(early + [104.0 + x for x in noise])
    assert not stats.settled(early + [120.0 + x for x in noise])


def test_the_settling_check_of_a_clock_that_stands_still_is_finite() -> None:
    """Zeros and single samples end in a number that JSON can hold."""
    assert stats.late_over_early([0.0, 0.0]) == 0.0
    assert stats.late_over_early([0.0, 5.0]) == pytest.approx(5000)
    assert stats.late_over_early([3.0]) == stats.late_over_early([]) == 0.0


@pytest.mark.parametrize("df", range(1, 31))
def test_the_table_of_t_leaves_two_and_a_half_percent(df: int) -> None:
    """Simpson's rule over the density of Student's t from 0 to the tabled value gives 0.475."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t, steps = stats._T_975[df - 1], 2000
    density = [scale * (1 + (i * t / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])) * t / steps / 3

    assert area == pytest.approx(0.475, abs=6e-5)


def test_the_interval_over_three_runs_is_the_one_worked_out_by_hand() -> None:
    """Medians 10, 10 e, 10 e^2: mean log is log 10 + 1, sd 1, half width 4.303 / sqrt(3)."""
    medians = [10.0, 10 * math.e, 10 * math.e**2]

    half = 4.303 / math.sqrt(3)
    assert stats.run_centre(medians) == pytest.approx(10 * math.e)
    assert stats.run_interval(medians) == {
        "low": pytest.approx(10 * math.exp(1 - half)),
        "high": pytest.approx(10 * math.exp(1 + half)),
    }


@pytest.mark.parametrize("medians", [[], [5.0], [5.0, 5.1], [5.0, 5.1, 0.0]])
def test_fewer_than_three_runs_give_no_inference(medians: list[float]) -> None:
    """The reason stands where the interval would."""
    assert stats.run_interval(medians)["null"].startswith("no-inference: ")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e7), min_size=3, max_size=40))
def test_the_run_interval_contains_its_centre(medians: list[float]) -> None:
    """For any number of runs, beyond the 30 degrees of freedom of the table too."""
    interval = stats.run_interval(medians)

    assert interval["low"] <= stats.run_centre(medians) <= interval["high"]


def test_the_run_interval_covers_the_true_median_as_often_as_it_says() -> None:
    """2000 seeded sets of five log-normal runs: covered 95 % within three standard errors."""
    generator = random.Random(5)
    covered = 0
    for _ in range(2000):
        found = stats.run_interval([math.exp(generator.gauss(3, 0.01)) for _ in range(5)])
        covered += found["low"] <= math.exp(3) <= found["high"]

    assert abs(covered / 2000 - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_summary_of_four_thousand_samples_takes_milliseconds() -> None:
    """Ten thousand files are summarised in seconds: nothing here is quadratic, ranks are cached."""
    samples = [float(i * 7919 % 4093) for i in range(4096)]
    stats.summarise(samples)

    began = time.process_time()
    stats.summarise(samples)

    assert time.process_time() - began < 0.1
