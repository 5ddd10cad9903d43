"""The DeepSpeed ZeRO engine: sharding, precision, accumulation, clipping, the optimizer step.

It sees log-probs and a scalar to minimise, nothing of preferences. How many micro-batches make a step is the caller's
plan: the engine is told which one is the last.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ray import pulse
from dpo_ray.compiler_locks import clear_compiler_locks
from dpo_ray.config import EngineConfig, OptimConfig
from dpo_ray.engine_state import EngineState
from dpo_ray.models import PairModel, ResponseLogps
from dpo_ray.pairs import PairBatch


def deepspeed_config(engine: EngineConfig, optim: OptimConfig) -> dict[str, Any]:
    """DeepSpeed's configuration from ours. The plan counts batches, in pairs; its own counting is held at 1."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    clips_itself = engine.zero_stage > 0  # see `ZeroEngine.step`
    # Gradients of several micro-batches are added in fp32, not in bf16.
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if engine.precision == "bf16" else {}
    return {
        **accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm if clips_itself else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 1) of `num_steps`: linear warm-up, then linear, cosine or constant.

    The formulas of Hugging Face's `get_scheduler`, whose step counts from 0: with a warm-up the first rate is 0.
    """
    done = step - 1
    warmup = math.ceil(optim.warmup_ratio * num_steps)
    if done < warmup:
        return optim.learning_rate * done / warmup
    progress = (done - warmup) / max(1, num_steps - warmup)
    decay = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
    return optim.learning_rate * decay[optim.schedule]


@contextmanager
def sharded_loading(engine: EngineConfig, optim: OptimConfig) -> Iterator[None]:
    """With ZeRO-3, Hugging Face models that are loaded inside come in shards, never whole on one worker."""
    if engine.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    _use_cpu_where_there_is_no_gpu()
    handle = HfDeepSpeedConfig(deepspeed_config(engine, optim))  # transformers asks for it while it lives
    yield
    del handle


class ZeroEngine:
    """A policy in training, sharded over the process group.

    Args:
        model: The policy; its parameters move to the device and type of the engine.
        num_steps: Optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, model: PairModel, engine: EngineConfig, optim: OptimConfig, num_steps: int) -> None:
        _use_cpu_where_there_is_no_gpu()
        clear_compiler_locks()
        import deepspeed

        if engine.activation_checkpointing:
            model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.language_model.enable_input_require_grads()  # reentrant checkpoints need an input with gradient
        if engine.zero_stage == 3 and (blocks := _expert_blocks(model)):
            deepspeed.utils.set_z3_leaf_modules(model, blocks)
        self.model = model
        self._stage, self._optim, self._num_steps = engine.zero_stage, optim, num_steps
        optimizer = torch.optim.AdamW(
            _decay_groups(model, optim.weight_decay), lr=optim.learning_rate, betas=optim.betas, eps=optim.eps
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(engine, optim)
        )
        self._state = EngineState(self._engine, optimizer, model, engine.zero_stage)
        self.device: torch.device = torch.device(self._engine.device)

    def __call__(self, batch: PairBatch) -> ResponseLogps:
        """Log-probs of a batch's responses. Every rank must call it as often as the others."""
        result: ResponseLogps = self._engine(batch.to(self.device))
        pulse.beat()
        return result

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss; `is_last` on the step's last micro-batch.

        Args:
            loss: A scalar. The step's gradient is the sum of all ranks' and micro-batches' scalars.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        # ZeRO averages over ranks; ours is a sum, already divided by the number of pairs in the step.
        self._engine.backward(loss * torch.distributed.get_world_size())

    def step(self, step: int) -> dict[str, float]:
        """Take optimizer step `step` (from 1): returns `grad_norm` (before clipping) and `learning_rate`.

        Where the gradient is not finite the weights stay as they are, the gradient is dropped, and so says `grad_norm`.
        """
        rate = learning_rate(self._optim, step, self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._stage == 0:
            # DeepSpeed leaves the norm unknown here, so we clip: the gradients are whole on every rank.
            limit = self._optim.max_grad_norm or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
            if not math.isfinite(norm):
                self._optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is not stepped
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        return {"grad_norm": norm, "learning_rate": rate}

    def measure_communication(self, on: bool) -> None:
        """Begin or end the counts below. While they run every collective waits for its end."""
        logger = _comms_logger()
        logger.enabled = logger.prof_all = on
        if on:
            logger.comms_dict.clear()

    def communication_seconds(self) -> float:
        """In ZeRO's collectives, while they were measured last."""
        sizes = (size for op in _comms_logger().comms_dict.values() for size in op.values())
        return float(sum(sum(latencies) for _, latencies, *_ in sizes) / 1000)

    def communication_bytes(self) -> dict[str, int]:
        """Bytes given to each of ZeRO's collectives by its name, while they were measured last."""
        ops = _comms_logger().comms_dict.items()
        return {name: int(sum(size * count for size, (count, *_) in sizes.items())) for name, sizes in ops}

    @property
    def overflowed_steps(self) -> int:
        """Steps that the fp16 loss scaler skipped."""
        return int(self._engine.skipped_steps)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def full_weights(self) -> dict[str, Tensor]:
        """The whole weights by the names of `language_model`, on the CPU of rank 0; elsewhere empty. For LoRA only the
        adapter's. Every rank must call it."""
        import deepspeed

        names = self.model.language_model.state_dict(keep_vars=True)
        if self.model.has_adapter:
            names = {name: value for name, value in names.items() if value.requires_grad}
        weights = {}
        is_first = torch.distributed.get_rank() == 0
        tied = {id(value): name for name, value in reversed(names.items())}  # a shared weight once, by its first name
        for name, value in names.items():
            if tied[id(value)] != name:
                continue
            gathered = deepspeed.zero.GatheredParameters([value], enabled=self._stage == 3 and hasattr(value, "ds_id"))
            with gathered:
                if is_first:
                    weights[name] = value.detach().to("cpu", copy=True)
        return weights

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer. Every rank must call it."""
        self._state.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at any number of workers. Every rank must call it."""
        self._state.load(folder)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not. One group where nothing decays."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trained, "weight_decay": 0.0}]
    # Under ZeRO-3 a sharded parameter is flat; its own shape is kept beside it.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    rest = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _comms_logger() -> Any:
    import deepspeed.comm.comm

    return deepspeed.comm.comm.comms_logger


def _expert_blocks(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of the modules that hold experts, to be gathered whole under ZeRO-3.

    Their parts do not run alike: ranks choose different experts, and an adapter's factors are read without a forward.
    """
    return list(
        {type(module) for module in model.modules() for name, _ in module.named_children() if name == "experts"}
    )


def _use_cpu_where_there_is_no_gpu() -> None:
    """DeepSpeed chooses its accelerator once, when it is first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
