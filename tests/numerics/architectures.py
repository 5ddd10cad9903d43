"""Tiny random models of every kind of architecture, prompts with responses, and their log-probs as anybody would write
them. Weights are large, so that a token too many, or one too few, shows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

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
ALTERNATING = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}

SUPPORTED: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2 (biases)": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3 (normed heads)": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral with a window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma2 (windows, capped logits)": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=5.0
    ),
    "gemma3 (windows)": lambda: transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATING
    ),
    "gpt-oss (experts, sinks, windows)": lambda: transformers.GptOssConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=YARN,
    ),
    "gpt2 (learnt positions)": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    ),
    "opt (learnt positions)": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.3,
    ),
    "mixtral (experts)": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe (experts)": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}
"""The families that are promised to work, adapters and every ZeRO stage included."""

ARCHITECTURES: dict[str, Callable[[], Any]] = SUPPORTED | {
    "llama with tied weights": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2 with a window in its upper layer": lambda: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "olmoe (experts)": lambda: transformers.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "granite (divided logits)": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere (scaled logits)": lambda: transformers.CohereConfig(**GROUPED, logit_scale=0.25),
    "phi (bias in the head)": lambda: transformers.PhiConfig(**SIZES),
    "gpt neo-x": lambda: transformers.GPTNeoXConfig(**SIZES),
}
"""Those and others with something of their own."""


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    for parameter in model.parameters():  # biases and norms are not left at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


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


def plain(model: Any, items: Sequence[PromptBranches]) -> Tensor:
    """[S]: each response by a forward of its own behind its prompt, item after item."""
    result = []
    for item in items:
        for response in item.responses:
            ids = torch.from_numpy(np.concatenate((item.prompt_ids, response))).long()[None]
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            token_logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
            result.append(token_logps[len(item.prompt_ids) - 1 :].sum())
    return torch.stack(result)
