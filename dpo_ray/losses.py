"""Preference losses: pure functions of sequence log-probabilities.

They see no model, no engine and no file, so their numerics are tested alone.
B is the number of preference pairs in the micro-batch; log-probabilities are in nats.

A new loss is a function here, a section in `config` and a line in `LOSSES`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Summed log p(response | prompt) of both responses under one model, and the lengths of the responses."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    chosen_tokens: Tensor  # [B], number of response tokens
    rejected_tokens: Tensor  # [B]


class PreferenceLoss(NamedTuple):
    """Per-pair loss, and the implicit rewards it compares; None for a loss without a reference."""

    loss: Tensor  # [B], carries gradient
    chosen_rewards: Tensor | None  # [B], detached
    rejected_rewards: Tensor | None  # [B], detached


def dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """Direct Preference Optimization, with optional label smoothing.

    With h the policy's log-ratio of chosen to rejected less the reference's,

        loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

    eps = 0 is eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290). eps > 0 is conservative DPO: eq. 3 of Mitchell 2023,
    "A note on DPO with noisy preferences".

    Args:
        policy: Log-probs under the model in training, with gradient.
        reference: Log-probs under the frozen reference, without.
        beta: KL penalty weight, > 0.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5).

    Returns:
        The loss of each pair, not reduced, and rewards beta * (log pi - log pi_ref).
    """
    chosen_ratio = policy.chosen - reference.chosen
    rejected_ratio = policy.rejected - reference.rejected
    logits = beta * (chosen_ratio - rejected_ratio)

    loss = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return PreferenceLoss(loss, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def sft_loss(policy: PairLogps, reference: PairLogps | None = None) -> PreferenceLoss:
    """Negative log-likelihood of the chosen response, in nats per token; the reference is not looked at.

    Every pair weighs the same, whatever its length, as in all other losses here.
    """
    return PreferenceLoss(-policy.chosen / policy.chosen_tokens, None, None)


LossFunction = Callable[[PairLogps, PairLogps | None], PreferenceLoss]

LOSSES: Mapping[str, Callable[..., PreferenceLoss]] = {"dpo": dpo_loss, "sft": sft_loss}
"""`loss.kind` -> function; its keyword arguments are the other keys of that section."""

REFERENCE_FREE = frozenset({"sft"})
"""Losses that need no reference pass."""


def loss_function(kind: str, options: Mapping[str, Any]) -> LossFunction:
    """The loss of a recipe: `loss_function("dpo", {"beta": 0.1, "label_smoothing": 0.0})`."""
    return partial(LOSSES[kind], **options)
