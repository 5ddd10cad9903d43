"""Tracking against a real SQLite store, and against stores that are away."""

import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.tracking import MlflowTracker, NoTracker, open_tracker, recipe_params, redacted, tracking_uri


def recipe(storage: Path | str, **tracking: Any) -> RunConfig:
    sources = [{"path": "s3://key:secret@bucket/a.jsonl", "columns": {"prompt": "q"}}, {"path": "b"}]
    return parse_run(
        {
            "name": "a",
            "storage": {"path": str(storage)},
            "model": {"path": "m"},
            "data": {"sources": sources},
            "tracking": tracking,
        }
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder; its store is made once, which takes a second."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tracker(store: Path) -> MlflowTracker:
    opened = open_tracker(recipe(store))
    assert isinstance(opened, MlflowTracker)
    return opened


@pytest.fixture
def client(store: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")


def test_a_run_is_in_the_store_beside_the_runs(
    store: Path, tracker: MlflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run_id = tracker.start("hh-beta01", recipe_params(recipe(store)), {"world_size": "2"})
    assert run_id is not None
    assert client.get_run(run_id).info.status == "RUNNING"
    tracker.log({"loss": 0.7, "rewards/accuracies": 0.5}, step=1)
    tracker.log({"loss": 0.6, "eval/rewards/accuracies": 0.625}, step=2)
    tracker.log_file("name: a\n", "recipe.yaml")
    (tmp_path / "report.json").write_text('{"kept": 3}')
    tracker.log_file(tmp_path / "report.json", "data_report.json")
    tracker.finish("stopped_early")

    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status, run.data.tags["world_size"]) == ("hh-beta01", "FINISHED", "2")
    assert client.get_experiment(run.info.experiment_id).name == "dpo-ray"
    assert run.data.params["loss.beta"] == "0.1"
    assert run.data.params["optim.betas"] == "[0.9, 0.95]"
    assert run.data.params["data.sources.1.path"] == "b"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 0.7), (2, 0.6)]
    assert run.data.metrics["eval/rewards/accuracies"] == 0.625
    assert sorted(f.path for f in client.list_artifacts(run_id)) == ["data_report.json", "recipe.yaml"]
    kept = store / "mlartifacts" / run_id / "artifacts" / "data_report.json"
    assert kept.read_text() == '{"kept": 3}'
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "something was written where we stand"


def test_tags_that_come_late_go_with_the_next_metrics_and_the_last_word_counts(
    tracker: MlflowTracker, client: MlflowClient
):
    run_id = tracker.start("a", {}, {"note": "first"})
    tracker.tag({"anomalies": "exploding_kl"})
    tracker.tag({"anomalies": "exploding_kl,accuracy_dip", "source": "s3://key:secret@bucket"})
    tracker.finish("completed")
    tags = client.get_run(run_id).data.tags
    assert (tags["note"], tags["anomalies"], tags["source"]) == (
        "first",
        "exploding_kl,accuracy_dip",
        "s3://***@bucket",
    )


