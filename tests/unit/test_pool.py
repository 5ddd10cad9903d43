"""A pool goes by content and gives no label away; a pair that was written as a row is read as the same pair."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.acquisition.pool import Pool, load_candidates
from dpo_ray.config import RunConfig, SourceConfig, parse_run
from dpo_ray.data.formats import to_pairs, to_row
from dpo_ray.data.sources import Row, read_rows
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate


def recipe(path: Path, rows: list[dict[str, Any]], **acquire: Any) -> RunConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = acquire.pop("eval", {"num_pairs": 0})
    return parse_run(
        {
            "name": "a",
            "model": {"path": "m"},
            "data": {"sources": [{"path": str(path)}], "eval": evaluate},
            "acquire": acquire,
        }
    )


def pool(path: Path, rows: list[dict[str, Any]], **acquire: Any) -> Pool:
    return load_candidates(recipe(path, rows, **acquire))


PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


def test_the_order_of_responses_gives_no_label_away(tmp_path: Path):
    found = pool(tmp_path / "a.jsonl", PAIRS)
    assert found.kind == "labelled"
    assert len(found.candidates) == 40
    gaps = [candidate.gold_gap for candidate in found.candidates]
    assert set(gaps) == {1.0, -1.0}
    assert 8 < gaps.count(1.0) < 32
    for candidate in found.candidates:
        assert candidate.labelled(is_first=candidate.gold_gap == 1.0).chosen.startswith("good")  # type: ignore[union-attr]


def test_the_id_of_a_candidate_is_the_same_whichever_response_is_preferred(tmp_path: Path):
    turned = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    one, other = pool(tmp_path / "a.jsonl", PAIRS), pool(tmp_path / "b.jsonl", list(reversed(turned)))
    assert [c.candidate_id for c in one.candidates] == [c.candidate_id for c in other.candidates]
    assert [c.gold_gap for c in one.candidates] == [-(c.gold_gap or 0) for c in other.candidates]
    assert one.fingerprint != other.fingerprint, "the hidden labels count"


def test_held_out_pairs_are_not_in_the_pool(tmp_path: Path):
    found = pool(tmp_path / "a.jsonl", PAIRS, eval={"num_pairs": 8})
    assert len(found.held_out) == 8
    assert len(found.candidates) == 32
    assert {pair.prompt for pair in found.held_out}.isdisjoint(c.prompt for c in found.candidates)


RESPONSES = [{"prompt": f"p{i}", "responses": [f"r{i}{k}" for k in "abc"]} for i in range(10)]
SCORED = [
    {
        "prompt": "p",
        "responses": [{"text": "low", "score": 1}, {"text": "high", "score": 9}, {"text": "mid", "score": 5}],
    }
]


@pytest.mark.parametrize(("pairing", "count"), [("random", 10), ("all", 30)])
def test_responses_form_pairs_by_rule(tmp_path: Path, pairing: str, count: int):
    found = pool(tmp_path / "a.jsonl", RESPONSES, pool={"pairing": pairing})
    assert found.kind == "candidates"
    assert len(found.candidates) == count
    assert all(candidate.gold_gap is None for candidate in found.candidates)
    again = pool(tmp_path / "b.jsonl", list(reversed(RESPONSES)), pool={"pairing": pairing})
    assert [c.candidate_id for c in again.candidates] == [c.candidate_id for c in found.candidates]


def test_the_random_pair_depends_on_the_seed(tmp_path: Path):
    chosen = [{c.candidate_id for c in pool(tmp_path / "a.jsonl", RESPONSES, seed=seed).candidates} for seed in (0, 1)]
    assert chosen[0] != chosen[1]


def test_best_against_worst_goes_by_the_scores_that_stay_hidden(tmp_path: Path):
    (candidate,) = pool(tmp_path / "a.jsonl", SCORED, pool={"pairing": "best_vs_worst"}).candidates
    assert {candidate.first, candidate.second} == {"low", "high"}
    assert candidate.gold_gap == (8 if candidate.first == "high" else -8)
    with pytest.raises(InputError, match=r"b.jsonl:1: .*no score"):
        pool(tmp_path / "b.jsonl", RESPONSES, pool={"pairing": "best_vs_worst"})


def test_two_columns_without_a_label_are_candidates(tmp_path: Path):
    (candidate,) = pool(tmp_path / "a.jsonl", [{"prompt": "p", "response_a": "x", "response_b": "y"}]).candidates
    assert {candidate.first, candidate.second} == {"x", "y"}


def test_prompts_alone_wait_for_responses_once_each(tmp_path: Path):
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "one"}, {"prompt": chat}]
    found = pool(tmp_path / "a.jsonl", rows)
    assert found.kind == "prompts"
    assert {str(prompt.prompt) for prompt in found.prompts} == {"one", "two", str(tuple(chat))}
    assert found.report["dropped"] == {"duplicate": 1}
    (open_chat,) = [prompt for prompt in found.prompts if not isinstance(prompt.prompt, str)]
    candidate = open_chat.candidate("a", "b")
    assert candidate.prompt_id == open_chat.prompt_id
    assert {turn[0]["content"] for turn in (candidate.first, candidate.second)} == {"a", "b"}  # type: ignore[index]


def test_what_cannot_be_asked_about_is_counted_by_reason(tmp_path: Path):
    rows = [*RESPONSES, RESPONSES[0], {"prompt": "same", "responses": ["x", " x "]}]
    found = pool(tmp_path / "a.jsonl", rows)
    assert found.report["dropped"] == {"duplicate": 1, "identical": 1}


@pytest.mark.parametrize("rows", [RESPONSES, [{"prompt": "p"}]])
def test_a_pool_without_labels_needs_held_out_pairs_of_its_own(tmp_path: Path, rows: list[dict[str, Any]]):
    with pytest.raises(InputError, match=r"`data.eval`: a pool of .* has no labels to hold out"):
        pool(tmp_path / "a.jsonl", rows, eval={"num_pairs": 5})
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:3]))
    own = {"num_pairs": 5, "sources": [{"path": str(tmp_path / "held.jsonl")}]}
    found = pool(tmp_path / "a.jsonl", [*rows, {**rows[0], "prompt": "p1"}], eval=own)
    assert len(found.held_out) == 3
    assert "p1" not in [item.prompt for item in [*found.candidates, *found.prompts]]


def test_a_bad_row_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"a.jsonl:2: no `prompt`"):
        pool(tmp_path / "a.jsonl", [{"prompt": "p"}, {"question_id": 3}])
    run = recipe(tmp_path / "b.jsonl", [{"prompt": "p"}, {"question_id": 3}])
    lenient = run.model_copy(update={"data": run.data.model_copy(update={"on_bad_row": "drop"})})
    assert load_candidates(lenient).report["dropped"] == {"bad_row": 1}


@pytest.mark.parametrize("rows", [RESPONSES, [{"prompt": f"p{i}"} for i in range(10)]])
def test_parts_of_a_pool_nest_by_content(tmp_path: Path, rows: list[dict[str, Any]]):
    def ids(**data: Any) -> set[str]:
        run = recipe(tmp_path / "a.jsonl", rows)
        found = load_candidates(run.model_copy(update={"data": run.data.model_copy(update=data)}))
        return {c.candidate_id for c in found.candidates} | {p.prompt_id for p in found.prompts}

    whole, half, three = ids(), ids(fraction=0.5), ids(num_pairs=3)
    assert (len(whole), len(half), len(three)) == (10, 5, 3)
    assert three < half < whole
    assert ids(num_pairs=3, subset_seed=1) != three
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), num_pairs=4)
    assert three < ids(sources=(source,)) < half
    with pytest.raises(InputError, match=r"`data.sources.0.weight`"):
        ids(sources=(source.model_copy(update={"weight": 1.0}),))


SHARED = ["hh_rlhf/helpful-base.test.jsonl.gz", "realsumm/pairs.jsonl.gz", "formats/conversational_tulu3.jsonl.gz"]


@pytest.mark.parametrize("name", SHARED)
def test_a_real_pair_comes_back_from_the_row_it_was_written_as(shared: Path, name: str):
    source = SourceConfig(path=str(next(shared.glob(f"data/{name.replace('.gz', '*')}"))))
    rows = [row for _, row in zip(range(60), read_rows(source), strict=False)]
    pairs = [pair for row in rows for pair in to_pairs(row, source).pairs]
    assert len(pairs) >= 20
    for pair in pairs:
        written = json.loads(json.dumps(to_row(pair)))
        (again,) = to_pairs(Row("rows", 1, written), SourceConfig(path="rows")).pairs
        assert again.pair_id == pair.pair_id
        assert again.is_transcript == pair.is_transcript
        assert again.margin == pair.margin
        candidate = Candidate.of(pair.prompt, pair.chosen, pair.rejected)
        assert candidate.prompt_id == pair.prompt_id
