"""Metrics are exact: sums over pairs whatever the micro-batches, and intervals as in the statistics books."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ray.data.batching import Lengths
from dpo_ray.losses import PairLogps, PreferenceLoss, dpo_loss, sft_loss
from dpo_ray.metrics import (
    METRICS,
    OBJECTIVES,
    MetricSums,
    held_out_names,
    means,
    means_with_interval,
    model_flops,
    pair_sums,
    standard_error,
    wilson_interval,
)
from dpo_ray.models import PairModel


def logps(num_pairs: int, seed: int) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (-50 * torch.rand(num_pairs, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = (torch.randint(1, 40, (num_pairs,), generator=generator).double() for _ in range(2))
    return PairLogps(chosen, rejected, *lengths)


def part(side: PairLogps, start: int, stop: int) -> PairLogps:
    return PairLogps(*(field[start:stop] for field in side[:4]))


def sums_of(policy: PairLogps, reference: PairLogps, weights: Tensor | None = None) -> dict[str, Tensor]:
    loss = dpo_loss(policy, reference, beta=0.1, label_smoothing=0.05)
    return pair_sums(policy, reference, loss, torch.ones(len(policy.chosen)) if weights is None else weights)


POLICY, REFERENCE = logps(9, seed=0), logps(9, seed=1)


def pair_by_pair() -> dict[str, float]:
    """The means of POLICY and REFERENCE in plain Python, one pair after another."""
    rows = zip(*(field.tolist() for field in (*POLICY[:4], REFERENCE.chosen, REFERENCE.rejected)), strict=True)
    total = dict.fromkeys(METRICS.keys() - {"entropy"}, 0.0)
    num_pairs = num_tokens = num_longer = num_shorter = 0.0
    for chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected in rows:
        chosen_reward, rejected_reward = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
        margin = chosen_reward - rejected_reward
        num_pairs += 1
        num_tokens += chosen_tokens + rejected_tokens
        total["loss"] += 0.95 * math.log1p(math.exp(-margin)) + 0.05 * math.log1p(math.exp(margin))
        total["rewards/chosen"] += chosen_reward
        total["rewards/rejected"] += rejected_reward
        total["rewards/margins"] += margin
        total["rewards/accuracies"] += 1.0 if margin > 0 else 0.0
        if chosen_tokens > rejected_tokens:
            num_longer += 1
            total["rewards/accuracies_longer"] += 1.0 if margin > 0 else 0.0
        elif chosen_tokens < rejected_tokens:
            num_shorter += 1
            total["rewards/accuracies_shorter"] += 1.0 if margin > 0 else 0.0
        total["logps/chosen"] += chosen
        total["logps/rejected"] += rejected
        total["kl"] += ref_chosen + ref_rejected - chosen - rejected
    counts = {"kl": num_tokens, "rewards/accuracies_longer": num_longer, "rewards/accuracies_shorter": num_shorter}
    result = {name: value / counts.get(name, num_pairs) for name, value in total.items()}
    return result | {"num_pairs": num_pairs, "num_longer": num_longer, "num_shorter": num_shorter}


def test_means_are_those_computed_pair_by_pair():
    result = means({name: value.item() for name, value in sums_of(POLICY, REFERENCE).items()})
    assert result["num_pairs"] == 9
    assert result["num_longer"] > 0 < result["num_shorter"]
    assert result == pytest.approx(pair_by_pair(), rel=1e-12)


@given(cuts=st.sets(st.integers(1, 8)))
@settings(max_examples=25, deadline=None)
def test_ragged_micro_batches_give_the_means_of_the_whole(cuts: set[int]):
    edges = [0, *sorted(cuts), 9]
    sums = MetricSums()
    for start, stop in pairwise(edges):
        sums.add(sums_of(part(POLICY, start, stop), part(REFERENCE, start, stop)))
    assert means(sums.reduced()) == pytest.approx(pair_by_pair(), rel=1e-12)


def test_accuracies_by_length_leave_out_pairs_of_equal_length_and_are_absent_where_there_is_no_pair():
    chosen = torch.tensor([2.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    rejected = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    zero = PairLogps(*[torch.zeros(4, dtype=torch.float64)] * 4)

    def by_length(chosen_tokens: list[float], rejected_tokens: list[float]) -> dict[str, float]:
        policy = PairLogps(chosen, rejected, torch.tensor(chosen_tokens), torch.tensor(rejected_tokens))
        result = means({name: value.item() for name, value in sums_of(policy, zero).items()})
        return {name: value for name, value in result.items() if name.endswith(("longer", "shorter"))}

    # Right, wrong, wrong, right: of lengths longer, longer, shorter, equal.
    assert by_length([5.0, 5.0, 1.0, 3.0], [3.0, 3.0, 3.0, 3.0]) == {
        "rewards/accuracies_longer": 0.5,
        "rewards/accuracies_shorter": 0.0,
        "num_longer": 2,
        "num_shorter": 1,
    }
    longer_only = by_length([5.0] * 4, [3.0] * 4)
    assert longer_only == {"rewards/accuracies_longer": 0.5, "num_longer": 4, "num_shorter": 0}


def test_a_run_is_judged_by_metrics_that_every_evaluation_has():
    assert METRICS.keys() - set(OBJECTIVES) == {"rewards/accuracies_longer", "rewards/accuracies_shorter"}


def test_a_tie_counts_half():
    chosen = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    policy = PairLogps(chosen + torch.tensor([1.0, -1.0, 0.0, 0.0]), chosen, *[torch.ones(4)] * 2)
    reference = PairLogps(chosen, chosen, *[torch.ones(4)] * 2)
    assert sums_of(policy, reference)["rewards/accuracies"].item() == 1 + 0 + 0.5 + 0.5


def test_pairs_of_weight_zero_count_nothing():
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    counted = [i for i in range(9) if weights[i]]
    policy, reference = (PairLogps(*(field[counted] for field in side[:4])) for side in (POLICY, REFERENCE))
    expected = {name: value.item() for name, value in sums_of(policy, reference).items()}
    weighted = {name: value.item() for name, value in sums_of(POLICY, REFERENCE, weights).items()}
    assert weighted == pytest.approx(expected, rel=1e-12)
    assert weighted["num_pairs"] == 4


def test_a_loss_without_a_reference_has_no_rewards():
    sums = pair_sums(POLICY, None, sft_loss(POLICY), torch.ones(9))
    assert sums.keys() == {"num_pairs", "num_tokens", "loss", "logps/chosen", "logps/rejected"}


def test_sums_are_float64_and_carry_no_gradient():
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy = PairLogps(chosen, torch.tensor([-3.0, -1.0]), torch.ones(2), torch.ones(2))
    loss = PreferenceLoss(-chosen, None, None)
    for value in pair_sums(policy, None, loss, torch.ones(2)).values():
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_a_mean_over_many_float32_pairs_keeps_its_digits():
    """A tenth, rounded to float32, four million times over: a float32 sum would be off in the third digit."""
    sums = MetricSums()
    loss = PreferenceLoss(torch.full((1 << 12,), 0.1), None, None)
    same = PairLogps(*[torch.ones(1 << 12)] * 4)
    one = pair_sums(same, None, loss, torch.ones(1 << 12))
    for _ in range(1 << 10):
        sums.add(one)
    assert means(sums.reduced())["loss"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_token_metrics_are_divided_by_tokens_and_pair_metrics_by_pairs():
    sums = dict.fromkeys(OBJECTIVES, 12.0) | {"num_pairs": 4.0, "num_tokens": 24.0}
    result = means(sums)
    assert {name for name, value in result.items() if value == 0.5} == {"entropy", "kl"}
    assert {name for name, value in result.items() if value == 3.0} == set(OBJECTIVES) - {"entropy", "kl"}


@pytest.mark.parametrize("count", [1, 2, 7, 512])
@pytest.mark.parametrize("quarter", [0, 1, 2, 4])
def test_interval_is_wilsons(quarter: int, count: int):
    won = count * quarter // 4
    low, high = wilson_interval(won / count, count)
    expected = binomtest(won, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)


def test_interval_of_nothing_is_everything():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_held_out_metrics_have_their_prefix_and_the_interval_of_the_accuracies():
    sums = {name: value.item() for name, value in sums_of(POLICY, REFERENCE).items()}
    plain, result = means(sums), held_out_names(means_with_interval(sums))
    low, high = wilson_interval(plain["rewards/accuracies"], 9)
    assert result == {f"eval/{name}": value for name, value in plain.items()} | {
        "eval/rewards/accuracies_low": low,
        "eval/rewards/accuracies_high": high,
    }
    assert low < plain["rewards/accuracies"] < high


def test_held_out_metrics_without_rewards_have_no_interval():
    result = held_out_names(means_with_interval({"loss": 3.0, "num_pairs": 2.0, "num_tokens": 10.0}))
    assert result == {"eval/loss": 1.5, "eval/num_pairs": 2}


def test_standard_error_of_a_share_is_the_binomial_one():
    assert standard_error("rewards/accuracies", 0.5, 256) == 0.5 / 16
    assert standard_error("rewards/accuracies", 0.9, 100) == pytest.approx(0.03)
    assert standard_error("rewards/accuracies", 1.0, 100) == 0.0
    assert standard_error("rewards/accuracies", 0.5, 0) == 0.0
    assert standard_error("loss", 0.5, 256) == 0.0


def test_every_metric_says_which_way_is_better():
    assert {name for name, metric in METRICS.items() if metric.direction == "min"} == {
        "loss",
        "rewards/rejected",
        "logps/rejected",
        "kl",
    }


def test_operations_are_those_that_torch_counts_in_a_plain_llama():
    rows, width = 3, 20
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # all pairs of tokens of a row, in products that torch counts one by one
    )
    model = LlamaForCausalLM(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    sizes = {
        "num_tokens": rows * width,
        "num_predicted": rows * width,
        "num_attended": rows * width**2,
        "body_weights": sum(module.weight.numel() for module in linear if module is not head),
        "head_weights": head.weight.numel(),
        "attention_width": 3 * 24,
    }
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(0, 50, (rows, width)), use_cache=False).logits
    assert counter.get_total_flops() == model_flops(**sizes, training=False)
    with counter:
        logits.sum().backward()
    assert model_flops(**sizes, training=False) + counter.get_total_flops() == model_flops(**sizes)


def test_operations_of_a_pair_leave_out_the_gradients_of_frozen_weights():
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    model = PairModel(LlamaForCausalLM(config))
    items = [Lengths(5, (3, 4)), Lengths(2, (1, 6))]
    tokens, predicted, attended = (5 + 2 + 3) + (2 + 0 + 5), 14, (15 + 10 + 3 + 15 + 6) + (3 + 10 + 15)
    body, head = 2 * (4 * 24 * 24 + 3 * 24 * 40), 24 * 50
    assert model.flops(items) == 6 * (body * tokens + head * predicted + 2 * 2 * 24 * attended)
    model.requires_grad_(False)
    assert model.flops(items) == 4 * (body * tokens + head * predicted) + 6 * 2 * 2 * 24 * attended
