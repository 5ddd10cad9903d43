"""Learning curves: a metric against the number of pairs, fitted and forecast. Pure: numpy and scipy, no torch, no file.

R is the number of seeds, S of sizes, B of resamples of the seeds. Inside, a metric that falls is turned round, so that
larger is better; what comes out is in the metric's own sign and unit.

Fits say nothing beyond twice the largest size, nor below the smallest. Rewards trained for a fixed number of epochs
often have no plateau, because steps grow with pairs: fit shares (accuracies, win rates) where one has the choice.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_ray.comparisons import FloatArray, Interval, bootstrap_bounds, resampled_seeds
from dpo_ray.curve_families import FAMILIES, Coefficients, fit_family
from dpo_ray.errors import InputError

MIN_SIZES = 4
"""Without the largest, three are left to fit: the least from which a curve that bends can be foretold."""

REACH = 2
"""A forecast goes to this many times the largest size."""

TIE = 0.1
"""Errors of forecasts that differ by less than this many standard errors of what was forecast are equal.

A whole one would often take ilog2 for an exponential that has flattened, whose doubling is then promised too much.
"""

PRIOR_SEEDS = 4
"""What the mean variance of all sizes counts for beside a size's own, in seeds."""


class Run(NamedTuple):
    """One trained model's final value of the metric."""

    size: int
    """Training pairs."""
    seed: int
    value: float


class Study(NamedTuple):
    """Runs of every seed at every size; made by `study_of`, which checks them."""

    sizes: npt.NDArray[np.int64]
    """[S], rising."""
    values: FloatArray
    """[R, S]; a row is one seed."""
    direction: Literal["max", "min"]
    best_possible: float | None
    """The value that the metric cannot pass: 1 for an accuracy, 0 for a loss, None where there is none."""

    @property
    def sign(self) -> int:
        """What turns "better" into "larger"."""
        return 1 if self.direction == "max" else -1


def study_of(runs: Iterable[Run], *, direction: Literal["max", "min"], best_possible: float | None = None) -> Study:
    """Arrange runs by seed and size.

    Raises:
        InputError: A size below 1, a value that is not finite or better than possible, a seed twice at a size, a size
            without one of the seeds, no run at all, or another direction. It names the run.
    """
    if direction not in ("max", "min"):
        raise InputError(f"learning curve: a metric's direction is max or min, got {direction}")
    values: dict[tuple[int, int], float] = {}
    for run in runs:
        if run.size < 1:
            raise InputError(f"learning curve: a size is a number of pairs above zero, got {run.size}")
        if not math.isfinite(run.value):
            raise InputError(f"learning curve: size {run.size}, seed {run.seed}: the value {run.value} is not finite")
        if (run.seed, run.size) in values:
            raise InputError(f"learning curve: size {run.size} has seed {run.seed} twice")
        values[run.seed, run.size] = float(run.value)
    if not values:
        raise InputError("learning curve: there are no runs")
    seeds, sizes = (sorted(set(keys)) for keys in zip(*values, strict=True))
    for seed in seeds:
        for size in sizes:
            if (seed, size) not in values:
                raise InputError(f"learning curve: every seed must be at every size; size {size} lacks seed {seed}")
    table = np.array([[values[seed, size] for size in sizes] for seed in seeds])
    study = Study(np.array(sizes, dtype=np.int64), table, direction, best_possible)
    if best_possible is not None and (study.sign * table > study.sign * best_possible).any():
        raise InputError(f"learning curve: a value is better than the best possible, {best_possible}")
    return study


