"""What is chosen: against brute force, against sampling theory, and the same whatever the order of the pool."""

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.acquisition import scores
from dpo_ray.acquisition.choose import (
    Batch,
    FarthestFirst,
    KCenter,
    Limits,
    LogDet,
    LogDetGain,
    Noise,
    Selection,
    Top,
    choose,
    clusters,
)
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features, score
from dpo_ray.errors import InputError


def pool(num: int = 24, seed: int = 0, **columns: Any) -> Features:
    """Candidates with every feature there is; two to a prompt, from three sources, some with equal scores."""
    rng = np.random.default_rng(seed)
    prompts = [i // 2 for i in range(num)]
    samples, states = -rng.gamma(4, 5, size=(num, 5)), rng.normal(size=(num, 3))
    given = {
        "pair_id": [f"p{i:04}" for i in range(num)],
        "prompt_id": [f"q{i:04}" for i in prompts],
        "source": [f"s{i % 3}" for i in range(num)],
        "policy_logps": -rng.integers(1, 9, size=(num, 2)) * 1.0,
        "reference_logps": -rng.integers(1, 9, size=(num, 2)) * 1.0,
        "sample_logps": samples[prompts],
        "hidden": rng.normal(size=(num, 2, 4)),
        "prompt_hidden": states[prompts],
        "head_margins": rng.normal(size=(num, 4)) * 2,
        "gold_gap": rng.integers(-4, 5, size=num),
        "text": [f"which of {rng.integers(9)} two {rng.integers(9)} is better" for _ in range(num)],
    }
    return Features(**(given | columns))


def scored(*gaps: float, **columns: Any) -> Features:
    """Candidates that `oracle_gap` scores so."""
    return pool(len(gaps), gold_gap=list(gaps), **columns)


def ids(selection: Selection) -> list[str]:
    return [choice.pair_id for choice in selection.choices]


def rows(selection: Selection) -> list[int]:
    return [int(choice.pair_id[1:]) for choice in selection.choices]


EVERY_WAY: list[tuple[str, Batch, Limits]] = [
    *((name, Top(), Limits()) for name in STRATEGIES),
    *((name, Top(), Limits(per_prompt=1)) for name in ("entropy", "d_optimal", "bal_pm")),
    *(("certainty", Noise(kind), Limits()) for kind in ("softmax", "power", "softrank")),
    ("bald", Noise("power", 4.0), Limits(per_prompt=1)),
    ("certainty", KCenter(2.0), Limits()),
    ("certainty", KCenter(3.0, "prompt"), Limits(per_prompt=1)),
    ("certainty", LogDet(3.0), Limits()),
    ("oracle_gap", Top(), Limits(per_source={"s0": 1, "s1": 2}, per_cluster=2, num_clusters=5)),
    ("oracle_gap", Top(), Limits(max_cosine=0.6)),
    ("oracle_gap", Top(), Limits(max_jaccard=0.7)),
    ("d_optimal", Top(), Limits(per_source={"s0": 0}, max_jaccard=0.9)),
]


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(24)), given=st.permutations(range(3)))
@pytest.mark.parametrize(("strategy", "batch", "limits"), EVERY_WAY)
def test_the_same_is_chosen_for_any_order_of_the_pool(
    strategy: str, batch: Batch, limits: Limits, order: list[int], given: list[int]
):
    labelled = ["p0003", "p0010", "p0021"]
    mixed = [labelled[i] for i in given]
    whole = choose(pool(), strategy, Ask(7, seed=1), batch=batch, limits=limits, labelled=labelled)
    other = choose(pool().take(np.array(order)), strategy, Ask(7, seed=1), batch=batch, limits=limits, labelled=mixed)
    assert whole == other  # ids, ranks, scores, keys and counts, to the last bit
    assert len(whole.choices) == 7
    assert not set(ids(whole)) & set(labelled)
    assert [choice.rank for choice in whole.choices] == list(range(1, 8))


# The best scores


