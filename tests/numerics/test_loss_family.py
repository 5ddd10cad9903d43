"""Every loss against values worked by hand, against TRL's code, its gradient in float64, and extreme margins."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dpo_ray.config import LossConfig
from dpo_ray.losses import LOSSES, REFERENCE_FREE, PairLogps, PairTerms, loss_function, match_gaps, sft_loss

SECTIONS = {section.model_fields["kind"].default: section for section in get_args(get_args(LossConfig)[0])}

OPTIONS: list[dict[str, Any]] = [
    {"kind": "dpo", "beta": 0.3},
    {"kind": "dpo", "beta": 0.3, "f_divergence": "forward_kl"},
    {"kind": "dpo", "beta": 0.3, "f_divergence": "js_divergence"},
    {"kind": "dpo", "beta": 0.3, "f_divergence": "alpha_divergence", "f_alpha": 0.6},
    {"kind": "robust", "beta": 0.3, "label_smoothing": 0.2},
    {"kind": "ipo", "beta": 0.3},
    {"kind": "hinge", "beta": 0.3},
    {"kind": "sigmoid_norm", "beta": 2.0},
    {"kind": "exo_pair", "beta": 0.3, "label_smoothing": 0.01},
    {"kind": "nca_pair", "beta": 0.3},
    {"kind": "bco_pair", "beta": 0.3},
    {"kind": "sppo_hard", "beta": 0.3},
    {"kind": "apo_zero", "beta": 0.3},
    {"kind": "apo_down", "beta": 0.3},
    {"kind": "discopop", "beta": 0.3, "tau": 0.5},
    {"kind": "aot", "beta": 0.3},
    {"kind": "aot", "beta": 0.3, "label_smoothing": 0.2},
    {"kind": "dpo", "beta": 0.3, "ld_alpha": 0.4},
    {"kind": "apo_zero", "beta": 0.3, "ld_alpha": 0.0},
    {"kind": "dpo", "beta": 0.3, "wpo": True},
    {"kind": "ipo", "beta": 0.3, "wpo": True},
]
"""Losses that TRL's DPOTrainer has too, each with its options."""

MORE: list[dict[str, Any]] = [
    {"kind": "ipo", "beta": 0.3, "reduction": "sum"},
    {"kind": "dpo", "beta": 0.3, "sft_weight": 0.5},
    {"kind": "dpop", "beta": 0.3, "penalty": 5.0},
    {"kind": "simpo", "beta": 2.0, "gamma": 0.7},
    {"kind": "cpo", "beta": 0.3},
    {"kind": "orpo", "beta": 0.2},
    {"kind": "sft"},
    {"kind": "dpo", "beta": 0.3, "margin_weight": 0.7},
    {"kind": "robust", "beta": 0.3, "margin_weight": 0.7},
    {"kind": "hinge", "beta": 0.3, "margin_weight": 0.7},
    {"kind": "sigmoid_norm", "beta": 2.0, "margin_weight": 0.7},
    {"kind": "dpo", "beta": 0.3, "data_weights": True, "sft_weight": 0.5},
    {"kind": "sft", "data_weights": True},
    {"kind": "cpo", "beta": 0.3, "wpo": True},
]


