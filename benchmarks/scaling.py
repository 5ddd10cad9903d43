"""How do 1 and 2 workers compare, at ZeRO 0 to 3, and what does a step move between them?

The model and pairs of train_vs_trl.py, 32 pairs a step, one thread a worker, wall-clock time of steps after the first,
the reference pass before and not counted. Bytes are those of ZeRO's collectives in one step, as each worker sees them;
docs/scaling.md reckons with them. Times need a machine with a free core for each worker.

    python benchmarks/scaling.py [--pairs 64] [--repeats 3] [--data hh|tldr]
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, data_of, make_model, ratios, recipe, spread, table, write

WORKERS = (1, 2)
STAGES = (0, 1, 2, 3)


def contender(workers: int, stage: int) -> str:
    return f"{workers} workers, ZeRO {stage}"


def worker(rank: int, num_workers: int, folder: Path, run: Any) -> None:
    """Train an epoch; rank 0 writes what it saw."""
    import torch
    from torch.distributed import barrier, destroy_process_group, init_process_group

    from dpo_ray.engine import ZeroEngine, sharded_loading
    from dpo_ray.models import load_policy
    from dpo_ray.prepare import prepare, step_order
    from dpo_ray.reference import ReferenceStore
    from dpo_ray.train import PairSet, Worker

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers))
    init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_workers)
    prepared = prepare(run)
    order = step_order(run, prepared.train.num_pairs)
    with sharded_loading(run.engine, run.optim):
        model = load_policy(run.model, "fp32", 0)
    trainer = Worker(ZeroEngine(model, run.engine, run.optim, order.num_steps), run, rank, num_workers)
    store = ReferenceStore(str(run.reference.store), "start", "fp32")
    pairs = PairSet(prepared.train, store, trainer.batch)
    trainer.step(pairs, order.pairs_of(1), 1, is_timed=True)
    moved = trainer.engine.communication_bytes()
    shares, num_pairs, seconds = trainer.times.shares(), 0, 0.0
    for step in range(2, order.num_steps + 1):
        barrier()
        began = time.perf_counter()
        trainer.step(pairs, order.pairs_of(step), step)
        seconds += time.perf_counter() - began
        num_pairs += len(order.pairs_of(step))
    if rank == 0:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.engine.model.parameters())
        result = {"pairs_per_s": num_pairs / seconds, "shares": shares, "bytes": moved, "parameters": parameters}
        (folder / "result.json").write_text(json.dumps(result))
    destroy_process_group()


def measure(model: Path, data: str, num_pairs: int, num_workers: int, stage: int) -> dict[str, Any]:
    import torch

    from dpo_ray.models import policy_source
    from dpo_ray.prepare import prepare
    from dpo_ray.reference import ReferenceStore, ResponseScorer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = {"engine__zero_stage": stage, "cluster__num_workers": num_workers, "batch__pairs_per_step": 32}
        run = recipe(model, data, folder, num_pairs, **overrides)
        store = ReferenceStore(str(run.reference.store), "start", "fp32")
        scorer = ResponseScorer(policy_source(run.model), "fp32", run.batch)
        store.write(scorer.score([pair.branches for pair in prepare(run).train_pairs]))
        torch.multiprocessing.spawn(worker, (num_workers, folder, run), nprocs=num_workers)  # type: ignore[no-untyped-call]
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result


def main() -> None:
    options = arguments(str(__doc__), pairs=64, repeats=3).parse_args()
    data = data_of(options)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    settings = [(workers, stage) for stage in STAGES for workers in WORKERS]
    runs: dict[str, list[dict[str, Any]]] = {contender(*setting): [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        for repeat in range(options.repeats):
            for setting in settings:
                name = contender(*setting)
                runs[name].append(measure(Path(folder), data, options.pairs, *setting))
                print(f"{repeat + 1}/{options.repeats} {name}: {runs[name][-1]}", flush=True)
    rates = {name: [run["pairs_per_s"] for run in found] for name, found in runs.items()}
    rows = []
    for workers, stage in settings:
        name = contender(workers, stage)
        last = runs[name][-1]
        moved = sum(last["bytes"].values()) / (4 * last["parameters"])
        times_one = spread(ratios(rates[name], rates[contender(1, stage)]), unit="x")
        rows.append([name, spread(rates[name], 3), times_one, f"{moved:.2f}", f"{last['shares']['communication']:.1%}"])
    head = ["", "pairs/s", "times one worker", "moved a step, in copies of the weights", "time in collectives"]
    write(f"scaling-{options.data}", vars(options), runs, table(head, rows))


if __name__ == "__main__":
    main()
