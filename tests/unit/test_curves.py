"""Fits against curves that are known, bands against the rate they state, and what is refused."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from dpo_ray.curve_families import FAMILIES, fit_family, regress
from dpo_ray.curves import CurveFit, Run, Study, fit_curve, gain_from_doubling, pairs_needed, study_of
from dpo_ray.errors import InputError

SIZES = [128, 256, 512, 1024, 2048, 4096]
SHAPES = {
    "constant": (),
    "log2": (),
    "ilog2": (),
    "pow3": (0.5,),
    "exp3": (1 / 700,),
    "pow4": (0.9, 300.0),
    "wbl4": (900.0, 0.7),
    "mmf4": (800.0, 1.3),
}
AMPLITUDES = {"log2": 0.03, "ilog2": 1.5, "pow3": 1.5, "exp3": 0.2, "pow4": 80.0, "wbl4": 0.25, "mmf4": 0.25}


def truth(name: str) -> Callable[[Any], Any]:
    """A rising curve of a family, of the height of an accuracy."""
    level = 0.5 if name == "log2" else 0.8
    amplitude = AMPLITUDES.get(name, 0.0)
    return lambda sizes: level - amplitude * FAMILIES[name].shape(np.asarray(sizes, dtype=float), *SHAPES[name])


def study(
    curve: Callable[[Any], Any],
    num_seeds: int = 5,
    noise: float = 0.0,
    seed: int = 0,
    direction: Literal["max", "min"] = "max",
    sizes: list[int] = SIZES,
    best_possible: float | None = None,
) -> Study:
    """Every seed moves the whole curve and every point of it, by `noise` each."""
    rng = np.random.default_rng(seed)
    values = curve(sizes) + rng.normal(0, noise, (num_seeds, 1)) + rng.normal(0, noise, (num_seeds, len(sizes)))
    return Study(np.array(sizes), values, direction, best_possible)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["max", "min"])
def test_known_parameters_are_recovered(name: str, direction: Literal["max", "min"]):
    rising = truth(name)
    curve = rising if direction == "max" else lambda sizes: 2 - rising(sizes)
    sizes = [64, *SIZES, 8192]
    fit = fit_curve(study(curve, num_seeds=1, direction=direction, sizes=sizes), families=[name])
    level = 0.5 if name == "log2" else 0.8
    expected = [level if direction == "max" else 2 - level, AMPLITUDES.get(name, 0.0), *SHAPES[name]]
    assert list(fit.parameters) == list(FAMILIES[name].parameters)
    assert list(fit.parameters.values()) == pytest.approx(expected[: len(fit.parameters)], rel=2e-4)
    asked = [64, 100, 5000, 16384]
    assert fit.predict(asked) == pytest.approx(curve(asked), abs=1e-6)
    assert fit.left_out_errors[name] < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_with_noise_the_curve_is_found_within_it(name: str):
    """The noise of a mean over eight seeds is .0035 for the curve's level; its end and double are known less well."""
    fit = fit_curve(study(truth(name), num_seeds=8, noise=0.007, seed=3), families=[name], num_resamples=100)
    assert fit.predict([1024])[0] == pytest.approx(float(truth(name)(1024)), abs=0.0105)
    assert fit.predict([8192])[0] == pytest.approx(float(truth(name)(8192)), abs=0.04)


def test_the_regression_is_numpys_and_minds_its_bounds():
    g, y, weights = np.array([3.0, 2.0, 1.0, 0.5]), np.array([0.2, 0.5, 0.6, 0.9]), np.array([1.0, 4.0, 2.0, 1.0])
    slope, level = np.polyfit(g, y, 1, w=np.sqrt(weights))
    c, a, error = regress(g, y, weights, None)
    assert (c, a) == pytest.approx((level, -slope))
    assert error == pytest.approx((weights / 8 * (y - level - slope * g) ** 2).sum())

    c, a, _ = regress(g, -y, weights, None)
    assert (c, a) == pytest.approx((-(weights * y).sum() / 8, 0.0))

    c, a, error = regress(g, y, weights, 0.9)
    trials = np.linspace(0, 1, 10_001)
    errors = (weights / 8 * (y - 0.9 + trials[:, None] * g) ** 2).sum(axis=1)
    assert c == 0.9
    assert a == pytest.approx(trials[errors.argmin()], abs=1e-4)
    assert error == pytest.approx(errors.min(), abs=1e-7)


