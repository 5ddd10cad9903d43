"""What Ray Train's controller does for a run besides its own work: tell why workers are lost, and give up in time.

Ray decides about restarts (`FailureConfig`); it cannot tell a user's mistake from a lost node, waits for ever for
nodes, and sees no worker that is stuck. `Supervisor` runs in the controller process; an error that it raises there ends
the run without a retry.
"""

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from dpo_ray import attempts, pulse
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.pulse import Reading
from dpo_ray.storage import Folder

SILENT_S = 10.0
"""A worker that has not answered for so long does not answer."""


class Supervisor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Records losses in the run folder, and ends what must not be retried.

    Args:
        folder: The run folder.
        wait_seconds: Longest time without workers.
        hang_seconds: Longest time in which no worker comes on.
    """

    def __init__(self, folder: str, num_workers: str, wait_seconds: float, hang_seconds: float) -> None:
        self._folder, self._num_workers, self._wait_seconds = Folder(folder), num_workers, wait_seconds
        self._without_workers_since: float | None = None
        self._hang_seconds = hang_seconds
        self._ward: Ward | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._ward = Ward(worker_group.get_workers(), self._hang_seconds)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._ward = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """End the run at once where a worker says that it cannot go on.

        Raises:
            InputError, RunFailed: As the worker did.
        """
        final = final_error(worker_group_status.errors)
        if final is not None:
            raise final
        if self._ward is not None and (stuck := self._ward.look()):
            self._tell("; ".join(stuck.values()))
            self._ward.end(stuck)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ray calls this on every change, and while it waits.

        Raises:
            RunFailed: The workers have been waited for too long.
        """
        before, now = type(previous_state).__name__, type(current_state).__name__
        if now == "RunningState":
            self._without_workers_since = None
            return
        if now not in ("InitializingState", "SchedulingState", "RestartingState", "ReschedulingState"):
            if now == "ResizingState":
                self._tell(resize_cause(current_state.scaling_decision))
            return
        if now == "RestartingState" and before != now:
            self._tell(loss_cause(current_state.training_failed_error))
        self._without_workers_since = self._without_workers_since or time.monotonic()
        if time.monotonic() - self._without_workers_since > self._wait_seconds:
            raise RunFailed(
                f"waited {self._wait_seconds / 60:g} minutes (`cluster.wait_minutes`) for nodes that can hold "
                f"{self._num_workers} workers; continue with --resume when there are some"
            )

    def _tell(self, cause: str) -> None:
        with suppress(OSError, InputError):  # a record that cannot be written is no reason to end the run
            attempts.record(self._folder, attempts.LOSS, cause=cause)


class Ward:
    """Asks a group of workers again and again how far they are, without ever waiting for an answer.

    Args:
        workers: Ray Train's, by rank.
    """

    def __init__(self, workers: list[Any], hang_seconds: float) -> None:
        self._workers = workers
        self._interval = min(5.0, hang_seconds / 4)
        self._watch = HangWatch(hang_seconds)
        self._asked: dict[int, tuple[float, Any]] = {}
        self._readings: dict[int, tuple[float, Reading]] = {}

    def look(self) -> dict[int, str]:
        """Stuck workers by rank, with what to say of them."""
        import ray

        now = time.monotonic()
        for rank, worker in enumerate(self._workers):
            if rank not in self._asked:
                if now - self._readings.get(rank, (float("-inf"), None))[0] > self._interval:
                    self._asked[rank] = now, worker.execute_async(pulse.read)
            elif ray.wait([self._asked[rank][1]], timeout=0)[0]:
                _, answer = self._asked.pop(rank)
                try:
                    self._readings[rank] = now, ray.get(answer)
                except ray.exceptions.RayError:  # dead, as Ray itself will notice
                    return {}
        if any(rank not in self._readings for rank in range(len(self._workers))):
            return {}
        silent = {rank for rank, (since, _) in self._asked.items() if now - since > SILENT_S}
        return self._watch.see({rank: reading for rank, (_, reading) in self._readings.items()}, silent, now)

    def end(self, ranks: Mapping[int, str]) -> None:
        """Kill workers, so that Ray starts the group again."""
        import ray

        for rank in ranks:
            ray.kill(self._workers[rank].actor)


class HangWatch:
    """Decides who is stuck: nobody, as long as anybody comes on."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._counts: dict[int, int] = {}
        self._still_since = float("inf")

    def see(self, readings: Mapping[int, Reading], silent: Collection[int], now: float) -> dict[int, str]:
        """Ranks that hold up the others, with what to say of each.

        Args:
            readings: The last answer of every rank.
            silent: Ranks that do not answer any more.
        """
        counts = {rank: reading.signs for rank, reading in readings.items()}
        may_wait = any(reading.phase in pulse.NO_HURRY for reading in readings.values())
        if counts != self._counts or may_wait:
            self._counts, self._still_since = counts, now
        if now - self._still_since < self._hang_seconds:
            return {}
        self._still_since = float("inf")  # said once
        least = min(counts.values())
        stuck = set(silent) or {rank for rank, count in counts.items() if count == least}
        minutes = f"{self._hang_seconds / 60:.3g} minutes"
        told = {rank: f"in `{readings[rank].phase}` at {readings[rank].where}" for rank in stuck}
        return {
            rank: f"worker {rank} stuck for {minutes} {text}" + (" and does not answer" if rank in silent else "")
            for rank, text in sorted(told.items())
        }


def final_error(errors: Mapping[int, BaseException]) -> Exception | None:
    """The error among the workers' that no retry can mend: wrong input, or a run that says why it cannot go on."""
    ours = (error for _, error in sorted(errors.items()) if isinstance(error, InputError | RunFailed))
    return next(ours, None)


def loss_cause(error: Any) -> str:
    """Why the workers must start again, in a few words."""
    info = getattr(error, "preemption_info", None)
    if info is not None:
        return f"node of {_workers(info.preempted_ranks)} taken away"
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    dead = sorted(rank for rank, failure in failures.items() if hasattr(failure, "health_check_failure"))
    if dead:
        return f"{_workers(dead)} died"  # errors of the others, if any, only follow from that
    if failures:
        rank, failure = min(failures.items())
        if "by peer" in str(failure):  # gloo's "Connection reset", seen before Ray saw the death behind it
            return f"{_workers([rank])} lost the connection to another worker"
        lines = [line for line in str(failure).strip().splitlines() if line.strip()]
        return f"{_workers([rank])}: {type(failure).__name__}: {lines[-1].strip() if lines else ''}"[:300]
    failure = getattr(error, "controller_failure", error)
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def resize_cause(decision: Any) -> str:
    return f"the nodes now hold {decision.num_workers} workers"


def _workers(ranks: list[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, ranks))
