"""Confidence intervals of a figure that is measured on a sample of images."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_DRAWS_AT_ONCE = 1 << 20  # 4 MiB of indices and 8 MiB of values, for any number of images


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion, such as top-1 accuracy.

    It stays inside [0, 1] and keeps its coverage for small ``total`` and for proportions near 0 and 1, unlike the
    normal approximation p ± z·√(p(1 − p)/n).

    Args:
        successes: of ``total`` independent trials.
        total: at least 1.
        level: the probability that such an interval contains the true proportion, 0 < level < 1.

    Returns:
        (lo, hi), fractions; lo is exactly 0 without a success, hi exactly 1 without a failure.

    Raises:
        ValueError: no trials, more successes than trials, or a level outside (0, 1).

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total and total >= 1, got {successes} of {total}")
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    share = successes / total
    centre = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z**2 / total
    # Without failures or successes the formula gives 1 and 0 up to rounding.
    lo = 0.0 if successes == 0 else (centre - half) / scale
    hi = 1.0 if successes == total else (centre + half) / scale
    return lo, hi


def upper_bound(successes: int, total: int, level: float = 0.95) -> float:
    """The exact one-sided upper confidence bound of a proportion.

    Args:
        successes: of ``total`` independent trials.
        total: at least 1.
        level: the probability that such a bound is not below the true proportion, 0 < level < 1; at least this.

    Returns:
        The proportion at which ``successes`` or fewer have the probability 1 - level; exactly 1 without a failure.

    Raises:
        ValueError: no trials, more successes than trials, or a level outside (0, 1).

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26, 1934.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"expected 0 <= successes <= total and total >= 1, got {successes} of {total}")
    tail = 1 - _checked(level)
    if successes == total:
        return 1.0
    counts = np.arange(successes + 1)
    ways = np.array([math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in counts])
    lo, hi = successes / total, 1.0
    while (middle := (lo + hi) / 2) not in (lo, hi):  # until no number lies between them
        terms = ways + counts * math.log(middle) + (total - counts) * math.log1p(-middle)
        probability = float(np.exp(terms).sum())
        lo, hi = (middle, hi) if probability > tail else (lo, middle)
    return hi


def lower_bound(successes: int, total: int, level: float = 0.95) -> float:
    """The exact one-sided lower confidence bound of a proportion; see ``upper_bound``."""
    return 1 - upper_bound(total - successes, total, level)


def trials_needed(share: float, level: float = 0.95) -> int:
    """The fewest trials whose ``upper_bound`` without a success is at most ``share``, in (0, 1)."""
    return math.ceil(math.log(1 - _checked(level)) / math.log1p(-share))


def bootstrap_interval(
    values: np.ndarray, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean, such as the KL divergence averaged over images.

    For per-image differences between two models this is the paired interval of their difference. The interval depends
    on values and seed alone; memory does not grow with ``resamples`` × n.

    Args:
        values: (n,), one number for each image, n at least 1.
        resamples: the number of samples of n images, drawn with replacement.
        seed: of the draws.
        level: the share of resampled means between lo and hi, 0 < level < 1.

    Returns:
        (lo, hi) in the unit of ``values``; if all values are equal, as for a single image, both are that value.

    Raises:
        ValueError: no values, values that are not one-dimensional, no resamples, or a level outside (0, 1).

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or resamples < 1:
        raise ValueError(f"expected (n,) values, n >= 1, and resamples >= 1, got {values.shape} and {resamples}")
    tail = (1 - _checked(level)) / 2
    if np.all(values == values[0]):  # the rounded mean of equal numbers would differ from them
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.empty(resamples)
    rows = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, resamples, rows):
        chunk = means[start : start + rows]
        draws = rng.integers(n, size=(len(chunk), n), dtype=np.int32)
        values[draws].mean(axis=1, out=chunk)
    lo, hi = np.quantile(means, [tail, 1 - tail])
    return float(lo), float(hi)


def median_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of a median between two of the values, from the binomial distribution; no distribution is assumed.

    Args:
        values: (n,), n at least 1. With few values, fewer than 6 at the level 0.95, it ends at the smallest and the
            largest, and its level is lower: 1 - 2 / 2**n.
        level: the probability that such an interval contains the true median, 0 < level < 1; at least this.

    Source: Conover, "Practical Nonparametric Statistics", 3rd edition, section 3.2.
    """
    ordered, n, tail = np.sort(values), len(values), (1 - _checked(level)) / 2
    below, k = 0.5**n, 0  # the probability that at most k values are below the median
    while k + 1 < n - 1 - k and below + math.comb(n, k + 1) * 0.5**n <= tail:
        k += 1
        below += math.comb(n, k) * 0.5**n
    return float(ordered[k]), float(ordered[n - 1 - k])


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact test: the two-sided p-value that two models have the same accuracy.

    Args:
        first, second: (n,) 1 where the model is right, else 0; the same images in the same order.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947; exact, as a sign test of the images on which the models differ.
    """
    gained, lost = int(np.sum(second > first)), int(np.sum(second < first))
    total, term, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):  # binomial coefficients one from another: exact, and fast for 10 000 images
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests: p-values that stay below a level with that probability for all tests.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    order, corrected, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, which in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[which]))
        corrected[which] = largest
    return corrected


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"expected a confidence level between 0 and 1, got {level}")
    return level
