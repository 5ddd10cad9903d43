"""Held-out metrics of any model against a reference: both scored through the log-prob store, then pure arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_ray.config import RunConfig
from dpo_ray.data.encode import TokenTable
from dpo_ray.evaluate.calibration import calibration, length_controlled_accuracy
from dpo_ray.losses import PairTerms, loss_function, match_gaps
from dpo_ray.metrics import means_with_interval, pair_sums, wilson_interval
from dpo_ray.models import ModelSource
from dpo_ray.pairs import TokenizedPair
from dpo_ray.reference import ReferenceTable, fill

MAX_LISTED = 2000
"""Pairs whose rewards are listed, for the pictures of a report."""
LENGTH_GROUPS = 4
MIN_PAIRS = 40
"""Fewer tell nothing of length apart from worth, and draw no reliability curve."""


class HeldOut(NamedTuple):
    """What a model makes of held-out pairs."""

    metrics: dict[str, float]
    """By the names of training."""

    chosen_rewards: NDArray[np.float64] | None
    """[N], nats; None for a loss without rewards."""

    rejected_rewards: NDArray[np.float64] | None
    """[N], nats."""

    @property
    def margins(self) -> NDArray[np.float64] | None:
        """[N], chosen less rejected reward, nats."""
        if self.chosen_rewards is None or self.rejected_rewards is None:
            return None
        return self.chosen_rewards - self.rejected_rewards


def evaluate_model(
    run: RunConfig,
    model: ModelSource,
    reference: ModelSource | None,
    pairs: TokenTable,
    *,
    gpus_per_actor: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:
    """Loss, rewards, log-probs and accuracies of `model` on pairs.

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
    metrics = means_with_interval({name: float(value) for name, value in sums.items()})
    rewards = (None if side is None else side.double().numpy() for side in (loss.chosen_rewards, loss.rejected_rewards))
    return HeldOut(metrics, *rewards)


def held_out_tree(
    after: HeldOut, before: HeldOut | None, pairs: Sequence[TokenizedPair], sources: Mapping[str, str]
) -> dict[str, Any]:
    """All that is told of held-out pairs, as `evaluation.json` has it.

    Args:
        before: Of the model that is compared with, where that is not the reference, whose rewards are all zero.
        sources: Pair id -> where it was read.
    """
    tree: dict[str, Any] = {"num_pairs": len(pairs), "metrics": after.metrics}
    margins = after.margins
    if margins is None:
        return tree
    chosen = np.array([len(pair.chosen_ids) for pair in pairs])
    rejected = np.array([len(pair.rejected_ids) for pair in pairs])
    longer = chosen - rejected
    tree["longer_is_better"] = _share(float((np.sign(longer) + 1).sum() / 2), len(pairs))
    if len(pairs) >= MIN_PAIRS:
        tree["length_controlled_accuracy"] = _named(length_controlled_accuracy(margins, longer))
        tree["calibration"] = _calibration(margins)
    tree["by_source"] = [
        {"source": source, **_group(margins, rows)}
        for source, rows in _rows_by([sources[pair.pair_id] for pair in pairs]).items()
    ]
    tree["by_length"] = [
        {"tokens": name.strip(), **_group(margins, rows)}
        for name, rows in _rows_by(_length_groups(chosen + rejected)).items()
    ]
    tree["rewards"] = {"before": _listed(before), "after": _listed(after)}
    return tree


def _calibration(margins: NDArray[np.float64]) -> dict[str, Any]:
    found = calibration(margins)
    return {
        "calibration_error": _named(found.error),
        "expected_calibration_error": found.ece,
        "if_calibrated": found.ece_if_calibrated,
        "brier": found.brier.estimate,
        "temperature": found.temperature,
        "bins": [
            {
                "confidence": one.confidence,
                "accuracy": one.accuracy.estimate,
                "low": one.accuracy.low,
                "high": one.accuracy.high,
                "num_pairs": one.num_pairs,
            }
            for one in found.bins
        ],
    }


def _named(interval: Any) -> dict[str, float]:
    value, low, high = interval
    return {"value": value, "low": low, "high": high}


def _share(count: float, total: int) -> dict[str, float]:
    low, high = wilson_interval(count / total, total)
    return {"value": count / total, "low": low, "high": high}


def _rows_by(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> its rows, by name."""
    return {name: [row for row, other in enumerate(names) if other == name] for name in sorted(set(names))}


def _group(margins: NDArray[np.float64], rows: Sequence[int]) -> dict[str, Any]:
    own = margins[list(rows)]
    accuracy = float(((np.sign(own) + 1) / 2).mean())
    low, high = wilson_interval(accuracy, len(own))
    return {
        "num_pairs": len(own),
        "rewards/accuracies": accuracy,
        "low": low,
        "high": high,
        "rewards/margins": float(own.mean()),
        "expected_calibration_error": calibration(own).ece if len(own) >= MIN_PAIRS else None,
    }


def _length_groups(tokens: NDArray[np.int64]) -> list[str]:
    """The quarter that each pair is in, by the tokens of both responses: its bounds, of equal width to sort by."""
    bounds = np.unique(np.quantile(tokens, np.linspace(0, 1, LENGTH_GROUPS + 1)).round().astype(int))
    numbers = np.clip(np.searchsorted(bounds, tokens, side="right") - 1, 0, max(0, len(bounds) - 2))
    width = len(str(tokens.max()))
    return [f"{int(tokens[numbers == n].min()):>{width}}-{int(tokens[numbers == n].max())}" for n in numbers]


def _listed(held_out: HeldOut | None) -> dict[str, list[float]] | None:
    if held_out is None or held_out.chosen_rewards is None or held_out.rejected_rewards is None:
        return None
    return {
        "chosen": held_out.chosen_rewards[:MAX_LISTED].round(6).tolist(),
        "rejected": held_out.rejected_rewards[:MAX_LISTED].round(6).tolist(),
    }
