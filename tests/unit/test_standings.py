"""Comparisons of strategies by hand-worked curves, and the report that shows them."""

import math
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.acquire_report import write_acquire_report
from dpo_ray.acquisition.standings import contrasts, curves_of, labels_to, mean_curve
from dpo_ray.comparisons import Interval, holm, paired_t_test
from dpo_ray.errors import InputError
from dpo_ray.storage import Folder

VALUES = {
    "random": {10: [0.50, 0.52, 0.51], 20: [0.60, 0.61, 0.65]},
    "certainty": {10: [0.50, 0.53, 0.53], 20: [0.64, 0.66, 0.69]},
    "entropy": {10: [0.49, 0.50, 0.52], 20: [0.58, 0.63, 0.60]},
}


def a_round(number: int, asked: int, value: float | None) -> dict[str, Any]:
    return {
        "round": number,
        "asked": asked,
        "new": 10,
        "value": value,
        "answers": {"first": 6, "second": 3, "tie": 1},
        "agreement": None if number == 1 else 0.7,
        "undecided": "all equal" if number == 1 else None,
        "cost": {"requests": 20},
        "characters": 80.5,
        "sources": {"data/<pairs>.jsonl": 10},
    }


def tree(values: dict[str, dict[int, list[float]]] = VALUES) -> dict[str, Any]:
    seeds = range(len(next(iter(next(iter(values.values())).values()))))
    return {
        "name": "active & more",
        "status": "completed",
        "strategies": list(values),
        "seeds": list(seeds),
        "metric": "rewards/accuracies",
        "mode": "max",
        "budget": 20,
        "labels_per_round": 10,
        "oracle": "labels",
        "seconds": 12.0,
        "pool": {"kind": "labelled", "candidates": 100, "prompts": 0, "held_out": 30},
        "arms": [
            {
                "strategy": strategy,
                "seed": seed,
                "rounds": [a_round(n, asked, by[seed]) for n, (asked, by) in enumerate(budgets.items(), start=1)],
            }
            for strategy, budgets in values.items()
            for seed in seeds
        ],
    }


def test_contrasts_are_paired_by_seed_and_corrected_within_a_budget():
    found = {(c.strategy, c.labels): c for c in contrasts(curves_of(tree()), 1)}
    assert set(found) == {(name, labels) for name in ("certainty", "entropy") for labels in (10, 20, None)}
    tests = {name: paired_t_test(VALUES[name][20], VALUES["random"][20]) for name in ("certainty", "entropy")}
    corrected = holm([test.p_value for test in tests.values()])
    for (name, test), p in zip(tests.items(), corrected, strict=True):
        assert found[name, 20].difference == test.difference
        assert found[name, 20].p_value == p
    assert found["certainty", 20].verdict == "better"
    assert (found["certainty", 20].wins, found["certainty", 20].losses) == (3, 0)
    assert found["entropy", 20].verdict == "not distinguishable"


def test_the_contrast_over_all_budgets_is_that_of_the_areas():
    found = {(c.strategy, c.labels): c for c in contrasts(curves_of(tree()), 1)}
    # Two budgets: the mean height is the mean of both values.
    areas = {name: [(a + b) / 2 for a, b in zip(by[10], by[20], strict=True)] for name, by in VALUES.items()}
    expected = paired_t_test(areas["certainty"], areas["random"]).difference
    assert found["certainty", None].difference == pytest.approx(expected)


def test_a_metric_that_is_to_be_small_is_turned_round():
    up = {c.strategy: c.difference.estimate for c in contrasts(curves_of(tree()), 1) if c.labels == 20}
    down = {c.strategy: c.difference.estimate for c in contrasts(curves_of(tree()), -1) if c.labels == 20}
    assert down == {name: pytest.approx(-value) for name, value in up.items()}


def test_what_was_not_measured_is_not_compared():
    assert contrasts(curves_of(tree({"certainty": VALUES["certainty"]})), 1) == []
    single = {name: {labels: values[:1] for labels, values in by.items()} for name, by in VALUES.items()}
    assert contrasts(curves_of(tree(single)), 1) == []
    half = tree()
    half["arms"][3]["rounds"][1]["value"] = None  # certainty, seed 0, 20 labels
    found = {(c.strategy, c.labels): c for c in contrasts(curves_of(half), 1)}
    assert found["certainty", 20].difference.estimate == pytest.approx((0.66 - 0.61 + 0.69 - 0.65) / 2)


def test_the_mean_curve_has_an_interval_where_there_are_seeds():
    curve = mean_curve({10: {0: 0.5}, 20: {0: 0.6, 1: 0.8}})
    assert curve[10].estimate == 0.5
    assert math.isnan(curve[10].low)
    assert curve[20].low < 0.7 < curve[20].high
    assert curve[20].estimate == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("target", "sign", "labels"), [(0.5, 1, 10.0), (0.55, 1, 15.0), (0.7, 1, None), (0.45, -1, None), (0.5, -1, 10.0)]
)
def test_labels_to_a_target_lie_on_straight_lines(target: float, sign: int, labels: float | None):
    curve = {10: Interval(0.5, 0, 1), 20: Interval(0.6, 0, 1)}
    found = labels_to(curve, target, sign)
    assert found == (None if labels is None else pytest.approx(labels))


def test_the_report_says_who_wins_and_why_each_was_chosen(tmp_path: Path):
    folder = Folder(str(tmp_path))
    folder.write_json("acquire.json", tree())
    choice = {"candidate_id": "c<1>", "rank": 1, "score": 2.5, "key": 2.5, "strategy": "x", "stage": "top", "gap": -2.5}
    for strategy in VALUES:
        chosen = {"choices": [choice], "undecided": None, "stages": {"pool": 100, "chosen": 10}}
        folder.write_json(f"seed-2/{strategy}/round-02/choices.json", chosen)
    paths = write_acquire_report(str(tmp_path))
    assert [path.rpartition("/")[2] for path in paths] == ["report.html", "report.png"]
    page = folder.read("report.html").decode()
    assert folder.read("report.png").startswith(b"\x89PNG")
    for said in ("active &amp; more", "certainty", "better", "0.0433", "c&lt;1&gt;", "requests", "pool 100, chosen 10"):
        assert said in page, said
    assert "<pairs>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "17 (85%)" in page, "certainty reaches random's 0.62 at 10 + 10 * 0.1 / 0.1433 labels"


def test_a_report_of_one_strategy_says_what_a_comparison_needs(tmp_path: Path):
    single = {"certainty": {labels: values[:1] for labels, values in VALUES["certainty"].items()}}
    folder = Folder(str(tmp_path))
    folder.write_json("acquire.json", tree(single))
    chosen = {"choices": [], "undecided": "all 100 scores are equal", "stages": {}}
    folder.write_json("seed-0/certainty/round-02/choices.json", chosen)
    write_acquire_report(str(tmp_path))
    page = folder.read("report.html").decode()
    assert "Needs the strategy `random`" in page
    assert "all 100 scores are equal" in page


def test_a_report_needs_a_finished_round(tmp_path: Path):
    empty = tree()
    for arm in empty["arms"]:
        arm["rounds"] = []
    Folder(str(tmp_path)).write_json("acquire.json", empty)
    with pytest.raises(InputError, match="no round has ended yet"):
        write_acquire_report(str(tmp_path))
