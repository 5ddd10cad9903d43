"""The driver of a training run: recipe -> data, reference pass, Ray Train -> run folder.

The driver follows `metrics.jsonl` while Ray trains: progress and MLflow come from here, so there is one writer, and
workers report to Ray only at evaluations and checkpoints.
"""

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

import yaml

from dpo_ray import attempts, checkpoint, lease, manifest
from dpo_ray.checkpoint import CHECKPOINTS, MODEL_FOLDER
from dpo_ray.config import RECIPE_FILE, RunConfig
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.lease import Lease
from dpo_ray.lineage import lineage
from dpo_ray.losses import loss_function
from dpo_ray.manifest import Manifest
from dpo_ray.model_card import CARD_FILE, card_of
from dpo_ray.notices import STOP_FILE
from dpo_ray.prepare import (
    Prepared,
    check_recipe,
    check_same_run,
    prepare,
    reference_source,
    resolve,
    step_order,
)
from dpo_ray.reference import Pass, fill
from dpo_ray.stopping import Evaluation, best_evaluation
from dpo_ray.storage import Folder, read_lines
from dpo_ray.train import BAD_FILE, METRICS_FILE, TrainJob, train_loop

logger = logging.getLogger(__name__)

DATA_REPORT_FILE, SUMMARY_FILE = "data_report.json", "summary.json"
FOLLOW_INTERVAL_S, FOLLOW_REMOTE_INTERVAL_S = 0.3, 5.0
"""How often the driver looks for new metrics; an object store is asked, and paid, for every look."""
GROWS, NODES_INTERVAL_S = "DPO_RAY_CLUSTER_GROWS", 5.0
"""Set to 1 on clusters whose autoscaler adds nodes: Ray does not tell what it could add. How often we look for them."""


class RunResult(NamedTuple):
    """A finished, stopped or interrupted run."""

    folder: str
    summary: dict[str, Any]


class Display(Protocol):
    """Where a run shows how it goes; `cli` has the real one."""

    def phase(self, text: str) -> None: ...
    def progress(self, text: str, done: int, total: int) -> None: ...
    def line(self, line: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        pass

    def progress(self, text: str, done: int, total: int) -> None:
        pass

    def line(self, line: Mapping[str, Any]) -> None:
        pass


class Interrupt:
    """A request to save and end, as a signal handler sets it."""

    def __init__(self) -> None:
        self.is_set = False


def fit(
    run: RunConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    interrupt: Interrupt | None = None,
    connect: Callable[[], object] = lambda: None,
    tags: Mapping[str, str] | None = None,
) -> RunResult:
    """Train as the recipe says, on the Ray cluster that this process is connected to.

    Args:
        resume: Continue the run of this name from its last checkpoint, if there is one.
        connect: Joins the cluster; called once the recipe has passed the checks that need none.
        interrupt: When it is set, the run saves a checkpoint, ends, and has the status `interrupted`.
        tags: Further ones of the tracked run.

    Raises:
        InputError: The recipe, the data or the cluster does not allow the run; nothing was trained.
        RunFailed: The run broke off; checkpoints are kept.
    """
    display, interrupt = display or Silent(), interrupt or Interrupt()
    run = resolve(run)
    folder = Folder(run.folder)
    folder.check_writable()
    _refuse_reuse(folder, resume)
    with lease.acquire(folder, display.phase) as held:
        _refuse_reuse(folder, resume)  # it may have come into being while we waited
        try:
            return _fit(run, folder, held, display, interrupt, connect, tags or {})
        except Unsaved as ended:
            return _ended_unsaved(folder, str(ended))


def _fit(
    run: RunConfig,
    folder: Folder,
    held: Lease,
    display: Display,
    interrupt: Interrupt,
    connect: Callable[[], object],
    tags: Mapping[str, str],
) -> RunResult:
    before = _claim(run, folder)
    check_recipe(run)
    connect()
    gpus = check_cluster(run)

    display.phase("reading and encoding pairs")
    prepared = prepare(run)
    if before is not None and before.get("data_fingerprint") not in (None, prepared.report["fingerprint"]):
        raise InputError("cannot resume: the data is not what the run was started with")
    folder.write(RECIPE_FILE, yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False).encode())
    folder.write_json(DATA_REPORT_FILE, prepared.report)
    reference = _reference_pass(run, prepared, gpus, display, interrupt)

    order = step_order(run, prepared.train.num_pairs)
    display.phase(
        f"training {order.num_steps} steps on {run.cluster.num_workers} workers, ZeRO {run.engine.zero_stage}"
    )
    display.progress("training", 0, order.num_steps)
    store = None if reference is None else reference.store
    job = TrainJob(run, prepared.train, prepared.held_out, store, run.reference.path is None, held.token)
    started = time.time()
    with Follower(run, folder, display, before, tags) as follower:
        try:
            result = _train(run, job, gpus, folder, follower, interrupt, held)
        except (InputError, RunFailed) as error:
            if not lease.holds(folder, held.token):
                raise
            failed = {"status": "failed", "stop_reason": str(error), "mlflow_run_id": follower.run_id}
            folder.write_json(SUMMARY_FILE, failed | {"versions": _versions()})
            raise
        summary = _summary(run, prepared, result, reference, follower.run_id, attempts.history(folder))
        summary["wall_seconds"] = round(time.time() - started, 3)
        if summary["status"] != "interrupted":
            write_model(folder, run, folder / MODEL_FOLDER, summary)
            summary["model_path"] = (folder / MODEL_FOLDER).path
            checkpoint.delete_unlisted(folder)
        folder.write_json(SUMMARY_FILE, summary)
        follower.finish(summary)
    return RunResult(folder.path, summary)


