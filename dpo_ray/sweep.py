"""A study: Ray Tune proposes and stops trials, each a whole `launch.fit` with its own workers.

A trial is a run folder below `trials/`; `study.json` says what was tried and how it went, and is all that a study needs
to be taken up again: finished trials are then told to the search and the scheduler as they went, and never run again.
Tune's own state is not used for that: it is a pickle, and bound to one cluster.
"""

import dataclasses
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray
import yaml
from ray import tune

from dpo_ray import lease
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.launch import SUMMARY_FILE, Display, Interrupt, Silent, check_cluster, fit, write_model
from dpo_ray.lineage import lineage
from dpo_ray.losses import loss_function
from dpo_ray.prepare import Prepared, check_recipe, prepare, reference_source, resolve
from dpo_ray.reference import fill
from dpo_ray.space import Range, Space, Trial, at_random, extremes, grid, label_of
from dpo_ray.storage import Folder, read_lines
from dpo_ray.study import FINISHED as WITH_RESULT
from dpo_ray.study import confirmation_standing, read_study, search_standing
from dpo_ray.study_report import write_study_report
from dpo_ray.train import METRICS_FILE, margins_file

logger = logging.getLogger(__name__)

STUDY_FILE, BEST_FILE = "study.json", "best.yaml"
NO_RESOURCES = {"memory": 1}
"""A trial itself only waits for its workers, who reserve what they need; a whole CPU for it could starve them. Ray does
not take an empty request, so it asks for one byte."""
READ = {"data", "model", "reference", "engine", "loss"}
"""Sections that decide which reference log-probs a trial reads."""
TRIALS_CHECKED = 50
"""Where Optuna will propose the trials, so many random ones are checked beforehand."""
SEARCHES, SCHEDULERS = ("grid", "random", "optuna"), ("asha", "median", "none")
FINISHED = (*WITH_RESULT, "failed")
"""States of a trial that will not run again."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How a study looks for its answer."""

    search: str = "grid"
    """`grid`, `random` or `optuna`."""
    scheduler: str = "asha"
    """`asha`, `median` or `none`: which trials are broken off."""
    grace_steps: int | None = None
    """No trial is broken off before; None: two evaluations."""
    reduction: int = 4
    """ASHA lets one of so many trials pass each rung."""
    trials: int | None = None
    """At most so many; required for random and optuna."""
    hours: float | None = None
    pairs: int | None = None
    """Pairs trained on, over all trials."""
    plateau: int | None = None
    """End after so many finished trials in a row without a better one."""
    confirm: int = 0
    """Run the best so many configurations again, on fresh seeds."""
    confirm_seeds: int = 3
    max_concurrent: int | None = None
    """Trials at a time; None: as many as the cluster has room for."""
    max_retries: int = 1
    """Of a failed trial."""
    random_seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("search", SEARCHES), ("scheduler", SCHEDULERS)):
            if getattr(self, name) not in known:
                raise InputError(f"--{name}: one of {', '.join(known)}, got {getattr(self, name)!r}")


class StudyDisplay(Display, Protocol):
    """Where a study shows how it goes."""

    def trials(self, records: Sequence[Mapping[str, Any]], total: int | None, metric: str, mode: str) -> None: ...


class SilentStudy(Silent):
    def trials(self, records: Sequence[Mapping[str, Any]], total: int | None, metric: str, mode: str) -> None:
        pass


