"""Dips, plateaus and subsets: false claims at the stated rate, planted ones found, nothing claimed from one run."""

import math
from typing import Literal

import numpy as np
import pytest

from dpo_ray.curves import Study
from dpo_ray.errors import InputError
from dpo_ray.trends import Trend, less_is_more, trend

SIZES = [100, 200, 400, 800, 1600]
NOISE = 0.01


def study(
    *means: float, num_seeds: int = 6, noise: float = NOISE, seed: int = 0, direction: Literal["max", "min"] = "max"
) -> Study:
    """Normal noise around `means`; a seed moves its whole row by far more, which pairing must cancel."""
    rng = np.random.default_rng(seed)
    values = np.array(means) + rng.normal(0, 0.1, (num_seeds, 1)) + rng.normal(0, noise, (num_seeds, len(means)))
    return Study(np.array(SIZES[: len(means)]), values, direction, None)


def verdicts(result: Trend) -> list[str]:
    return [step.verdict for step in result.steps]


def rate(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_a_flat_curve_shows_a_dip_no_more_often_than_stated():
    """The hardest null: with no gain anywhere every step is as near to a dip as it may be."""
    flat = [trend(study(0.7, 0.7, 0.7, 0.7, 0.7, seed=i), num_resamples=100) for i in range(400)]
    # Three binomial standard errors of 400 at .05 are .033.
    assert rate(["dip" in verdicts(t) for t in flat]) < 0.083
    assert rate(["rise" in verdicts(t) for t in flat]) < 0.083
    # So it is not the threshold of a point that keeps the rate.
    assert 0.01 < rate([min(s.dip_p_value or 0.0 for s in t.steps) < 0.05 for t in flat]) < 0.083


def test_a_planted_dip_is_found():
    """Four points at a paired standard error of .58 points."""
    planted = [
        trend(study(0.60, 0.66, 0.70, 0.66, 0.72, num_seeds=8, noise=0.01, seed=i), num_resamples=100)
        for i in range(100)
    ]
    assert rate([verdicts(t)[2] == "dip" for t in planted]) > 0.95
    assert rate([verdicts(t).count("dip") > 1 for t in planted]) < 0.02
    assert rate([verdicts(t)[0] == verdicts(t)[3] == "rise" for t in planted]) > 0.9


def test_a_sure_fall_below_the_threshold_is_no_dip():
    small = study(0.60, 0.65, 0.643, num_seeds=10, noise=0.0005)
    result = trend(small)
    assert result.steps[1].dip_p_value is not None
    assert result.steps[1].dip_p_value < 1e-6
    assert verdicts(result) == ["rise", "plateau"]
    assert verdicts(trend(small, smallest_change=0.005)) == ["rise", "dip"]
    assert verdicts(trend(small, smallest_change=0.06, delta=0.001)) == ["not distinguishable", "not distinguishable"]


def test_p_values_are_adjusted_over_the_steps():
    """One step of four at p = .026: alone a dip, among four not."""
    step = np.array([0.045, 0.01, 0.0, 0.04, 0.025])
    values = np.full((5, 5), 0.7)
    values[:, 3:] -= step[:, None]
    values += np.linspace(-1e-3, 1e-3, 5)[:, None] * np.array([0, 1, -1, 0, 1])
    alone = trend(Study(np.array([400, 800]), values[:, 2:4], "max", None)).steps[0]
    among = trend(Study(np.array(SIZES), values, "max", None)).steps[2]
    assert alone.dip_p_value is not None
    assert among.dip_p_value is not None
    assert 0.0125 < alone.dip_p_value < 0.05
    assert among.dip_p_value == pytest.approx(4 * alone.dip_p_value)
    assert (alone.verdict, among.verdict) == ("dip", "not distinguishable")


def test_a_planted_plateau_is_found_and_not_before_it_begins():
    curve = (0.55, 0.63, 0.70, 0.70, 0.70)
    found = [trend(study(*curve, num_seeds=8, noise=0.006, seed=i), num_resamples=100) for i in range(150)]
    assert rate([t.plateau_from == 400 for t in found]) > 0.9
    assert verdicts(found[0]) == ["rise", "rise", "plateau", "plateau"]


def test_a_plateau_is_claimed_too_early_no_more_often_than_stated():
    """The size before it lies just delta below: the hardest case."""
    early = []
    for i in range(400):
        result = trend(study(0.60, 0.68, 0.70, 0.70, num_seeds=8, noise=0.004, seed=i), num_resamples=100)
        early.append(result.plateau_from is not None and result.plateau_from < 400)
    assert rate(early) < 0.083


def test_a_plateau_holds_for_all_later_sizes():
    """Level for long and then a jump is none, nor is a slow climb whose every step is small."""
    assert trend(study(0.7, 0.7, 0.7, 0.7, 0.8, noise=0.001)).plateau_from is None
    climb = trend(study(0.650, 0.665, 0.680, 0.695, 0.710, noise=0.0005))
    assert climb.plateau_from == 800
    assert trend(study(0.650, 0.665, 0.680, 0.695, 0.710, noise=0.0005), delta=0.035).plateau_from == 400


def test_with_few_noisy_seeds_nothing_is_distinguishable():
    result = trend(study(0.70, 0.69, 0.70, num_seeds=3, noise=0.03))
    assert verdicts(result) == ["not distinguishable"] * 2
    assert result.plateau_from is None


def test_one_run_per_size_is_untestable():
    one = study(0.6, 0.9, 0.1, 0.1, 0.1, num_seeds=1)
    result = trend(one)
    assert verdicts(result) == ["untestable"] * 4
    assert result.steps[1].difference.estimate == one.values[0, 2] - one.values[0, 1]
    assert result.steps[1].difference[1:] == (-math.inf, math.inf)
    assert (result.plateau_from, result.monotone_low, result.monotone_high) == (None, None, None)
    assert (np.diff(result.monotone) >= 0).all()
    subset = less_is_more(one)
    assert (subset.verdict, subset.smallest, subset.tests[0].p_value) == ("untestable", None, None)
    assert subset.tests[0].difference.estimate == one.values[0, 0] - one.values[0, 4]


def test_the_null_curve_never_gets_worse_and_a_dip_lies_outside_its_band():
    # Of .60 .72 .64 .70 the middle two are pooled to their mean.
    exact = trend(study(0.60, 0.72, 0.64, 0.70, noise=0.0), num_resamples=100)
    means = study(0.60, 0.72, 0.64, 0.70, noise=0.0).values.mean(axis=0)
    assert exact.monotone == pytest.approx([means[0], (means[1] + means[2]) / 2, (means[1] + means[2]) / 2, means[3]])
    rng = np.random.default_rng(0)
    noisy = Study(np.array(SIZES[:4]), np.array([0.60, 0.72, 0.64, 0.70]) + rng.normal(0, 0.01, (8, 4)), "max", None)
    result = trend(noisy)
    assert result.monotone_low is not None
    assert result.monotone_high is not None
    assert (result.monotone_low <= result.monotone).all()
    assert (result.monotone <= result.monotone_high).all()
    assert noisy.values.mean(axis=0)[1] > result.monotone_high[1]
    assert noisy.values.mean(axis=0)[2] < result.monotone_low[2]


def test_a_falling_metric_is_the_mirror_image_of_a_rising_one():
    up = study(0.60, 0.70, 0.65, 0.66, 0.66, num_seeds=8, noise=0.003)
    rising, falling = trend(up), trend(Study(up.sizes, -up.values, "min", None))
    assert verdicts(rising) == verdicts(falling) == ["rise", "dip", "plateau", "plateau"]
    assert falling.monotone == pytest.approx(-rising.monotone)
    assert falling.monotone_low == pytest.approx(-rising.monotone_high)  # type: ignore[operator]
    assert falling.steps[0].difference.estimate == pytest.approx(-rising.steps[0].difference.estimate)
    subset = study(0.50, 0.71, 0.70, noise=0.003)
    assert less_is_more(subset).smallest == less_is_more(Study(subset.sizes, -subset.values, "min", None)).smallest
    assert less_is_more(Study(subset.sizes, subset.values, "min", None)).smallest == 100


def test_the_same_seed_gives_the_same_band():
    noisy = study(0.6, 0.65, 0.63, 0.7)
    first, again, other = (trend(noisy, random_seed=seed, num_resamples=200).monotone_low for seed in (0, 0, 1))
    assert np.array_equal(first, again)  # type: ignore[arg-type]
    assert not np.array_equal(first, other)  # type: ignore[arg-type]


def test_the_smallest_subset_that_is_not_worse_is_named():
    result = less_is_more(study(0.55, 0.70, 0.69, 0.70, num_seeds=8, noise=0.002), margin=0.02)
    assert (result.verdict, result.smallest, result.whole, result.margin) == ("less is more", 200, 800, 0.02)
    assert [test.size for test in result.tests] == [100, 200, 400]
    assert result.tests[0].p_value == pytest.approx(1.0)
    assert result.tests[0].difference.estimate == pytest.approx(-0.15, abs=0.005)


def test_an_unsure_subset_is_not_called_as_good():
    result = less_is_more(study(0.70, 0.70, 0.70, num_seeds=3, noise=0.03))
    assert (result.verdict, result.smallest) == ("not shown", None)


def test_a_subset_worse_by_the_margin_is_named_no_more_often_than_stated():
    """Four subsets, each worse by just the margin."""
    named = [less_is_more(study(*[0.69] * 4, 0.70, seed=i)).smallest is not None for i in range(500)]
    # Three binomial standard errors of 500 at .05 are .029.
    assert rate(named) < 0.079
    assert (
        rate([less_is_more(study(0.6, 0.6, 0.71, 0.7, seed=i, noise=0.004)).smallest == 400 for i in range(100)]) > 0.9
    )


def test_wrong_requests_are_refused():
    good = study(0.6, 0.7)
    for result in (trend, less_is_more):
        with pytest.raises(InputError, match="at least 2"):
            result(study(0.6))  # type: ignore[operator]
        with pytest.raises(InputError, match="significance"):
            result(good, alpha=0.0)  # type: ignore[operator]
    for delta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="delta"):
            trend(good, delta=delta)
        with pytest.raises(InputError, match="margin"):
            less_is_more(good, margin=delta)
    with pytest.raises(InputError, match="threshold"):
        trend(good, smallest_change=-0.01)
