"""`dpo-ray sweep` on real pairs: one reference pass, trials stopped, the driver killed and the study taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("dpo-ray"))


@pytest.fixture(scope="module")
def study(cluster: None, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study whose driver was killed in the middle of its second trial, and which was then taken up again."""
    import ray

    folder = tmp_path_factory.mktemp("sweep")
    recipe = {
        "name": "hh",
        "storage": {"path": str(folder)},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz")}],
            "max_tokens": 200,
            "num_pairs": 160,
            "eval": {"num_pairs": 32},
        },
        "batch": {"pairs_per_step": 8, "tokens_per_device": 4096},
        "optim": {"learning_rate": 3e-4},
        "engine": {"precision": "fp32", "zero_stage": 2},
        "eval": {"every_steps": 2},
        "early_stopping": None,
        "cluster": {"num_workers": 2},
    }
    (folder / "hh.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "space.yaml").write_text("question: Which beta?\nspace: {loss.beta: [0.3, 0.001], train.seed: [0]}\n")
    command = [COMMAND, "sweep", str(folder / "hh.yaml"), "--space", str(folder / "space.yaml"), "--json"]
    command += ["--scheduler", "asha", "--grace-steps", "2"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    whole = ray.available_resources()

    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    trials = folder / "hh-space/trials"
    end = time.monotonic() + 300
    while not any((path / "metrics.jsonl").exists() for path in trials.glob("001-*")):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    [done] = trials.glob("000-*")
    stamp = (done / "summary.json").stat().st_mtime_ns

    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    found: dict[str, Any] = json.loads(again.stdout)
    return (
        found
        | {"path": folder / "hh-space", "untouched": (done / "summary.json").stat().st_mtime_ns == stamp}
        | {"whole": whole}
    )


def test_the_study_is_complete_and_finished_trials_did_not_run_again(study: dict[str, Any]):
    assert study["status"] == "completed"
    first, second = study["trials"]
    assert (first["status"], first["attempts"]) == ("completed", 1)
    assert study["untouched"]
    assert second["attempts"] == 2
    assert second["status"] in ("completed", "stopped_by_scheduler")
    assert json.loads((study["path"] / "study.json").read_text())["trials"] == study["trials"]


def test_the_reference_was_computed_once(study: dict[str, Any]):
    assert study["reference"] == {"computed": 2 * (160 + 32), "from_store": 2 * (160 + 32)}  # the second time, found
    for trial in study["trials"]:
        summary = json.loads((Path(trial["folder"]) / "summary.json").read_text())
        assert summary["reference"] == {"computed": 0, "from_store": 2 * (160 + 32)}


def test_nothing_of_the_cluster_stays_reserved(study: dict[str, Any]):
    import ray
    from ray.util import placement_group_table

    end = time.monotonic() + 30
    while ray.available_resources().get("CPU") != study["whole"]["CPU"] and time.monotonic() < end:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == study["whole"]["CPU"]
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_the_best_recipe_is_ready_to_run(study: dict[str, Any]):
    from dpo_ray.config import load_run

    best = load_run(study["path"] / "best.yaml")
    values = {trial["settings"]["loss.beta"]: trial["best"]["rewards/accuracies"] for trial in study["trials"]}
    assert best.name == "hh-best"
    assert values[best.loss.beta] == max(values.values())


def test_the_report_is_there(study: dict[str, Any]):
    assert "Which beta?" in (study["path"] / "report.html").read_text()
    assert (study["path"] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_margins_of_held_out_pairs_say_the_accuracy(study: dict[str, Any]):
    for trial in study["trials"]:
        margins = trial["margins"].values()
        accuracy = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins)
        assert accuracy == pytest.approx(trial["best"]["rewards/accuracies"], abs=1e-9)
        assert len(margins) == trial["best"]["num_pairs"]


def test_mlflow_has_the_study_above_its_trials(study: dict[str, Any]):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study['path'].parent}/mlflow.db")
    experiment = client.get_experiment_by_name("dpo-ray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == study["mlflow_run_id"]]
    assert {run.data.tags["dpo_ray.trial"] for run in children} == {trial["id"] for trial in study["trials"]}
