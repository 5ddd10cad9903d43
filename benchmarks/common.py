"""What the benchmarks share: the model and the pairs, a clock, turns of the contenders, and how results are written."""

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
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

SHARED = Path(os.environ.get("DPO_RAY_SHARED") or Path(__file__).parents[2] / "shared")
DATA = {"hh": "data/hh_rlhf/helpful-base.test.jsonl.gz", "tldr": "data/tldr_judged/pairs.jsonl.gz"}
PAIRS_PER_STEP = 16
MAX_TOKENS = 512


def arguments(description: str, *, pairs: int, repeats: int) -> argparse.ArgumentParser:
    """The options that the benchmarks on real pairs have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--data", choices=sorted(DATA), default="hh")
    parser.add_argument("--data-path", help="pairs of your own instead")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def data_of(options: argparse.Namespace) -> str:
    """The file of the pairs; ends the benchmark where there is none."""
    data = options.data_path or str(SHARED / DATA[options.data])
    if not Path(data).exists():
        print(f"no pairs at {data}: give --data-path")
        sys.exit(0)
    return data


def recipe(model: Path, data: str, storage: Path, num_pairs: int, **overrides: Any) -> Any:
    """The run of the benchmarks: 16 pairs a step, at most 512 tokens, fp32; overrides as `engine__zero_stage=2`."""
    from dpo_ray.config import parse_run
    from dpo_ray.prepare import resolve

    tree = {
        "name": "bench",
        "storage": {"path": str(storage)},
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": data}],
            "max_tokens": MAX_TOKENS,
            "num_pairs": num_pairs,
            "eval": {"num_pairs": 0},
        },
        "batch": {"pairs_per_step": PAIRS_PER_STEP, "tokens_per_device": 1024},  # larger passes are slower on a CPU
        "optim": {"learning_rate": 1e-5, "warmup_ratio": 0.0, "schedule": "constant"},
        "engine": {"precision": "fp32", "zero_stage": 0},
        "tracking": {"kind": "none"},
    }
    return resolve(parse_run(tree, {key.replace("__", "."): value for key, value in overrides.items()}))


def make_model(folder: Path, data: str, seed: int = 0) -> None:
    """A Llama with a body of about 25 M random parameters and a vocabulary of 8,000 trained on the text of the pairs.

    The output layer then has about the share of the work that it has in a model of 1 to 8 B parameters.
    """
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
    torch.manual_seed(seed)
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


class Clock:
    """Seconds of this process's CPU, by part: other work on the machine does not count."""

    def __init__(self) -> None:
        self._last = time.process_time()
        self.parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.process_time()
        self.parts[part], self._last = now - self._last, now

    def result(self, num_pairs: int) -> dict[str, Any]:
        """With the peak memory of this process."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"pairs_per_s": num_pairs / sum(self.parts.values()), "memory_gib": memory, "cpu_s": self.parts}


class Ours(NamedTuple):
    """A training by this package before its first step, of one worker in this process."""

    prepared: Any
    """`dpo_ray.prepare.Prepared`."""
    store: Any
    """`dpo_ray.reference.ReferenceStore`."""
    order: Any
    """`dpo_ray.data.batching.StepOrder`."""
    worker: Any
    """`dpo_ray.train.Worker`."""


def start_ours(run: Any) -> Ours:
    """Planner, reference store and ZeRO engine for a run. The first call makes this process a group of one rank."""
    from torch.distributed import init_process_group, is_initialized

    from dpo_ray.engine import ZeroEngine
    from dpo_ray.models import load_policy, policy_source, weights_fingerprint
    from dpo_ray.prepare import prepare, step_order
    from dpo_ray.reference import ReferenceStore
    from dpo_ray.train import Worker

    prepared = prepare(run)
    store = ReferenceStore(str(run.reference.store), weights_fingerprint(policy_source(run.model)), "fp32")
    if not is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    order = step_order(run, prepared.train.num_pairs)
    engine = ZeroEngine(load_policy(run.model, "fp32", 0), run.engine, run.optim, order.num_steps)
    return Ours(prepared, store, order, Worker(engine, run, 0, 1))


def score_missing(run: Any, store: Any, pairs: Any) -> None:
    """Compute the reference log-probs of pairs that the store does not have."""
    from dpo_ray.models import policy_source
    from dpo_ray.reference import ResponseScorer, by_prompt, missing_responses

    missing = missing_responses(pairs, store)
    if missing:
        store.write(ResponseScorer(policy_source(run.model), "fp32", run.batch).score(by_prompt(missing)))


def run_ours(run: Any, attention: Any = None) -> dict[str, Any]:
    """An epoch: reference pass, planner, ZeRO engine of one worker.

    Args:
        attention: A `dpo_ray.attention.Attention` to train with, in rows; None: what the package chooses.
    """
    import torch

    from dpo_ray.train import PairSet

    prepared, store, order, worker = start_ours(run)
    if attention is not None:
        worker.engine.model.attend_with(attention)
        worker.batch = worker.batch.model_copy(update={"layout": "branches"})
    clock = Clock()
    score_missing(run, store, prepared.train_pairs)
    clock.lap("reference")
    pairs = PairSet(prepared.train, store, worker.batch)
    for step in range(1, order.num_steps + 1):
        worker.step(pairs, order.pairs_of(step), step)
    clock.lap("training")
    torch.distributed.destroy_process_group()
    return clock.result(prepared.train.num_pairs)


def run_floor(run: Any) -> dict[str, Any]:
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
    return clock.result(len(pairs))


def in_turns(file: str, contenders: Sequence[str], repeats: int, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Each contender in a process of its own, one after another, `repeats` times over.

    Such a process is called with `--contender NAME` and prints its result as JSON in its last line.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in contenders:
            command = [sys.executable, file, "--contender", name, *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{repeat + 1}/{repeats} {name}: {results[name][-1]}", file=sys.stderr)
    return results


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Median, least and largest: `1.63x (1.60x to 1.66x)`."""
    told = [f"{value:.{digits}f}{unit}" for value in (statistics.median(values), min(values), max(values))]
    return f"{told[0]} ({told[1]} to {told[2]})"


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean over seeds and its 95 % interval: `0.74 (0.60 to 0.88)`."""
    from dpo_ray.comparisons import mean_interval

    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def difference(first: Sequence[float], second: Sequence[float], digits: int = 2) -> str:
    """Mean of first less second, paired by seed, and its 95 % interval: `+0.24 (+0.10 to +0.38)`."""
    from dpo_ray.comparisons import paired_t_test

    mean, low, high = paired_t_test(first, second).difference
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Repeat by repeat: what ran close together is compared."""
    return [a / b for a, b in zip(of, to, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(name: str, options: Mapping[str, Any], runs: Any, markdown: str, *, device: str | None = None) -> None:
    """`results/NAME.json` and `.md`: command, machine, versions, and the table, which is printed too."""
    versions = {}
    for package in ("dpo-ray", "trl", "torch", "transformers", "deepspeed", "ray"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    asked = {key: value for key, value in options.items() if value is not None and key not in ("contender", "folder")}
    command = " ".join([f"{name.partition('-')[0]}.py", *(f"--{k.replace('_', '-')} {v}" for k, v in asked.items())])
    machine = device or f"{platform.machine()}, {os.cpu_count()} cores"
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    record = {"command": command, "machine": machine, "versions": versions, "runs": runs}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    told = "; ".join([machine, ", ".join(f"{k} {v}" for k, v in versions.items())])
    (out / f"{name}.md").write_text(f"`{command}`\n\n{told}\n\n{markdown}\n")
    print(markdown)
