"""What N workers saved, M workers load, whatever N, M and the ZeRO stage: engines in gloo process groups, without Ray.

Groups of one, two and three processes run side by side. Each trains two steps of every case, saves, and trains two
more; then each loads what other groups saved, and trains the same two steps. The tests look at what they wrote down.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.ray

WORLD_SIZES = (1, 2, 3)
STEPS_BEFORE, STEPS_AFTER = 2, 2


class Case(NamedTuple):
    stage: Any
    precision: Any
    lora: bool = False
    offload: bool = False

    def __str__(self) -> str:
        return f"zero-{self.stage} {self.precision}" + " lora" * self.lora + " offload" * self.offload


class Move(NamedTuple):
    """From a case on some workers to a case on others."""

    before: Case
    num_before: int
    after: Case
    num_after: int

    def __str__(self) -> str:
        return f"{self.before} by {self.num_before} on {self.after} by {self.num_after}"


FP32 = [Case(stage, "fp32", lora) for stage in (0, 1, 2, 3) for lora in (False, True)]
OTHER = [
    *(Case(stage, "bf16", lora) for stage in (1, 2, 3) for lora in (False, True)),
    *(Case(stage, "bf16", offload=True) for stage in (2, 3)),
    *(Case(stage, "fp16") for stage in (0, 2, 3)),
]
MOVES = [
    *(Move(case, n, case, m) for case in FP32 for n, m in ((2, 2), (2, 1), (1, 2), (2, 3), (3, 2))),
    *(Move(case, n, case, m) for case in OTHER for n, m in ((2, 2), (2, 1), (1, 3))),
    Move(Case(2, "fp32"), 2, Case(3, "fp32"), 1),
    Move(Case(3, "fp32"), 3, Case(0, "fp32"), 2),
    Move(Case(0, "fp32"), 1, Case(1, "fp32"), 3),
    Move(Case(1, "bf16", lora=True), 1, Case(3, "bf16", lora=True), 2),
]
SAVED = list(dict.fromkeys((move.before, move.num_before) for move in MOVES))


def group(rank: int, world_size: int, folder: Path) -> None:
    """What a process of a group does."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # slow, but it shows the loss scale without a GPU
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meeting = f"file://{folder}/group-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    for case, n in SAVED:
        if n == world_size:
            with training(case, rank, n) as train:
                seen = {"before": train.steps(0, STEPS_BEFORE)}
                train.engine.save(folder / f"{case} by {n}")
                seen |= {"saved": train.state(), "after": train.steps(STEPS_BEFORE, STEPS_AFTER), "end": train.state()}
                write(seen, folder / f"{case} by {n}.pt", rank)
    (folder / f"done-{world_size}-{rank}").touch()
    while len(list(folder.glob("done-*"))) < sum(WORLD_SIZES):
        time.sleep(0.05)
    for move in MOVES:
        if move.num_after == world_size:
            with training(move.after, rank, world_size, seed=1) as train:
                train.engine.load(folder / f"{move.before} by {move.num_before}")
                seen = {"loaded": train.state()}
                seen |= {"after": train.steps(STEPS_BEFORE, STEPS_AFTER), "end": train.state()}
                write(seen, folder / f"{move}.pt", rank)


def write(seen: dict[str, Any], path: Path, rank: int) -> None:
    if rank == 0:
        torch.save(seen, path)


@contextmanager
def training(case: Case, rank: int, world_size: int, seed: int = 0) -> Iterator["Training"]:
    train = Training(case, rank, world_size, seed)
    yield train
    train.engine._engine.destroy()