def test_the_best_scores_are_chosen_and_ties_go_to_the_smaller_id():
    features = scored(1.0, 3.0, 2.0, 3.0, 2.0, 2.0).take(np.array([5, 3, 1, 0, 4, 2]))
    found = choose(features, "oracle_gap", Ask(4))
    assert ids(found) == ["p0001", "p0003", "p0002", "p0004"]
    assert [choice.score for choice in found.choices] == [3, 3, 2, 2]
    assert {(choice.strategy, choice.stage) for choice in found.choices} == {("oracle_gap", "top")}
    assert found.stages == {"pool": 6, "unlabelled": 6, "eligible": 6, "chosen": 4}
    assert found.undecided is None


def test_the_smallest_margins_are_chosen_with_their_value_and_key():
    found = choose(pool(), "uncertainty", Ask(3), options={"beta": 0.5})
    values = score("uncertainty", pool(), Ask(3), {"beta": 0.5}).values
    assert rows(found) == np.argsort(values, kind="stable")[:3].tolist()
    assert [(c.score, c.key) for c in found.choices] == [(values[i], -values[i]) for i in rows(found)]


def test_the_first_round_is_declared_random():
    same = np.full((24, 2), -5.0)
    features = pool(policy_logps=same, reference_logps=same)
    found, random = choose(features, "certainty", Ask(6, 9)), choose(features, "random", Ask(6, 9))
    assert found.undecided == "all 24 scores are equal (0): the order is random"
    assert ids(found) == ids(random)
    assert {(choice.strategy, choice.stage, choice.score) for choice in found.choices} == {("random", "random", 0.0)}
    assert ids(choose(features, "certainty", Ask(6, 9), batch=Noise("power"))) == ids(random)


def test_other_seeds_choose_others_at_random():
    assert len({tuple(ids(choose(pool(), "random", Ask(6, seed)))) for seed in range(20)}) == 20


def test_no_more_than_the_eligible_are_chosen():
    found = choose(pool(), "margin_band", Ask(10), options={"low": 0.5, "high": 0.75})
    assert len(found.choices) == found.stages["eligible"] == 6
    assert {choice.stage for choice in found.choices} == {"random"}


def test_a_labelled_pair_is_not_chosen_again_and_takes_no_part_in_quantiles():
    labelled = ids(choose(pool(), "certainty", Ask(12)))
    second = choose(pool(), "certainty", Ask(12), labelled=labelled)
    assert sorted(labelled + ids(second)) == pool().pair_id.tolist()
    assert second.stages == {"pool": 24, "unlabelled": 12, "eligible": 12, "chosen": 12}
    band = choose(pool(), "margin_band", Ask(99), options={"high": 0.5}, labelled=labelled)
    assert len(band.choices) == 6
    assert choose(pool(), "random", Ask(3), labelled=pool().pair_id.tolist()).choices == ()


# Noise


@pytest.mark.parametrize(
    ("noise", "weight"),
    [
        (Noise("softmax", 0.7), lambda s: np.exp(0.7 * s)),
        (Noise("power", 1.5), lambda s: s**1.5),
        (Noise("softrank", 1.0), lambda s: 1 / np.array([5, 4, 2, 2, 1])),
    ],
)
def test_the_first_and_the_second_are_sampled_with_the_weights_of_the_scores(noise: Noise, weight: Any):
    values = np.array([0.5, 1.0, 2.0, 2.0, 3.0])
    features = scored(*values)
    draws, first, second = 2500, Counter(), Counter()
    for seed in range(draws):
        one, two = rows(choose(features, "oracle_gap", Ask(2, seed), batch=noise))
        first[one] += 1
        second[two] += 1
    p = weight(values) / weight(values).sum()
    q = [sum(p[i] * p[j] / (1 - p[i]) for i in range(5) if i != j) for j in range(5)]  # without replacement
    for counted, expected in ((first, p), (second, q)):
        for i in range(5):
            assert counted[i] / draws == pytest.approx(expected[i], abs=4 * math.sqrt(0.25 / draws))


def test_a_score_of_zero_has_no_chance_beside_others():
    for seed in range(50):
        assert rows(choose(scored(0.0, 1.0, 0.0, 1e-3), "oracle_gap", Ask(3, seed), batch=Noise("power")))[2:] == [0]


