"""Held-out metrics of any model against a reference: both scored through the log-prob store, then pure arithmetic."""

from collections.abc import Callable
from typing import Any

import torch

from dpo_ray.config import RunConfig
from dpo_ray.data.encode import TokenTable
from dpo_ray.losses import PairTerms, loss_function, match_gaps
from dpo_ray.metrics import held_out_names, means_with_interval, pair_sums
from dpo_ray.models import ModelSource
from dpo_ray.reference import ReferenceTable, fill


def evaluate_model(
    run: RunConfig,
    model: ModelSource,
    reference: ModelSource | None,
    pairs: TokenTable,
    *,
    gpus_per_actor: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Loss, rewards, log-probs and accuracies of `model` on pairs, by the names of training (`eval/...`).

    Args:
        run: Loss, precision, batch, store and cluster are read.
        reference: None for a loss without one.
    """

    loss_of = loss_function(**run.loss.model_dump())
    tails = "tails" in loss_of.needs

    def table(source: ModelSource) -> ReferenceTable:
        filled = fill(pairs, source, run, gpus_per_actor=gpus_per_actor, per_token=tails, on_progress=on_progress)
        return ReferenceTable(filled.store, pairs, tails=tails)

    numbers = range(len(pairs))
    scored = table(model)
    policy = scored.logps(numbers)
    frozen = None if reference is None else table(reference).logps(numbers)
    terms = PairTerms(
        weight=torch.tensor([pair.weight for pair in pairs]),
        margin=torch.tensor([pair.margin for pair in pairs]),
        alignment=scored.alignment,
        matched_gap=None if frozen is None else match_gaps(policy.gap, frozen.gap),
    )
    loss = loss_of(policy, frozen, terms)
    sums = pair_sums(policy, frozen, loss, torch.ones(len(pairs), dtype=torch.float64))
    sums["entropy"] = torch.tensor(scored.entropy)
    return held_out_names(means_with_interval({name: float(value) for name, value in sums.items()}))
