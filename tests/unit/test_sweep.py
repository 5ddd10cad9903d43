"""A study's own logic: what is planned, proposed, counted, ended, confirmed, and kept in `study.json`. No Ray runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.launch import Interrupt
from dpo_ray.prepare import resolve
from dpo_ray.space import Choice, Range, Space, Trial
from dpo_ray.storage import Folder
from dpo_ray.sweep import (
    Limits,
    Proposals,
    Search,
    StudyFile,
    best_of,
    confirmations,
    default_scheduler,
    default_search,
    plan,
    trial_recipe,
    winner,
)

BETAS = Space(
    "beta", {"loss.beta": [Choice(b, str(b)) for b in (0.1, 0.2, 0.5)]}, [0, 1], [("rewards/accuracies", "max")], ""
)
WIDE = BETAS._replace(settings={"loss.beta": Range("loguniform", 0.01, 1.0)}, seeds=[0])


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    tree = {"name": "run", "storage": {"path": str(tmp_path)}, "model": {"path": "none"}}
    return resolve(parse_run(tree | {"data": {"sources": [{"path": "none"}]}, "tracking": {"register_as": "ours"}}))


@pytest.fixture
def study(run: RunConfig, tmp_path: Path) -> StudyFile:
    return StudyFile(Folder(str(tmp_path / "study")), run, BETAS, Search(confirm=2, confirm_seeds=2), resume=False)


def finish(study: StudyFile, trial: Trial, value: float, status: str = "completed") -> dict[str, Any]:
    record = study.record(trial)
    record["evaluations"] = [{"step": 10, "rewards/accuracies": value}]
    record |= {"status": status, "best": record["evaluations"][0]}
    return record


def test_a_trial_has_a_folder_of_its_own_and_registers_nothing(run: RunConfig):
    trial = Trial(3, {"loss.beta": 0.5}, {}, 9)
    recipe = trial_recipe(run, Folder("/studies/a"), trial)
    assert (recipe.loss.beta, recipe.train.seed, recipe.tracking.register_as) == (0.5, 9, None)
    assert recipe.folder == f"/studies/a/trials/{trial.id}"
    assert recipe.reference.store == run.reference.store  # one store for all trials, and for other runs


def test_plans(run: RunConfig):
    assert len(plan(BETAS, Search()) or []) == 6
    assert len(plan(BETAS, Search(trials=4)) or []) == 4
    assert len(plan(WIDE, Search("random", trials=5)) or []) == 5
    assert plan(WIDE, Search("optuna", trials=5)) is None
    for how in (Search("random"), Search("optuna")):
        with pytest.raises(InputError, match="needs --trials"):
            plan(WIDE, how)
    with pytest.raises(InputError, match="one seed"):
        plan(BETAS, Search("optuna", trials=5))
    with pytest.raises(InputError, match="--search: one of grid, random, optuna, got 'tpe'"):
        Search("tpe")


def test_defaults_by_what_varies():
    data = BETAS._replace(settings={"data.fraction": [Choice(0.1, "0.1")]})
    assert (default_search(BETAS), default_search(WIDE)) == ("grid", "random")
    assert (default_scheduler(BETAS), default_scheduler(data)) == ("asha", "none")


def test_a_study_that_exists_is_continued_only_on_request(study: StudyFile, run: RunConfig):
    study.write()
    with pytest.raises(InputError, match=r"exists; continue it with --resume"):
        StudyFile(study.folder, run, BETAS, Search(), resume=False)
    other = BETAS._replace(objectives=[("kl", "min")])
    with pytest.raises(InputError, match="cannot resume: `objectives` was"):
        StudyFile(study.folder, run, other, Search(), resume=True)
    changed = run.model_copy(update={"train": run.train.model_copy(update={"epochs": 9})})
    with pytest.raises(InputError, match="cannot resume: `train` is not"):
        StudyFile(study.folder, changed, BETAS, Search(), resume=True)


def test_a_study_taken_up_again_knows_its_trials(study: StudyFile, run: RunConfig):
    trials = plan(BETAS, study.how) or []
    finish(study, trials[0], 0.6)
    study.record(trials[1])["status"] = "running"
    study.write()
    again = StudyFile(study.folder, run, BETAS, Search(), resume=True)
    assert [record["status"] for record in again.trials] == ["completed", "interrupted"]
    assert again.record(trials[0])["best"]["rewards/accuracies"] == 0.6
    assert json.loads(study.folder.read("study.json"))["trials"][1]["status"] == "running"


def test_finished_trials_are_proposed_with_what_they_gave(study: StudyFile):
    trials = plan(BETAS, study.how) or []
    finish(study, trials[0], 0.6, "stopped_by_scheduler")
    proposals = Proposals(study, trials)
    proposed = [proposals.suggest(str(number)) for number in range(7)]
    assert proposed.pop() == Proposals.FINISHED
    assert [Trial(**p["trial"]) for p in proposed if isinstance(p, dict)] == trials
    replays = [p["replay"] for p in proposed if isinstance(p, dict)]
    assert replays == [[{"step": 10, "rewards/accuracies": 0.6}], *[None] * 5]


def test_a_larger_grid_keeps_the_trials_that_were_there(study: StudyFile):
    finish(study, (plan(BETAS, study.how) or [])[2], 0.6)
    wider = BETAS._replace(settings={"loss.beta": [Choice(b, str(b)) for b in (0.01, 0.1, 0.2, 0.5)]})
    proposals, planned = Proposals(study, plan(wider, study.how)), plan(wider, study.how) or []
    proposed = [proposals.suggest(str(number)) for number in range(8)]
    replayed = [p["trial"] for p in proposed if isinstance(p, dict) and p["replay"]]
    assert [trial["settings"]["loss.beta"] for trial in replayed] == [0.5]
    assert sorted(record["number"] for record in study.trials) == list(range(len(planned)))


def test_optuna_goes_on_from_the_trials_that_were_there(run: RunConfig, tmp_path: Path):
    study = StudyFile(Folder(str(tmp_path / "study")), run, WIDE, Search("optuna", trials=9), resume=False)

    def go_on(number: int) -> list[Trial]:
        proposals, seen = Proposals(study, None), []
        for name in map(str, range(number)):
            proposed = proposals.suggest(name)
            assert isinstance(proposed, dict)
            trial = Trial(**proposed["trial"])
            finish(study, trial, 1 - trial.settings["loss.beta"])
            proposals.on_trial_complete(name, {"best/rewards/accuracies": 1 - trial.settings["loss.beta"]})
            seen.append(trial)
        return seen

    first = go_on(12)
    assert all(0.01 <= trial.settings["loss.beta"] <= 1 for trial in first)
    del study.trials[6:]  # as if the driver had been killed after six
    assert go_on(12)[:6] == first[:6]
    assert len({trial.id for trial in first}) == 12


def test_a_proposal_that_was_there_before_comes_with_another_seed(run: RunConfig, tmp_path: Path):
    space = BETAS._replace(settings={"loss.beta": [Choice(0.1, "0.1")]}, seeds=[5])
    study = StudyFile(Folder(str(tmp_path / "study")), run, space, Search("optuna", trials=3), resume=False)
    proposals = Proposals(study, None)
    proposed = [proposals.suggest(str(number)) for number in range(3)]
    assert [p["trial"]["seed"] for p in proposed if isinstance(p, dict)] == [5, 6, 7]


def test_budgets_and_interruption_end_a_study(study: StudyFile):
    interrupt = Interrupt()
    limits = Limits(study, interrupt)
    assert not limits.stop_all()
    study.how = Search(pairs=100)
    limits.pairs = {"a": 60, "b": 39}
    assert not limits.stop_all()
    limits.pairs["b"] = 40
    assert limits.stop_all()
    assert limits.reason == "the budget of 100 pairs is spent"
    study.how = Search(hours=1.0)
    study.began -= 3601
    assert limits.stop_all()
    assert limits.reason == "the budget of 1 hours is spent"
    interrupt.is_set = True
    assert limits.stop_all()
    assert limits.reason == "interrupted"


def test_a_plateau_counts_trials_since_the_best_one(study: StudyFile):
    study.how = Search(plateau=2)
    limits, trials = Limits(study, Interrupt()), plan(BETAS, study.how) or []
    for trial, value, ends in zip(trials, (0.5, 0.6, 0.55, 0.6), (False, False, False, True), strict=False):
        finish(study, trial, value)
        assert limits.stop_all() is ends


def test_the_best_of_equals_is_the_earlier_one():
    values = [{"step": 1, "kl": 0.2}, {"step": 2, "kl": 0.1}, {"step": 3, "kl": 0.1}, {"step": 4}]
    assert best_of(values, "kl", "min") == {"step": 2, "kl": 0.1}
    assert best_of(values, "kl", "max") == {"step": 1, "kl": 0.2}
    assert best_of([], "kl", "min") is None


def test_configurations_are_ranked_by_their_mean_and_the_best_confirmed_on_fresh_seeds(study: StudyFile):
    trials = plan(BETAS, study.how) or []
    for trial, value in zip(trials, (0.5, 0.9, 0.6, 0.7, 0.4, 0.8), strict=True):
        finish(study, trial, value)  # means: 0.1 -> 0.6, 0.2 -> 0.65, 0.5 -> 0.7
    assert winner(study) == study.record(trials[5])
    again = confirmations(study)
    assert [(t.settings["loss.beta"], t.seed) for t in again] == [(0.5, 2), (0.2, 2), (0.5, 3), (0.2, 3)]
    for trial, value in zip(again, (0.5, 0.7, 0.5, 0.6), strict=True):
        finish(study, trial, value)
    assert (winner(study) or {})["settings"] == {"loss.beta": 0.2}  # the luckier one of the search is not the winner
    assert [trial.key for trial in confirmations(study)] == [
        trial.key for trial in again
    ]  # a study that is taken up again confirms the same ones


def test_failed_trials_rank_nowhere(study: StudyFile):
    trials = plan(BETAS, study.how) or []
    finish(study, trials[0], 0.9, "failed")
    assert confirmations(study) == []
    assert winner(study) is None


def test_a_trial_takes_what_its_run_folder_says(study: StudyFile):
    record = study.record((plan(BETAS, study.how) or [])[0])
    folder = Folder(record["folder"])
    lines = [
        {"step": 1, "loss": 0.69, "rewards/accuracies": 0.5},
        {"step": 2, "eval/loss": 0.6, "eval/rewards/accuracies": 0.7},
        {"step": 2, "anomaly": {"name": "x", "evidence": "y", "advice": "z"}},
        {"step": 4, "eval/loss": 0.5, "eval/rewards/accuracies": 0.6},
    ]
    folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    folder.write_json("summary.json", {"steps": 4, "num_steps": 9, "pairs_seen": 32, "train_seconds": 1.5})
    folder.write_json("data_report.json", {"train": {"pairs": 80}})
    folder.write_json("held_out/step-000002.json", {"p": 0.25})
    study.complete(record)
    assert record["best"] == {"step": 2, "loss": 0.6, "rewards/accuracies": 0.7}
    assert [line["step"] for line in record["evaluations"]] == [2, 4]
    assert record["train"] == [{"step": 1, "loss": 0.69, "rewards/accuracies": 0.5}]
    assert (record["steps"], record["num_steps"], record["pairs_seen"], record["train_pairs"]) == (4, 9, 32, 80)
    assert record["margins"] == {"p": 0.25}
    assert yaml.safe_load(json.dumps(study.study))["trials"][0]["id"] == record["id"]
