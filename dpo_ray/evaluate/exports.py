"""Generations and judgements in the formats of AlpacaEval and MT-Bench, so that outside tools can score and be read.

Pure: trees and rows in, trees and rows out. AlpacaEval: `model_outputs.json` and `annotations.json` of
tatsu-lab/alpaca_eval. MT-Bench: `question.jsonl`, `model_answer/MODEL.jsonl` and `model_judgment/*.jsonl` of
lm-sys/FastChat.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_ray.errors import InputError
from dpo_ray.evaluate.win_rates import outcome

Row = Mapping[str, Any]


class Annotation(NamedTuple):
    """What an outside judge says of one comparison."""

    prompt: str
    model: str
    against: str
    score: float
    """Of `model`, in [0, 1]."""

    length_difference: int
    """Characters of `model`'s response less those of `against`; 0 where the file does not tell."""


def to_alpaca_eval(prompts: Sequence[str], outputs: Sequence[str], generator: str) -> list[dict[str, str]]:
    """`model_outputs.json`: what `alpaca_eval evaluate --model_outputs` reads."""
    return [
        {"instruction": prompt, "output": output, "generator": generator}
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def from_alpaca_eval(rows: Iterable[Row], name: str) -> list[Annotation]:
    """`annotations.json`: `preference` is 1 where the first output is better, 2 where the second is, 1.5 a tie, or a
    number between; the second is the model under test. Rows without a preference are left out.

    Raises:
        InputError: Names the row.
    """
    found = []
    for number, row in enumerate(rows, 1):
        texts = [row.get(key) for key in ("instruction", "output_1", "output_2", "generator_1", "generator_2")]
        prompt, first, second, one, other = texts
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{name}:{number}: no AlpacaEval annotation (instruction, output_1, generator_1, ...)")
        preference = row.get("preference")
        if preference is None or (isinstance(preference, float) and math.isnan(preference)):
            continue
        if isinstance(preference, bool) or not isinstance(preference, int | float) or not 0 <= preference <= 2:
            raise InputError(f"{name}:{number}: `preference` is {preference!r}, not a number from 1 to 2")
        score = 0.5 if preference == 0 else preference - 1  # older annotators write 0 for a tie
        if score < 0:
            raise InputError(f"{name}:{number}: `preference` is {preference!r}, not a number from 1 to 2")
        found.append(Annotation(str(prompt), str(other), str(one), float(score), len(str(second)) - len(str(first))))
    return found


class Question(NamedTuple):
    """A question of MT-Bench, with its turns."""

    id: Any
    turns: tuple[str, ...]


def mt_bench_questions(rows: Iterable[Row], name: str) -> list[Question]:
    """`question.jsonl`.

    Raises:
        InputError: Names the row.
    """
    found = []
    for number, row in enumerate(rows, 1):
        turns = row.get("turns")
        if "question_id" not in row or not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
            raise InputError(f"{name}:{number}: no question of MT-Bench (question_id, turns)")
        found.append(Question(row["question_id"], tuple(turns)))
    return found


def to_mt_bench(
    questions: Sequence[Question], turns: Sequence[Sequence[str]], model_id: str, seconds: float
) -> list[dict[str, Any]]:
    """`model_answer/MODEL.jsonl`.

    Args:
        turns: The model's answers to the turns of each question.
        seconds: Time of the answers, since 1970.
    """
    return [
        {
            "question_id": question.id,
            "answer_id": f"{model_id}-{question.id}",
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(said)}],
            "tstamp": seconds,
        }
        for question, said in zip(questions, turns, strict=True)
    ]


def from_mt_bench(rows: Iterable[Row], name: str) -> list[Annotation]:
    """`model_judgment/*_pair.jsonl`: two games with the models' places changed. As FastChat counts it, a model wins
    that wins both, and all else is a tie. Games with an error are left out.

    Raises:
        InputError: Names the row.
    """
    found = []
    for number, row in enumerate(rows, 1):
        games = [row.get("g1_winner"), row.get("g2_winner")]
        models = [row.get("model_1"), row.get("model_2")]
        if not all(isinstance(value, str) for value in (*games, *models)) or "question_id" not in row:
            raise InputError(
                f"{name}:{number}: no pairwise judgement of MT-Bench (question_id, model_1, g1_winner, ...)"
            )
        if "error" in games:
            continue
        if not set(games) <= {"model_1", "model_2", "tie"}:
            raise InputError(f"{name}:{number}: the winners are {games}, not model_1, model_2 or tie")
        score = 1.0 if games == ["model_1"] * 2 else 0.0 if games == ["model_2"] * 2 else 0.5
        prompt = f"{row['question_id']}:{row.get('turn', 1)}"
        found.append(Annotation(prompt, str(models[0]), str(models[1]), score, 0))
    return found


def of_model(annotations: Iterable[Annotation], model: str) -> dict[str, list[Annotation]]:
    """Those that a model takes part in, by its opponent, with its own score; turned round where it stands second."""
    found: dict[str, list[Annotation]] = {}
    for one in annotations:
        if one.model == model:
            found.setdefault(one.against, []).append(one)
        elif one.against == model:
            turned = Annotation(one.prompt, model, one.model, 1 - one.score, -one.length_difference)
            found.setdefault(one.model, []).append(turned)
    return found


def win_rate_of(annotations: Sequence[Annotation], against: str, judge: str) -> dict[str, Any]:
    """As an entry of `win_rate` in `evaluation.json`."""
    scores, prompts = [one.score for one in annotations], [one.prompt for one in annotations]
    longer = [one.length_difference for one in annotations]
    return {
        "against": against,
        "judge": judge,
        **outcome(scores, prompts, longer if any(longer) else None),
        "missing": 0,
    }
