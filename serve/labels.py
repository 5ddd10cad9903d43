"""What the labelling page asks for and says, as JSON trees over the queue of pairs. No HTTP here.

The page knows left and right only; which response stands where is the queue's to say. The queue reads and locks files:
call these from a thread that may wait.
"""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dpo_ray.acquisition.answers import other, plain_text
from dpo_ray.acquisition.label_queue import LabelQueue, Progress, Verdict, left_of
from dpo_ray.errors import InputError
from dpo_ray.pairs import Message, Text
from serve.schema import Strict

MAX_NAME = 64
Place = Literal["left", "right", "tie"]
Tree = dict[str, Any]


def named(person: str) -> str:
    """A person's name, written in one way however it was typed.

    Raises:
        InputError: It is empty, too long, or has characters that cannot be seen.
    """
    name = unicodedata.normalize("NFC", person.strip())
    if not (1 <= len(name) <= MAX_NAME and name.isprintable()):
        raise InputError(f"a name has 1 to {MAX_NAME} printable characters")
    return name


Person = Annotated[str, AfterValidator(named)]
PairId = Annotated[str, Field(min_length=1, max_length=64)]


class AnswerRequest(Strict):
    """`POST /label/answer`."""

    person: Person
    id: PairId
    preferred: Place


class SkipRequest(Strict):
    """`POST /label/skip`."""

    person: Person
    id: PairId


class UndoRequest(Strict):
    """`POST /label/undo`."""

    person: Person


def task(queue: LabelQueue, person: str) -> Tree:
    """The pair in this person's hand, or a new one; null where there is none for them now.

    Raises:
        InputError: No such name can be.
    """
    name = named(person)
    given = queue.take(name)
    now = queue.progress()
    shown = None
    if given is not None:
        left, right = map(plain_text, given.shown)
        shown = {
            "id": given.candidate.candidate_id,
            "prompt": _prompt(given.candidate.prompt),
            "left": left,
            "right": right,
            "until": given.until,
        }
    return {"task": shown, "progress": _counts(now), "mine": now.labels.get(name, 0)}


def answer(queue: LabelQueue, person: str, pair_id: str, preferred: Place) -> Tree:
    """Record what a person says of a pair that they were given.

    Raises:
        InputError: They were not, or have said something else before.
    """
    name = named(person)
    left = left_of(pair_id, name)
    verdicts: dict[Place, Verdict] = {"left": left, "right": other(left), "tie": "tie"}
    queue.label(name, pair_id, verdicts[preferred])
    return {"id": pair_id}


def skip(queue: LabelQueue, person: str, pair_id: str) -> Tree:
    """Leave a pair to others.

    Raises:
        InputError: It was not given to this person, or has a label of theirs.
    """
    queue.skip(named(person), pair_id)
    return {"id": pair_id}


def undo(queue: LabelQueue, person: str) -> Tree:
    """Take a person's last label back: the pair is theirs again. Null: there is none, or it is in use already."""
    return {"id": queue.undo(named(person))}


def progress(queue: LabelQueue) -> Tree:
    """Where the pairs are, who labelled how many, and how well people agree."""
    now = queue.progress()
    return {
        **_counts(now),
        "labels": now.labels,
        "agreement": queue.agreement()._asdict(),
        "left_share": queue.left_share(),
    }


def _counts(now: Progress) -> Tree:
    return {"waiting": now.waiting, "leased": now.leased, "done": now.done, "total": now.total}


def _prompt(prompt: Text) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [_turn(message) for message in prompt]


def _turn(message: Message) -> dict[str, str]:
    # The text of a lone assistant turn is its content, and the tools that it calls.
    return {"role": message["role"], "content": plain_text((message | {"role": "assistant"},))}