def test_sizes_weigh_by_their_standard_errors():
    curve = truth("log2")
    values = study(curve, num_seeds=1)
    values.values[0, 2] += 0.1
    heavy = fit_curve(values, families=["log2"], standard_errors=[1, 1, 0.001, 1, 1, 1])
    light = fit_curve(values, families=["log2"], standard_errors=[1, 1, 1000, 1, 1, 1])
    assert heavy.predict([512])[0] == pytest.approx(float(curve(512)) + 0.1, abs=1e-4)
    assert light.predict([512])[0] == pytest.approx(float(curve(512)), abs=1e-4)


def test_a_size_whose_seeds_scatter_weighs_less():
    quiet, loud = study(truth("log2"), noise=0.001), study(truth("log2"), noise=0.001)
    spread = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    quiet.values[:, 2] += 0.05
    loud.values[:, 2] += 0.05 + spread
    moved, kept = (abs(fit_curve(s, families=["log2"]).predict([512])[0] - truth("log2")(512)) for s in (quiet, loud))
    assert kept < moved / 2


@pytest.mark.parametrize("name", ["constant", "log2", "pow3", "exp3"])
def test_the_family_is_the_one_that_foretells_the_largest_size(name: str):
    fit = fit_curve(study(truth(name), num_seeds=1))
    assert fit.family == name
    errors = fit.left_out_errors
    assert list(errors) == list(FAMILIES)
    assert errors[name] <= min(errors.values()) + 1e-4 * 0.2
    # Worked apart: what the constant foretells is the mean of the others.
    curve = truth(name)
    assert errors["constant"] == pytest.approx(abs(np.mean(curve(SIZES[:-1])) - curve(SIZES[-1])), abs=1e-12)


def test_equal_forecasts_go_to_the_family_that_stands_first():
    flat = study(lambda sizes: np.full(len(sizes), 0.6))
    assert fit_curve(flat).family == "constant"
    assert fit_curve(flat, families=["pow3", "constant"]).family == "pow3"


def test_a_family_needs_one_size_more_than_parameters():
    four = fit_curve(study(truth("pow3"), sizes=SIZES[:4]))
    assert list(four.left_out_errors) == ["constant", "log2", "ilog2", "pow3", "exp3"]
    assert "mmf4" in fit_curve(study(truth("pow3"), sizes=SIZES[:5])).left_out_errors
    with pytest.raises(InputError, match="mmf4"):
        fit_curve(study(truth("mmf4"), sizes=SIZES[:4]), families=["mmf4"])
    with_one = study(truth("pow3"), sizes=[1, *SIZES])
    assert "ilog2" not in fit_curve(with_one).left_out_errors


@pytest.mark.parametrize("num_sizes", [1, 2, 3])
def test_three_points_are_refused(num_sizes: int):
    with pytest.raises(InputError, match=f"at least 4 sizes, got {num_sizes}"):
        fit_curve(study(truth("pow3"), sizes=SIZES[:num_sizes]))


@pytest.mark.parametrize(
    ("name", "families", "num_seeds"),
    [("pow3", ["constant", "log2", "pow3"], 3), ("exp3", ["constant", "ilog2", "exp3"], 5)],
)
def test_bands_cover_the_truth_at_the_stated_rate(name: str, families: list[str], num_seeds: int):
    """Also at twice the largest size, with the family chosen anew in every resample."""
    asked = [512, 4096, 8192]
    covered, num_studies = np.zeros(3), 150
    for i in range(num_studies):
        noisy = study(truth(name), num_seeds, 0.01, seed=i)
        low, high = fit_curve(noisy, families=families, num_resamples=150).band(asked)  # type: ignore[misc]
        covered += (low <= truth(name)(asked)) & (truth(name)(asked) <= high)
    # Four binomial standard errors of 150 at .95 are .071.
    assert (covered / num_studies > 0.879).all(), covered


def test_a_narrower_level_gives_a_narrower_band_about_the_curve():
    noisy = study(truth("pow3"), 6, 0.01)
    wide, narrow = (fit_curve(noisy, families=["pow3"], level=level) for level in (0.95, 0.5))
    for asked in (SIZES, [8192]):
        outer, inner = wide.band(asked), narrow.band(asked)
        assert outer is not None
        assert inner is not None
        assert (outer[0] < inner[0]).all()
        assert (inner[0] <= wide.predict(asked)).all()
        assert (wide.predict(asked) <= inner[1]).all()
        assert (inner[1] < outer[1]).all()