def loss_of(options: dict[str, Any]) -> Any:
    """As a run gets it: through the section of the recipe."""
    return loss_function(**SECTIONS[options["kind"]].model_validate(options).model_dump())


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def random_pairs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps]:
    """Six pairs of 1 to 9 tokens, and a reference a few nats away."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (2, 6), generator=generator).to(dtype)
    policy = -3 * lengths * (0.2 + torch.rand(2, 6, generator=generator, dtype=dtype))
    reference = policy + 2 * torch.randn(2, 6, generator=generator, dtype=dtype)
    return with_tails(PairLogps(*policy, *lengths)), with_tails(PairLogps(*reference, *lengths))


def with_tails(logps: PairLogps) -> PairLogps:
    """All tokens of a response are taken to be equally likely."""
    shorter = torch.minimum(logps.chosen_tokens, logps.rejected_tokens)
    return logps._replace(
        chosen_tail=logps.chosen.detach() * (1 - shorter / logps.chosen_tokens),
        rejected_tail=logps.rejected.detach() * (1 - shorter / logps.rejected_tokens),
    )


LOG_COLLISION = -0.3
"""log sum of p^2 at every token, for WPO."""


def terms_of(policy: PairLogps, reference: PairLogps) -> PairTerms:
    """Weights and margins 1, 2, ..., and what follows from the log-probs."""
    numbers = torch.arange(1, len(policy.chosen) + 1, dtype=policy.chosen.dtype)
    means = (policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens)
    return PairTerms(
        weight=numbers,
        margin=numbers / 2,
        alignment=(sum(means) - 2 * LOG_COLLISION).exp().detach(),
        matched_gap=match_gaps(policy.gap.detach(), reference.gap),
    )


def one(chosen: float, rejected: float, chosen_tokens: int = 1, rejected_tokens: int = 1) -> PairLogps:
    values = (chosen, rejected, float(chosen_tokens), float(rejected_tokens))
    return with_tails(PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Policy (-10 of 4 tokens, -12 of 3), reference (-11, -10): log-ratios 1 and -2, h = 3.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "dpo", "beta": 0.5}, -math.log(sigmoid(1.5))),
        ({"kind": "dpo", "beta": 0.5, "sft_weight": 2.0}, -math.log(sigmoid(1.5)) + 2 * 10 / 4),
        (
            {"kind": "dpo", "beta": 0.5, "f_divergence": "forward_kl"},
            -math.log(sigmoid(0.5 * ((1 - math.exp(-1)) - (1 - math.exp(2))))),
        ),
        (
            {"kind": "dpo", "beta": 0.5, "f_divergence": "js_divergence"},
            -math.log(sigmoid(0.5 * (math.log(sigmoid(1)) - math.log(sigmoid(-2))))),
        ),
        (
            {"kind": "dpo", "beta": 0.5, "f_divergence": "alpha_divergence", "f_alpha": 0.5},
            -math.log(sigmoid(0.5 * ((math.exp(-0.5) - 1) / -0.5 - (math.exp(1.0) - 1) / -0.5))),
        ),
        (
            {"kind": "robust", "beta": 0.5, "label_smoothing": 0.1},
            (-0.9 * math.log(sigmoid(1.5)) + 0.1 * math.log(sigmoid(-1.5))) / 0.8,
        ),
        ({"kind": "ipo", "beta": 0.5}, (1 / 4 + 2 / 3 - 1) ** 2),
        ({"kind": "ipo", "beta": 0.5, "reduction": "sum"}, (3 - 1) ** 2),
        ({"kind": "hinge", "beta": 0.25}, 0.25),
        ({"kind": "hinge", "beta": 0.5}, 0.0),
        ({"kind": "sigmoid_norm", "beta": 2.0}, -math.log(sigmoid(2 * (1 / 4 + 2 / 3)))),
        (
            {"kind": "exo_pair", "beta": 0.5, "label_smoothing": 0.1},
            sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
        ),
        (
            {"kind": "discopop", "beta": 0.5, "tau": 0.5},
            -(1 - sigmoid(3)) * math.log(sigmoid(1.5)) + sigmoid(3) * math.exp(-1.5),
        ),
        ({"kind": "dpop", "beta": 0.5, "penalty": 5.0}, -math.log(sigmoid(1.5))),  # the chosen one has not sunk
        (
            {"kind": "nca_pair", "beta": 0.5},
            -math.log(sigmoid(0.5)) - 0.5 * math.log(sigmoid(-0.5)) - 0.5 * math.log(sigmoid(1)),
        ),
        ({"kind": "bco_pair", "beta": 0.5}, -math.log(sigmoid(0.5)) - math.log(sigmoid(1))),
        ({"kind": "sppo_hard", "beta": 0.5}, (1 - 1) ** 2 + (-2 + 1) ** 2),
        ({"kind": "apo_zero", "beta": 0.5}, sigmoid(-0.5) + sigmoid(-1)),
        ({"kind": "apo_down", "beta": 0.5}, sigmoid(0.5) + sigmoid(-1.5)),
        ({"kind": "simpo", "beta": 2.0, "gamma": 0.5}, -math.log(sigmoid(2 * (-10 / 4 + 12 / 3) - 0.5))),
        ({"kind": "cpo", "beta": 0.5}, -math.log(sigmoid(1.0))),
        (
            {"kind": "orpo", "beta": 0.2},
            2.5
            - 0.2 * math.log(sigmoid((-2.5 - math.log(1 - math.exp(-2.5))) - (-4.0 - math.log(1 - math.exp(-4.0))))),
        ),
        ({"kind": "sft"}, 2.5),
        # The last of the chosen response's 4 tokens is beyond the rejected one's 3: -2.5 and -2.75 of its sums.
        ({"kind": "dpo", "beta": 0.5, "ld_alpha": 0.2}, -math.log(sigmoid(0.5 * (3 - 0.8 * (-2.5 + 2.75))))),
        ({"kind": "dpo", "beta": 0.5, "ld_alpha": 0.2, "sft_weight": 1.0}, -math.log(sigmoid(1.4)) + 2.5),
        ({"kind": "dpo", "beta": 0.5, "margin_weight": 3.0}, -math.log(sigmoid(1.5 - 3 * 0.5))),
        ({"kind": "robust", "beta": 0.5, "label_smoothing": 0.1, "margin_weight": 3.0}, math.log(2) * 0.8 / 0.8),
        ({"kind": "hinge", "beta": 0.5, "margin_weight": 3.0}, 1.0),
        ({"kind": "sigmoid_norm", "beta": 2.0, "margin_weight": 1.0}, -math.log(sigmoid(2 * (1 / 4 + 2 / 3) - 0.5))),
        ({"kind": "dpo", "beta": 0.5, "wpo": True}, math.exp(-2.5 - 4 + 0.6) * -math.log(sigmoid(1.5))),
        (
            {"kind": "dpo", "beta": 0.5, "wpo": True, "sft_weight": 1.0},  # WPO weighs the preference alone
            math.exp(-2.5 - 4 + 0.6) * -math.log(sigmoid(1.5)) + 2.5,
        ),
        ({"kind": "aot", "beta": 0.5}, -math.log(sigmoid(1.5))),  # a step of one pair is DPO
        (
            {
                "kind": "sum",
                "losses": [{"kind": "dpo", "beta": 0.5}, {"kind": "hinge", "beta": 0.25}, {"kind": "sft"}],
                "weights": [2.0, 4.0, 0.5],
            },
            2 * -math.log(sigmoid(1.5)) + 4 * 0.25 + 0.5 * 2.5,
        ),
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else None,
)
def test_value_worked_by_hand(options: dict[str, Any], expected: float):
    policy, reference = one(-10, -12, 4, 3), one(-11, -10, 4, 3)
    out = loss_of(options)(policy, reference, terms_of(policy, reference))
    assert out.loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_dpop_punishes_a_chosen_response_that_has_sunk():
    # log-ratios -1 and -4: h = 3, sunk by 1; beta (3 - 5) = -1.
    out = loss_of({"kind": "dpop", "beta": 0.5, "penalty": 5.0})(one(-12, -14), one(-11, -10))
    assert out.loss.item() == pytest.approx(-math.log(sigmoid(-1.0)), rel=1e-12)


def test_every_loss_is_worked_and_has_a_section():
    assert {options["kind"] for options in OPTIONS + MORE} == set(LOSSES) == set(SECTIONS) - {"sum"}


def test_optimal_transport_compares_each_pair_with_the_references_of_its_rank():
    policy, reference = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([10.0, 30.0, 20.0])
    assert match_gaps(policy, reference).tolist() == [30.0, 10.0, 20.0]
    order = torch.tensor([2, 0, 1])
    assert match_gaps(policy[order], reference).tolist() == [20.0, 30.0, 10.0]


def test_data_weights_multiply_the_whole_loss_of_a_pair():
    policy, reference = random_pairs(8)
    plain = loss_of({"kind": "dpo", "sft_weight": 0.5})(policy, reference).loss
    weighted = loss_of({"kind": "dpo", "sft_weight": 0.5, "data_weights": True})
    found = weighted(policy, reference, terms_of(policy, reference)).loss
    torch.testing.assert_close(found, plain * torch.arange(1, 7))


def test_rewards_of_a_sum_are_its_first_losses():
    policy, reference = random_pairs(9)
    parts = [{"kind": "ipo", "beta": 0.7}, {"kind": "simpo"}]
    out = loss_of({"kind": "sum", "losses": parts, "weights": [1.0, 1.0]})(policy, reference)
    torch.testing.assert_close(out.chosen_rewards, 0.7 * (policy.chosen - reference.chosen))


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"kind": "dpo"}, {"reference"}),
        ({"kind": "cpo"}, set()),
        ({"kind": "cpo", "wpo": True}, {"alignment"}),
        ({"kind": "dpo", "ld_alpha": 0.5, "margin_weight": 1.0}, {"reference", "tails", "margin"}),
        ({"kind": "sft", "data_weights": True}, {"weight"}),
        (
            {"kind": "sum", "losses": [{"kind": "simpo"}, {"kind": "aot"}], "weights": [1, 1]},
            {"reference", "matched_gap"},
        ),
    ],
)
def test_a_loss_says_what_it_must_be_given(options: dict[str, Any], needs: set[str]):
    assert loss_of(options).needs == needs


@pytest.mark.parametrize("options", OPTIONS + MORE, ids=label)
def test_gradient_is_that_of_finite_differences(options: dict[str, Any]):
    policy, reference = random_pairs(1)
    loss, terms = loss_of(options), terms_of(policy, reference)

    def of_logps(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(policy._replace(chosen=chosen, rejected=rejected), reference, terms).loss

    sides = (policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(of_logps, sides, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS + MORE, ids=label)
@pytest.mark.parametrize("margin", [-1e3, 1e3])
def test_extreme_margins_stay_finite_in_float32(options: dict[str, Any], margin: float):
    shift = torch.tensor([margin / 2])
    tokens = torch.tensor([3.0])
    reference = with_tails(PairLogps(torch.tensor([-2000.0]), torch.tensor([-2000.0]), tokens, tokens))
    chosen, rejected = (
        side.clone().requires_grad_() for side in (reference.chosen + shift, reference.rejected - shift)
    )
    if options["kind"] == "discopop" and margin < 0:
        pytest.skip("the exponential part of DiscoPOP has no bound: that is the loss")
    policy = with_tails(PairLogps(chosen, rejected, tokens, tokens))
    out = loss_of(options)(policy, reference, terms_of(policy, reference))
    assert out.loss.isfinite().all()
    (out.loss.sum() + 0 * (chosen + rejected).sum()).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("kind", sorted(REFERENCE_FREE))
def test_a_loss_without_reference_does_not_look_at_one(kind: str):
    policy, reference = random_pairs(2)
    loss = loss_of({"kind": kind})
    assert torch.equal(loss(policy, reference).loss, loss(policy, None).loss)


@pytest.mark.parametrize("options", [o for o in OPTIONS + MORE if o["kind"] not in REFERENCE_FREE], ids=label)
def test_rewards_are_dpos_and_carry_no_gradient(options: dict[str, Any]):
    policy, reference = random_pairs(3)
    terms = terms_of(policy, reference)
    out = loss_of(options)(policy._replace(chosen=policy.chosen.clone().requires_grad_()), reference, terms)
    torch.testing.assert_close(out.chosen_rewards, options["beta"] * (policy.chosen - reference.chosen))
    torch.testing.assert_close(out.rejected_rewards, options["beta"] * (policy.rejected - reference.rejected))
    assert not out.chosen_rewards.requires_grad
    assert out.loss.requires_grad


def trl_loss(options: dict[str, Any], policy: PairLogps, reference: PairLogps) -> float:
    """The mean loss by TRL's own code: its method, on an object that has what it reads."""
    from trl import DPOTrainer

    lengths = torch.cat([policy.chosen_tokens, policy.rejected_tokens]).long()
    logps = torch.cat([policy.chosen, policy.rejected])
    width = int(lengths.max()) + 1
    mask = (torch.arange(width)[None] >= 1) & (torch.arange(width)[None] <= lengths[:, None])
    per_token = torch.where(mask[:, 1:], (logps / lengths)[:, None], 0.0)
    names = {"dpo": "sigmoid"}
    kind, alpha = options["kind"], options.get("ld_alpha", 1.0)
    if alpha != 1.0:  # precomputed reference log-probs come in desensitized
        assert reference.chosen_tail is not None
        assert reference.rejected_tail is not None
        reference = reference._replace(
            chosen=reference.chosen - (1 - alpha) * reference.chosen_tail,
            rejected=reference.rejected - (1 - alpha) * reference.rejected_tail,
        )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=options.get("ld_alpha"),
        precompute_ref_logps=True,
        f_divergence_type=options.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        loss_types=[names.get(kind, kind)],
        loss_weights=[1.0],
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("wpo", False),
        args=SimpleNamespace(discopop_tau=options.get("tau", 0.05)),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        log_sum_sq_probs=torch.full_like(per_token, LOG_COLLISION),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    inputs = {
        "input_ids": torch.zeros(len(mask), width, dtype=torch.int64),
        "attention_mask": torch.ones(len(mask), width, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference.chosen,
        "ref_rejected_logps": reference.rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss.item()


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_loss_is_trls(options: dict[str, Any], seed: int):
    dtype = torch.float32 if options.get("f_divergence") == "alpha_divergence" else torch.float64  # TRL's own limit
    policy, reference = random_pairs(seed, dtype)
    found = loss_of(options)(policy, reference, terms_of(policy, reference)).loss.mean().item()
    assert found == pytest.approx(trl_loss(options, policy, reference), rel=1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("seed", [6, 7])
def test_losses_without_reference_are_trls(seed: int):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    policy, _ = random_pairs(seed)
    mean = (policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens)
    fake = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, label_smoothing=0.0, beta=2.0)
    simpo, *_ = CPOTrainer.cpo_loss(SimpleNamespace(**vars(fake), loss_type="simpo", simpo_gamma=0.7), *mean)
    torch.testing.assert_close(loss_of({"kind": "simpo", "beta": 2.0, "gamma": 0.7})(policy, None).loss, simpo)
    cpo, *_ = CPOTrainer.cpo_loss(SimpleNamespace(**vars(fake), loss_type="sigmoid"), policy.chosen, policy.rejected)
    torch.testing.assert_close(loss_of({"kind": "cpo", "beta": 2.0})(policy, None).loss, cpo)
    odds, *_ = ORPOTrainer.odds_ratio_loss(fake, *mean)
    expected = sft_loss(policy).loss - odds
    torch.testing.assert_close(
        loss_of({"kind": "orpo", "beta": 2.0})(policy, None).loss, expected.double(), rtol=1e-5, atol=1e-5
    )
