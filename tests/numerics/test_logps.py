"""Chunked token log-probs against a whole log-softmax in float64; their gradients, precision and memory."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_ray.logps import CHUNK_LOGITS, sum_by_response, tail_sums, token_logps

TOKENS, WIDTH, VOCABULARY = 11, 6, 17

HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.0625}, id="scale"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"scale": 3.0, "softcap": 5.0}, id="scale and softcap"),
]


def head(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target_ids; the first three ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    hidden, weight, bias = (value.requires_grad_() for value in values)
    return hidden, weight, bias, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, scale: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return logps.gather(-1, target_ids[:, None])[:, 0], entropy


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", HEADS)
def test_values_and_gradients_are_those_of_a_whole_log_softmax(options: dict[str, float], with_bias: bool):
    hidden, weight, bias, target_ids = head()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    upstream = torch.linspace(-2, 3, TOKENS, dtype=torch.float64)

    logps, entropy, _ = token_logps(
        hidden, weight, target_ids, bias=bias if with_bias else None, chunk_tokens=4, **options
    )
    expected, expected_entropy = whole(hidden, weight, bias if with_bias else None, target_ids, **options)

    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-13)
    assert not entropy.requires_grad
    ours = torch.autograd.grad((logps * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    for grad, expected_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", HEADS)
def test_gradients_agree_with_finite_differences(options: dict[str, float]):
    hidden, weight, bias, target_ids = head()

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps(hidden, weight, target_ids, bias=bias, chunk_tokens=3, **options)[0]

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, TOKENS, 1000, None])
def test_every_chunk_size_gives_the_same(chunk_tokens: int | None):
    hidden, weight, bias, target_ids = head()

    def result(chunk_tokens: int | None) -> list[Tensor]:
        logps, entropy, _ = token_logps(hidden, weight, target_ids, bias=bias, softcap=4.0, chunk_tokens=chunk_tokens)
        return [logps, entropy, *torch.autograd.grad(logps.square().sum(), (hidden, weight, bias))]

    for one, other in zip(result(chunk_tokens), result(4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_a_uniform_and_a_certain_distribution_are_worked_by_hand():
    hidden = torch.tensor([[0.0], [1000.0]])
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    logps, entropy, _ = token_logps(hidden, weight, torch.tensor([2, 0]))
    torch.testing.assert_close(logps, torch.tensor([-math.log(4), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), 0.0]))


def test_no_tokens_give_no_values_and_zero_gradient():
    _, weight, bias, _ = head()
    hidden = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    logps, entropy, _ = token_logps(hidden, weight, torch.zeros(0, dtype=torch.int64), bias=bias)
    assert logps.shape == entropy.shape == (0,)
    grads = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    assert [grad.abs().sum().item() for grad in grads] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(frozen: str):
    inputs = dict(zip(("hidden", "weight", "bias"), head()[:3], strict=True))
    target_ids = head()[3]

    def grads() -> dict[str, Tensor | None]:
        for value in inputs.values():
            value.grad = None
        token_logps(inputs["hidden"], inputs["weight"], target_ids, bias=inputs["bias"])[0].sum().backward()
        return {name: value.grad for name, value in inputs.items()}

    free = grads()
    inputs[frozen].requires_grad_(False)
    result = grads()
    assert result[frozen] is None
    for name in inputs.keys() - {frozen}:
        torch.testing.assert_close(result[name], free[name], rtol=0, atol=0)


def test_a_frozen_head_computes_no_gradient_of_its_weight():
    hidden, weight, _, target_ids = head()
    weight.requires_grad_(False)
    with Recorder() as recorder:
        token_logps(hidden, weight, target_ids, chunk_tokens=1)[0].sum().backward()
    assert not [shape for shape in recorder.shapes if shape == (VOCABULARY, WIDTH)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32_log_probs_within_their_rounding(dtype: torch.dtype):
    hidden, weight, bias, target_ids = head(dtype)
    logps, entropy, _ = token_logps(hidden, weight, target_ids, bias=bias, chunk_tokens=4)
    exact, exact_entropy = whole(hidden.double(), weight.double(), bias.double(), target_ids)

    assert logps.dtype == entropy.dtype == torch.float32
    # A logit is rounded once, to half its last place; the log-prob is the difference of one logit and a mean of all.
    largest = F.linear(hidden.double(), weight.double()).abs().max().item()
    bound = 2 * largest * torch.finfo(dtype).eps / 2
    assert (logps.double() - exact).abs().max().item() < bound
    assert (entropy.double() - exact_entropy).abs().max().item() < 2 * largest * bound
    grads = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    exact_grads = torch.autograd.grad(exact.sum(), (hidden, weight, bias))
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert (grad - exact_grad).abs().max().item() < 8 * torch.finfo(dtype).eps * exact_grad.abs().max().item()


def test_many_chunks_do_not_cost_precision_in_bfloat16():
    """The weight's gradient is a sum over chunks: 512 of them may lose hardly more than one product over all tokens."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, width, vocabulary = 2048, 16, 8
    hidden = torch.randn(num_tokens, width, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16().requires_grad_()
    target_ids = torch.randint(vocabulary, (num_tokens,), generator=generator)

    def error(chunk_tokens: int) -> float:
        logps, *_ = token_logps(hidden, weight, target_ids, chunk_tokens=chunk_tokens)
        (grad,) = torch.autograd.grad(logps.sum(), weight)
        return ((grad.double() - exact).norm() / exact.norm()).item()

    exact_weight = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(whole(hidden.double(), exact_weight, None, target_ids)[0].sum(), exact_weight)
    assert error(num_tokens) < 0.005
    assert error(4) < 0.005


class Recorder(TorchDispatchMode):
    """Shapes of all tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


def test_tokens_by_vocabulary_is_never_whole():
    num_tokens, width, vocabulary, chunk_tokens = 64, 4, 128, 8
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    target_ids = torch.randint(vocabulary, (num_tokens,))

    with Recorder() as recorder:
        logps, *_ = token_logps(hidden, weight, target_ids, softcap=3.0, chunk_tokens=chunk_tokens)
        logps.sum().backward()
    assert recorder.largest == chunk_tokens * vocabulary

    with Recorder() as recorder:  # what the recorder sees of a head that does hold it whole
        whole(hidden, weight, None, target_ids)[0].sum().backward()
    assert recorder.largest == num_tokens * vocabulary


def test_chunks_are_cut_by_the_limit_of_logits_unless_told():
    vocabulary = CHUNK_LOGITS["cpu"] // 3 + 1  # two tokens fit, three do not
    hidden, weight = torch.randn(5, 1), torch.zeros(vocabulary, 1)
    with Recorder() as recorder, torch.no_grad():
        token_logps(hidden, weight, torch.zeros(5, dtype=torch.int64))
    assert recorder.largest == 2 * vocabulary


def test_backward_keeps_no_logits():
    hidden, weight, bias, target_ids = head()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        token_logps(hidden, weight, target_ids, bias=bias, chunk_tokens=1)
    assert kept
    assert max(kept) <= max(hidden.numel(), weight.numel())


def test_sums_go_to_the_response_of_each_token():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sum_by_response(values, torch.tensor([2, 0, 2, 0, 3]), 5)
    assert sums.tolist() == [10.0, 0.0, 5.0, 16.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [100.0, 1.0, 100.0, 1.0, 1000.0]


def test_a_tail_is_what_stands_beyond_the_shorter_response_of_the_pair():
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0], requires_grad=True)
    index = torch.tensor([0, 0, 0, 1, 2, 3, 3])  # pairs of 3 and 1, and of 1 and 2 tokens
    tails = tail_sums(values, index, torch.tensor([3.0, 1.0, 1.0, 2.0]))
    assert tails.tolist() == [-6.0, 0.0, 0.0, -64.0]
    tails.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_collision_probability_is_the_sum_of_squares():
    hidden, weight, bias, target_ids = head(torch.float64)
    found = token_logps(hidden, weight, target_ids, bias=bias, chunk_tokens=2)
    probs = F.linear(hidden, weight, bias).softmax(-1)
    torch.testing.assert_close(found.log_collision, probs.square().sum(-1).log())
    assert not found.log_collision.requires_grad


def test_sums_do_not_depend_on_the_order_of_the_tokens():
    """In float64 a thousand float32 log-probs add up exactly enough that packing cannot show."""
    generator = torch.Generator().manual_seed(0)
    values = -10 * torch.rand(1000, generator=generator)
    turned = torch.randperm(1000, generator=generator)
    one = torch.zeros(1000, dtype=torch.int64)
    first, second = sum_by_response(values, one, 1), sum_by_response(values[turned], one, 1)
    assert first.dtype == torch.float64
    assert abs(first.item() - second.item()) < 1e-10
    assert abs(first.item() - math.fsum(values.tolist())) < 1e-10
