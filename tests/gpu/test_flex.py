"""FlexAttention on a GPU: the numbers and the gradients of a masked attention, and the choice falls on it."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dpo_ray import attention
from dpo_ray.attention import Attention, Kernel, choose_attention, flex_trouble
from dpo_ray.models import PairModel, usable_layout
from tests.numerics.test_attention import ARCHITECTURES, batch_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CUDA = torch.device("cuda")
LENGTHS = [(90, (80, 60)), (1, (30, 2)), (150, (1, 100)), (40, (300, 7))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 64), (8, 8, 128), (6, 2, 96), (4, 1, 256)])
def test_the_kernel_passes_its_check(heads: int, key_heads: int, width: int, dtype: torch.dtype):
    assert flex_trouble(heads, key_heads, width, CUDA, dtype) is None


def model_of(name: str, dtype: torch.dtype) -> PairModel:
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES[name])
    return PairModel(transformers.AutoModelForCausalLM.from_config(config)).to(CUDA, dtype)


def logps_and_gradients(model: PairModel, kernel: Kernel, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.attend_with(Attention(kernel, "asked"))
    model.zero_grad()
    logps = model(batch.to(CUDA)).logps
    (logps * torch.linspace(-1, 1.5, len(logps), device=CUDA, dtype=logps.dtype)).sum().backward()
    return logps.detach(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[0, 3], [1], [2]]], ids=["one row", "rows with padding"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_the_mask(name: str, rows: list[list[int]]):
    """As near as bf16 comes: by the mask in bf16 itself, beside the mask in fp32."""
    batch = batch_of(LENGTHS, rows)
    exact, exact_gradients = logps_and_gradients(model_of(name, torch.float32), "mask", batch)
    model = model_of(name, torch.bfloat16)
    masked, masked_gradients = logps_and_gradients(model, "mask", batch)
    found, gradients = logps_and_gradients(model, "flex", batch)
    assert gradients.keys() == exact_gradients.keys()

    def apart(values: Tensor, expected: Tensor) -> float:
        difference = float((values - expected).norm() / expected.norm())
        assert math.isfinite(difference)
        return difference

    assert apart(found, exact) < 2 * apart(masked, exact) + 1e-3
    for key, gradient in gradients.items():
        limit = 2 * apart(masked_gradients[key], exact_gradients[key]) + 1e-2
        assert apart(gradient, exact_gradients[key]) < limit, key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_half_precision_gets_it_and_one_in_full_precision_does_not(checkpointing: bool):
    model = model_of("llama", torch.bfloat16)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.language_model.enable_input_require_grads()
    model.train()
    assert choose_attention(model.causal, CUDA, torch.bfloat16).kernel == "flex"
    assert usable_layout(lambda batch: model(batch.to(CUDA)), model, "branches", "bf16") == "one_row"
    assert model.attention.kernel == "flex"
    model(batch_of(LENGTHS).to(CUDA)).logps.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    exact = model_of("llama", torch.float32)
    assert usable_layout(lambda batch: exact(batch.to(CUDA)), exact, "branches", "fp32") == "branches"
    assert exact.attention == ("mask", "full precision")


def test_batches_of_many_lengths_share_what_was_compiled():
    """One compilation with gradients and one without; else dynamo would give up after some and compute densely."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attention._compiled_flex.cache_clear()
    model = model_of("llama", torch.bfloat16)
    model.attend_with(Attention("flex", "asked"))
    for seed in range(12):
        lengths = [(40 + 17 * seed + i, (30 + 5 * i, 90 - seed)) for i in range(4 + seed)]
        batch = batch_of(lengths, seed=seed).to(CUDA)
        model(batch).logps.sum().backward()
        with torch.no_grad():
            model(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_memory_grows_with_the_row_not_with_its_square():
    model = model_of("llama", torch.bfloat16)
    model.attend_with(Attention("flex", "asked"))
    peaks = []
    for count in (16, 64):
        batch = batch_of([(100, (60, 60))] * count).to(CUDA)
        for _ in range(2):  # the first compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(batch).logps.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 6 * peaks[0]
