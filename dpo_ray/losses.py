"""Preference losses: pure functions of sequence log-probabilities.

They see no model, no engine and no file, so their numerics are tested alone.
B is the number of preference pairs in the micro-batch; log-probabilities are in nats.

A new loss is a function here, a section in `config` and a line in `LOSSES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Summed log p(response | prompt) of both responses under one model, and the lengths of the responses."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    chosen_tokens: Tensor  # [B], number of response tokens
    rejected_tokens: Tensor  # [B]
    chosen_tail: Tensor | None = None  # [B], what of `chosen` stands beyond the length of the shorter response (LD-DPO)
    rejected_tail: Tensor | None = None  # [B]

    @property
    def gap(self) -> Tensor:
        """[B], log p(chosen) - log p(rejected)."""
        return self.chosen - self.rejected


class PairTerms(NamedTuple):
    """What some losses read besides log-probs; None where no loss of the recipe needs it."""

    weight: Tensor | None = None  # [B], weight of the pair, from the data
    margin: Tensor | None = None  # [B], by how much the chosen response is better, from the data
    alignment: Tensor | None = None  # [B], WPO's weight: how likely the policy is to say both responses; no gradient
    matched_gap: Tensor | None = None  # [B], the reference's log-ratio at the pair's rank in the step; see `match_gaps`


class PreferenceLoss(NamedTuple):
    """Per-pair loss, and the implicit rewards it compares; None for a loss without a reference."""

    loss: Tensor  # [B], carries gradient
    chosen_rewards: Tensor | None  # [B], detached
    rejected_rewards: Tensor | None  # [B], detached

    @property
    def margins(self) -> Tensor | None:
        """[B], chosen less rejected reward."""
        if self.chosen_rewards is None or self.rejected_rewards is None:
            return None
        return self.chosen_rewards - self.rejected_rewards


def dpo_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    margin: Tensor | float = 0.0,
) -> PreferenceLoss:
    """Direct Preference Optimization, with optional label smoothing.

    With h the policy's log-ratio of chosen to rejected less the reference's,

        loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

    eps = 0 is eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290). eps > 0 is conservative DPO: eq. 3 of Mitchell 2023,
    "A note on DPO with noisy preferences". A margin m makes it beta h - m: DPO with an offset, of Amini et al. 2024
    (arXiv:2402.10571).

    Args:
        policy: Log-probs under the model in training, with gradient.
        reference: Log-probs under the frozen reference, without.
        beta: KL penalty weight, > 0.
        label_smoothing: eps, the assumed share of flipped labels, in [0, 0.5).
        f_divergence: What keeps the policy near the reference; see `_scores`.
        margin: [B] or a number, in the unit of rewards.

    Returns:
        The loss of each pair, not reduced, and rewards beta * (log pi - log pi_ref).
    """
    logits = beta * _score_gap(policy, reference, f_divergence, f_alpha) - margin
    return _with_rewards(_smoothed(logits, label_smoothing), policy, reference, beta)


def robust_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    margin: Tensor | float = 0.0,
) -> PreferenceLoss:
    """Robust DPO, unbiased when a share eps of the labels is flipped: eq. 12 of Chowdhury et al. (arXiv:2403.00409).

    loss = [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps)
    """
    logits = beta * _score_gap(policy, reference, f_divergence, f_alpha) - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return _with_rewards(loss / (1 - 2 * label_smoothing), policy, reference, beta)


def ipo_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    reduction: str = "mean",
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> PreferenceLoss:
    """Identity preference optimization: (h - 1 / (2 beta))^2, eq. 17 of Azar et al. 2023 (arXiv:2310.12036).

    With `reduction` `mean`, h is of log-ratios per token, the form behind the paper's results as its authors told TRL;
    with `sum` of summed ones, as in the original DPO code and OpenRLHF.
    """
    chosen, rejected = _scores(policy, reference, f_divergence, f_alpha)
    if reduction == "mean":
        chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
    return _with_rewards((chosen - rejected - 1 / (2 * beta)) ** 2, policy, reference, beta)


def hinge_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    margin: Tensor | float = 0.0,
) -> PreferenceLoss:
    """max(0, 1 - beta h): the hinge of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on DPO's reward, as in RSO."""
    gap = _score_gap(policy, reference, f_divergence, f_alpha)
    return _with_rewards(F.relu(1 - beta * gap + margin), policy, reference, beta)


