"""How fast is one training step on one device: planner, layout, attention, output layer, loss, backward, optimizer?

A Llama with random weights (about 1.2 B parameters, in bf16, on a GPU; a few million, in fp32, on a CPU), DPO's loss
against log-probs that are given, AdamW on fp32 weights. No Ray, no DeepSpeed, no reference pass: this is the part that
every rank does alone. Each attention and layout takes its turn on the same pairs. MFU is what the model cannot do
without (`metrics.model_flops`: prompts once, no padding, only pairs of tokens that see each other) over the time, as a
share of the rate of a large matrix product in the same type, measured before.

    one row   the whole micro-batch in one row: FlexAttention on a GPU, span by span on a CPU
    rows      pairs packed into rows, an additive mask, the architecture's own attention (SDPA)
    padded    every response in a row of its own behind a copy of its prompt, SDPA

    python benchmarks/gpu_step.py [--pairs 64] [--steps 3] [--repeats 3] [--tokens 16384] [--data-path FILE]

Without `--data-path`, lengths are drawn: log-normal, fitted to the helpful half of HH-RLHF.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import make_model, recipe, spread, table, write
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ray.attention import Attention, Kernel, choose_attention
from dpo_ray.data.batching import Layout, Lengths, lengths_of, make_batch, plan_step
from dpo_ray.device import peak_rate
from dpo_ray.losses import PairLogps, dpo_loss
from dpo_ray.models import PairModel
from dpo_ray.pairs import PromptBranches

SIZES: dict[str, dict[str, int]] = {
    "cuda": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "cpu": {
        "vocab_size": 4000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
DEFAULTS = {"cuda": {"pairs": 64, "steps": 3, "tokens": 16_384}, "cpu": {"pairs": 8, "steps": 1, "tokens": 4096}}


class Contender(NamedTuple):
    layout: Layout
    kernel: Kernel


class Step(NamedTuple):
    """One step's pairs, their useful work, and what the plan makes of it."""

    items: list[PromptBranches]
    lengths: list[Lengths]


class MasterAdamW:
    """AdamW on fp32 copies of the weights, as mixed-precision training keeps them; on the weights where they are fp32.

    One kernel for all weights on a GPU (`fused`).
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self._adamw = torch.optim.AdamW(self._masters, lr=1e-6, weight_decay=0.0, fused=parameters[0].is_cuda or None)

    def step(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        self._adamw.step()
        self._adamw.zero_grad()
        if self._masters[0] is not self._parameters[0]:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._masters)


class Timer:
    """Seconds of a device: of the wall clock, all work awaited; on a CPU those of this process."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        began = self._now()
        work()
        return self._now() - began

    def _now(self) -> float:
        if self._is_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def drawn_lengths(count: int) -> list[Lengths]:
    """Lengths as in the helpful half of HH-RLHF: medians of 88 and 37 tokens, most within a factor of 8 and 6."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(4.47, 1.06, count), 8, 1024).astype(int)
    responses = np.clip(rng.lognormal(3.62, 0.93, (count, 2)), 4, 512).astype(int)
    return [Lengths(int(p), (int(c), int(r))) for p, (c, r) in zip(prompts, responses, strict=True)]


def read_lengths(data: str, count: int) -> list[Lengths]:
    """Those of a file's pairs, in tokens of a tokenizer trained on them."""
    from dpo_ray.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        run = recipe(Path(folder), data, Path(folder), count, data__max_tokens=2048)
        return [lengths_of(pair) for pair in prepare(run).train_pairs]


def steps_of(lengths: list[Lengths], pairs: int, vocabulary: int) -> list[Step]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return rng.integers(0, vocabulary, length).astype(np.int32)

    return [
        Step([PromptBranches(ids(x.prompt), tuple(map(ids, x.responses))) for x in part], part)
        for part in (lengths[start : start + pairs] for start in range(0, len(lengths), pairs))
    ]


def build(device: torch.device, dtype: torch.dtype) -> PairModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[device.type], max_position_embeddings=4096, tie_word_embeddings=True)
    with device:
        model = LlamaForCausalLM(config).to(dtype)
    return PairModel(model).train()