def test_sharp_noise_is_none():
    top = ids(choose(pool(), "bald", Ask(6)))
    assert ids(choose(pool(), "bald", Ask(6), batch=Noise("softmax", 1e9))) == top


def test_ineligible_pairs_take_no_rank():
    """Certainty outside the chosen prompts must not push those within down: the first of 1 is sure of being chosen."""
    features = pool(
        4,
        prompt_id=["a", "b", "c", "d"],
        sample_logps=[[-9.0], [-1.0], [-2.0], [-3.0]],
        policy_logps=[[-5.0, -4.0], [-9.0, -3.0], [-9.0, -2.0], [-9.0, -1.0]],
        reference_logps=[[-4.0, -4.0]] * 4,
    )
    found = choose(
        features,
        "entropy_then_certainty",
        Ask(1),
        options={"over": 1},
        batch=Noise("softrank", 5.0),
        labelled=["p0003"],
    )
    gumbel = -math.log(-math.log(scores.uniform(np.array(["p0000"]), 0, "gumbel")[0]))
    assert rows(found) == [0]
    assert found.choices[0].key == pytest.approx(gumbel, rel=1e-12)


# Greedy rules against brute force


def greedy_log_det(
    vectors: np.ndarray, ridge: float, count: int, start: list[int] = ()
) -> tuple[list[int], list[float]]:
    chosen, gains = list(start), []
    for _ in range(count):
        information = ridge * np.eye(vectors.shape[1]) + vectors[chosen].T @ vectors[chosen]
        base = np.linalg.slogdet(information)[1]
        gain = [
            -math.inf if i in chosen else np.linalg.slogdet(information + np.outer(v, v))[1] - base
            for i, v in enumerate(vectors)
        ]
        chosen.append(int(np.argmax(gain)))
        gains.append(max(gain))
    return chosen[len(start) :], gains


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("labelled", [[], [3, 17]])
def test_d_optimal_is_the_greedy_log_determinant(ridge: float, labelled: list[int]):
    options = {"beta": 0.2, "ridge": ridge, "width": 256, "per_token": False}
    vectors = scores.design_vectors(pool(), Ask(12), beta=0.2, width=256, per_token=False)
    found = choose(pool(), "d_optimal", Ask(12), options=options, labelled=[f"p{i:04}" for i in labelled])
    expected, gains = greedy_log_det(vectors, ridge, 12, labelled)
    assert rows(found) == expected
    np.testing.assert_allclose([choice.key for choice in found.choices], gains, rtol=1e-6)
    assert {choice.stage for choice in found.choices} == {"log_det"}


def test_gains_stay_true_over_many_choices():
    vectors = np.random.default_rng(0).normal(size=(400, 20))
    gain = LogDetGain(vectors, 1e-5)
    for row in range(300):
        gain.take(row)
    information = 1e-5 * np.eye(20) + vectors[:300].T @ vectors[:300]
    expected = np.log1p(np.einsum("ij,jk,ik->i", vectors, np.linalg.inv(information), vectors))
    np.testing.assert_allclose(gain.values(), expected, rtol=1e-6)


def test_a_direction_that_is_spent_gains_little():
    hidden = np.zeros((4, 2, 2))
    hidden[:, 0] = [[1.0, 0], [1.0, 0], [0, 0.9], [0, 0.9]]
    even = np.full((4, 2), -3.0)
    features = pool(4, hidden=hidden, policy_logps=even, reference_logps=even)
    assert rows(choose(features, "d_optimal", Ask(4))) == [0, 2, 1, 3]


def test_k_center_is_farthest_first_by_brute_force():
    found = choose(pool(), "certainty", Ask(6), batch=KCenter(2.0))
    best = np.argsort(-score("certainty", pool(), Ask(6)).keys, kind="stable")[:12]
    points = pool().hidden.mean(axis=1)
    expected = [int(best[0])]
    while len(expected) < 6:
        away = {int(i): min(np.linalg.norm(points[i] - points[j]) for j in expected) for i in sorted(best)}
        expected.append(max(away, key=lambda i: (away[i], -i)))
    assert rows(found) == expected
    assert found.stages["diverse"] == 12
    assert {choice.stage for choice in found.choices} == {"k_center"}


