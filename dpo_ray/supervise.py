"""What Ray Train's controller does for a run besides its own work: tell why workers are lost, and give up in time.

Ray decides about restarts (`FailureConfig`); it cannot tell a user's mistake from a lost node, and it waits for ever
for nodes. `Supervisor` runs in the controller process; an error that it raises there ends the run without a retry.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from dpo_ray import attempts
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.storage import Folder


class Supervisor(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Records losses in the run folder, and ends what must not be retried.

    Args:
        folder: The run folder.
        wait_seconds: Longest time without workers.
    """

    def __init__(self, folder: str, num_workers: str, wait_seconds: float) -> None:
        self._folder, self._num_workers, self._wait_seconds = Folder(folder), num_workers, wait_seconds
        self._without_workers_since: float | None = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """End the run at once where a worker says that it cannot go on.

        Raises:
            InputError, RunFailed: As the worker did.
        """
        final = final_error(worker_group_status.errors)
        if final is not None:
            raise final

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
        lines = [line for line in str(failure).strip().splitlines() if line.strip()]
        return f"{_workers([rank])}: {type(failure).__name__}: {lines[-1].strip() if lines else ''}"[:300]
    failure = getattr(error, "controller_failure", error)
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def resize_cause(decision: Any) -> str:
    return f"the nodes now hold {decision.num_workers} workers"


def _workers(ranks: list[int]) -> str:
    return ("worker " if len(ranks) == 1 else "workers ") + ", ".join(map(str, ranks))