def train(model: PairModel, optimizer: MasterAdamW, step: Step, contender: Contender, tokens: int) -> dict[str, int]:
    """One step; the places that were computed, and how many of them are no padding."""
    device = model.head.weight.device
    plan = plan_step(step.lengths, num_workers=1, tokens_per_device=tokens, row_tokens=1024, layout=contender.layout)
    slots = filled = 0
    for (micro_batch,) in plan:
        batch = make_batch(step.items, micro_batch.rows, contender.layout).to(device)
        logps = model(batch).logps
        policy = PairLogps(logps[0::2], logps[1::2], logps[0::2], logps[1::2])
        given = torch.full_like(policy.chosen, -100.0)
        loss = dpo_loss(policy, PairLogps(given, given, given, given), beta=0.1).loss.sum() / len(step.items)
        loss.backward()
        slots, filled = slots + batch.num_slots, filled + batch.num_filled
    optimizer.step()
    return {"slots": slots, "filled": filled}


def measure(
    model: PairModel, optimizer: MasterAdamW, steps: list[Step], contender: Contender, tokens: int
) -> dict[str, float]:
    device = model.head.weight.device
    model.attend_with(Attention(contender.kernel, "benchmark"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counts: list[dict[str, int]] = []
    seconds = Timer(device)(lambda: counts.extend(train(model, optimizer, s, contender, tokens) for s in steps))
    slots, filled = (sum(count[name] for count in counts) for name in ("slots", "filled"))
    result = {"seconds": seconds, "padding": 1 - filled / slots}
    if device.type == "cuda":
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in DEFAULTS[device.type].items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-path", help="pairs whose lengths are taken")
    options = parser.parse_args()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
        print("No GPU here: a small model on the CPU, to see that it runs. Nothing is written.")

    count = options.pairs * options.steps
    lengths = read_lengths(options.data_path, count) if options.data_path else drawn_lengths(count)
    model = build(device, dtype)
    steps = steps_of(lengths[:count], options.pairs, model.config.vocab_size)
    optimizer = MasterAdamW(list(model.parameters()))
    chosen = choose_attention(model.causal, device, dtype)
    contenders = {"rows, mask": Contender("branches", "mask"), "padded": Contender("padded", "mask")}
    if chosen.kernel != "mask":
        contenders = {f"one row, {chosen.kernel}": Contender("one_row", chosen.kernel), **contenders}
    print(f"attention: {chosen}", file=sys.stderr)

    peak = peak_rate(device, dtype)
    first = {}
    for name, contender in contenders.items():  # compiles, and takes the memory it will need
        first[name] = measure(model, optimizer, steps, contender, options.tokens)["seconds"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for repeat in range(options.repeats):
        for name, contender in contenders.items():
            runs[name].append(measure(model, optimizer, steps, contender, options.tokens))
            print(f"{repeat + 1}/{options.repeats} {name}: {runs[name][-1]}", file=sys.stderr)

    flops = model.flops(item for step in steps for item in step.lengths)
    real = sum(item.prompt + sum(item.responses) for step in steps for item in step.lengths)
    rows = []
    for name, of_name in runs.items():
        seconds = [run["seconds"] for run in of_name]
        memory = f"{statistics.median(run['memory_gib'] for run in of_name):.1f}" if device.type == "cuda" else ""
        rows.append(
            [
                name,
                spread([count / s for s in seconds], 1),
                spread([real / s for s in seconds], 0),
                spread([100 * flops / s / peak for s in seconds], 1),
                f"{of_name[0]['padding']:.1%}",
                memory,
                f"{first[name]:.1f}",
            ]
        )
    head = ["", "pairs/s", "real tokens/s", "MFU, %", "padding", "peak memory, GiB", "first round, s"]
    parameters = sum(p.numel() for p in model.parameters())
    told = (
        f"{parameters / 1e6:.0f} M parameters in {dtype}, AdamW on fp32 weights; matrix product: {peak / 1e12:.4g} "
        f"TFLOP/s; attention: {chosen}\n\n{table(head, rows)}"
    )
    if device.type == "cpu":
        print(told)
        return
    record = {"peak_flops": peak, "model_flops": flops, "real_tokens": real, "first_round_s": first, "runs": runs}
    write("gpu_step", vars(options), record, told, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
