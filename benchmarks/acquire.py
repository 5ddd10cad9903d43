"""Which strategy wins at which budget? The whole pipeline of `dpo-ray acquire` over paired seeds.

Two tasks, each one recipe: the embedded one (`demo-acquire`: the model writes the candidates, the true reward labels
them with 5 % of mistakes), and true and false answers to questions with hidden labels (TruthfulQA), on a real model of
260,000 weights. The metric is the held-out `rewards/accuracies`. Every arm is a chain of Ray Data passes and Ray Train
runs.

    python benchmarks/acquire.py [--task demo|truthfulqa] [--seeds 8] [--strategies a,b,...] [--folder FOLDER]

With --folder the arms stay there, and a benchmark that was broken off goes on.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SHARED, over_seeds, table, write

STRATEGIES = ("random", "entropy", "certainty", "entropy_then_certainty", "bald", "d_optimal", "oracle_gap")


def demo_task(folder: Path) -> Any:
    """The recipe that ships with the package, on a model that the demo's first half makes."""
    from dpo_ray.config import load_run
    from dpo_ray.demo import RECIPES, make_base_and_pairs

    base = folder / "task" / "demo-sft" / "model"
    if not base.exists():
        make_base_and_pairs(folder / "task", 0)
    paths = {
        "storage.path": str(folder),
        "model.path": str(base),
        "data.sources.0.path": str(folder / "task" / "sft.jsonl"),
        "data.eval.sources.0.path": str(folder / "task" / "pairs.jsonl"),
    }
    return load_run(RECIPES / "demo-acquire.yaml", paths)


def truthfulqa_task(folder: Path) -> Any:
    """Pairs of a true and a false answer to a question; which is which is hidden."""
    from dpo_ray.config import parse_run

    data = SHARED / "data" / "truthfulqa" / "pairs.jsonl.gz"
    if not data.exists():
        print(f"no pairs at {data}")
        sys.exit(0)
    return parse_run(
        {
            "name": "truthfulqa",
            "storage": {"path": str(folder)},
            "model": {"path": str(SHARED / "models" / "stories260K")},
            "data": {
                "sources": [{"path": str(data)}],
                "eval": {"num_pairs": 512},
                "max_tokens": 160,
            },
            "loss": {"kind": "dpo", "beta": 0.1},
            # What is fast for so small a model on a CPU: nothing packed, short rows.
            "batch": {"pairs_per_step": 8, "tokens_per_device": 1024, "layout": "padded"},
            "optim": {"learning_rate": 3e-4},
            "train": {"epochs": 4},
            "engine": {"precision": "fp32", "zero_stage": 0},
            "eval": {"every_steps": 1000},
            "early_stopping": None,
            "checkpoint": {"every_steps": 1000, "keep": 1},
            "tracking": {"kind": "none"},
            "acquire": {
                "labels_per_round": 32,
                "budget": 64,
                "pool": {"per_label": 4},
                "batch": {"per_prompt": 4},
                "generate": {"max_tokens": 24, "entropy_samples": 4},
            },
        }
    )


def told(tree: dict[str, Any]) -> str:
    """Values at each budget, and the contrasts to random."""
    from dpo_ray.acquisition.standings import contrasts, curves_of

    curves = curves_of(tree)
    budgets = sorted({labels for by_labels in curves.values() for labels in by_labels})
    values = [
        [strategy, *(over_seeds(list(by[labels].values()), 3) for labels in budgets)] for strategy, by in curves.items()
    ]
    rows = [
        [
            contrast.strategy,
            "all" if contrast.labels is None else str(contrast.labels),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*contrast.difference),
            f"{contrast.p_value:.3g}",
            f"{contrast.wins} of {contrast.wins + contrast.losses}",
            contrast.verdict,
        ]
        for contrast in contrasts(curves, 1)
    ]
    return "\n\n".join(
        [
            table([tree["metric"], *(f"{labels} labels" for labels in budgets)], values),
            table(["against random", "labels", "difference (95 %)", "p, corrected", "seeds won", ""], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("demo", "truthfulqa"), default="demo")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    from dpo_ray.acquire import acquire
    from dpo_ray.displays import Live

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run = {"demo": demo_task, "truthfulqa": truthfulqa_task}[options.task](folder)
        tree = acquire(
            run,
            strategies=options.strategies.split(","),
            num_seeds=options.seeds,
            resume=(folder / run.name / "recipe.yaml").exists(),
            display=Live(),
        )
        write(f"acquire-{options.task}", vars(options), tree["arms"], told(tree))
    ray.shutdown()


if __name__ == "__main__":
    main()