def sigmoid_norm_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    margin: Tensor | float = 0.0,
) -> PreferenceLoss:
    """Length-normalised DPO: log-ratios per token. Eq. 6 of Lambert et al. 2024 (Tulu 3, arXiv:2411.15124).

    The same as `dpo_norm` of open-instruct and `preference_average_log_probs` of NeMo RL; beta is near 5 here, not 0.1.
    """
    chosen, rejected = _scores(policy, reference, f_divergence, f_alpha)
    gap = chosen / policy.chosen_tokens - rejected / policy.rejected_tokens
    return _with_rewards(-F.logsigmoid(beta * gap - margin), policy, reference, beta)


def exo_pair_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> PreferenceLoss:
    """KL of the policy's preference from the smoothed label: eq. 16 of Ji et al. 2024 (EXO, arXiv:2402.00856).

    loss = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),    q = sigmoid(beta h)
    """
    logits = beta * _score_gap(policy, reference, f_divergence, f_alpha)
    log_q, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
    loss = log_q.exp() * (log_q - math.log1p(-label_smoothing)) + log_rest.exp() * (
        log_rest - math.log(label_smoothing)
    )
    return _with_rewards(loss, policy, reference, beta)


def discopop_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> PreferenceLoss:
    """Log-ratio modulated loss: a blend of the logistic and the exponential one. Eq. 5 of Lu et al. 2024
    (DiscoPOP, arXiv:2406.08414).

        loss = (1 - m) (-log sigmoid(beta h)) + m exp(-beta h),    m = sigmoid(beta h / tau)
    """
    logits = beta * _score_gap(policy, reference, f_divergence, f_alpha)
    # m exp(-x) as one exponential: at a large negative x the factors are 0 and infinity, their product is small.
    blended = (F.logsigmoid(logits / tau) - logits).exp()
    return _with_rewards(-torch.sigmoid(-logits / tau) * F.logsigmoid(logits) + blended, policy, reference, beta)


def dpop_loss(policy: PairLogps, reference: PairLogps, *, beta: float, penalty: float = 50.0) -> PreferenceLoss:
    """DPO-Positive: punishes chosen log-probs that sink below the reference's. Eq. 3 of Pal et al. 2024
    (Smaug, arXiv:2402.13228).

        loss = -log sigmoid(beta (h - penalty max(0, log pi_ref(chosen) - log pi(chosen))))
    """
    gap = _score_gap(policy, reference, "reverse_kl", None)
    sunk = F.relu(reference.chosen - policy.chosen)
    return _with_rewards(-F.logsigmoid(beta * (gap - penalty * sunk)), policy, reference, beta)


def nca_pair_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PreferenceLoss:
    """Noise contrastive alignment of a pair, in absolute rewards. Chen et al. 2024 (arXiv:2402.05369), section 4."""
    chosen, rejected = _rewards(policy, reference, beta)
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return _with_rewards(loss, policy, reference, beta)


def bco_pair_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PreferenceLoss:
    """Binary classification of both responses, without the moving threshold: Jung et al. 2024 (arXiv:2404.04656)."""
    chosen, rejected = _rewards(policy, reference, beta)
    return _with_rewards(-F.logsigmoid(chosen) - F.logsigmoid(-rejected), policy, reference, beta)


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PreferenceLoss:
    """Self-play preference optimization with hard labels: eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675), P in {0, 1}."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return _with_rewards((chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, policy, reference, beta)


def apo_zero_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PreferenceLoss:
    """Anchored preference optimization for chosen responses better than the model's own: eq. 7 of D'Oosterlinck et al.
    2024 (arXiv:2408.06266)."""
    chosen, rejected = _rewards(policy, reference, beta)
    return _with_rewards(torch.sigmoid(-chosen) + torch.sigmoid(rejected), policy, reference, beta)


def apo_down_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PreferenceLoss:
    """The same for chosen responses worse than the model's own: eq. 8 of arXiv:2408.06266."""
    chosen, rejected = _rewards(policy, reference, beta)
    return _with_rewards(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), policy, reference, beta)


