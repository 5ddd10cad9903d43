"""The commands as a person runs them, in processes of their own: train, Ctrl-C, --resume, evaluate, export, report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("dpo-ray"))


@pytest.fixture(scope="module")
def environment(cluster: None) -> dict[str, str]:
    """Commands join the cluster of the tests instead of starting their own."""
    import ray

    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(scope="module")
def recipe(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tree = {
        "name": "hh",
        "storage": {"path": str(folder / "runs")},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/hh_rlhf/helpful-base.test.jsonl.gz")}],
            "max_tokens": 200,
            "num_pairs": 96,
            "eval": {"num_pairs": 32},
        },
        "batch": {"pairs_per_step": 4, "tokens_per_device": 2048},
        "optim": {"learning_rate": 3e-4},
        "train": {"log_every_steps": 1},
        "engine": {"precision": "fp32", "zero_stage": 1},
        "eval": {"every_steps": 12},
        "early_stopping": {"patience": 5},
    }
    path = folder / "hh.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(environment: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(environment: dict[str, str], recipe: Path) -> dict[str, Any]:
    """A run that was interrupted by Ctrl-C and then continued; its summary as `--json` gave it."""
    process = subprocess.Popen([COMMAND, "train", str(recipe)], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if line.startswith("step 3:"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, "".join(told)
    assert "continue with --resume" in "".join(told)
    done = run(environment, "train", str(recipe), "--resume", "--json")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_ctrl_c_saves_and_resume_completes(trained: dict[str, Any], recipe: Path):
    assert trained["status"] == "completed"
    assert 3 <= trained["resumed_from_step"] < trained["steps"] == 24
    lines = [json.loads(line) for line in (recipe.parent / "runs/hh/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))


def test_mlflow_has_one_run_with_parameters_metrics_and_reports(trained: dict[str, Any], recipe: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{recipe.parent}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'dpo-ray'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == trained["mlflow_run_id"]
    assert found.info.status == "FINISHED"
    assert found.data.params["loss.beta"] == "0.1"
    assert found.data.metrics["eval/rewards/accuracies"] == pytest.approx(trained["eval"]["rewards/accuracies"])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted({entry.step for entry in history}) == list(range(1, 25))
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"recipe.yaml", "data_report.json", "summary.json"} <= names


def test_evaluate_gives_the_runs_own_numbers(trained: dict[str, Any], recipe: Path, environment: dict[str, str]):
    done = run(environment, "evaluate", str(recipe.parent / "runs/hh"), "--json")
    found = json.loads(done.stdout)
    for name, value in trained["best_eval"].items():
        assert found[f"eval/{name}"] == pytest.approx(value, abs=1e-4), name


def test_evaluate_takes_any_model_and_pairs(trained: dict[str, Any], shared: Path, environment: dict[str, str]):
    start = str(shared / "models/stories260K")
    pairs = str(shared / "data/truthfulqa/pairs.jsonl.gz")
    done = run(
        environment,
        *("evaluate", start, "data.max_tokens=256", "engine.precision=fp32", "data.sources.0.num_pairs=50"),
        *("--data", pairs, "--reference", start, "--json"),
    )
    found = json.loads(done.stdout)
    assert found["eval/num_pairs"] == 50
    assert found["eval/rewards/accuracies"] == 0.5  # a model against itself: every pair is a tie


def test_export_writes_any_checkpoint(trained: dict[str, Any], recipe: Path, environment: dict[str, str]):
    from transformers import AutoModelForCausalLM

    folder = recipe.parent / "runs/hh"
    output = recipe.parent / "exported"
    run(environment, "export", str(folder), "--output", str(output), "--step", str(trained["steps"]))
    AutoModelForCausalLM.from_pretrained(output)
    assert f"step {trained['steps']}" in (output / "README.md").read_text()
    told = run(environment, "export", str(folder), "--output", str(output), code=2).stderr
    assert "is not empty" in told
    told = run(environment, "export", str(folder), "--step", "999", code=2).stderr
    assert "no checkpoint of step 999" in told


def test_report_draws_what_the_run_wrote(trained: dict[str, Any], recipe: Path, environment: dict[str, str]):
    run(environment, "report", str(recipe.parent / "runs/hh"))
    assert (recipe.parent / "runs/hh/report.png").read_bytes().startswith(b"\x89PNG")
    assert "rewards/accuracies" in (recipe.parent / "runs/hh/report.html").read_text()


def test_a_worker_that_fails_gives_one_line_and_exit_code_3(recipe: Path, environment: dict[str, str]):
    """A learning rate at which the loss is soon not a number: the run stops, names the pairs, keeps the folder."""
    told = run(environment, "train", str(recipe), "name=broken", "optim.learning_rate=1e30", code=3).stderr
    assert "is not finite" in told
    assert "Traceback" not in told
    folder = recipe.parent / "runs/broken"
    assert len(json.loads((folder / "bad_steps.jsonl").read_text())["pair_ids"]) == 4
    assert not (folder / "model").exists()
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
