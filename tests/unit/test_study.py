"""Studies whose winner, differences and costs are known."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpo_ray.comparisons import holm
from dpo_ray.errors import InputError
from dpo_ray.metrics import wilson_interval
from dpo_ray.study import (
    Comparison,
    Configuration,
    Objective,
    Standing,
    Study,
    compare,
    compute,
    configurations,
    confirmation_standing,
    numeric_settings,
    pareto_front,
    ranked,
    read_study,
    search_standing,
)
from dpo_ray.study_findings import SizeCurve, findings, size_curves
from tests.unit.studies import ACCURACIES, KL, MARGINS, planted, sized, study, trial

ACCURACY = Objective(ACCURACIES, "max")


def read(trials: list[dict[str, Any]], **changes: Any) -> Study:
    return read_study(study(trials, **changes))


def searched(trials: list[dict[str, Any]], **changes: Any) -> Standing:
    standing = search_standing(read(trials, **changes))
    assert standing is not None
    return standing


def betas(found: list[Configuration]) -> list[float]:
    return [configuration.settings["loss.beta"] for configuration in found]


def verdicts(comparisons: list[Comparison]) -> dict[float, str]:
    return {comparison.configuration.settings["loss.beta"]: comparison.verdict for comparison in comparisons}


def values_of(trials: list[dict[str, Any]], beta: float) -> list[float]:
    return [one["best"][ACCURACIES] for one in trials if one["settings"]["loss.beta"] == beta]


def test_the_planted_winner_is_found_and_only_what_is_worse_is_called_so():
    trials = planted()
    standing = searched(trials)
    assert betas(standing.ranked) == [0.1, 0.03, 1.0]
    assert standing.best is standing.ranked[0]
    assert verdicts(standing.comparisons) == {0.03: "not distinguishable", 1.0: "worse"}
    assert {(c.over, c.num_common) for c in standing.comparisons} == {("seeds", 5)}

    # Holm among all three pairs of configurations, of which one is not tested and counts as 1.
    tests = [stats.ttest_rel(values_of(trials, beta), values_of(trials, 0.1)) for beta in (0.03, 1.0)]
    adjusted = holm([*(test.pvalue for test in tests), 1.0])
    assert [c.p_value for c in standing.comparisons] == pytest.approx(adjusted[:2], rel=1e-9)
    difference = standing.comparisons[1].difference
    assert difference is not None
    assert tuple(difference[1:]) == pytest.approx(tuple(tests[1].confidence_interval(0.95)), rel=1e-9)
    assert difference.estimate == pytest.approx(-0.1, abs=0.005)


def test_a_mean_over_seeds_has_students_interval():
    trials = planted()
    estimate = searched(trials).best.estimate(ACCURACIES)
    assert estimate is not None
    values = values_of(trials, 0.1)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert estimate[:3] == pytest.approx((np.mean(values), low, high), rel=1e-9)
    assert (estimate.over, estimate.num_seeds) == ("seeds", 5)


def test_the_interval_of_a_share_stays_one():
    estimate = searched([trial(0, {}, 0.7), trial(1, {}, 0.9, seed=1)]).best.estimate(ACCURACIES)
    assert estimate is not None
    assert estimate == pytest.approx((0.8, 0.0, 1.0, "seeds", 2))


def test_one_seed_has_the_interval_of_its_pairs():
    written = trial(0, {"loss.beta": 0.1}, 0.7)
    written["best"] |= {f"{ACCURACIES}_low": 0.65, f"{ACCURACIES}_high": 0.74}
    computed = trial(1, {"loss.beta": 0.2}, 0.6)
    first, second = searched([written, computed]).ranked
    assert first.estimate(ACCURACIES) == (0.7, 0.65, 0.74, "pairs", 1)
    assert second.estimate(ACCURACIES) == (0.6, *wilson_interval(0.6, 400), "pairs", 1)
    assert second.estimate("loss") == (0.6, None, None, None, 1)
    assert second.estimate("entropy") is None


def test_equal_configurations_are_rarely_told_apart_although_the_luckiest_is_the_best():
    """Counting only the comparisons with the best, about one study in ten would call an equal configuration worse."""
    rng = np.random.default_rng(0)
    wrong = {"pairs of configurations": 0, "others": 0}
    for _ in range(200):
        values = rng.normal(0, 0.02, (10, 4)) + 0.7
        trials = [
            trial(10 * seed + i, {"loss.beta": i}, float(values[i, seed]), seed=seed)
            for i, seed in itertools.product(range(10), range(4))
        ]
        order = ranked(configurations(read(trials).trials), ACCURACY)
        for name, count in (("pairs of configurations", 45), ("others", 9)):
            found = compare(order[0], order[1:], ACCURACY, num_comparisons=count)
            wrong[name] += any(comparison.verdict != "not distinguishable" for comparison in found)
    assert wrong["pairs of configurations"] <= 10
    assert wrong["others"] > 10


def test_of_ties_the_one_with_more_seeds_leads_and_then_the_earlier():
    trials = [
        trial(0, {"loss.beta": 0.3}, 0.7),
        trial(1, {"loss.beta": 0.2}, 0.7),
        *(trial(2 + seed, {"loss.beta": 0.1}, 0.7, seed=seed) for seed in range(3)),
    ]
    assert betas(searched(trials).ranked) == [0.1, 0.3, 0.2]
    same = [trial(2 * s + i, {"loss.beta": b}, 0.7, seed=s) for i, b in enumerate((0.1, 0.2)) for s in range(4)]
    assert verdicts(searched(same).comparisons) == {0.2: "not distinguishable"}


def margins(mean: float, num_pairs: int = 400, seed: int = 0) -> dict[str, float]:
    """The pairs of a seed are equally hard for all, as far as `mean` lets them."""
    noise = np.random.default_rng(seed).normal(0, 1, num_pairs)
    return {f"p{i}": float(mean + noise[i]) for i in range(num_pairs)}


def share(table: dict[str, float]) -> float:
    return float(np.mean([margin > 0 for margin in table.values()]))


def test_with_few_seeds_the_test_is_over_held_out_pairs():
    tables = {0.1: margins(0.8), 0.2: margins(0.79), 1.0: margins(0.2)}
    trials = [trial(i, {"loss.beta": b}, share(t), margins=t) for i, (b, t) in enumerate(tables.items())]
    standing = searched(trials)
    assert verdicts(standing.comparisons) == {0.2: "not distinguishable", 1.0: "worse"}
    worse = standing.comparisons[-1]
    assert (worse.over, worse.num_common) == ("pairs", 400)
    assert worse.difference is not None
    assert worse.difference.estimate == pytest.approx(share(tables[1.0]) - share(tables[0.1]))
    error = np.std([(tables[1.0][p] > 0) - (tables[0.1][p] > 0.0) * 1.0 for p in tables[0.1]]) / 20
    assert worse.difference.high - worse.difference.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_several_seeds_are_averaged_per_pair():
    first, second = margins(0.8, seed=1), margins(0.8, seed=2)
    trials = [
        trial(0, {"loss.beta": 0.1}, share(first), seed=1, margins=first),
        trial(1, {"loss.beta": 0.1}, share(second), seed=2, margins=second),
        trial(2, {"loss.beta": 1.0}, 0.5, seed=3, margins=margins(0.0, seed=3)),
    ]
    (comparison,) = searched(trials).comparisons
    expected = share(margins(0.0, seed=3)) - (share(first) + share(second)) / 2
    assert comparison.difference is not None
    assert comparison.difference.estimate == pytest.approx(expected)
    assert comparison.verdict == "worse"


def test_over_pairs_only_the_common_seeds_count_if_there_are_any():
    """Two are not enough to test over seeds; the third of each is of another seed and would add its own noise."""
    seeds = {0.1: (1, 2, 3), 0.2: (1, 2, 4)}
    trials = []
    for i, (beta, chosen) in enumerate(seeds.items()):
        tables = [margins(0.5 - i / 50 if seed < 3 else 2.0 * i, seed=seed) for seed in chosen]
        trials += [
            trial(10 * i + seed, {"loss.beta": beta}, share(t), seed=seed, margins=t)
            for seed, t in zip(chosen, tables, strict=True)
        ]
    (comparison,) = searched(trials).comparisons
    assert betas(searched(trials).ranked) == [0.2, 0.1]
    assert (comparison.over, comparison.num_common) == ("pairs", 400)
    one, two = (np.mean([share(margins(m, seed=seed)) for seed in (1, 2)]) for m in (0.5, 0.48))
    assert comparison.difference is not None
    assert comparison.difference.estimate == pytest.approx(one - two)


@pytest.mark.parametrize(
    "other",
    [None, {}, margins(0.1, 399), {f"q{i}": 0.1 for i in range(400)}, margins(0.1) | {"p3": math.nan}],
    ids=["none", "empty", "fewer", "other pairs", "nan"],
)
def test_without_common_seeds_or_pairs_nothing_is_tested(other: dict[str, float] | None):
    trials = [
        trial(0, {"loss.beta": 0.1}, 0.9, margins=margins(0.8)),
        trial(1, {"loss.beta": 1.0}, 0.5, margins=other),
    ]
    (comparison,) = searched(trials).comparisons
    assert (comparison.verdict, comparison.difference, comparison.p_value) == ("untestable", None, None)


def test_few_pairs_and_metrics_without_pairs_are_untestable():
    few = [trial(i, {"loss.beta": i}, v, margins=margins(v, 29)) for i, v in enumerate((0.9, 0.2))]
    assert verdicts(searched(few).comparisons) == {1: "untestable"}
    many = [trial(i, {"loss.beta": i}, v, margins=margins(v)) for i, v in enumerate((0.9, 0.2))]
    loss = [{"metric": "loss", "mode": "min"}]
    assert verdicts(searched(many, objectives=loss).comparisons) == {1: "untestable"}
    assert verdicts(searched(many).comparisons) == {1: "worse"}


def test_only_finished_trials_count():
    trials = [
        trial(0, {"loss.beta": 0.1}, 0.6),
        trial(1, {"loss.beta": 0.2}, 0.9, status="failed", error="out of memory"),
        trial(2, {"loss.beta": 0.3}, 0.9, status="interrupted"),
        trial(3, {"loss.beta": 0.4}, 0.9, status="running"),
        trial(4, {"loss.beta": 0.5}, 0.5, status="stopped_by_scheduler"),
        trial(5, {"loss.beta": 0.6}, 0.55, status="stopped_early"),
        trial(6, {"loss.beta": 0.7}, None),
        trial(7, {"loss.beta": 0.8}, math.nan),
    ]
    assert betas(searched(trials).ranked) == [0.1, 0.6, 0.5]
    assert len(configurations(read(trials).trials)) == 8
    assert search_standing(read(trials[1:4])) is None
    assert search_standing(read([])) is None


def test_a_seed_that_was_run_twice_counts_once():
    found = searched([trial(0, {}, 0.6), trial(1, {}, 0.7), trial(2, {}, 0.8, seed=1)]).best
    assert found.values(ACCURACIES) == {0: 0.7, 1: 0.8}


def test_a_metric_that_falls_ranks_the_other_way_round():
    trials = [trial(i, {"loss.beta": beta}, 0.7) for i, beta in enumerate((0.1, 0.2, 0.3))]
    for one, kl in zip(trials, (0.5, 0.1, 0.3), strict=True):
        one["best"][KL] = kl
    assert betas(searched(trials, objectives=[{"metric": KL, "mode": "min"}]).ranked) == [0.2, 0.3, 0.1]


def test_the_pareto_front_is_what_nothing_dominates():
    points = {
        0.1: (0.70, 0.5),
        0.2: (0.65, 0.2),
        0.3: (0.64, 0.3),
        0.4: (0.60, 0.1),
        0.5: (0.70, 0.5),
        0.6: (0.9, None),
    }
    trials = []
    for i, (beta, (accuracy, kl)) in enumerate(points.items()):
        trials.append(trial(i, {"loss.beta": beta}, accuracy))
        trials[-1]["best"][KL] = kl
    objectives = [{"metric": ACCURACIES, "mode": "max"}, {"metric": KL, "mode": "min"}]
    whole = read(trials, objectives=objectives)
    assert betas(pareto_front(configurations(whole.trials), whole.objectives)) == [0.1, 0.5, 0.2, 0.4]
    assert findings(read(trials)).front == []


def test_compute_tells_savings_from_what_was_cut_off():
    trials = [
        trial(0, {}, 0.6),
        trial(1, {}, 0.6, status="stopped_early", steps=40),
        trial(2, {}, 0.6, status="stopped_by_scheduler", steps=10),
        trial(3, {}, None, steps=5),
        trial(4, {}, None, status="interrupted", error=None, steps=70),
    ]
    spent = compute(read(trials).trials)
    assert (spent.full, spent.spent) == (500, 225)
    assert (spent.saved_early, spent.saved_by_scheduler, spent.cut_off) == (60, 90, 125)
    assert spent.full == spent.spent + spent.saved_early + spent.saved_by_scheduler + spent.cut_off
    assert (spent.pairs_seen, spent.train_seconds) == (16000, 250.0)


def confirmed(*means: float, beta: tuple[float, ...] = (0.1, 0.03)) -> list[dict[str, Any]]:
    noise = np.random.default_rng(4).normal(0, 0.003, (len(means), 4))
    return [
        trial(100 + 10 * i + s, {"loss.beta": beta[i]}, mean + float(noise[i, s]), seed=50 + s, confirms="t005")
        for i, mean in enumerate(means)
        for s in range(4)
    ]


def test_a_confirmation_stands_apart_and_is_held_against_the_winner_of_the_search():
    whole = read(planted() + confirmed(0.65, 0.68))
    search, fresh = search_standing(whole), confirmation_standing(whole)
    assert search is not None
    assert fresh is not None
    assert betas(search.ranked) == [0.1, 0.03, 1.0]
    assert search.best.estimate(ACCURACIES) == searched(planted()).best.estimate(ACCURACIES)
    assert betas(fresh.ranked) == [0.03, 0.1]
    assert fresh.best.settings == {"loss.beta": 0.1}
    assert verdicts(fresh.comparisons) == {0.03: "better"}
    estimate = fresh.best.estimate(ACCURACIES)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.65, abs=0.005)
    assert confirmation_standing(read(planted())) is None


def test_a_confirmation_without_the_winner_ranks_itself():
    fresh = confirmation_standing(read(planted() + confirmed(0.65, 0.68, beta=(0.03, 1.0))))
    assert fresh is not None
    assert fresh.best is fresh.ranked[0]
    assert betas(fresh.ranked) == [1.0, 0.03]


def only_curve(trials: list[dict[str, Any]], **changes: Any) -> SizeCurve:
    (curve,) = size_curves(read(trials, **changes), 6)
    return curve


RISING = {128: 0.60, 256: 0.65, 512: 0.69, 1024: 0.715, 2048: 0.72, 4096: 0.721}


def test_six_sizes_of_four_seeds_give_a_curve_and_its_plateau():
    curve = only_curve(sized(RISING, 4))
    assert [point.pairs for point in curve.points] == list(RISING)
    assert [point.estimate.value for point in curve.points] == pytest.approx(list(RISING.values()), abs=0.015)
    assert curve.fit is not None
    assert curve.fit.limit == 8192
    assert float(curve.fit.predict([8192])[0]) == pytest.approx(0.725, abs=0.02)
    assert curve.trend is not None
    assert [step.verdict for step in curve.trend.steps] == ["rise", "rise", "rise", "plateau", "plateau"]
    assert curve.trend.plateau_from == 1024
    assert curve.subset is not None
    assert (curve.subset.verdict, curve.subset.smallest) == ("less is more", 2048)
    assert (curve.refusals, curve.label, curve.num_stopped) == ([], "the recipe as it is", 0)


def test_three_sizes_are_tested_but_not_fitted():
    curve = only_curve(sized({100: 0.60, 200: 0.70, 400: 0.65}, 6, noise=0.002))
    assert curve.fit is None
    assert curve.refusals == ["a learning curve needs at least 4 sizes, got 3"]
    assert curve.trend is not None
    assert [step.verdict for step in curve.trend.steps] == ["rise", "dip"]


def test_one_seed_is_untestable():
    curve = only_curve(sized(RISING, 1))
    assert curve.trend is not None
    assert curve.subset is not None
    assert {step.verdict for step in curve.trend.steps} == {"untestable"}
    assert curve.subset.verdict == "untestable"


def test_seeds_that_miss_a_size_are_left_out_and_named():
    trials = sized({100: 0.60, 200: 0.70, 400: 0.70}, 4)
    trials[5] |= {"status": "failed"}  # size 200, seed 1
    trials[11] |= {"status": "stopped_by_scheduler"}
    curve = only_curve(trials)
    assert curve.refusals[0] == "seeds 1 left out of curve and tests: not at every size"
    assert curve.trend is not None
    assert curve.num_stopped == 1
    alone = [trial(i, {"data.num_pairs": n}, 0.7, seed=i, train_pairs=n) for i, n in enumerate((100, 200))]
    nothing = only_curve(alone)
    assert (nothing.fit, nothing.trend) == (None, None)
    assert "there are no runs" in nothing.refusals[1]


def test_curves_are_kept_apart_by_the_other_settings():
    low, high = (sized({64: a, 128: b}, 3, **{"loss.beta": c}) for a, b, c in ((0.55, 0.6, 1.0), (0.6, 0.7, 0.1)))
    for i, one in enumerate(low + high):
        one |= {"number": i}
    curves = size_curves(read(low + high), 6)
    assert [curve.label for curve in curves] == ["beta=0.1", "beta=1"]
    assert [len(size_curves(read(low + high), most)) for most in (0, 1)] == [0, 1]
    assert size_curves(read(planted()), 6) == []
    assert [len(curve.points) for curve in size_curves(read([*low, *high[:3]]), 6)] == [2]


def test_all_pairs_may_be_a_size_without_a_number():
    trials = [trial(i, {"data.num_pairs": n}, 0.7, train_pairs=n or 900) for i, n in enumerate((100, 200, None))]
    assert [point.pairs for point in only_curve(trials).points] == [100, 200, 900]


def test_how_much_of_a_nat_matters_is_not_guessed():
    trials = sized(RISING, 3)
    for one in trials:
        one["best"]["loss"] = 1.3 - one["best"][ACCURACIES]
    curve = only_curve(trials, objectives=[{"metric": "loss", "mode": "min"}])
    assert (curve.trend, curve.subset) == (None, None)
    assert curve.fit is not None
    assert curve.refusals == ["dips and plateaus are tested for shares only: how much of loss matters?"]


def test_numeric_settings_are_those_with_numbers_alone():
    rows: list[dict[str, Any]] = [
        {"loss.beta": 0.1, "loss.kind": "dpo", "data.fraction": 1, "a": True, "b": 1, "c": None},
        {"loss.beta": 0.2, "loss.kind": "ipo", "data.fraction": 0.5, "a": False, "b": 1, "c": 2},
    ]
    whole = read([trial(i, row, 0.7) for i, row in enumerate(rows)], varied=["data.fraction", "loss.beta"])
    assert numeric_settings(whole) == ["data.fraction", "loss.beta"]


def test_settings_that_are_lists_form_configurations_and_are_shown_by_their_labels():
    one, two = ({"data.sources": [{"path": path, "weight": 1.0}]} for path in ("a", "b"))
    trials = [trial(i, s, 0.7, seed=i, labels={"data.sources": "only"}) for i, s in enumerate((one, one, two))]
    found = configurations(read(trials).trials)
    assert [len(configuration.trials) for configuration in found] == [2, 1]
    assert found[0].label() == "sources=only"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trials": [{"id": "t0"}]}, r"`trials\.0\.number`"),
        ({"trials": [trial(0, {}, 0.5, status="lost")]}, r"`trials\.0\.status`"),
        ({"objectives": []}, "`objectives`"),
        ({"objectives": [{"metric": "loss", "mode": "up"}]}, r"`objectives\.0\.mode`"),
        ({"seconds": "long"}, "`seconds`"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(InputError, match=rf"study\.json: {named}"):
        read_study(study([]) | changes)
    with pytest.raises(InputError, match=r"study\.json"):
        read_study([])


def test_series_are_in_order_and_finite():
    one = trial(
        0, {}, 0.7, train=[{"step": 20, MARGINS: 2.0}, {"step": 10, MARGINS: math.nan}, {"step": 5, MARGINS: 1}]
    )
    assert list(read([one]).trials[0].series("train", MARGINS).items()) == [(5, 1.0), (20, 2.0)]
