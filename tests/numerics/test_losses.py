"""The losses against their formulas and hand-worked values, in float64, and their gradients against closed forms."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from dpo_ray.config import DpoConfig, SftConfig
from dpo_ray.losses import PairLogps, dpo_loss, loss_function, sft_loss


def logps(chosen: list[float], rejected: list[float], *, grad: bool = False) -> PairLogps:
    """Log-probs in float64; the chosen responses have 2, 3, 4 ... tokens, the rejected ones one more."""
    sides = (torch.tensor(side, dtype=torch.float64, requires_grad=grad) for side in (chosen, rejected))
    lengths = torch.arange(2, 2 + len(chosen), dtype=torch.float64)
    return PairLogps(*sides, lengths, lengths + 1)


def swapped(pair: PairLogps) -> PairLogps:
    return PairLogps(pair.rejected, pair.chosen, pair.rejected_tokens, pair.chosen_tokens)


POLICY = logps([-4.0, -9.0, -1.0, -30.0], [-6.0, -3.0, -1.5, -30.0])
REFERENCE = logps([-5.0, -8.0, -1.0, -20.0], [-5.0, -4.0, -2.5, -33.0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_policy_equal_to_reference_costs_log_two_and_earns_nothing(beta: float, label_smoothing: float):
    out = dpo_loss(POLICY, POLICY, beta=beta, label_smoothing=label_smoothing)
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)
    assert out.chosen_rewards is not None
    assert out.rejected_rewards is not None
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0] * 4


def test_values_worked_by_hand():
    # h = (-10 + 12) - (-11 + 11) = 2 nats; beta h = 1; loss = log(1 + e**-1).
    out = dpo_loss(logps([-10.0], [-12.0]), logps([-11.0], [-11.0]), beta=0.5)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-14)
    assert out.chosen_rewards is not None
    assert out.rejected_rewards is not None
    assert out.chosen_rewards.item() == pytest.approx(0.5, rel=1e-14)
    assert out.rejected_rewards.item() == pytest.approx(-0.5, rel=1e-14)


def test_a_smoothed_value_worked_by_hand():
    # beta h = 1 and a quarter of the labels flipped: 0.75 log(1 + 1/e) + 0.25 log(1 + e).
    out = dpo_loss(logps([-10.0], [-12.0]), logps([-11.0], [-11.0]), beta=0.5, label_smoothing=0.25)
    expected = 0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.e)
    assert out.loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_is_the_cross_entropy_of_the_bradley_terry_probability(beta: float, label_smoothing: float):
    # Eq. 1 and 7 of arXiv:2305.18290 by probabilities: p(chosen wins) = e**r_c / (e**r_c + e**r_r).
    out = dpo_loss(POLICY, REFERENCE, beta=beta, label_smoothing=label_smoothing)
    strength_chosen = (POLICY.chosen.exp() / REFERENCE.chosen.exp()) ** beta
    strength_rejected = (POLICY.rejected.exp() / REFERENCE.rejected.exp()) ** beta
    wins = strength_chosen / (strength_chosen + strength_rejected)
    expected = -(1 - label_smoothing) * wins.log() - label_smoothing * (1 - wins).log()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
    assert out.chosen_rewards is not None
    assert out.rejected_rewards is not None
    torch.testing.assert_close(out.chosen_rewards, strength_chosen.log(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.rejected_rewards, strength_rejected.log(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_gradient_is_the_closed_form(label_smoothing: float):
    # d loss / d log pi(chosen) = -beta * (sigmoid(-beta h) - eps), and the opposite for rejected.
    beta = 0.3
    policy = logps([-4.0, -9.0, -1.0], [-6.0, -3.0, -1.5], grad=True)
    reference = logps([-5.0, -8.0, -1.0], [-5.0, -4.0, -2.5])

    out = dpo_loss(policy, reference, beta=beta, label_smoothing=label_smoothing)
    out.loss.sum().backward()

    h = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    expected = (-beta * (torch.sigmoid(-beta * h) - label_smoothing)).detach()
    torch.testing.assert_close(policy.chosen.grad, expected)
    torch.testing.assert_close(policy.rejected.grad, -expected)
    assert out.chosen_rewards is not None
    assert out.rejected_rewards is not None
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradient_agrees_with_finite_differences(label_smoothing: float):
    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = PairLogps(chosen, rejected, POLICY.chosen_tokens, POLICY.rejected_tokens)
        return dpo_loss(policy, REFERENCE, beta=0.5, label_smoothing=label_smoothing).loss

    inputs = (POLICY.chosen.clone().requires_grad_(), POLICY.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_each_pair_has_its_own_loss():
    whole = dpo_loss(POLICY, REFERENCE, beta=0.2, label_smoothing=0.1).loss
    for i in range(len(whole)):
        one_policy, one_reference = (
            PairLogps(*(field[i : i + 1] for field in side[:4])) for side in (POLICY, REFERENCE)
        )
        alone = dpo_loss(one_policy, one_reference, beta=0.2, label_smoothing=0.1).loss
        assert alone.item() == whole[i].item()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.4])
def test_swapping_the_pair_swaps_the_label(label_smoothing: float):
    """A pair whose label is flipped costs what the pair would with the smoothing turned round: eps <-> 1 - eps."""
    flipped = dpo_loss(swapped(POLICY), swapped(REFERENCE), beta=0.3, label_smoothing=label_smoothing)
    turned = dpo_loss(POLICY, REFERENCE, beta=0.3, label_smoothing=1 - label_smoothing)
    torch.testing.assert_close(flipped.loss, turned.loss, rtol=1e-14, atol=0)
    assert flipped.chosen_rewards is not None
    assert turned.rejected_rewards is not None
    assert flipped.chosen_rewards.tolist() == turned.rejected_rewards.tolist()


def test_a_pair_and_its_swap_differ_by_the_margin():
    """log sigmoid(-z) = log sigmoid(z) - z, so loss(swapped) - loss = (1 - 2 eps) beta h."""
    beta, label_smoothing = 0.3, 0.15
    loss = partial(dpo_loss, beta=beta, label_smoothing=label_smoothing)
    h = (POLICY.chosen - POLICY.rejected) - (REFERENCE.chosen - REFERENCE.rejected)
    difference = loss(swapped(POLICY), swapped(REFERENCE)).loss - loss(POLICY, REFERENCE).loss
    torch.testing.assert_close(difference, (1 - 2 * label_smoothing) * beta * h, rtol=1e-12, atol=1e-14)


def test_smoothed_loss_is_least_where_the_model_believes_in_as_many_flips():
    """At its minimum sigmoid(beta h) = 1 - eps: conservative DPO does not push the margin to infinity."""
    label_smoothing = 0.1
    h = torch.tensor([math.log((1 - label_smoothing) / label_smoothing)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    none = PairLogps(zero, zero, zero, zero)
    out = dpo_loss(PairLogps(h, zero, zero, zero), none, beta=1.0, label_smoothing=label_smoothing)
    out.loss.sum().backward()
    assert h.grad is not None
    assert h.grad.item() == pytest.approx(0, abs=1e-15)
    entropy = -(label_smoothing * math.log(label_smoothing) + (1 - label_smoothing) * math.log(1 - label_smoothing))
    assert out.loss.item() == pytest.approx(entropy, rel=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite_in_float32(margin: float, label_smoothing: float):
    policy_chosen = torch.tensor([margin], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    policy = PairLogps(policy_chosen, zero, one, one)
    out = dpo_loss(policy, PairLogps(zero, zero, one, one), beta=1.0, label_smoothing=label_smoothing)
    out.loss.sum().backward()
    share = label_smoothing if margin > 0 else 1 - label_smoothing  # of the labels that the margin contradicts
    assert out.loss.item() == pytest.approx(share * abs(margin), rel=1e-6)
    assert policy_chosen.grad is not None
    slope = math.copysign(share, margin)
    assert policy_chosen.grad.item() == pytest.approx(slope, abs=1e-6)


def test_small_margins_keep_their_precision_beside_large_sums():
    """Sums of thousands of nats with a difference of a millionth: float64 sums keep the reward."""
    policy, reference = logps([-4000.000001], [-3000.0]), logps([-4000.0], [-3000.0])
    out = dpo_loss(policy, reference, beta=0.1)
    assert out.chosen_rewards is not None
    assert out.chosen_rewards.item() == pytest.approx(-1e-7, rel=1e-5)
    assert out.loss.item() - math.log(2) == pytest.approx(5e-8, rel=1e-5)


def test_sft_is_the_mean_nats_per_token_of_the_chosen_response():
    policy = logps([-4.0, -9.0], [-600.0, 0.0], grad=True)  # 2 and 3 chosen tokens
    out = sft_loss(policy)
    assert out.loss.tolist() == [2.0, 3.0]
    assert out.chosen_rewards is None
    assert out.rejected_rewards is None
    out.loss.sum().backward()
    assert policy.chosen.grad is not None
    torch.testing.assert_close(policy.chosen.grad, torch.tensor([-1 / 2, -1 / 3], dtype=torch.float64))
    assert policy.rejected.grad is None


@pytest.mark.parametrize("config", [DpoConfig(beta=0.25, label_smoothing=0.1), SftConfig()], ids=lambda c: c.kind)
def test_every_section_of_a_recipe_gives_its_loss(config: DpoConfig | SftConfig):
    loss = loss_function(**config.model_dump())
    expected = dpo_loss(POLICY, REFERENCE, beta=0.25, label_smoothing=0.1) if config.kind == "dpo" else sft_loss(POLICY)
    assert loss(POLICY, REFERENCE).loss.tolist() == expected.loss.tolist()
