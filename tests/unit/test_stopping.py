"""The stopping rule is a function of the history: what fires it, what does not, and what it never looks at."""

from typing import Any

import pytest

from dpo_ray.config import EarlyStoppingConfig
from dpo_ray.errors import InputError
from dpo_ray.stopping import Decision, Evaluation, best_evaluation, check_metric, decide

GO_ON = Decision(False, None)


def history(*values: float, metric: str = "rewards/accuracies", num_pairs: int = 10_000, **more: float) -> list[Any]:
    """Evaluations at steps 10, 20, 30 ..."""
    return [Evaluation(10 * (i + 1), {metric: value, "num_pairs": num_pairs, **more}) for i, value in enumerate(values)]


def stops_at(rule: EarlyStoppingConfig, evaluations: list[Evaluation]) -> int | None:
    """The first step at which a run that asks after every evaluation would stop."""
    return next((e.step for i, e in enumerate(evaluations) if decide(rule, evaluations[: i + 1]).stop), None)


@pytest.mark.parametrize(("patience", "step"), [(1, 40), (2, 50), (3, 60), (4, None)])
def test_it_stops_after_as_many_evaluations_without_improvement_as_patience_says(patience: int, step: int | None):
    rule = EarlyStoppingConfig(patience=patience)
    assert stops_at(rule, history(0.5, 0.6, 0.7, 0.65, 0.7, 0.7)) == step


def test_the_reason_names_the_metric_and_the_best_step():
    decision = decide(EarlyStoppingConfig(patience=2), history(0.5, 0.7, 0.6, 0.6))
    assert decision == Decision(True, "rewards/accuracies has not improved in 2 evaluations, since step 20")


def test_an_improvement_starts_the_wait_anew():
    assert stops_at(EarlyStoppingConfig(patience=2), history(0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.6)) == 70


def test_nothing_was_evaluated_so_it_goes_on():
    assert decide(EarlyStoppingConfig(patience=1), []) == GO_ON


def test_step_zero_is_not_seen():
    """There every reward is zero, or by another count every accuracy is one: no value to compare with."""
    rule = EarlyStoppingConfig(patience=1, max_kl=0.1)
    at_zero = Evaluation(0, {"rewards/accuracies": 1.0, "kl": 9.0, "num_pairs": 100})
    assert decide(rule, [at_zero]) == GO_ON
    assert decide(rule, [at_zero, *history(0.5)]) == GO_ON
    assert decide(rule, [at_zero, *history(0.5, 0.6)]) == GO_ON
    assert decide(rule, [at_zero, *history(0.6, 0.5)]).stop
    assert best_evaluation([at_zero, *history(0.5)], "rewards/accuracies") == history(0.5)[0]
    assert best_evaluation([at_zero], "rewards/accuracies") is None


def test_a_smaller_change_than_min_improvement_is_none():
    rule = EarlyStoppingConfig(patience=2, min_improvement=0.05)
    assert stops_at(rule, history(0.50, 0.54, 0.55)) == 30
    assert stops_at(rule, history(0.50, 0.54, 0.56)) is None


def test_small_steps_add_up_against_the_best():
    rule = EarlyStoppingConfig(patience=2, min_improvement=0.05)
    assert stops_at(rule, history(0.50, 0.53, 0.56, 0.59, 0.62)) is None


def test_a_change_within_the_standard_error_is_none():
    # Of 100 pairs at 0.6 the standard error is 0.049: 0.55 -> 0.6 is more than one, less than two.
    values = history(0.55, 0.6, num_pairs=100)
    assert stops_at(EarlyStoppingConfig(patience=1, min_improvement_se=1.0), values) is None
    assert stops_at(EarlyStoppingConfig(patience=1, min_improvement_se=2.0), values) == 20
    many = history(0.55, 0.6, num_pairs=10_000)
    assert stops_at(EarlyStoppingConfig(patience=1, min_improvement_se=2.0), many) is None


