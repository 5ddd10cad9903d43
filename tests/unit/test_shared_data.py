"""Published data sets in their own files: every one loads as it is, and the counts are the known ones.

They lie in the folder DPO_RAY_SHARED (default `../shared` beside the checkout); without it these tests are skipped.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import DataConfig, PromptFrom, SourceConfig
from dpo_ray.data.formats import recognise, to_pairs, transcript
from dpo_ray.data.mixture import load_pool
from dpo_ray.data.sources import read_rows
from dpo_ray.errors import InputError
from dpo_ray.pairs import PreferencePair

SHARED = Path(os.environ.get("DPO_RAY_SHARED", Path(__file__).parents[2] / "../shared")).resolve() / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data at {SHARED} (DPO_RAY_SHARED)")

OPTIONS: dict[str, dict[str, Any]] = {
    "realsumm/pairs": {
        "prompt_from": PromptFrom(path=str(SHARED / "realsumm/documents.jsonl.gz"), on="doc_id", column="document")
    },
    "realsumm/documents": {"columns": {"prompt": "document", "score": "human_recall"}},
}

# File: recognised format, rows, pairs, and what is dropped.
COUNTS: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "arena_bench/pairs": ("explicit", 549, 549, {}),
    "arena_bench/records": ("ranked", 240, 239, {"tie": 1}),
    "formats/conversational_tulu3": ("explicit", 100, 100, {}),
    "formats/oasst_trees": ("message_tree", 100, 212, {}),
    "formats/sharegpt_ranking": ("sharegpt", 300, 295, {"duplicate": 5}),
    "formats/stack_exchange_paired": ("stack_exchange", 25, 25, {}),
    "gsm8k/model_solutions": ("graded", 1022, 2219, {"duplicate": 3, "tie": 119}),
    "gsm8k/pairs": ("explicit", 2219, 2219, {}),
    "hh_rlhf/harmless-base.test": ("hh_rlhf", 1842, 1838, {"empty_response": 4}),
    "hh_rlhf/helpful-base.test": ("hh_rlhf", 1859, 1856, {"empty_response": 3}),
    "hhh_alignment/pairs": ("explicit", 221, 221, {}),
    "mt_bench/human_majority": ("labelled", 200, 195, {"duplicate": 5}),
    "pandalm/annotations": ("labelled", 778, 577, {"duplicate": 66, "empty_response": 46, "tie": 89}),
    "qa_feedback/pairs": ("explicit", 2035, 2035, {}),
    "qa_feedback/records": ("comparisons", 392, 2035, {"tie": 317}),
    "realsumm/documents": ("ranked", 74, 74, {}),
    "realsumm/pairs": ("explicit", 1043, 1043, {}),
    "tldr_judged/pairs": ("explicit", 739, 739, {}),
    "truthfulqa/pairs": ("explicit", 2586, 2585, {"duplicate": 1}),
    "truthfulqa/questions": ("question_answers", 639, 2585, {"duplicate": 1}),
    "ukp_convarg/pairs": ("explicit", 8517, 8426, {"duplicate": 91}),
}

WITHOUT_PAIRS = {
    "formats/kto_unpaired": "unpaired data",
    "gsm8k/sft_train": "its columns are question, answer",
    "mt_bench/judge_prompts": "its columns are name, type",
    "mt_bench/question": "its columns are question_id",
    "mt_bench/reference_answer_gpt-4": "its columns are question_id",
    "rt_polarity/sentences": "its columns are text, label, line",
    "sft_text/c4_demo": "its columns are text",
    "sft_text/self_instruct_seed_tasks": "its columns are id",
    "sft_text/self_instruct_user_oriented": "its columns are id",
    "sft_text/wiki_demo": "its columns are text",
    "tldr_judged/unjudged": "its columns are prompt, model_summary, human_reference",
    "ukp_convarg/arguments": "its columns are arg_id",
}


def source(name: str) -> SourceConfig:
    return SourceConfig(path=str(SHARED / f"{name}.jsonl.gz"), **OPTIONS.get(name, {}))


def raw(name: str) -> list[dict[str, Any]]:
    """The rows by other means than ours."""
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pairs_of(name: str) -> Iterator[PreferencePair]:
    for row in read_rows(source(name)):
        yield from to_pairs(row, source(name)).pairs


def contents(name: str) -> set[str]:
    return {pair.pair_id for pair in pairs_of(name)}


def test_every_file_is_in_one_of_the_lists():
    names = {str(path.relative_to(SHARED)).removesuffix(".jsonl.gz") for path in SHARED.glob("*/*.jsonl.gz")}
    assert names == COUNTS.keys() | WITHOUT_PAIRS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_a_file_of_pairs_loads_as_it_is_and_every_row_is_accounted_for(name: str):
    kind, num_rows, num_pairs, dropped = COUNTS[name]
    assert {recognise(row.value) for row in read_rows(source(name)) if row.value} == {kind}
    pool = load_pool(DataConfig(sources=(source(name),)))
    counts = pool.report["sources"][0]
    assert (counts["rows"], counts["pairs"], counts["dropped"]) == (num_rows, num_pairs, dropped)
    assert len(pool.train) + len(pool.held_out) == num_pairs
    assert 0 < len(pool.held_out) <= num_pairs // 5
    assert not {pair.group_id for pair in pool.train} & {pair.group_id for pair in pool.held_out}


@pytest.mark.parametrize("name", WITHOUT_PAIRS)
def test_a_file_without_pairs_is_refused_in_one_line_that_says_why(name: str):
    with pytest.raises(InputError) as raised:
        load_pool(DataConfig(sources=(source(name),)))
    assert str(raised.value).startswith(f"{SHARED / name}.jsonl.gz:1: ")
    assert WITHOUT_PAIRS[name] in str(raised.value)
    assert "\n" not in str(raised.value)


def stripped(*texts: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in texts)


@pytest.mark.parametrize("name", ["arena_bench/pairs", "gsm8k/pairs", "ukp_convarg/pairs", "truthfulqa/pairs"])
def test_duplicates_are_counted_as_a_set_would(name: str):
    distinct = {stripped(row["prompt"], row["chosen"], row["rejected"]) for row in raw(name)}
    assert len(distinct) == COUNTS[name][2]


@pytest.mark.parametrize(
    ("derived", "original"),
    [
        ("gsm8k/pairs", "gsm8k/model_solutions"),
        ("qa_feedback/pairs", "qa_feedback/records"),
        ("truthfulqa/pairs", "truthfulqa/questions"),
    ],
)
def test_the_raw_form_gives_exactly_the_pairs_derived_by_others(derived: str, original: str):
    assert contents(original) == contents(derived)


def test_derived_arena_and_realsumm_pairs_are_among_all_pairs_of_the_lists():
    for derived, original in (("arena_bench/pairs", "arena_bench/records"), ("realsumm/pairs", "realsumm/documents")):
        everything = source(original).model_copy(update={"pairing": "all"})
        scored = {  # two systems can have written the same text, with other scores
            (pair.pair_id, pair.chosen_score, pair.rejected_score)
            for row in read_rows(everything)
            for pair in to_pairs(row, everything).pairs
        }
        assert {(pair.pair_id, pair.chosen_score, pair.rejected_score) for pair in pairs_of(derived)} <= scored


@pytest.mark.parametrize("name", ["hh_rlhf/harmless-base.test", "hh_rlhf/helpful-base.test"])
def test_transcripts_of_hh_rlhf_come_back(name: str):
    differing = turns = exact = 0
    for pair, row in zip(pairs_of(name), raw(name), strict=True):
        assert pair.is_transcript
        for side in ("chosen", "rejected"):
            messages = (*pair.prompt, *getattr(pair, side))
            parts = transcript(messages).split("\n\nAssistant: ")
            originals = row[side].split("\n\nAssistant: ")
            turns += len(parts)
            exact += sum(a == b for a, b in zip(parts, originals, strict=False))
            assert transcript(messages).split() == row[side].split()  # the words are all there, in order
        prompts = {row[side][: row[side].rindex("\n\nAssistant:")] for side in ("chosen", "rejected")}
        if len(prompts) == 1:
            assert len(pair.chosen) == len(pair.rejected) == 1
            assert transcript(pair.prompt).split() == prompts.pop().split()  # type: ignore[arg-type]
        else:
            differing += 1
            assert len(pair.chosen) + len(pair.rejected) > 2
    assert differing == {"harmless": 4, "helpful": 5}[name.split("/")[1].split("-")[0]]
    assert exact > 0.998 * turns


def test_message_trees_give_a_pair_for_each_group_of_ranked_replies():
    def groups(node: dict[str, Any]) -> int:
        ranked = [reply for reply in node["replies"] if reply.get("rank") is not None]
        return (len(ranked) > 1) + sum(groups(reply) for reply in node["replies"])

    assert sum(groups(row["prompt"]) for row in raw("formats/oasst_trees")) == COUNTS["formats/oasst_trees"][2]


def test_conversations_keep_their_system_turns():
    prompts = [pair.prompt[0] for pair in pairs_of("formats/sharegpt_ranking")]
    assert sum(turn["role"] == "system" for turn in prompts if isinstance(turn, dict)) == 80


def test_votes_of_pandalm_are_counted_as_its_readme_says():
    ties = sum(
        max((0, 1, 2), key=[row[f"annotator{i}"] for i in (1, 2, 3)].count) == 0 for row in raw("pandalm/annotations")
    )
    assert ties == COUNTS["pandalm/annotations"][3]["tie"]


def test_a_debate_stands_on_one_side_when_pairs_are_grouped_by_it():
    grouped = source("ukp_convarg/pairs").model_copy(update={"group_by": "debate"})
    pool = load_pool(DataConfig.model_validate({"sources": [grouped], "eval": {"num_pairs": 100}}))
    debates = {row["debate"] for row in raw("ukp_convarg/pairs")}
    held_out, train = ({pair.group for pair in pairs} for pairs in (pool.held_out, pool.train))
    assert held_out
    assert held_out | train == debates
    assert not held_out & train
