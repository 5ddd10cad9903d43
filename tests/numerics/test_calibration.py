"""Calibration against known truth: calibrated margins show no error, scaled ones the error that the integral gives."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from dpo_ray.errors import InputError
from dpo_ray.evaluate.calibration import (
    TEMPERATURES,
    calibrating_temperature,
    calibration,
    length_controlled_accuracy,
)
from dpo_ray.metrics import wilson_interval

Floats = NDArray[np.float64]
SPREAD = 1.5
"""Standard deviation of the true logits."""


def margins(generator: np.random.Generator, num_pairs: int, temperature: float) -> Floats:
    """Margins that are `temperature` times the logits by which labels were drawn."""
    logits = generator.normal(0, SPREAD, size=num_pairs)
    return temperature * np.where(generator.random(num_pairs) < expit(logits), logits, -logits)


def expected(value: Callable[[float], float]) -> float:
    """Mean of a function of the true logit."""
    return float(quad(lambda z: value(z) * norm.pdf(z, scale=SPREAD), -12, 12, points=[0])[0])


def true_error(temperature: float) -> float:
    return math.sqrt(expected(lambda z: float(expit(temperature * abs(z)) - expit(abs(z))) ** 2))


def test_worked_by_hand():
    # One bin: confidence 0.75 throughout, 12 of 20 right; gaps of 0.75 less 1 or 0 have variance 0.24 * 20 / 19.
    found = calibration([math.log(3)] * 12 + [-math.log(3)] * 8)
    (only,) = found.bins
    assert only.num_pairs == 20
    assert only.confidence == pytest.approx(0.75)
    assert only.accuracy == pytest.approx((0.6, *wilson_interval(0.6, 20)))
    variance = 0.24 / 19
    assert found.error.estimate == pytest.approx(math.sqrt(0.15**2 - variance))
    # The bounds u solve (estimate - u)^2 = z^2 (4 u s^2 + 2 s^4); the lower one is below 0.
    square, spread = found.error.high**2, 1.959963984540054**2 * variance
    assert (square - found.error.estimate**2) ** 2 == pytest.approx(spread * (4 * square + 2 * variance))
    assert found.error.low == 0
    assert found.ece == pytest.approx(0.15)
    assert found.ece_if_calibrated == pytest.approx(math.sqrt(2 / math.pi * 0.75 * 0.25 / 20))
    assert found.brier.estimate == pytest.approx((12 * 0.25**2 + 8 * 0.75**2) / 20)
    assert found.temperature == pytest.approx(math.log(3) / math.log(1.5), rel=1e-5)


def test_bins_have_equal_counts_in_the_order_of_confidence():
    found = calibration(margins(np.random.default_rng(0), 310, 1.0), num_bins=15)
    assert [b.num_pairs for b in found.bins] == [21] * 10 + [20] * 5
    confidences = [b.confidence for b in found.bins]
    assert confidences == sorted(confidences)
    assert 0.5 <= confidences[0] < 0.55
    assert len(calibration(margins(np.random.default_rng(0), 90, 1.0)).bins) == 4


def test_calibrated_margins_show_no_error():
    """The plain error is all noise and says so; the corrected one is zero about as often as not."""
    generator = np.random.default_rng(0)
    found = [calibration(margins(generator, 400, 1.0)) for _ in range(500)]
    assert np.mean([f.error.low == 0 for f in found]) == pytest.approx(0.95, abs=0.025)
    assert 0.4 < np.mean([f.error.estimate == 0 for f in found]) < 0.65
    plain = np.mean([f.ece for f in found])
    assert plain > 0.06
    assert plain == pytest.approx(np.mean([f.ece_if_calibrated for f in found]), rel=0.03)
    assert np.median([f.temperature for f in found]) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0])
def test_scaled_margins_have_the_error_of_the_integral(temperature: float):
    found = calibration(margins(np.random.default_rng(1), 100_000, temperature), num_bins=50)
    assert found.error.estimate == pytest.approx(true_error(temperature), abs=0.006)
    assert found.error.low <= true_error(temperature) <= found.error.high
    assert found.temperature == pytest.approx(temperature, rel=0.03)
    brier = expected(lambda z: float(expit(z) * expit(-temperature * z) ** 2 + expit(-z) * expit(temperature * z) ** 2))
    assert found.brier.low <= brier <= found.brier.high
    too_sure = [b.confidence > b.accuracy.estimate for b in found.bins[10:]]
    assert all(too_sure) if temperature > 1 else not any(too_sure)


@pytest.mark.parametrize("temperature", [0.5, 1.4, 2.5])
@pytest.mark.parametrize("num_pairs", [300, 1000])
def test_the_interval_of_the_error_covers(num_pairs: int, temperature: float):
    generator = np.random.default_rng(num_pairs)
    truth = true_error(temperature)
    found = [calibration(margins(generator, num_pairs, temperature)).error for _ in range(600)]
    assert 0.93 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.98


def test_margins_of_the_first_step_are_a_coin():
    found = calibration(np.zeros(40))
    assert found.error == (0, 0, 0)
    assert found.brier == (0.25, 0.25, 0.25)
    assert found.temperature == 1
    assert [b.accuracy.estimate for b in found.bins] == [0.5, 0.5]


def test_no_temperature_calibrates_what_is_always_right_or_always_wrong():
    assert calibrating_temperature([0.5, 2.0, 3.0]) == pytest.approx(TEMPERATURES[0], rel=0.2)
    assert calibrating_temperature([-0.5, -2.0, 1.0]) == pytest.approx(TEMPERATURES[1], rel=0.2)


def test_extreme_margins_stay_finite():
    found = calibration(np.tile([1e4, -1e4, 800.0, 1e-300], 10))
    assert np.isfinite([*found.error, *found.brier, found.ece, found.temperature]).all()
    assert found.bins[-1].confidence == 1


@pytest.mark.parametrize(
    ("wrong", "num_bins", "message"),
    [
        ([0.1] * 19, 15, r"at least 20 pairs, got \[19\]"),
        ([0.1] * 20 + [math.nan], 15, "margin of row 21 is not a finite number"),
        ([0.1] * 20, 0, "at least 1 bin, got 0"),
    ],
)
def test_wrong_margins_are_refused(wrong: list[float], num_bins: int, message: str):
    with pytest.raises(InputError, match=message):
        calibration(wrong, num_bins=num_bins)


# Accuracy apart from length


def test_a_reward_of_length_alone_knows_nothing():
    generator = np.random.default_rng(0)
    longer = generator.normal(80, 150, size=4000)  # chosen responses are longer in 70 % of pairs
    found = length_controlled_accuracy(longer + generator.normal(0, 40, size=4000), longer)
    assert np.mean(longer > 0) > 0.68
    assert found.low <= 0.5 <= found.high
    assert found.high - found.low < 0.1


def test_a_reward_that_ignores_length_keeps_its_accuracy():
    generator = np.random.default_rng(1)
    seen = generator.normal(0.5, 1, size=4000)
    found = length_controlled_accuracy(seen, generator.normal(80, 150, size=4000))
    assert found.estimate == pytest.approx(np.mean(seen > 0), abs=0.015)


def test_the_interval_of_a_length_controlled_accuracy_covers():
    generator = np.random.default_rng(2)
    truth, covered = expit(0.8), 0
    for _ in range(500):
        longer = generator.normal(80, 150, size=300)
        right = generator.random(300) < expit(0.8 + 1.2 * np.tanh(longer / 150))
        found = length_controlled_accuracy(np.where(right, 1.0, -1.0) * generator.exponential(size=300), longer)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 500 <= 0.975


def test_pairs_of_one_prompt_are_one_observation():
    seen, longer = np.random.default_rng(3).normal(0.5, 1, size=(2, 100))
    once = length_controlled_accuracy(seen, longer)
    prompts = np.tile(np.arange(100).astype(str), 3)
    assert length_controlled_accuracy(np.tile(seen, 3), np.tile(longer, 3), prompts) == pytest.approx(once, abs=2e-3)
    assert length_controlled_accuracy(np.tile(seen, 3), np.tile(longer, 3)).low > once.low + 0.02


def test_margins_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="margin of row 2 is not a number"):
        length_controlled_accuracy([1.0, math.nan, 1.0], [1.0, 2.0, 3.0])
