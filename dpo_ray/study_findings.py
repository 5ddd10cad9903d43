"""All that a report shows of a study; its size curves with fits, forecasts and tests where the data allow. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_ray.curves import CurveFit, Run, fit_curve, study_of
from dpo_ray.errors import InputError
from dpo_ray.study import (
    SIZE_KEYS,
    Compute,
    Configuration,
    Estimate,
    Objective,
    Standing,
    Study,
    by_other_settings,
    compute,
    configurations,
    confirmation_standing,
    pareto_front,
    ranked,
    search_standing,
)
from dpo_ray.trends import LessIsMore, Trend, less_is_more, trend


class SizePoint(NamedTuple):
    """A configuration of a size curve."""

    pairs: int
    """Training pairs: the median over its trials."""
    estimate: Estimate


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """The metric against the number of training pairs, all else equal, and what may be said of it."""

    label: str
    points: list[SizePoint]
    """By size."""
    num_stopped: int
    """Trials that the scheduler stopped: their values come from less training than the others'."""
    fit: CurveFit | None
    trend: Trend | None
    subset: LessIsMore | None
    refusals: list[str]
    """Why what is missing is missing, and what was left out."""


def size_curves(study: Study, most: int) -> list[SizeCurve]:
    """A curve for every choice of the other settings with at least two sizes; those with the best values, `most` of
    them. Nothing is fitted to less than `curves` allows; the refusal is kept instead."""
    chosen = {key: {trial.settings.get(key) for trial in study.searched} for key in SIZE_KEYS}
    keys = [key for key, values in chosen.items() if len(values) > 1]
    order = ranked(configurations(study.searched), study.objective)
    groups = [group for group in by_other_settings(order, keys) if len(group) > 1] if keys else []
    return [_size_curve(group, keys, study.objective) for group in groups[:most]]


def _size_curve(group: list[Configuration], keys: Sequence[str], objective: Objective) -> SizeCurve:
    sized = sorted(
        (int(np.median([trial.train_pairs for trial in found.finished])), i, found) for i, found in enumerate(group)
    )
    points = [
        SizePoint(size, estimate)
        for size, _, found in sized
        if (estimate := found.estimate(objective.metric)) is not None
    ]
    values = [(size, found.values(objective.metric)) for size, _, found in sized]
    everywhere = set.intersection(*(set(by_seed) for _, by_seed in values))
    missing = sorted(set.union(*(set(by_seed) for _, by_seed in values)) - everywhere)
    runs = [Run(size, seed, by_seed[seed]) for size, by_seed in values for seed in sorted(everywhere)]

    fit, course, subset, refusals = None, None, None, []
    if missing:
        refusals.append(f"seeds {', '.join(map(str, missing))} left out of curve and tests: not at every size")
    try:
        curve = study_of(runs, direction=objective.mode, best_possible=_best_possible(objective))
        if objective.is_share:
            course, subset = trend(curve), less_is_more(curve)
        else:
            refusals.append(f"dips and plateaus are tested for shares only: how much of {objective.metric} matters?")
        fit = fit_curve(curve)
    except InputError as error:
        refusals.append(str(error))

    first = group[0]
    label = first.label([key for key in first.settings if key not in keys])
    num_stopped = sum(trial.status == "stopped_by_scheduler" for found in group for trial in found.finished)
    return SizeCurve(label, points, num_stopped, fit, course, subset, refusals)


class Findings(NamedTuple):
    """All that a report shows of a study."""

    study: Study
    search: Standing | None
    confirmation: Standing | None
    front: list[Configuration]
    """Of several objectives; empty for one."""
    curves: list[SizeCurve]
    compute: Compute
    """Of the search."""
    confirmation_compute: Compute


def findings(study: Study, *, most_curves: int = 6) -> Findings:
    """Everything at once; the fits of size curves take about a second each."""
    several = len(study.objectives) > 1
    return Findings(
        study,
        search_standing(study),
        confirmation_standing(study),
        pareto_front(configurations(study.searched), study.objectives) if several else [],
        size_curves(study, most_curves),
        compute(study.searched),
        compute(study.confirming),
    )


def _best_possible(objective: Objective) -> float | None:
    if not objective.is_share:
        return None
    return 1.0 if objective.mode == "max" else 0.0
