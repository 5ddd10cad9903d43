"""Is a difference real? Paired tests and intervals over seeds. Pure: numpy and scipy, no torch, no file.

R is the number of seeds. `first[i]` and `second[i]` are one metric under the same seed, so what a seed does to both
cancels (common random numbers). Nothing here knows which way a metric is better: the caller orients it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import binomtest

from dpo_ray.errors import InputError

FloatArray = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its confidence interval, in the metric's unit."""

    estimate: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """Mean of `first` less mean of `second`, and two tests that it is zero."""

    difference: Interval
    """With Student's interval."""
    p_value: float
    """Two-sided paired t-test."""
    sign_p_value: float
    """Two-sided sign test; it holds whatever the distribution of the differences."""
    wins: int
    """Seeds under which `first` is the larger."""
    losses: int
    ties: int


def paired_t_test(first: Sequence[float], second: Sequence[float], *, level: float = 0.95) -> PairedTest:
    """Student's paired t-test and interval, with the exact sign test (Dixon & Mood 1946; ties are left out).

    Args:
        first: [R], at least two seeds.
        second: [R], of the same seeds in the same order.
        level: Of the interval, in (0, 1).

    Raises:
        InputError: Other lengths, fewer than two seeds, or a value that is not finite.
    """
    one, two = paired(first, second)
    differences = one - two
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    decided = wins + losses
    return PairedTest(
        mean_interval(differences, level=level),
        min(1.0, 2 * min(p_greater(one, two), p_greater(two, one))),
        float(binomtest(wins, decided).pvalue) if decided else 1.0,
        wins,
        losses,
        len(one) - decided,
    )


def mean_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean of `values`, one per seed, with Student's interval.

    Raises:
        InputError: Fewer than two values, one that is not finite, or a level outside (0, 1).
    """
    seen = np.asarray(values, dtype=np.float64)
    if seen.ndim != 1 or len(seen) < 2 or not np.isfinite(seen).all():
        raise InputError(f"an interval of a mean needs at least 2 finite values, got {seen.tolist()}")
    mean, half = float(seen.mean()), _standard_error(seen) * _student(len(seen), level)
    return Interval(mean, mean - half, mean + half)


def p_greater(first: npt.ArrayLike, second: npt.ArrayLike, margin: float = 0.0) -> float:
    """One-sided paired t-test that the mean of `first` exceeds that of `second` by more than `margin`.

    A negative margin makes it a test of non-inferiority: `first` is worse by less than `-margin`. Where every seed has
    the same difference, as coarse shares of few seeds may, the t statistic is infinite and says nothing; the sign test
    stands in, 2**-R at best.

    Raises:
        InputError: As `paired_t_test`, or a margin that is not finite.
    """
    one, two = paired(first, second)
    if not math.isfinite(margin):
        raise InputError(f"a margin is a number, got {margin}")
    excess = one - two - margin
    error = _standard_error(excess)
    # Below this a spread is rounding: the differences of equal decimals differ in their last bits.
    rounding = 1e-12 * max(float(np.abs(one).max()), float(np.abs(two).max()))
    if error <= rounding:
        return 0.5 ** len(one) if excess.mean() > rounding else 1.0
    return float(stdtr(len(one) - 1, -excess.mean() / error))


def equivalence(first: npt.ArrayLike, second: npt.ArrayLike, delta: float) -> float:
    """p of two one-sided tests (TOST, Schuirmann 1987) that the two means differ by less than `delta` either way.

    Raises:
        InputError: As `p_greater`, or `delta` is not above zero.
    """
    if not delta > 0:
        raise InputError(f"an equivalence margin is above zero, got {delta}")
    return max(p_greater(first, second, -delta), p_greater(second, first, -delta))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that rejecting those below alpha makes any false claim with probability at most alpha.

    Holm 1979, "A simple sequentially rejective multiple test procedure": the i-th smallest of m is multiplied by
    m - i + 1, and none may be smaller than one before it. It asks nothing of how the tests depend on one another.

    Raises:
        InputError: A value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values lie between 0 and 1, got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(first) - mean(second), resampling seeds and keeping each one's two values together.

    Raises:
        InputError: As `paired_t_test`.
    """
    one, two = paired(first, second)
    differences = one - two
    replicates = differences[resampled_seeds(len(one), num_resamples, random_seed)].mean(axis=1)
    estimate = differences.mean()
    low, high = bootstrap_bounds(estimate, replicates, len(one), level)
    return Interval(float(estimate), float(low), float(high))


def resampled_seeds(num_seeds: int, num_resamples: int, random_seed: int) -> npt.NDArray[np.int64]:
    """Indices of seeds drawn with replacement, [num_resamples, R]; the same at every call.

    Raises:
        InputError: Fewer than 100 resamples, of which the tails cannot be read.
    """
    if num_resamples < 100:
        raise InputError(f"an interval needs at least 100 resamples, got {num_resamples}")
    return np.random.default_rng(random_seed).integers(num_seeds, size=(num_resamples, num_seeds))


def bootstrap_bounds(
    estimate: npt.ArrayLike, replicates: FloatArray, num_seeds: int, level: float
) -> tuple[FloatArray, FloatArray]:
    """Percentile interval, widened so that for a mean it is as wide as Student's.

    Resampling R seeds underestimates a variance by (R - 1) / R and takes the normal quantile where Student's is due
    (Hesterberg 2014, arXiv:1411.5279); of three seeds the plain interval covers about 75 % for 95 %. Both
    factors are put on the distance from the estimate, which the interval always contains.

    Args:
        estimate: [...], of all seeds.
        replicates: [B, ...], of each resample.
        num_seeds: R, at least two.
        level: In (0, 1).

    Returns:
        Lower and upper bounds, [...] each.
    """
    tail = (1 - level) / 2
    widened = math.sqrt(num_seeds / (num_seeds - 1)) * _student(num_seeds, level) / -float(ndtri(tail))
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    centre = np.asarray(estimate, dtype=np.float64)
    return centre + widened * np.minimum(low - centre, 0.0), centre + widened * np.maximum(high - centre, 0.0)


def paired(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 [R].

    Raises:
        InputError: Other lengths, fewer than two seeds, or a value that is not finite.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 1 or one.shape != two.shape:
        raise InputError(f"a paired comparison needs the same seeds on both sides, got {one.shape} and {two.shape}")
    if len(one) < 2:
        raise InputError(f"a paired comparison needs at least 2 seeds, got {len(one)}")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise InputError("a paired comparison needs finite values")
    return one, two


def _standard_error(differences: FloatArray) -> float:
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _student(num_seeds: int, level: float) -> float:
    """Two-sided quantile of Student's t with R - 1 degrees of freedom.

    Raises:
        InputError: The level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    return -float(stdtrit(num_seeds - 1, (1 - level) / 2))
