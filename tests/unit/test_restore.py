"""Which checkpoint a run goes on from: the newest whole one, on any storage; never a wrong one in silence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from dpo_ray import checkpoint, manifest, train
from dpo_ray.checkpoint import CHECKPOINTS, SNAPSHOT_FILE, TrainState
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError


class Engine:
    """Remembers what it was told to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, folder: Path) -> None:
        self.loaded.append((folder / "shards/0").read_text())


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return parse_run(
        {
            "name": "run",
            "storage": {"path": str(tmp_path)},
            "model": {"path": "none"},
            "data": {"sources": [{"path": "none"}]},
        }
    )


def write(run: RunConfig, step: int) -> Path:
    """A checkpoint, with its model and random states."""
    folder = Path(run.folder) / CHECKPOINTS / f"step-{step:06d}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "shards/0").write_text(f"weights of step {step}")
    (folder / "model/config.json").write_text("{}")
    (folder / checkpoint.STATE_FILE).write_text(TrainState(step=step, world_size=4).to_json())
    torch.manual_seed(step)
    checkpoint.save_rng(folder, 0)
    manifest.seal(folder, 0, 1, step=step, is_best=False)
    return folder


def restore(run: RunConfig) -> tuple[list[str], TrainState, list[str]]:
    engine: Any = Engine()
    state, faults = train.restore(engine, run, rank=0, world_size=1)
    return engine.loaded, state, faults


def test_a_new_run_starts_at_step_0(run: RunConfig):
    assert restore(run) == ([], TrainState(world_size=1), [])


def test_the_newest_checkpoint_is_loaded_with_its_random_states(run: RunConfig):
    for step in (10, 20):
        write(run, step)
    torch.manual_seed(20)
    expected = torch.rand(3)
    loaded, state, faults = restore(run)
    assert (loaded, state.step, faults) == (["weights of step 20"], 20, [])
    assert state.world_size == 1  # of those who go on, not of those who wrote it
    assert torch.equal(torch.rand(3), expected)


FILES = ["shards/0", "model/config.json", "state.json", "rng-00000.safetensors", "manifest-00000.json"]


@pytest.mark.parametrize("damage", ["cut", "changed", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(run: RunConfig, name: str, damage: str):
    write(run, 10)
    file = write(run, 20) / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    loaded, state, faults = restore(run)
    assert (loaded, state.step) == (["weights of step 10"], 10)
    (fault,) = faults
    assert fault.startswith(f"step-000020: {name} ")


def test_a_run_without_any_whole_checkpoint_is_refused_with_every_fault(run: RunConfig):
    for step in (10, 20):
        (write(run, step) / "shards/0").write_text(f"weights of step {step + 1}")
    with pytest.raises(InputError, match=r"step-000020: shards/0 has changed; step-000010: shards/0 has changed"):
        restore(run)


def test_a_listed_checkpoint_that_was_cut_since_is_refused(run: RunConfig):
    folder = write(run, 10)
    (folder / "shards/0").unlink()
    snapshot = '{"checkpoint_results": [{"checkpoint_dir_name": "step-000010"}], "checkpoint_report_indices": [0]}'
    (folder.parent / SNAPSHOT_FILE).write_text(snapshot)
    with pytest.raises(InputError, match=r"step-000010: shards/0 is missing"):
        restore(run)


def test_a_first_upload_that_was_cut_is_passed_over(run: RunConfig):
    (write(run, 10) / "manifest-00000.json").unlink()
    loaded, state, faults = restore(run)
    assert (loaded, state.step) == ([], 0)
    assert faults == ["step-000010: manifest-00000.json is missing"]


def test_a_checkpoint_in_remote_storage_is_downloaded_checked_and_loaded(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A filesystem that is not the local one: Ray downloads, and removes the copy afterwards."""
    write(run, 10)
    (write(run, 20) / "shards/0").write_text("weights of step 21")
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(train, "locate", lambda path: (remote, path.removeprefix(str(tmp_path) + "/")))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "downloads"))
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    loaded, state, faults = restore(run)
    assert (loaded, state.step, faults) == (["weights of step 10"], 10, ["step-000020: shards/0 has changed"])
    assert not list((tmp_path / "downloads").rglob("*.safetensors"))
