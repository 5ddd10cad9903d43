"""How fast is a DPO epoch beside TRL's DPOTrainer, and beside the floor of the same model on the same tokens?

One random-weight Llama (a body of about 25 M parameters, a vocabulary of 8,000 trained on the text, so that the output
layer has about the share of the work that it has in a 1 to 8 B model), the same real pairs, the same pairs a step,
fp32, one CPU thread. Contenders take turns; each run is a process of its own. Rates count the reference pass.

    floor        forward and backward of every real token once, rows perfectly full, nothing else
    ours         this package: reference pass, planner, branches, ZeRO engine of one worker
    trl          DPOTrainer at its defaults (reference model in memory, batch 8, gradient checkpointing), fp32
    trl-best     reference precomputed, batch 1 (no padding), no gradient checkpointing

    python benchmarks/train_vs_trl.py [--pairs 32] [--repeats 3] [--data hh|tldr] [--data-path FILE]
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import (
    PAIRS_PER_STEP,
    Clock,
    arguments,
    data_of,
    in_turns,
    make_model,
    peak_memory_gib,
    ratios,
    recipe,
    spread,
    table,
    write,
)

CONTENDERS = ("floor", "ours", "trl-best", "trl")


def run_ours(run: Any) -> None:
    import torch
    from torch.distributed import init_process_group

    from dpo_ray.engine import ZeroEngine
    from dpo_ray.models import load_policy, policy_source, weights_fingerprint
    from dpo_ray.prepare import prepare, step_order
    from dpo_ray.reference import ReferenceStore, ResponseScorer
    from dpo_ray.train import PairSet, Worker

    prepared = prepare(run)
    source = policy_source(run.model)
    store = ReferenceStore(str(run.reference.store), weights_fingerprint(source), "fp32")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    order = step_order(run, prepared.train.num_pairs)
    worker = Worker(ZeroEngine(load_policy(run.model, "fp32", 0), run.engine, run.optim, order.num_steps), run, 0, 1)
    clock = Clock()
    store.write(ResponseScorer(source, "fp32", run.batch, store).score([p.branches for p in prepared.train_pairs]))
    clock.lap("reference")
    pairs = PairSet(prepared.train, store, worker.batch)
    for step in range(1, order.num_steps + 1):
        worker.step(pairs, order.pairs_of(step), step)
    clock.lap("training")
    tell(clock, prepared.train.num_pairs)
    torch.distributed.destroy_process_group()


def run_floor(run: Any) -> None:
    """As many tokens, prompts once, in full rows with the causal mask; the head on as many as are response tokens."""
    import torch

    from dpo_ray.logps import token_logps
    from dpo_ray.models import load_policy
    from dpo_ray.prepare import prepare

    pairs = prepare(run).train_pairs
    places = sum(p.num_tokens - 2 for p in pairs)
    targets = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    model = load_policy(run.model, "fp32", 0)
    width = 512
    clock = Clock()
    for backward in (False, True):
        left, left_targets = places, targets
        while left > 0:
            rows = min(8, max(1, round(left / width)))
            ids = torch.randint(2, 7000, (rows, width if left >= width else left))
            share = min(round(ids.numel() * targets / places), ids.numel(), left_targets)
            with torch.set_grad_enabled(backward):
                hidden = model.body(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[:share]
                logps, *_ = token_logps(hidden, model.head.weight, ids.flatten()[:share])
            if backward:
                logps.sum().backward()
            left, left_targets = left - ids.numel(), left_targets - share
        clock.lap("training" if backward else "reference")
    tell(clock, len(pairs))


def run_trl(run: Any, best: bool) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dpo_ray.prepare import prepare, step_order

    class OnTokenIds(DPOTrainer):  # type: ignore[misc]
        """Gets our token ids, so that both train on the very same."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    prepared = prepare(run)
    order = step_order(run, prepared.train.num_pairs)
    numbers = [number for step in range(1, order.num_steps + 1) for number in order.pairs_of(step)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: getattr(prepared.train_pairs[i], name).tolist() for name in names} for i in numbers]
    tokenizer = AutoTokenizer.from_pretrained(run.model.path)
    tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, Any] = {"gradient_accumulation_steps": PAIRS_PER_STEP // 8}
    if best:
        settings = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": PAIRS_PER_STEP,
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": 1,
            "gradient_checkpointing": False,
        }
    clock = Clock()
    trainer = OnTokenIds(
        model=AutoModelForCausalLM.from_pretrained(run.model.path),
        ref_model=AutoModelForCausalLM.from_pretrained(run.model.path),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=1,
            learning_rate=1e-5,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
            max_length=None,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    clock.lap("reference")  # with precomputed log-probs TRL makes its pass here or at the start of training
    trainer.train()
    clock.lap("training")
    tell(clock, len(rows))


def tell(clock: Clock, num_pairs: int) -> None:
    result = {"pairs_per_s": num_pairs / clock.total, "memory_gib": peak_memory_gib(), "cpu_s": clock.parts}
    print(json.dumps(result))


def main() -> None:
    options = arguments(str(__doc__), pairs=32, repeats=3).parse_args()
    data = data_of(options)
    if options.contender:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as storage:
            run = recipe(options.folder, data, Path(storage), options.pairs)
            runs = {"floor": run_floor, "ours": run_ours, "trl": lambda r: run_trl(r, best=False)}
            runs.get(options.contender, lambda r: run_trl(r, best=True))(run)
        return

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        passed = ["--folder", folder, "--pairs", str(options.pairs), "--data-path", data]
        results = in_turns(__file__, CONTENDERS, options.repeats, *passed)
    rates = {name: [run["pairs_per_s"] for run in runs] for name, runs in results.items()}
    training = {name: [options.pairs / run["cpu_s"]["training"] for run in runs] for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        memory = statistics.median(run["memory_gib"] for run in runs)
        times = [spread(ratios(of["ours"], of[name]), unit="x") for of in (rates, training)]
        rows.append([name, spread(rates[name], 3), f"{memory:.2f}", *times])
    head = ["", "pairs/s (CPU time, one thread)", "memory GiB", "ours is", "ours is, without the reference pass"]
    write(f"train_vs_trl-{options.data}", vars(options), results, table(head, rows))


if __name__ == "__main__":
    main()
