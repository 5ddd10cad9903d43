"""What does ASHA spend of a full grid, and does it pick as well?

The embedded task of `dpo-ray demo`: for each seed a base model, its own preference pairs, and beta x learning rate as
whole Ray Train runs, two at a time, once to the end and once under ASHA. Its pick is judged by the accuracy that the
same settings have in the full grid, against the 95 % interval of the full grid's best.

    python benchmarks/sweep.py [--seeds 3]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import table, write

BETAS = (0.05, 0.2, 1.0)
RATES = (5e-5, 2e-4, 7e-4)
EVERY_STEPS = 6
METRIC = "rewards/accuracies"


def studies_of(folder: Path, seed: int) -> dict[str, Any]:
    """The study to the end, and the study under ASHA."""
    from dpo_ray.demo import demo_recipe, make_base_and_pairs
    from dpo_ray.prepare import resolve
    from dpo_ray.space import Choice, Space
    from dpo_ray.sweep import Search, sweep

    base = make_base_and_pairs(folder, seed)
    overrides = {"eval__every_steps": EVERY_STEPS, "cluster__num_workers": 1}
    run = resolve(demo_recipe(folder, "demo-dpo", base, "pairs.jsonl", seed, **overrides))
    settings = {"loss.beta": BETAS, "optim.learning_rate": RATES}
    choices = {key: [Choice(value, f"{value:g}") for value in values] for key, values in settings.items()}
    space = Space("grid", choices, [seed], [(METRIC, "max")], "Which beta, and which learning rate?")
    return {
        name: sweep(run, space, Search(scheduler=name, grace_steps=EVERY_STEPS), name=name) for name in ("none", "asha")
    }


def result_of(seed: int, full: dict[str, Any], asha: dict[str, Any]) -> dict[str, Any]:
    from dpo_ray.study import read_study, search_standing

    def steps(study: dict[str, Any]) -> int:
        return sum(trial["steps"] for trial in study["trials"])

    standing, picked = search_standing(read_study(full)), search_standing(read_study(asha))
    assert standing is not None
    assert picked is not None
    best = standing.best.estimate(METRIC)
    same = next(found for found in standing.ranked if found.key == picked.best.key).estimate(METRIC)
    assert best is not None
    assert same is not None
    assert best.low is not None
    return {
        "seed": seed,
        "full_steps": steps(full),
        "asha_steps": steps(asha),
        "seconds": [full["seconds"], asha["seconds"]],
        "best": [best.value, best.low, best.high],
        "best_settings": standing.best.settings,
        "picked_settings": picked.best.settings,
        "picked_accuracy": same.value,
        "is_within": same.value >= best.low,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            found = studies_of(Path(folder) / str(seed), seed)
            results.append(result_of(seed, found["none"], found["asha"]))
            print(results[-1], flush=True)
    ray.shutdown()
    rows = [
        [
            str(r["seed"]),
            str(r["full_steps"]),
            f"{r['asha_steps']} ({r['asha_steps'] / r['full_steps']:.0%})",
            "{:.3f} ({:.3f} to {:.3f})".format(*r["best"]),
            f"{r['picked_accuracy']:.3f}",
            "yes" if r["is_within"] else "no",
        ]
        for r in results
    ]
    head = ["seed", "steps, full grid", "steps, ASHA", "best of the full grid", "what ASHA picked", "within"]
    write("sweep", vars(options), results, table(head, rows))


if __name__ == "__main__":
    main()
