import math
import tracemalloc

import numpy as np
import pytest

from mtr_lab.measure.statistics import (
    bootstrap_interval,
    holm,
    lower_bound,
    mcnemar,
    median_interval,
    trials_needed,
    upper_bound,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [
        # Newcombe, Statistics in Medicine 17, 1998, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (8, 10, (0.4902, 0.9433)),
        (1, 1, (0.2065, 1.0)),
    ],
)
def test_wilson_matches_published_values(successes: int, total: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, total) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("total", [1, 7, 50_000])
def test_wilson_reaches_the_ends_exactly(total: int) -> None:
    assert wilson_interval(0, total)[0] == 0.0
    assert wilson_interval(total, total)[1] == 1.0
    assert wilson_interval(0, total)[1] == pytest.approx(1 - wilson_interval(total, total)[0])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_wilson_ends_are_where_the_score_test_turns(level: float) -> None:
    """The defining property: at both ends, |p̂ − p| is z standard errors under p."""
    z = {0.5: 0.674490, 0.9: 1.644854, 0.99: 2.575829}[level]
    for end in wilson_interval(30, 41, level):
        assert abs(30 / 41 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 41), rel=1e-5)


@pytest.mark.parametrize(("successes", "total"), [(0, 8), (5, 100), (30, 1000), (999, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_exact_bound_is_where_counts_up_to_this_have_the_rest_of_the_probability(
    successes: int, total: int, level: float
) -> None:
    """The defining property, with the binomial distribution in whole numbers."""
    bound = upper_bound(successes, total, level)
    terms = (math.comb(total, k) * bound**k * (1 - bound) ** (total - k) for k in range(successes + 1))
    assert math.fsum(terms) == pytest.approx(1 - level, rel=1e-9)
    assert lower_bound(total - successes, total, level) == 1 - bound
    assert bound > wilson_interval(successes, total, level)[0]


def test_the_exact_bound_of_all_and_of_none() -> None:
    assert upper_bound(7, 7) == 1.0
    assert lower_bound(0, 7) == 0.0
    assert upper_bound(0, 7) == pytest.approx(1 - 0.05 ** (1 / 7))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.01, 299), (0.05, 59)])
def test_the_trials_that_a_bound_needs(share: float, expected: int) -> None:
    assert trials_needed(share) == expected
    assert upper_bound(0, expected) <= share < upper_bound(0, expected - 1)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {total}"):
        wilson_interval(successes, total)
    with pytest.raises(ValueError, match=f"{successes} of {total}"):
        upper_bound(successes, total)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_levels_are_fractions(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(np.arange(3.0), level=level)


def test_bootstrap_matches_every_resample_of_a_tiny_sample() -> None:
    values = np.array([0.0, 1.0, 5.0, 2.0, 11.0])
    every = np.stack(np.meshgrid(*[values] * 5)).reshape(5, -1).mean(axis=0)  # all 5⁵ equally likely resamples
    expected = np.quantile(every, [0.05, 0.95])
    assert bootstrap_interval(values, resamples=200_000, level=0.9) == pytest.approx(expected, abs=0.05)


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(3).exponential(size=20_011)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values, resamples=4_000) == pytest.approx(expected, abs=0.06 * half)


def test_bootstrap_follows_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=101)
    assert bootstrap_interval(values) == bootstrap_interval(values.copy())
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


@pytest.mark.parametrize("values", [[0.3], [0.1] * 7, [0.0] * 1000])
def test_bootstrap_of_equal_values_is_that_value(values: list[float]) -> None:
    assert bootstrap_interval(np.array(values)) == (values[0], values[0])


def test_bootstrap_memory_does_not_grow_with_the_resamples() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    tracemalloc.start()
    bootstrap_interval(values, resamples=400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20  # all indices at once would be 76 MiB, the values 153


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((3, 2))])
def test_bootstrap_refuses_what_has_no_mean_over_images(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \(n,\) values"):
        bootstrap_interval(values)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 8), (8, 3), (40, 61)])
def test_mcnemar_is_the_exact_sign_test_of_the_images_that_differ(gained: int, lost: int) -> None:
    first = np.array([0] * gained + [1] * lost + [1, 1, 0])
    second = np.array([1] * gained + [0] * lost + [1, 1, 0])
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_of_many_images() -> None:
    second = np.zeros(20_000)
    second[:10_300] = 1
    z = 600 / math.sqrt(20_000)
    assert mcnemar(1 - second, second) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [6, 9, 50])
def test_the_interval_of_a_median_covers_it_often_enough(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = np.array([median_interval(rng.lognormal(size=n)) for _ in range(4000)])
    covered = np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1))  # the median of exp(z) is 1
    assert covered > 0.94
    assert n < 50 or covered < 0.98


def test_the_interval_of_few_values_spans_them() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert median_interval(np.array([2.0])) == (2.0, 2.0)
