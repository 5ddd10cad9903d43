"""The queue of people: nothing is lost, nothing is given twice, whoever else is at it and whenever somebody dies."""

import fcntl
import itertools
import json
import math
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.acquisition.answers import Answer, Preferred, agreement, most_votes
from dpo_ray.acquisition.label_queue import (
    KEYS,
    LOCK,
    LOG,
    LabelQueue,
    Progress,
    State,
    Task,
    Verdict,
    fold,
    label_in_terminal,
    open_queue,
)
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate
from dpo_ray.storage import Folder, read_lines

LEASE_S = 600.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pairs(num: int) -> list[Candidate]:
    return [Candidate.of(f"prompt {i}", f"one {i}", f"other {i}", gold_gap=float(i + 1), row=i) for i in range(num)]


def queue_at(path: Path, clock: Callable[[], float], labellers: int = 1) -> LabelQueue:
    return LabelQueue(Folder(str(path)), labellers, LEASE_S / 60, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> LabelQueue:
    """Two pairs for one labeller each."""
    made = queue_at(tmp_path, clock)
    made.add(pairs(2))
    return made


def taken(queue: LabelQueue, person: str) -> str:
    task = queue.take(person)
    assert task is not None
    return task.candidate.candidate_id


def say(queue: LabelQueue, person: str, preferred: Verdict = "first") -> str:
    """Take a pair and label it."""
    name = taken(queue, person)
    queue.label(person, name, preferred)
    return name


def events(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines((folder / LOG).read_bytes()))


# Giving


def test_everyone_gets_another_pair_until_there_is_none(queue: LabelQueue):
    names = [candidate.candidate_id for candidate in pairs(2)]
    assert [taken(queue, "ann"), taken(queue, "bob")] == names
    assert queue.take("eve") is None
    assert queue.progress() == Progress(waiting=0, leased=2, done=0, labels={})


def test_taking_again_gives_the_pair_in_hand_and_writes_nothing(queue: LabelQueue, tmp_path: Path):
    first = queue.take("ann")
    before = (tmp_path / LOG).read_bytes()
    assert queue.take("ann") == first
    assert (tmp_path / LOG).read_bytes() == before


def test_candidates_are_queued_once(queue: LabelQueue, tmp_path: Path):
    before = (tmp_path / LOG).read_bytes()
    queue.add(pairs(2))
    assert (tmp_path / LOG).read_bytes() == before
    queue.add(pairs(3))
    assert queue.progress().total == 3


def test_a_pair_comes_back_when_its_lease_ends_and_not_before(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    queue.skip("bob", taken(queue, "bob"))  # the other pair is out of the way
    clock.now += LEASE_S - 1
    assert queue.take("bob") is None
    clock.now += 1
    assert taken(queue, "bob") == name


def test_who_comes_back_after_the_lease_may_get_the_pair_again(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    assert taken(queue, "ann") == name
    assert queue.take("ann") == queue.take("ann")


def test_a_pair_is_with_no_more_people_than_labels_are_missing(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=3)
    queue.add(pairs(1))
    name = say(queue, "ann")
    assert [taken(queue, "bob"), taken(queue, "eve")] == [name, name]
    assert queue.take("joe") is None
    queue.skip("bob", name)
    assert taken(queue, "joe") == name


def test_nobody_gets_a_pair_again_that_they_labelled_or_skipped(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(2))
    one = say(queue, "ann")
    other = taken(queue, "ann")
    queue.skip("ann", other)
    assert one != other
    assert queue.take("ann") is None
    clock.now += 2 * LEASE_S
    assert queue.take("ann") is None
    assert [say(queue, "bob"), say(queue, "bob")] == [one, other]


def test_the_sides_are_shown_in_either_order_by_chance_and_as_recorded(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(150))
    lefts: dict[str, list[str]] = {"ann": [], "bob": []}
    for person, seen in lefts.items():
        for _ in range(150):
            task = queue.take(person)
            assert task is not None
            texts = (task.candidate.first, task.candidate.second)
            assert task.shown == (texts if task.left == "first" else texts[::-1])
            queue.label(person, task.candidate.candidate_id, task.left)
            seen.append(task.left)
    assert [event["left"] for event in events(tmp_path) if event["event"] == "label"] == lefts["ann"] + lefts["bob"]
    for seen in lefts.values():
        assert seen.count("first") == pytest.approx(75, abs=4 * math.sqrt(150) / 2)
    assert sum(a == b for a, b in zip(*lefts.values(), strict=True)) == pytest.approx(75, abs=4 * math.sqrt(150) / 2)
    assert queue.left_share() == 1.0, "all chose the left one"


def test_the_share_of_the_left_side_leaves_ties_out(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock)
    queue.add(pairs(5))
    assert queue.left_share() is None
    for wish in (0, 1, 1, 1, 2):
        task = queue.take("ann")
        assert task is not None
        right: Verdict = "second" if task.left == "first" else "first"
        queue.label("ann", task.candidate.candidate_id, (task.left, right, "tie")[wish])
    assert queue.left_share() == 0.25


def test_people_see_a_candidate_as_it_was_but_nothing_that_the_data_knows_of_its_worth(tmp_path: Path, clock: Clock):
    turns = ({"role": "user", "content": "why?\n"}, {"role": "assistant", "content": "{}"})
    tools = ({"name": "search", "parameters": {"q": ["text"]}},)
    one, other = ({"role": "assistant", "content": "a"},), ({"role": "assistant", "content": "b\u2028"},)
    given = Candidate.of(turns, one, other, 3.25, tools=tools, weight=7.5, group="g", source="file", row=4)
    queue = queue_at(tmp_path, clock)
    queue.add([given])
    task = queue_at(tmp_path, clock).take("ann")
    assert task is not None
    seen = task.candidate
    assert (seen.prompt, seen.first, seen.second, seen.tools) == (given.prompt, given.first, given.second, given.tools)
    assert (seen.candidate_id, seen.source, seen.row) == (given.candidate_id, "file", 4)
    assert (seen.gold_gap, seen.weight, seen.group) == (None, None, None)
    assert "3.25" not in (tmp_path / LOG).read_text()


# Labelling


def test_a_label_makes_an_answer(queue: LabelQueue):
    name = say(queue, "ann", "second")
    assert queue.answers() == [Answer(name, "second", "ann")]
    assert queue.progress() == Progress(waiting=1, leased=0, done=1, labels={"ann": 1})


def test_a_label_after_the_lease_is_heard(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    queue.label("ann", name, "tie")
    assert queue.answers() == [Answer(name, "tie", "ann")]


def test_a_label_too_many_changes_no_answer_and_is_kept(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    assert say(queue, "bob", "second") == name
    queue.label("ann", name, "first")
    assert queue.answers() == [Answer(name, "second", "bob")]
    assert queue.agreement().num_pairs == 1
    assert queue.progress().labels == {"ann": 1, "bob": 1}


def test_who_held_a_pair_that_another_has_done_meanwhile_gets_the_next(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    assert taken(queue, "bob") == name
    queue.label("ann", name, "first")
    assert queue.progress() == Progress(waiting=1, leased=0, done=1, labels={"ann": 1})
    assert taken(queue, "bob") != name


def test_the_same_label_twice_is_one_and_another_is_refused(queue: LabelQueue, tmp_path: Path):
    name = say(queue, "ann", "first")
    before = (tmp_path / LOG).read_bytes()
    queue.label("ann", name, "first")
    assert (tmp_path / LOG).read_bytes() == before
    with pytest.raises(InputError, match=r"ann has labelled .* otherwise: undo that first"):
        queue.label("ann", name, "second")
    with pytest.raises(InputError, match="undo that first"):
        queue.skip("ann", name)


def test_only_what_was_given_can_be_labelled(queue: LabelQueue):
    name = taken(queue, "ann")
    for act in (lambda: queue.label("bob", name, "first"), lambda: queue.skip("bob", name)):
        with pytest.raises(InputError, match=f"the pair {name} was not given to bob"):
            act()
    with pytest.raises(InputError, match="has no pair nothing"):
        queue.label("ann", "nothing", "first")
    with pytest.raises(InputError, match="`better` is no label: it is one of first, second, tie"):
        queue.label("ann", name, "better")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a name"):
        queue.take(" ")


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["first"], ("first", None)),
        (["tie"], ("tie", None)),
        (["first", "second"], ("tie", "even vote")),
        (["first", "tie"], ("tie", "even vote")),
        (["second", "first", "second"], ("second", None)),
        (["first", "tie", "tie"], ("tie", None)),
        (["first", "second", "tie"], ("tie", "even vote")),
        (["first", "second", "tie", "second"], ("second", None)),
        (["first", "first", "second", "second", "tie"], ("tie", "even vote")),
    ],
)
def test_the_majority_holds_and_an_even_vote_is_a_tie(
    tmp_path: Path, clock: Clock, votes: list[Verdict], expected: tuple[Preferred, str | None]
):
    assert most_votes(votes) == expected
    queue = queue_at(tmp_path, clock, labellers=len(votes))
    queue.add(pairs(1))
    people = [f"p{i}" for i in range(len(votes))]
    for person, vote in zip(people, votes, strict=True):
        assert queue.answers() == []
        say(queue, person, vote)
    answer = queue.answers()[0]
    assert (answer.preferred, answer.note, answer.by) == (*expected, ", ".join(people))


def test_a_pair_that_as_many_skip_as_should_label_it_has_no_answer(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(1))
    say(queue, "joe")
    for person in ("bob", "ann"):
        assert queue.progress().done == 0
        queue.skip(person, taken(queue, person))
    [answer] = queue.answers()
    assert (answer.preferred, answer.by, answer.note) == ("none", "ann, bob", "skipped by 2")
    assert queue.take("eve") is None


def test_skipping_twice_is_skipping_once(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(1))
    name = taken(queue, "ann")
    queue.skip("ann", name)
    queue.skip("ann", name)
    assert queue.progress().done == 0


def test_who_skipped_a_pair_may_label_it_after_all(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(1))
    for person in ("ann", "bob"):
        name = taken(queue, person)
        queue.skip(person, name)
    assert queue.answers()[0].preferred == "none"
    queue.label("ann", name, "first")
    assert queue.answers() == []
    say(queue, "eve", "first")
    assert queue.answers() == [Answer(name, "first", "ann, eve")]


# Taking back


def test_undo_takes_the_last_label_back_and_gives_the_pair_again(queue: LabelQueue):
    one, other = say(queue, "ann"), say(queue, "ann", "second")
    assert queue.undo("ann") == other
    assert queue.progress() == Progress(waiting=0, leased=1, done=1, labels={"ann": 1})
    assert taken(queue, "ann") == other
    queue.label("ann", other, "tie")
    assert [answer.preferred for answer in queue.answers()] == ["first", "tie"]
    assert [queue.undo("ann"), queue.undo("ann"), queue.undo("ann")] == [other, one, None]
    assert queue.progress() == Progress(waiting=1, leased=1, done=0, labels={})


def test_undo_puts_the_pair_in_hand_back(queue: LabelQueue):
    one = say(queue, "ann")
    other = taken(queue, "ann")
    assert queue.undo("ann") == one
    assert taken(queue, "bob") == other


def test_undo_of_one_person_leaves_the_labels_of_others(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(1))
    name = say(queue, "ann", "first")
    say(queue, "bob", "second")
    queue.undo("ann")
    assert queue.progress().labels == {"bob": 1}
    queue.label("ann", name, "second")
    assert queue.answers() == [Answer(name, "second", "bob, ann")]


def test_undo_of_a_late_label_leaves_the_pair_to_whoever_holds_it(queue: LabelQueue, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    taken(queue, "bob")
    queue.label("ann", name, "first")
    assert queue.undo("ann") == name
    assert taken(queue, "ann") != name
    assert taken(queue, "bob") == name


# The driver


class Driver:
    """Waits for answers while a script goes on at each poll."""

    def __init__(self, clock: Clock, script: Iterator[object]) -> None:
        self.answers: list[Answer] = []
        self.times: list[float] = []
        self._clock, self._script = clock, script

    def on_answer(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.times.append(self._clock.now)

    def sleep(self, seconds: float) -> None:
        self._clock.now += seconds
        next(self._script, None)

    def wait(self, queue: LabelQueue, num: int, **options: Any) -> None:
        names = [candidate.candidate_id for candidate in pairs(num)]
        queue.wait(self.on_answer, names, sleep=self.sleep, **options)


def test_answers_come_once_each_and_settled(queue: LabelQueue, clock: Clock):
    def script() -> Iterator[object]:
        yield say(queue, "ann", "first")  # at 1001
        yield say(queue, "ann", "second")  # at 1002, taken back and said again
        yield queue.undo("ann")
        yield say(queue, "ann", "tie")  # at 1004

    driver = Driver(clock, script())
    driver.wait(queue, 2, poll_s=1.0, settle_s=10.0)
    assert [answer.preferred for answer in driver.answers] == ["first", "tie"]
    assert driver.times == [1011.0, 1014.0]


def test_what_the_driver_has_used_stays_as_it_is(queue: LabelQueue, tmp_path: Path, clock: Clock):
    name = taken(queue, "ann")
    clock.now += LEASE_S
    say(queue, "bob", "second")
    driver = Driver(clock, iter(()))
    driver.wait(queue, 1, settle_s=0.0)
    assert queue.undo("bob") is None
    queue_at(tmp_path, clock, labellers=2)
    assert queue.progress().done == 1
    queue.label("ann", name, "first")
    assert queue.answers() == driver.answers == [Answer(name, "second", "bob")]


def test_a_driver_that_starts_again_gets_all_answers_again(queue: LabelQueue, tmp_path: Path, clock: Clock):
    say(queue, "ann")
    say(queue, "ann", "tie")
    for _ in range(2):
        driver = Driver(clock, iter(()))
        driver.wait(queue_at(tmp_path, clock), 2, settle_s=0.0)
        assert [answer.preferred for answer in driver.answers] == ["first", "tie"]


def test_waiting_can_be_interrupted_and_nothing_is_lost(queue: LabelQueue, clock: Clock):
    def interrupt() -> Iterator[object]:
        yield say(queue, "ann")
        raise KeyboardInterrupt

    driver = Driver(clock, interrupt())
    with pytest.raises(KeyboardInterrupt):
        driver.wait(queue, 2, settle_s=0.0)
    assert [answer.preferred for answer in driver.answers] == ["first"]
    say(queue, "bob", "tie")
    driver = Driver(clock, iter(()))
    driver.wait(queue, 2, settle_s=0.0)
    assert [answer.preferred for answer in driver.answers] == ["first", "tie"]


def test_waiting_ends_when_it_should_stop(queue: LabelQueue, clock: Clock):
    say(queue, "ann")
    driver = Driver(clock, iter(()))
    driver.wait(queue, 2, settle_s=0.0, should_stop=lambda: clock.now > 1002)
    assert [answer.preferred for answer in driver.answers] == ["first"]
    assert clock.now == 1003


def test_waiting_for_a_pair_that_was_never_queued_is_an_error(queue: LabelQueue):
    with pytest.raises(InputError, match="has no pair x"):
        queue.wait(print, ["x"])


# Crashes and company


def test_a_half_written_line_is_no_event_and_the_next_one_follows_the_last_whole(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(2))
    say(queue, "ann", "second")
    name = say(queue, "bob", "second")
    log = tmp_path / LOG
    whole = log.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    before = fold(read_lines(whole[:start]))
    for end in range(start, len(whole)):
        log.write_bytes(whole[:end])
        fresh = queue_at(tmp_path, clock, labellers=2)
        assert fresh.progress().labels == {"ann": 1}
        assert fold(read_lines(log.read_bytes())) == before
        assert taken(fresh, "bob") == name
        fresh.label("bob", name, "second")
        assert fresh.answers() == [Answer(name, "second", "ann, bob")]


def test_a_damaged_line_is_named(queue: LabelQueue, tmp_path: Path, clock: Clock):
    with (tmp_path / LOG).open("a") as log:
        log.write('{"event": "la\n')
    with pytest.raises(InputError, match=rf"{LOG}: a line is damaged"):
        queue.progress()
    with pytest.raises(InputError, match=rf"{LOG}: a line is damaged"):
        queue_at(tmp_path, clock)


def test_an_interrupt_while_reading_does_not_count_events_twice(
    queue: LabelQueue, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    other = queue_at(tmp_path, clock)
    say(other, "ann")
    other.undo("ann")

    def lines_then_interrupt(content: bytes) -> Iterator[dict[str, Any]]:
        for event in read_lines(content):
            yield event
            if event["event"] == "label":
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpo_ray.acquisition.label_queue.read_lines", lines_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            queue.progress()
    assert queue.progress() == other.progress()


def test_a_label_is_on_disk_before_anyone_is_told(queue: LabelQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = taken(queue, "ann")
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    queue.label("ann", name, "first")
    [content] = synced
    assert json.loads(content.splitlines()[-1])["event"] == "label"


def test_a_queue_on_an_object_store_is_refused():
    with pytest.raises(InputError, match=r"local disk, not in s3://bucket/queue: set `storage\.path`"):
        LabelQueue(Folder("s3://bucket/queue"), 1, 15.0)


def test_an_existing_queue_is_opened_with_its_settings(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(1))
    before = (tmp_path / LOG).read_bytes()
    opened = open_queue(tmp_path, clock)
    assert (tmp_path / LOG).read_bytes() == before
    say(opened, "ann")
    task = opened.take("bob")
    assert task is not None
    assert task.until == clock.now + LEASE_S
    assert queue.progress() == Progress(waiting=0, leased=1, done=0, labels={"ann": 1})
    with pytest.raises(InputError, match="missing holds no queue of pairs to label"):
        open_queue(tmp_path / "missing")


def test_new_settings_hold_for_all_that_have_the_queue_open(queue: LabelQueue, tmp_path: Path, clock: Clock):
    say(queue, "ann")
    assert queue.progress().done == 1
    queue_at(tmp_path, clock, labellers=2)
    assert queue.progress().done == 0


People = tuple[str, ...]
PEOPLE: People = ("ann", "bob", "eve", "joe")


class Model:
    """What the queue owes: kept by the test from what it was told, without a look at the log."""

    def __init__(self, labellers: int) -> None:
        self.labellers = labellers
        self.labels: dict[str, dict[str, Verdict]] = {}
        self.skips: dict[str, set[str]] = {}
        self.leases: dict[tuple[str, str], float] = {}
        self.given: set[tuple[str, str]] = set()
        self.history: dict[str, list[str]] = {person: [] for person in PEOPLE}

    def on_take(self, task: Task | None, person: str, now: float) -> None:
        if task is None:
            return
        name = task.candidate.candidate_id
        others = [p for (n, p), until in self.leases.items() if n == name and p != person and until > now]
        if self.leases.get((name, person), 0.0) <= now:
            self.leases = {key: until for key, until in self.leases.items() if key[1] != person}
            assert len(self.labels.get(name, {})) + len(others) < self.labellers, "asked more often than needed"
        assert task.until > now
        assert person not in self.labels.get(name, {}), "given to somebody who labelled it"
        assert person not in self.skips.get(name, set()), "given to somebody who skipped it"
        held = [n for (n, p), until in self.leases.items() if p == person and until > now]
        assert held in ([], [name]), "two pairs in one hand"
        self.leases[name, person] = task.until
        self.given.add((name, person))

    def on_label(self, name: str, person: str, preferred: Verdict) -> None:
        if person not in self.labels.setdefault(name, {}):
            self.labels[name][person] = preferred
            self.history[person].append(name)
        self.skips.setdefault(name, set()).discard(person)
        self.leases.pop((name, person), None)

    def on_skip(self, name: str, person: str) -> None:
        self.skips.setdefault(name, set()).add(person)
        self.leases.pop((name, person), None)

    def on_undo(self, name: str | None, person: str, now: float) -> None:
        if not self.history[person]:
            assert name is None
            return
        assert name == self.history[person].pop()
        del self.labels[name][person]
        self.leases = {key: until for key, until in self.leases.items() if key[1] != person}
        others = [p for (n, p), until in self.leases.items() if n == name and until > now]
        if len(self.labels[name]) + len(others) < self.labellers:
            self.leases[name, person] = now + LEASE_S

    @property
    def answers(self) -> dict[str, Preferred]:
        """By enumeration of the first votes."""
        found: dict[str, Preferred] = {}
        for name in self.labels.keys() | self.skips.keys():
            votes = list(self.labels.get(name, {}).values())[: self.labellers]
            if len(votes) == self.labellers:
                best = [v for v in votes if all(votes.count(v) > votes.count(w) for w in votes if w != v)]
                found[name] = best[0] if best else "tie"
            elif len(self.skips.get(name, set())) >= self.labellers:
                found[name] = "none"
        return found


@settings(max_examples=60, deadline=None)
@given(labellers=st.integers(1, 3), seed=st.integers(0, 10**9))
def test_whatever_people_do_no_label_is_lost_and_none_asked_for_twice(
    labellers: int, seed: int, tmp_path_factory: pytest.TempPathFactory
):
    """Four people with two programs, which lease, label, skip, undo, let leases run out, and die half-way in a line."""
    rng, clock, model = random.Random(seed), Clock(), Model(labellers)
    folder = tmp_path_factory.mktemp("queue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        queues = [queue_at(folder, clock, labellers) for _ in range(2)]
        queues[0].add(pairs(5))
        for _ in range(60):
            queue, person = rng.choice(queues), rng.choice(PEOPLE)
            seen = sorted(name for name, p in model.given if p == person)
            mine = [name for name in seen if person not in model.labels.get(name, {})]
            match rng.choice(("take", "take", "label", "label", "skip", "undo", "time", "crash")):
                case "take":
                    model.on_take(queue.take(person), person, clock.now)
                case "label" if mine:
                    name, preferred = rng.choice(mine), rng.choice(("first", "second", "tie"))
                    queue.label(person, name, preferred)
                    model.on_label(name, person, preferred)
                case "skip" if mine:
                    name = rng.choice(mine)
                    queue.skip(person, name)
                    model.on_skip(name, person)
                case "undo":
                    model.on_undo(queue.undo(person), person, clock.now)
                case "time":
                    clock.now += rng.choice((1.0, LEASE_S / 2, LEASE_S))
                case "crash":
                    with (folder / LOG).open("a") as log:
                        log.write('{"event": "label", "per'[: rng.randrange(1, 23)])
                    queues[rng.randrange(2)] = queue_at(folder, clock, labellers)
            assert {answer.candidate_id: answer.preferred for answer in queue.answers()} == model.answers
            assert queues[0].progress() == queues[1].progress()
        counts = {person: len(names) for person, names in sorted(model.history.items()) if names}
        assert queues[0].progress().labels == counts
        for person in (f"late {i}" for i in range(4 * labellers)):  # new people finish what is left
            while (task := queues[0].take(person)) is not None:
                queues[0].label(person, task.candidate.candidate_id, "first")
            clock.now += LEASE_S
        assert queues[0].progress().done == 5
        labels = {(e["candidate_id"], e["person"]) for e in events(folder) if e["event"] == "label"}
        kept = {(name, person) for name, by_person in model.labels.items() for person in by_person}
        assert kept <= labels


def test_the_state_is_a_fold_of_the_log_however_it_was_read(tmp_path: Path, clock: Clock):
    one, other = (queue_at(tmp_path, clock, labellers=2) for _ in range(2))
    one.add(pairs(3))
    for queue, person in itertools.product((one, other), ("ann", "bob")):
        say(queue, person)
    other.undo("bob")
    lines = events(tmp_path)
    assert fold(lines) == fold(lines) == one._read() == other._read()
    assert fold([]) == State()
    assert fold(lines[:-1]) != fold(lines)


def test_a_change_waits_for_whoever_else_has_the_queue(queue: LabelQueue, tmp_path: Path):
    name = taken(queue, "ann")
    thread = threading.Thread(target=queue.label, args=("ann", name, "first"))
    with (tmp_path / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert [event["event"] for event in events(tmp_path)][-1] == "lease"
    thread.join()
    assert queue.progress().done == 1


def _label_all(folder: Path, person: str, told: Any, together: Any) -> None:
    queue, rng = LabelQueue(Folder(str(folder)), 2, 15.0), random.Random(person)
    together.wait()
    while (task := queue.take(person)) is not None:
        name, preferred = task.candidate.candidate_id, rng.choice(("first", "second", "tie"))
        queue.label(person, name, preferred)
        told.send((name, person, preferred))
    told.close()


CONTEXT = multiprocessing.get_context("fork")


def _started(folder: Path, person: str, together: Any) -> tuple[Any, Any]:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_label_all, args=(folder, person, sender, together))
    process.start()
    sender.close()
    return process, receiver


def _received(pipe: Any) -> list[tuple[str, str, str]]:
    found = []
    try:
        while True:
            found.append(pipe.recv())
    except EOFError:
        return found


def test_processes_at_one_queue_get_every_pair_labelled_as_often_as_it_should_be(tmp_path: Path):
    LabelQueue(Folder(str(tmp_path)), 2, 15.0).add(pairs(40))
    together = CONTEXT.Barrier(3)
    started = [_started(tmp_path, person, together) for person in ("ann", "bob", "eve")]
    told = [label for _, pipe in started for label in _received(pipe)]
    for process, _ in started:
        process.join()
        assert process.exitcode == 0
    recorded = [(e["candidate_id"], e["person"], e["preferred"]) for e in events(tmp_path) if e["event"] == "label"]
    assert sorted(told) == sorted(recorded)
    assert set(Counter(name for name, *_ in recorded).values()) == {2}
    assert len({(name, person) for name, person, _ in recorded}) == 80
    leases = Counter((e["candidate_id"], e["person"]) for e in events(tmp_path) if e["event"] == "lease")
    assert set(leases.values()) == {1}


def test_a_killed_process_loses_no_label_that_it_was_told_of(tmp_path: Path):
    queue = LabelQueue(Folder(str(tmp_path)), 2, 15.0)
    queue.add(pairs(200))
    told = []
    for number, person in enumerate(("ann", "bob", "eve")):
        process, pipe = _started(tmp_path, person, CONTEXT.Barrier(1))
        pipe.recv()
        time.sleep(0.02 + 0.013 * number)
        process.kill()
        process.join()
        told += _received(pipe)
    recorded = {(e["candidate_id"], e["person"], e["preferred"]) for e in events(tmp_path) if e["event"] == "label"}
    assert len(told) > 0
    assert set(told) <= recorded
    say(queue, "joe")


# Agreement


def test_cohens_kappa_worked_by_hand():
    """Of 10 pairs 7 agree. Ann says first 6 times and second 4, Bob 5 and 5: chance .6 * .5 + .4 * .5 = .5."""
    said = [("first", "first")] * 4 + [("first", "second")] * 2 + [("second", "first")] + [("second", "second")] * 3
    found = agreement([{"ann": a, "bob": b} for a, b in said])
    assert found == (10, pytest.approx(0.7), pytest.approx(0.4), "cohen")


def test_fleiss_kappa_worked_by_hand():
    """Three labels each: (3, 0, 0), (2, 1, 0), (0, 3, 0), (1, 1, 1) agree in 1, 1/3, 1 and 0 of the draws. Of twelve
    labels 6 are first, 5 second, 1 a tie: chance (36 + 25 + 1) / 144."""
    rows: list[tuple[Preferred, ...]] = [
        ("first", "first", "first"),
        ("first", "second", "first"),
        ("second", "second", "second"),
        ("first", "tie", "second"),
    ]
    found = agreement([dict(zip(("ann", "bob", "eve"), row, strict=True)) for row in rows])
    share, chance = (1 + 1 / 3 + 1 + 0) / 4, 62 / 144
    assert found == (4, pytest.approx(share), pytest.approx((share - chance) / (1 - chance)), "fleiss")


def test_pairs_with_one_label_do_not_count_and_people_may_change():
    votes: list[dict[str, Preferred]] = [
        {"ann": "first", "bob": "first"},
        {"bob": "second", "eve": "first"},
        {"ann": "tie"},
        {},
    ]
    assert agreement(votes) == (2, 0.5, pytest.approx((0.5 - 10 / 16) / (1 - 10 / 16)), "fleiss")


def test_kappa_is_one_for_full_agreement_nothing_for_one_saying_and_near_zero_for_chance():
    full = agreement([{"ann": say, "bob": say} for say in ("first", "second", "tie", "first")])
    assert (full.share, full.kappa) == (1, 1)
    assert agreement([{"ann": "first", "bob": "first"}] * 5).kappa is None
    assert agreement([]) == (0, None, None, "fleiss")
    rng = random.Random(0)
    for people in (("ann", "bob"), ("ann", "bob", "eve")):
        drawn = agreement([{p: rng.choice(("first", "second", "tie")) for p in people} for _ in range(5000)])
        assert drawn.kappa == pytest.approx(0, abs=0.05)
        assert drawn.share == pytest.approx(1 / 3, abs=0.03)


def test_the_queue_tells_the_agreement_of_its_people(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock, labellers=2)
    queue.add(pairs(4))
    for person, sayings in (("ann", "ffss"), ("bob", "fsss")):
        for letter in sayings:
            say(queue, person, "first" if letter == "f" else "second")
    # 3 of 4 agree; chance .5 * .25 + .5 * .75.
    assert queue.agreement() == (4, 0.75, pytest.approx((0.75 - 0.5) / 0.5), "cohen")


# The terminal


class Terminal:
    """Keys to press, and what was shown."""

    def __init__(self, *keys: str) -> None:
        self._keys, self.shown = list(keys), ""

    def read(self, question: str) -> str:
        assert question == KEYS
        if not self._keys:
            raise EOFError
        return self._keys.pop(0)

    def write(self, text: str) -> None:
        self.shown += text + "\n"

    def label(self, queue: LabelQueue, person: str = "ann") -> str:
        label_in_terminal(queue, person, self.read, self.write)
        return self.shown


def test_keys_of_the_terminal_mean_the_responses_as_they_are_numbered(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock)
    queue.add(pairs(12))
    shown = Terminal(*("1", " 2\n", "T") * 4).label(queue)
    for candidate, answer, key in zip(pairs(12), queue.answers(), "12t" * 4, strict=True):
        at = shown.index(f"--- Prompt ---\n{candidate.prompt}\n")
        one = shown.index("--- 1 ---\n", at) + len("--- 1 ---\n")
        is_first_on_top = shown.startswith(f"{candidate.first}\n", one)
        assert shown.startswith(f"{candidate.first if is_first_on_top else candidate.second}\n\n--- 2 ---\n", one)
        expected = "tie" if key == "t" else "first" if (key == "1") == is_first_on_top else "second"
        assert answer.preferred == expected
    assert shown.endswith("There is nothing for you to label now.\n")
    assert "0 of 12 done, 1 in hand, 0 by you" in shown
    assert "11 of 12 done, 1 in hand, 11 by you" in shown


def test_the_terminal_skips_takes_back_asks_again_and_quits(queue: LabelQueue):
    one, other = (candidate.candidate_id for candidate in pairs(2))
    shown = Terminal("u", "x", "", "t", "u", "t", "q", "1").label(queue)
    assert "There is no label to take back" in shown
    assert queue.answers() == [Answer(one, "tie", "ann")]
    assert queue.progress().leased == 1, "quitting leaves the pair in hand"
    Terminal("s").label(queue)
    assert [answer.preferred for answer in queue.answers()] == ["tie", "none"]
    assert queue.answers()[1].candidate_id == other


def test_the_end_of_input_ends_labelling(queue: LabelQueue):
    Terminal("1").label(queue)
    assert queue.progress().done == 1


def test_a_text_cannot_play_with_the_terminal(tmp_path: Path, clock: Clock):
    queue = queue_at(tmp_path, clock)
    queue.add([Candidate.of("\x1b[2Jwipe\r", "tab\t\u00e9\u200d", "bell\x07")])
    shown = Terminal("q").label(queue)
    assert r"\x1b[2Jwipe\x0d" in shown
    assert "tab\t\u00e9\u200d" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