def sweep(
    run: RunConfig,
    space: Space,
    how: Search,
    *,
    name: str | None = None,
    resume: bool = False,
    display: StudyDisplay | None = None,
    interrupt: Interrupt | None = None,
    connect: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run a study, or take it up again; what `study.json` says at the end.

    Args:
        run: The recipe that trials vary.
        name: Of the study's folder below `storage.path`; None: the recipe's and the space's.

    Raises:
        InputError: The recipe, the space, the data or the cluster does not allow it.
        RunFailed: Every trial failed.
    """
    display, interrupt = display or SilentStudy(), interrupt or Interrupt()
    run = tracked(resolve(run))
    folder = Folder(f"{run.storage.path}/{name or f'{run.name}-{space.name}'}")
    folder.check_writable()
    planned = plan(space, how)
    for trial in planned or at_random(space, TRIALS_CHECKED):
        check_recipe(trial_recipe(run, folder, trial))
    with lease.acquire(folder, display.phase):
        study = StudyFile(folder, run, space, how, resume)
        connect()
        with _quiet_tune():
            return _sweep(study, planned, display, interrupt)


def plan(space: Space, how: Search) -> list[Trial] | None:
    """The trials of a study; None where each depends on those before.

    Raises:
        InputError: The search does not suit the space, or has no end.
    """
    if how.search == "grid":
        return grid(space)[: how.trials]
    if how.trials is None:
        raise InputError(f"--search {how.search} needs --trials")
    if how.search == "random":
        return at_random(space, -(-how.trials // len(space.seeds)), how.random_seed)[: how.trials]
    if len(space.seeds) > 1:
        raise InputError("optuna proposes single trials: take one seed, and --confirm for fresh ones")
    return None


def default_search(space: Space) -> str:
    return "random" if any(isinstance(values, Range) for values in space.settings.values()) else "grid"


def default_scheduler(space: Space) -> str:
    """None where the data vary: a small set that is judged early would lose its point of the learning curve."""
    return "none" if any(key.startswith("data.") for key in space.settings) or not space.settings else "asha"


def trial_recipe(run: RunConfig, folder: Folder, trial: Trial) -> RunConfig:
    """The recipe of a trial: the study's with the trial's settings, in a run folder of its own."""
    tree = run.model_dump(mode="json")
    overrides = dict(trial.overrides) | {"name": trial.id, "storage.path": f"{folder.path}/trials"}
    overrides["tracking.register_as"] = None
    return resolve(parse_run(tree, overrides))


class StudyFile:
    """`study.json`: what was planned, tried and found. The study's driver is its only writer."""

    def __init__(self, folder: Folder, run: RunConfig, space: Space, how: Search, resume: bool) -> None:
        self.folder, self.run, self.space, self.how = folder, run, space, how
        self.began = time.time()
        self.study: dict[str, Any] = {
            "name": folder.path.rpartition("/")[2],
            "space": space.name,
            "question": space.question,
            "status": "running",
            "stop_reason": None,
            "objectives": [{"metric": metric, "mode": mode} for metric, mode in space.objectives],
            "search": how.search,
            "scheduler": how.scheduler,
            "varied": [*space.settings, *(["train.seed"] if len(space.seeds) > 1 else [])],
            "reference": {"computed": 0, "from_store": 0},
            "seconds": 0.0,
            "mlflow_run_id": None,
            "recipe": run.model_dump(mode="json"),
            "trials": [],
        }
        if folder.exists(STUDY_FILE):
            if not resume:
                raise InputError(f"the study {folder.path} exists; continue it with --resume, or choose another --name")
            self._take_up(folder.read_json(STUDY_FILE))

    def _take_up(self, before: dict[str, Any]) -> None:
        for key in ("space", "objectives", "search", "scheduler", "varied"):
            if before[key] != self.study[key]:
                raise InputError(f"cannot resume: `{key}` was {before[key]!r} and is now {self.study[key]!r}")
        for section, value in self.study["recipe"].items():
            if section not in ("cluster", "tracking", "checkpoint") and before["recipe"].get(section) != value:
                raise InputError(f"cannot resume: `{section}` is not what the study was started with")
        self.study |= {key: before[key] for key in ("reference", "seconds", "mlflow_run_id", "trials")}
        for record in self.trials:
            if record["status"] not in FINISHED:
                record["status"] = "interrupted"
        self.began -= before["seconds"]

    @property
    def trials(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.study["trials"]
        return found

    @property
    def main(self) -> tuple[str, str]:
        """The metric that ranks, and its mode."""
        return self.space.objectives[0]

    def record(self, trial: Trial) -> dict[str, Any]:
        """The entry of a trial, made under the next number if there is none."""
        for record in self.trials:
            if trial_of(record).key == trial.key:
                return record
        trial = trial._replace(number=max((record["number"] for record in self.trials), default=-1) + 1)
        new: dict[str, Any] = {
            "id": trial.id,
            "number": trial.number,
            "settings": trial.settings,
            "labels": trial.labels,
            "seed": trial.seed,
            "status": "waiting",
            "stop_reason": None,
            "error": None,
            "attempts": 0,
            "confirms": trial.confirms,
            "steps": 0,
            "num_steps": 0,
            "pairs_seen": 0,
            "train_pairs": 0,
            "train_seconds": 0.0,
            "folder": f"{self.folder.path}/trials/{trial.id}",
            "best": None,
            "evaluations": [],
            "train": [],
            "margins": None,
        }
        self.trials.append(new)
        return new

    def write(self) -> None:
        self.study["seconds"] = round(time.time() - self.began, 1)
        self.folder.write_json(STUDY_FILE, self.study)

    def complete(self, record: dict[str, Any]) -> None:
        """Take what the run folder of a trial says into its entry."""
        folder = Folder(record["folder"])
        lines = list(read_lines(folder.read(METRICS_FILE))) if folder.exists(METRICS_FILE) else []
        record["evaluations"] = [_metrics(line, "eval/") for line in lines if "eval/loss" in line]
        train = [{"step": line["step"], **_metrics(line, "")} for line in lines if "loss" in line]
        names = ("step", "loss", "rewards/accuracies")
        record["train"] = [{name: line[name] for name in names if name in line} for line in train]
        record["best"] = best_of(record["evaluations"], *self.main)
        if record["best"] is not None and folder.exists(margins_file(record["best"]["step"])):
            record["margins"] = folder.read_json(margins_file(record["best"]["step"]))
        if folder.exists(SUMMARY_FILE):
            summary = folder.read_json(SUMMARY_FILE)
            for name in ("steps", "num_steps", "pairs_seen", "train_seconds"):
                record[name] = summary.get(name, record[name])
            record["train_pairs"] = _train_pairs(folder)


def best_of(evaluations: Sequence[Mapping[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The best evaluation of a trial, the earlier of equals."""
    sign = 1 if mode == "max" else -1
    seen = [evaluation for evaluation in evaluations if metric in evaluation]
    return dict(max(seen, key=lambda e: (sign * e[metric], -e["step"]))) if seen else None


def _metrics(line: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    own = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    return {"step": line["step"], **own}


def _train_pairs(folder: Folder) -> int:
    pairs = folder.read_json("data_report.json")["train"]["pairs"]
    return int(pairs)


def _sweep(
    study: StudyFile, planned: list[Trial] | None, display: StudyDisplay, interrupt: Interrupt
) -> dict[str, Any]:
    """The search, the confirmation, the report."""
    run, how = study.run, study.how
    gpus = check_cluster(run)
    tracker = _open_tracker(study)
    study.write()
    _reference_pass(study, gpus, display, interrupt)
    limits = Limits(study, interrupt)
    _run_trials(study, planned, how, limits, display)
    if how.confirm and limits.reason is None:
        again = confirmations(study)
        _run_trials(study, again, dataclasses.replace(how, scheduler="none"), limits, display)
    return _finish(study, limits, tracker, display)


def _reference_pass(study: StudyFile, gpus: float, display: StudyDisplay, interrupt: Interrupt) -> None:
    """Reference log-probs and tokens of all pairs of all trials, once, before the first trial."""

    def on_progress(done: int, total: int) -> None:
        display.progress("reference", done, total)
        if interrupt.is_set:
            raise KeyboardInterrupt  # what was computed is in the store

    prepared: dict[tuple[str, ...], tuple[RunConfig, Prepared]] = {}
    for settings in extremes(study.space, READ):
        run = trial_recipe(study.run, study.folder, Trial(0, settings, {}, study.space.seeds[0]))
        needs = loss_function(**run.loss.model_dump()).needs
        content = (run.model_dump_json(include=READ - {"loss"}), *sorted(needs & {"reference", "tails"}))
        if content not in prepared and not interrupt.is_set:
            display.phase(f"reading and encoding pairs: {_told(settings, study.space)}")
            prepared[content] = (run, prepare(run))
    for run, found in sorted(prepared.values(), key=lambda item: -item[1].train.num_pairs):
        model = reference_source(run)
        if model is None or interrupt.is_set:
            continue
        done = fill(
            [*found.train_pairs, *found.held_out_pairs],
            model,
            run,
            gpus_per_actor=gpus,
            per_token="tails" in loss_function(**run.loss.model_dump()).needs,
            on_progress=on_progress,
        )
        study.study["reference"]["computed"] += done.computed
        study.study["reference"]["from_store"] += done.from_store
    display.phase("reference: {computed} responses computed".format(**study.study["reference"]))


def _told(settings: Mapping[str, Any], space: Space) -> str:
    """The settings that decide what is read."""
    labels = {}
    for key, value in settings.items():
        if key.partition(".")[0] in READ:
            values = space.settings[key]
            known = [] if isinstance(values, Range) else [c.label for c in values if c.value == value]
            labels[key] = known[0] if known else label_of(value)
    return ", ".join(f"{key}={label}" for key, label in labels.items()) or "of the recipe"


class InDriver:
    """Tune keeps a pickle of itself, which nothing reads here: what is bound to this process stays out of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(InDriver, tune.search.Searcher):  # type: ignore[misc]  # Ray has no types here
    """Hands Tune the trials of a study: those it has had, in their order, then the planned ones, or Optuna's."""

    def __init__(self, study: StudyFile, planned: Sequence[Trial] | None) -> None:
        super().__init__(metric=study.main[0], mode=study.main[1])
        self._study, self._optuna = study, None if planned is not None else _optuna(study)
        had = [trial_of(record) for record in study.trials if record["confirms"] is None]
        self._coming = iter(had if planned is None else planned)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        proposed = None if self._optuna is None else self._optuna.suggest(trial_id)
        trial = next(self._coming, None)
        if trial is None and proposed is not None:
            trial = self._from_optuna(proposed)
        if trial is None:
            return str(self.FINISHED)
        record = self._study.record(trial)
        replay = [dict(line) for line in record["evaluations"]] if record["status"] in FINISHED else None
        return {"trial": trial_of(record)._asdict(), "replay": replay}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._optuna is not None:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optuna is not None:
            self._optuna.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: `study.json` is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""

    def _from_optuna(self, proposed: Mapping[str, Any]) -> Trial:
        """A trial of what was proposed; one that was there before comes again with the next seed."""
        settings, labels = {}, {}
        for key, drawn in _dotted(proposed).items():
            values = self._study.space.settings[key]
            if isinstance(values, Range):
                settings[key], labels[key] = drawn, label_of(drawn)
            else:
                settings[key], labels[key] = values[int(drawn)]
        equal = [record for record in self._study.trials if record["settings"] == settings]
        return Trial(0, settings, labels, self._study.space.seeds[0] + len(equal))


def _dotted(proposed: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("|", "."): value for key, value in proposed.items()}


def trial_of(record: Mapping[str, Any]) -> Trial:
    """The trial of an entry."""
    return Trial(**{name: record[name] for name in Trial._fields})


def _optuna(study: StudyFile) -> Any:
    """TPE over the space; values of lists go by their number, for a value may be a whole section of a recipe."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for key, values in study.space.settings.items():
        name = key.replace(".", "|")  # Tune would take a dot for a nested setting
        if not isinstance(values, Range):
            space[name] = optuna.distributions.CategoricalDistribution(list(range(len(values))))
        elif values.kind == "int":
            space[name] = optuna.distributions.IntDistribution(int(values.low), int(values.high))
        else:
            is_log = values.kind == "loguniform"
            space[name] = optuna.distributions.FloatDistribution(values.low, values.high, log=is_log)
    points = [_point(study.space, record) for record in study.trials if record["confirms"] is None]
    several = len(study.space.objectives) > 1
    metrics, modes = zip(*((f"best/{metric}", mode) for metric, mode in study.space.objectives), strict=True)
    return OptunaSearch(
        space,
        metric=list(metrics) if several else metrics[0],
        mode=list(modes) if several else modes[0],
        points_to_evaluate=points or None,
        seed=study.how.random_seed,
    )


def _point(space: Space, record: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's settings as Optuna knows them."""
    point = {}
    for key, value in record["settings"].items():
        values = space.settings[key]
        number = value if isinstance(values, Range) else [choice.value for choice in values].index(value)
        point[key.replace(".", "|")] = number
    return point


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray has no types here
    """A run as Tune sees it: a step is an evaluation; stopping it is the run's own interruption, so nothing leaks."""

    def setup(self, config: dict[str, Any], run: RunConfig, folder: str, metric: str, mode: str, parent: str) -> None:
        trial = Trial(**config["trial"])
        self._lines: queue.Queue[Any] = queue.Queue()
        self._seen: list[dict[str, Any]] = []
        self._main, self._interrupt = (metric, mode), Interrupt()
        self._run = trial_recipe(run, Folder(folder), trial)
        self._thread: threading.Thread | None = None
        if config["replay"] is not None:
            for line in config["replay"]:
                self._lines.put(line)
            self._lines.put({"status": "replayed"})
            return
        tags = {"dpo_ray.trial": trial.id} | ({"mlflow.parentRunId": parent} if parent else {})
        self._thread = threading.Thread(target=self._fit, args=(tags,), name="fit", daemon=True)
        self._thread.start()

    def _fit(self, tags: dict[str, str]) -> None:
        try:
            display = Lines(self._lines)
            summary = fit(self._run, resume=True, display=display, interrupt=self._interrupt, tags=tags).summary
            self._lines.put({"status": summary["status"], "stop_reason": summary["stop_reason"]})
        except InputError as error:
            self._lines.put({"status": "failed", "error": str(error)})  # trying again would not help
        except BaseException as error:  # whatever it was, Tune is to hear of it: it tries again, then gives up
            self._lines.put(error)

    def step(self) -> dict[str, Any]:
        found = self._lines.get()
        if isinstance(found, BaseException):
            raise found
        if "status" not in found:
            self._seen.append(found)
        best = best_of(self._seen, *self._main) or {}
        last = self._seen[-1] if self._seen else {}
        told = {"pairs": last.get("step", 0) * self._run.batch.pairs_per_step, "done": "status" in found}
        return {**last, **{f"best/{name}": value for name, value in best.items()}, **told, **found}

    def cleanup(self) -> None:
        """End the run as Ctrl-C would: it saves, its workers leave, its place in the cluster is free."""
        self._interrupt.is_set = True
        if self._thread is not None:
            self._thread.join()


class Lines(Silent):
    """Hands the held-out evaluations of a run on."""

    def __init__(self, lines: "queue.Queue[Any]") -> None:
        self._lines = lines

    def line(self, line: Mapping[str, Any]) -> None:
        if "eval/loss" in line:
            self._lines.put(_metrics(line, "eval/"))


class Limits(InDriver, tune.Stopper):  # type: ignore[misc]  # Ray has no types here
    """Ends a study that was interrupted, has spent its budget, or finds nothing better."""

    def __init__(self, study: StudyFile, interrupt: Interrupt) -> None:
        self._study, self._interrupt = study, interrupt
        self.reason: str | None = None
        self.pairs: dict[str, int] = {}
        """Trained on, by trial."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        how = self._study.how
        hours = (time.time() - self._study.began) / 3600
        if self._interrupt.is_set:
            self.reason = "interrupted"
        elif how.hours is not None and hours > how.hours:
            self.reason = f"the budget of {how.hours:g} hours is spent"
        elif how.pairs is not None and sum(self.pairs.values()) >= how.pairs:
            self.reason = f"the budget of {how.pairs} pairs is spent"
        elif how.plateau is not None and (worse := self._since_best()) >= how.plateau:
            self.reason = f"no better trial among the last {worse}"
        return self.reason is not None

    def _since_best(self) -> int:
        """Finished trials since the best one."""
        metric, mode = self._study.main
        done = [r for r in self._study.trials if r["status"] in FINISHED and r["best"] and not r["confirms"]]
        best = best_of([{"step": i, metric: r["best"][metric]} for i, r in enumerate(done)], metric, mode)
        return len(done) - 1 - best["step"] if best else 0


class Watch(InDriver, tune.Callback):  # type: ignore[misc]  # Ray has no types here
    """Keeps `study.json` and the display up to date."""

    def __init__(self, study: StudyFile, limits: Limits, display: StudyDisplay, total: int | None) -> None:
        self._study, self._limits, self._display, self._total = study, limits, display, total

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        if record["status"] not in FINISHED:
            record["status"] = "running"
            record["attempts"] += 1
            self._study.write()
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **i: Any) -> None:
        record = self._record(trial)
        self._limits.pairs[record["id"]] = result.get("pairs", 0)
        if record["status"] == "running":
            record["steps"] = result.get("step", 0)
            best = {name.removeprefix("best/"): value for name, value in result.items() if name.startswith("best/")}
            record["best"] = best or None
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        if record["status"] in FINISHED:
            return
        last = trial.last_result or {}
        record["status"] = last.get("status") or (
            "interrupted" if self._limits.reason is not None else "stopped_by_scheduler"
        )
        record["stop_reason"] = last.get("stop_reason")
        record["error"] = last.get("error")
        if record["status"] == "stopped_by_scheduler":
            record["stop_reason"] = f"{self._study.how.scheduler} at step {last.get('step')}"
        self._study.complete(record)
        self._study.write()
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        record["status"] = "failed"
        told = str(trial.get_pickled_error() or "the trial's process ended").strip().splitlines()
        record["error"] = next((line.strip() for line in reversed(told) if line.strip()), "")
        self._study.complete(record)
        self._study.write()
        self._show()

    def _record(self, trial: Any) -> dict[str, Any]:
        return self._study.record(Trial(**trial.config["trial"]))

    def _show(self) -> None:
        self._display.trials(self._study.trials, self._total, *self._study.main)


def _run_trials(
    study: StudyFile, planned: list[Trial] | None, how: Search, limits: Limits, display: StudyDisplay
) -> None:
    """All trials through Tune; what is finished already goes by in a moment."""
    total = len(planned) if planned is not None else how.trials
    if planned is not None and how.scheduler == "asha":
        # The first at a rung always pass it: in the grid's order, where the best may come last, nearly all would.
        planned = random.Random(how.random_seed).sample(planned, len(planned))
    if planned is not None and all(study.record(trial)["status"] in FINISHED for trial in planned):
        return
    trainable = tune.with_parameters(
        TrialRun,
        run=study.run,
        folder=study.folder.path,
        metric=study.main[0],
        mode=study.main[1],
        parent=study.study["mlflow_run_id"] or "",
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, NO_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=Proposals(study, planned),
            scheduler=_scheduler(study, how),
            num_samples=total or -1,
            max_concurrent_trials=how.max_concurrent or room(study.run),
        ),
        run_config=tune.RunConfig(
            name=".tune",
            storage_path=study.folder.path,
            stop=limits,
            callbacks=[Watch(study, limits, display, total)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has the checkpoints
            failure_config=tune.FailureConfig(max_failures=how.max_retries),
            verbose=0,
        ),
    )
    tuner.fit()
    for record in study.trials:
        study.complete(record)  # a run that was broken off wrote its summary after Tune had done with it
    study.write()
    study.folder.delete(".tune")


def room(run: RunConfig) -> int:
    """Trials that the cluster holds at a time. More would start and wait for one another's places."""
    gpus = check_cluster(run)
    there = ray.cluster_resources()
    workers = run.cluster.num_workers
    fits = [there.get("CPU", 0.0) // (workers * run.cluster.cpus_per_worker)]
    if gpus:
        fits.append(there.get("GPU", 0.0) // (workers * gpus))
    return max(1, int(min(fits)))


def _scheduler(study: StudyFile, how: Search) -> Any:
    metric, mode = study.main
    grace = how.grace_steps or 2 * study.run.eval.every_steps
    if how.scheduler == "asha":
        return tune.schedulers.ASHAScheduler(
            time_attr="step", metric=metric, mode=mode, max_t=10**9, grace_period=grace, reduction_factor=how.reduction
        )
    if how.scheduler == "median":
        return tune.schedulers.MedianStoppingRule(
            time_attr="step", metric=metric, mode=mode, grace_period=grace, min_time_slice=0
        )
    return tune.schedulers.FIFOScheduler()


def confirmations(study: StudyFile) -> list[Trial]:
    """The best configurations again, each with the same fresh seeds; those of a study taken up again stay."""
    there = [trial_of(record) for record in study.trials if record["confirms"] is not None]
    standing = search_standing(read_study(study.study))
    if there or standing is None:
        return there
    fresh = max(record["seed"] for record in study.trials) + 1
    return [
        Trial(0, best.settings, best.labels, fresh + i, confirms=best.trials[0].id)
        for i in range(study.how.confirm_seeds)
        for best in standing.ranked[: study.how.confirm]
    ]


def _finish(study: StudyFile, limits: Limits, tracker: Any, display: StudyDisplay) -> dict[str, Any]:
    """Status, best recipe, report, tracking."""
    study.study["stop_reason"] = limits.reason
    status = "completed" if limits.reason is None else "interrupted" if limits.reason == "interrupted" else "stopped"
    study.study["status"] = status
    best = winner(study)
    if best is not None:
        recipe = parse_run(study.run.model_dump(mode="json"), {**best["settings"], "name": f"{study.run.name}-best"})
        content = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        study.folder.write(BEST_FILE, content.encode())
    study.write()
    if best is not None:
        for path in write_study_report(study.folder.path):
            display.phase(f"wrote {path}")
        tracker.log_file(study.folder.read(STUDY_FILE).decode(), STUDY_FILE)
        tracker.log_file(study.folder.read("report.html").decode(), "report.html")
        tracker.log({f"best/{name}": value for name, value in best["best"].items() if name != "step"}, 0)
    tracker.finish("interrupted" if status == "interrupted" else "completed" if best else "failed")
    if best is None and status != "interrupted":
        errors = sorted({str(record["error"]) for record in study.trials if record["error"]})
        raise RunFailed(f"no trial of {study.folder.path} came to an evaluation: {'; '.join(errors) or 'none ran'}")
    if study.run.tracking.register_as and best is not None and status == "completed":
        _register(study, best, tracker)
    return study.study


def winner(study: StudyFile) -> dict[str, Any] | None:
    """The best trial of the best configuration: by the confirmation where there is one, else by the search."""
    found = read_study(study.study)
    standing = confirmation_standing(found) or search_standing(found)
    if standing is None:
        return None
    objective = found.objective
    values = {trial.id: trial.value(objective.metric) for trial in standing.ranked[0].finished}
    best = max((id for id in values if values[id] is not None), key=lambda id: objective.sign * (values[id] or 0.0))
    return next(record for record in study.trials if record["id"] == best)


def _register(study: StudyFile, best: Mapping[str, Any], tracker: Any) -> None:
    """The winner's model under the recipe's `tracking.register_as`."""
    folder = Folder(best["folder"])
    run = parse_run(yaml.safe_load(folder.read("recipe.yaml")))
    if not folder.exists("model/config.json"):  # a trial that was broken off has checkpoints only
        write_model(folder, run, folder / "model", folder.read_json(SUMMARY_FILE))
    path = f"{folder.path}/model"
    made_from = lineage(run, folder.path, path, folder.read_json(SUMMARY_FILE), {})
    tracker.register(path, str(study.run.tracking.register_as), made_from)


def tracked(run: RunConfig) -> RunConfig:
    """The recipe with its tracking store named: trials lie in another folder, but belong to the study's store."""
    if run.tracking.kind == "none":
        return run
    from dpo_ray.tracking import tracking_uri

    return run.model_copy(update={"tracking": run.tracking.model_copy(update={"uri": tracking_uri(run)})})


def _open_tracker(study: StudyFile) -> Any:
    """The study's own tracked run, parent of its trials'."""
    from dpo_ray.tracking import open_tracker, recipe_params

    tracker = open_tracker(study.run)
    tags = {"dpo_ray.study": study.folder.path, "dpo_ray.space": study.space.name}
    resumed = study.study["mlflow_run_id"]
    study.study["mlflow_run_id"] = tracker.start(study.study["name"], recipe_params(study.run), tags, resume=resumed)
    return tracker


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its own signal handler, tables, files and warnings: signals, display and state are ours."""
    own = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_RESULT_BUFFER_LENGTH": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    level = logging.getLogger("ray.tune").level
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # of a failed trial `study.json` tells
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
