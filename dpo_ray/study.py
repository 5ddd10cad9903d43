"""What a study found: its trials by configuration, intervals, paired comparisons, compute. Pure: no file, no picture.

A study is the object that a sweep writes to `study.json`. A configuration is one choice of the settings; its trials
differ in their seed. A trial's value is that of its best held-out evaluation. Trials that failed or were cut off count
nowhere but in the compute: where they would have ended is not known.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from dpo_ray.comparisons import Interval, holm, mean_interval, paired_bootstrap, paired_t_test
from dpo_ray.errors import InputError
from dpo_ray.metrics import METRICS, wilson_interval
from dpo_ray.page import text

Measures = dict[str, float | None]
"""`step` and metric -> value, without the `eval/` prefix."""

Side = Literal["train", "evaluations"]
"""The lines of training steps or of held-out evaluations."""

FINISHED = ("completed", "stopped_early", "stopped_by_scheduler")
"""The states of a trial that has a result."""

SIZE_KEYS = ("data.fraction", "data.num_pairs")
MIXTURE_KEYS = "data.sources"

MIN_SEEDS = 3
"""Common seeds from which two configurations are compared over seeds."""

MIN_PAIRS = 30
"""Common held-out pairs from which they are compared over pairs: of fewer a mean is not yet normal."""

ALPHA = 0.05


@dataclass(frozen=True)
class Objective:
    metric: str
    mode: Literal["max", "min"]

    @property
    def sign(self) -> int:
        """What turns "better" into "larger"."""
        return 1 if self.mode == "max" else -1

    @property
    def is_share(self) -> bool:
        return self.metric in METRICS and METRICS[self.metric].unit == "share"


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a study."""

    id: str
    number: int
    settings: dict[str, Any]
    """Dotted recipe key -> value of everything varied but the seed."""
    labels: dict[str, str]
    """The same, for values that do not read well."""
    seed: int
    status: Literal["completed", "stopped_early", "stopped_by_scheduler", "failed", "interrupted", "running", "waiting"]
    stop_reason: str | None
    error: str | None
    attempts: int
    confirms: str | None
    """A trial of the search whose configuration this one runs again on a fresh seed."""
    steps: int
    num_steps: int
    """Steps that it would have made without any stopping."""
    pairs_seen: int
    train_pairs: int
    train_seconds: float
    folder: str
    best: Measures | None
    evaluations: list[Measures]
    train: list[Measures]
    margins: dict[str, float] | None = None
    """Held-out pair -> margin at the best evaluation, in nats."""

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    @property
    def key(self) -> str:
        """Equal for trials of one configuration."""
        return json.dumps(self.settings, sort_keys=True)

    def value(self, metric: str) -> float | None:
        """The metric at the best evaluation; None if it was not measured or is not finite."""
        return finite(self.best or {}, metric)

    def series(self, side: Side, metric: str) -> dict[int, float]:
        """Step -> value."""
        lines = self.train if side == "train" else self.evaluations
        seen = {int(line["step"] or 0): finite(line, metric) for line in lines}
        return {step: value for step, value in sorted(seen.items()) if value is not None}


@dataclass(frozen=True)
class Reference:
    """Responses of the reference pass, by where their log-probs came from."""

    computed: int
    from_store: int


@dataclass(frozen=True, eq=False)
class Study:
    name: str
    space: str
    question: str
    status: Literal["completed", "interrupted", "stopped", "running"]
    stop_reason: str | None
    objectives: Annotated[list[Objective], Field(min_length=1)]
    """The first is the one that ranks."""
    search: str
    scheduler: str
    varied: list[str]
    reference: Reference
    seconds: float
    recipe: dict[str, Any]
    trials: list[Trial]

    @property
    def objective(self) -> Objective:
        return self.objectives[0]

    @property
    def searched(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.confirms is None]

    @property
    def confirming(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.confirms is not None]


_STUDY = TypeAdapter(Study)


def read_study(tree: Any) -> Study:
    """The content of `study.json`.

    Raises:
        InputError: A part is missing or of another type; it is named.
    """
    try:
        return _STUDY.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"study.json: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None


def finite(line: Measures, metric: str) -> float | None:
    value = line.get(metric)
    return value if value is not None and math.isfinite(value) else None


