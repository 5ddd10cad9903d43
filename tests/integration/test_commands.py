"""The commands as a person runs them, in processes of their own: train, Ctrl-C, --resume, evaluate, export, report."""

import json
import math
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


@pytest.fixture(scope="module")
def evaluated(
    trained: dict[str, Any], recipe: Path, shared: Path, environment: dict[str, str]
) -> tuple[dict[str, Any], Path]:
    """`dpo-ray evaluate RUN`: win rate, retention, KL and the rest by one command; its `--json`, and the folder."""
    (recipe.parent / "taste_of_words.py").write_text(
        "def plain(prompt, response):\n    words = response.split()\n    return len(set(words)) / max(1, len(words))\n"
    )
    questions = recipe.parent / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 7, "turns": ["Once upon a time?", "And then?"]}) + "\n")
    done = run(
        environment | {"PYTHONPATH": str(recipe.parent)},
        *("evaluate", str(recipe.parent / "runs/hh"), "--json", "evaluate.num_prompts=24"),
        "evaluate.write.max_tokens=24",
        "evaluate.judge={kind: function, function: 'taste_of_words:plain'}",
        f"evaluate.mt_bench={questions}",
        "evaluate.retention.max_tokens=128",
        "evaluate.retention.num_texts=20",
        f"evaluate.retention.sources=[{{path: {shared}/data/sft_text/c4_demo.jsonl.gz}}, "
        f"{{path: {shared}/data/sft_text/wiki_demo.jsonl.gz}}]",
    )
    return json.loads(done.stdout), recipe.parent / "runs/hh/evaluation"


def test_evaluate_gives_the_runs_own_numbers(evaluated: tuple[dict[str, Any], Path], trained: dict[str, Any]):
    found, _ = evaluated
    for name, value in trained["best_eval"].items():
        assert found["held_out"]["metrics"][name] == pytest.approx(value, abs=1e-4), name
    assert found["data_fingerprint"] == trained["data_fingerprint"]
    assert sum(group["num_pairs"] for group in found["held_out"]["by_length"]) == 32


def test_evaluate_tells_win_rate_retention_kl_and_drift(evaluated: tuple[dict[str, Any], Path]):
    found, folder = evaluated
    (rate,) = found["win_rate"]
    assert rate["against"] == "reference"
    assert rate["judge"] == "function:taste_of_words:plain"
    assert rate["wins"] + rate["ties"] + rate["losses"] == rate["num_prompts"] == 24
    assert rate["low"] <= rate["value"] <= rate["high"]
    assert found["kl"]["num_responses"] == 24
    assert found["kl"]["value"] > 0  # 24 steps of DPO at a high rate have gone somewhere
    first, second = found["retention"]["perplexity"]
    assert first["num_texts"] == second["num_texts"] == 20
    for text in (first, second):
        assert text["low"] <= text["change"] <= text["high"]
        assert text["change"] == pytest.approx(math.log(text["after"] / text["before"]), abs=1e-6)
    assert {change["name"] for change in found["drift"]} >= {"length", "repetition", "refusals"}
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert "win rate" in (folder / "evaluation.html").read_text().lower()


def test_evaluate_writes_what_outside_tools_read(evaluated: tuple[dict[str, Any], Path], environment: dict[str, str]):
    found, folder = evaluated
    outputs = json.loads((folder / "alpaca_eval/hh.json").read_text())
    assert len(outputs) == 24
    assert outputs[0].keys() == {"instruction", "output", "generator"}
    (answer,) = map(json.loads, (folder / "mt_bench/model_answer/hh.jsonl").read_text().splitlines())
    assert len(answer["choices"][0]["turns"]) == 2
    annotations = folder / "annotations.json"
    rows = [
        {"instruction": str(i), "output_1": "a", "generator_1": "reference", "output_2": "b", "generator_2": "hh"}
        | {"preference": 2.0 if i < 9 else 1.0}
        for i in range(12)
    ]
    annotations.write_text(json.dumps(rows))
    told = run(environment, "evaluate", str(folder.parent), "--annotations", str(annotations), "--json").stdout
    own, imported = json.loads(told)["win_rate"]
    assert own == found["win_rate"][0]
    assert (imported["wins"], imported["value"]) == (9, 0.75)


def test_evaluate_takes_any_model_and_pairs(
    trained: dict[str, Any], shared: Path, environment: dict[str, str], tmp_path: Path
):
    start = str(shared / "models/stories260K")
    pairs = str(shared / "data/truthfulqa/pairs.jsonl.gz")
    done = run(
        environment,
        *("evaluate", start, "data.max_tokens=256", "engine.precision=fp32", "data.sources.0.num_pairs=50"),
        *("--data", pairs, "--reference", start, "--json", "--output", str(tmp_path), "evaluate.num_prompts=0"),
        f"storage.path={tmp_path}",
    )
    found = json.loads(done.stdout)["held_out"]["metrics"]
    assert found["num_pairs"] == 50
    assert found["rewards/accuracies"] == 0.5  # a model against itself: every pair is a tie


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
