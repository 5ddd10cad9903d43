"""How near is a DPO epoch to the bare forward and backward of as many tokens, and where does the rest go?

The model and pairs of train_vs_trl.py, fp32, one CPU thread, CPU seconds, so that other work on the machine counts
little. Contenders take turns; each run is a process of its own.

    floor        forward and backward of every real token once, rows of 512 full to the last place, plain causal
                 attention, the output layer where a response is predicted; no loss, no optimizer, nothing else
    ours         this package: reference pass, planner, the attention that it chooses, ZeRO engine of one worker
    rows of N    ours with an additive mask over rows of about N tokens
    passes of N  ours with at most N tokens a forward pass, instead of 1,024

The floor's attention sees across pairs; ours does not, so it may be faster. The second table takes one more run of
`floor` and `ours` apart, by the time inside each part less that of the parts in it.

    python benchmarks/limit.py [--pairs 32] [--repeats 2] [--data hh|tldr] [--data-path FILE]
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from common import arguments, data_of, in_turns, make_model, ratios, recipe, run_floor, run_ours, spread, table, write

ROWS = (512, 1024)
PASSES = (4096,)
CONTENDERS = ("floor", "ours", *(f"rows of {n}" for n in ROWS), *(f"passes of {n}" for n in PASSES))
APART = ("floor, apart", "ours, apart")


def run(name: str, model: Path, data: str, storage: Path, num_pairs: int) -> dict[str, Any]:
    from dpo_ray.attention import Attention

    kind, _, size = name.partition(" of ")
    recipe_of = partial(recipe, model, data, storage, num_pairs)
    if kind == "rows":
        rows = {"batch__row_tokens": int(size)}
        return run_ours(recipe_of(**rows), attention=Attention("mask", "benchmark"))
    if kind == "passes":
        return run_ours(recipe_of(batch__tokens_per_device=int(size), batch__row_tokens=int(size)))
    if name in APART:
        parts = take_apart()
        result = (run_floor if name == "floor, apart" else run_ours)(recipe_of())
        return result | {"parts": dict(parts)}
    return {"floor": run_floor, "ours": run_ours}[name](recipe_of())


def take_apart() -> dict[str, float]:
    """From here on, seconds of this process by part; those of the reference pass together."""
    import torch
    from transformers import LlamaModel

    import dpo_ray.logps
    import dpo_ray.models
    import dpo_ray.train
    from dpo_ray.engine import ZeroEngine

    seconds: dict[str, float] = defaultdict(float)
    inside: list[float] = []  # of the parts in the one that runs, one number a level

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            inside.append(0.0)
            began = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.process_time() - began
                own = spent - inside.pop()
                if inside:
                    inside[-1] += spent
                seconds[part if torch.is_grad_enabled() or "backward" in part else "reference pass"] += own

        return wrapper

    for owner, name, part in (
        (dpo_ray.train.PairSet, "plan", "plan and batches"),
        (dpo_ray.train, "make_batch", "plan and batches"),
        (dpo_ray.models, "attention_inputs", "masks"),
        (LlamaModel, "forward", "forward, without attention"),
        (torch.nn.functional, "scaled_dot_product_attention", "forward, attention"),
        (dpo_ray.logps, "token_logps", "output layer, forward"),
        (dpo_ray.models, "token_logps", "output layer, forward"),
        (torch.Tensor, "backward", "backward, without output layer"),
        (ZeroEngine, "step", "optimizer"),
        (dpo_ray.train.Worker, "step", "loss, metrics, engine"),
    ):
        setattr(owner, name, timed(part, getattr(owner, name)))
    head = dpo_ray.logps._ChunkedHead
    head.backward = staticmethod(timed("output layer, backward", head.backward))  # type: ignore[method-assign]
    return seconds


def main() -> None:
    options = arguments(str(__doc__), pairs=32, repeats=2).parse_args()
    data = data_of(options)
    if options.contender:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as storage:
            print(json.dumps(run(options.contender, options.folder, data, Path(storage), options.pairs)))
        return

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        passed = ["--folder", folder, "--pairs", str(options.pairs), "--data-path", data]
        results = in_turns(__file__, CONTENDERS, options.repeats, *passed)
        apart = in_turns(__file__, APART, 1, *passed)

    training = {name: [options.pairs / run["cpu_s"]["training"] for run in runs] for name, runs in results.items()}
    whole = {name: [run["pairs_per_s"] for run in runs] for name, runs in results.items()}
    rows = []
    for name in CONTENDERS:
        shares = [spread([100 * x for x in ratios(of[name], of["floor"])], 1) for of in (training, whole)]
        memory = statistics.median(run["memory_gib"] for run in results[name])
        rows.append([name, spread(training[name], 3), shares[0], spread(whole[name], 3), shares[1], f"{memory:.2f}"])
    head = ["", "training, pairs/s", "% of the floor", "with reference pass, pairs/s", "% of the floor", "memory GiB"]

    floor, ours = (apart[name][0]["parts"] for name in APART)
    names = [name for name in {**floor, **ours} if name != "reference pass"]
    total = sum(seconds for name, seconds in floor.items() if name in names)
    parts = [
        [name, *(f"{of.get(name, 0.0):.2f}" for of in (floor, ours)), difference(floor, ours, [name], total)]
        for name in names
    ]
    parts.append(["all", f"{total:.2f}", f"{sum(ours[n] for n in ours if n in names):.2f}", ""])
    parts[-1][-1] = difference(floor, ours, names, total)
    told = table(head, rows) + "\n\n" + table(["part of training", "floor, s", "ours, s", "of the floor, %"], parts)
    write(f"limit-{options.data}", vars(options), results | apart, told)


def difference(floor: dict[str, float], ours: dict[str, float], names: list[str], total: float) -> str:
    more = sum(ours.get(name, 0.0) - floor.get(name, 0.0) for name in names)
    return f"{100 * more / total:+.1f}"


if __name__ == "__main__":
    main()
