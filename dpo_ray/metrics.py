"""Metrics: names and directions, exact sums and counts, intervals, operations. Torch and the standard library only.

Every mean is a sum over pairs (or tokens) divided by their number, both reduced over ranks.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpo_ray.losses import PairLogps, PreferenceLoss


class Metric(NamedTuple):
    """What a metric's number means."""

    direction: Literal["max", "min"]
    """Which way is better, for early stopping and the best checkpoint."""
    per: Literal["pair", "token", "longer", "shorter"]
    """What it is a mean over; the last two: the pairs whose chosen response has more, or fewer, tokens."""
    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric("min", "pair", "nats", "the training loss"),
    "rewards/chosen": Metric("max", "pair", "nats", "beta * (log pi - log pi_ref) of the chosen response"),
    "rewards/rejected": Metric("min", "pair", "nats", "the same of the rejected response"),
    "rewards/margins": Metric("max", "pair", "nats", "chosen less rejected reward"),
    "rewards/accuracies": Metric("max", "pair", "share", "pairs whose chosen reward is the higher; a tie counts half"),
    "rewards/accuracies_longer": Metric("max", "longer", "share", "the same of pairs whose chosen response is longer"),
    "rewards/accuracies_shorter": Metric(
        "max", "shorter", "share", "the same of pairs whose chosen response is shorter"
    ),
    "logps/chosen": Metric("max", "pair", "nats", "summed log-prob of the chosen response"),
    "logps/rejected": Metric("min", "pair", "nats", "summed log-prob of the rejected response"),
    "entropy": Metric("max", "token", "nats", "entropy of the next-token distribution at response tokens"),
    "kl": Metric("min", "token", "nats", "log pi_ref - log pi on the data's responses: how far the policy left them"),
}
"""The metrics of a training or held-out line, by TRL's names; `eval/` is put before them when held out."""

OBJECTIVES = [name for name, metric in METRICS.items() if metric.per in ("pair", "token")]
"""Those that every evaluation has, so that a run can be judged by them: any pairs will do."""


def pair_sums(
    policy: PairLogps, reference: PairLogps | None, loss: PreferenceLoss, weights: Tensor
) -> dict[str, Tensor]:
    """Sums over the pairs of a micro-batch, each a float64 scalar on its device.

    `kl` estimates KL(pi_ref || pi) per token, taking the data's responses for samples of the reference; it rises when
    the policy withdraws probability from them and may fall below zero when it fits them better.

    Args:
        weights: [B], 1 for a pair that counts, 0 for one that only fills a rank's quota of forward passes.
    """
    per_pair = {
        "num_pairs": weights,
        "num_tokens": policy.chosen_tokens + policy.rejected_tokens,
        "loss": loss.loss,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    if loss.chosen_rewards is not None and loss.rejected_rewards is not None:
        margins = loss.chosen_rewards - loss.rejected_rewards
        accuracies = (margins.sign() + 1) / 2
        longer, shorter = policy.chosen_tokens > policy.rejected_tokens, policy.chosen_tokens < policy.rejected_tokens
        per_pair |= {
            "rewards/chosen": loss.chosen_rewards,
            "rewards/rejected": loss.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": accuracies,
            "rewards/accuracies_longer": accuracies * longer,
            "rewards/accuracies_shorter": accuracies * shorter,
            "num_longer": longer,
            "num_shorter": shorter,
        }
    if reference is not None:
        per_pair["kl"] = reference.chosen + reference.rejected - policy.chosen - policy.rejected
    return {name: (value.detach().double() * weights).sum() for name, value in per_pair.items()}


class MetricSums:
    """Sums over pairs on the device; one reduction and one host sync when they are read, never per micro-batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduced(self) -> dict[str, float]:
        """The sums over all ranks. Every rank must call it, and must have added the same names."""
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name] for name in names])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        return dict(zip(names, totals.tolist(), strict=True))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Exact means from sums: over all pairs, some of them, or response tokens, as the registry says.

    The numbers of pairs are kept; a mean over no pair is left out.
    """
    counts = {"pair": "num_pairs", "token": "num_tokens", "longer": "num_longer", "shorter": "num_shorter"}
    over = {name: sums.get(counts[metric.per], 0.0) for name, metric in METRICS.items()}
    result = {name: sums[name] / count for name, count in over.items() if name in sums and count}
    return result | {name: int(sums[name]) for name in ("num_pairs", "num_longer", "num_shorter") if name in sums}


def means_with_interval(sums: dict[str, float]) -> dict[str, float]:
    """Means, and the 95 % Wilson interval of the accuracies."""
    result = means(sums)
    if "rewards/accuracies" in result:
        low, high = wilson_interval(result["rewards/accuracies"], int(result["num_pairs"]))
        result |= {"rewards/accuracies_low": low, "rewards/accuracies_high": high}
    return result


def held_out_names(metrics: dict[str, float]) -> dict[str, float]:
    """The same under the names of held-out metrics, `eval/...`."""
    return {f"eval/{name}": value for name, value in metrics.items()}


def wilson_interval(share: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927); z = 1.96 is 95 %. (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def model_flops(
    *,
    num_tokens: int,
    num_predicted: int,
    num_attended: int,
    body_weights: int,
    head_weights: int,
    attention_width: int,
    training: bool = True,
) -> int:
    """Floating-point operations that a decoder cannot do without: matrix products alone, two operations for each
    multiplication, the backward pass twice the forward (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    What is computed beyond (padding, hidden pairs of tokens, logits that are not read, activations made again) does not
    count, so that the share of a device's peak says how much of it went into the model.

    Args:
        num_tokens: Tokens that go through the body; each prompt once, and no response's last token.
        num_predicted: Tokens that are predicted, those of responses.
        num_attended: Pairs of tokens of which one sees the other, itself included; see `Lengths.attended`.
        body_weights: Weights of the body's linear layers that each token meets.
        head_weights: Those of the output layer.
        attention_width: Layers times heads times their width.
        training: False: the forward pass alone.
    """
    products = body_weights * num_tokens + head_weights * num_predicted + 2 * attention_width * num_attended
    return (6 if training else 2) * products


def standard_error(name: str, value: float, count: int) -> float:
    """Binomial standard error of a share; 0 for metrics whose spread is not known from their mean."""
    if METRICS[name].unit != "share" or count == 0:
        return 0.0
    return math.sqrt(max(value * (1 - value), 0.0) / count)
