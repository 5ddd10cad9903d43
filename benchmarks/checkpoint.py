"""What do checkpoints cost a run, at the default cadence of 50 steps and at one of 10?

A real run through Ray Train: the model and pairs of train_vs_trl.py, two workers of one thread, ZeRO-2, and 2 pairs a
step, so that steps are short. The share is that of `summary.json`: the time that training waited for checkpoints, of
that and the time of its steps; uploads go on beside.

    python benchmarks/checkpoint.py [--steps 60] [--repeats 1] [--data hh|tldr]
"""

import tempfile
from pathlib import Path
from typing import Any

from common import arguments, data_of, make_model, recipe, spread, table, write

CADENCES = (50, 10)


def run_once(model: Path, data: str, storage: Path, steps: int, cadence: int) -> dict[str, Any]:
    from dpo_ray.launch import fit

    run = recipe(
        model,
        data,
        storage,
        2 * steps,
        name=f"every-{cadence}",
        batch__pairs_per_step=2,
        train__max_steps=steps,
        engine__zero_stage=2,
        cluster__num_workers=2,
        checkpoint__every_steps=cadence,
    )
    summary = fit(run).summary
    return {name: summary[name] for name in ("checkpoint_share", "checkpoint_seconds", "train_seconds")}


def main() -> None:
    parser = arguments(str(__doc__), pairs=0, repeats=1)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    data = data_of(options)
    import ray

    runs: dict[str, list[dict[str, Any]]] = {f"every {cadence} steps": [] for cadence in CADENCES}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", data)
        for repeat in range(options.repeats):
            for cadence in CADENCES:
                found = run_once(Path(folder) / "model", data, Path(folder) / str(repeat), options.steps, cadence)
                runs[f"every {cadence} steps"].append(found)
                print(f"{repeat + 1}/{options.repeats} every {cadence} steps: {found}", flush=True)
    ray.shutdown()
    rows = [
        [
            name,
            spread([100 * run["checkpoint_share"] for run in found], unit=" %"),
            spread([run["checkpoint_seconds"] for run in found]),
            spread([run["train_seconds"] for run in found], 1),
        ]
        for name, found in runs.items()
    ]
    head = ["checkpoints", "share of the time", "waited, s", "steps, s"]
    write("checkpoint", vars(options), runs, table(head, rows))


if __name__ == "__main__":
    main()