@dataclass(frozen=True, eq=False)
class CurveFit:
    """The chosen curve, and those of the resamples for its band."""

    study: Study
    family: str
    parameters: dict[str, float]
    """By the names of the family's formula; for a metric that falls, a has the other sign there."""
    left_out_errors: dict[str, float]
    """Family -> |forecast - mean| at the largest size, of the fit without it, in the metric's unit."""
    level: float
    curve: Coefficients
    resamples: dict[str, Coefficients] | None
    """Family -> the resamples that chose it. None with one run per size: there is nothing to resample."""

    @property
    def limit(self) -> int:
        """The largest size that may be asked for."""
        return REACH * int(self.study.sizes[-1])

    def predict(self, sizes: Sequence[float] | FloatArray) -> FloatArray:
        """The curve at `sizes` [N].

        Raises:
            InputError: A size beyond twice the largest or below the smallest of the study.
        """
        asked = self._allowed(sizes)
        values: FloatArray = self.study.sign * self._bounded(self.curve.at(FAMILIES[self.family], asked))[0]
        return values

    def band(self, sizes: Sequence[float] | FloatArray) -> tuple[FloatArray, FloatArray] | None:
        """Lower and upper bounds at each of `sizes`, [N] each, pointwise; None with one run per size.

        Simulated at twice the largest size, a 95 % band covers about 95 % with five seeds and 91 % with three.

        Raises:
            InputError: As `predict`.
        """
        asked = self._allowed(sizes)
        replicates = self._replicates(asked)
        if replicates is None:
            return None
        estimate = self._bounded(self.curve.at(FAMILIES[self.family], asked))[0]
        low, high = bootstrap_bounds(estimate, replicates, len(self.study.values), self.level)
        high = self._bounded(high)
        return (low, high) if self.study.direction == "max" else (-high, -low)

    def _replicates(self, sizes: FloatArray) -> FloatArray | None:
        """[B, N], larger is better."""
        if self.resamples is None:
            return None
        curves = [curves.at(FAMILIES[name], sizes) for name, curves in self.resamples.items()]
        return self._bounded(np.concatenate(curves))

    def _bounded(self, values: FloatArray) -> FloatArray:
        """None better than possible: a curve without a limit goes on to rise."""
        best = self.study.best_possible
        return values if best is None else np.minimum(values, self.study.sign * best)

    def _allowed(self, sizes: Sequence[float] | FloatArray) -> FloatArray:
        asked = np.atleast_1d(np.asarray(sizes, dtype=np.float64))
        smallest, largest = int(self.study.sizes[0]), int(self.study.sizes[-1])
        if not ((asked >= smallest) & (asked <= self.limit)).all():
            raise InputError(
                f"a learning curve of {smallest} to {largest} pairs says nothing outside {smallest} to {self.limit}, "
                f"got {', '.join(f'{size:g}' for size in asked if not smallest <= size <= self.limit)}"
            )
        return asked


def fit_curve(
    study: Study,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    standard_errors: Sequence[float] | None = None,
    level: float = 0.95,
    num_resamples: int = 400,
    random_seed: int = 0,
) -> CurveFit:
    """Fit every family, choose the one that best foretells the largest size from the others, and resample the seeds.

    The choice is by error at the size left out, not by fit, which more parameters always improve; errors that differ by
    less than `TIE` standard errors go to the family that stands first. A family needs one size more than it has
    parameters. Each resample chooses its own family, so that the band holds the doubt about the family too.

    Args:
        families: Names in `FAMILIES`, by preference among equals.
        standard_errors: [S] of the means; sizes weigh 1 / error**2. By default they come from the spread over seeds,
            and with one run per size all weigh the same.
        level: Of the bands.
        num_resamples: B; seeds are drawn with replacement and keep their values at all sizes.
        random_seed: Of the drawing; the same gives the same bands.

    Raises:
        InputError: Fewer than four sizes, an unknown family or none that fits so few sizes, standard errors that are
            not above zero, a level outside (0, 1), or fewer than 100 resamples.
    """
    if not 0 < level < 1:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    sizes = study.sizes.astype(np.float64)
    if len(sizes) < MIN_SIZES:
        raise InputError(f"a learning curve needs at least {MIN_SIZES} sizes, got {len(sizes)}")
    if unknown := [name for name in families if name not in FAMILIES]:
        raise InputError(f"no learning curve `{unknown[0]}`; there are {', '.join(FAMILIES)}")
    possible = [
        name
        for name in families
        if len(FAMILIES[name].parameters) < len(sizes) and FAMILIES[name].smallest_size <= sizes[0]
    ]
    if not possible:
        raise InputError(f"none of {', '.join(families)} can be fitted to {len(sizes)} sizes from {study.sizes[0]} on")

    errors = _standard_errors(study, standard_errors)
    oriented = study.sign * study.values
    means = oriented.mean(axis=0, keepdims=True)  # [1, S]
    num_seeds = len(oriented)
    if num_seeds > 1:
        drawn = resampled_seeds(num_seeds, num_resamples, random_seed)
        means = np.concatenate([means, oriented[drawn].mean(axis=1)])  # [1 + B, S]: the study, then its resamples

    weights = 1 / errors**2
    ceiling = None if study.best_possible is None else study.sign * study.best_possible
    whole, missed = [], []
    for name in possible:
        family = FAMILIES[name]
        shorter = fit_family(family, sizes[:-1], means[:, :-1], weights[:-1], ceiling)
        missed.append(np.abs(shorter.at(family, sizes[-1:])[:, 0] - means[:, -1]))
        whole.append(fit_family(family, sizes, means, weights, ceiling))
    noise = 0.0 if num_seeds == 1 and standard_errors is None else float(errors[-1])
    chosen = _choose(np.stack(missed), noise, np.ptp(means, axis=1))

    name, curve = possible[chosen[0]], _rows(whole[chosen[0]], np.array([0]))
    resamples = {
        other: _rows(curves, 1 + np.flatnonzero(chosen[1:] == i))
        for i, (other, curves) in enumerate(zip(possible, whole, strict=True))
    }
    numbers = [study.sign * float(curve.c[0]), float(curve.a[0]), *curve.shape[0].tolist()]
    return CurveFit(
        study,
        name,
        dict(zip(FAMILIES[name].parameters, numbers, strict=False)),
        {other: float(error[0]) for other, error in zip(possible, missed, strict=True)},
        level,
        curve,
        resamples if num_seeds > 1 else None,
    )


