"""Which strategy wins at which budget, and what it saves: statistics of a comparison over paired seeds. Pure.

A value is the held-out metric after a round, oriented by the caller's `sign` so that more is better. All arms of a seed
share pool, oracle and noise, so differences are taken within seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.comparisons import Interval, holm, mean_interval, paired_t_test

BASELINE = "random"
Curves = dict[str, dict[int, dict[int, float]]]
"""strategy -> labels asked for -> seed -> value."""


class Contrast(NamedTuple):
    """A strategy less random, at one budget or over all of them."""

    strategy: str
    labels: int | None
    """None: the mean over budgets, as the area under the curve."""

    difference: Interval
    p_value: float
    """Two-sided paired t-test, as Holm corrects it for all strategies at this budget."""

    sign_p_value: float
    wins: int
    losses: int

    @property
    def verdict(self) -> str:
        if self.p_value >= 0.05:
            return "not distinguishable"
        return "better" if self.difference.estimate > 0 else "worse"


def curves_of(tree: Mapping[str, Any]) -> Curves:
    """The values of `acquire.json`, as they are."""
    found: Curves = {strategy: {} for strategy in tree["strategies"]}
    for arm in tree["arms"]:
        for result in arm["rounds"]:
            if result["value"] is not None:
                found[arm["strategy"]].setdefault(result["asked"], {})[arm["seed"]] = result["value"]
    return found


def mean_curve(by_labels: Mapping[int, Mapping[int, float]]) -> dict[int, Interval]:
    """Mean over seeds with Student's interval; of one seed the value alone."""
    curve = {}
    for labels, values in sorted(by_labels.items()):
        seen = list(values.values())
        curve[labels] = mean_interval(seen) if len(seen) > 1 else Interval(seen[0], np.nan, np.nan)
    return curve


def contrasts(curves: Curves, sign: int) -> list[Contrast]:
    """Every strategy against random at every budget that both have with at least two common seeds, and over all
    budgets; better is positive. None where random was not run."""
    if BASELINE not in curves:
        return []
    budgets: list[int | None] = [*sorted({labels for by_labels in curves.values() for labels in by_labels}), None]
    found: list[Contrast] = []
    for labels in budgets:
        rows = []
        for strategy in curves:
            first, second = _paired(curves, strategy, labels) if strategy != BASELINE else ([], [])
            if len(first) > 1:
                rows.append((strategy, paired_t_test([sign * v for v in first], [sign * v for v in second])))
        adjusted = holm([test.p_value for _, test in rows])
        found += [
            Contrast(strategy, labels, test.difference, p, test.sign_p_value, test.wins, test.losses)
            for (strategy, test), p in zip(rows, adjusted, strict=True)
        ]
    return found


def _paired(curves: Curves, strategy: str, labels: int | None) -> tuple[list[float], list[float]]:
    """Values of a strategy and of random under the seeds that both have."""
    own, base = curves[strategy], curves[BASELINE]
    if labels is not None:
        seeds = sorted(own.get(labels, {}).keys() & base.get(labels, {}).keys())
        return [own[labels][seed] for seed in seeds], [base[labels][seed] for seed in seeds]
    common = sorted(own.keys() & base.keys())
    if len(common) < 2:
        return [], []
    seeds = sorted(set.intersection(*(own[at].keys() & base[at].keys() for at in common)))
    return [_area(own, common, seed) for seed in seeds], [_area(base, common, seed) for seed in seeds]


def _area(by_labels: Mapping[int, Mapping[int, float]], budgets: Sequence[int], seed: int) -> float:
    """Mean height of the curve between the first and the last budget, by the trapezoidal rule."""
    values = [by_labels[labels][seed] for labels in budgets]
    return float(np.trapezoid(values, budgets) / (budgets[-1] - budgets[0]))


def labels_to(curve: Mapping[int, Interval], target: float, sign: int) -> float | None:
    """Labels at which a mean curve first reaches a value, by straight lines between budgets; None: it never does."""
    before: tuple[int, float] | None = None
    for labels, found in sorted(curve.items()):
        value = sign * found.estimate
        if value >= sign * target:
            if before is None:
                return float(labels)
            at, was = before
            return at + (labels - at) * (sign * target - was) / (value - was)
        before = labels, value
    return None
