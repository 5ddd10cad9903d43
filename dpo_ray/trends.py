"""Dips, plateaus and "less is more", by test and not by eye. Pure: numpy and scipy, no torch, no file.

With one run per size a dip of a point or two cannot be told from the noise of the seed, so nothing is then claimed.
Comparisons are paired by seed: a seed at two sizes shares its order of the data, its initial weights and its test set.
"""

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from dpo_ray.comparisons import (
    FloatArray,
    Interval,
    bootstrap_bounds,
    equivalence,
    holm,
    p_greater,
    paired_t_test,
    resampled_seeds,
)
from dpo_ray.curves import Study
from dpo_ray.errors import InputError


class Step(NamedTuple):
    """From one size to the next."""

    smaller: int
    larger: int
    difference: Interval
    """Larger less smaller size, in the metric's unit and sign, with Student's interval; unbounded when untestable."""
    dip_p_value: float | None
    """One-sided, that the metric got worse, Holm-adjusted over the steps. None when untestable."""
    rise_p_value: float | None
    """The same that it got better."""
    verdict: Literal["dip", "rise", "plateau", "not distinguishable", "untestable"]


class Trend(NamedTuple):
    """What the tests say of a curve's course."""

    steps: list[Step]
    plateau_from: int | None
    """From this size on the metric stays within delta of its value there."""
    monotone: FloatArray
    """[S], the best curve that never gets worse with more pairs (isotonic regression of the means): the null curve."""
    monotone_low: FloatArray | None
    """[S], its 95 % band over seeds; None with one run per size."""
    monotone_high: FloatArray | None


class SubsetTest(NamedTuple):
    """A subset against all pairs."""

    size: int
    difference: Interval
    """Subset less the whole, in the metric's unit and sign; unbounded when untestable."""
    p_value: float | None
    """One-sided, that the subset is worse by less than the margin, Holm-adjusted over subsets. None when untestable."""


class LessIsMore(NamedTuple):
    """Whether fewer pairs would have done."""

    verdict: Literal["less is more", "not shown", "untestable"]
    smallest: int | None
    """The smallest size that is not worse than all pairs by `margin` or more."""
    whole: int
    """The largest size."""
    margin: float
    tests: list[SubsetTest]