class Unsaved(Exception):
    """The run was interrupted and ended without a checkpoint of its own; says why."""


def _ended_unsaved(folder: Folder, reason: str) -> RunResult:
    """The result of an interrupted run that goes on from an earlier checkpoint, or from its start."""
    summary = {
        "status": "interrupted",
        "stop_reason": reason,
        "steps": max(list_checkpoints(folder), default=0),
        "restarts": attempts.restarts(attempts.history(folder)),
        "model_path": None,
        "versions": _versions(),
    }
    folder.write_json(SUMMARY_FILE, summary)
    return RunResult(folder.path, summary)


def _reference_pass(
    run: RunConfig, prepared: Prepared, gpus: float, display: Display, interrupt: Interrupt
) -> Pass | None:
    """Reference log-probs of all pairs of the run; None for a loss that needs none."""
    model = reference_source(run)
    if model is None:
        return None
    pairs = [*prepared.train_pairs, *prepared.held_out_pairs]
    display.phase(f"reference log-probs of {len(pairs)} pairs")

    def on_progress(done: int, total: int) -> None:
        display.progress("reference", done, total)
        if interrupt.is_set:
            raise Unsaved(f"interrupted in the reference pass; {done} of {total} responses are in the store")

    found = fill(
        pairs,
        model,
        run,
        gpus_per_actor=gpus,
        per_token="tails" in loss_function(**run.loss.model_dump()).needs,
        on_progress=on_progress,
    )
    display.phase(f"reference: {found.computed} responses computed, {found.from_store} from the store")
    return found


def check_cluster(run: RunConfig) -> float:
    """GPUs per worker; refuse at once what the cluster can never schedule.

    Where the environment has `GROWS`, the nodes that are missing are asked for first.

    Raises:
        InputError: Says what was asked and what is there.
    """
    import ray

    if os.environ.get(GROWS) == "1":
        _await_nodes(run)
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    per_worker = run.cluster.gpus_per_worker
    gpus_per_worker = (1.0 if gpus > 0 else 0.0) if per_worker == "auto" else float(per_worker)
    if run.engine.precision == "fp16" and gpus_per_worker == 0:
        raise InputError("`engine.precision`=fp16 needs GPUs; use fp32 or bf16 on a CPU")
    workers = run.cluster.min_workers or run.cluster.num_workers
    key = "num_workers" if run.cluster.min_workers is None else "min_workers"
    for unit, each, total in (("CPUs", run.cluster.cpus_per_worker, cpus), ("GPUs", gpus_per_worker, gpus)):
        if workers * each > total:
            raise InputError(
                f"`cluster.{key}`={workers} with {each:g} {unit} each needs {workers * each:g} {unit}; "
                f"the cluster has {total:g}"
            )
    return gpus_per_worker


def _await_nodes(run: RunConfig) -> None:
    """Ask the autoscaler for the nodes of the workers, and wait for them for `cluster.wait_minutes`."""
    import ray
    from ray.autoscaler.sdk import request_resources

    cluster = run.cluster
    workers = cluster.min_workers or cluster.num_workers
    gpus = 0 if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    each = {unit: math.ceil(number) for unit, number in (("CPU", cluster.cpus_per_worker), ("GPU", gpus)) if number}

    def is_short() -> bool:
        there = ray.cluster_resources()
        return any(workers * number > there.get(unit, 0) for unit, number in each.items())

    if not is_short():
        return
    logger.warning("asking for nodes for %d workers with %s each", workers, each)
    request_resources(bundles=[each] * workers)
    end = time.monotonic() + cluster.wait_minutes * 60
    while is_short() and time.monotonic() < end:
        time.sleep(NODES_INTERVAL_S)
    request_resources(bundles=[])  # they stay while they are used, and for the autoscaler's idle time


