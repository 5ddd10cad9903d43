"""Preferences: what is kept can be trained on, nothing is lost or counted twice, and blind is blind."""

import json
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.config import SourceConfig
from dpo_ray.data.formats import to_pairs
from dpo_ray.data.sources import read_rows
from dpo_ray.errors import InputError
from dpo_ray.pairs import PreferencePair
from serve.compare import (
    FILE,
    MAX_CHARACTERS,
    SECRET,
    CompareRequest,
    PreferenceRequest,
    PreferenceStore,
    VoteRequest,
    load_secret,
    sides,
)
from serve.schema import ApiError, read

CONTEXT = multiprocessing.get_context("fork")
TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]


def preference(prompt: Any = "2 + 2?", preferred: str = "first", **rest: Any) -> PreferenceRequest:
    tree = {
        "prompt": prompt,
        "first": {"text": "four", "model": "base"},
        "second": {"text": "five", "model": "aligned"},
        "preferred": preferred,
    }
    return PreferenceRequest.model_validate(tree | rest)


def vote(comparison: str = "abcd-1234", preferred: str = "left", **rest: Any) -> VoteRequest:
    tree = {"comparison": comparison, "messages": TURNS, "left": "Hi.", "right": "No.", "preferred": preferred}
    return VoteRequest.model_validate(tree | rest)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def learnt(folder: Path) -> tuple[list[PreferencePair], int]:
    """The pairs and the number of ties that `data: {sources: [{path: FOLDER}]}` gives."""
    source = SourceConfig(path=str(folder))
    parsed = [to_pairs(row, source) for row in read_rows(source)]
    return [pair for item in parsed for pair in item.pairs], sum(item.ties for item in parsed)


# The store


def test_a_row_says_what_was_preferred_by_whom_and_when(tmp_path: Path):
    store = PreferenceStore(str(tmp_path), clock=lambda: 12.5)
    name = store.add(preference(comment="clear"), by="ada")
    assert rows(tmp_path) == [
        {
            "id": name,
            "time": 12.5,
            "prompt": "2 + 2?",
            "response_1": "four",
            "response_2": "five",
            "label": 1,
            "model_1": "base",
            "model_2": "aligned",
            "by": "ada",
            "is_blind": False,
            "comment": "clear",
        }
    ]
    assert len(name) == 32
    other = store.add(preference(), by=None)
    assert (rows(tmp_path)[1]["by"], "comment" in rows(tmp_path)[1]) == (None, False)
    assert other != name


@pytest.mark.parametrize(("preferred", "chosen"), [("first", "four"), ("second", "five")])
def test_text_is_trained_on_as_it_is(tmp_path: Path, preferred: str, chosen: str):
    PreferenceStore(str(tmp_path)).add(preference(preferred=preferred), by=None)
    (pair,), ties = learnt(tmp_path)
    assert (pair.prompt, pair.chosen, {pair.chosen, pair.rejected}, ties) == ("2 + 2?", chosen, {"four", "five"}, 0)


@pytest.mark.parametrize(("preferred", "chosen"), [("first", "four"), ("second", "five")])
def test_messages_are_trained_on_as_turns(tmp_path: Path, preferred: str, chosen: str):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
    prompt = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts, "name": "ada"}]
    PreferenceStore(str(tmp_path)).add(preference(prompt, preferred), by=None)
    (pair,), _ = learnt(tmp_path)
    assert pair.prompt == (TURNS[0], TURNS[1] | {"name": "ada"})
    assert pair.chosen == ({"role": "assistant", "content": chosen},)
    assert pair.rejected == ({"role": "assistant", "content": "five" if chosen == "four" else "four"},)


def test_a_transcript_is_trained_on_as_turns(tmp_path: Path):
    PreferenceStore(str(tmp_path)).add(preference("\n\nHuman: Hi\n\nAssistant:"), by=None)
    (pair,), _ = learnt(tmp_path)
    assert pair.prompt == ({"role": "user", "content": "Hi"},)
    assert pair.chosen == ({"role": "assistant", "content": "four"},)


def test_a_tie_is_kept_and_counted_and_no_pair(tmp_path: Path):
    store = PreferenceStore(str(tmp_path))
    for prompt in ("2 + 2?", TURNS):
        store.add(preference(prompt, "tie"), by=None)
    assert learnt(tmp_path) == ([], 2)


