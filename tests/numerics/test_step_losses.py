"""Losses that look beyond the two sums of a pair: loss and gradient of a whole step are those of plain Hugging Face
forwards over the same pairs, whatever the micro-batches and the number of workers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.losses import PairLogps, PairTerms, loss_function, match_gaps

LOSSES: dict[str, dict[str, Any]] = {
    "length desensitized": {"kind": "dpo", "beta": 0.5, "ld_alpha": 0.3},
    "on policy": {"kind": "dpo", "beta": 0.5, "wpo": True, "data_weights": True},
    "offset": {"kind": "dpo", "beta": 0.5, "margin_weight": 2.0},
    "optimal transport": {"kind": "aot", "beta": 0.5, "sft_weight": 0.1},
    "sum": {
        "kind": "sum",
        "losses": [{"kind": "dpo", "beta": 0.5, "ld_alpha": 0.0}, {"kind": "aot"}, {"kind": "sft"}],
        "weights": [1.0, 0.5, 0.2],
    },
}
BUDGETS = (64, 4096)
NUM_PAIRS = 7


def recipe(model: Path, loss: dict[str, Any], tokens_per_device: int) -> RunConfig:
    return parse_run(
        {
            "name": "step",
            "model": {"path": str(model)},
            "data": {"sources": [{"path": "none"}]},
            "loss": loss,
            "batch": {"tokens_per_device": tokens_per_device, "row_tokens": 32},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "optim": {"learning_rate": 1e-3, "max_grad_norm": 0},
        }
    )


def pairs() -> list[Any]:
    from dpo_ray.pairs import TokenizedPair

    rng = np.random.default_rng(0)

    def ids() -> Any:
        return rng.integers(3, 250, rng.integers(1, 12)).astype(np.int32)

    return [TokenizedPair(str(i), ids(), ids(), ids(), 0.5 + i, i / 4) for i in range(NUM_PAIRS)]


def reference_model(model: Path) -> Any:
    """The policy, moved a little: at equal weights half of the losses would be blind."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    torch.manual_seed(1)
    for parameter in loaded.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return loaded


def worker(rank: int, world_size: int, folder: Path, model: Path) -> None:
    """All losses and budgets in one process group; rank 0 writes loss and gradient norm of each."""
    from types import SimpleNamespace

    from torch.distributed import destroy_process_group, init_process_group

    from dpo_ray.data.batching import lengths_of, plan_step
    from dpo_ray.engine import ZeroEngine
    from dpo_ray.models import ModelSource, load_policy
    from dpo_ray.reference import ReferenceStore, ReferenceTable, ResponseScorer
    from dpo_ray.train import Worker

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))  # DeepSpeed asks for them
    init_process_group("gloo", init_method=f"file://{folder}/group-{world_size}", rank=rank, world_size=world_size)
    store = ReferenceStore(str(folder / f"store-{world_size}-{rank}"), "f", "fp32")
    run = recipe(model, LOSSES["offset"], 4096)
    scorer = ResponseScorer(ModelSource(str(folder / "reference")), "fp32", run.batch, per_token=True)
    store.write(scorer.score([pair.branches for pair in pairs()]))
    found: dict[str, list[float]] = {}
    for name, loss in LOSSES.items():
        for budget in BUDGETS:
            run = recipe(model, loss, budget)
            trainer = Worker(
                ZeroEngine(load_policy(run.model, "fp32", 0), run.engine, run.optim, 4), run, rank, world_size
            )
            tails = "tails" in trainer.loss.needs

            def plan(numbers: Any, num_workers: int, run: RunConfig = run) -> Any:
                chosen = [pairs()[i] for i in numbers]
                options = run.batch.model_dump(include={"tokens_per_device", "row_tokens", "layout"})
                return chosen, plan_step([lengths_of(pair) for pair in chosen], num_workers=num_workers, **options)

            table = ReferenceTable(store, pairs(), tails=tails)
            pair_set: Any = SimpleNamespace(pairs=pairs(), reference=table, plan=plan)
            sums, _ = trainer.step(pair_set, range(NUM_PAIRS), 2)
            found[f"{name}/{budget}"] = [sums["loss"] / NUM_PAIRS, trainer.last_step["grad_norm"]]
    assert trainer.times.shares() == {}
    trainer.step(pair_set, range(NUM_PAIRS), 3, is_timed=True)
    shares = trainer.times.shares()
    trainer.step(pair_set, range(NUM_PAIRS), 4)
    assert trainer.times.shares() == shares, "only the step that was to be timed"
    if rank == 0:
        (folder / f"times-{world_size}.json").write_text(json.dumps(shares))
        (folder / f"found-{world_size}.json").write_text(json.dumps(found))
    destroy_process_group()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one and two workers wrote."""
    folder = tmp_path_factory.mktemp("step")
    reference_model(tiny_model).save_pretrained(folder / "reference")
    for world_size in (1, 2):
        torch.multiprocessing.spawn(worker, (world_size, folder, tiny_model), nprocs=world_size)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[tuple[str, int, int], list[float]]:
    results = {}
    for world_size in (1, 2):
        for key, values in json.loads((folder / f"found-{world_size}.json").read_text()).items():
            name, _, budget = key.partition("/")
            results[name, int(budget), world_size] = values
    return results


def plain(model: Any) -> tuple[PairLogps, Tensor]:
    """Each response by a forward of its own; its sum, its tail, and WPO's weight of the pair."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("chosen", "rejected", "chosen_tail", "rejected_tail")}
    lengths, alignments = [], []
    for pair in pairs():
        shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
        alignment = torch.zeros((), dtype=torch.float64)
        for side in ("chosen", "rejected"):
            response = getattr(pair, f"{side}_ids")
            ids = torch.from_numpy(np.concatenate((pair.prompt_ids, response))).long()[None]
            logps = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].double().log_softmax(-1)
            tokens = logps.gather(-1, ids[0, len(pair.prompt_ids) :, None])[:, 0]
            columns[side].append(tokens.sum())
            columns[f"{side}_tail"].append(tokens[shorter:].sum())
            alignment = alignment + (tokens - logps.exp().square().sum(-1).log()).mean().detach()
        lengths.append([float(len(pair.chosen_ids)), float(len(pair.rejected_ids))])
        alignments.append(alignment.exp())
    chosen_tokens, rejected_tokens = torch.tensor(lengths, dtype=torch.float64).unbind(1)
    logps = {name: torch.stack(values) for name, values in columns.items()}
    return PairLogps(**logps, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens), torch.stack(alignments)


def test_the_time_of_a_step_is_taken_apart(folder: Path):
    for world_size in (1, 2):
        shares = json.loads((folder / f"times-{world_size}.json").read_text())
        assert shares.keys() == {"data", "forward", "backward", "optimizer", "communication"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_that_of_plain_forwards_over_its_pairs(
    found: dict[tuple[str, int, int], list[float]], tiny_model: Path, name: str, budget: int, world_size: int
):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    policy, alignment = plain(model)
    with torch.no_grad():
        reference, _ = plain(reference_model(tiny_model))
    options = recipe(tiny_model, LOSSES[name], budget).loss.model_dump()
    terms = PairTerms(
        weight=torch.tensor([pair.weight for pair in pairs()]),
        margin=torch.tensor([pair.margin for pair in pairs()]),
        alignment=alignment,
        matched_gap=match_gaps(policy.gap.detach(), reference.gap),
    )
    loss = loss_function(**options)(policy, reference, terms).loss.mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert found[name, budget, world_size] == pytest.approx([loss.item(), norm], rel=2e-4)
