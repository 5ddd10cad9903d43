"""The queue of pairs that people label: a log of events on local disk, which several processes may use at once.

Every change is a line of `events.jsonl`, written and synced under an exclusive lock before anyone is told of it; the
state is a fold over the lines. So a crash at any moment loses nothing but a change that was still being made. The
labelling page, the terminal and the acquiring driver each open the same folder.
"""

import dataclasses
import fcntl
import json
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dpo_ray.acquisition.answers import Agreement, Answer, Preferred, Side, agreement, most_votes, other, plain_text
from dpo_ray.acquisition.scores import uniform
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate, Text
from dpo_ray.storage import Folder, read_lines

LOG, LOCK = "events.jsonl", "lock"
SETTLE_S = 20.0
"""So long after its last label a pair's answer goes to the driver: until then the label can be taken back."""

Verdict = Literal["first", "second", "tie"]
Event = dict[str, Any]
"""A line of the log: `event`, `time` (seconds since 1970), and what happened to which pair by whom."""


class Label(NamedTuple):
    """What a person said, and which response stood on the left."""

    preferred: Verdict
    left: Side


@dataclasses.dataclass
class Entry:
    """All that happened to one pair."""

    candidate: Candidate
    given: set[str] = dataclasses.field(default_factory=set)
    """Who has seen it."""

    leases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Who holds it, and until when."""

    labels: dict[str, Label] = dataclasses.field(default_factory=dict)
    """By person, in the order of time."""

    skips: set[str] = dataclasses.field(default_factory=set)
    changed: float = 0.0
    """When somebody last labelled or skipped it."""

    answer: Answer | None = None
    """What the driver was given: nothing changes it any more."""

    def holders(self, now: float) -> list[str]:
        return [person for person, until in self.leases.items() if until > now]


@dataclasses.dataclass
class State:
    """What the log says."""

    labellers: int = 1
    lease_minutes: float = 15.0
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    """By candidate id, in the order in which they were added."""

    holding: dict[str, str] = dataclasses.field(default_factory=dict)
    """The pair that a person was given last and has not dealt with."""

    labelled: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The pairs that a person has labelled, the last one at the end."""

    def is_done(self, entry: Entry) -> bool:
        return entry.answer is not None or max(len(entry.labels), len(entry.skips)) >= self.labellers

    def has_room(self, entry: Entry, now: float) -> bool:
        """Whether it is with fewer people than labels are missing."""
        return len(entry.labels) + len(entry.holders(now)) < self.labellers

    def pair_for(self, person: str, now: float) -> tuple[str, bool] | None:
        """The pair that a person is to label, and whether they hold it already."""
        held = self.holding.get(person)
        if held is not None and self.entries[held].leases[person] > now and not self.is_done(self.entries[held]):
            return held, True
        for name, entry in self.entries.items():
            is_new = person not in entry.labels and person not in entry.skips
            if is_new and not self.is_done(entry) and self.has_room(entry, now):
                return name, False
        return None

    def answer(self, name: str) -> Answer:
        """Of a pair that is done: what most of the first `labellers` labels say; an even vote is a tie."""
        entry = self.entries[name]
        if entry.answer is not None:
            return entry.answer
        if len(entry.labels) < self.labellers:
            return Answer(name, "none", ", ".join(sorted(entry.skips)), note=f"skipped by {len(entry.skips)}")
        counted = list(entry.labels.items())[: self.labellers]
        votes: list[Preferred] = [label.preferred for _, label in counted]
        preferred, note = most_votes(votes)
        return Answer(name, preferred, ", ".join(person for person, _ in counted), note=note)


def fold(events: Iterable[Event]) -> State:
    """The state after some events."""
    state = State()
    for event in events:
        apply(state, event)
    return state