def aot_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, matched_gap: Tensor, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Alignment by optimal transport: the sorted log-ratios of all pairs, policy against reference. Melnyk et al. 2024
    (arXiv:2406.05882), the paired form with the logistic loss.

    It is conservative DPO in which each pair's reference log-ratio is that of the pair with its rank among the
    reference's, not its own.

    Args:
        matched_gap: [B], from `match_gaps` over all pairs of the step.
    """
    logits = beta * (policy.gap - matched_gap)
    return _with_rewards(_smoothed(logits, label_smoothing), policy, reference, beta)


def match_gaps(policy_gaps: Tensor, reference_gaps: Tensor) -> Tensor:
    """The reference's log-ratio (chosen less rejected) that has the rank of each pair's own under the policy.

    Args:
        policy_gaps, reference_gaps: [n], over all pairs that are compared: a step's, or a whole held-out set's.
    """
    matched = torch.empty_like(reference_gaps)
    matched[policy_gaps.argsort(stable=True)] = reference_gaps.sort().values
    return matched


def simpo_loss(policy: PairLogps, reference: PairLogps | None = None, *, beta: float, gamma: float) -> PreferenceLoss:
    """Mean log-probs as rewards, with a target margin: eq. 6 of Meng et al. 2024 (arXiv:2405.14734). No reference.

    loss = -log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma)
    """
    chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    loss = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def cpo_loss(policy: PairLogps, reference: PairLogps | None = None, *, beta: float) -> PreferenceLoss:
    """Contrastive preference optimization: DPO under a uniform reference, eq. 5 of Xu et al. 2024 (arXiv:2401.08417).

    The paper adds the likelihood of the chosen response, eq. 6: here `sft_weight: 1`.
    """
    loss = -F.logsigmoid(beta * (policy.chosen - policy.rejected))
    return PreferenceLoss(loss, beta * policy.chosen.detach(), beta * policy.rejected.detach())


def orpo_loss(policy: PairLogps, reference: PairLogps | None = None, *, beta: float) -> PreferenceLoss:
    """Likelihood of the chosen response plus a log odds ratio: eq. 6 of Hong et al. 2024 (arXiv:2403.07691).

        loss = NLL(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)),    odds = p / (1 - p)

    with p = exp(mean log-prob); beta is the paper's lambda. No reference.
    """
    chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return PreferenceLoss(-chosen - beta * F.logsigmoid(odds), beta * chosen.detach(), beta * rejected.detach())


def sft_loss(policy: PairLogps, reference: PairLogps | None = None) -> PreferenceLoss:
    """Negative log-likelihood of the chosen response, in nats per token; the reference is not looked at.

    Every pair weighs the same, whatever its length, as in all other losses here.
    """
    return PreferenceLoss(-policy.chosen / policy.chosen_tokens, None, None)


LOSSES: Mapping[str, Callable[..., PreferenceLoss]] = {
    "dpo": dpo_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "dpop": dpop_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "aot": aot_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
    "sft": sft_loss,
}
"""`loss.kind` -> function; its keyword arguments are the other keys of that section."""

REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
"""Losses that need no reference pass."""


class Loss(NamedTuple):
    """The loss of a recipe: call it with the log-probs of a micro-batch's pairs."""

    function: Callable[[PairLogps, PairLogps | None, PairTerms], PreferenceLoss]
    needs: frozenset[str]
    """Of `reference`, `tails` (of `PairLogps`) and the fields of `PairTerms`: what it must be given."""

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None, terms: PairTerms | None = None
    ) -> PreferenceLoss:
        return self.function(policy, reference, terms or PairTerms())


def loss_function(kind: str, **options: Any) -> Loss:
    """The loss of a recipe: `loss_function(**run.loss.model_dump())`; `sum` or one of `LOSSES` with its modifiers."""
    return _weighted_sum(**options) if kind == "sum" else _modified(kind, **options)


