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
    ratios,
    recipe,
    run_floor,
    run_ours,
    spread,
    table,
    write,
)

CONTENDERS = ("floor", "ours", "trl-best", "trl")


def run_trl(run: Any, best: bool) -> dict[str, Any]:
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
    return clock.result(len(rows))


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
            print(json.dumps(runs.get(options.contender, lambda r: run_trl(r, best=True))(run)))
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
