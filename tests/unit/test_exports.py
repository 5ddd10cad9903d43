"""AlpacaEval's and MT-Bench's files: what we write they read, what they write we read."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import InputError
from dpo_ray.evaluate.exports import (
    Annotation,
    from_alpaca_eval,
    from_mt_bench,
    mt_bench_questions,
    of_model,
    to_alpaca_eval,
    to_mt_bench,
    win_rate_of,
)


def annotation(**changes: Any) -> dict[str, Any]:
    row = {
        "instruction": "Why?",
        "output_1": "Base.",
        "generator_1": "base",
        "output_2": "Aligned, longer.",
        "generator_2": "aligned",
        "annotator": "someone",
        "preference": 2.0,
    }
    return row | changes


def test_alpaca_eval_outputs_have_its_keys():
    assert to_alpaca_eval(["Why?"], ["So."], "mine") == [{"instruction": "Why?", "output": "So.", "generator": "mine"}]


def test_alpaca_eval_annotations_are_of_the_second_model():
    rows = [annotation(), annotation(preference=1.25), annotation(preference=None), annotation(preference=0)]
    found = from_alpaca_eval(rows, "f")
    assert [one.score for one in found] == [1.0, 0.25, 0.5]
    assert found[0] == Annotation("Why?", "aligned", "base", 1.0, len("Aligned, longer.") - len("Base."))


@pytest.mark.parametrize("changes", [{"preference": 3}, {"preference": "2"}, {"output_1": None}, {"preference": 0.5}])
def test_a_wrong_annotation_is_named(changes: dict[str, Any]):
    with pytest.raises(InputError, match="f:2: "):
        from_alpaca_eval([annotation(), annotation(**changes)], "f")


def test_mt_bench_answers_have_its_keys(shared: Path):
    from dpo_ray.evaluation import rows_of

    path = str(shared / "data/mt_bench/question.jsonl.gz")
    questions = mt_bench_questions(rows_of(path), path)
    assert len(questions) == 80
    assert all(len(question.turns) == 2 for question in questions)
    rows = to_mt_bench(questions[:1], [["One.", "Two."]], "mine", 1.5)
    assert rows == [
        {
            "question_id": 81,
            "answer_id": "mine-81",
            "model_id": "mine",
            "choices": [{"index": 0, "turns": ["One.", "Two."]}],
            "tstamp": 1.5,
        }
    ]


@pytest.mark.parametrize(
    ("games", "score"),
    [
        (("model_1", "model_1"), 1.0),
        (("model_2", "model_2"), 0.0),
        (("model_1", "model_2"), 0.5),
        (("model_1", "tie"), 0.5),
        (("tie", "tie"), 0.5),
    ],
)
def test_a_win_at_mt_bench_is_both_games(games: tuple[str, str], score: float):
    row = {"question_id": 81, "turn": 2, "model_1": "a", "model_2": "b", "g1_winner": games[0], "g2_winner": games[1]}
    assert from_mt_bench([row], "f") == [Annotation("81:2", "a", "b", score, 0)]


def test_games_with_an_error_are_left_out_and_wrong_winners_named():
    row = {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "error", "g2_winner": "tie"}
    assert from_mt_bench([row], "f") == []
    with pytest.raises(InputError, match=r"f:1: .*winners"):
        from_mt_bench([row | {"g1_winner": "a"}], "f")


def test_a_model_that_stands_second_is_turned_round():
    found = of_model([Annotation("p", "a", "b", 1.0, 5), Annotation("q", "c", "a", 0.25, -3)], "b")
    assert found == {"a": [Annotation("p", "b", "a", 0.0, -5)]}
    assert of_model([Annotation("q", "c", "a", 0.25, -3)], "a") == {"c": [Annotation("q", "a", "c", 0.75, 3)]}


def test_win_rate_of_annotations():
    rows = [Annotation(str(i), "a", "b", float(i % 4 > 0), 0) for i in range(40)]
    found = win_rate_of(rows, "b", "annotations:f")
    assert found["value"] == 0.75
    assert found["length_controlled"] is None  # the file does not tell lengths
    assert (found["wins"], found["losses"], found["against"]) == (30, 10, "b")
