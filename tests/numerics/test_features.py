"""Features and scores of candidates against plain forwards in float64; the actor runs in this process, without Ray."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from dpo_ray import score
from dpo_ray.acquire import encoder_of
from dpo_ray.acquisition import features as features_module
from dpo_ray.acquisition import scores
from dpo_ray.acquisition.features import Encoded, Gathered, Models, columns_for, gather
from dpo_ray.acquisition.pool import load_candidates
from dpo_ray.acquisition.scores import Ask
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.models import ModelSource
from dpo_ray.prepare import resolve
from dpo_ray.reference import Pass, ScoringActor, View, blocks_of

COLUMNS = ("policy_logps", "reference_logps", "num_tokens", "hidden", "prompt_hidden")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A policy and a reference that differ."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return Models(ModelSource(str(tiny_model)), ModelSource(str(folder)))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass without Ray."""

    def score_responses(
        responses: Any, views: Sequence[View], run: RunConfig, gpus: float, on_progress: Callable[[int, int], None]
    ) -> Any:
        from dpo_ray.pairs import TokenizedPair

        listed = list(responses)
        pairs = [TokenizedPair("", prompt, response, response) for prompt, response in listed]
        blocks = blocks_of(pairs, views, run)
        actor = ScoringActor(views, run.engine.precision, run.batch)
        done, errors = 0, {}
        for block in blocks:
            told = actor(block).to_pydict()
            done += told["computed"][0]
            errors |= dict(zip(told["keys"][0], told["errors"][0], strict=True))
        return [Pass(view.store, done // len(views), 0) for view in views], errors

    monkeypatch.setattr(features_module, "score_responses", score_responses)


def recipe(folder: Path, models: Models, **acquire: Any) -> RunConfig:
    chance = np.random.default_rng(3)
    rows = [
        {
            "prompt": f"prompt number {i} ",
            "chosen": "".join(chance.choice(list("abcdefgh "), chance.integers(3, 14))) + "x",
            "rejected": "".join(chance.choice(list("abcdefgh "), chance.integers(3, 14))) + "y",
        }
        for i in range(12)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve(
        parse_run(
            {
                "name": "scored",
                "storage": {"path": str(folder / "runs")},
                "model": {"path": models.policy.path},
                "reference": {"path": models.reference.path},
                "data": {
                    "sources": [{"path": str(folder / "pairs.jsonl")}],
                    "eval": {"num_pairs": 0},
                    "max_tokens": 100,
                },
                "batch": {"tokens_per_device": acquire.pop("tokens_per_device", 512), "row_tokens": 80},
                "engine": {"precision": "fp32"},
                "acquire": acquire,
            }
        )
    )


def gathered(run: RunConfig, models: Models, columns: Any = COLUMNS, labels: Any = None) -> tuple[Encoded, Gathered]:
    pool = load_candidates(run)
    encoded = Encoded.of(pool.candidates, encoder_of(run))
    return encoded, gather(encoded, models, run, columns, labels=labels or {}, seed=0, gpus_per_actor=0.0)


def exact(model: ModelSource, prompt: Any, response: Any) -> tuple[float, Any, Any]:
    """Summed log-prob and hidden states of one response, in float64."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path).double().eval()
    whole = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
    with torch.no_grad():
        out = loaded(input_ids=whole, output_hidden_states=True)
    end = len(prompt) - 1
    logps = out.logits[0, end:-1].log_softmax(-1).gather(-1, whole[0, end + 1 :, None]).sum()
    states = loaded.base_model(input_ids=whole).last_hidden_state[0].detach()
    return float(logps), states[end:-1].mean(0).numpy(), states[end].numpy()


def test_features_and_certainty_are_those_of_a_float64_oracle(models: Models, tmp_path: Path):
    run = recipe(tmp_path, models)
    encoded, found = gathered(run, models)
    features = found.features
    assert features.pair_id.tolist() == sorted(encoded.candidates)
    assert found.errors == {}
    margins = []
    for row, name in enumerate(features.pair_id):
        pair = encoded.pairs[name]
        sides = (pair.chosen_ids, pair.rejected_ids)
        policy = [exact(models.policy, pair.prompt_ids, side) for side in sides]
        reference = [exact(models.reference, pair.prompt_ids, side) for side in sides]
        assert features.policy_logps is not None
        assert features.reference_logps is not None
        assert features.hidden is not None
        assert features.prompt_hidden is not None
        assert features.num_tokens is not None
        np.testing.assert_allclose(features.policy_logps[row], [value for value, *_ in policy], atol=1e-4)
        np.testing.assert_allclose(features.reference_logps[row], [value for value, *_ in reference], atol=1e-4)
        np.testing.assert_allclose(features.hidden[row], [pooled for _, pooled, _ in policy], atol=1e-5)
        np.testing.assert_allclose(features.prompt_hidden[row], policy[0][2], atol=1e-5)
        assert features.num_tokens[row].tolist() == [len(side) for side in sides]
        margins.append(policy[0][0] - reference[0][0] - policy[1][0] + reference[1][0])
    certainty = scores.score("certainty", features, Ask(4), {"beta": 0.1}).values
    np.testing.assert_allclose(certainty, 0.1 * np.abs(margins), atol=1e-4)
    swapped = features.take(np.arange(len(features)))
    for name in ("policy_logps", "reference_logps"):
        object.__setattr__(swapped, name, getattr(features, name)[:, ::-1])
    assert scores.score("certainty", swapped, Ask(4), {"beta": 0.1}).values.tolist() == certainty.tolist()


def test_a_policy_that_is_the_reference_has_margins_of_exactly_zero(models: Models, tmp_path: Path):
    run = recipe(tmp_path, models)
    _, found = gathered(run, Models(models.policy, models.policy))
    result = scores.score("certainty", found.features, Ask(4))
    assert result.values.tolist() == [0.0] * 12
    assert result.undecided


def test_what_the_store_has_is_not_computed_again(models: Models, tmp_path: Path):
    run = recipe(tmp_path, models)
    _, first = gathered(run, models)
    _, again = gathered(run, models)
    assert (first.computed > 0, again.computed) == (True, 0)
    assert first.features.policy_logps is not None
    assert again.features.policy_logps is not None
    assert first.features.policy_logps.tolist() == again.features.policy_logps.tolist()


def test_a_candidate_that_cannot_be_scored_keeps_its_reason(models: Models, tmp_path: Path):
    encoded, whole = gathered(recipe(tmp_path / "a", models), models)
    longest = max(encoded.pairs.values(), key=lambda pair: len(pair.prompt_ids) + len(pair.rejected_ids))
    budget = len(longest.prompt_ids) + max(len(longest.chosen_ids), len(longest.rejected_ids)) - 2
    _, found = gathered(recipe(tmp_path / "b", models, tokens_per_device=budget), models)
    assert found.errors
    assert len(found.features) + len(found.errors) == 12
    assert all("tokens_per_device" in reason for reason in found.errors.values())
    kept = np.isin(whole.features.pair_id, found.features.pair_id)
    assert whole.features.policy_logps is not None
    np.testing.assert_allclose(whole.features.policy_logps[kept], found.features.policy_logps, atol=1e-4)


def test_heads_learn_from_labels_and_say_nothing_without(models: Models, tmp_path: Path):
    run = recipe(tmp_path, models, strategy="bald", ensemble={"members": 3, "steps": 50})
    assert run.acquire is not None
    columns = columns_for(run.acquire)
    _, without = gathered(run, models, columns)
    assert without.features.head_margins is not None
    assert not without.features.head_margins.any()
    assert scores.score("bald", without.features, Ask(4)).undecided
    labels = {name: i % 3 > 0 for i, name in enumerate(without.features.pair_id[:8].tolist())}
    _, found = gathered(run, models, columns, labels)
    assert found.features.head_margins is not None
    assert found.features.head_margins.shape == (12, 3)
    learnt = found.features.head_margins.mean(axis=1)
    assert [learnt[i] > 0 for i in range(8)] == list(labels.values())


def test_random_costs_no_pass(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = recipe(tmp_path, models, strategy="random")
    assert run.acquire is not None
    monkeypatch.delattr(features_module, "score_responses")
    _, found = gathered(run, models, columns_for(run.acquire))
    assert len(found.features) == 12
    assert found.features.policy_logps is None


def test_columns_follow_from_strategy_batch_and_limits(models: Models, tmp_path: Path):
    def columns(**acquire: Any) -> set[str]:
        config = recipe(tmp_path, models, **acquire).acquire
        assert config is not None
        return columns_for(config)

    assert columns(strategy="random") == set()
    assert columns(strategy="certainty", options={"per_token": True}) == {
        "policy_logps",
        "reference_logps",
        "num_tokens",
    }
    assert columns(strategy="entropy", options={"per_token": True}) == {"sample_logps", "sample_tokens", "num_tokens"}
    assert columns(strategy="random", batch={"kind": "k_center", "max_jaccard": 0.5}) == {"hidden", "text"}
    with pytest.raises(InputError, match=r"`acquire.strategy`: no strategy `certanty`"):
        columns(strategy="certanty")


def test_a_pool_is_scored_into_a_table_that_can_be_ranked_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(score, "check_cluster", lambda run: 0.0)
    run = recipe(tmp_path, models, labels_per_round=5)
    summary = score.score_pool(run)
    assert (summary["scored"], summary["errors"], summary["computed"]) == (12, 0, 48)
    assert {"random", "certainty", "d_optimal", "oracle_gap"} <= set(summary["strategies"])
    table = pq.read_table(summary["scores"]).to_pydict()
    ranked = sorted((rank, i) for i, rank in enumerate(table["rank"]) if rank is not None)
    by_certainty = sorted(range(12), key=lambda i: -table["score/certainty"][i])
    assert [i for _, i in ranked] == by_certainty[:5]
    features = score.read_features(summary["scores"])
    _, fresh = gathered(run, models)
    assert features.pair_id.tolist() == fresh.features.pair_id.tolist()
    for name, options in (("d_optimal", {}), ("uncertainty", {"per_token": True})):
        np.testing.assert_allclose(
            scores.score(name, features, Ask(5), options).values,
            scores.score(name, fresh.features, Ask(5), options).values,
        )
    assert score.score_pool(run)["computed"] == 0
