"""What the controller is told to do: retry, or end at once with the cause."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from dpo_ray import attempts, supervise
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.storage import Folder
from dpo_ray.supervise import Supervisor, final_error, loss_cause

DIED = WorkerHealthCheckFailedError("a worker health check failed", RuntimeError("the actor died unexpectedly"))


@pytest.fixture
def supervisor(tmp_path: Any) -> Supervisor:
    return Supervisor(str(tmp_path), "2", wait_seconds=60)


def test_only_what_a_retry_cannot_mend_is_final():
    assert final_error({}) is None
    assert final_error({0: ValueError("reset by peer"), 1: DIED}) is None
    assert str(final_error({0: ValueError("reset by peer"), 1: RunFailed("not finite")})) == "not finite"
    assert isinstance(final_error({1: InputError("bad row")}), InputError)


def test_a_final_error_is_raised_in_the_controller(supervisor: Supervisor):
    supervisor.after_worker_group_poll_status(SimpleNamespace(errors={1: DIED}))
    with pytest.raises(RunFailed, match="not finite"):
        supervisor.after_worker_group_poll_status(SimpleNamespace(errors={1: RunFailed("not finite")}))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (WorkerGroupError("", {0: ValueError("collateral"), 1: DIED}), "worker 1 died"),
        (WorkerGroupError("", {0: DIED, 1: DIED}), "workers 0, 1 died"),
        (WorkerGroupError("", {1: ValueError("first line\nlast line\n")}), "worker 1: ValueError: last line"),
        (PreemptionError(PreemptionInfo(None, {"node": [1]})), "node of worker 1 taken away"),
        (ControllerError(RuntimeError("a\n b")), "RuntimeError: a b"),
    ],
)
def test_a_loss_is_told_in_a_few_words(error: Exception, cause: str):
    assert loss_cause(error) == cause


def test_a_restart_and_a_resize_are_recorded_once(supervisor: Supervisor, tmp_path: Any):
    running, error = states.RunningState(), WorkerGroupError("", {1: DIED})
    restarting = states.RestartingState(training_failed_error=error)
    supervisor.after_controller_state_update(running, restarting)
    supervisor.after_controller_state_update(restarting, restarting)
    supervisor.after_controller_state_update(restarting, running)
    resize = ResizeDecision(num_workers=1, resources_per_worker={"CPU": 1})
    supervisor.after_controller_state_update(running, states.ResizingState(resize))
    causes = [event["cause"] for event in attempts.history(Folder(str(tmp_path)))]
    assert causes == ["worker 1 died", "the nodes now hold 1 workers"]


def test_workers_are_not_waited_for_without_end(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now)
    waiting = states.ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))
    supervisor.after_controller_state_update(states.SchedulingState(None), waiting)  # type: ignore[arg-type]
    now = 159.0
    supervisor.after_controller_state_update(waiting, waiting)
    supervisor.after_controller_state_update(waiting, states.RunningState())  # they came: the clock starts anew
    supervisor.after_controller_state_update(states.RunningState(), waiting)
    now = 218.0
    supervisor.after_controller_state_update(waiting, waiting)
    now = 220.0
    with pytest.raises(RunFailed, match=r"waited 1 minutes .* hold 2 workers"):
        supervisor.after_controller_state_update(waiting, waiting)
