"""What the controller is told to do: retry, or end at once with the cause."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from dpo_ray import attempts, pulse, supervise
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.pulse import Reading
from dpo_ray.storage import Folder
from dpo_ray.supervise import HangWatch, Supervisor, Ward, final_error, loss_cause

DIED = WorkerHealthCheckFailedError("a worker health check failed", RuntimeError("the actor died unexpectedly"))


@pytest.fixture
def supervisor(tmp_path: Any) -> Supervisor:
    return Supervisor(str(tmp_path), "2", wait_seconds=60, hang_seconds=30)


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
        (
            WorkerGroupError("", {0: RuntimeError("[/gloo/pair.cc:537] Read error: Connection reset by peer. GLHF!")}),
            "worker 0 lost the connection to another worker",
        ),
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


def readings(*signs: int, phase: str = "sums of step 3") -> dict[int, Reading]:
    return {rank: Reading(count, phase, 0.0, "train.py:7") for rank, count in enumerate(signs)}


def test_nobody_is_stuck_while_anybody_comes_on():
    watch = HangWatch(60)
    for now in range(0, 600, 10):
        assert watch.see(readings(5, now), (), float(now)) == {}


def test_the_rank_behind_the_others_is_named_with_its_phase_once():
    watch = HangWatch(60)
    assert watch.see(readings(8, 7), (), 0.0) == {}
    assert watch.see(readings(8, 7), (), 59.0) == {}
    told = watch.see(readings(8, 7), (), 61.0)
    assert told == {1: "worker 1 stuck for 1 minutes in `sums of step 3` at train.py:7"}
    assert watch.see(readings(8, 7), (), 1000.0) == {}


def test_a_rank_that_does_not_answer_is_named_before_one_that_waits():
    watch = HangWatch(60)
    watch.see(readings(7, 7), (), 0.0)
    told = watch.see(readings(7, 7), {1}, 61.0)
    assert list(told) == [1]
    assert told[1].endswith("and does not answer")


def test_ranks_that_stand_together_are_all_named():
    watch = HangWatch(60)
    watch.see(readings(7, 7), (), 0.0)
    assert list(watch.see(readings(7, 7), (), 61.0)) == [0, 1]


@pytest.mark.parametrize("phase", sorted(pulse.NO_HURRY))
def test_waiting_for_a_node_to_go_or_for_the_last_upload_is_no_hang(phase: str):
    watch = HangWatch(60)
    watch.see(readings(7, 7, phase=phase), (), 0.0)
    assert watch.see(readings(7, 7, phase=phase), (), 1000.0) == {}


def test_a_pulse_tells_phase_and_place_from_another_thread():
    import threading

    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        pulse.enter("forward and backward of step 3")
        entered.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    first = pulse.read()
    pulse.beat()
    assert pulse.read().signs == first.signs + 1
    leave.set()
    thread.join()
    assert first.phase == "forward and backward of step 3"
    assert first.idle_s < 5
    assert "threading.py:" in first.where


class Ready:
    """Stands for Ray: a call is answered when its worker answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        self.killed: list[Any] = []
        monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([r for r in refs if r.worker.answers], []))
        monkeypatch.setattr(ray, "get", lambda ref: ref.worker.reading)
        monkeypatch.setattr(ray, "kill", self.killed.append)


class FakeWorker:
    def __init__(self, rank: int) -> None:
        self.actor, self.answers, self.reading = f"actor {rank}", True, readings(7)[0]

    def execute_async(self, function: Any) -> Any:
        assert function is pulse.read
        return SimpleNamespace(worker=self)


def test_a_ward_ends_the_worker_that_fell_silent(monkeypatch: pytest.MonkeyPatch):
    ray, now = Ready(monkeypatch), 0.0
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now)
    workers = [FakeWorker(0), FakeWorker(1)]
    ward, found = Ward(workers, hang_seconds=60), {}
    for second in range(0, 200):
        now = float(second)
        workers[0].reading = readings(min(second, 20))[0]
        workers[1].answers = second < 20
        found = ward.look()
        if found:
            break
    assert list(found) == [1]
    assert 75 < now < 100
    ward.end(found)
    assert ray.killed == ["actor 1"]
