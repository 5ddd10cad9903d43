"""The labelling page's part of the queue: sides mean what was shown, and two people at once label each pair once."""

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.acquisition.label_queue import LabelQueue
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate
from dpo_ray.storage import Folder
from serve import labels
from serve.schema import ApiError, read


def pairs(num: int) -> list[Candidate]:
    return [Candidate.of(f"prompt {i}", f"one {i}", f"other {i}", row=i) for i in range(num)]


def queue_at(path: Path, candidates: list[Candidate], labellers: int = 1) -> LabelQueue:
    queue = LabelQueue(Folder(str(path)), labellers, 15.0)
    queue.add(candidates)
    return queue


def given_to(queue: LabelQueue, person: str) -> dict[str, Any]:
    shown = labels.task(queue, person)["task"]
    assert isinstance(shown, dict)
    return shown


def test_a_task_shows_both_responses_and_how_far_the_work_is(tmp_path: Path):
    queue = queue_at(tmp_path, pairs(3))
    tree = labels.task(queue, "ann")
    shown = tree["task"]
    assert (shown["id"], shown["prompt"]) == (pairs(3)[0].candidate_id, "prompt 0")
    assert {shown["left"], shown["right"]} == {"one 0", "other 0"}
    assert shown["until"] > 0
    assert tree["progress"] == {"waiting": 2, "leased": 1, "done": 0, "total": 3}
    assert tree["mine"] == 0
    labels.answer(queue, "ann", shown["id"], "tie")
    assert labels.task(queue, "ann")["mine"] == 1
    assert labels.task(queue, "bob")["mine"] == 0


