"""Run folders for tests of what reads them: the files that a run and its evaluation write, with made numbers."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from dpo_ray.config import parse_run

Tree = dict[str, Any]

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
LONG = "It was a film about a train. " * 60


def evaluated_at(step: int) -> Tree:
    """A line of an evaluation; the accuracy is highest at step 40."""
    accuracy = 0.68 - abs(step - 40) / 400
    return {
        "step": step,
        "epoch": step / 80,
        "eval/loss": 0.69 - step / 500,
        "eval/rewards/chosen": -step / 200,
        "eval/rewards/rejected": -step / 60,
        "eval/rewards/margins": step / 60 - step / 200,
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/accuracies_low": accuracy - 0.06,
        "eval/rewards/accuracies_high": accuracy + 0.05,
        "eval/logps/chosen": -60 - step / 20,
        "eval/logps/rejected": -58 - step / 6,
        "eval/entropy": 2.0,
        "eval/kl": step / 300,
        "eval/num_pairs": 300,
    }


def trained_at(step: int) -> Tree:
    """A line of training."""
    return {
        "step": step,
        "epoch": step / 80,
        "loss": 0.7 - step / 300,
        "rewards/chosen": -step / 220,
        "rewards/rejected": -step / 55,
        "rewards/margins": step / 55 - step / 220,
        "rewards/accuracies": 0.5 + step / 400,
        "logps/chosen": -60.0,
        "logps/rejected": -59.0 - step / 6,
        "entropy": 2.0,
        "kl": step / 310,
        "num_pairs": 64,
        "grad_norm": 1.0 + 1 / step,
        "learning_rate": 1e-6,
        "pairs_per_second": 12.0,
    }


LINES = [trained_at(step) for step in (1, 10, 20, 30, 40, 50, 60)] + [evaluated_at(step) for step in (20, 40, 60)]


def without_prefix(line: Tree) -> Tree:
    return {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}


SUMMARY: Tree = {
    "status": "stopped_early",
    "stop_reason": "rewards/accuracies has not risen for 1 evaluation",
    "steps": 60,
    "num_steps": 80,
    "best_step": 40,
    "best_metric": "rewards/accuracies",
    "pairs_seen": 3840,
    "world_size": 4,
    "resumed_from_step": None,
    "restarts": 1,
    "lost_steps": 5,
    "eval": without_prefix(LINES[-1]),
    "best_eval": without_prefix(LINES[-2]),
    "anomalies": [
        {
            "name": "likelihood_displacement",
            "step": 40,
            "evidence": "logps/chosen fell by 2 nats while margins rose",
            "advice": "raise `loss.beta`",
        }
    ],
    "train_seconds": 1800.0,
    "pairs_per_second": 12.3456789,
    "tokens_per_second": 123456.7,
    "checkpoint_seconds": 20.0,
    "checkpoint_share": 0.011,
    "padding_fraction": 0.125,
    "time_split": {"forward": 0.3, "backward": 0.5, "evaluation": 0.15, "checkpoint": 0.05},
    "attention": "flex",
    "mfu": 0.41,
    "peak_memory_gib": 31.5,
    "overflowed_steps": 0,
    "skipped_steps": 2,
    "reference": {"computed": 8000, "from_store": 280},
    "data_fingerprint": "da7a",
    "reference_fingerprint": "5ef0",
    "model_path": "s3://ada:secret@bucket/runs/hh/model",
    "mlflow_run_id": "ab12",
    "versions": {"python": "3.11.7", "dpo-ray": "0.1.0", "torch": "9.8.7"},
    "wall_seconds": 2000.0,
}

DATA: Tree = {
    "sources": [
        {
            "path": "org/helpful-pairs",
            "rows": 4200,
            "pairs": 4140,
            "held_out": 300,
            "dropped": {"tie": 50, "empty_response": 10},
            "bad_rows": [],
            "contradictions": 7,
        },
        {
            "path": "s3://ada:secret@bucket/more.jsonl",
            "rows": 100,
            "pairs": 100,
            "held_out": 0,
            "dropped": {},
            "bad_rows": [],
            "contradictions": 0,
        },
    ],
    "eval_sources": [],
    "rows": 4300,
    "pairs": 4240,
    "contradictions": 7,
    "dropped": {"tie": 50, "empty_response": 10},
    "train": {
        "pairs": 3900,
        "from_cache": 0,
        "dropped": {"over_long": 40},
        "truncated": {"prompt": 3},
        "tokens": 1200000,
        "prompt_tokens": 400000,
        "response_tokens": 800000,
        "pair_tokens": {"median": 280, "p95": 700, "max": 1024},
        "chosen_longer": 0.62,
    },
    "held_out": {"pairs": 300, "dropped": {}, "truncated": {}, "tokens": 90000, "chosen_longer": 0.6},
    "left_out": {"weights": 0, "fraction": 11},
    "notes": ["a note on the data"],
    "fingerprint": "da7a",
}

RECIPE: Tree = {
    "name": "hh",
    "model": {"path": "org/base-model"},
    "data": {"sources": [{"path": "org/helpful-pairs"}, {"path": "s3://bucket/more.jsonl"}], "max_tokens": 2048},
    "loss": {"kind": "dpo", "beta": 0.05},
    "optim": {"learning_rate": 1e-6},
}


def recipe(**sections: Any) -> Tree:
    """As a run resolves it; sections laid over `RECIPE`."""
    return parse_run(RECIPE | sections).model_dump(mode="json")


def _estimate(value: float, low: float, high: float) -> Tree:
    return {"value": value, "low": low, "high": high}


def evaluation() -> Tree:
    """`evaluation.json` with every part."""
    draw = random.Random(0)
    chosen = [draw.gauss(0.2, 1) for _ in range(300)]
    rejected = [draw.gauss(-0.6, 1.2) for _ in range(300)]
    edges = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    bins = [
        {"low": low, "high": low + 0.1, "confidence": low + 0.05, "accuracy": low, "num_pairs": 60}
        for low in edges[:-1]
    ]
    group = {"num_pairs": 150, "rewards/accuracies": 0.7, "low": 0.62, "high": 0.77, "rewards/margins": 0.5}
    group["expected_calibration_error"] = 0.04
    rate = {
        "num_prompts": 200,
        "missing": 1,
        "length_controlled": _estimate(0.58, 0.51, 0.65),
        "length_controlled_alpaca_eval": 0.572,
        "cost": {"requests": 400},
    }
    return {
        "model": "runs/hh",
        "model_fingerprint": "f00d",
        "against": [{"name": "base", "path": "s3://ada:secret@bucket/base", "fingerprint": "ba5e"}],
        "reference": None,
        "data_fingerprint": "da7a",
        "beta": 0.05,
        "created": "2026-01-31T12:00:00+00:00",
        "seconds": 41.2,
        "versions": {"dpo-ray": "0.1.0"},
        "held_out": {
            "num_pairs": 300,
            "metrics": {
                "loss": 0.61,
                "rewards/accuracies": 0.68,
                "rewards/accuracies_low": 0.62,
                "rewards/accuracies_high": 0.73,
                "rewards/margins": 0.8,
                "num_pairs": 300,
            },
            "length_controlled_accuracy": _estimate(0.66, 0.6, 0.72),
            "longer_is_better": _estimate(0.61, 0.55, 0.66),
            "calibration": {
                "calibration_error": _estimate(0.05, 0.02, 0.09),
                "expected_calibration_error": 0.06,
                "if_calibrated": 0.03,
                "temperature": 1.2,
                "brier": 0.21,
                "bins": bins,
            },
            "by_source": [{"source": "org/helpful-pairs", **group}],
            "by_length": [{"tokens": "1-31", **group}],
            "rewards": {
                "before": {"chosen": [0.0] * 300, "rejected": [0.0] * 300},
                "after": {"chosen": chosen, "rejected": rejected},
            },
        },
        "win_rate": [
            {
                "against": "base",
                "judge": "function:demo",
                "wins": 120,
                "ties": 4,
                "losses": 75,
                **_estimate(0.613, 0.54, 0.68),
            }
            | rate,
            {
                "against": "other",
                "judge": "llm:judge",
                "wins": 90,
                "ties": 20,
                "losses": 89,
                **_estimate(0.503, 0.43, 0.57),
            }
            | rate
            | {
                "length_controlled": None,
                "length_controlled_alpaca_eval": None,
                "first_position": _estimate(0.56, 0.51, 0.61),
            },
        ],
        "ranking": [
            {"model": "hh", "rating": 0.3, "low": 0.1, "high": 0.5},
            {"model": "base", "rating": -0.3, "low": -0.5, "high": -0.1},
        ],
        "retention": {
            "perplexity": [
                {
                    "source": "org/books",
                    "num_texts": 64,
                    "num_tokens": 9000,
                    "before": 12.1,
                    "after": 12.6,
                    "change": math.log(12.6 / 12.1),
                    "low": 0.01,
                    "high": 0.07,
                }
            ],
            "tasks": [
                {
                    "task": "arc",
                    "metric": "acc",
                    "before": 0.5,
                    "after": 0.49,
                    "change": -0.01,
                    "low": -0.03,
                    "high": 0.01,
                }
            ],
        },
        "kl": _estimate(3.2, 2.9, 3.5) | {"per_token": 0.07, "num_responses": 400},
        "drift": [
            {
                "name": "response length",
                "unit": "tokens",
                "before": 40.0,
                "after": 55.0,
                "change": 15.0,
                "low": 9.0,
                "high": 21.0,
            }
        ],
        "examples": [
            {
                "prompt": f"Tell me of a film. {HOSTILE}",
                "before": "It was dull.",
                "after": LONG,
                "preferred": "after",
                "note": None,
            },
            {"prompt": "And another?", "before": HOSTILE, "after": "No.", "preferred": None, "note": "unfinished"},
        ],
    }


def write_run(
    path: Path,
    *,
    lines: list[Tree] | None = None,
    summary: Tree | None = None,
    data: Tree | None = None,
    settings: Tree | None = None,
    margins: dict[int, list[float]] | None = None,
    evaluated: Tree | None = None,
) -> Path:
    """A run folder; what is not given is as above, but margins and an evaluation are there only where given."""
    path.mkdir(parents=True)
    given = LINES if lines is None else lines
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    (path / "summary.json").write_text(json.dumps(SUMMARY if summary is None else summary))
    (path / "data_report.json").write_text(json.dumps(DATA if data is None else data))
    (path / "recipe.yaml").write_text(yaml.safe_dump(settings or recipe(name=path.name)))
    for step, values in (margins or {}).items():
        (path / "held_out").mkdir(exist_ok=True)
        kept = {f"pair-{i}": value for i, value in enumerate(values)}
        (path / "held_out" / f"step-{step:06d}.json").write_text(json.dumps(kept))
    if evaluated is not None:
        (path / "evaluation").mkdir()
        (path / "evaluation" / "evaluation.json").write_text(json.dumps(evaluated))
    return path


def complete_run(path: Path) -> Path:
    """A run with everything that a report can show."""
    draw = random.Random(1)
    margins = {step: [draw.gauss(step / 60, 1) for _ in range(300)] for step in (20, 40, 60)}
    return write_run(path, margins=margins, evaluated=evaluation())
