"""What makes a run resumable, and where it is found: the run folder's checkpoints, progress, random states.

A checkpoint folder holds `engine.json` and `shards/` (see `engine`), `state.json`, `rng-RANK.safetensors`, `model/` (a
Hugging Face folder) and `manifest-RANK.json`. No file is a pickle, and any number of workers can go on from it.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from dpo_ray import manifest
from dpo_ray.anomalies import Anomaly
from dpo_ray.errors import InputError
from dpo_ray.manifest import Manifest
from dpo_ray.stopping import Evaluation
from dpo_ray.storage import Folder

CHECKPOINTS = "checkpoints"
"""Their folder in the run folder; Ray Train writes there."""

SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that it keeps."""

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
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    """That training waited for checkpoints."""
    tokens: int = 0
    """Real tokens trained on: each prompt once, each response once."""
    slots: int = 0
    """Places computed, padding included."""
    filled: int = 0
    """Of these, not padding."""
    flops: float = 0.0
    """Operations that the model could not do without; 0 where nobody asks for the utilisation."""
    since_log: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums of the steps since the last training line."""
    grad_norm_max: float = 0.0
    """Largest gradient norm since the last training line."""
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)
    train_lines: list[Evaluation] = dataclasses.field(default_factory=list)
    anomalies: list[Anomaly] = dataclasses.field(default_factory=list)
    stop_reason: str | None = None

    def add_step(self, sums: dict[str, float], seconds: float) -> None:
        """Count an optimizer step by its reduced sums."""
        self.step += 1
        self.train_seconds += seconds
        self.tokens += int(sums["tokens"])
        self.slots += int(sums["slots"])
        self.filled += int(sums["filled"])
        self.flops += sums["flops"]
        self.since_log = {name: self.since_log.get(name, 0.0) + value for name, value in sums.items()}

    def add_norm(self, grad_norm: float) -> None:
        """Count a step's gradient norm; one that is not finite belongs to a step that fp16's loss scaler skipped."""
        if math.isfinite(grad_norm):
            self.grad_norm_max = max(self.grad_norm_max, grad_norm)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        fields: dict[str, Any] = json.loads(text)
        for name in ("evaluations", "train_lines"):
            fields[name] = [Evaluation(step, metrics) for step, metrics in fields[name]]
        fields["anomalies"] = [Anomaly(*values) for values in fields["anomalies"]]
        return cls(**fields)


def load_state(folder: Path) -> TrainState:
    return TrainState.from_json((folder / STATE_FILE).read_text())


def save_rng(folder: Path, rank: int) -> None:
    """This rank's random states (adapter dropout draws from them)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"rng-{rank:05d}.safetensors")


def load_rng(folder: Path, rank: int, *, seed: int, step: int) -> None:
    """Random states of this rank; one that fewer workers have left none for gets its own, by seed, step and rank."""
    file = folder / f"rng-{rank:05d}.safetensors"
    if not file.exists():
        digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest))
        return
    states = load_file(file)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Found(NamedTuple):
    """A checkpoint's folder in storage."""

    name: str
    manifest: Manifest | None
    """None: it is not whole."""
    fault: str
    """Then what is missing, by file."""
    was_whole: bool
    """Otherwise its writing was broken off: nobody has ever counted on it."""


def find(run_folder: Folder) -> list[Found]:
    """The checkpoints of a run, newest first. Sizes are checked here, contents by `manifest.changed`."""
    checkpoints = run_folder / CHECKPOINTS
    listed, ages = _listed(checkpoints), {name: _age(name) for name in checkpoints.folders()}
    found = []
    for name in sorted((name for name in ages if ages[name]), key=ages.__getitem__, reverse=True):
        try:
            found.append(Found(name, manifest.read(checkpoints / name), "", True))
        except manifest.Damaged as fault:
            found.append(Found(name, None, str(fault), listed is None or name in listed))
    return found


def free_name(run_folder: Folder, step: int) -> str:
    """The name of a new checkpoint's folder: none that exists, with whose files it would mix."""
    taken = (run_folder / CHECKPOINTS).folders()
    names = (f"step-{step:06d}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def mend_snapshot(run_folder: Folder) -> None:
    """Take checkpoints whose folder is gone out of Ray's list, over which Ray would refuse to start.

    Raises:
        InputError: The run had checkpoints, and none is whole.
    """
    checkpoints = run_folder / CHECKPOINTS
    listed = _listed(checkpoints)
    if listed == {}:
        return
    found = find(run_folder)
    if not any(one.manifest for one in found):
        raise none_is_whole(run_folder, [f"{one.name}: {one.fault}" for one in found])
    there = {one.name for one in found}
    if listed is None or there.isdisjoint(listed):
        checkpoints.delete(SNAPSHOT_FILE)  # Ray begins a new one
    elif not there.issuperset(listed):
        snapshot = checkpoints.read_json(SNAPSHOT_FILE)
        kept = [item for item in snapshot["checkpoint_results"] if item["checkpoint_dir_name"] in there]
        reports = [listed[item["checkpoint_dir_name"]] for item in kept]
        checkpoints.write_json(
            SNAPSHOT_FILE,
            snapshot
            | {"checkpoint_results": kept, "checkpoint_report_indices": reports}
            | {"latest_checkpoint_result": kept[reports.index(max(reports))]},
        )


def delete_unlisted(run_folder: Folder) -> None:
    """Delete what a finished run leaves beside the checkpoints that it keeps: uploads that were cut."""
    checkpoints = run_folder / CHECKPOINTS
    if listed := _listed(checkpoints):
        for name in checkpoints.folders():
            if _age(name) and name not in listed:
                checkpoints.delete(name)


def none_is_whole(run_folder: Folder, faults: list[str]) -> InputError:
    what = "; ".join(faults) or "they are gone"
    return InputError(f"cannot resume: no checkpoint of {run_folder.path} is whole ({what}); choose another `name`")


def _listed(checkpoints: Folder) -> dict[str, int] | None:
    """The checkpoints on Ray's list, each with the number of its report; None if the list was cut as it was written."""
    if not checkpoints.exists(SNAPSHOT_FILE):
        return {}
    try:
        snapshot = checkpoints.read_json(SNAPSHOT_FILE)
        names = [item["checkpoint_dir_name"] for item in snapshot["checkpoint_results"]]
        return dict(zip(names, snapshot["checkpoint_report_indices"], strict=True))
    except (ValueError, KeyError, TypeError):
        return None


def _age(name: str) -> tuple[int, ...]:
    """Step and number of the attempt; empty for a folder that is no checkpoint."""
    match = re.fullmatch(r"step-(\d+)(?:-(\d+))?", name)
    return () if match is None else (int(match[1]), int(match[2] or 1))
