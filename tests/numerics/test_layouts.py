"""Packed branches say the same as padded rows and as one plain forward for each response: sums and every gradient.

In rows with a mask, and in one row a span at a time.

A wrong mask raises nothing, so every kind of architecture is tried: grouped heads, learnt positions, sliding windows,
biases, capped and scaled logits. Weights are large, so that a token too many, or one too few, shows.
"""

from collections.abc import Callable
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
from dpo_ray.models import PairModel
from dpo_ray.pairs import PromptBranches

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOW = 6

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "llama with tied weights": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2 (biases)": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen2 with a window in its upper layer": lambda: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3 (normed heads)": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral with a window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gpt2 (learnt positions)": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    ),
    "gemma2 (windows, capped logits)": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=5.0
    ),
    "gemma3 (windows)": lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "granite (divided logits)": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere (scaled logits)": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.25),
    "phi (bias in the head)": lambda: transformers.PhiConfig(**SIZES),
    "gpt neo-x": lambda: transformers.GPTNeoXConfig(**SIZES),
}


def items_of(vocabulary: int = VOCABULARY) -> list[PromptBranches]:
    """Prompts and responses of many lengths: one token, longer than a window, one response or three."""
    generator = np.random.default_rng(0)
    lengths = [(5, (3, 7)), (1, (1, 9)), (12, (10, 2)), (3, (4,)), (9, (1, 5, 12))]
    return [
        PromptBranches(
            generator.integers(3, vocabulary, prompt).astype(np.int32),
            tuple(generator.integers(3, vocabulary, n).astype(np.int32) for n in responses),
        )
        for prompt, responses in lengths
    ]


PACKED: list[Row] = [[2, 0, 1], [4, 3]]
"""Items by row."""

WAYS: list[tuple[Layout, Kernel]] = [
    ("padded", "mask"),
    ("branches", "mask"),
    ("branches", "spans"),  # with padding
    ("one_row", "spans"),
]
CAPPED = "gemma2 (windows, capped logits)"
"""Its attention scores are capped, too, which the CPU's kernel cannot do."""


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    for parameter in model.parameters():  # biases and norms are not left at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def plain(model: Any, items: list[PromptBranches]) -> Tensor:
    """Each response by a forward of its own behind its prompt, as anybody would write it."""
    result = []
    for item in (items[i] for row in PACKED for i in row):
        for response in item.responses:
            ids = torch.from_numpy(np.concatenate((item.prompt_ids, response))).long()[None]
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            token_logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
            result.append(token_logps[len(item.prompt_ids) - 1 :].sum())
    return torch.stack(result)


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
    expected, gradients = with_gradients(model, plain(model, items))
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
    ways = [way for way in WAYS if name != CAPPED or way[1] == "mask"]
    assert_the_layouts_agree(build(name), items_of(), ways=ways)


def test_capped_scores_are_not_left_out_in_silence():
    with pytest.raises(ValueError, match="attention with `softcap`"):
        in_layout(PairModel(build(CAPPED)), items_of(), "one_row", "spans")


@pytest.mark.parametrize("name", ["llama with tied weights", "gpt2 (learnt positions)", "mistral with a window"])
def test_adapters_get_the_same_gradients_in_every_layout(name: str):
    import peft

    model = peft.get_peft_model(
        build(name),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.eval()
    assert_the_layouts_agree(model, items_of())
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


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
