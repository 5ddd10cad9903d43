"""A short fixed set of the chaos runs: real processes, real kills, weights compared bit for bit."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.chaos import CHECKPOINT_EVERY, Nodes, Run, cluster, one, recipe

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def calm(nodes: Nodes, storage: Path, shared: Path) -> Run:
    run = Run(recipe(shared, storage, "calm", zero_stage=2), nodes.address)
    summary = run.finish()
    assert (summary["status"], summary["restarts"], summary["lost_steps"]) == ("completed", 0, 0)
    return run


@pytest.mark.parametrize(
    ("seed", "victim", "cause"),
    [
        (1, "worker", "worker [01] died"),
        (2, "preempted node", "taken away"),
    ],  # killed drivers: test_acquire, test_sweep
)
def test_a_run_comes_back_with_the_uninterrupted_runs_weights(
    calm: Run, nodes: Nodes, storage: Path, shared: Path, seed: int, victim: str, cause: str
):
    outcome = one(seed, 2, victim, nodes, storage, shared, calm)
    assert outcome.status == "completed"
    assert outcome.is_identical
    assert outcome.loss_difference == 0
    assert outcome.restarts == 1
    assert outcome.lost_steps <= (0 if victim == "preempted node" else 2 * CHECKPOINT_EVERY)
    run = storage / f"chaos-{seed}-{victim.replace(' ', '-')}-zero2"
    assert re.search(cause, (run / "metrics.jsonl").read_text())