def _weighted_sum(*, losses: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Loss:
    """Several losses added; the rewards are the first one's."""
    parts = [loss_function(**options) for options in losses]

    def function(policy: PairLogps, reference: PairLogps | None, terms: PairTerms) -> PreferenceLoss:
        results = [part(policy, reference, terms) for part in parts]
        weighted = [weight * result.loss for weight, result in zip(weights, results, strict=True)]
        return results[0]._replace(loss=torch.stack(weighted).sum(0))

    return Loss(function, frozenset().union(*(part.needs for part in parts)))


def _modified(
    kind: str,
    *,
    data_weights: bool = False,
    sft_weight: float = 0.0,
    wpo: bool = False,
    ld_alpha: float = 1.0,
    margin_weight: float = 0.0,
    **options: Any,
) -> Loss:
    """One of `LOSSES`, with what may be laid over it.

    Args:
        data_weights: Multiplies the loss by the pair's weight.
        sft_weight: Adds that much of `sft_loss`.
        wpo: Multiplies the preference loss by how likely the policy itself is to say the pair: eq. 2 of Zhou et al.
            2024 (WPO, arXiv:2406.11827), with its sampled alignment.
        ld_alpha: Weight of the tokens beyond the shorter response's length, in policy and reference: Liu et al. 2024
            (LD-DPO, arXiv:2409.06411). 1 is the plain sum.
        margin_weight: Times the pair's margin is what the reward margin must exceed.
        options: The keyword arguments of the loss.
    """
    base: Callable[..., PreferenceLoss] = partial(LOSSES[kind], **options)
    conditions = {
        "reference": kind not in REFERENCE_FREE,
        "tails": ld_alpha != 1.0,
        "weight": data_weights,
        "margin": margin_weight != 0.0,
        "alignment": wpo,
        "matched_gap": kind == "aot",
    }

    def function(policy: PairLogps, reference: PairLogps | None, terms: PairTerms) -> PreferenceLoss:
        extra = {"margin": margin_weight * _given(terms.margin)} if margin_weight else {}
        extra |= {"matched_gap": _given(terms.matched_gap)} if kind == "aot" else {}
        result = base(_desensitized(policy, ld_alpha), _desensitized(reference, ld_alpha), **extra)
        if ld_alpha != 1.0 and reference is not None:  # rewards stay what they are everywhere
            result = _with_rewards(result.loss, policy, reference, options["beta"])
        loss = result.loss * _given(terms.alignment) if wpo else result.loss
        if sft_weight:
            loss = loss + sft_weight * sft_loss(policy).loss
        return result._replace(loss=loss * _given(terms.weight) if data_weights else loss)

    return Loss(function, frozenset(name for name, holds in conditions.items() if holds))


def _desensitized(logps: PairLogps | None, alpha: float) -> PairLogps | None:
    """Log-probs in which tokens beyond the shorter response's length count `alpha`."""
    if logps is None or alpha == 1.0:
        return logps
    return logps._replace(
        chosen=logps.chosen - (1 - alpha) * _given(logps.chosen_tail),
        rejected=logps.rejected - (1 - alpha) * _given(logps.rejected_tail),
    )


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "see `Loss.needs`"
    return value


def _scores(policy: PairLogps, reference: PairLogps, f_divergence: str, f_alpha: float | None) -> tuple[Tensor, Tensor]:
    """f'(pi / pi_ref) of both responses: the reward under an f-divergence instead of the KL, up to beta and a constant.
    Table 1 of Wang et al. 2023 (arXiv:2309.16240); `reverse_kl` is DPO's own, the log-ratio."""

    def derivative(log_ratio: Tensor) -> Tensor:
        if f_divergence == "forward_kl":
            return 1 - torch.exp((-log_ratio).clamp(max=MAX_EXPONENT))
        if f_divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        if f_alpha is not None and f_alpha != 1.0:
            return (torch.exp(((f_alpha - 1) * log_ratio).clamp(max=MAX_EXPONENT)) - 1) / (f_alpha - 1)
        return log_ratio

    return derivative(policy.chosen - reference.chosen), derivative(policy.rejected - reference.rejected)


MAX_EXPONENT = 80.0
"""exp of it is still a float32."""


def _score_gap(policy: PairLogps, reference: PairLogps, f_divergence: str, f_alpha: float | None) -> Tensor:
    """h: the chosen response's score less the rejected one's."""
    chosen, rejected = _scores(policy, reference, f_divergence, f_alpha)
    return chosen - rejected


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss of labels of which a share is taken to be flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def _with_rewards(loss: Tensor, policy: PairLogps, reference: PairLogps, beta: float) -> PreferenceLoss:
    """The loss with DPO's rewards."""
    chosen, rejected = _rewards(policy, reference, beta)
    return PreferenceLoss(loss, chosen.detach(), rejected.detach())


def _rewards(policy: PairLogps, reference: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's implicit rewards, beta * (log pi - log pi_ref), of the chosen and the rejected response."""
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 (Maechler 2012)."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