def test_turns_are_shown_as_turns_with_the_tools_they_call(tmp_path: Path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = (
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    )
    answers = [({"role": "assistant", "content": text},) for text in ("It is 3.", "No.")]
    queue = queue_at(tmp_path, [Candidate.of(prompt, *answers)])
    shown = given_to(queue, "ann")
    assert [turn["role"] for turn in shown["prompt"]] == ["user", "assistant", "tool"]
    assert [turn["content"] for turn in shown["prompt"]][::2] == ["Add.", "3"]
    assert '"name": "add"' in shown["prompt"][1]["content"]
    assert {shown["left"], shown["right"]} == {"It is 3.", "No."}


def test_a_side_means_the_response_that_stood_there(tmp_path: Path):
    """Whoever sees it: some have the first response on the left, some on the right."""
    candidates = pairs(12)
    queue = queue_at(tmp_path, candidates)
    meant, firsts_on_the_left = {}, 0
    for number in range(12):
        shown = given_to(queue, "ann")
        candidate = next(c for c in candidates if c.candidate_id == shown["id"])
        side = ("left", "right", "tie")[number % 3]
        meant[shown["id"]] = "tie" if side == "tie" else "first" if shown[side] == candidate.first else "second"
        firsts_on_the_left += shown["left"] == candidate.first
        labels.answer(queue, "ann", shown["id"], side)  # type: ignore[arg-type]
    assert {answer.candidate_id: answer.preferred for answer in queue.answers()} == meant
    assert 0 < firsts_on_the_left < 12


def test_left_again_and_again_is_seen_as_position_bias(tmp_path: Path):
    queue = queue_at(tmp_path, pairs(4), labellers=2)
    assert labels.progress(queue)["left_share"] is None
    for person in ("ann", "bob"):
        while (shown := labels.task(queue, person)["task"]) is not None:
            labels.answer(queue, person, shown["id"], "left")
    tree = labels.progress(queue)
    assert (tree["done"], tree["total"], tree["left_share"]) == (4, 4, 1.0)
    assert tree["labels"] == {"ann": 4, "bob": 4}
    assert (tree["agreement"]["num_pairs"], tree["agreement"]["measure"]) == (4, "cohen")


def test_saying_it_twice_is_saying_it_once_and_another_saying_is_refused(tmp_path: Path):
    queue = queue_at(tmp_path, pairs(2))
    name = given_to(queue, "ann")["id"]
    assert labels.answer(queue, "ann", name, "right") == labels.answer(queue, "ann", name, "right") == {"id": name}
    with pytest.raises(InputError, match="undo"):
        labels.answer(queue, "ann", name, "left")
    with pytest.raises(InputError, match="was not given to bob"):
        labels.answer(queue, "bob", name, "left")
    with pytest.raises(InputError, match="has no pair"):
        labels.skip(queue, "ann", "nothing")
    assert labels.progress(queue)["labels"] == {"ann": 1}


def test_a_label_is_taken_back_and_the_pair_comes_again(tmp_path: Path):
    queue = queue_at(tmp_path, pairs(2))
    assert labels.undo(queue, "ann") == {"id": None}
    shown = given_to(queue, "ann")
    labels.answer(queue, "ann", shown["id"], "left")
    assert given_to(queue, "ann")["id"] != shown["id"]
    assert labels.undo(queue, "ann") == {"id": shown["id"]}
    again = given_to(queue, "ann")
    assert again | {"until": 0} == shown | {"until": 0}
    labels.answer(queue, "ann", again["id"], "right")
    assert labels.progress(queue)["done"] == 1


def test_a_skipped_pair_goes_to_others(tmp_path: Path):
    queue = queue_at(tmp_path, pairs(1), labellers=2)
    name = given_to(queue, "ann")["id"]
    assert labels.skip(queue, "ann", name) == {"id": name}
    assert labels.task(queue, "ann")["task"] is None
    assert given_to(queue, "bob")["id"] == name


def test_two_people_at_once_label_every_pair_once_each(tmp_path: Path):
    queue_at(tmp_path, pairs(30), labellers=2)
    said: dict[str, Counter[str]] = {"ann": Counter(), "bob": Counter()}
    together = threading.Barrier(2)

    def work(person: str) -> None:
        # Threads of one process share a queue, those of two have their own.
        queue, rng = LabelQueue(Folder(str(tmp_path)), 2, 15.0), random.Random(person)
        together.wait()
        while (shown := labels.task(queue, person)["task"]) is not None:
            labels.answer(queue, person, shown["id"], rng.choice(("left", "right", "tie")))
            said[person][shown["id"]] += 1
            if rng.random() < 0.1 and labels.undo(queue, person)["id"] is not None:
                said[person][shown["id"]] -= 1

    threads = [threading.Thread(target=work, args=(person,)) for person in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every_pair_once = {candidate.candidate_id: 1 for candidate in pairs(30)}
    assert said == {"ann": every_pair_once, "bob": every_pair_once}
    tree = labels.progress(LabelQueue(Folder(str(tmp_path)), 2, 15.0))
    assert (tree["done"], tree["labels"], tree["agreement"]["num_pairs"]) == (30, {"ann": 30, "bob": 30}, 30)


@given(st.text(max_size=70))
def test_a_name_is_refused_or_the_same_however_often_it_is_read(text: str):
    try:
        name = labels.named(text)
    except InputError:
        return
    assert 1 <= len(name) <= 64
    assert name.isprintable()
    assert labels.named(name) == labels.named(f" {name}\n") == name


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, "a\nb", "\u202eann", "\ud800"])
def test_a_name_that_cannot_be_told_is_refused(name: str, tmp_path: Path):
    with pytest.raises(InputError, match="printable"):
        labels.named(name)
    with pytest.raises(InputError):
        labels.task(queue_at(tmp_path, pairs(1)), name)


def test_one_person_has_one_name():
    assert labels.named(" Ame\u0301lie ") == labels.named("Am\u00e9lie")


def test_bodies_are_read_strictly():
    assert read(labels.AnswerRequest, b'{"person": " ann ", "id": "x", "preferred": "left"}').person == "ann"
    assert read(labels.UndoRequest, b'{"person": "ann"}').person == "ann"
    for kind, body, param in [
        (labels.AnswerRequest, b'{"person": "ann", "id": "x", "preferred": "first"}', "preferred"),
        (labels.AnswerRequest, b'{"person": "", "id": "x", "preferred": "left"}', "person"),
        (labels.SkipRequest, b'{"person": "ann"}', "id"),
        (labels.SkipRequest, b'{"person": "ann", "id": "x", "why": 1}', "why"),
        (labels.UndoRequest, b'{"person": 3}', "person"),
    ]:
        with pytest.raises(ApiError) as caught:
            read(kind, body)  # type: ignore[type-var]
        assert (caught.value.status, caught.value.param) == (400, param)