def _refuse_reuse(folder: Folder, resume: bool) -> None:
    if folder.exists(RECIPE_FILE) and not resume:
        raise InputError(f"the run {folder.path} exists; continue it with --resume, or choose another `name`")


def _claim(run: RunConfig, folder: Folder) -> dict[str, Any] | None:
    """What is known of the run that is resumed; None if it is new."""
    if not folder.exists(RECIPE_FILE):
        return None
    check_same_run(yaml.safe_load(folder.read(RECIPE_FILE)), run.model_dump(mode="json"))
    folder.delete(STOP_FILE)
    attempts.record(folder, attempts.RESUME)
    checkpoint.mend_snapshot(folder)
    known: dict[str, Any] = {}
    if folder.exists(DATA_REPORT_FILE):
        known["data_fingerprint"] = folder.read_json(DATA_REPORT_FILE)["fingerprint"]
    if folder.exists("tracking.json"):
        known |= folder.read_json("tracking.json")
    return known


def _train(
    run: RunConfig,
    job: TrainJob,
    gpus: float,
    folder: Folder,
    follower: "Follower",
    interrupt: Interrupt,
    held: Lease,
) -> dict[str, Any]:
    """Run Ray Train in a thread, so that this one can follow the metrics and take signals; rank 0's return value.

    Raises:
        Unsaved: An interrupted run did not get its checkpoint written in time.
        RunFailed: Also when another attempt has taken the run over; nothing more is written then.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # also how often Ray takes a report
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from dpo_ray.supervise import Supervisor

    cluster, wait_seconds = run.cluster, run.cluster.wait_minutes * 60
    hang_seconds = cluster.hang_minutes * 60
    # What can hang inside Ray and torch themselves ends too, but later than the supervisor, who can say more.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(2 * hang_seconds))
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(2 * hang_seconds))
    start_timeout = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers
            if cluster.min_workers is None
            else (cluster.min_workers, cluster.num_workers),
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=math.ceil(2 * hang_seconds)),
        run_config=RayRunConfig(
            name=CHECKPOINTS,
            storage_path=folder.path,
            failure_config=FailureConfig(
                max_failures=cluster.max_restarts,
                max_preemption_failures=cluster.max_preemptions,
                # A start that times out is one of these; `Supervisor` ends a single long wait, this their sum.
                controller_failure_limit=10 * math.ceil(wait_seconds / start_timeout),
            ),
            callbacks=[Supervisor(folder.path, workers_wanted(run), wait_seconds, hang_seconds)],
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.checkpoint.keep,
                checkpoint_score_attribute="checkpoint_score",
                checkpoint_score_order="max",
            ),
        ),
    )
    outcome: list[Any] = []

    def train() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=train, name="ray-train", daemon=True)
    thread.start()
    asked_at: float | None = None
    while thread.is_alive():
        thread.join(FOLLOW_INTERVAL_S if folder.is_local else FOLLOW_REMOTE_INTERVAL_S)
        if held.taken_by is not None:
            follower.leave()
            raise RunFailed(f"{held.taken_by} has taken the run {folder.path} over; this attempt has stopped")
        follower.follow()
        if interrupt.is_set and asked_at is None:
            asked_at = time.monotonic()
            folder.write(STOP_FILE, b"")
            follower.tell("interrupted: saving a checkpoint (again to quit at once)")
        if asked_at is not None and time.monotonic() - asked_at > run.checkpoint.stop_seconds:
            follower.end("interrupted")
            raise Unsaved(f"interrupted; no checkpoint within {run.checkpoint.stop_seconds:g} s")
    follower.follow()
    result = outcome[0]
    if not lease.holds(folder, held.token):
        follower.leave()
        raise RunFailed(f"{lease.read_holder(folder) or 'someone'} has taken the run {folder.path} over")
    folder.delete(STOP_FILE)
    if isinstance(result, BaseException):
        follower.end("failed")
        raise _cause(result, folder)
    value: dict[str, Any] = result.return_value
    return value


def workers_wanted(run: RunConfig) -> str:
    cluster = run.cluster
    return f"{cluster.min_workers or cluster.num_workers}" + ("" if cluster.min_workers is None else " or more")


def _cause(error: BaseException, folder: Folder) -> Exception:
    """What a person can do something about, out of what Ray raised."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if hasattr(error, "controller_failure"):
        failures = [error.controller_failure]
    for failure in failures:
        inner = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raised
        for ours in (InputError, RunFailed):
            if isinstance(inner, ours):
                return ours(str(inner))
    told = failures[0] if failures else error
    last = [line for line in str(told).strip().splitlines() if line.strip()][-1:]
    logger.debug("training failed", exc_info=error)
    folder.write("error.txt", f"{error}\n\n{told}\n".encode())
    return RunFailed(
        f"training failed: {''.join(last).strip() or type(told).__name__}\nfull trace: {folder.path}/error.txt"
    )