class PairsNeeded(NamedTuple):
    """The smallest numbers of pairs at which the curve, and the two edges of its band, reach a target."""

    target: float
    pairs: int | None
    """None: not reached within `limit`."""
    low: int | None
    """Where the better edge of the band reaches it; None: not even that does, or there is no band."""
    high: int | None
    """Where the worse edge does; None: it may not be reached within `limit`, or there is no band."""
    limit: int
    """Twice the largest size, beyond which the data say nothing."""

    def __str__(self) -> str:
        if self.pairs is None:
            text = f"not reached within {self.limit} pairs, beyond which the data allow no forecast"
            return text if self.low is None else f"{text} (perhaps from {self.low})"
        if self.low is None:
            return f"{self.pairs} pairs"
        return f"{self.pairs} pairs ({self.low} to {f'beyond {self.limit}' if self.high is None else self.high})"


def pairs_needed(fit: CurveFit, target: float) -> PairsNeeded:
    """The pairs that the metric needs to reach `target`; the smallest size where it is reached there already.

    The interval inverts the band: it holds the sizes whose band holds the target. Sizes are looked at in steps of
    a third of a percent.

    Raises:
        InputError: The target is not finite.
    """
    if not math.isfinite(target):
        raise InputError(f"a target is a number, got {target}")
    sign = fit.study.sign
    sizes = np.unique(np.geomspace(fit.study.sizes[0], fit.limit, 2 + _steps(fit)).round())

    def first(values: FloatArray) -> int | None:
        reached = sizes[sign * values >= sign * target]
        return int(reached[0]) if len(reached) else None

    pairs = first(fit.predict(sizes))
    band = fit.band(sizes)
    if band is None:
        return PairsNeeded(target, pairs, None, None, fit.limit)
    worse, better = band if sign == 1 else band[::-1]
    return PairsNeeded(target, pairs, first(better), first(worse), fit.limit)


def gain_from_doubling(fit: CurveFit) -> Interval:
    """What twice the largest size would change: f(2 n) - f(n), in the metric's unit and sign (a loss falls).

    Without resamples the bounds are infinite: one run per size does not say how sure the gain is.
    """
    ends = np.array([fit.limit / REACH, fit.limit])
    at, at_double = fit.predict(ends)
    replicates = fit._replicates(ends)
    if replicates is None:
        return Interval(float(at_double - at), -math.inf, math.inf)
    gains = fit.study.sign * (replicates[:, 1] - replicates[:, 0])
    low, high = bootstrap_bounds(at_double - at, gains, len(fit.study.values), fit.level)
    return Interval(float(at_double - at), float(low), float(high))


def _steps(fit: CurveFit) -> int:
    return math.ceil(math.log(fit.limit / int(fit.study.sizes[0])) / math.log(1 + 1 / 300))


def _rows(curves: Coefficients, rows: npt.NDArray[np.int64]) -> Coefficients:
    return Coefficients(curves.c[rows], curves.a[rows], curves.shape[rows])


def _standard_errors(study: Study, given: Sequence[float] | None) -> FloatArray:
    """[S] of the means over seeds; all 1 where nothing tells sizes apart.

    A variance of few seeds is itself too noisy for a weight: by luck one size would decide the whole fit. Each is drawn
    towards the mean of all, which counts as `PRIOR_SEEDS` seeds.

    Raises:
        InputError: Those given are not one per size, finite and above zero.
    """
    num_seeds, num_sizes = study.values.shape
    if given is not None:
        errors = np.asarray(given, dtype=np.float64)
        if errors.shape != (num_sizes,) or not (np.isfinite(errors) & (errors > 0)).all():
            raise InputError(f"standard errors are one number above zero for each of {num_sizes} sizes, got {given}")
        return errors
    if num_seeds == 1:
        return np.ones(num_sizes)
    variances = study.values.var(axis=0, ddof=1)
    pooled = variances.mean()
    if pooled == 0:
        return np.ones(num_sizes)
    drawn = (PRIOR_SEEDS * pooled + (num_seeds - 1) * variances) / (PRIOR_SEEDS + num_seeds - 1)
    shrunk: FloatArray = np.sqrt(drawn / num_seeds)
    return shrunk


def _choose(missed: FloatArray, noise: float, spans: FloatArray) -> npt.NDArray[np.int64]:
    """The family of each of B curves: the first of those whose error is as good as the smallest.

    Args:
        missed: [families, B] errors at the size left out.
        noise: Standard error of the mean there; 0 when unknown.
        spans: [B] largest less smallest mean; a ten-thousandth of it is the search's own rounding.
    """
    tie = np.maximum(TIE * noise, 1e-4 * spans)
    first: npt.NDArray[np.int64] = np.argmax(missed <= missed.min(axis=0) + tie, axis=0)
    return first