def test_resamples_keep_a_seeds_values_at_all_sizes():
    """Seeds that move whole curves leave the gain sure; were sizes resampled apart, its interval would be wide."""
    shifted = study(truth("log2"), num_seeds=6)
    shifted.values[:] += np.linspace(-0.05, 0.05, 6)[:, None]
    fit = fit_curve(shifted, families=["log2"])
    gain = gain_from_doubling(fit)
    low, high = fit.band([4096])  # type: ignore[misc]
    assert high[0] - low[0] > 0.04
    assert gain.high - gain.low < 1e-9
    assert gain.estimate == pytest.approx(0.03 * math.log(2))


def test_the_same_seed_gives_the_same_bands_whatever_the_order_of_the_runs():
    noisy = study(truth("pow3"), 4, 0.01)
    runs = [Run(size, seed, noisy.values[seed, i]) for i, size in enumerate(SIZES) for seed in range(4)]
    fits = [fit_curve(study_of(rows, direction="max"), num_resamples=100) for rows in (runs, runs[::-1])]
    assert np.array_equal(fits[0].band([4096, 8192]), fits[1].band([4096, 8192]))  # type: ignore[arg-type]
    assert fits[0].parameters == fits[1].parameters
    other = fit_curve(noisy, num_resamples=100, random_seed=1)
    assert other.parameters == fits[0].parameters
    assert not np.array_equal(other.band([8192]), fits[0].band([8192]))  # type: ignore[arg-type]


def test_a_falling_metric_is_the_mirror_image_of_a_rising_one():
    rising = study(truth("pow3"), 5, 0.01)
    falling = Study(rising.sizes, -rising.values, "min", None)
    up, down = fit_curve(rising), fit_curve(falling)
    assert down.family == up.family
    assert down.predict(SIZES) == pytest.approx(-up.predict(SIZES))
    low, high = up.band([8192])  # type: ignore[misc]
    assert np.allclose(down.band([8192]), (-high, -low))  # type: ignore[arg-type]
    assert pairs_needed(down, -0.77)[1:] == pairs_needed(up, 0.77)[1:]
    gain, loss = gain_from_doubling(up), gain_from_doubling(down)
    assert loss.estimate == pytest.approx(-gain.estimate)
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low), abs=1e-12)


@pytest.mark.parametrize("wrong", [127, 8193, math.nan, math.inf])
def test_nothing_is_said_beyond_twice_the_largest_size_or_below_the_smallest(wrong: float):
    fit = fit_curve(study(truth("pow3")), families=["pow3"])
    assert fit.limit == 8192
    assert len(fit.predict([128, 8192])) == 2
    for ask in (fit.predict, fit.band):
        with pytest.raises(InputError, match="128 to 4096 pairs says nothing outside 128 to 8192"):
            ask([512, wrong])


def test_no_value_is_better_than_possible():
    steep = study(lambda sizes: 0.1 * np.log(sizes) + 0.165, 4, 0.0)
    free = fit_curve(steep, families=["log2"])
    assert free.predict([8192])[0] > 1.05
    share = fit_curve(steep._replace(best_possible=1.0), families=["log2", "pow3"])
    assert share.predict([8192])[0] == 1.0
    assert share.band([8192])[1][0] <= 1.0  # type: ignore[index]
    bounded = fit_family(FAMILIES["pow3"], np.array(SIZES, dtype=float), steep.values, np.ones(6), 1.0)
    assert (bounded.c <= 1.0).all()
    loss = Study(steep.sizes, 1 - steep.values, "min", 0.0)
    assert fit_curve(loss, families=["log2"]).predict([8192])[0] == 0.0


def forecast(noise: float = 0.0, num_seeds: int = 5) -> CurveFit:
    return fit_curve(study(truth("pow3"), num_seeds, noise, seed=2), families=["pow3"])


def test_the_pairs_for_a_target_are_those_of_the_curve():
    # .8 - 1.5 / sqrt(n) = .77 at n = 2500.
    needed = pairs_needed(forecast(), 0.77)
    assert needed.pairs == pytest.approx(2500, rel=0.005)
    assert needed.low == needed.pairs == needed.high
    assert pairs_needed(forecast(), 0.5).pairs == 128


