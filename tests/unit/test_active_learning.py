"""The pieces of the active learning benchmark: pools, oracle, arms and areas, without training a model."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from benchmarks.findings import active_learning
from benchmarks.findings.active_learning import (
    ARMS,
    REPLICATED,
    STUDIES,
    Arm,
    Candidates,
    Pool,
    Results,
    State,
    Study,
    agreement,
    area,
    chosen_rows,
    content_ids,
    gaps_as,
    head_gaps,
    linear_gaps,
    logistic_posterior,
    oracle_prefers_first,
    pool_of,
    report,
    shuffled,
    verdict_table,
    written,
)
from benchmarks.findings.pico import (
    NUM_TOPICS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    Grammar,
    Labelled,
    Reward,
    draw_reward,
)
from dpo_ray.acquisition.choose import LogDet
from dpo_ray.acquisition.scores import STRATEGIES, Ask
from dpo_ray.config import EnsembleConfig

WIDTH = 6


class Known(NamedTuple):
    """What of a task the pieces ask for."""

    reward: Reward
    seed: int
    grammar: Grammar
    reference: Any = None


def known(seed: int = 0) -> Any:
    return Known(draw_reward(np.random.default_rng(seed), contextual=True), seed, Grammar())


def texts(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grammar, topics = Grammar(), rng.integers(NUM_TOPICS, size=count)
    first, second = grammar.texts(topics, rng), grammar.texts(topics, rng)
    return first[:, :PROMPT_LENGTH], first[:, PROMPT_LENGTH:], second[:, PROMPT_LENGTH:]


def candidates(count: int = 300, *, labels: int = 40, policy_gaps: np.ndarray | None = None, **columns: Any) -> Any:
    """A pool whose columns were computed by no model: `policy_gaps` [N] are the implicit margins."""
    task, pool, rng = known(), pool_of(*texts(count)), np.random.default_rng(1)
    labelled = Labelled(*texts(labels, seed=9))
    found = Candidates(task, State(labelled, frozenset(), None, {}), pool, seed=5)
    size = len(pool.ids)
    gaps = rng.normal(size=size) if policy_gaps is None else policy_gaps
    known_columns = gaps_as(gaps) | {
        "sample_logps": -rng.gamma(9, 3, size=(size, 4)),
        "hidden": rng.normal(size=(size, 2, WIDTH)),
        "prompt_hidden": rng.normal(size=(size, WIDTH)),
        "labelled_hidden": rng.normal(size=(labels, 2, WIDTH)),
    }
    for name, values in (known_columns | columns).items():
        setattr(found, name, values)
    return found


@pytest.fixture(autouse=True)
def heads_that_hardly_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_learning, "ENSEMBLE", EnsembleConfig(steps=3))


# Pools and oracle


def test_a_pool_has_each_content_once_whichever_response_comes_first():
    prompts, first, second = texts(3)
    pool = pool_of(
        np.concatenate([prompts, prompts[:1], prompts[1:2]]),
        np.concatenate([first, second[:1], first[1:2]]),
        np.concatenate([second, first[:1], first[1:2]]),
    )
    assert sorted(pool.ids) == sorted(content_ids(prompts, first, second))
    assert content_ids(prompts, first, second).tolist() == content_ids(prompts, second, first).tolist()


def test_ids_go_by_prompt_and_both_responses():
    prompts, first, second = texts(2)
    ids = content_ids(prompts, first, second)
    for other in ((prompts[::-1], first, second), (prompts, first[::-1], second), (prompts, first, second[::-1])):
        assert not set(ids) & set(content_ids(*other))


def test_the_oracle_errs_in_its_share_and_always_in_the_same_pairs():
    task, pool = known(), pool_of(*texts(4000))
    answers = oracle_prefers_first(task, pool)
    truth = task.reward(pool.prompts, pool.first) > task.reward(pool.prompts, pool.second)
    assert (answers != truth).mean() == pytest.approx(0.05, abs=0.015)
    swapped = Pool(pool.ids, pool.prompts, pool.second, pool.first)
    np.testing.assert_array_equal(oracle_prefers_first(task, swapped), ~answers)
    some = np.arange(0, len(pool.ids), 7)
    np.testing.assert_array_equal(oracle_prefers_first(task, Pool(*(c[some] for c in pool))), answers[some])
    other = oracle_prefers_first(task._replace(seed=1), pool) != truth
    assert (other != (answers != truth)).any()


@pytest.mark.parametrize(("of_all_pairs", "each"), [(False, 2), (True, 8)])
def test_as_many_responses_are_written_for_either_kind_of_pool(
    of_all_pairs: bool, each: int, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def sample(model: Any, prompts: np.ndarray, *, seed: int, temperature: float) -> Any:
        asked.append((len(prompts), temperature))
        texts = Grammar().texts(prompts[:, 0], np.random.default_rng(seed))
        return type("Sampled", (), {"responses": texts[:, PROMPT_LENGTH:]})

    monkeypatch.setattr(active_learning, "sample", sample)
    pool = written(known(), None, 1, of_all_pairs=of_all_pairs)
    assert asked == [(1024, 0.7)]
    prompts, counts = np.unique(pool.prompts, axis=0, return_counts=True)
    assert len(prompts) <= 1024 // each
    assert np.median(counts) == each * (each - 1) // 2
    both = np.concatenate([pool.prompts, pool.first], axis=1)
    assert len(np.unique(both, axis=0)) > 0.3 * 1024
    again = written(known(), None, 1, of_all_pairs=of_all_pairs)
    np.testing.assert_array_equal(again.ids, pool.ids)
    assert not set(written(known(), None, 2, of_all_pairs=of_all_pairs).ids) & set(pool.ids)


# Arms


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_chooses_a_round(name: str):
    rows = chosen_rows(ARMS[name], candidates(), Ask(32, seed=3))
    assert len(set(rows.tolist())) == 32


def test_a_policy_that_is_the_reference_makes_undecided_arms_choose_as_random_does():
    pool = candidates(labels=0, policy_gaps=np.zeros(300), labelled_hidden=np.zeros((0, 2, WIDTH)))
    ask = Ask(32, seed=3)
    random = chosen_rows(REPLICATED["random"], pool, ask)
    for name in ("certainty", "uncertainty", "bald", "heads' gap", "offline_random", "certainty, shuffled"):
        np.testing.assert_array_equal(chosen_rows(ARMS[name], pool, ask), random, err_msg=name)
    for name in ("entropy", "d_optimal", "oracle_gap", "linear upper bound", "certainty, log_det"):
        assert set(chosen_rows(ARMS[name], pool, ask)) != set(random), name


def test_the_frozen_control_chooses_at_random_whatever_the_policy_knows():
    ask = Ask(32, seed=3)
    random, frozen = (
        chosen_rows(REPLICATED[name], candidates(), ask) for name in ("random", "certainty, frozen policy")
    )
    np.testing.assert_array_equal(frozen, random)
    assert set(chosen_rows(REPLICATED["certainty"], candidates(), ask)) != set(random)


def test_the_shuffled_control_has_the_same_gaps_on_other_pairs():
    pool = candidates(reference_logps=-1e4 - np.random.default_rng(2).gamma(9, 3, size=(300, 2)))
    columns = shuffled(pool)
    gaps = (columns["policy_logps"] - columns["reference_logps"]) @ [1, -1]
    np.testing.assert_allclose(np.sort(gaps), np.sort(pool.gaps), atol=1e-9)
    assert (np.abs(gaps - pool.gaps) > 1e-6).mean() > 0.9


def test_options_and_limits_of_an_arm_count():
    pool, ask = candidates(), Ask(32, seed=3)
    band = chosen_rows(Arm("margin_band", options={"low": 0.85}), pool, ask)
    assert np.abs(pool.gaps[band]).min() >= np.quantile(np.abs(pool.gaps), 0.84)
    arm = ARMS["all pairs: certainty, log_det"]
    few = candidates(40)
    same = few.pool._replace(prompts=np.repeat(few.pool.prompts[:8], 5, axis=0))
    few.pool = same
    rows = chosen_rows(arm, few, ask)
    assert len(rows) == len(np.unique(same.prompts[rows], axis=0)) == 8


def test_certainty_ranks_by_the_gaps_that_stand_in_for_the_policys():
    values = np.random.default_rng(0).normal(size=300)
    rows = chosen_rows(Arm("certainty", view=lambda pool: gaps_as(values)), candidates(), Ask(20))
    np.testing.assert_array_equal(rows, np.argsort(-np.abs(values))[:20])


def test_bounds_of_the_heads_gap_worked_by_hand():
    # Means 2 and -1, deviations sqrt(2) and 3 sqrt(2).
    pool = candidates(2, head_margins=np.array([[1.0, 3.0], [2.0, -4.0]]))

    def gaps(spreads: float) -> Any:
        columns = head_gaps(spreads)(pool)
        return pytest.approx((columns["policy_logps"] - columns["reference_logps"]) @ [1, -1], abs=1e-9)

    assert gaps(0.0) == [2.0, 1.0]
    assert gaps(1.0) == [2 + 2**0.5, 1 + 3 * 2**0.5]
    assert gaps(-1.0) == [2 - 2**0.5, 0.0]


def test_the_linear_bound_is_by_length_before_any_label_and_by_the_gap_after_many():
    direction = np.arange(1.0, WIDTH + 1)
    apart = np.random.default_rng(3).normal(size=(3000, 2, WIDTH))
    turned = (apart[:, 0] - apart[:, 1]) @ direction < 0
    apart[turned] = apart[turned, ::-1]

    def values(view: Any, pool: Any) -> np.ndarray:
        columns = view(pool)
        return (columns["policy_logps"] - columns["reference_logps"]) @ np.array([1.0, -1.0])

    none = candidates(labelled_hidden=np.zeros((0, 2, WIDTH)))
    np.testing.assert_allclose(values(linear_gaps(0.0), none), 0, atol=1e-9)
    scale = none.hidden.reshape(-1, WIDTH).std(0)
    lengths = np.linalg.norm((none.hidden[:, 0] - none.hidden[:, 1]) / scale, axis=1)
    assert np.corrcoef(values(linear_gaps(1.0), none), lengths)[0, 1] > 0.999999
    many = candidates(labelled_hidden=apart)
    true = np.abs((many.hidden[:, 0] - many.hidden[:, 1]) @ direction)
    assert np.corrcoef(values(linear_gaps(1.0), many), true)[0, 1] > 0.98


def test_the_logistic_posterior_is_the_mode_and_its_curvature():
    vectors = np.random.default_rng(0).normal(loc=(1, 0, 0), size=(7, 3))
    mode, covariance = logistic_posterior(vectors, 0.4)

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -vectors @ w).sum() + 0.2 * w @ w)

    np.testing.assert_allclose(mode, minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-5)
    w = torch.tensor(mode, requires_grad=True)
    hessian = torch.autograd.functional.hessian(
        lambda w: torch.nn.functional.softplus(-torch.tensor(vectors) @ w).sum() + 0.2 * w @ w, w
    )
    np.testing.assert_allclose(np.linalg.inv(covariance), hessian.numpy(), rtol=1e-9)
    empty, prior = logistic_posterior(np.zeros((0, 3)), 0.4)
    np.testing.assert_array_equal(empty, 0)
    np.testing.assert_allclose(prior, np.eye(3) / 0.4)


def test_studies_name_arms_that_are_there_and_begin_with_what_all_is_compared_to():
    for names in STUDIES.values():
        assert {"random", "oracle_gap"} <= set(names) <= set(ARMS)
        assert len(set(names)) == len(names)
    assert {arm.strategy for arm in ARMS.values()} <= set(STRATEGIES)
    assert ARMS["certainty, log_det"].batch == LogDet()


# Rounds


class Counted:
    """A learner that costs nothing: what it was asked to learn, and a policy that is the number of its labels."""

    def __init__(self) -> None:
        self.asked: list[Labelled] = []

    def __call__(self, labelled: Labelled) -> tuple[Any, dict[str, float]]:
        self.asked.append(labelled)
        return len(labelled.prompts), {"true_reward": float(labelled.chosen.sum())}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> tuple[Study, Counted]:
    def sample(model: Any, prompts: np.ndarray, *, seed: int, temperature: float = 1.0) -> Any:
        texts = Grammar().texts(prompts[:, 0], np.random.default_rng([seed, model or 0]))[:, PROMPT_LENGTH:]
        log_probs = torch.zeros(*texts.shape, 64) - 4 - torch.from_numpy(texts)[..., None] % 5
        return type("Sampled", (), {"responses": texts, "log_probs": log_probs})

    def logps(model: Any, prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        return -20000.0 + (model or 0) * np.sin(responses).sum(axis=1)

    def states(model: Any, prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        return np.sin(responses + (model or 0)) if len(prompts) else np.zeros((0, RESPONSE_LENGTH))

    for name, stand_in in (("sample", sample), ("response_logps", logps), ("response_states", states)):
        monkeypatch.setattr(active_learning, name, stand_in)
    learn = Counted()
    return Study(known(), learn, to=96), learn


def test_arms_share_every_round_up_to_the_one_in_which_they_part(study: tuple[Study, Counted]):
    run, learn = study
    random = run.run(ARMS["random"])
    assert [len(labelled.prompts) for labelled in learn.asked] == [32, 64, 96]
    certainty = run.run(ARMS["certainty"])
    assert [len(labelled.prompts) for labelled in learn.asked[3:]] == [64, 96]
    assert certainty[0] == random[0]
    assert certainty[1]["true_reward"] != random[1]["true_reward"]
    assert run.run(ARMS["certainty, frozen policy"]) == random
    assert run.run(ARMS["random"]) == random
    assert len(learn.asked) == 5
    run.run(ARMS["oracle_gap"])
    assert [len(labelled.prompts) for labelled in learn.asked[5:]] == [32, 64, 96]


def test_labels_are_kept_and_never_asked_for_twice(study: tuple[Study, Counted]):
    run, learn = study
    for name in ("certainty", "entropy", "certainty, log_det", "d_optimal after labelled"):
        run.run(ARMS[name])
        before: set[str] = set()
        for labelled in learn.asked[-3:]:
            ordered = content_ids(*labelled).tolist()
            assert ordered == sorted(ordered)  # whatever the rounds that they came in
            ids = set(ordered)
            assert len(ids) == len(labelled.prompts)
            assert before < ids
            before = ids


@pytest.mark.parametrize("name", ["random", "certainty, log_det", "d_optimal after labelled"])
def test_what_is_written_again_is_not_labelled_again(
    name: str, study: tuple[Study, Counted], monkeypatch: pytest.MonkeyPatch
):
    always = pool_of(*texts(100))
    monkeypatch.setattr(active_learning, "written", lambda *_, **__: always)
    study[0].run(ARMS[name])
    assert len(set(content_ids(*study[1].asked[-1]).tolist())) == 96


def test_a_greedy_rule_may_start_from_the_labels_of_earlier_rounds(study: tuple[Study, Counted]):
    run, learn = study
    afresh, after = (run.run(ARMS[name]) for name in ("certainty, log_det", "certainty, log_det after labelled"))
    assert after[0] == afresh[0]
    assert after[1] != afresh[1]
    assert [len(labelled.prompts) for labelled in learn.asked] == [32, 64, 96, 64, 96]


def test_the_better_response_is_the_chosen_one_but_for_the_oracles_errors(study: tuple[Study, Counted]):
    run, learn = study
    run.run(ARMS["random"])
    labelled, reward = learn.asked[-1], known().reward
    right = reward(labelled.prompts, labelled.chosen) > reward(labelled.prompts, labelled.rejected)
    assert 0.85 < right.mean() < 1


def test_rows_of_a_round(study: tuple[Study, Counted]):
    rows = study[0].run(ARMS["oracle_gap"])
    assert [row["m"] for row in rows] == [32, 64, 96]
    assert ["agreement" in row for row in rows] == [False, True, True]
    assert rows[0]["gap"] > 1.5 * study[0].run(ARMS["random"])[0]["gap"]


# What is computed of the rows


def test_agreement_counts_signs_that_are_the_oracles():
    gaps, prefers_first = np.array([2.0, -1.0, 0.5, 0.0]), np.array([True, True, False, True])
    assert agreement(gaps, prefers_first) == pytest.approx((1 + 0 + 0 + 0.5) / 4)


def test_an_area_is_the_mean_height_from_no_label_on():
    # Trapezia of 32 by (50 + 60) / 2 and 32 by (60 + 80) / 2.
    assert area([32, 64], [60.0, 80.0], 50.0) == pytest.approx((55 + 70) / 2)
    assert area([10, 40], [1.0, 1.0], 0.0) == pytest.approx((5 + 30) / 40)


def rows_of(study: str, arms: dict[str, float], seeds: int = 6) -> list[dict[str, Any]]:
    """True reward by arm, with noise of the seed and of the arm; the other metrics follow it."""
    noise = np.random.default_rng(0).normal(size=seeds) / 10
    found = []
    for task in ("c0", "c1"):
        for arm, value in arms.items():
            name = "random" if arm == "certainty, frozen policy" else arm
            own = np.random.default_rng(len(name)).normal(size=seeds) / 100
            for seed in range(seeds):
                for m in (32, 64):
                    reward = float(value * m / 64 + noise[seed] + own[seed])
                    told = {"study": study, "task": task, "arm": arm, "seed": seed, "m": m, "true_reward": reward}
                    row = told | {"win_rate": 0.5 + reward / 4, "sequence_kl": 1.0, "gap": 1.0}
                    found.append(row | ({"agreement": 0.7 + value / 10 + own[seed] / 10} if m == 64 else {}))
    return found


REPLICABLE = dict.fromkeys(REPLICATED, 0.4) | {
    "oracle_gap": 0.8,
    "certainty": 0.5,
    "entropy": 0.3,
    "uncertainty": 0.2,
    "offline_random": 0.3,
}


def test_the_share_of_the_head_room_is_of_what_the_control_gains():
    results = Results(
        rows_of("explore", {"random": 0.4, "bald": 0.5, "oracle_gap": 0.8}), "explore", ["random", "bald", "oracle_gap"]
    )
    assert results.head_room("true_reward", "c0", "bald") == pytest.approx(0.25, abs=0.05)
    assert results.head_room("true_reward", "c0", "oracle_gap") == 1
    assert results.of("win_area", "c1", "bald")[2] == pytest.approx(
        (50 / 2 + results.of("win_rate", "c1", "bald", 32)[2] + results.of("win_rate", "c1", "bald", 64)[2] / 2) / 2
    )


def test_both_tasks_are_the_mean_of_the_two_by_seed():
    rows = rows_of("again", {"random": 0.4, "bald": 0.5})
    for row in rows:
        row["true_reward"] += 0.3 * (row["task"] == "c1")
    results = Results(rows, "again", ["random", "bald"])
    expected = np.array(results.of("true_reward", "c0", "bald")) + 0.15
    np.testing.assert_allclose(results.of("true_reward", "both", "bald"), expected)


def test_rates_of_all_rounds_are_averaged():
    rows = rows_of("long", {"random": 0.4, "bald": 0.5})
    for row in rows:
        row |= {"gap": 1.0 * (row["m"] == 64), "agreement": 0.25 + 0.5 * (row["m"] == 64)}
    results = Results(rows, "long", ["random", "bald"])
    assert results.of("gap", "c0", "bald") == [0.5] * 6
    assert results.of("agreement", "c0", "bald") == [0.5] * 6


def test_only_seeds_of_which_all_is_done_count():
    rows = rows_of("replicate", {"random": 0.4, "bald": 0.5})
    rows = [row for row in rows if not (row["seed"] == 3 and row["arm"] == "bald" and row["task"] == "c1")]
    assert Results(rows, "replicate", ["random", "bald", "entropy"]).seeds == [0, 1, 2, 4, 5]


def test_every_verdict_turns_with_what_it_is_about():
    def verdicts(**changed: float) -> list[str]:
        rows = rows_of("replicate", REPLICABLE | changed)
        told = verdict_table(Results(rows, "replicate", list(REPLICATED))).splitlines()[2:]
        return [line.split("|")[-2].strip() for line in told]

    assert set(verdicts()) == {"holds"}
    assert verdicts(oracle_gap=0.4)[:4] == ["does not hold"] * 4
    assert verdicts(entropy=0.6)[4] == "does not hold"
    assert verdicts(certainty=0.4)[5::2][:2] == ["does not hold"] * 2
    assert verdicts(uncertainty=0.4)[6::2][:2] == ["does not hold"] * 2
    assert verdicts(certainty=0.1)[9] == "does not hold"
    assert verdicts(offline_random=0.6)[10] == "does not hold"
    assert verdicts(**{"certainty, frozen policy": 0.41})[11] == "does not hold"


def test_the_report_tells_of_the_studies_that_were_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(active_learning, "CONFIRMED", ("certainty, log_det",))
    replicated = rows_of("replicate", REPLICABLE | {"certainty, log_det": 0.6})
    told = report(replicated)
    assert "**Replication**" in told
    assert "**Confirmation**" in told
    assert "**Exploration**" not in told
    confirmed = [line for line in told.split("**Confirmation**")[1].splitlines() if "log_det" in line]
    assert len(confirmed) == 2
    assert all("50%" in line or "49%" in line or "51%" in line for line in confirmed)
    assert all(line.count("above random") == 2 for line in confirmed)
    explored = report(rows_of("explore", {"random": 0.4, "oracle_gap": 0.8, "bald": 0.5, "certainty": 0.6}))
    order = [line.split("|")[1].strip() for line in explored.splitlines() if line.startswith("| ")]
    assert order[-3:] == ["oracle_gap", "certainty", "bald"]
