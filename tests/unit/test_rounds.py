"""Rounds of one arm: what is chosen, asked and trained, and that a kill at any moment changes none of it.

Models and Ray are replaced (features by hashes, a training by its summary); oracle, files and order are the real ones.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_ray.acquisition import rounds
from dpo_ray.acquisition.answers import Answer
from dpo_ray.acquisition.features import Gathered
from dpo_ray.acquisition.pool import load_candidates
from dpo_ray.acquisition.rounds import Arm, Interrupted, Task, training_recipe
from dpo_ray.acquisition.scores import Features, uniform
from dpo_ray.config import parse_run
from dpo_ray.launch import Interrupt, RunResult, Silent
from dpo_ray.models import ModelSource
from dpo_ray.storage import Folder, read_lines

NUM_PAIRS = 30
TIMES_AND_PLACES = ("seconds", "sources")


class Killed(BaseException):
    """The process is gone."""


class EveryPair:
    """An encoder to which all pairs are one token each."""

    def encode(self, pairs: list[Any]) -> Any:
        return type("Part", (), {"pairs": [type("P", (), {"pair_id": pair.pair_id}) for pair in pairs]})


def task(folder: Path, **acquire: Any) -> Task:
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(NUM_PAIRS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = parse_run(
        {
            "name": "active",
            "storage": {"path": str(folder / "runs")},
            "model": {"path": "base"},
            "data": {"sources": [{"path": str(folder / "pairs.jsonl")}], "eval": {"num_pairs": 0}},
            "acquire": {"labels_per_round": 4, "budget": 12, **acquire},
        }
    )
    encoder: Any = EveryPair()
    return Task(run, load_candidates(run), encoder, Folder(run.folder), 0.0, {})


def features_of(policy: str, ids: list[str]) -> Features:
    """Log-probs that depend on the policy, so that later rounds choose otherwise."""
    names = np.array(sorted(ids))
    first, second = (-20 * uniform(names, 0, f"{policy.rpartition('/')[2]} {side}") for side in "ab")
    reference = np.full((len(names), 2), -10.0)
    policy_logps = reference if policy == "base" else np.stack([first, second], axis=1)
    return Features(
        names, names, np.full(len(names), "s"), policy_logps, reference, num_tokens=np.ones((len(names), 2))
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Replaces models and trainings; counts trainings by folder."""
    count: Counter[str] = Counter()

    def gather(encoded: Any, models: Any, *rest: Any, **options: Any) -> Gathered:
        return Gathered(features_of(models.policy.path, list(encoded.candidates)), {}, 0)

    def fit(run: Any, **options: Any) -> RunResult:
        folder = Folder(run.folder)
        count[run.name] += 1
        folder.write("recipe.yaml", b"name: x")
        pairs = len(list(read_lines(folder.read("pairs.jsonl"))))
        summary = {
            "status": "completed",
            "best_eval": {"rewards/accuracies": 0.5 + pairs / 100},
            "model_path": f"{run.folder}/model-{run.name}",
        }
        folder.write_json("summary.json", summary)
        return RunResult(folder.path, summary)

    monkeypatch.setattr(rounds, "gather", gather)
    monkeypatch.setattr(rounds.launch, "fit", fit)
    return count


def arm(task: Task, strategy: str = "certainty", seed: int = 0, interrupt: Interrupt | None = None) -> Arm:
    return Arm(task, strategy, seed, Silent(), interrupt or Interrupt())


def told(task: Task, strategy: str = "certainty") -> dict[str, Any]:
    """All that an arm decided, without times."""
    folder = task.folder / "seed-0" / strategy
    files = {name: folder.read(name).decode() for name in folder.names(recursive=True)}
    return {
        name: {k: v for k, v in json.loads(content.replace(task.folder.path, "")).items() if k not in TIMES_AND_PLACES}
        if name.endswith(".json")
        else [json.loads(line) for line in content.splitlines()]
        for name, content in files.items()
    }


def test_rounds_go_on_until_the_budget_is_spent(tmp_path: Path, trained: Counter[str]):
    one = arm(task(tmp_path))
    one.go()
    results = one.results()
    assert [(r["round"], r["asked"], r["trained_on"]) for r in results] == [(1, 4, 4), (2, 8, 8), (3, 12, 12)]
    assert one.stop_reason() == "budget"
    assert results[0]["undecided"], "the policy is the reference: the first round is random, and says so"
    assert results[0]["agreement"] is None
    assert not results[1]["undecided"]
    assert len(trained) == 3


