"""Packed branches say the same as padded rows and as one plain forward for each response: sums and every gradient.

In rows with a mask, and in one row a span at a time.

A wrong mask raises nothing, so every kind of architecture is tried: grouped heads, learnt positions, sliding windows,
biases, capped and scaled logits. Weights are large, so that a token too many, or one too few, shows.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from dpo_ray.attention import Attention, Kernel
from dpo_ray.data.batching import Layout, Row, make_batch
from dpo_ray.errors import InputError
from dpo_ray.models import PairModel, usable_layout
from dpo_ray.pairs import PromptBranches
from tests.numerics.architectures import ARCHITECTURES, SUPPORTED, VOCABULARY, build, items_of, plain

PACKED: list[Row] = [[2, 0, 1], [4, 3]]
"""Items by row."""

WAYS: list[tuple[Layout, Kernel]] = [
    ("padded", "mask"),
    ("branches", "mask"),
    ("branches", "spans"),  # with padding
    ("one_row", "spans"),
]
MASKED = ("gemma2 (windows, capped logits)", "gpt-oss (experts, sinks, windows)")
"""Capped scores and sinks are beyond the CPU's kernel."""


def ways_of(name: str) -> list[tuple[Layout, Kernel]]:
    return [way for way in WAYS if name not in MASKED or way[1] == "mask"]


def in_layout(model: PairModel, items: list[PromptBranches], layout: Layout, kernel: Kernel) -> Tensor:
    model.attend_with(Attention(kernel, "asked"))
    rows = [[i for row in PACKED for i in row]] if layout == "one_row" else PACKED
    logps: Tensor = model(make_batch(items, rows, layout)).logps
    return logps


def with_gradients(model: Any, logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums, and the gradient of a weighted sum of them in every parameter that is trained."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1.5, len(logps), dtype=logps.dtype)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_the_layouts_agree(
    model: Any, items: list[PromptBranches], *, ways: list[tuple[Layout, Kernel]] = WAYS, tolerance: float = 2e-5
) -> None:
    expected, gradients = with_gradients(model, plain(model, [items[i] for row in PACKED for i in row]))
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    pair_model = PairModel(model)
    for layout, kernel in ways:
        logps, found = with_gradients(model, in_layout(pair_model, items, layout, kernel))
        torch.testing.assert_close(logps, expected, rtol=tolerance, atol=tolerance)
        assert found.keys() == gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                found[name],
                gradient,
                rtol=1e-3,
                atol=tolerance * largest,
                msg=partial("{} {} {}: {}".format, layout, kernel, name),
            )
    pair_model.attend_with(Attention("mask", "as loaded"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_branches_padded_rows_and_plain_forwards_agree(name: str):
    assert_the_layouts_agree(build(name), items_of(), ways=ways_of(name))


@pytest.mark.parametrize(("name", "argument"), zip(MASKED, ("softcap", "s_aux"), strict=True))
def test_what_changes_the_scores_is_not_left_out_in_silence(name: str, argument: str):
    with pytest.raises(ValueError, match=f"attention with `{argument}`"):
        in_layout(PairModel(build(name)), items_of(), "one_row", "spans")


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_probe_before_training_lets_supported_models_keep_their_branches(name: str):
    model = PairModel(build(name))
    assert usable_layout(model, model, "branches", "fp32") == ("branches" if name in MASKED else "one_row")


@pytest.mark.parametrize("name", ["llama with tied weights", "olmoe (experts)", *SUPPORTED])
def test_adapters_get_the_same_gradients_in_every_layout(name: str):
    import peft

    model = peft.get_peft_model(
        build(name),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.eval()
    assert_the_layouts_agree(model, items_of(), ways=ways_of(name))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)
    for layer in range(model.config.num_hidden_layers):
        assert any(f".{layer}." in name and "attn" in name for name in trained)


def test_a_trained_model_agrees_on_its_own_text(shared: Any):
    path = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def ids(text: str) -> Any:
        return np.array(tokenizer(text)["input_ids"], np.int32)

    stories = [
        ("Once upon a time, there was a little girl", (" named Lily.", " mail Yendl.")),
        ("Tom saw", (" a big, red ball.", " nothing.")),
        ("The cat sat", (" on the mat and slept all day long.",)),
        ("Lily and Ben went to the park. They", (" played.", " cried and went home.", " saw a bird.")),
        ("One day", (", it rained.", ", the sun came out, and all the birds sang.")),
    ]
    items = [PromptBranches(ids(prompt), tuple(ids(text)[1:] for text in texts)) for prompt, texts in stories]
    assert_the_layouts_agree(model, items)
    lily, nonsense = PairModel(model)(make_batch(items, [[0]], "branches")).logps.tolist()
    assert nonsense < lily - 10 < 0, "a story goes on as stories do"


@pytest.mark.parametrize("layout", ["branches", "padded"])
def test_a_response_does_not_depend_on_what_shares_its_row(layout: Layout):
    model = build("mistral with a window")
    items = items_of()
    together = PairModel(model)(make_batch(items, [[0, 1, 2, 3, 4]], layout)).logps
    alone = torch.cat([PairModel(model)(make_batch(items, [[i]], layout)).logps for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_token_counts_and_entropies_are_sums_over_each_response():
    model = build("llama")
    items = items_of()
    result = PairModel(model)(make_batch(items, PACKED, "branches"))
    chosen = [(items[i].prompt_ids, response) for row in PACKED for i in row for response in items[i].responses]
    assert result.num_tokens.tolist() == [len(response) for _, response in chosen]
    entropies = []
    for prompt, response in chosen:
        ids = torch.from_numpy(np.concatenate((prompt, response))).long()[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().sum())
    torch.testing.assert_close(result.entropy, torch.stack(entropies).detach(), rtol=1e-5, atol=1e-5)
    assert result.logps.requires_grad
    assert not result.entropy.requires_grad


def test_an_output_layer_that_is_not_plain_is_an_input_error():
    model = build("llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, VOCABULARY)))
    with pytest.raises(InputError, match="output layer of LlamaForCausalLM is a Sequential"):
        PairModel(model)