def trend(
    study: Study,
    *,
    smallest_change: float = 0.01,
    delta: float = 0.02,
    alpha: float = 0.05,
    num_resamples: int = 2000,
    random_seed: int = 0,
) -> Trend:
    """Test every step for a dip, and the end of the curve for a plateau.

    A dip is a step whose one-sided paired t-test, Holm-adjusted over the steps, is below `alpha` and whose mean change
    is for the worse by more than `smallest_change`; a rise is its mirror image with an adjustment of its own. A plateau
    starts at a size to which every later one is equivalent within `delta` (TOST). All of them must be, so none needs an
    adjustment (Berger 1982); sizes are tried from the last backwards until one fails, a fixed order in which the chance
    of too early a start stays below `alpha` too. A step that is none of these is not distinguishable from noise.

    Args:
        smallest_change: In the metric's unit; the default is one point of a share.
        delta: Half width of equivalence; the default is two points of a share. For a reward, a tenth of its standard
            deviation over the reference's samples.
        alpha: Probability of any false dip, of any false rise, and of a plateau that is claimed too early, each.
        num_resamples: Of seeds, for the band of the null curve.

    Raises:
        InputError: One size only, a threshold below zero, or `delta` not above it.
    """
    _check(study, alpha)
    if not (0 <= smallest_change < math.inf and 0 < delta < math.inf):
        raise InputError(f"a dip's threshold is 0 or more and delta above 0, got {smallest_change} and {delta}")
    sizes, oriented = study.sizes.tolist(), study.sign * study.values
    num_seeds, num_sizes = oriented.shape
    monotone = _monotone(oriented)
    pairs = list(itertools.pairwise(sizes))
    if num_seeds == 1:
        steps = [
            Step(small, large, _unbounded(study.values[0, i + 1] - study.values[0, i]), None, None, "untestable")
            for i, (small, large) in enumerate(pairs)
        ]
        return Trend(steps, None, study.sign * monotone, None, None)

    columns = list(oriented.T)
    dips = holm([p_greater(before, after) for before, after in itertools.pairwise(columns)])
    rises = holm([p_greater(after, before) for before, after in itertools.pairwise(columns)])
    start = num_sizes - 1
    while start > 0 and all(equivalence(later, columns[start - 1], delta) < alpha for later in columns[start:]):
        start -= 1

    steps = []
    for i, (small, large) in enumerate(pairs):
        change = float((columns[i + 1] - columns[i]).mean())
        verdict: Literal["dip", "rise", "plateau", "not distinguishable"] = "not distinguishable"
        if dips[i] < alpha and -change > smallest_change:
            verdict = "dip"
        elif i >= start:
            verdict = "plateau"
        elif rises[i] < alpha and change > smallest_change:
            verdict = "rise"
        difference = paired_t_test(study.values[:, i + 1].tolist(), study.values[:, i].tolist()).difference
        steps.append(Step(small, large, difference, dips[i], rises[i], verdict))

    drawn = resampled_seeds(num_seeds, num_resamples, random_seed)
    replicates = np.stack([_monotone(oriented[rows]) for rows in drawn])
    low, high = bootstrap_bounds(monotone, replicates, num_seeds, 0.95)
    if study.direction == "min":
        low, high = -high, -low
    plateau_from = sizes[start] if start < num_sizes - 1 else None
    return Trend(steps, plateau_from, study.sign * monotone, low, high)


def less_is_more(study: Study, *, margin: float = 0.01, alpha: float = 0.05) -> LessIsMore:
    """Name the smallest subset that is not worse than all pairs, by one-sided paired tests of non-inferiority.

    Holm's adjustment over the subsets holds the probability of naming any that is worse by `margin` or more below
    `alpha`, also for curves that fall and rise again.

    Args:
        margin: A loss that would not matter, in the metric's unit; the default is one point of a share.

    Raises:
        InputError: One size only, or a margin that is not above zero: equality cannot be shown.
    """
    _check(study, alpha)
    if not 0 < margin < math.inf:
        raise InputError(f"a margin of non-inferiority is above zero, got {margin}")
    *subsets, whole = study.sizes.tolist()
    if len(study.values) == 1:
        differences = study.values[0, :-1] - study.values[0, -1]
        tests = [SubsetTest(size, _unbounded(d), None) for size, d in zip(subsets, differences, strict=True)]
        return LessIsMore("untestable", None, whole, margin, tests)

    *columns, all_pairs = study.values.T
    p_values = holm([p_greater(study.sign * column, study.sign * all_pairs, -margin) for column in columns])
    tests = [
        SubsetTest(size, paired_t_test(column.tolist(), all_pairs.tolist()).difference, p)
        for size, column, p in zip(subsets, columns, p_values, strict=True)
    ]
    smallest = next((size for size, p in zip(subsets, p_values, strict=True) if p < alpha), None)
    return LessIsMore("not shown" if smallest is None else "less is more", smallest, whole, margin, tests)


def _check(study: Study, alpha: float) -> None:
    if len(study.sizes) < 2:
        raise InputError(f"to compare sizes there must be at least 2, got {len(study.sizes)}")
    if not 0 < alpha < 1:
        raise InputError(f"a level of significance lies between 0 and 1, got {alpha}")


def _monotone(values: FloatArray) -> FloatArray:
    """[R, S] -> [S], rising."""
    return np.asarray(isotonic_regression(values.mean(axis=0)).x, dtype=np.float64)


def _unbounded(difference: float) -> Interval:
    return Interval(float(difference), -math.inf, math.inf)