words = st.text(st.characters(codec="utf-8"), max_size=40)
turns = st.fixed_dictionaries({"role": st.sampled_from(("system", "developer", "user", "assistant")), "content": words})


@settings(max_examples=60, deadline=None)
@given(
    prompt=words | st.lists(turns, min_size=1, max_size=4),
    first=words,
    second=words,
    preferred=st.sampled_from(("first", "second", "tie")),
)
def test_whatever_is_kept_can_be_trained_on(
    prompt: Any, first: str, second: str, preferred: str, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("preferences")
    answers = {"first": {"text": first, "model": "a"}, "second": {"text": second, "model": "b"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        PreferenceStore(str(folder)).add(preference(prompt, preferred, **answers), by=None)
    pairs, ties = learnt(folder)
    assert (len(pairs), ties) == ((0, 1) if preferred == "tie" else (1, 0))
    if isinstance(prompt, str) and pairs:
        expected = (first, second) if preferred == "first" else (second, first)
        assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == (prompt, *expected)


def test_what_could_not_be_trained_on_is_refused(tmp_path: Path):
    store = PreferenceStore(str(tmp_path))
    answers = {"first": {"text": "\n\nHuman: ", "model": "a"}, "second": {"text": "", "model": "b"}}
    with pytest.raises(InputError, match="learnt"):
        store.add(preference("\n\nHuman: Hi\n\nAssistant:", **answers), by=None)
    assert rows(tmp_path) == []


def test_a_row_cut_short_by_a_crash_harms_no_other(tmp_path: Path):
    store = PreferenceStore(str(tmp_path))
    first = store.add(preference(), by=None)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"id": "ha')
    second = store.add(preference(), by=None)
    assert [row["id"] for row in rows(tmp_path)] == [first, second]


def test_a_row_is_on_disk_before_anyone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = PreferenceStore(str(tmp_path))
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / FILE).read_bytes()))
    name = store.add(preference(), by=None)
    assert name.encode() in synced[-1]


def _add_many(folder: Path, person: str, together: Any, told: Any) -> None:
    store = PreferenceStore(str(folder))
    together.wait()
    told.send([store.add(preference(f"{person} {i} " + "x" * 9000), by=person) for i in range(20)])


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    together = CONTEXT.Barrier(3)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(3)]
    processes = [
        CONTEXT.Process(target=_add_many, args=(tmp_path, f"person-{i}", together, sender))
        for i, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    told = [name for receiver, _ in pipes for name in receiver.recv()]
    for process in processes:
        process.join()
    assert sorted(row["id"] for row in rows(tmp_path)) == sorted(told)
    assert len(set(told)) == 60


@pytest.mark.parametrize("make", [PreferenceStore, load_secret])
def test_the_folder_is_on_local_disk_and_writable(tmp_path: Path, make: Callable[[str], Any]):
    with pytest.raises(InputError, match="local disk, not in s3://bucket/preferences"):
        make("s3://bucket/preferences")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make(str(tmp_path / "file" / "preferences"))


# Blind comparisons


def test_a_vote_names_the_models_as_they_stood(tmp_path: Path):
    store = PreferenceStore(str(tmp_path))
    said = vote(preferred="right")
    store.add(said.named(("aligned", "base")), by=None, comparison=said.comparison)
    (row,) = rows(tmp_path)
    assert (row["response_1"], row["model_1"], row["response_2"], row["model_2"]) == ("Hi.", "aligned", "No.", "base")
    assert (row["label"], row["is_blind"], row["comparison"], row["prompt"]) == (2, True, "abcd-1234", TURNS)
    (pair,), _ = learnt(tmp_path)
    assert pair.chosen == ({"role": "assistant", "content": "No."},)


@pytest.mark.parametrize(("preferred", "label"), [("left", 1), ("right", 2), ("tie", "tie")])
def test_sides_of_a_vote_are_the_responses_in_their_order(tmp_path: Path, preferred: str, label: Any):
    PreferenceStore(str(tmp_path)).add(vote(preferred=preferred).named(("a", "b")), by=None, comparison="abcd-1234")
    assert rows(tmp_path)[0]["label"] == label


def test_a_comparison_has_one_vote_whichever_process_took_it(tmp_path: Path):
    one, other = PreferenceStore(str(tmp_path)), PreferenceStore(str(tmp_path))

    def say(store: PreferenceStore, **rest: Any) -> str:
        said = vote(**rest)
        return store.add(said.named(("a", "b")), by=None, comparison=said.comparison)

    first = say(one)
    assert say(other) == first
    for changed in ({"preferred": "right"}, {"left": "Something better."}):
        with pytest.raises(InputError, match="abcd-1234 has another vote"):
            say(other, **changed)
    assert say(one, comparison="abcd-12345") != first
    assert len(rows(tmp_path)) == 2


def test_the_same_vote_of_many_threads_is_one_vote(tmp_path: Path):
    store, together, told = PreferenceStore(str(tmp_path)), threading.Barrier(8), []

    def say() -> None:
        together.wait()
        told.append(store.add(vote().named(("a", "b")), by=None, comparison="abcd-1234"))

    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["id"] for row in rows(tmp_path)] == list({*told})
    assert len(told) == 8