def test_the_interval_of_pairs_inverts_the_band():
    fit = forecast(noise=0.004)
    needed = pairs_needed(fit, 0.765)
    assert needed.low is not None
    assert needed.high is not None
    assert needed.pairs is not None
    assert needed.low < needed.pairs < needed.high
    assert fit.band([needed.low])[1][0] == pytest.approx(0.765, abs=3e-4)  # type: ignore[index]
    assert fit.band([needed.high])[0][0] == pytest.approx(0.765, abs=3e-4)  # type: ignore[index]
    assert str(needed) == f"{needed.pairs} pairs ({needed.low} to {needed.high})"


def test_a_target_out_of_reach_is_said_to_be():
    needed = pairs_needed(forecast(), 0.799)
    assert needed[1:] == (None, None, None, 8192)
    assert str(needed) == "not reached within 8192 pairs, beyond which the data allow no forecast"
    perhaps = pairs_needed(forecast(noise=0.01), 0.8)
    assert perhaps.pairs is None
    assert str(perhaps).endswith(f"(perhaps from {perhaps.low})")
    unsure = pairs_needed(forecast(noise=0.01), 0.77)
    assert unsure.pairs is not None
    assert str(unsure) == f"{unsure.pairs} pairs ({unsure.low} to beyond 8192)"


def test_the_gain_from_doubling():
    gain = gain_from_doubling(forecast())
    assert gain.estimate == pytest.approx(1.5 / 64 - 1.5 / math.sqrt(8192))
    noisy = gain_from_doubling(forecast(noise=0.01))
    assert noisy.low < gain.estimate < noisy.high


def test_one_run_per_size_gives_a_curve_and_no_band():
    fit = fit_curve(study(truth("pow3"), 1, 0.005))
    assert fit.band(SIZES) is None
    assert gain_from_doubling(fit)[1:] == (-math.inf, math.inf)
    assert pairs_needed(fit, 0.7)[2:4] == (None, None)
    assert str(pairs_needed(fit, 0.5)) == "128 pairs"


RUNS = [Run(size, seed, 0.5) for size in SIZES for seed in (1, 2)]


def test_runs_are_arranged_by_seed_and_size():
    arranged = study_of([Run(20, 7, 0.3), Run(10, 9, 0.2), Run(10, 7, 0.1), Run(20, 9, 0.4)], direction="max")
    assert arranged.sizes.tolist() == [10, 20]
    assert arranged.values.tolist() == [[0.1, 0.3], [0.2, 0.4]]


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        pytest.param([], "no runs", id="none"),
        pytest.param([*RUNS, Run(0, 1, 0.5)], "above zero, got 0", id="size 0"),
        pytest.param([*RUNS, Run(-5, 1, 0.5)], "above zero, got -5", id="size below 0"),
        pytest.param([*RUNS, Run(5, 1, math.nan)], "size 5, seed 1: the value nan", id="nan"),
        pytest.param([*RUNS, Run(128, 2, 0.5)], "size 128 has seed 2 twice", id="twice"),
        pytest.param(RUNS[:-1], "size 4096 lacks seed 2", id="missing"),
        pytest.param([*RUNS, Run(5, 1, 1.5), Run(5, 2, 0.5)], "best possible, 1", id="better than possible"),
    ],
)
def test_wrong_runs_are_refused(runs: list[Run], says: str):
    with pytest.raises(InputError, match=says):
        study_of(runs, direction="max", best_possible=1.0)


def test_wrong_requests_are_refused():
    good = study(truth("pow3"))
    with pytest.raises(InputError, match="direction"):
        study_of(RUNS, direction="up")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="best possible, 0"):
        study_of([Run(5, 1, -0.1)], direction="min", best_possible=0.0)
    with pytest.raises(InputError, match="no learning curve `pow5`"):
        fit_curve(good, families=["pow5"])
    for errors in ([1.0] * 5, [1.0] * 5 + [0.0], [1.0] * 5 + [math.nan]):
        with pytest.raises(InputError, match="each of 6 sizes"):
            fit_curve(good, standard_errors=errors)
    with pytest.raises(InputError, match="level"):
        fit_curve(good, level=1.0)
    with pytest.raises(InputError, match="target"):
        pairs_needed(fit_curve(good, families=["log2"]), math.nan)