def apply(state: State, event: Event) -> None:
    """Change a state by one event."""
    if event["event"] == "settings":
        state.labellers, state.lease_minutes = event["labellers"], event["lease_minutes"]
        return
    name, person = event["candidate_id"], event.get("person", "")
    if event["event"] == "add":
        state.entries[name] = Entry(Candidate.from_record(event["candidate"]))
        return
    entry = state.entries[name]
    match event["event"]:
        case "lease":
            _hold(state, person, name, event["until"])
            entry.given.add(person)
        case "label":
            _let_go(state, person, name)
            entry.labels[person] = Label(event["preferred"], event["left"])
            entry.skips.discard(person)
            entry.changed = event["time"]
            state.labelled.setdefault(person, []).append(name)
        case "skip":
            _let_go(state, person, name)
            entry.skips.add(person)
            entry.changed = event["time"]
        case "undo":
            del entry.labels[person]
            state.labelled[person].remove(name)
            _hold(state, person, name, event["until"])
        case "answer":
            entry.answer = Answer(**event["answer"])


def _hold(state: State, person: str, name: str, until: float) -> None:
    """A person holds one pair at a time."""
    if person in state.holding:
        _let_go(state, person, state.holding[person])
    state.holding[person] = name
    state.entries[name].leases[person] = until


def _let_go(state: State, person: str, name: str) -> None:
    state.entries[name].leases.pop(person, None)
    if state.holding.get(person) == name:
        del state.holding[person]


class Task(NamedTuple):
    """A pair that a person is to label."""

    candidate: Candidate
    left: Side
    """The response to show on the left, or as number 1."""

    until: float
    """When the pair goes to somebody else, seconds since 1970."""

    @property
    def shown(self) -> tuple[Text, Text]:
        """The responses in the order of display."""
        sides = self.candidate.first, self.candidate.second
        return sides if self.left == "first" else sides[::-1]


class Progress(NamedTuple):
    """Pairs of the queue by where they are, and labels by person."""

    waiting: int
    leased: int
    done: int
    labels: dict[str, int]

    @property
    def total(self) -> int:
        return self.waiting + self.leased + self.done