def test_sides_are_even_and_every_replica_agrees():
    secret, models = b"s" * 32, ("base", "aligned")
    shown = [sides(secret, f"comparison-{i}", models) for i in range(2000)]
    assert shown == [sides(secret, f"comparison-{i}", models) for i in range(2000)]
    assert {tuple(sorted(pair)) for pair in shown} == {("aligned", "base")}
    assert 900 < shown.count(models) < 1100  # 4.5 standard deviations


def test_nobody_knows_the_sides_without_the_secret():
    models = ("base", "aligned")
    one, other = ([sides(secret, f"comparison-{i}", models) for i in range(2000)] for secret in (b"s" * 32, b"t" * 32))
    assert 900 < sum(a == b for a, b in zip(one, other, strict=True)) < 1100


def test_the_secret_is_made_once_and_for_its_owner_only(tmp_path: Path):
    secret = load_secret(str(tmp_path / "new"))
    assert len(secret) == 32
    assert load_secret(str(tmp_path / "new")) == secret != load_secret(str(tmp_path / "other"))
    assert stat.S_IMODE((tmp_path / "new" / SECRET).stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "new") == [SECRET]


def test_two_that_make_the_secret_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other one comes between our look and our link."""
    link, others = os.link, []

    def late(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(load_secret(str(tmp_path)))
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    secret = load_secret(str(tmp_path))
    assert others == [secret]
    assert os.listdir(tmp_path) == [SECRET]


def test_a_damaged_secret_is_named(tmp_path: Path):
    (tmp_path / SECRET).write_bytes(b"short")
    with pytest.raises(InputError, match=r"\.secret is damaged"):
        load_secret(str(tmp_path))


def test_the_secret_is_no_data_to_train_on(tmp_path: Path):
    PreferenceStore(str(tmp_path)).add(preference(), by=None)
    load_secret(str(tmp_path))
    assert len(learnt(tmp_path)[0]) == 1


# Requests


def refused(kind: Any, **tree: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(kind, json.dumps(tree).encode())
    return caught.value


GOOD = {"comparison": "0f8fad5b-d9cb-469f-a165-70867728950e", "side": "left", "messages": TURNS}


def test_a_request_to_compare_has_defaults():
    request = read(CompareRequest, json.dumps(GOOD).encode())
    assert (request.max_tokens, request.temperature, request.messages[1].text) == (None, 1.0, "Hello?")
    assert read(CompareRequest, json.dumps(GOOD | {"temperature": 0}).encode()).temperature == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"comparison": "short"}, "comparison"),
        ({"comparison": "x" * 65}, "comparison"),
        ({"comparison": "../../etc/passwd"}, "comparison"),
        ({"comparison": "abcdefgh\n"}, "comparison"),
        ({"side": "middle"}, "side"),
        ({"messages": []}, "messages"),
        ({"messages": [TURNS[0]] * 501}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_CHARACTERS // 2 + 1)}] * 2}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"model": "base"}, "model"),
    ],
)
def test_a_wrong_request_is_named_by_its_parameter(change: dict[str, Any], param: str):
    error = refused(CompareRequest, **GOOD | change)
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"first": {"text": "a", "model": ""}}, "first.model"),
        ({"first": {"text": "x" * (MAX_CHARACTERS + 1), "model": "a"}}, "first.text"),
        ({"preferred": "left"}, "preferred"),
        ({"comment": "x" * 2001}, "comment"),
        ({"by": "eve"}, "by"),
    ],
)
def test_a_wrong_preference_is_named_by_its_parameter(change: dict[str, Any], param: str):
    error = refused(PreferenceRequest, **preference().model_dump() | change)
    assert (error.status, error.param) == (400, param)