def test_the_larger_of_the_two_thresholds_holds():
    values = history(0.55, 0.6, num_pairs=100)
    for absolute, errors, stops in ((0.06, 0.0, True), (0.06, 1.0, True), (0.01, 2.0, True), (0.01, 1.0, False)):
        rule = EarlyStoppingConfig(patience=1, min_improvement=absolute, min_improvement_se=errors)
        assert decide(rule, values).stop is stops


def test_smoothing_takes_the_median_so_that_one_lucky_evaluation_does_not_count():
    # Medians of three: 0.50, 0.51, 0.52, 0.52, 0.54, 0.54, 0.56.
    lucky = history(0.50, 0.52, 0.90, 0.51, 0.54, 0.56, 0.58)
    assert stops_at(EarlyStoppingConfig(patience=4), lucky) == 70
    assert stops_at(EarlyStoppingConfig(patience=4, smoothing=3), lucky) is None


def test_the_median_looks_at_no_more_than_its_window():
    rule = EarlyStoppingConfig(patience=1, smoothing=2)
    # Medians of two: 0.5, 0.6, 0.75, 0.75 against medians of all so far 0.5, 0.6, 0.7, 0.7.
    assert stops_at(rule, history(0.5, 0.7, 0.8, 0.7)) == 40
    assert stops_at(rule, history(0.5, 0.7, 0.8, 0.71)) is None


def test_it_never_stops_before_min_steps():
    values = history(0.9, 0.5, 0.5, 0.5, 0.5)
    assert stops_at(EarlyStoppingConfig(patience=1), values) == 20
    assert stops_at(EarlyStoppingConfig(patience=1, min_steps=40), values) == 40
    assert stops_at(EarlyStoppingConfig(patience=1, min_steps=41), values) == 50


def test_a_metric_that_should_fall_stops_when_it_does_not_fall():
    rule = EarlyStoppingConfig(metric="loss", patience=2, min_improvement=0.01)
    assert stops_at(rule, history(0.69, 0.6, 0.5, 0.4, metric="loss")) is None
    assert stops_at(rule, history(0.69, 0.7, 0.8, metric="loss")) == 30
    assert stops_at(rule, history(0.69, 0.685, 0.681, metric="loss")) == 30


def test_above_the_kl_budget_it_stops_at_once_whatever_the_metric():
    rule = EarlyStoppingConfig(patience=5, min_steps=1000, max_kl=0.5)
    assert decide(rule, history(0.5, 0.6, kl=0.5)) == GO_ON
    assert decide(rule, [*history(0.5, kl=0.1), *history(0.5, 0.6, kl=0.512)[1:]]) == Decision(
        True, "kl 0.512 above the budget 0.5 at step 20"
    )
    assert decide(rule, [*history(0.5, kl=0.9), *history(0.5, 0.6, kl=0.1)[1:]]) == GO_ON
    assert decide(rule, history(0.5, 0.6)) == GO_ON


def test_a_resumed_run_decides_as_an_unbroken_one():
    """The decision is a function of the history alone: asking before changes nothing."""
    values = history(0.5, 0.7, 0.6, 0.65)
    rule = EarlyStoppingConfig(patience=2)
    before = [decide(rule, values[:i]) for i in range(5)]
    assert before == [decide(rule, values[:i]) for i in range(5)]
    assert before[-1].stop


@pytest.mark.parametrize(("metric", "step"), [("rewards/accuracies", 20), ("loss", 10), ("kl", 10)])
def test_the_best_evaluation_is_the_earlier_of_equals_in_the_metrics_direction(metric: str, step: int):
    best = best_evaluation(history(0.3, 0.7, 0.7, 0.3, metric=metric), metric)
    assert best is not None
    assert best.step == step


def test_an_unknown_metric_is_named_with_those_there_are():
    check_metric("loss", ["loss", "kl"])
    with pytest.raises(InputError, match=r"early_stopping\.metric.*no metric `rewards/accuracies`.*it has loss, kl"):
        check_metric("rewards/accuracies", ["loss", "kl"])
