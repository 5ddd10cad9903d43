"""Progress survives the disk exactly, random states go on where they were, and a run's checkpoints are found."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.anomalies import Anomaly
from dpo_ray.checkpoint import (
    CHECKPOINTS,
    SNAPSHOT_FILE,
    TrainState,
    delete_unlisted,
    find,
    free_name,
    load_rng,
    mend_snapshot,
    save_rng,
)
from dpo_ray.errors import InputError
from dpo_ray.manifest import seal
from dpo_ray.stopping import Evaluation
from dpo_ray.storage import Folder

numbers = st.floats(allow_nan=False, allow_infinity=False)


def some_state() -> TrainState:
    return TrainState(
        step=37,
        world_size=2,
        train_seconds=1 / 3,
        checkpoint_seconds=0.5,
        tokens=12_345_678_901,
        slots=7,
        filled=5,
        flops=6e12,
        evaluation_seconds=1.5,
        since_log={"loss": math.pi, "num_pairs": 64.0},
        evaluations=[Evaluation(10, {"loss": 0.1 + 0.2, "num_pairs": 5}), Evaluation(20, {"loss": 5e-324})],
        train_lines=[Evaluation(1, {"loss": math.log(2)})],
        grad_norm_max=2.5,
        anomalies=[Anomaly("overtraining", 30, "it fell: é", "stop early")],
        stop_reason="kl 0.6 above the budget",
    )


def test_every_field_survives_the_round_trip():
    state = some_state()
    defaults = TrainState()
    assert all(getattr(state, f.name) != getattr(defaults, f.name) for f in dataclasses.fields(state)), "none left out"
    again = TrainState.from_json(state.to_json())
    assert again == state
    assert {type(evaluation) for evaluation in (*again.evaluations, *again.train_lines)} == {Evaluation}
    assert TrainState.from_json(defaults.to_json()) == defaults


@given(seconds=numbers, loss=numbers, total=numbers)
def test_numbers_survive_to_the_last_bit(seconds: float, loss: float, total: float):
    state = TrainState(train_seconds=seconds, since_log={"loss": total}, evaluations=[Evaluation(1, {"loss": loss})])
    again = TrainState.from_json(state.to_json())
    found = (again.train_seconds, again.since_log["loss"], again.evaluations[0].metrics["loss"])
    assert [value.hex() for value in found] == [float(value).hex() for value in (seconds, total, loss)]


def test_states_do_not_share_their_lists():
    one, other = TrainState(), TrainState()
    one.evaluations.append(Evaluation(1, {}))
    one.since_log["loss"] = 1.0
    assert (other.evaluations, other.since_log) == ([], {})


def test_every_rank_draws_on_where_it_stopped(tmp_path: Path):
    expected = {}
    for rank in (0, 1):
        torch.manual_seed(rank)
        torch.rand(5)
        save_rng(tmp_path, rank)
        expected[rank] = torch.rand(3)
    for rank in (1, 0):
        load_rng(tmp_path, rank, seed=0, step=1)
        assert torch.equal(torch.rand(3), expected[rank])
    assert not torch.equal(expected[0], expected[1])


def test_a_rank_without_a_file_draws_by_seed_step_and_rank(tmp_path: Path):
    def draw(seed: int, step: int, rank: int) -> float:
        torch.rand(1)  # whatever was drawn before
        load_rng(tmp_path, rank, seed=seed, step=step)
        return float(torch.rand(()))

    assert draw(1, 20, 2) == draw(1, 20, 2)
    assert len({draw(1, 20, 2), draw(2, 20, 2), draw(1, 30, 2), draw(1, 20, 3), draw(1, 2, 2)}) == 5


class Run:
    """A run folder with checkpoints as Ray Train leaves them."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, Folder(str(path))
        (path / CHECKPOINTS).mkdir(parents=True)

    def write(self, name: str, step: int, files: int = 2) -> Path:
        folder = self.path / CHECKPOINTS / name
        (folder / "shards").mkdir(parents=True)
        for number in range(files):
            (folder / f"shards/{number}").write_bytes(b"%d" % step)
        seal(folder, 0, 1, step=step, is_best=step == 10)
        return folder

    def snapshot(self, names: list[str]) -> None:
        """As Ray does, by score; reports are counted by step."""
        results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"of": name}} for name in names]
        reports = [int(name[5:11]) for name in names]
        latest = results[reports.index(max(reports))]
        snapshot = {"ray_version": "2.60.0", "checkpoint_results": results, "checkpoint_report_indices": reports}
        (self.path / CHECKPOINTS / SNAPSHOT_FILE).write_text(
            json.dumps(snapshot | {"latest_checkpoint_result": latest})
        )

    def listed(self) -> tuple[list[str], list[int], str]:
        snapshot = json.loads((self.path / CHECKPOINTS / SNAPSHOT_FILE).read_text())
        assert snapshot["ray_version"] == "2.60.0"
        names = [item["checkpoint_dir_name"] for item in snapshot["checkpoint_results"]]
        return names, snapshot["checkpoint_report_indices"], snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three checkpoints, the best first."""
    run = Run(tmp_path / "run")
    for step in (10, 20, 30):
        run.write(f"step-{step:06d}", step)
    run.snapshot(["step-000020", "step-000030", "step-000010"])
    return run


def test_checkpoints_are_found_newest_first(run: Run):
    run.write("step-000020-2", 20)
    run.write("step-1000000", 1_000_000)
    (run.path / CHECKPOINTS / "something-else").mkdir()
    found = find(run.folder)
    names = ["step-1000000", "step-000030", "step-000020-2", "step-000020", "step-000010"]
    assert [one.name for one in found] == names
    assert [one.manifest.step for one in found if one.manifest] == [1_000_000, 30, 20, 20, 10]
    assert [one.manifest.is_best for one in found if one.manifest] == [False, False, False, False, True]
    assert all(one.was_whole and one.fault == "" for one in found)


def test_a_run_that_has_saved_nothing_has_no_checkpoints(tmp_path: Path):
    assert find(Folder(str(tmp_path / "none"))) == []
    mend_snapshot(Folder(str(tmp_path / "none")))


def test_a_damaged_checkpoint_is_told_from_one_whose_upload_was_cut(run: Run):
    (run.path / CHECKPOINTS / "step-000030/shards/1").unlink()
    (run.write("step-000040", 40) / "shards/0").unlink()
    (run.write("step-000050", 50) / "manifest-00000.json").unlink()
    cut_again, cut, damaged, *whole = find(run.folder)
    assert (cut_again.manifest, cut_again.fault, cut_again.was_whole) == (None, "manifest-00000.json is missing", False)
    assert (cut.manifest, cut.fault, cut.was_whole) == (None, "shards/0 is missing", False)
    assert (damaged.manifest, damaged.fault, damaged.was_whole) == (None, "shards/1 is missing", True)
    assert [one.name for one in whole] == ["step-000020", "step-000010"]


@pytest.mark.parametrize("name", ["shards/0", "shards/1", "manifest-00000.json"])
def test_any_part_of_an_upload_is_not_a_checkpoint(run: Run, name: str):
    (run.write("step-000040", 40) / name).unlink()
    assert [one.name for one in find(run.folder) if one.manifest] == ["step-000030", "step-000020", "step-000010"]


def test_where_rays_list_is_damaged_every_checkpoint_may_have_been_whole(run: Run):
    (run.write("step-000040", 40) / "shards/0").unlink()
    (run.path / CHECKPOINTS / SNAPSHOT_FILE).write_text('{"ray_ver')
    assert find(run.folder)[0].was_whole


def test_a_new_checkpoint_never_goes_to_a_folder_that_exists(run: Run):
    assert free_name(run.folder, 40) == "step-000040"
    assert free_name(run.folder, 30) == "step-000030-2"
    run.write("step-000030-2", 30)
    assert free_name(run.folder, 30) == "step-000030-3"
    assert free_name(Folder(str(run.path / "none")), 30) == "step-000030"


def test_rays_list_stays_as_it_is_where_all_is_well(run: Run):
    before = (run.path / CHECKPOINTS / SNAPSHOT_FILE).read_bytes()
    run.write("step-000040", 40)
    mend_snapshot(run.folder)
    assert (run.path / CHECKPOINTS / SNAPSHOT_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (["step-000030"], (["step-000020", "step-000010"], [20, 10], "step-000020")),
        (["step-000020"], (["step-000030", "step-000010"], [30, 10], "step-000030")),
        (["step-000020", "step-000030"], (["step-000010"], [10], "step-000010")),
    ],
)
def test_deleted_checkpoints_leave_rays_list(run: Run, gone: list[str], left: tuple[list[str], list[int], str]):
    for name in gone:
        shutil.rmtree(run.path / CHECKPOINTS / name)
    mend_snapshot(run.folder)
    assert run.listed() == left


def test_a_list_that_is_of_no_use_is_removed(run: Run):
    (run.path / CHECKPOINTS / SNAPSHOT_FILE).write_text('{"ray_ver')
    mend_snapshot(run.folder)
    assert not (run.path / CHECKPOINTS / SNAPSHOT_FILE).exists()
    run.snapshot(["step-000099"])
    mend_snapshot(run.folder)
    assert not (run.path / CHECKPOINTS / SNAPSHOT_FILE).exists()


def test_a_run_whose_checkpoints_are_all_gone_is_not_begun_anew(run: Run):
    for step in (10, 20, 30):
        shutil.rmtree(run.path / CHECKPOINTS / f"step-{step:06d}")
    with pytest.raises(InputError, match=r"cannot resume: no checkpoint of .*/run is whole \(they are gone\)"):
        mend_snapshot(run.folder)


def test_a_run_whose_checkpoints_are_all_cut_is_not_begun_anew(run: Run):
    for step in (10, 20, 30):
        (run.path / CHECKPOINTS / f"step-{step:06d}/shards/0").unlink()
    for content in (None, "{"):
        if content is not None:
            (run.path / CHECKPOINTS / SNAPSHOT_FILE).write_text(content)
        with pytest.raises(InputError, match=r"\(step-000030: shards/0 is missing; step-000020: shards/0 is missing; "):
            mend_snapshot(run.folder)


def test_a_finished_run_keeps_only_what_is_on_rays_list(run: Run):
    cut = run.write("step-000030-2", 30) / "manifest-00000.json"
    cut.unlink()
    (run.path / CHECKPOINTS / "notes").mkdir()
    delete_unlisted(run.folder)
    left = sorted(path.name for path in (run.path / CHECKPOINTS).iterdir())
    assert left == [SNAPSHOT_FILE, "notes", "step-000010", "step-000020", "step-000030"]
    (run.path / CHECKPOINTS / SNAPSHOT_FILE).unlink()  # without the list nothing is known to be superfluous
    delete_unlisted(run.folder)
    assert (run.path / CHECKPOINTS / "step-000030").exists()
