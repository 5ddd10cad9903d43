"""What makes a run resumable: engine shards, progress, random states; and the exported model beside them.

A checkpoint folder holds `zero/` (DeepSpeed's, every rank its shards), `state.json`, `rng-RANK.safetensors` and
`model/`, a Hugging Face folder. Everything but `zero/` is free of pickles, so only a resumed run reads that.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dpo_ray.errors import InputError
from dpo_ray.stopping import Evaluation

STATE_FILE = "state.json"
MODEL_FOLDER = "model"


@dataclasses.dataclass
class TrainState:
    """Progress of a run; all that a resumed run continues from besides weights, optimizer and random states.

    The place in the data is not here: it follows from `step`.
    """

    step: int = 0
    world_size: int = 1
    train_seconds: float = 0.0
    """In training steps, without evaluation, checkpoints and start-up."""
    checkpoint_seconds: float = 0.0
    """That training waited for checkpoints."""
    tokens: int = 0
    """Real tokens trained on: each prompt once, each response once."""
    slots: int = 0
    """Places computed, padding included."""
    filled: int = 0
    """Of these, not padding."""
    since_log: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums of the steps since the last training line."""
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)
    train_lines: list[Evaluation] = dataclasses.field(default_factory=list)
    alarms: list[str] = dataclasses.field(default_factory=list)
    stop_reason: str | None = None

    def add_step(self, sums: dict[str, float], seconds: float) -> None:
        """Count an optimizer step by its reduced sums."""
        self.step += 1
        self.train_seconds += seconds
        self.tokens += int(sums["tokens"])
        self.slots += int(sums["slots"])
        self.filled += int(sums["filled"])
        self.since_log = {name: self.since_log.get(name, 0.0) + value for name, value in sums.items()}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        fields: dict[str, Any] = json.loads(text)
        for name in ("evaluations", "train_lines"):
            fields[name] = [Evaluation(step, metrics) for step, metrics in fields[name]]
        return cls(**fields)


def save_rng(folder: Path, rank: int) -> None:
    """This rank's random states (adapter dropout draws from them)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"rng-{rank:05d}.safetensors")


def load_rng(folder: Path, rank: int) -> None:
    states = load_file(folder / f"rng-{rank:05d}.safetensors")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def load_state(folder: Path, world_size: int) -> TrainState:
    """Progress from a checkpoint.

    Raises:
        InputError: It was written by another number of workers; ZeRO's shards fit only theirs.
    """
    state = TrainState.from_json((folder / STATE_FILE).read_text())
    if state.world_size != world_size:
        raise InputError(
            f"the checkpoint of step {state.step} was written by {state.world_size} workers and "
            f"`cluster.num_workers` is {world_size}; resume with {state.world_size}"
        )
    return state
