"""Responses become candidates by rule, and are kept by content; the model is replaced by a function of the prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_ray.acquire import encoder_of
from dpo_ray.acquisition import samples
from dpo_ray.acquisition.pool import load_candidates
from dpo_ray.acquisition.samples import sampled, written
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.generate import Generated, Responses
from dpo_ray.models import ModelSource
from dpo_ray.prepare import resolve


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the model: which prompts it is asked, by call."""
    found: list[list[str]] = []

    def generate(prompts: Any, model: Any, sampling: Any, *, num_responses: int, **rest: Any) -> list[Responses]:
        found.append([bytes(prompt.astype(np.uint8)).hex() for prompt in prompts])
        values = []
        for prompt in prompts:
            if len(prompt) > 12:
                values.append(Responses([], "too long"))
                continue
            same = int(prompt[-1]) % 2 == 0  # some prompts get one response again and again
            ids = [np.array([40 + (0 if same else k), 41, 1], np.int32) for k in range(num_responses)]
            values.append(Responses([Generated(i, -float(k + 1), True) for k, i in enumerate(ids)]))
        return values

    monkeypatch.setattr(samples, "generate", generate)
    return found


def recipe(folder: Path, model: Path, prompts: list[str], **acquire: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return resolve(
        parse_run(
            {
                "name": "a",
                "storage": {"path": str(folder)},
                "model": {"path": str(model)},
                "data": {"sources": [{"path": str(folder / "prompts.jsonl")}], "eval": {"num_pairs": 0}},
                "engine": {"precision": "fp32"},
                "acquire": {"generate": {"num_responses": 3, "entropy_samples": 4}, **acquire},
            }
        )
    )


@pytest.mark.parametrize(("pairing", "pairs"), [("all", 3), ("random", 1)])
def test_responses_to_a_prompt_form_pairs(
    tmp_path: Path, tiny_model: Path, calls: list[list[str]], pairing: str, pairs: int
):
    run = recipe(tmp_path, tiny_model, ["a", "b", "c", "d"], pool={"pairing": pairing})
    prompts = load_candidates(run).prompts
    encoder = encoder_of(run)
    last = [encoder.prompt_ids(p.candidate("a", "b").labelled(is_first=True))[-1] for p in prompts]
    found = written(prompts, ModelSource(str(tiny_model)), run, encoder, 0, 0.0)
    odd = {prompt.prompt_id for prompt, token in zip(prompts, last, strict=True) if token % 2}
    assert 0 < len(odd) < 4
    assert len(found) == pairs * len(odd), "equal responses make no pair"
    assert {candidate.prompt_id for candidate in found} == odd
    assert [c.candidate_id for c in found] == sorted(c.candidate_id for c in found)
    for candidate in found:
        pair = candidate.labelled(is_first=True)
        (tokens,) = encoder.encode([pair]).pairs
        assert tokens.chosen_ids.tolist()[1:] == [41, 1], "the text encodes to what was written, and its end"


def test_what_was_written_is_kept_and_not_written_again(tmp_path: Path, tiny_model: Path, calls: list[list[str]]):
    run = recipe(tmp_path, tiny_model, ["a", "b"])
    prompts, encoder = load_candidates(run).prompts, encoder_of(run)
    policy = ModelSource(str(tiny_model))
    first = written(prompts, policy, run, encoder, 0, 0.0)
    again = written(prompts, policy, run, encoder, 0, 0.0)
    assert [c.candidate_id for c in first] == [c.candidate_id for c in again]
    assert [len(call) for call in calls] == [2, 0]
    written(prompts, policy, run, encoder, 1, 0.0)
    assert [len(call) for call in calls] == [2, 0, 2], "another seed is another response"


def test_samples_of_equal_prompts_are_drawn_once_and_failures_are_gaps(
    tmp_path: Path, tiny_model: Path, calls: list[list[str]]
):
    run = recipe(tmp_path, tiny_model, ["a"])
    prompts = [np.array(ids, np.int32) for ids in ([5, 6], [7, 8], [5, 6], range(3, 30))]
    found = sampled(prompts, ModelSource(str(tiny_model)), run, 0, 0.0)
    assert [len(call) for call in calls] == [3]
    assert found["sample_logps"][0].tolist() == [-1, -2, -3, -4]
    assert found["sample_logps"][2].tolist() == found["sample_logps"][0].tolist()
    assert found["sample_tokens"][1].tolist() == [3, 3, 3, 3]
    assert np.isnan(found["sample_logps"][3]).all()
    sampled(prompts, ModelSource(str(tiny_model)), run, 0, 0.0)
    assert [len(call) for call in calls] == [3, 1], "what failed is tried again"