class LabelQueue:
    """Pairs that wait for people.

    A pair is done when `labellers` people have labelled it, or when so many have skipped it, which makes it `none`;
    with one labeller the first skip does. Until then it is with no more people than labels are missing. Whoever labels
    a pair after the lease has ended is heard too: a label beyond the number needed counts for `agreement` only.

    Args:
        folder: A folder of its own, on local disk.
        labellers: People that label each pair; from now on for all that have the queue open.
        lease_minutes: So long a pair is kept for whoever took it.
        clock: Seconds since 1970; all processes must have the same.

    Raises:
        InputError: The folder is not local.
    """

    def __init__(
        self, folder: Folder, labellers: int, lease_minutes: float, clock: Callable[[], float] = time.time
    ) -> None:
        if not folder.is_local:
            raise InputError(f"people label in a folder on local disk, not in {folder.path}: set `storage.path` to one")
        self._folder, self._path = folder, Path(folder.path)
        self._clock = clock
        self._known: tuple[State, int] | None = None
        self._path.mkdir(parents=True, exist_ok=True)
        with self._locked() as state:
            if not (self._path / LOG).exists() or (state.labellers, state.lease_minutes) != (labellers, lease_minutes):
                self._append(self._event("settings", labellers=labellers, lease_minutes=lease_minutes))

    def add(self, candidates: Sequence[Candidate]) -> None:
        """Queue some candidates; those that are there already stay as they are."""
        with self._locked() as state:
            new = {c.candidate_id: c for c in candidates if c.candidate_id not in state.entries}
            self._append(*(self._event("add", candidate_id=name, candidate=c.record) for name, c in new.items()))

    def take(self, person: str) -> Task | None:
        """A pair for this person: the one in hand, else the first that needs somebody; None where there is none.

        Nobody gets a pair again that they labelled or skipped.
        """
        if not person.strip():
            raise InputError("whoever labels needs a name")
        with self._locked() as state:
            now = self._clock()
            found = state.pair_for(person, now)
            if found is None:
                return None
            name, is_held = found
            if not is_held:
                until = now + 60 * state.lease_minutes
                self._append(self._event("lease", candidate_id=name, person=person, until=until))
            entry = state.entries[name]
            return Task(entry.candidate, left_of(name, person), entry.leases[person])

    def label(self, person: str, candidate_id: str, preferred: Verdict) -> None:
        """Record what a person says. Saying it twice, as a double click does, is saying it once.

        Raises:
            InputError: The pair was never given to this person, or has another label of theirs.
        """
        if preferred not in get_args(Verdict):
            raise InputError(f"`{preferred}` is no label: it is one of {', '.join(get_args(Verdict))}")
        with self._locked() as state:
            entry = self._given(state, person, candidate_id)
            if person not in entry.labels:
                said = {"preferred": preferred, "left": left_of(candidate_id, person)}
                self._append(self._event("label", candidate_id=candidate_id, person=person, **said))
            elif entry.labels[person].preferred != preferred:
                raise InputError(f"{person} has labelled {candidate_id} otherwise: undo that first")

    def skip(self, person: str, candidate_id: str) -> None:
        """Leave a pair to others.

        Raises:
            InputError: The pair was never given to this person, or has a label of theirs.
        """
        with self._locked() as state:
            entry = self._given(state, person, candidate_id)
            if person in entry.labels:
                raise InputError(f"{person} has labelled {candidate_id}: undo that first")
            self._append(self._event("skip", candidate_id=candidate_id, person=person))

    def undo(self, person: str) -> str | None:
        """Take a person's last label back, and give them the pair again; the one in hand goes back to the queue.

        Returns:
            The candidate's id; None where there is no label, or the driver has used it.
        """
        with self._locked() as state:
            labelled = state.labelled.get(person)
            if not labelled or state.entries[labelled[-1]].answer is not None:
                return None
            name, now = labelled[-1], self._clock()
            entry = state.entries[name]
            # Others may hold it, where the label came after the end of the lease: then it stays with them.
            has_room = len(entry.labels) - 1 + len(entry.holders(now)) < state.labellers
            until = now + 60 * state.lease_minutes if has_room else now
            self._append(self._event("undo", candidate_id=name, person=person, until=until))
            return name

    def progress(self) -> Progress:
        with self._locked() as state:
            now = self._clock()
            done = sum(state.is_done(entry) for entry in state.entries.values())
            leased = sum(bool(e.holders(now)) and not state.is_done(e) for e in state.entries.values())
            counts = {person: len(names) for person, names in sorted(state.labelled.items()) if names}
            return Progress(len(state.entries) - leased - done, leased, done, counts)

    def answers(self) -> list[Answer]:
        """Of all pairs that are done; see `State.answer`."""
        with self._locked() as state:
            return [state.answer(name) for name, entry in state.entries.items() if state.is_done(entry)]

    def agreement(self) -> Agreement:
        """Over all pairs with at least two labels."""
        with self._locked() as state:
            entries = state.entries.values()
            return agreement([{p: label.preferred for p, label in entry.labels.items()} for entry in entries])

    def left_share(self) -> float | None:
        """How often the response on the left is preferred, ties left out: 0.5 without position bias."""
        with self._locked() as state:
            labels = [label for entry in state.entries.values() for label in entry.labels.values()]
            on_left = [label.preferred == label.left for label in labels if label.preferred != "tie"]
            return sum(on_left) / len(on_left) if on_left else None

    def wait(
        self,
        on_answer: Callable[[Answer], None],
        candidate_ids: Iterable[str],
        *,
        poll_s: float = 1.0,
        settle_s: float = SETTLE_S,
        should_stop: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Give each answer to `on_answer` once its last label is `settle_s` old, until all are there or `should_stop`
        says so. From then on it cannot change. A later call gives the same answers again."""
        missing = list(dict.fromkeys(candidate_ids))
        while missing:
            answers = self._settled(missing, settle_s)
            for answer in answers.values():
                on_answer(answer)
            missing = [name for name in missing if name not in answers]
            if missing:
                if should_stop():
                    return
                sleep(poll_s)

    def _settled(self, names: Sequence[str], settle_s: float) -> dict[str, Answer]:
        """Answers that stand, each written down as such before it is given away."""
        with self._locked() as state:
            now = self._clock()
            answers: dict[str, Answer] = {}
            for name in names:
                entry = self._entry(state, name)
                if state.is_done(entry) and (entry.answer is not None or now - entry.changed >= settle_s):
                    answers[name] = state.answer(name)
            new = [answer for name, answer in answers.items() if state.entries[name].answer is None]
            self._append(*(self._event("answer", candidate_id=a.candidate_id, answer=a._asdict()) for a in new))
            return answers

    def _entry(self, state: State, candidate_id: str) -> Entry:
        if candidate_id not in state.entries:
            raise InputError(f"{self._folder.path} has no pair {candidate_id}")
        return state.entries[candidate_id]

    def _given(self, state: State, person: str, candidate_id: str) -> Entry:
        entry = self._entry(state, candidate_id)
        if person not in entry.given:
            raise InputError(f"the pair {candidate_id} was not given to {person}")
        return entry

    def _event(self, event: str, **rest: Any) -> Event:
        return {"event": event, "time": self._clock()} | rest

    @contextmanager
    def _locked(self) -> Iterator[State]:
        """The state, which no one else can change meanwhile: neither a process nor a thread."""
        with (self._path / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._read()

    def _read(self) -> State:
        """The state after all whole lines of the log; those that are new since the last time are read."""
        state, end = self._known or (State(), 0)
        self._known = None  # should anything interrupt us halfway, the next one starts afresh
        file = self._path / LOG
        content = b""
        if file.exists():
            with file.open("rb") as log:
                log.seek(end)
                content = log.read()
        try:
            for event in read_lines(content):
                apply(state, event)
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}: a line is damaged: {error}") from None
        self._known = state, end + content.rfind(b"\n") + 1
        return state

    def _append(self, *events: Event) -> None:
        """Write events and sync them to disk, then change the state by them."""
        if not events:
            return
        for event in events:
            self._folder.append(LOG, json.dumps(event))
        with (self._path / LOG).open("rb") as log:
            os.fsync(log.fileno())
        self._read()


def open_queue(folder: Path, clock: Callable[[], float] = time.time) -> LabelQueue:
    """A queue that is there already, with the settings it has.

    Raises:
        InputError: There is none.
    """
    if not (folder / LOG).exists():
        raise InputError(f"{folder} holds no queue of pairs to label: it is the `queue` folder of an acquisition")
    settings = fold(read_lines((folder / LOG).read_bytes()))
    return LabelQueue(Folder(str(folder)), settings.labellers, settings.lease_minutes, clock)


def left_of(candidate_id: str, person: str) -> Side:
    """By a hash, so that neither the order of the pairs nor anyone's wish decides it."""
    return "first" if uniform(np.array([f"{candidate_id}\n{person}"]), 0, "left")[0] < 0.5 else "second"


KEYS = "1, 2, t (tie), s (skip), u (undo), q (quit): "


def label_in_terminal(
    queue: LabelQueue, person: str, read: Callable[[str], str] = input, write: Callable[[str], None] = print
) -> None:
    """Label pairs until there are none for this person, or they quit."""
    while (task := queue.take(person)) is not None:
        name, now = task.candidate.candidate_id, queue.progress()
        write(f"\n{now.done} of {now.total} done, {now.leased} in hand, {now.labels.get(person, 0)} by you")
        for heading, text in zip(("Prompt", "1", "2"), (task.candidate.prompt, *task.shown), strict=True):
            write(f"\n--- {heading} ---\n{_printable(plain_text(text))}")
        choices: dict[str, Verdict] = {"1": task.left, "2": other(task.left), "t": "tie"}
        match _key(read):
            case ("1" | "2" | "t") as key:
                queue.label(person, name, choices[key])
            case "s":
                queue.skip(person, name)
            case "u":
                if queue.undo(person) is None:
                    write("There is no label to take back, or it is in use already.")
            case _:
                return
    write("\nThere is nothing for you to label now.")


def _key(read: Callable[[str], str]) -> str:
    while True:
        try:
            key = read(KEYS).strip().lower()
        except EOFError:
            return "q"
        if key in {"1", "2", "t", "s", "u", "q"}:
            return key


def _printable(text: str) -> str:
    """Control characters in a model's text could write over the screen."""
    return "".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
