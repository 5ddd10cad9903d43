"""An acquisition: one strategy, or several compared over paired seeds, each arm in rounds (`acquisition.rounds`).

The driver reads the pool once, gives whole seeds to a pool of actors (one seed alone runs here), and writes what the
arms have done into `acquire.json`, which the report reads. All arms of a seed share pool, held-out pairs, oracle and
trained models: equal labels are trained on once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import yaml

from dpo_ray import lease
from dpo_ray.acquire_report import write_acquire_report
from dpo_ray.acquisition.features import columns_for
from dpo_ray.acquisition.pool import Pool, load_candidates
from dpo_ray.acquisition.rounds import HELD_OUT_FILE, Arm, Interrupted, Task, batch_rule, limits_of, results_of
from dpo_ray.acquisition.scores import STRATEGIES, options_of
from dpo_ray.config import RECIPE_FILE, RunConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.data.formats import to_row
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.launch import Display, Interrupt, Silent, check_cluster
from dpo_ray.metrics import METRICS
from dpo_ray.models import end_token_ids, load_tokenizer, policy_source
from dpo_ray.prepare import check_recipe, reference_source, resolve
from dpo_ray.storage import Folder
from dpo_ray.sweep import room, tracked

ACQUIRE_FILE = "acquire.json"
POLL_S = 2.0


def acquire(
    run: RunConfig,
    *,
    strategies: Sequence[str] = (),
    num_seeds: int = 1,
    resume: bool = False,
    display: Display | None = None,
    interrupt: Interrupt | None = None,
    connect: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run an acquisition, or take it up again; what `acquire.json` says at the end.

    Args:
        strategies: Instead of the recipe's own one.
        num_seeds: Arms of each strategy, with seeds from `acquire.seed` on.

    Raises:
        InputError: The recipe, the pool or the cluster does not allow it.
        RunFailed: A training broke off.
    """
    display, interrupt = display or Silent(), interrupt or Interrupt()
    run = tracked(resolve(run))
    if run.acquire is None:
        raise InputError("the recipe has no `acquire` section")
    strategies = list(dict.fromkeys(strategies or [run.acquire.strategy]))
    folder = Folder(run.folder)
    folder.check_writable()
    check(run, strategies)
    if folder.exists(RECIPE_FILE):
        _check_same(folder, run, resume)
    with lease.acquire(folder, display.phase):
        connect()
        gpus = check_cluster(run)
        display.phase("reading the pool")
        pool, encoder = read_pool(run)
        before = folder.read_json(ACQUIRE_FILE)["pool"] if folder.exists(ACQUIRE_FILE) else pool.report
        if before["fingerprint"] != pool.fingerprint:
            raise InputError("cannot resume: the pool is not what the acquisition was started with")
        folder.write(RECIPE_FILE, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).encode())
        if pool.held_out:
            folder.write_lines(HELD_OUT_FILE, [to_row(pair) for pair in pool.held_out])
        state = State(folder, run, pool, strategies, [run.acquire.seed + number for number in range(num_seeds)])
        return _run(state, Task(run, pool, encoder, folder, gpus, state.tags), display, interrupt)