@pytest.mark.parametrize(
    ("status", "theirs"), [("completed", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_the_end_of_a_run_is_told(tracker: MlflowTracker, client: MlflowClient, status: Any, theirs: str):
    run_id = tracker.start("a", {})
    tracker.finish(status)
    assert client.get_run(run_id).info.status == theirs


def test_resuming_continues_the_same_run(store: Path, tracker: MlflowTracker, client: MlflowClient):
    first = tracker.start("a", {"train.seed": 1})
    tracker.log({"loss": 0.7}, step=1)
    tracker.finish("interrupted")
    again = open_tracker(recipe(store))
    assert again.start("a", {"train.seed": 2}, {"attempt": "2"}, resume=first) == first
    assert client.get_run(first).info.status == "RUNNING"
    again.log({"loss": 0.6}, step=2)
    again.finish("completed")
    run = client.get_run(first)
    assert (run.info.status, run.data.params, run.data.tags["attempt"]) == ("FINISHED", {"train.seed": "1"}, "2")
    assert [m.step for m in client.get_metric_history(first, "loss")] == [1, 2]


def test_resuming_a_run_that_the_store_lost_begins_a_new_one(tracker: MlflowTracker, caplog: pytest.LogCaptureFixture):
    lost = "0123456789abcdef0123456789abcdef"
    assert tracker.start("a", {}, resume=lost) not in (None, lost)
    assert lost in caplog.text


def test_long_values_are_cut_where_it_shows_and_odd_keys_fit(tracker: MlflowTracker, client: MlflowClient):
    params = {f"key.{i}": i for i in range(250)} | {"long": "x" * 10_000, "data.columns.a?": "b", "empty": ""}
    run = client.get_run(tracker.start("a", params, {"note": "y" * 10_000}))
    assert len(run.data.params) == 253
    assert run.data.params["key.249"] == "249"
    assert run.data.params["long"].startswith("xxx")
    assert run.data.params["long"].endswith("x ... (cut)")
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["data.columns.a_"] == "b"
    assert run.data.tags["note"].endswith("y ... (cut)")


def test_many_metrics_and_odd_values_arrive(tracker: MlflowTracker, client: MlflowClient):
    run_id = tracker.start("a", {})
    for step in range(2500):
        tracker.log({"loss": float(step)}, step)
    tracker.log({"grad_norm": math.nan}, 1)
    tracker.finish("completed")
    assert [m.value for m in client.get_metric_history(run_id, "loss")] == [float(step) for step in range(2500)]
    assert math.isnan(client.get_run(run_id).data.metrics["grad_norm"])


def test_a_batch_holds_no_more_than_a_server_takes(store: Path):
    tracker = MlflowTracker(f"sqlite:///{store}/mlflow.db", "dpo-ray", None, send_every_s=60.0)
    tracker.start("a", {})
    tracker._client = recorder = Recorder()
    for step in range(2501):
        tracker.log({"loss": float(step)}, step)
    tracker.finish("completed")
    assert [len(call["metrics"]) for name, _, call in recorder.calls if name == "log_batch"] == [1, 1000, 1000, 500]


def test_secrets_in_addresses_reach_no_tracker(store: Path, tracker: MlflowTracker, client: MlflowClient):
    run_id = tracker.start("a", recipe_params(recipe(store)), {"source": "https://u:secret@host/x"})
    tracker.log_file("path: s3://key:secret@bucket/a\n", "recipe.yaml")
    run = client.get_run(run_id)
    assert run.data.params["data.sources.0.path"] == "s3://***@bucket/a.jsonl"
    assert "secret" not in str(run.data)
    assert (store / "mlartifacts" / run_id / "artifacts" / "recipe.yaml").read_text() == "path: s3://***@bucket/a\n"
    assert redacted("mail me@host, see http://host/a@b") == "mail me@host, see http://host/a@b"


def test_a_model_is_registered_where_it_lies(store: Path, tracker: MlflowTracker, client: MlflowClient, tmp_path: Path):
    run_id = tracker.start("a", {})
    assert tracker.register(str(tmp_path), "policy") == "1"
    assert tracker.register(str(tmp_path), "policy") == "2"
    version = client.get_model_version("policy", "2")
    assert (version.source, version.run_id, version.aliases) == (str(tmp_path), run_id, ["challenger"])
    with pytest.raises(RunFailed, match="the model is in /m but is not registered as a/b"):
        tracker.register("/m", "a/b")


def test_a_server_gets_the_files_of_a_model_that_lies_here(tmp_path: Path):
    tracker = MlflowTracker("http://127.0.0.1:9", "dpo-ray", None)
    tracker._client = recorder = Recorder()
    tracker.register(str(tmp_path), "policy")
    tracker.register("s3://bucket/model", "policy")
    uploads = [args[1:] for name, args, _ in recorder.calls if name == "log_artifacts"]
    sources = [args[1] for name, args, _ in recorder.calls if name == "create_model_version"]
    assert uploads == [(str(tmp_path), "model")]
    assert sources == ["artifacts:/run/model", "s3://bucket/model"]


@pytest.mark.parametrize("name", ["a/b", "a:b", " "])
def test_a_name_that_no_model_can_have_is_refused_before_the_run(tmp_path: Path, name: str):
    with pytest.raises(InputError, match=r"tracking\.register_as"):
        open_tracker(recipe(tmp_path, register_as=name))
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """A client that does nothing but remember what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(info=SimpleNamespace(artifact_uri="artifacts:/run"), version=1)

        return call


class Flaky:
    """A client that is away whenever `is_away`, and counts the calls."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.is_away = False
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        if self.is_away:
            raise MlflowException("first line\nsecond line")
        return getattr(self._client, name)


def test_a_store_that_goes_away_costs_one_warning_and_no_metric(
    store: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
):
    tracker = MlflowTracker(f"sqlite:///{store}/mlflow.db", "dpo-ray", None, send_every_s=0.0, retry_every_s=0.0)
    run_id = tracker.start("a", {})
    tracker._client = flaky = Flaky(client)
    tracker.log({"loss": 1.0}, 1)
    flaky.is_away = True
    for step in (2, 3):
        tracker.log({"loss": float(step)}, step)
    tracker.log_file("text", "a.txt")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "first line second line" in caplog.text
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1]
    flaky.is_away = False
    tracker.log({"loss": 4.0}, 4)
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4]
    assert [f.path for f in client.list_artifacts(run_id)] == ["a.txt"]
    flaky.is_away = True
    tracker.log({"loss": 5.0}, 5)
    assert len(caplog.records) == 1
    tracker.finish("completed")
    assert "never took 1 metric values and 0 files" in caplog.text


def test_a_store_that_is_away_is_not_asked_at_every_step(
    store: Path, client: MlflowClient, caplog: pytest.LogCaptureFixture
):
    tracker = MlflowTracker(f"sqlite:///{store}/mlflow.db", "dpo-ray", None, send_every_s=0.0, retry_every_s=60.0)
    tracker.start("a", {})
    tracker._client = flaky = Flaky(client)
    flaky.is_away = True
    for step in range(50):
        tracker.log({"loss": 1.0}, step)
    assert flaky.calls == 1
    flaky.is_away = False
    tracker.finish("completed")
    assert "never took" not in caplog.text


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://user:secret@127.0.0.1:9", "http://***@127.0.0.1:9: Connection refused"),
        ("./mlruns", "filesystem tracking backend"),
        ("sqlite:////dev/null/mlflow.db", "cannot write /dev/null"),
        ("gopher://x", "gopher"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_before_the_run(tmp_path: Path, uri: str, message: str):
    with pytest.raises(InputError) as caught:
        open_tracker(recipe(tmp_path, uri=uri)).start("a", {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_address_is_the_recipes_then_the_environments_then_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(recipe("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(recipe("s3://bucket/runs")) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert tracking_uri(recipe("runs")) == "http://env"
    assert tracking_uri(recipe("runs", uri="http://recipe")) == "http://recipe"


def test_the_first_use_of_a_store_prints_nothing(tmp_path: Path):
    code = f"""
from dpo_ray.config import parse_run
from dpo_ray.tracking import open_tracker
run = parse_run({recipe(tmp_path).model_dump()!r})
tracker = open_tracker(run)
tracker.start("a", {{}})
tracker.finish("completed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "mlflow.db").exists()


def test_no_tracking_takes_everything_and_keeps_nothing(tmp_path: Path):
    tracker = open_tracker(recipe(tmp_path, kind="none"))
    assert isinstance(tracker, NoTracker)
    assert tracker.start("a", {"b": 1}, resume="c") is None
    tracker.log({"loss": 1.0}, 1)
    tracker.log_file("text", "a")
    assert tracker.register("m", "n") is None
    tracker.finish("completed")
    assert list(tmp_path.iterdir()) == []
