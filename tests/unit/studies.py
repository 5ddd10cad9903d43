"""Constructed studies: what `study.json` holds, with values that are known."""

from collections.abc import Sequence
from typing import Any

import numpy as np

ACCURACIES, MARGINS, KL = "rewards/accuracies", "rewards/margins", "kl"


def trial(
    number: int, settings: dict[str, Any], value: float | None, *, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """A trial that ran 100 steps; its value is that of step 60, its best evaluation."""
    best = None
    if value is not None:
        best = {"step": 60, ACCURACIES: value, "loss": 0.6, KL: 0.1, MARGINS: 1.0, "num_pairs": 400}
    evaluations = [] if best is None else [{"step": s, ACCURACIES: best[ACCURACIES] - d} for s, d in STEPS]
    train = [] if best is None else [{"step": s, ACCURACIES: 0.5 + s / 250, "loss": 0.6} for s in range(10, 101, 10)]
    whole = {
        "id": f"t{number:03}",
        "number": number,
        "settings": settings,
        "labels": {},
        "seed": seed,
        "status": "completed" if best else "failed",
        "stop_reason": None,
        "error": None if best else "OutOfMemoryError: no memory",
        "attempts": 1,
        "confirms": None,
        "steps": 100,
        "num_steps": 100,
        "pairs_seen": 3200,
        "train_pairs": 1000,
        "train_seconds": 50.0,
        "folder": f"trials/t{number:03}",
        "best": best,
        "evaluations": evaluations,
        "train": train,
        "margins": None,
    }
    return whole | changes


STEPS = ((20, 0.06), (40, 0.02), (60, 0.0), (80, 0.01), (100, 0.03))


def study(trials: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    varied = list(dict.fromkeys(key for one in trials for key in one["settings"]))
    whole = {
        "name": "beta-study",
        "space": "beta",
        "question": "Which beta?",
        "status": "completed",
        "stop_reason": None,
        "objectives": [{"metric": ACCURACIES, "mode": "max"}],
        "search": "grid",
        "scheduler": "none",
        "varied": [*varied, "train.seed"],
        "reference": {"computed": 1200, "from_store": 300},
        "seconds": 3725.0,
        "recipe": {"name": "hh", "loss": {"beta": 0.1}},
        "trials": list(trials),
    }
    return whole | changes


def planted(num_seeds: int = 5, noise: float = 0.004) -> list[dict[str, Any]]:
    """Three betas: 0.1 is best, 0.03 is hardly worse, 1.0 clearly; what a seed does to all of them is larger."""
    rng = np.random.default_rng(0)
    means = np.array([0.697, 0.70, 0.60])
    noisy = rng.normal(0, noise, (3, num_seeds)) + rng.normal(0, 0.02, num_seeds)
    values = means[:, None] + noisy - noisy.mean(axis=1, keepdims=True)  # of these means exactly
    points = [(i, seed) for i in range(3) for seed in range(num_seeds)]
    return [
        trial(number, {"loss.beta": (0.03, 0.1, 1.0)[i]}, float(values[i, seed]), seed=seed)
        for number, (i, seed) in enumerate(points)
    ]


def sized(means: dict[int, float], num_seeds: int, noise: float = 0.003, **others: Any) -> list[dict[str, Any]]:
    """A value per number of training pairs and seed."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(0, 0.01, num_seeds)
    points = [(size, seed) for size in means for seed in range(num_seeds)]
    return [
        trial(
            i,
            {"data.fraction": size / max(means), **others},
            float(means[size] + seeds[seed] + rng.normal(0, noise)),
            seed=seed,
            train_pairs=size,
        )
        for i, (size, seed) in enumerate(points)
    ]