class Training:
    """A tiny model in an engine; every step is the mean over the same six pairs, whatever the number of ranks.

    Args:
        seed: Of the weights that are trained; those of a frozen base are always the same.
    """

    def __init__(self, case: Case, rank: int, world_size: int, seed: int) -> None:
        import transformers

        from dpo_ray.config import EngineConfig, OptimConfig
        from dpo_ray.engine import ZeroEngine, sharded_loading
        from dpo_ray.models import DTYPES, PairModel

        self.case, self.rank, self.world_size = case, rank, world_size
        engine = EngineConfig(zero_stage=case.stage, precision=case.precision, offload_optimizer=case.offload)
        # Decay makes two parameter groups, of matrices and of norms.
        optim = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0, weight_decay=0.1)
        config = transformers.LlamaConfig(
            **{"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": not case.lora},
        )
        torch.manual_seed(0 if case.lora else seed)
        with sharded_loading(engine, optim):
            model: Any = transformers.LlamaForCausalLM(config).to(DTYPES[case.precision])
        if case.lora:
            import peft

            torch.manual_seed(seed)
            lora = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(model, lora)
        self.engine = ZeroEngine(PairModel(model), engine, optim, num_steps=10)

    def steps(self, done: int, number: int) -> list[float]:
        """Losses of the next steps."""
        return [self._step(done + i + 1) for i in range(number)]

    def _step(self, step: int) -> float:
        from dpo_ray.data.batching import make_batch
        from dpo_ray.pairs import PromptBranches

        random = np.random.default_rng(step)
        items = [
            PromptBranches(
                *(random.integers(0, 61, 4).astype(np.int32),), tuple(random.integers(0, 61, (2, 5), np.int32))
            )
            for _ in range(6)
        ][self.rank :: self.world_size]
        self.engine.train(True)
        logps = self.engine(make_batch(items, [list(range(len(items)))], "branches")).logps
        loss = -torch.nn.functional.logsigmoid(0.1 * (logps[0::2] - logps[1::2])).sum() / 6
        self.engine.backward(loss, is_last=True)
        self.engine.step(step)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        return float(total)

    def state(self) -> dict[str, Any]:
        """Whole weights and moments as DeepSpeed itself gathers them, and its counters."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        engine, zero, adam = self.engine._engine, self.engine._optimizer, self.engine._state._adam
        if self.case.stage in (1, 2):
            zero._hp_optimizer_states_linked = False  # it has linked the first of several groups only
            zero._lazy_init_hp_params_optimizer_state()
        found: dict[str, Any] = {"skipped": engine.skipped_steps, "steps": engine.global_steps}
        found["adam steps"] = {float(state["step"]) for state in adam.state.values()}
        if self.case.precision == "fp16":
            scale = zero.loss_scale_config if self.case.stage == 0 else zero.loss_scaler
            found["scale"] = {name: value for name, value in vars(scale).items() if isinstance(value, int | float)}
        for name, p in self.engine.model.named_parameters():
            if not p.requires_grad:
                continue
            if self.case.stage == 0:
                master = self.engine._state._master(p)
                found[name] = master.detach().clone()
                found |= {f"{name} {key}": adam.state[master][key].clone() for key in ("exp_avg", "exp_avg_sq")}
            else:
                found[name] = safe_get_full_fp32_param(p).clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    found[f"{name} {key}"] = safe_get_full_optimizer_state(p, key).clone()
        return found | {f"{name} rounded": value for name, value in self.engine.full_weights().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where three groups of processes have written what they saw."""
    path = tmp_path_factory.mktemp("world-sizes")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    multiprocessing.set_forkserver_preload(["deepspeed", "peft", "transformers.models.llama.modeling_llama"])
    groups = [
        torch.multiprocessing.start_processes(group, (n, path), n, join=False, daemon=True, start_method="forkserver")
        for n in WORLD_SIZES
    ]
    running = groups
    try:
        while running:
            running = [processes for processes in running if not processes.join(timeout=0.5)]
    finally:
        for process in [process for processes in groups for process in processes.processes]:
            process.kill()
    return path


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_weights_moments_and_counters_survive_another_number_of_workers(folder: Path, move: Move):
    there = torch.load(folder / f"{move.before} by {move.num_before}.pt")
    here = torch.load(folder / f"{move}.pt")
    assert_same(here["loaded"], there["saved"])
    if (move.before, move.num_before) == (move.after, move.num_after):  # every bit, also of the steps that follow
        assert here["after"] == there["after"]
        assert_same(here["end"], there["end"])
    else:
        tolerance = 1e-4 if move.after.precision == "fp32" else 3e-2
        assert here["after"] == pytest.approx(there["after"], abs=tolerance)


def test_no_file_of_an_engine_is_a_pickle(folder: Path):
    for case, n in SAVED:
        names = {path.name for path in (folder / f"{case} by {n}").rglob("*") if path.is_file()}
        assert names == {"engine.json", *(f"{rank:05d}-0000.safetensors" for rank in range(n))}