def test_the_chosen_are_those_whose_implicit_margins_are_largest(tmp_path: Path, trained: Counter[str]):
    one = arm(task(tmp_path))
    one.go()
    second = one.folder / "round-02"
    chosen = second.read_json("choices.json")
    features = features_of(chosen["policy"], list(one.known))
    assert features.policy_logps is not None
    gaps = dict(zip(features.pair_id, features.policy_logps[:, 0] - features.policy_logps[:, 1], strict=True))
    first = {line["candidate_id"] for line in read_lines(one.folder.read("labels.jsonl")) if line["round"] == 1}
    expected = sorted((name for name in gaps if name not in first), key=lambda name: -abs(gaps[name]))[:4]
    assert [choice["candidate_id"] for choice in chosen["choices"]] == expected
    assert [choice["rank"] for choice in chosen["choices"]] == [1, 2, 3, 4]
    agrees = [gaps[name] * (one.known[name].gold_gap or 0) > 0 for name in expected]
    assert one.results()[1]["agreement"] == np.mean(agrees)


def test_each_round_is_trained_from_the_base_on_all_labels_or_goes_on_from_the_last(tmp_path: Path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    anew = training_recipe(task(tmp_path / "a"), rows, ModelSource("trained"), 3)
    assert (anew.model.path, anew.reference.path, anew.train.seed) == ("base", None, 3)
    on = training_recipe(task(tmp_path / "b", start_from="last"), rows, ModelSource("trained"), 3)
    assert (on.model.path, on.reference.path) == ("trained", "base")


def test_equal_labels_are_trained_once_whatever_chose_them(tmp_path: Path, trained: Counter[str]):
    shared = task(tmp_path, budget=8)
    for strategy in ("random", "certainty", "uncertainty"):
        arm(shared, strategy).go()
    firsts = [(shared.folder / "seed-0" / name / "round-01").read_json("round.json")["run"] for name in
              ("random", "certainty", "uncertainty")]  # fmt: skip
    assert len(set(firsts)) == 1, "all are random in the first round, with the same random numbers"
    assert set(trained.values()) == {1}
    assert len(trained) == 4


def test_a_run_is_named_by_all_that_decides_it(tmp_path: Path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    base = task(tmp_path)
    name = training_recipe(base, rows, ModelSource("base"), 0).name
    assert training_recipe(base, rows[::-1], ModelSource("base"), 0).name == name
    assert training_recipe(base, rows[:1], ModelSource("base"), 0).name != name
    assert training_recipe(base, rows, ModelSource("base"), 1).name != name
    other = base.run.model_copy(update={"train": base.run.train.model_copy(update={"epochs": 2.0})})
    assert training_recipe(base._replace(run=other), rows, ModelSource("base"), 0).name != name


STOPS: list[tuple[dict[str, Any], str, int]] = [
    ({"target": 0.57}, "target", 8),
    ({"patience": 1, "budget": 100}, "pool", NUM_PAIRS),
    ({"budget": 10}, "budget", 10),
]


@pytest.mark.parametrize(("settings", "reason", "asked"), STOPS)
def test_an_arm_stops_when_there_is_a_reason(
    tmp_path: Path, trained: Counter[str], settings: dict[str, Any], reason: str, asked: int
):
    one = arm(task(tmp_path, **settings))
    one.go()
    assert (one.stop_reason(), len(one.asked)) == (reason, asked)


def test_an_arm_that_gets_no_better_stops_after_its_patience(tmp_path: Path, trained: Counter[str]):
    one = arm(task(tmp_path, patience=2, budget=28))
    one.go()
    results = one.results()
    assert len(results) == 7
    for value, result in zip([0.6, 0.7, 0.65, 0.69, 0.8], results, strict=False):
        (one.folder / f"round-{result['round']:02d}").write_json("round.json", result | {"value": value})
    for name in ("round-05", "round-06", "round-07"):
        (one.folder / name).delete("round.json")
    assert one.stop_reason() == "plateau"


def test_ties_and_missing_answers_cost_a_label_and_teach_nothing(
    tmp_path: Path, trained: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    class Wavering:
        def ask(self, candidates: Any, on_answer: Callable[[Answer], None]) -> None:
            for candidate, said in zip(candidates, ("first", "tie", "none", "second"), strict=True):
                on_answer(Answer(candidate.candidate_id, said, "test", cost={"requests": 2}))  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "make_oracle", lambda *_, **__: Wavering())
    one = arm(task(tmp_path, budget=4))
    one.go()
    (result,) = one.results()
    assert (result["asked"], result["trained_on"]) == (4, 2)
    assert result["answers"] == {"first": 1, "tie": 1, "none": 1, "second": 1}
    assert result["cost"] == {"requests": 8}
    pairs = list(read_lines(Folder(result["run"]).read("pairs.jsonl")))
    assert len(pairs) == 2


def test_a_round_without_any_label_trains_nothing_and_goes_on(
    tmp_path: Path, trained: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    class Silence:
        def ask(self, candidates: Any, on_answer: Callable[[Answer], None]) -> None:
            for candidate in candidates:
                on_answer(Answer(candidate.candidate_id, "none", "test"))

    monkeypatch.setattr(rounds, "make_oracle", lambda *_, **__: Silence())
    one = arm(task(tmp_path))
    one.go()
    assert [result["value"] for result in one.results()] == [None] * 3
    assert not trained


def test_adpo_trains_on_its_own_labels_of_the_confident_rest(tmp_path: Path, trained: Counter[str]):
    one = arm(task(tmp_path, strategy="adpo", options={"threshold": 5.0, "beta": 1.0}, budget=8), "adpo")
    one.go()
    first, second = one.results()
    assert first["pseudo"] == 0
    assert second["pseudo"] > 0
    assert second["trained_on"] == 8 + second["pseudo"]
    chosen = (one.folder / "round-02").read_json("choices.json")
    assert not {choice["candidate_id"] for choice in chosen["choices"]} & set(chosen["pseudo"])


class KilledAt:
    """Ends the process in the middle of the so-manieth write: before it, within a line, or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, moment: str) -> None:
        self.count, self.number, self.moment = 0, number, moment
        self._write, self._append = Folder.write, Folder.append
        patch.setattr(Folder, "write", lambda folder, name, content: self._do(self._write, folder, name, content))
        patch.setattr(Folder, "append", lambda folder, name, line: self._do(self._append, folder, name, line))

    def _do(self, write: Any, folder: Folder, name: str, content: Any) -> None:
        self.count += 1
        if self.count == self.number:
            if self.moment == "within" and write is self._append:
                with (Path(folder.path) / name).open("a") as file:
                    file.write(content[: len(content) // 2])
            if self.moment == "after":
                write(folder, name, content)
            raise Killed
        write(folder, name, content)


def asked_by(task: Task, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts what the oracle is asked, over all starts."""
    found: list[str] = []
    real = rounds.make_oracle

    def make_oracle(*rest: Any, **options: Any) -> Any:
        inner = real(*rest, **options)

        class Counting:
            def ask(self, candidates: Any, on_answer: Any) -> None:
                def told(answer: Answer) -> None:
                    found.append(answer.candidate_id)
                    on_answer(answer)

                inner.ask(candidates, told)

        return Counting()

    monkeypatch.setattr(rounds, "make_oracle", make_oracle)
    return found


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_kill_at_any_write_changes_nothing_and_asks_no_label_twice(
    tmp_path: Path, trained: Counter[str], moment: str
):
    whole = task(tmp_path / "whole")
    arm(whole).go()
    expected = told(whole)
    number = 0
    while True:
        number += 1
        broken = task(tmp_path / f"{moment}-{number}")
        with pytest.MonkeyPatch.context() as patch:
            asked = asked_by(broken, patch)
            kill = KilledAt(patch, number, moment)
            try:
                arm(broken).go()
            except Killed:
                pass
            else:
                break
        with pytest.MonkeyPatch.context() as patch:
            again = asked_by(broken, patch)
            arm(broken).go()
        assert told(broken) == expected
        written_once = moment == "after"
        assert len(asked + again) <= 12 + (not written_once), "an answer that was not on disk yet is asked for again"
        if written_once:
            assert Counter(asked + again) == Counter(dict.fromkeys(asked + again, 1))
    assert number > 25
    assert kill.count < number


def test_an_interrupt_ends_the_arm_and_it_goes_on_with_the_same_choices(tmp_path: Path, trained: Counter[str]):
    whole, broken = task(tmp_path / "whole"), task(tmp_path / "broken")
    arm(whole).go()
    interrupt = Interrupt()
    stopped = arm(broken, interrupt=interrupt)
    stopped._display.progress = lambda text, done, total: setattr(interrupt, "is_set", done == 2)  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        stopped.go()
    assert len(stopped.asked) == 2
    arm(broken).go()
    assert told(broken) == told(whole)


def test_a_smaller_draw_of_the_pool_is_random_by_content(tmp_path: Path, trained: Counter[str]):
    one = arm(task(tmp_path, pool={"per_label": 2}, budget=4))
    one.go()
    chosen = (one.folder / "round-01").read_json("choices.json")
    assert chosen["stages"]["pool"] == 8
    other = arm(task(tmp_path / "other", pool={"per_label": 2}, budget=4), seed=1)
    other.go()
    assert set(one.asked) != set(other.asked)
