"""How much memory a worker needs, from shapes alone, and which settings would make a run fit."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_ray.config import LoraConfig, RunConfig
from dpo_ray.device import GIB
from dpo_ray.logps import CHUNK_LOGITS
from dpo_ray.models import policy_source, read_config


class Shape(NamedTuple):
    """What the estimate reads of a model."""

    parameters: int
    adapter_parameters_per_rank: int
    """Of LoRA on every linear layer but the output layer."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int


def model_shape(run: RunConfig) -> Shape:
    """From the configuration; no weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(policy_source(run.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output]
    return Shape(
        sum(p.numel() for p in model.parameters()),
        sum(layer.in_features + layer.out_features for layer in layers),
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
    )


def memory_estimate(run: RunConfig, shape: Shape) -> dict[str, Any]:
    """GiB of one worker at its peak: weights, gradients, optimizer, activations, output layer.

    Adam keeps two fp32 moments, and mixed precision an fp32 copy of the weights; ZeRO-1 shards these, ZeRO-2 also the
    gradients, ZeRO-3 also the weights (Rajbhandari et al. 2020, arXiv:1910.02054, section 3). Gradients are added in
    fp32 under bf16. Activations: the inputs of some 16 operations a layer and the attention matrix, or the layer's
    input alone with checkpointing. The output layer holds three chunks of fp32 logits.
    """
    trained = shape.parameters if run.model.lora is None else run.model.lora.rank * shape.adapter_parameters_per_rank
    workers, stage, precision = run.cluster.num_workers, run.engine.zero_stage, run.engine.precision
    size = 4 if precision == "fp32" else 2
    attention = 4 * shape.num_attention_heads * run.batch.row_tokens / shape.hidden_size
    kept = 2 if run.engine.activation_checkpointing else 16 + attention
    by_part = {
        "weights": shape.parameters * size / (workers if stage == 3 else 1),
        "gradients": trained * (2 if precision == "fp16" else 4) / (workers if stage >= 2 else 1),
        "optimizer": 0.0
        if run.engine.offload_optimizer
        else trained * (8 if size == 4 else 12) / (workers if stage >= 1 else 1),
        "activations": run.batch.tokens_per_device * shape.hidden_size * size * shape.num_layers * kept,
        "output_layer": 3 * 4 * CHUNK_LOGITS["cpu" if precision == "fp32" else "cuda"],
    }
    gib = {name: round(value / GIB, 3) for name, value in by_part.items()}
    parameters = {"parameters": shape.parameters, "trained_parameters": trained}
    return {**parameters, "gib_per_worker": round(sum(gib.values()), 3), **gib}


def settings_that_fit(run: RunConfig, shape: Shape, device_gib: float) -> dict[str, Any] | None:
    """The overrides that bring a run into a device's memory, none that is not needed; None if all together do not.

    They are tried in the order of what they cost: shards of state, recomputed activations, a smaller micro-batch,
    state in CPU memory, adapters instead of all weights.
    """
    smallest = max(run.batch.row_tokens, 2 * run.data.max_tokens)
    budgets = [run.batch.tokens_per_device // 2**k for k in range(1, 12)]
    steps: list[tuple[str, Any]] = [
        *(("engine.zero_stage", stage) for stage in (1, 2, 3) if stage > run.engine.zero_stage),
        ("engine.activation_checkpointing", True),
        *(("batch.tokens_per_device", budget) for budget in budgets if budget >= smallest),
        ("engine.offload_optimizer", True),
        ("model.lora", {}),
    ]

    def fits(overrides: Mapping[str, Any]) -> bool:
        return bool(memory_estimate(_with(run, overrides), shape)["gib_per_worker"] <= device_gib)

    taken: dict[str, Any] = {}
    for key, value in steps:
        if fits(taken):
            break
        taken[key] = value
    if not fits(taken):
        return None
    for key in list(taken):
        fewer = {name: value for name, value in taken.items() if name != key}
        if fits(fewer):
            taken = fewer
    return taken


def _with(run: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The recipe with some of the settings above."""
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        laid = LoraConfig() if key == "model.lora" else value
        run = run.model_copy(update={section: getattr(run, section).model_copy(update={name: laid})})
    return run
