"""Tasks of lm-evaluation-harness before and after, paired over their examples. Its only import.

The harness scores each model in a process of its own on the cluster; what comes back is one number per example.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.config import RetentionConfig, RunConfig
from dpo_ray.errors import InputError
from dpo_ray.evaluate.win_rates import bootstrap
from dpo_ray.models import ModelSource, adapter_base, local_folder

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Scored(NamedTuple):
    """A task under one model."""

    metric: str
    by_example: dict[int, float]


def tasks(run: RunConfig, before: ModelSource, after: ModelSource, gpus_per_actor: float) -> list[dict[str, Any]]:
    """Each task's main metric before and after, with the change and its bootstrap interval over the examples.

    Raises:
        InputError: The harness is not installed, or knows no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("`evaluate.retention.tasks` needs lm-evaluation-harness: pip install dpo-ray[eval]")
    import ray

    cpus = run.cluster.cpus_per_worker
    ask = ray.remote(num_cpus=cpus, num_gpus=gpus_per_actor, max_retries=0)(task_scores)
    asked = [ask.remote(model, run.evaluate.retention, run.engine.precision, int(cpus)) for model in (before, after)]
    try:
        earlier, later = ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    return [_change(task, earlier[task], later[task], run.evaluate.seed) for task in earlier]


def _change(task: str, before: Scored, after: Scored, seed: int) -> dict[str, Any]:
    examples = sorted(before.by_example.keys() & after.by_example.keys())
    rows = np.array([(before.by_example[i], after.by_example[i]) for i in examples])
    change, low, high = bootstrap(rows, lambda drawn: float((drawn[:, 1] - drawn[:, 0]).mean()), seed=seed)
    earlier, later = rows.mean(0)
    return {
        "task": task,
        "metric": before.metric,
        "num_examples": len(examples),
        "before": float(earlier),
        "after": float(later),
        "change": change,
        "low": low,
        "high": high,
    }


def task_scores(model: ModelSource, settings: RetentionConfig, precision: str, num_threads: int) -> dict[str, Scored]:
    """What a model scores at each example of the tasks; groups are told by their tasks.

    Raises:
        InputError: The harness knows no such task, or a task has no metric that is a number for each example.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(max(1, num_threads))
    manager = TaskManager(include_path=settings.task_folder)
    unknown = sorted(set(settings.tasks) - set(manager.all_tasks))
    if unknown:
        raise InputError(f"`evaluate.retention.tasks`: lm-evaluation-harness knows no {', '.join(unknown)}")
    folder = local_folder(model)
    is_adapter = (folder / "adapter_config.json").exists()
    arguments = {
        "pretrained": str(local_folder(adapter_base(folder, model)) if is_adapter else folder),
        "dtype": DTYPES[precision],
        "trust_remote_code": model.trust_remote_code,
    }
    found = simple_evaluate(
        model="hf",
        model_args=arguments | ({"peft": str(folder)} if is_adapter else {}),
        tasks=list(settings.tasks),
        limit=settings.task_limit,
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=0,
        task_manager=manager,
    )
    assert found is not None  # it is None on other ranks than the first
    return {task: _scored(task, found["results"][task], samples) for task, samples in found["samples"].items()}


def _scored(task: str, result: Mapping[str, Any], samples: list[dict[str, Any]]) -> Scored:
    """By the task's first metric."""
    names = [key.partition(",") for key in result if "," in key and "_stderr" not in key]
    for metric, _, kept in names:
        own = [sample for sample in samples if sample.get("filter", "none") == kept]
        if own and all(isinstance(sample.get(metric), int | float) for sample in own):
            return Scored(metric, {int(sample["doc_id"]): float(sample[metric]) for sample in own})
    raise InputError(f"`evaluate.retention.tasks`: {task} has no metric that is a number for each example")