def plan(run: RunConfig, strategies: Sequence[str], num_seeds: int) -> dict[str, Any]:
    """What an acquisition would do: the pool, the rounds, what each strategy costs. Starts no Ray.

    Raises:
        InputError: As `acquire`.
    """
    run = resolve(run)
    if run.acquire is None:
        raise InputError("the recipe has no `acquire` section")
    strategies = list(dict.fromkeys(strategies or [run.acquire.strategy]))
    check(run, strategies)
    pool, _ = read_pool(run)
    rounds = -(-run.acquire.budget // run.acquire.labels_per_round)
    return {
        "pool": pool.report,
        "rounds": rounds,
        "labels": run.acquire.budget,
        "arms": len(strategies) * num_seeds,
        "trainings": f"at most {rounds * len(strategies) * num_seeds}; equal ones are shared",
        "strategies": {name: STRATEGIES[name].cost for name in strategies},
        "oracle": run.acquire.oracle.kind,
    }


def check(run: RunConfig, strategies: Sequence[str]) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        InputError: Names the key.
    """
    config = run.acquire
    assert config is not None
    if run.tracking.register_as and len(strategies) > 1:
        raise InputError("`tracking.register_as`: a comparison has no one model to register")
    check_recipe(run.model_copy(update={"acquire": None}))
    for strategy in strategies:
        columns_for(config.model_copy(update={"strategy": strategy, "options": {}}))
    for option in config.options:
        if option not in options_of(config.strategy):
            raise InputError(f"`acquire.options`: strategy `{config.strategy}` has no option `{option}`")
    batch_rule(config.batch), limits_of(config.batch)
    if reference_source(run) is None and any("reference_logps" in STRATEGIES[s].needs for s in strategies):
        raise InputError(f"`loss.kind`: {run.loss.kind} has no reference, by which strategies rank")
    if config.pool.kind == "prompts" and config.pool.pairing == "best_vs_worst":
        raise InputError("`acquire.pool.pairing`: best_vs_worst needs scores, and a pool of prompts has none")


def read_pool(run: RunConfig) -> tuple[Pool, PairEncoder]:
    """The pool of a resolved recipe, without what the model's tokenizer cannot encode, and the encoder."""
    encoder = encoder_of(run)
    return load_candidates(run, is_usable=lambda pair: bool(encoder.encode([pair]).pairs)), encoder


def encoder_of(run: RunConfig) -> PairEncoder:
    policy = policy_source(run.model)
    return PairEncoder(load_tokenizer(policy), run.data, end_token_ids(policy))


def _check_same(folder: Folder, run: RunConfig, resume: bool) -> None:
    if not resume:
        raise InputError(f"{folder.path} exists; continue it with --resume, or choose another `name`")
    before, now = yaml.safe_load(folder.read(RECIPE_FILE)), run.model_dump(mode="json")
    for section in sorted(now.keys() - {"cluster", "tracking", "checkpoint", "storage", "acquire"}):
        if before[section] != now[section]:
            raise InputError(f"cannot resume: `{section}` is not what the acquisition was started with")
    # More labels, a further target: the rounds that are done stay what they were.
    for key in sorted(now["acquire"].keys() - {"budget", "target", "patience", "strategy", "options"}):
        if before["acquire"][key] != now["acquire"][key]:
            raise InputError(f"cannot resume: `acquire.{key}` is not what the acquisition was started with")


class State:
    """`acquire.json`: what the arms have done, for reports and for the next start."""

    def __init__(
        self, folder: Folder, run: RunConfig, pool: Pool, strategies: Sequence[str], seeds: Sequence[int]
    ) -> None:
        from dpo_ray.tracking import open_tracker, recipe_params

        assert run.acquire is not None
        before = folder.read_json(ACQUIRE_FILE) if folder.exists(ACQUIRE_FILE) else {}
        self.folder, self.strategies, self.seeds, self._began = folder, strategies, seeds, time.time()
        self._began -= before.get("seconds", 0.0)
        self._register_as = run.tracking.register_as
        self.tracker = open_tracker(run)
        tags = {"dpo_ray.acquisition": folder.path}
        run_id = self.tracker.start(run.name, recipe_params(run), tags, resume=before.get("mlflow_run_id"))
        self.tags = {"mlflow.parentRunId": run_id} if run_id else {}
        self.tree: dict[str, Any] = {
            "name": run.name,
            "status": "running",
            "strategies": list(strategies),
            "seeds": list(seeds),
            "metric": run.best_metric,
            "mode": METRICS[run.best_metric].direction,
            "budget": run.acquire.budget,
            "labels_per_round": run.acquire.labels_per_round,
            "oracle": run.acquire.oracle.kind,
            "pool": pool.report,
            "seconds": 0.0,
            "mlflow_run_id": run_id,
            "arms": [],
        }

    def write(self, status: str) -> dict[str, Any]:
        arms = []
        for seed in self.seeds:
            for strategy in self.strategies:
                rounds = results_of(self.folder / f"seed-{seed}" / strategy)
                arms.append({"strategy": strategy, "seed": seed, "rounds": rounds})
        self.tree |= {"status": status, "seconds": round(time.time() - self._began, 1), "arms": arms}
        self.folder.write_json(ACQUIRE_FILE, self.tree)
        return self.tree

    def finish(self, status: Literal["completed", "interrupted", "failed"]) -> dict[str, Any]:
        """Write, report, close the tracked run."""
        tree = self.write(status)
        if any(arm["rounds"] for arm in tree["arms"]):
            write_acquire_report(self.folder.path)
            self.tracker.log_file(self.folder.read("report.html").decode(), "report.html")
        models = [arm["rounds"][-1]["model"] for arm in tree["arms"] if arm["rounds"]]
        if status == "completed" and self._register_as and len(models) == 1 and models[0]:
            self.tracker.register(models[0], self._register_as)
        self.tracker.finish(status)
        return tree


def _run(state: State, task: Task, display: Display, interrupt: Interrupt) -> dict[str, Any]:
    try:
        if len(state.seeds) == 1:
            run_seed(task, state.strategies, state.seeds[0], display, interrupt)
        else:
            _run_seeds(state, task, display, interrupt)
    except Interrupted:
        return state.finish("interrupted")
    except (InputError, RunFailed):
        state.finish("failed")
        raise
    return state.finish("completed")


def run_seed(task: Task, strategies: Sequence[str], seed: int, display: Display, interrupt: Interrupt) -> None:
    """All arms of a seed, one after the other: what one has trained, another need not."""
    for strategy in strategies:
        Arm(task, strategy, seed, display, interrupt).go()


class SeedRunner:
    """An actor that runs seeds. Two threads: one works, one takes the request to stop."""

    def __init__(self) -> None:
        self._interrupt = Interrupt()

    def run(
        self, run: RunConfig, folder: str, gpus: float, tags: Mapping[str, str], strategies: list[str], seed: int
    ) -> str:
        """Run the arms of a seed; how it ended."""
        pool, encoder = read_pool(run)
        try:
            run_seed(Task(run, pool, encoder, Folder(folder), gpus, tags), strategies, seed, Silent(), self._interrupt)
        except Interrupted:
            return "interrupted"
        return "completed"

    def stop(self) -> None:
        self._interrupt.is_set = True


def _run_seeds(state: State, task: Task, display: Display, interrupt: Interrupt) -> None:
    """Seeds on as many actors as trainings have room for."""
    import ray

    count = min(len(state.seeds), room(task.run))
    # No CPU of their own: the trainings and passes that they start ask for theirs.
    runner = ray.remote(num_cpus=0, max_concurrency=2)(SeedRunner)
    actors = [runner.remote() for _ in range(count)]
    waiting = list(state.seeds)
    busy: dict[Any, Any] = {}
    told: set[tuple[str, int, int]] = set()
    ended: list[str] = []
    is_told = False
    while waiting or busy:
        while waiting and actors and not interrupt.is_set:
            actor, shared = actors.pop(), (task.run, task.folder.path, task.gpus, dict(task.tags))
            busy[actor.run.remote(*shared, list(state.strategies), waiting.pop(0))] = actor
        if not busy:
            break
        done, _ = ray.wait(list(busy), timeout=POLL_S)
        for reference in done:
            actors.append(busy.pop(reference))
            ended.append(_result(reference))
        if interrupt.is_set and not is_told:
            is_told = True
            display.phase("interrupted: each seed saves and ends (again to quit at once)")
            ray.get([actor.stop.remote() for actor in busy.values()])
        _tell(state, told, display)
    if interrupt.is_set or "interrupted" in ended:
        raise Interrupted


def _result(reference: Any) -> str:
    """What an actor returns, and what it raises as itself."""
    import ray

    try:
        ended: str = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | RunFailed):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except ray.exceptions.RayActorError as error:
        raise RunFailed(f"a process that ran a seed died: {' '.join(str(error).split())[:200]}") from None
    return ended


def _tell(state: State, told: set[tuple[str, int, int]], display: Display) -> None:
    """Show the rounds that have ended since."""
    tree = state.write("running")
    for arm in tree["arms"]:
        for result in arm["rounds"]:
            key = (arm["strategy"], arm["seed"], result["round"])
            if key not in told:
                told.add(key)
                value = "" if result["value"] is None else f", {tree['metric']} {result['value']:.4f}"
                display.phase(f"{key[0]}, seed {key[1]}, round {key[2]}: {result['asked']} labels{value}")
    rounds = -(-tree["budget"] // tree["labels_per_round"]) * len(tree["arms"])
    display.progress("rounds", len(told), rounds)
