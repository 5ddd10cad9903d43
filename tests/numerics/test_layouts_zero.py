"""Two workers under ZeRO 0 and ZeRO-3, in both layouts, say and learn what one process with plain autograd does.

One pair of worker processes goes through every case and writes what it found; each test compares one case. Weights are
cut into shards and gathered for each layer, as those of a large model are: by default DeepSpeed keeps small ones whole.
"""

import gc
import itertools
import os
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dpo_ray.engine
from dpo_ray.attention import Attention
from dpo_ray.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from dpo_ray.data.batching import Layout, Row, make_batch
from dpo_ray.engine import ZeroEngine, deepspeed_config, sharded_loading
from dpo_ray.models import PairModel, load_policy
from tests.numerics.architectures import SUPPORTED, build, items_of, plain

pytestmark = pytest.mark.ray

OPTIM = OptimConfig(learning_rate=1e3, eps=1e3, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)
"""AdamW whose first step is almost the gradient itself: g / (1 + |g| / 1000)."""

PLAN: list[list[list[Row]]] = [[[[2, 0], [1]], [[4]]], [[[3]], [[0], [1]]]]
"""`PLAN[m][rank]`: rows of unlike width, two micro-batches, and more responses on one rank than on the other."""

WORKERS = 2
EXPERT_LIST = "llama with a list of experts"
OLMOE = "olmoe (experts)"


class Case(NamedTuple):
    architecture: str
    has_adapter: bool
    stage: Any
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.architecture}, {'adapter' if self.has_adapter else 'all weights'}, {self.stage}, {self.layout}"

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(zero_stage=self.stage, precision="fp32")


class Found(NamedTuple):
    """What one optimizer step gave."""

    logps: list[Tensor]  # by micro-batch (of one rank), or one after another: [responses] before the step
    weights: dict[str, Tensor]  # of what is trained, after the step
    grad_norm: float


CASES = [
    *itertools.starmap(Case, itertools.product(SUPPORTED, (False, True), (0, 3), ("branches", "padded"))),
    # Experts of which DeepSpeed itself knows nothing: their adapters, and ranks that run different ones.
    Case(OLMOE, True, 3, "branches"),
    Case(EXPERT_LIST, False, 3, "branches"),
    # A span at a time.
    *itertools.starmap(Case, itertools.product(("llama", OLMOE), (False, True), (0, 3), ("one_row",))),
]


class ExpertList(nn.Module):
    """Experts as modules of their own, the best one for each token: many of them never run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 16)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))

    def forward(self, hidden: Tensor) -> Tensor:
        weights, chosen = self.gate(hidden).softmax(-1).max(-1)
        result = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            tokens = chosen == expert
            result[tokens] = self.experts[expert](hidden[tokens]) * weights[tokens, None]
        return result


def load(folder: Path, case: Case) -> PairModel:
    """The policy as a worker loads it. Its adapter starts from noise: as it is, it would change nothing."""
    lora = LoraConfig(rank=4, alpha=8) if case.has_adapter else None
    with sharded_loading(case.engine, OPTIM):
        policy = load_policy(ModelConfig(path=str(folder / case.architecture), lora=lora), "fp32", seed=0)
    torch.manual_seed(1)
    if case.has_adapter:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
    if case.architecture == EXPERT_LIST:
        for layer in policy.body.layers:
            layer.mlp = ExpertList()
    return policy


def objective(logps: Tensor) -> Tensor:
    """A sum in which every response has another weight."""
    return (logps * torch.linspace(-1, 1.5, len(logps), dtype=logps.dtype)).sum()


def one_step(rank: int, folder: Path, case: Case) -> Found:
    items = items_of()
    engine = ZeroEngine(load(folder, case), case.engine, OPTIM, num_steps=1)
    engine.train(True)
    if case.layout == "one_row":
        engine.model.attend_with(Attention("spans", "asked"))
    found = []
    for m, ranks in enumerate(PLAN):
        logps = engine(make_batch(items, ranks[rank], case.layout)).logps
        engine.backward(objective(logps), is_last=m == len(PLAN) - 1)
        found.append(logps.detach())
    grad_norm = engine.step(1)["grad_norm"]
    return Found(found, engine.full_weights(), grad_norm)


def worker(rank: int, folder: Path) -> None:
    """Every case, one after another; `folder/rank` holds what was found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORKERS)
    dpo_ray.engine.deepspeed_config = nothing_kept_whole
    results = {}
    for case in CASES:
        gc.freeze()  # DeepSpeed collects garbage at every start; what was there before is not searched again
        print(f"worker {rank}: {case.name}", flush=True)  # shown where a worker dies: the last one is the case
        results[case.name] = one_step(rank, folder, case)._asdict()
    torch.save(results, folder / str(rank))


def nothing_kept_whole(engine: EngineConfig, optim: OptimConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, for a model so small that it would keep all weights and gather none."""
    config = deepspeed_config(engine, optim)
    if engine.zero_stage == 3:
        for name in (
            "param_persistence_threshold",
            "max_reuse_distance",
            "max_live_parameters",
            "prefetch_bucket_size",
        ):
            config["zero_optimization"][f"stage3_{name}"] = 0
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as Hugging Face folders."""
    path = tmp_path_factory.mktemp("zero")
    for name in {case.architecture for case in CASES}:
        build("llama" if name == EXPERT_LIST else name).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found, by the name of the case."""
    processes = torch.multiprocessing.spawn(worker, (folder,), nprocs=WORKERS, join=False)
    try:
        while not processes.join(timeout=1):
            pass
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / str(rank)) for rank in range(WORKERS)]


@cache
def expected(folder: Path, architecture: str, has_adapter: bool) -> tuple[Found, dict[str, Tensor]]:
    """One process, one forward for each response, plain autograd and AdamW; and the weights before the step."""
    items = items_of()
    model = load(folder, Case(architecture, has_adapter, 0, "padded")).language_model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=OPTIM.learning_rate, eps=OPTIM.eps, weight_decay=0.0)
    logps = [plain(model, [items[i] for row in rows for i in row]) for ranks in PLAN for rows in ranks]
    sum(map(objective, logps), torch.zeros(())).backward()
    norm = float(nn.utils.get_total_norm(p.grad for p in trained.values() if p.grad is not None))
    optimizer.step()
    return Found([torch.cat(logps).detach()], {name: p.detach() for name, p in trained.items()}, norm), before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_workers_say_and_learn_what_one_process_does(case: Case, folder: Path, found: list[dict[str, Any]]):
    results = [Found(**of_rank[case.name]) for of_rank in found]
    oracle, before = expected(folder, case.architecture, case.has_adapter)

    logps = torch.cat([results[rank].logps[m] for m in range(len(PLAN)) for rank in range(WORKERS)])
    torch.testing.assert_close(logps, oracle.logps[0], rtol=2e-5, atol=2e-5)

    weights = results[0].weights
    assert weights.keys() == oracle.weights.keys()
    changes = {name: oracle.weights[name] - value for name, value in before.items()}
    largest = max(change.abs().max().item() for change in changes.values())
    for name, change in changes.items():
        torch.testing.assert_close(
            weights[name] - before[name], change, rtol=1e-3, atol=2e-5 * largest, msg=partial("{}: {}".format, name)
        )
    assert results[0].grad_norm == pytest.approx(oracle.grad_norm, rel=1e-4)
    assert results[1].grad_norm == results[0].grad_norm
    assert results[1].weights == {}
