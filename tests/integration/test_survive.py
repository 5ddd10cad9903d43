"""One attempt at a time, steps left out, and the time that a signal leaves, on real runs."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import lease
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.launch import Interrupt, Silent, fit
from dpo_ray.prepare import prepare, resolve, step_order
from dpo_ray.storage import Folder

pytestmark = pytest.mark.ray

STEPS = 12


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survive")


def recipe(shared: Path, storage: Path, name: str, **overrides: Any) -> RunConfig:
    tree = {
        "name": name,
        "storage": {"path": str(storage)},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz")}],
            "max_tokens": 200,
            "num_pairs": 48,
            "eval": {"num_pairs": 8},
        },
        "batch": {"pairs_per_step": 4, "tokens_per_device": 2048},
        "optim": {"learning_rate": 3e-4},
        "train": {"log_every_steps": 1, "max_steps": STEPS},
        "engine": {"precision": "fp32", "zero_stage": 2},
        "early_stopping": None,
        "tracking": {"kind": "none"},
    }
    return parse_run(tree, {key.replace("__", "."): value for key, value in overrides.items()})


def lines(run: RunConfig, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.folder) / name).read_text().splitlines()]


class At(Silent):
    """Calls once, when the line of a step is seen."""

    def __init__(self, step: int, call: Any) -> None:
        self._step, self._call = step, call

    def line(self, line: Any) -> None:
        if line["step"] >= self._step and self._call is not None:
            call, self._call = self._call, None
            call()


def test_a_second_attempt_is_told_who_holds_the_run(cluster: None, shared: Path, storage: Path):
    run, refused = recipe(shared, storage, "held"), []

    def again() -> None:
        with pytest.raises(InputError, match=r"is held by process \d+ on .*, which is at work on it"):
            fit(run, resume=True)
        refused.append(True)

    assert fit(run, display=At(2, again)).summary["status"] == "completed"
    assert refused
    assert not (Path(run.folder) / lease.LEASE_FILE).exists()


def test_an_attempt_whose_run_was_taken_over_stops_and_writes_nothing_more(
    cluster: None, shared: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    run = recipe(shared, storage, "taken", train__max_steps=3000, train__epochs=300)
    successor = dataclasses.replace(lease.myself(), host="node-7")

    def take() -> None:
        Folder(run.folder).write_json(lease.LEASE_FILE, dataclasses.asdict(successor))

    with pytest.raises(RunFailed, match=r"process \d+ on node-7 has taken the run"):
        fit(run, display=At(2, take))
    assert lease.holds(Folder(run.folder), successor.token)
    assert not (Path(run.folder) / "summary.json").exists()
    reached = lines(run, "metrics.jsonl")[-1]["step"]
    end = time.monotonic() + 60
    while lines(run, "metrics.jsonl")[-1]["step"] > reached or time.monotonic() < end - 50:  # its workers notice in 5 s
        reached = lines(run, "metrics.jsonl")[-1]["step"]
        time.sleep(2)
        assert time.monotonic() < end, "the workers of the old attempt still write"
    assert reached < 3000


def test_a_step_that_is_not_finite_is_left_out_and_its_pairs_are_named(cluster: None, shared: Path, storage: Path):
    """The stored reference of one pair is not a number; every step has it once per epoch."""
    from dpo_ray.reference import ReferenceStore, response_key

    good = recipe(shared, storage, "good", train__max_steps=1)
    fingerprint = fit(good).summary["reference_fingerprint"]
    run = resolve(recipe(shared, storage, "skip", train__on_non_finite="skip", reference__store=str(storage / "nan")))
    prepared = prepare(run)
    pairs = [*prepared.train_pairs, *prepared.held_out_pairs]
    right = ReferenceStore(str(resolve(good).reference.store), fingerprint, "fp32")
    values = right.read({response_key(p.prompt_ids, r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)})
    order = step_order(run, prepared.train.num_pairs)
    bad = prepared.train_pairs[order.pairs_of(5)[0]]
    key = response_key(bad.prompt_ids, bad.rejected_ids)
    values[key] = values[key]._replace(logps=float("nan"))
    ReferenceStore(str(storage / "nan"), fingerprint, "fp32").write(values)

    summary = fit(run).summary
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("completed", STEPS, 1)
    (told,) = lines(run, "bad_steps.jsonl")
    assert (told["step"], told["not_finite"]) == (5, "loss")
    assert bad.pair_id in told["pair_ids"]
    logged = [line for line in lines(run, "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, *range(6, STEPS + 1)]
    assert all(line["loss"] < 10 for line in logged)

    stops = recipe(shared, storage, "stops", reference__store=str(storage / "nan"))
    with pytest.raises(RunFailed, match=r"the loss of step 5 is not finite; its pairs are in .*bad_steps\.jsonl"):
        fit(stops)
    assert [event["kind"] for event in lines(stops, "attempts.jsonl")] == ["start"]  # not retried


def test_a_signal_that_finds_no_worker_ends_within_its_time(cluster: None, shared: Path, storage: Path):
    """Interrupted before the workers have started, with less time than they need."""
    run, interrupt = recipe(shared, storage, "hurry", checkpoint__stop_seconds=1.0), Interrupt()

    class AsTrainingStarts(Silent):
        def phase(self, text: str) -> None:
            interrupt.is_set |= text.startswith("training")

    began = time.monotonic()
    summary = fit(run, display=AsTrainingStarts(), interrupt=interrupt).summary
    assert summary["status"] == "interrupted"
    assert "no checkpoint within 1 s" in summary["stop_reason"]
    assert time.monotonic() - began < 60
    time.sleep(15)  # the workers that were on their way find the run in no one's hands
    assert fit(run, resume=True).summary["status"] == "completed"
    assert threading.active_count() < 100


def test_checkpoints_come_by_the_clock_too(cluster: None, shared: Path, storage: Path):
    run = recipe(shared, storage, "clock", checkpoint__every_steps=1000, checkpoint__every_minutes=0.001)
    summary = fit(run).summary
    assert 0 < summary["checkpoint_share"] < 1
    assert len(list((Path(run.folder) / "checkpoints").glob("step-*"))) >= 2
