"""When to stop: history of held-out evaluations -> decision. Pure, so that a resumed run decides as an unbroken one.

The statistics are those of Bernardelle & Demartini's and the Pythia/BTLM study's practice: a held-out accuracy of n
pairs has a standard error of sqrt(a (1 - a) / n), 3 points at 256 pairs, so smaller changes are noise.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from dpo_ray.config import EarlyStoppingConfig
from dpo_ray.errors import InputError
from dpo_ray.metrics import METRICS, standard_error


class Evaluation(NamedTuple):
    """One held-out evaluation: metric -> value, without the `eval/` prefix."""

    step: int
    metrics: dict[str, float]


class Decision(NamedTuple):
    stop: bool
    reason: str | None


def check_metric(name: str, available: Sequence[str]) -> None:
    """Refuse, at the start, a metric that the run will not have.

    Raises:
        InputError: Names the metric and those there are.
    """
    if name not in available:
        raise InputError(f"`early_stopping.metric`: no metric `{name}` in this run; it has {', '.join(available)}")


def best_evaluation(history: Sequence[Evaluation], metric: str) -> Evaluation | None:
    """The evaluation with the best value, the earlier of equals. Step 0 does not count: there every reward is zero."""
    sign = 1 if METRICS[metric].direction == "max" else -1
    seen = [evaluation for evaluation in history if evaluation.step > 0]
    return max(seen, key=lambda e: (sign * e.metrics[metric], -e.step), default=None)


def decide(rule: EarlyStoppingConfig, history: Sequence[Evaluation]) -> Decision:
    """Stop when the metric has not improved for `patience` evaluations, or the KL budget is spent.

    An improvement is a change, in the metric's direction, of more than `min_improvement` and of more than
    `min_improvement_se` standard errors, of the median of the last `smoothing` values, against the best median so far.
    """
    seen = [evaluation for evaluation in history if evaluation.step > 0]
    if not seen:
        return Decision(False, None)
    last = seen[-1]
    if rule.max_kl is not None and last.metrics.get("kl", 0.0) > rule.max_kl:
        return Decision(True, f"kl {last.metrics['kl']:.3g} above the budget {rule.max_kl:g} at step {last.step}")

    sign = 1 if METRICS[rule.metric].direction == "max" else -1
    values = [evaluation.metrics[rule.metric] for evaluation in seen]
    best, best_at = None, 0
    for i, evaluation in enumerate(seen):
        smooth = sign * statistics.median(values[max(0, i - rule.smoothing + 1) : i + 1])
        error = standard_error(rule.metric, values[i], int(evaluation.metrics.get("num_pairs", 0)))
        needed = max(rule.min_improvement, rule.min_improvement_se * error)
        if best is None or smooth > best + needed:
            best, best_at = smooth, i
    waited = len(seen) - 1 - best_at
    if waited >= rule.patience and last.step >= rule.min_steps:
        return Decision(
            True,
            f"{rule.metric} has not improved in {waited} evaluations, since step {seen[best_at].step}",
        )
    return Decision(False, None)
