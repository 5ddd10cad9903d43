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

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DPO_RAY_SHARED") or Path(__file__).parents[2] / "shared")
DATA = {"hh": "data/hh_rlhf/helpful-base.test.jsonl.gz", "tldr": "data/tldr_judged/pairs.jsonl.gz"}
CONTENDERS = ("floor", "ours", "trl-best", "trl")
PAIRS_PER_STEP = 16
MAX_TOKENS = 512


def recipe(model: Path, data: str, storage: Path, num_pairs: int) -> Any:
    from dpo_ray.config import parse_run
    from dpo_ray.prepare import resolve

    return resolve(
        parse_run(
            {
                "name": "bench",
                "storage": {"path": str(storage)},
                "model": {"path": str(model)},
                "data": {
                    "sources": [{"path": data}],
                    "max_tokens": MAX_TOKENS,
                    "num_pairs": num_pairs,
                    "eval": {"num_pairs": 0},
                },
                "batch": {"pairs_per_step": PAIRS_PER_STEP, "tokens_per_device": 4096},
                "optim": {"learning_rate": 1e-5, "warmup_ratio": 0.0, "schedule": "constant"},
                "engine": {"precision": "fp32", "zero_stage": 0},
                "tracking": {"kind": "none"},
            }
        )
    )


def make_model(folder: Path, data: str) -> None:
    """The tokenizer from the text of the pairs, and random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dpo_ray.config import DataConfig, SourceConfig
    from dpo_ray.data.formats import transcript
    from dpo_ray.data.mixture import load_pool

    def texts(pair: Any) -> list[str]:
        sides = (pair.prompt, pair.chosen, pair.rejected)
        return [side if isinstance(side, str) else transcript(side) for side in sides]

    pool = load_pool(DataConfig(sources=(SourceConfig(path=data),)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((text for pair in pool.train for text in texts(pair)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


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
    clock.tell(prepared.train.num_pairs)
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
    clock.tell(len(pairs))


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
    clock.tell(len(rows))


class Clock:
    """Seconds of this process's CPU, by part: other work on the machine does not count."""

    def __init__(self) -> None:
        self._last, self._parts = time.process_time(), {}

    def lap(self, part: str) -> None:
        now = time.process_time()
        self._parts[part], self._last = now - self._last, now

    def tell(self, num_pairs: int) -> None:
        total = sum(self._parts.values())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"pairs_per_s": num_pairs / total, "memory_gib": memory, "cpu_s": self._parts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", choices=sorted(DATA), default="hh")
    parser.add_argument("--data-path", help="pairs of your own instead")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = options.data_path or str(SHARED / DATA[options.data])
    if not Path(data).exists():
        print(f"no pairs at {data}: give --data-path")
        return
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

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        for repeat in range(options.repeats):
            for name in CONTENDERS:
                command = [
                    sys.executable,
                    __file__,
                    "--contender",
                    name,
                    "--folder",
                    folder,
                    "--pairs",
                    str(options.pairs),
                ]
                command += ["--data", options.data, *(["--data-path", options.data_path] if options.data_path else [])]
                environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
                results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(f"{repeat + 1}/{options.repeats} {name}: {results[name][-1]}", file=sys.stderr)
    write(options, results)


def write(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians with their spread, and ratios within each repeat, as JSON and a table."""
    versions = {name: version(name) for name in ("dpo-ray", "trl", "torch", "transformers", "deepspeed")}
    ratios = {
        name: [ours["pairs_per_s"] / other["pairs_per_s"] for ours, other in zip(results["ours"], runs, strict=True)]
        for name, runs in results.items()
    }
    rows = ["| | pairs/s (CPU time, one thread) | memory GiB | ours is |", "|---|---|---|---|"]
    for name, runs in results.items():
        rates = [run["pairs_per_s"] for run in runs]
        spread = f"{statistics.median(rates):.3f} ({min(rates):.3f} to {max(rates):.3f})"
        memory = statistics.median(run["memory_gib"] for run in runs)
        times = ratios[name]
        ratio = f"{statistics.median(times):.2f}x ({min(times):.2f} to {max(times):.2f})"
        rows.append(f"| {name} | {spread} | {memory:.2f} | {ratio} |")
    table = "\n".join(rows)
    head = f"`{Path(__file__).name} --data {options.data} --pairs {options.pairs} --repeats {options.repeats}`"
    machine = f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    name = f"train_vs_trl-{options.data}"
    record = {"command": vars(options) | {"folder": None}, "versions": versions, "runs": results, "ratios": ratios}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    (out / f"{name}.md").write_text(f"{head}\n\n{machine}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