class Follower:
    """Reads `metrics.jsonl` as it grows and hands each line to the display and the tracker."""

    def __init__(
        self,
        run: RunConfig,
        folder: Folder,
        display: Display,
        before: Mapping[str, Any] | None,
        tags: Mapping[str, str],
    ) -> None:
        from dpo_ray.tracking import open_tracker, recipe_params

        self._folder, self._display, self._run, self._tags = folder, display, run, tags
        self._tracker = open_tracker(run)
        resumed = (before or {}).get("mlflow_run_id")
        own = {"dpo_ray.version": version("dpo-ray"), "dpo_ray.folder": folder.path}
        self.run_id = self._tracker.start(run.name, recipe_params(run), {**own, **tags}, resume=resumed)
        folder.write_json("tracking.json", {"mlflow_run_id": self.run_id})
        for name in (RECIPE_FILE, DATA_REPORT_FILE):
            self._tracker.log_file(folder.read(name).decode(), name)
        self._read, self._seen = b"", self._old_lines()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.end("failed")

    def follow(self) -> None:
        """Take the lines that have come since."""
        if not self._folder.exists(METRICS_FILE):
            return
        content = self._folder.read(METRICS_FILE)
        if not content.startswith(self._read):  # a restarted run has cut the lines after its checkpoint
            self._read = b""
        new, self._read = content[len(self._read) :], content[: content.rfind(b"\n") + 1]
        has_anomalies = False
        for line in read_lines(new):
            key = _line_key(line)
            if key in self._seen:
                continue
            self._seen.add(key)
            self._display.line(line)
            has_anomalies |= "anomaly" in line
            metrics = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
            self._tracker.log(metrics, line["step"])
        if has_anomalies:
            self._log_anomalies(content)

    def _log_anomalies(self, content: bytes) -> None:
        """All of the run so far, also those from before it was resumed."""
        lines = [line for line in read_lines(content) if "anomaly" in line]
        found = {line["anomaly"]["name"]: {"step": line["step"], **line["anomaly"]} for line in lines}
        self._tracker.tag({"anomalies": ",".join(found)})
        self._tracker.log_file(json.dumps(list(found.values()), indent=1), "anomalies.json")

    def tell(self, text: str) -> None:
        self._display.phase(text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the tracked run with its summary; register the model where the recipe asks."""
        self._tracker.log_file(self._folder.read(SUMMARY_FILE).decode(), SUMMARY_FILE)
        self._tracker.finish(summary["status"])
        self._is_closed = True
        if self._run.tracking.register_as and summary["model_path"]:
            made_from = lineage(self._run, self._folder.path, summary["model_path"], summary, self._tags)
            self._tracker.register(summary["model_path"], self._run.tracking.register_as, made_from)

    def leave(self) -> None:
        """Touch the tracked run no more: it is another attempt's."""
        self._is_closed = True

    def end(self, status: Literal["failed", "interrupted"]) -> None:
        """Close the tracked run without a summary, once."""
        if not self._is_closed:
            self._tracker.finish(status)
            self._is_closed = True

    def _old_lines(self) -> set[tuple[Any, ...]]:
        """Lines of the run before it was resumed."""
        if not self._folder.exists(METRICS_FILE):
            return set()
        return {_line_key(line) for line in read_lines(self._folder.read(METRICS_FILE))}


def _line_key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells lines apart: the step, the metrics in it, and what is told in words."""
    return (line["step"], *sorted(line), *(str(value) for value in line.values() if isinstance(value, str | dict)))


def time_split(of_steps: Mapping[str, float], steps: float, evaluation: float, checkpoint: float) -> dict[str, float]:
    """Part -> share of the time from the first step to the last; of the steps' own parts by the steps that were timed.

    Args:
        of_steps: Part -> share of the time of steps.
        steps, evaluation, checkpoint: Seconds.
    """
    total = steps + evaluation + checkpoint
    parts = {name: share * steps for name, share in of_steps.items()}
    parts |= {"evaluation": evaluation, "checkpoint": checkpoint}
    return {name: round(seconds / total, 4) for name, seconds in parts.items()} if of_steps else {}


def _summary(
    run: RunConfig,
    prepared: Prepared,
    result: Mapping[str, Any],
    reference: Pass | None,
    run_id: str | None,
    events: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """`summary.json` of a run that came to an end."""
    state = result["state"]
    evaluations = [Evaluation(*item) for item in state["evaluations"]]
    best = best_evaluation(evaluations, run.best_metric)
    seconds, waited, reason = state["train_seconds"], state["checkpoint_seconds"], state["stop_reason"]
    status = "completed" if reason is None else "interrupted" if reason == "interrupted" else "stopped_early"
    return {
        "status": status,
        "stop_reason": reason,
        "steps": state["step"],
        "num_steps": result["num_steps"],
        "best_step": best.step if best else None,
        "best_metric": run.best_metric,
        "pairs_seen": result["pairs_seen"],
        "world_size": state["world_size"],
        "resumed_from_step": result["resumed_from_step"],
        "restarts": attempts.restarts(events),
        "lost_steps": attempts.lost_steps(events),
        "eval": evaluations[-1].metrics if evaluations else {},
        "best_eval": best.metrics if best else {},
        "anomalies": [anomaly._asdict() for anomaly in state["anomalies"]],
        "train_seconds": round(seconds, 3),
        "pairs_per_second": round(result["pairs_seen"] / seconds, 3) if seconds else None,
        "tokens_per_second": round(state["tokens"] / seconds, 1) if seconds else None,
        "checkpoint_seconds": round(waited, 3),
        "checkpoint_share": round(waited / (seconds + waited), 4) if seconds else None,
        "padding_fraction": round(1 - state["filled"] / state["slots"], 4) if state["slots"] else None,
        "time_split": time_split(result["time_split"], seconds, state["evaluation_seconds"], waited),
        "attention": result["attention"],
        "mfu": result["mfu"],
        "peak_memory_gib": round(result["peak_memory_gib"], 3),
        "overflowed_steps": result["overflowed_steps"],
        "skipped_steps": skipped_steps(Folder(run.folder)),
        "reference": {
            "computed": reference.computed if reference else 0,
            "from_store": reference.from_store if reference else 0,
        },
        "data_fingerprint": prepared.report["fingerprint"],
        "reference_fingerprint": reference.store.fingerprint if reference else None,
        "model_path": None,
        "mlflow_run_id": run_id,
        "versions": _versions(),
    }


def skipped_steps(folder: Folder) -> int:
    """Steps that were left out because their numbers were not finite; a step that was done again counts once."""
    if not folder.exists(BAD_FILE):
        return 0
    return len({line["step"] for line in read_lines(folder.read(BAD_FILE))})


def _versions() -> dict[str, str]:
    names = ("dpo-ray", "torch", "transformers", "deepspeed", "ray")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def list_checkpoints(folder: Folder) -> dict[int, tuple[str, Manifest]]:
    """The whole checkpoints of a run, by step: folder name and manifest."""
    found = reversed(checkpoint.find(folder))
    return {one.manifest.step: (one.name, one.manifest) for one in found if one.manifest is not None}


def write_model(
    folder: Folder, run: RunConfig, target: Folder, summary: Mapping[str, Any] | None, step: int | None = None
) -> int:
    """Copy the model of a checkpoint, with a card, out of a run folder: the best one, else the last.

    Returns:
        The checkpoint's step.

    Raises:
        InputError: There is no such checkpoint, or its model has been damaged.
    """
    steps = list_checkpoints(folder)
    if not steps:
        raise InputError(f"{folder.path} has no checkpoint")
    if step is not None and step not in steps:
        raise InputError(f"{folder.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    best = [s for s, (_, written) in steps.items() if written.is_best]
    chosen = step if step is not None else max(best or steps)
    name, written = steps[chosen]
    source = folder / CHECKPOINTS / name
    model = [(file, stamp) for file, stamp in written.files.items() if file.startswith(f"{MODEL_FOLDER}/")]
    if wrong := manifest.changed(source, model):
        raise InputError(f"{source.path} is damaged: {', '.join(wrong)}")
    target.delete()
    target.copy_from((source / MODEL_FOLDER).path)
    target.write(CARD_FILE, card_of(folder, run, target, summary, chosen).encode())
    return chosen
