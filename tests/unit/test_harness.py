"""Tasks of lm-evaluation-harness: one of our own, on disk, under a model that knows nothing."""

import json
from pathlib import Path

import pytest
import yaml

from dpo_ray.config import RetentionConfig
from dpo_ray.errors import InputError
from dpo_ray.evaluate.harness import Scored, _change, task_scores
from dpo_ray.models import ModelSource


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(8)]
    (tmp_path / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "even_numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "even.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "even.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def test_each_example_has_its_score(tiny_model: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    settings = RetentionConfig(tasks=("even_numbers",), task_folder=str(tasks), task_limit=6)
    (found,) = task_scores(ModelSource(str(tiny_model)), settings, "fp32", 1).values()
    assert found.metric == "acc"
    assert found.by_example.keys() == set(range(6))
    assert set(found.by_example.values()) <= {0.0, 1.0}


def test_an_unknown_task_is_named(tiny_model: Path):
    with pytest.raises(InputError, match=r"retention\.tasks.*knows no no_such_task_here"):
        task_scores(ModelSource(str(tiny_model)), RetentionConfig(tasks=("no_such_task_here",)), "fp32", 1)


def test_the_change_is_paired_over_examples():
    before = Scored("acc", {i: float(i % 2) for i in range(100)})
    after = Scored("acc", {i: 1.0 if i < 10 else float(i % 2) for i in range(100)})
    found = _change("t", before, after, seed=0)
    assert (found["before"], found["after"], found["num_examples"]) == (0.5, 0.55, 100)
    assert found["change"] == pytest.approx(0.05)
    assert 0 < found["low"] < 0.05 < found["high"] < 0.12  # unpaired it would reach below 0
