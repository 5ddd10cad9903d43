"""Paired comparisons against scipy, worked values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from dpo_ray.comparisons import equivalence, holm, mean_interval, p_greater, paired_bootstrap, paired_t_test
from dpo_ray.errors import InputError

ONE = [0.61, 0.66, 0.70, 0.58, 0.64]
TWO = [0.60, 0.61, 0.66, 0.59, 0.60]
WEAK = pytest.mark.parametrize("num_seeds", [3, 5])


def test_the_t_test_is_scipys():
    test = paired_t_test(ONE, TWO)
    theirs = stats.ttest_rel(ONE, TWO)
    assert test.p_value == pytest.approx(theirs.pvalue, rel=1e-12)
    assert tuple(test.difference[1:]) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-12)
    assert test.difference.estimate == pytest.approx(0.026)
    narrow = paired_t_test(ONE, TWO, level=0.5).difference
    assert tuple(narrow[1:]) == pytest.approx(tuple(theirs.confidence_interval(0.5)), rel=1e-12)


def test_the_interval_of_a_mean_is_scipys():
    expected = stats.t.interval(0.9, 4, np.mean(ONE), stats.sem(ONE))
    interval = mean_interval(ONE, level=0.9)
    assert tuple(interval) == pytest.approx((0.638, *expected), rel=1e-12)
    for wrong in ([0.5], [0.5, math.nan], [[0.5, 0.6]]):
        with pytest.raises(InputError, match="at least 2 finite"):
            mean_interval(wrong)


@pytest.mark.parametrize("margin", [-0.02, 0.0, 0.01])
def test_the_one_sided_test_is_scipys_about_the_margin(margin: float):
    expected = stats.ttest_1samp(np.subtract(ONE, TWO), margin, alternative="greater").pvalue
    assert p_greater(ONE, TWO, margin) == pytest.approx(expected, rel=1e-12)


def test_equivalence_is_the_worse_of_two_one_sided_tests():
    differences = np.subtract(ONE, TWO)
    above = stats.ttest_1samp(differences, -0.06, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.06, alternative="less").pvalue
    assert equivalence(ONE, TWO, 0.06) == pytest.approx(max(above, below), rel=1e-12)
    assert equivalence(TWO, ONE, 0.06) == pytest.approx(equivalence(ONE, TWO, 0.06), rel=1e-12)
    assert equivalence(ONE, TWO, 0.01) > 0.5


def test_the_sign_test_leaves_ties_out():
    test = paired_t_test([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [0.0, 1.5, 2.0, 3.5, 5.0, 9.5])
    assert (test.wins, test.losses, test.ties) == (4, 1, 1)
    # Four or more of five either way: 2 (5 + 1) / 2**5.
    assert test.sign_p_value == pytest.approx(12 / 32)


def test_equal_differences_are_no_certainty():
    """Coarse shares of few seeds often differ by the same step; an infinite t statistic would call that proof."""
    assert p_greater([0.7, 0.8], [0.5, 0.6]) == 0.25
    assert p_greater([0.5, 0.6], [0.7, 0.8]) == 1.0
    assert paired_t_test([0.7, 0.8], [0.5, 0.6]).p_value == 0.5
    same = paired_t_test([0.5, 0.6], [0.5, 0.6])
    assert (same.p_value, same.sign_p_value, same.ties) == (1.0, 1.0, 2)
    assert equivalence([0.5, 0.6, 0.4], [0.5, 0.6, 0.4], 0.01) == 0.125


def test_holm_against_values_worked_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and none below one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.3, 0.6]) == pytest.approx([0.6, 0.6])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_holds_the_family_wise_rate_where_single_tests_do_not():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(2000, 6))
    assert 0.2 < (p < 0.05).any(axis=1).mean() < 0.32
    assert np.mean([min(holm(list(row))) < 0.05 for row in p]) < 0.065


@WEAK
def test_a_bootstrap_interval_of_few_seeds_covers_as_stated(num_seeds: int):
    """A plain percentile interval of three covers three times in four."""
    rng = np.random.default_rng(num_seeds)
    covered = 0
    for _ in range(400):
        seed = rng.normal(0, 0.1, num_seeds)  # cancels: the same on both sides
        one, two = 0.03 + seed + rng.normal(0, 0.01, num_seeds), seed
        interval = paired_bootstrap(one, two, num_resamples=500)
        assert interval.low <= interval.estimate <= interval.high
        covered += interval.low <= 0.03 <= interval.high
    # Four binomial standard errors of 400 at .95 are .044.
    assert 0.906 < covered / 400 < 0.994


def test_a_bootstrap_is_students_interval_where_seeds_are_many_and_normal():
    rng = np.random.default_rng(1)
    one, two = rng.normal(0.5, 0.1, 60), rng.normal(0.4, 0.1, 60)
    ours, student = paired_bootstrap(one, two, num_resamples=20_000), paired_t_test(one, two).difference
    assert ours.high - ours.low == pytest.approx(student.high - student.low, rel=0.05)
    assert ours.estimate == pytest.approx(student.estimate)


def test_a_bootstrap_is_the_same_every_time_and_another_with_another_seed():
    assert paired_bootstrap(ONE, TWO) == paired_bootstrap(ONE, TWO)
    assert paired_bootstrap(ONE, TWO, num_resamples=100) != paired_bootstrap(ONE, TWO, num_resamples=100, random_seed=1)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([0.1, 0.2], [0.1, 0.2, 0.3], "same seeds"),
        ([0.1], [0.2], "at least 2 seeds"),
        ([0.1, math.nan], [0.1, 0.2], "finite"),
        ([[0.1, 0.2]], [[0.1, 0.2]], "same seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(first: list[float], second: list[float], says: str):
    for compare in (paired_t_test, p_greater, paired_bootstrap, lambda one, two: equivalence(one, two, 0.1)):
        with pytest.raises(InputError, match=says):
            compare(first, second)


def test_wrong_margins_levels_and_p_values_are_refused():
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="above zero"):
            equivalence(ONE, TWO, delta)
    with pytest.raises(InputError, match="margin"):
        p_greater(ONE, TWO, math.inf)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(InputError, match="level"):
            paired_t_test(ONE, TWO, level=level)
    with pytest.raises(InputError, match="100 resamples"):
        paired_bootstrap(ONE, TWO, num_resamples=10)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="between 0 and 1"):
            holm([0.5, wrong])
