"""The learning rate of every step against Hugging Face's schedulers, and DeepSpeed's settings from ours."""

import math
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from dpo_ray.config import EngineConfig, OptimConfig
from dpo_ray.engine import _decay_groups, deepspeed_config, learning_rate


def hugging_face_rates(optim: OptimConfig, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.learning_rate)
    name = {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule)
    warmup = math.ceil(optim.warmup_ratio * num_steps)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_of_every_step_is_hugging_faces(schedule: Any, warmup_ratio: float, num_steps: int):
    optim = OptimConfig(learning_rate=3e-4, schedule=schedule, warmup_ratio=warmup_ratio)
    rates = [learning_rate(optim, step, num_steps) for step in range(1, num_steps + 1)]
    assert rates == pytest.approx(hugging_face_rates(optim, num_steps), rel=1e-12, abs=1e-18)


def test_rates_worked_by_hand():
    optim = OptimConfig(learning_rate=1.0, schedule="linear", warmup_ratio=0.2)
    assert [learning_rate(optim, step, 10) for step in (1, 2, 3, 7, 10)] == [0.0, 0.5, 1.0, 0.5, 0.125]
    constant = OptimConfig(learning_rate=1.0, schedule="constant", warmup_ratio=0.0)
    assert {learning_rate(constant, step, 10) for step in range(1, 11)} == {1.0}


def test_deepspeed_counts_no_batches_and_no_steps_of_its_own():
    config = deepspeed_config(EngineConfig(), OptimConfig())
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert "scheduler" not in config
    assert "optimizer" not in config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_precision_and_clipping_reach_deepspeed(stage: Any, precision: Any):
    if stage == 0 and precision != "fp32":
        with pytest.raises(ValidationError, match=f"{precision} needs zero_stage 1, 2 or 3"):
            EngineConfig(zero_stage=stage, precision=precision)
        return
    config = deepspeed_config(EngineConfig(zero_stage=stage, precision=precision), OptimConfig(max_grad_norm=0.7))
    assert config["zero_optimization"] == {"stage": stage}
    assert config["bf16"]["enabled"] is (precision == "bf16")
    assert config["fp16"]["enabled"] is (precision == "fp16")
    # Stage 0 is clipped by the engine itself, so by DeepSpeed not a second time.
    assert config["gradient_clipping"] == (0.0 if stage == 0 else 0.7)


def test_offload_puts_the_optimizer_on_the_cpu():
    config = deepspeed_config(EngineConfig(zero_stage=2, offload_optimizer=True), OptimConfig())
    assert config["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


class Sharded(torch.nn.Module):
    """A matrix, a bias and a frozen weight; under ZeRO-3 a shard is flat and keeps its shape beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.shard = torch.nn.Parameter(torch.zeros(0))
        self.shard.ds_shape = (4, 4)  # type: ignore[attr-defined]


def test_matrices_decay_and_norms_biases_and_frozen_weights_do_not():
    model = Sharded()
    decayed, rest = _decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.shard), id(model.linear.weight)]
    assert [id(p) for p in rest["params"]] == [id(model.linear.bias)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_without_decay_all_trained_parameters_are_one_group():
    (group,) = _decay_groups(Sharded(), 0.0)
    assert (len(group["params"]), group["weight_decay"]) == (3, 0.0)


def test_a_group_without_parameters_is_left_out():
    (group,) = _decay_groups(torch.nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