def test_k_center_covers_within_twice_the_best_radius():
    points = np.random.default_rng(4).normal(size=(12, 2))
    centres = FarthestFirst(points, np.zeros(12))
    chosen: list[int] = []
    for _ in range(3):
        chosen.append(int(centres.values().argmax()))
        centres.take(chosen[-1])

    def radius(of: tuple[int, ...]) -> float:
        return max(min(np.linalg.norm(p - points[i]) for i in of) for p in points)

    assert radius(tuple(chosen)) <= 2 * min(radius(of) for of in itertools.combinations(range(12), 3))


def test_k_center_starts_from_what_is_labelled():
    points = np.array([[0.0], [0.1], [5.0], [10.0]])
    hidden = np.repeat(points[:, None], 2, axis=1)
    features = scored(4.0, 3.0, 2.0, 1.0, hidden=hidden)
    assert rows(choose(features, "oracle_gap", Ask(3), batch=KCenter())) == [0, 3, 2]
    assert rows(choose(features, "oracle_gap", Ask(3), batch=KCenter(), labelled=["p0003"])) == [0, 2, 1]


def test_a_log_determinant_batch_is_greedy_over_the_best():
    found = choose(pool(), "certainty", Ask(4), batch=LogDet(over=2.0, ridge=0.1))
    best = np.sort(np.argsort(-score("certainty", pool(), Ask(4)).keys, kind="stable")[:8])
    vectors = scores.differences(pool(), seed=0, width=256, wanted_by="x")
    expected, gains = greedy_log_det(vectors[best], 0.1, 4)
    assert rows(found) == best[expected].tolist()
    np.testing.assert_allclose([choice.key for choice in found.choices], gains, rtol=1e-9)


def test_where_a_diverse_stage_runs_dry_the_best_scores_fill_up():
    features = scored(9.0, 8.0, 3.0, 2.0, prompt_id=["a", "a", "b", "c"])
    found = choose(features, "oracle_gap", Ask(2), batch=KCenter(over=1.0), limits=Limits(per_prompt=1))
    assert [(choice.pair_id, choice.stage) for choice in found.choices] == [("p0000", "k_center"), ("p0002", "fill")]


@pytest.mark.parametrize("labelled", [[], [2, 9]])
def test_bal_pm_counts_on_as_it_chooses(labelled: list[int]):
    options = {"weight": 0.5, "neighbours": 3}
    found = choose(pool(), "bal_pm", Ask(8), options=options, labelled=[f"p{i:04}" for i in labelled])
    bald = scores.mutual_information(pool().head_margins)
    points = pool().prompt_hidden
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    radius = np.sort(apart[:, ::2], axis=1)[:, 3]  # two pairs to a prompt; the first is the prompt itself
    chosen = list(labelled)
    for choice in found.choices:
        near = [(apart[i, chosen] < radius[i] - 1e-12).sum() for i in range(24)]
        digamma = [-0.5772156649015329 + sum(1 / n for n in range(1, count + 1)) for count in near]
        value = bald + 0.5 * (np.log(2 * radius) - np.array(digamma) / 3)
        value[chosen] = -math.inf
        assert int(choice.pair_id[1:]) == int(value.argmax())
        assert choice.key == pytest.approx(value.max(), rel=1e-9)
        chosen.append(int(value.argmax()))
    assert {choice.stage for choice in found.choices} == {"density"}


def test_bal_pm_leaves_a_crowd_that_bald_would_fill_the_batch_with():
    points = np.array([[0.0], [0.01], [0.02], [5.0], [10.0], [15.0]])
    margins = np.array([[3.0, -3.0]] * 3 + [[2.0, -2.0]] * 3)
    features = pool(6, prompt_id=list("abcdef"), prompt_hidden=points, head_margins=margins)
    assert rows(choose(features, "bald", Ask(3))) == [0, 1, 2]
    spread = rows(choose(features, "bal_pm", Ask(3), options={"weight": 0.5, "neighbours": 2}))
    assert sorted(spread) == [3, 4, 5]