class Estimate(NamedTuple):
    """A configuration's metric with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    over: Literal["seeds", "pairs"] | None
    """What the interval is over. One seed has that of its held-out pairs, which says nothing of other seeds."""
    num_seeds: int


@dataclass(frozen=True, eq=False)
class Configuration:
    """One choice of the settings, with its trials."""

    settings: dict[str, Any]
    labels: dict[str, str]
    trials: list[Trial]

    @property
    def key(self) -> str:
        return self.trials[0].key

    @cached_property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.is_finished]

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> value of the finished trials; a seed that was run twice counts once, the later trial."""
        seen = {trial.seed: trial.value(metric) for trial in self.finished}
        return {seed: value for seed, value in sorted(seen.items()) if value is not None}

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over seeds with Student's interval; None when no trial has the metric."""
        values = self.values(metric)
        if len(values) > 1:
            mean, low, high = mean_interval(list(values.values()))
            if Objective(metric, "max").is_share:
                low, high = max(low, 0.0), min(high, 1.0)
            return Estimate(mean, low, high, "seeds", len(values))
        for trial in reversed(self.finished):
            value, best = trial.value(metric), trial.best or {}
            if value is not None:
                low_, high_ = _one_run(best, metric, value)
                return Estimate(value, low_, high_, None if low_ is None else "pairs", 1)
        return None

    def shown(self, key: str) -> str:
        """A setting for a reader."""
        return self.labels.get(key) or text(self.settings.get(key))

    def label(self, keys: Iterable[str] | None = None) -> str:
        """`beta=0.1, fraction=0.5`; all settings, or some."""
        chosen = [key for key in (self.settings if keys is None else keys) if key in self.settings]
        return ", ".join(f"{key.rpartition('.')[2]}={self.shown(key)}" for key in chosen) or "the recipe as it is"


def _one_run(best: Measures, metric: str, value: float) -> tuple[float | None, float | None]:
    low, high, count = (finite(best, name) for name in (f"{metric}_low", f"{metric}_high", "num_pairs"))
    if low is not None and high is not None:
        return low, high
    if Objective(metric, "max").is_share and count:
        return wilson_interval(value, int(count))
    return None, None


