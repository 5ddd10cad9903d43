"""The driver's look at the cluster, against a cluster that grows, and at the lines of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import launch
from dpo_ray.config import TrackingConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.storage import Folder


class Growing:
    """A cluster without nodes, whose autoscaler brings some of what it is asked for."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.asked: list[list[dict[str, int]]] = []
        self.there: dict[str, float] = {}

    def resources(self) -> dict[str, float]:
        return self.there

    def request(self, bundles: list[dict[str, int]]) -> None:
        self.asked.append(bundles)
        for bundle in bundles[: self.nodes]:
            for unit, number in bundle.items():
                self.there[unit] = self.there.get(unit, 0) + number


def run(**cluster: Any) -> Any:
    tree = {"name": "r", "model": {"path": "m"}, "data": {"sources": [{"path": "p"}]}}
    asked = {"num_workers": 3, "cpus_per_worker": 4, "gpus_per_worker": 1, "wait_minutes": 0.001}
    return parse_run(tree | {"cluster": asked | cluster})


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Growing:
    found = Growing(3)
    monkeypatch.setattr("ray.cluster_resources", found.resources)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", found.request)
    monkeypatch.setattr(launch, "NODES_INTERVAL_S", 0.01)
    return found


def test_a_cluster_that_grows_is_asked_for_the_nodes_of_the_workers(growing: Growing, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(launch.GROWS, "1")
    assert launch.check_cluster(run()) == 1
    assert growing.asked == [[{"CPU": 4, "GPU": 1}] * 3, []]
    assert launch.check_cluster(run()) == 1
    assert len(growing.asked) == 2, "what is there is not asked for"


def test_nodes_that_do_not_come_are_waited_for_and_then_named(growing: Growing, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(launch.GROWS, "1")
    growing.nodes = 2
    with pytest.raises(InputError, match="needs 12 CPUs; the cluster has 8"):
        launch.check_cluster(run())
    assert launch.check_cluster(run(min_workers=2)) == 1, "fewer are enough"


def test_another_cluster_is_asked_for_nothing(growing: Growing):
    with pytest.raises(InputError, match="needs 12 CPUs; the cluster has 0"):
        launch.check_cluster(run())
    assert growing.asked == []


class Recorder:
    """A display and a tracker that keep what they are given."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.tags: dict[str, str] = {}
        self.files: dict[str, str] = {}

    def line(self, line: Any) -> None:
        self.lines.append(line)

    def log(self, metrics: Any, step: int) -> None:
        assert all(isinstance(value, int | float) for value in metrics.values())

    def tag(self, tags: dict[str, str]) -> None:
        self.tags |= tags

    def log_file(self, source: str, name: str) -> None:
        self.files[name] = source


def anomaly(step: int, name: str) -> dict[str, Any]:
    return {"step": step, "anomaly": {"name": name, "evidence": "e", "advice": "a"}}


def test_anomalies_of_one_step_are_all_told_and_those_before_a_resumption_stay_tracked(tmp_path: Path):
    folder = Folder(str(tmp_path))
    for name in ("recipe.yaml", "data_report.json"):
        folder.write(name, b"{}")
    folder.append("metrics.jsonl", json.dumps(anomaly(2, "exploding_kl")))
    seen = Recorder()
    recipe = run().model_copy(update={"tracking": TrackingConfig(kind="none")})
    follower = launch.Follower(recipe, folder, seen, None, {})  # type: ignore[arg-type]
    follower._tracker = seen  # type: ignore[assignment]
    follower.follow()
    assert (seen.lines, seen.tags) == ([], {}), "nothing is new"
    new = [{"step": 4, "loss": 0.5}, anomaly(4, "accuracy_dip"), anomaly(4, "overtraining")]
    for line in new:
        folder.append("metrics.jsonl", json.dumps(line))
    follower.follow()
    follower.follow()
    assert seen.lines == new
    assert seen.tags == {"anomalies": "exploding_kl,accuracy_dip,overtraining"}
    kept = json.loads(seen.files["anomalies.json"])
    assert kept[0] == {"name": "exploding_kl", "step": 2, "evidence": "e", "advice": "a"}
    assert [(one["name"], one["step"]) for one in kept[1:]] == [("accuracy_dip", 4), ("overtraining", 4)]