# Limits


def test_caps_hold_and_name_what_they_bar():
    found = choose(pool(), "oracle_gap", Ask(9), limits=Limits(per_prompt=1, per_source={"s0": 0, "s1": 2}))
    source = Counter(str(pool().source[i]) for i in rows(found))
    assert source == {"s1": 2, "s2": 7}
    assert len({pool().prompt_id[i] for i in rows(found)}) == 9
    assert set(found.barred) == {"per_prompt", "per_source"}
    before = {i for i in range(24) if score("oracle_gap", pool(), Ask(9)).keys[i] > found.choices[-1].key}
    assert sum(found.barred.values()) >= len(before - set(rows(found))) > 3  # the rest tie with the last one


def test_under_a_cap_the_best_of_each_are_chosen():
    features = scored(5.0, 4.0, 3.0, 2.0, 1.0, prompt_id=list("aabbb"))
    assert rows(choose(features, "oracle_gap", Ask(3), limits=Limits(per_prompt=1))) == [0, 2]
    assert rows(choose(features, "oracle_gap", Ask(4), limits=Limits(per_prompt=2))) == [0, 1, 2, 3]


def test_clusters_are_the_nearest_of_centres_that_are_far_apart():
    rng = np.random.default_rng(6)
    points = np.concatenate([rng.normal(size=(20, 3)) * 0.1 + centre for centre in 5 * np.eye(3)])
    found = clusters(points, 3)
    assert [len(set(found[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert sorted(set(found)) == [0, 1, 2]
    assert sorted(set(clusters(points, 500))) == list(range(60))


def test_a_cluster_gives_no_more_than_its_cap():
    hidden = np.repeat(np.repeat(5 * np.eye(4), 6, axis=0)[:, None], 2, axis=1)
    hidden = hidden + np.random.default_rng(7).normal(size=hidden.shape) * 0.1
    found = choose(pool(hidden=hidden), "oracle_gap", Ask(24), limits=Limits(per_cluster=2, num_clusters=4))
    assert Counter(i // 6 for i in rows(found)) == dict.fromkeys(range(4), 2)


@pytest.mark.parametrize("swap", [False, True])
def test_near_duplicates_by_hidden_states_are_left_out(swap: bool):
    hidden = pool(6).hidden.copy()
    copy = hidden[0] * 3.0 + 1e-3  # another length, nearly the same direction
    hidden[4] = copy[::-1] if swap else copy
    hidden[5, 0] = hidden[0, 0]  # one response alone is no duplicate
    found = choose(scored(6, 5, 4, 3, 2, 1, hidden=hidden), "oracle_gap", Ask(6), limits=Limits(max_cosine=0.999))
    assert rows(found) == [0, 1, 2, 3, 5]
    assert found.barred == {"max_cosine": 1}


def test_equal_hidden_states_are_duplicates_at_the_strictest_setting():
    hidden = pool(6).hidden.copy()
    hidden[1] = hidden[0] * 7
    hidden[2] = 0  # no direction: like nothing
    hidden[3] = 0
    found = choose(scored(6, 5, 4, 3, 2, 1, hidden=hidden), "oracle_gap", Ask(6), limits=Limits(max_cosine=1.0))
    assert rows(found) == [0, 2, 3, 4, 5]


def test_near_duplicates_by_text_are_those_of_the_exact_jaccard_index():
    rng = np.random.default_rng(8)
    texts = [" ".join(rng.choice(["a", "b", "c"], size=rng.integers(1, 9))) for _ in range(40)]
    features = scored(*range(40, 0, -1), text=texts)

    def triples(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    for most in (0.3, 0.5, 1.0):
        expected: list[int] = []
        for i in range(40):
            mine = triples(texts[i])
            if all(len(mine & triples(texts[j])) / len(mine | triples(texts[j])) < most for j in expected):
                expected.append(i)
        assert rows(choose(features, "oracle_gap", Ask(40), limits=Limits(max_jaccard=most))) == expected


def test_case_and_spacing_do_not_hide_a_duplicate_of_a_labelled_text():
    features = scored(3.0, 2.0, 1.0, text=["Is it so ?", "is  it SO ?", "quite another text"])
    limits = Limits(max_jaccard=1.0)
    found = choose(features, "oracle_gap", Ask(3), limits=limits, labelled=["p0000", "not in the pool"])
    assert rows(found) == [2]
    assert found.barred == {"max_jaccard": 1}


# What is refused


@pytest.mark.parametrize(
    ("strategy", "batch", "limits", "message"),
    [
        ("best", Top(), Limits(), "no strategy `best`; there are random"),
        ("d_optimal", KCenter(), Limits(), "`batch`: strategy `d_optimal` has a batch rule of its own, `log_det`"),
        ("bal_pm", Noise("power"), Limits(), "`batch`: strategy `bal_pm` has a batch rule of its own, `density`"),
        ("random", Noise("power"), Limits(), "`batch`: strategy `random` chooses at random already"),
        ("uncertainty", Noise("power"), Limits(), "`batch`: `power` wants the largest scores, `uncertainty` the small"),
        ("bald", Noise("loud"), Limits(), "`batch`: no noise `loud`; there are softmax, power, softrank"),
        ("bald", Noise("power", 0.0), Limits(), "`sharpness`: 0 is not a number above 0"),
        ("bald", KCenter(0.5), Limits(), "`over`: 0.5 candidates per label; at least 1 is needed"),
        ("bald", KCenter(by="text"), Limits(), "`by`: `text` is neither `responses` nor `prompt`"),
        ("bald", LogDet(ridge=-1.0), Limits(), "`ridge`: -1 is not a number above 0"),
        ("bald", Top(), Limits(per_prompt=0), "`per_prompt`: 0; at least 1 is needed"),
        ("bald", Top(), Limits(per_cluster=1, num_clusters=0), "`num_clusters`: 0; at least 1 is needed"),
        ("bald", Top(), Limits(per_source={"s9": 1}), "`per_source`: no candidate is from `s9`"),
        ("bald", Top(), Limits(per_source={"s1": -1}), "`per_source`: -1 pairs of `s1`; at least 0 is needed"),
        ("bald", Top(), Limits(max_cosine=0.0), "`max_cosine`: 0 is not above 0 and at most 1"),
        ("bald", Top(), Limits(max_jaccard=1.5), "`max_jaccard`: 1.5 is not above 0 and at most 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(strategy: str, batch: Batch, limits: Limits, message: str):
    with pytest.raises(InputError, match=message) as error:
        choose(pool(), strategy, Ask(3), batch=batch, limits=limits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "limits", "message"),
    [
        (KCenter(), Limits(), "`k_center` needs the feature `hidden`"),
        (KCenter(by="prompt"), Limits(), "`k_center` needs the feature `prompt_hidden`"),
        (LogDet(), Limits(), "`log_det` needs the feature `hidden`"),
        (Top(), Limits(per_cluster=1), "`per_cluster` needs the feature `hidden`"),
        (Top(), Limits(max_cosine=0.9), "`max_cosine` needs the feature `hidden`"),
        (Top(), Limits(max_jaccard=0.9), "`max_jaccard` needs the feature `text`"),
    ],
)
def test_a_rule_without_its_feature_names_it(batch: Batch, limits: Limits, message: str):
    features = dataclasses.replace(pool(), hidden=None, prompt_hidden=None, text=None)
    with pytest.raises(InputError, match=message):
        choose(features, "certainty", Ask(3), batch=batch, limits=limits)


def test_a_negative_score_has_no_power():
    features = pool(sample_logps=np.full((24, 2), 0.005) * np.arange(24)[:, None] / 24)
    with pytest.raises(InputError, match="`power` needs scores that are not negative; take softmax or softrank"):
        choose(features, "entropy", Ask(3), batch=Noise("power"))
