"""Where DeepSpeed's optimizers keep what a run must not lose, and how it goes to a checkpoint and back.

fp32 weights, Adam's moments and steps, counters, the loss scale. DeepSpeed's own checkpoints are pickles, and fit only
the number of workers that wrote them; ours (see `shards`) fit any number, and any ZeRO stage.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ray import shards

SHARDS, STATE_FILE = "shards", "engine.json"
COUNTS = ("global_steps", "global_samples", "skipped_steps")
"""What DeepSpeed's engine counts over a run."""


class EngineState:
    """The state of a DeepSpeed engine.

    Args:
        engine: As `deepspeed.initialize` has made it.
        adam: The optimizer that was given to it.
    """

    def __init__(self, engine: Any, adam: torch.optim.Optimizer, model: nn.Module, zero_stage: int) -> None:
        self._engine, self._zero, self._adam, self._model, self._stage = (
            engine,
            engine.optimizer,
            adam,
            model,
            zero_stage,
        )

    def save(self, folder: Path) -> None:
        """Write this rank's part. Every rank must call it."""
        rank, world_size, parts = torch.distributed.get_rank(), torch.distributed.get_world_size(), list(self._parts())
        # Without ZeRO every rank holds everything, and each writes a share.
        mine = parts[rank::world_size] if self._stage == 0 else parts
        shards.write(folder / SHARDS, rank, map(self._piece, mine))
        if rank == 0:
            (steps,) = {float(self._moments(part.flat)["step"]) for part in parts}
            counts = {name: getattr(self._engine, name) for name in COUNTS}
            state = {"adam_steps": steps, "counts": counts, "loss_scale": _numbers(self._loss_scale)}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1))

    def load(self, folder: Path) -> None:
        """Read what any number of ranks wrote. Every rank must call it.

        Raises:
            RunFailed: It is the state of another model.
        """
        state, parts = json.loads((folder / STATE_FILE).read_text()), list(self._parts())
        for part in parts:
            self._moments(part.flat)["step"].fill_(state["adam_steps"])
        shards.read(sorted((folder / SHARDS).iterdir()), map(self._piece, parts))
        for name in COUNTS:
            setattr(self._engine, name, state["counts"][name])
        if self._loss_scale is not None:
            vars(self._loss_scale).update(state["loss_scale"])
        self._round_weights(parts)

    def _parts(self) -> Iterator["_Part"]:
        """What this rank's optimizer holds of the trained parameters."""
        zero, rank = self._zero, torch.distributed.get_rank()
        for name, parameter in self._model.named_parameters():
            p: Any = parameter
            if not p.requires_grad:
                continue
            if self._stage == 0:
                yield _Part(name, p, self._master(p), 0, 0, p.numel())
            elif self._stage == 3:
                group, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = rank * size
                numel = min(size, p.ds_numel - start)  # what is beyond the parameter is padding
                if numel > 0:
                    yield _Part(name, p, zero.fp32_partitioned_groups_flat[group], offset, start, numel)
            elif (mapping := p._hp_mapping) is not None:
                (flat,) = self._adam.param_groups[mapping.param_group_index]["params"]
                source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Part(name, p, flat, place.start, source.start, source.numel)

    def _master(self, parameter: Tensor) -> Tensor:
        """The fp32 weights of a parameter without ZeRO: itself, or fp16's copy."""
        for halves, wholes in zip(
            *(getattr(self._zero, f"{kind}_groups", ()) for kind in ("fp16", "fp32")), strict=True
        ):
            for half, whole in zip(halves, wholes, strict=True):
                if half is parameter:
                    return whole  # type: ignore[no-any-return]
        return parameter

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state of a tensor, made as Adam makes it where no step has been taken."""
        state: dict[str, Tensor] = self._adam.state[flat]
        if not state:
            state |= {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        return state

    def _piece(self, part: "_Part") -> shards.Piece:
        moments = self._moments(part.flat)
        tensors = {"weight": part.flat, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        return shards.Piece(part.name, part.start, {kind: part.view(tensor) for kind, tensor in tensors.items()})

    @property
    def _loss_scale(self) -> Any:
        """Where fp16's loss scale and the overflows behind it are; None where there is none."""
        return getattr(self._zero, "loss_scaler", getattr(self._zero, "loss_scale_config", None))

    def _round_weights(self, parts: list["_Part"]) -> None:
        """Give the forward pass the optimizer's weights, in its own type and on every rank, as after a step."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()  # lets go of gathered parameters
            for part in parts:
                part.parameter.ds_tensor.data[: part.numel].copy_(part.view(part.flat))
            self._zero.checkpoint_event_epilogue()  # gathers the small ones again
        else:
            for part in parts:
                part.parameter.data.copy_(part.flat)


class _Part(NamedTuple):
    """Elements of a parameter, in a flat fp32 tensor that this rank's optimizer updates."""

    name: str
    parameter: Any
    flat: Tensor
    offset: int
    """In `flat`."""
    start: int
    """In the flattened parameter."""
    numel: int

    def view(self, like: Tensor) -> Tensor:
        """These elements in `flat`, or in a tensor of moments beside it."""
        return like.detach().view(-1)[self.offset : self.offset + self.numel]


def _numbers(thing: Any) -> dict[str, float]:
    return {} if thing is None else {k: v for k, v in vars(thing).items() if isinstance(v, int | float)}
