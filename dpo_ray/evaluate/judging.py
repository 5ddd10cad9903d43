"""Which of two answers is better: a judge asked so that positions cancel, and judges measured against people.

A language model prefers a position now and then, so it is asked in both orders and each order is kept; functions and
reward models see one answer at a time and are asked once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.acquisition.answers import Answer, Preferred, plain_text
from dpo_ray.acquisition.oracles import make_oracle
from dpo_ray.config import AnyJudge, LlmOracleConfig, RunConfig
from dpo_ray.errors import InputError
from dpo_ray.evaluate.win_rates import outcome, win_rate
from dpo_ray.metrics import wilson_interval
from dpo_ray.pairs import Candidate, content_hash

SCORES: Mapping[Preferred, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Of the first response."""


class Verdict(NamedTuple):
    """What a judge says of a candidate as it stands."""

    score: float | None
    """Of the first response, in [0, 1]: the mean over the orders that were asked; None: no usable answer."""

    orders: tuple[Preferred, ...]
    """Which response it preferred, in each order that was asked; the second order shows the second response first."""

    by: str
    note: str | None
    cost: Mapping[str, float]


def ask(
    judge: AnyJudge,
    candidates: Sequence[Candidate],
    *,
    seed: int,
    storage: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Ask a judge about candidates; equal responses are a tie without asking.

    Args:
        candidates: First and second as the caller wants them scored.
        storage: `storage.path`, below which a language model's answers are kept.

    Raises:
        InputError: The judge cannot be had, or its endpoint refuses.
    """
    is_llm = isinstance(judge, LlmOracleConfig)
    if isinstance(judge, LlmOracleConfig):
        judge = judge.model_copy(update={"both_orders": False})
    wanted: dict[str, Candidate] = {}
    for candidate in candidates:
        if not _is_equal(candidate):
            for shown in (candidate, swapped(candidate)) if is_llm else (candidate,):
                wanted[shown.candidate_id] = shown
    found: dict[str, Answer] = {}

    def on_answer(answer: Answer) -> None:
        found[answer.candidate_id] = answer
        on_progress(len(found), len(wanted))

    if wanted:
        with _as_judge():
            make_oracle(judge, seed=seed, storage=storage).ask(list(wanted.values()), on_answer)
    return [_verdict(candidate, found, is_llm) for candidate in candidates]


def check_judge(run: RunConfig) -> None:
    """Whether `evaluate.judge` can be had, before anything is written for it.

    Raises:
        InputError: Its function, model, key or template is missing or wrong.
    """
    if run.evaluate.judge is not None:
        with _as_judge():
            make_oracle(run.evaluate.judge, seed=run.evaluate.seed, storage=run.storage.path)


def swapped(candidate: Candidate) -> Candidate:
    """The same with the responses in the other order."""
    return replace(candidate, first=candidate.second, second=candidate.first)


@contextmanager
def _as_judge() -> Iterator[None]:
    """Oracles name their keys as acquisition has them."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("acquire.oracle", "evaluate.judge")) from None


def _is_equal(candidate: Candidate) -> bool:
    return content_hash(candidate.first) == content_hash(candidate.second)


def _verdict(candidate: Candidate, found: Mapping[str, Answer], is_llm: bool) -> Verdict:
    if _is_equal(candidate):
        return Verdict(0.5, (), "", "equal answers", {})
    answers = [found[candidate.candidate_id]]
    if is_llm:
        answer = found[swapped(candidate).candidate_id]
        turned: Preferred = {"first": "second", "second": "first"}.get(answer.preferred, answer.preferred)  # type: ignore[assignment]
        answers.append(answer._replace(preferred=turned))
    cost = {name: sum(a.cost.get(name, 0.0) for a in answers) for a in answers for name in a.cost}
    notes = "; ".join(dict.fromkeys(answer.note for answer in answers if answer.note)) or None
    if any(answer.preferred == "none" for answer in answers):
        return Verdict(None, tuple(answer.preferred for answer in answers), answers[0].by, notes, cost)
    score = sum(SCORES[answer.preferred] for answer in answers) / len(answers)
    return Verdict(score, tuple(answer.preferred for answer in answers), answers[0].by, notes, cost)


def win_rate_tree(verdicts: Sequence[Verdict], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Win rate of the first responses, plain and length-controlled, with what the judge did; as `evaluation.json`.

    Raises:
        InputError: The judge gave no usable answer at all.
    """
    rows = [(v.score, c) for v, c in zip(verdicts, candidates, strict=True) if v.score is not None]
    if not rows:
        notes = next((v.note for v in verdicts if v.note), "it was asked nothing")
        raise InputError(f"`evaluate.judge` gave no usable answer: {notes}")
    scores = [score for score, _ in rows]
    prompts = [candidate.prompt_id for _, candidate in rows]
    longer = [len(plain_text(c.first)) - len(plain_text(c.second)) for _, c in rows]
    return {
        "judge": next((v.by for v in verdicts if v.by), "none: all answers are equal"),
        **outcome(scores, prompts, longer),
        "missing": len(verdicts) - len(rows),
        **judge_habits(verdicts),
        "cost": total_cost(verdicts),
    }


def judge_habits(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Position bias and self-consistency of a judge that was asked in both orders; None for others.

    `first_position` is the share of its decided answers that prefer what was shown first: 0.5 without bias.
    `self_consistency` is the share of candidates of which both orders say the same.
    """
    asked = [v.orders for v in verdicts if len(v.orders) == 2 and "none" not in v.orders]
    if not asked:
        return {"first_position": None, "self_consistency": None}
    shown_first = sum((one == "first") + (other == "second") for one, other in asked)
    decided = sum((one != "tie") + (other != "tie") for one, other in asked)
    return {
        "first_position": _share(shown_first, decided),
        "self_consistency": _share(sum(one == other for one, other in asked), len(asked)),
    }


def agreement_with_people(verdicts: Sequence[Verdict], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """How often a judge says what people said, on candidates whose `gold_gap` is theirs (positive: the first).

    Returns:
        `agreement`: share of the pairs that both decided; `with_ties`: a judge's tie counts half; `kappa`: Cohen's,
        over decided pairs; `longer_is_better`: how often people, and the judge, preferred the longer response.
    """
    rows = [(v.score, c) for v, c in zip(verdicts, candidates, strict=True) if v.score is not None]
    judge = np.array([score for score, _ in rows])
    people = np.array([1.0 if (c.gold_gap or 0.0) > 0 else 0.0 for _, c in rows])
    longer = np.array([len(plain_text(c.first)) - len(plain_text(c.second)) for _, c in rows])
    decided = judge != 0.5
    same = (judge > 0.5) == (people > 0.5)
    value, low, high = win_rate(np.where(people > 0.5, judge, 1 - judge), [c.prompt_id for _, c in rows])
    unequal = longer != 0
    return {
        "num_pairs": len(rows),
        "missing": len(verdicts) - len(rows),
        "undecided": int((~decided).sum()),
        "agreement": _share(int(same[decided].sum()), int(decided.sum())),
        "with_ties": {"value": value, "low": low, "high": high},
        "kappa": _kappa(judge[decided] > 0.5, people[decided] > 0.5),
        "longer_is_better": {
            "people": _share(int(((longer > 0) == (people > 0.5))[unequal].sum()), int(unequal.sum())),
            "judge": _share(
                int(((longer > 0) == (judge > 0.5))[unequal & decided].sum()), int((unequal & decided).sum())
            ),
        },
        **judge_habits(verdicts),
        "cost": total_cost(verdicts),
    }


def _kappa(one: Any, other: Any) -> float | None:
    """Cohen's kappa (1960): agreement beyond what the two shares of "first" give by chance."""
    if not len(one):
        return None
    seen, p, q = float((one == other).mean()), float(one.mean()), float(other.mean())
    chance = p * q + (1 - p) * (1 - q)
    return None if chance == 1 else (seen - chance) / (1 - chance)


def _share(count: int, total: int) -> dict[str, float] | None:
    if total == 0:
        return None
    low, high = wilson_interval(count / total, total)
    return {"value": count / total, "low": low, "high": high}


def total_cost(verdicts: Sequence[Verdict]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for verdict in verdicts:
        total.update(dict(verdict.cost))
    return dict(total)