def configurations(trials: Iterable[Trial]) -> list[Configuration]:
    """The trials by configuration, in the order in which each was first tried."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        groups.setdefault(trial.key, []).append(trial)
    return [Configuration(group[0].settings, group[0].labels, group) for group in groups.values()]


def ranked(found: Iterable[Configuration], objective: Objective) -> list[Configuration]:
    """Best mean first; of equals the one with more seeds, then the earlier. Those without a value are left out."""
    estimates = [(configuration, configuration.estimate(objective.metric)) for configuration in found]
    known = [(configuration, estimate) for configuration, estimate in estimates if estimate is not None]
    # Rounded: the mean of equal decimals may differ from them in its last bit.
    known.sort(key=lambda pair: (-objective.sign * round(pair[1].value, 12), -pair[1].num_seeds))
    return [configuration for configuration, _ in known]


class Comparison(NamedTuple):
    """A configuration against the best."""

    configuration: Configuration
    verdict: Literal["worse", "better", "not distinguishable", "untestable"]
    difference: Interval | None
    """Its value less the best one's, in the metric's unit and sign, with its own 95 % interval. None: untestable."""
    p_value: float | None
    """Two-sided and adjusted. None: untestable."""
    over: Literal["seeds", "pairs"] | None
    num_common: int
    """Common seeds, or common held-out pairs."""


def compare(
    best: Configuration, others: Sequence[Configuration], objective: Objective, *, num_comparisons: int
) -> list[Comparison]:
    """Every other configuration against the best, paired.

    From `MIN_SEEDS` common seeds on over seeds, by Student's paired test. Else over held-out pairs, if both have the
    margins of the same ones: the interval is a paired bootstrap, the p-value Student's, whose tail some thousand
    resamples could not resolve once it is adjusted. Such a test says whether other pairs would have decided otherwise,
    not whether another seed would. What has neither is untestable.

    Args:
        num_comparisons: Among how many Holm's adjustment counts, at least `len(others)`. Where the best was picked from
            these same values it is that of all pairs of configurations: the test with the luckiest was chosen by
            looking, and an adjustment for `len(others)` alone would let two or three times as many false claims pass.
    """
    tests = [_paired_values(best, other, objective.metric) for other in others]
    p_values = [1.0 if test is None else paired_t_test(test.other, test.best).p_value for test in tests]
    adjusted = holm(p_values + [1.0] * (num_comparisons - len(others)))
    found = []
    for other, test, p in zip(others, tests, adjusted, strict=False):
        if test is None:
            found.append(Comparison(other, "untestable", None, None, None, 0))
            continue
        difference = (
            paired_t_test(test.other, test.best).difference
            if test.over == "seeds"
            else paired_bootstrap(test.other, test.best)
        )
        verdict: Literal["worse", "better", "not distinguishable"] = "not distinguishable"
        if p < ALPHA:
            verdict = "better" if objective.sign * difference.estimate > 0 else "worse"
        found.append(Comparison(other, verdict, difference, p, test.over, len(test.other)))
    return found


class _Paired(NamedTuple):
    other: list[float]
    best: list[float]
    over: Literal["seeds", "pairs"]


def _paired_values(best: Configuration, other: Configuration, metric: str) -> _Paired | None:
    ours, theirs = best.values(metric), other.values(metric)
    seeds = [seed for seed in ours if seed in theirs]
    if len(seeds) >= MIN_SEEDS:
        return _Paired([theirs[seed] for seed in seeds], [ours[seed] for seed in seeds], "seeds")
    first, second = (_pair_values(configuration, metric, seeds) for configuration in (best, other))
    if first is None or second is None or first.keys() != second.keys() or len(first) < MIN_PAIRS:
        return None
    return _Paired([second[pair] for pair in first], list(first.values()), "pairs")


def _pair_values(configuration: Configuration, metric: str, seeds: Sequence[int]) -> dict[str, float] | None:
    """Held-out pair -> mean value over trials, of `seeds` if there are any; None if a trial has other pairs or none."""
    trials = {trial.seed: trial for trial in configuration.finished if trial.value(metric) is not None}
    chosen = [trials[seed] for seed in seeds] or list(trials.values())
    tables = [trial.margins or {} for trial in chosen]
    if metric not in ("rewards/accuracies", "rewards/margins") or any(t.keys() != tables[0].keys() for t in tables):
        return None
    values = np.array([[table[pair] for pair in tables[0]] for table in tables])
    if not np.isfinite(values).all():
        return None
    if metric == "rewards/accuracies":
        values = (np.sign(values) + 1) / 2
    return dict(zip(tables[0], values.mean(axis=0).tolist(), strict=True))


class Standing(NamedTuple):
    """Configurations in order, and each but the one they are held against compared with it."""

    ranked: list[Configuration]
    best: Configuration
    comparisons: list[Comparison]


def search_standing(study: Study) -> Standing | None:
    """The search by its main objective; None when no trial has a value."""
    order = ranked(configurations(study.searched), study.objective)
    if not order:
        return None
    num_comparisons = len(order) * (len(order) - 1) // 2
    return Standing(order, order[0], compare(order[0], order[1:], study.objective, num_comparisons=num_comparisons))


def confirmation_standing(study: Study) -> Standing | None:
    """The confirmed configurations on their fresh seeds alone; None when none has a value.

    They are held against the winner of the search, which was chosen on other seeds, so only the comparisons that are
    made count. If its confirmation has no value, against the best confirmed one.
    """
    order = ranked(configurations(study.confirming), study.objective)
    if not order:
        return None
    searched = ranked(configurations(study.searched), study.objective)
    winners = [found for found in order if searched and found.key == searched[0].key]
    best = winners[0] if winners else order[0]
    others = [found for found in order if found is not best]
    num_comparisons = len(others) if winners else len(order) * (len(order) - 1) // 2
    return Standing(order, best, compare(best, others, study.objective, num_comparisons=num_comparisons))


def pareto_front(found: Iterable[Configuration], objectives: Sequence[Objective]) -> list[Configuration]:
    """The configurations that no other is at least as good as in every objective and better in one.

    Best in the first objective first. One that lacks an objective is left out.
    """
    known = []
    for configuration in ranked(found, objectives[0]):
        estimates = [(objective, configuration.estimate(objective.metric)) for objective in objectives]
        values = [objective.sign * estimate.value for objective, estimate in estimates if estimate is not None]
        if len(values) == len(objectives):
            known.append((configuration, values))
    return [
        configuration
        for configuration, values in known
        if not any(other != values and all(a >= b for a, b in zip(other, values, strict=True)) for _, other in known)
    ]


class Compute(NamedTuple):
    """What the search cost, in steps, against every trial run to its end."""

    full: int
    """Steps of all trials without any stopping."""
    spent: int
    saved_early: int
    """By the trials' own rule."""
    saved_by_scheduler: int
    cut_off: int
    """Not made because a trial failed or the study ended: no saving."""
    pairs_seen: int
    train_seconds: float


def compute(trials: Iterable[Trial]) -> Compute:
    """Over trials as they ended; an attempt that failed and was made again is not counted."""
    seen = list(trials)

    def left(*states: str) -> int:
        return sum(max(trial.num_steps - trial.steps, 0) for trial in seen if trial.status in states)

    return Compute(
        sum(max(trial.num_steps, trial.steps) for trial in seen),
        sum(trial.steps for trial in seen),
        left("stopped_early"),
        left("stopped_by_scheduler"),
        left("completed", "failed", "interrupted", "running", "waiting"),
        sum(trial.pairs_seen for trial in seen),
        sum(trial.train_seconds for trial in seen),
    )


def numeric_settings(study: Study) -> list[str]:
    """The varied keys that hold numbers, at least two, in the order of `varied`."""
    found = configurations(study.searched)
    keys = dict.fromkeys([*study.varied, *(key for configuration in found for key in configuration.settings)])
    return [key for key in keys if _is_numeric([c.settings.get(key) for c in found])]


def _is_numeric(values: list[Any]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(values) and len(set(numbers)) > 1


def by_other_settings(found: Iterable[Configuration], keys: Sequence[str]) -> list[list[Configuration]]:
    """Configurations that differ in `keys` only, together."""
    groups: dict[str, list[Configuration]] = {}
    for configuration in found:
        rest = {key: value for key, value in configuration.settings.items() if key not in keys}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(configuration)
    return list(groups.values())
