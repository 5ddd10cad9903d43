"""The batch scripts, on a node whose Slurm and Ray are small scripts that record what they are told."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.config import load_run, parse_override
from tests.unit.manifests import CLUSTER, ROOT, parsed

FAKES = {
    # Runs the step on the one node that there is.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    # As `ray symmetric-run`: what stands before `--` is Ray's, the rest runs.
    "ray": """printf '%s\\n' "$@" > "$RECORD/ray"
[ -z "${BROKEN:-}" ] || exit 0
while [ "$1" != -- ]; do shift; done; shift; "$@"; exit $?""",
    "dpo-ray": """printf '%s\\n' dpo-ray "$@" > "$RECORD/dpo-ray.new"
trap 'sleep 0.3; echo saved > "$RECORD/saved"; exit 130' TERM
mv "$RECORD/dpo-ray.new" "$RECORD/dpo-ray"
[ -z "${WAITS:-}" ] || while :; do sleep 0.05; done""",
    "scontrol": 'echo "$@" > "$RECORD/scontrol"',
    "hostname": "echo 10.1.2.3 10.1.2.4",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on a node whose Slurm and Ray are small scripts that record what they are told."""
    for name, script in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret")
    job_id = str(10**6 + os.getpid())
    yield {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "RECORD": str(tmp_path),
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    shutil.rmtree(f"/tmp/ray-{job_id}", ignore_errors=True)


def batch(script: str, *arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    command = ["bash", str(CLUSTER / "slurm" / script), *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.sbatch", ["hh-rlhf", "loss.beta=0.3"]),
        ("sweep.sbatch", ["hh-rlhf", "--space", "beta", "--confirm", "2"]),
    ],
)
def test_a_batch_script_runs_our_command_on_a_cluster_of_its_own(
    script: str, arguments: list[str], slurm: dict[str, str], tmp_path: Path
):
    from ray.scripts.scripts import start

    job = batch(script, *arguments, env=slurm)
    assert job.wait(20) == 0, job.communicate()[0]
    command = (tmp_path / "dpo-ray").read_text().split("\n")[:-1]
    params = parsed(command)
    address = f"10.1.2.3:{20000 + int(slurm['SLURM_JOB_ID']) % 1000 * 10}"
    assert (params["resume"], params["address"]) == (True, address)
    load_run(params["recipe"], dict(map(parse_override, params["overrides"] or [])))
    told = (tmp_path / "ray").read_text().split("\n")
    options = told[1 : told.index("--")]
    assert told[0] == "symmetric-run"
    assert options[:4] == ["--address", address, "--min-nodes", "2"]
    start.make_context("start", options[4:])
    assert len({*options[5::2], address.partition(":")[2]}) == 6, "every port is another"


def test_a_job_whose_time_is_nearly_over_saves_and_goes_back_into_the_queue(slurm: dict[str, str], tmp_path: Path):
    job = _signalled("USR1", slurm, tmp_path)
    assert job == 130
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]


def test_a_job_that_is_ended_saves_and_does_not_come_back(slurm: dict[str, str], tmp_path: Path):
    assert _signalled("TERM", slurm, tmp_path) == 130
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "scontrol").exists()


def _signalled(name: str, env: dict[str, str], record: Path) -> int:
    job = batch("train.sbatch", "hh-rlhf", env=env | {"WAITS": "1"})
    end = time.monotonic() + 20
    while not (record / "dpo-ray").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    subprocess.run(["kill", f"-{name}", str(job.pid)], check=True)
    return job.wait(20)


def test_a_job_is_failed_when_ray_did_not_start_or_there_is_no_token(slurm: dict[str, str], tmp_path: Path):
    job = batch("train.sbatch", "hh-rlhf", env=slurm | {"BROKEN": "1"})
    assert job.wait(20) == 1
    assert "Ray did not start" in job.communicate()[0]
    job = batch("train.sbatch", "hh-rlhf", env=slurm | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert job.wait(20) == 2
    assert "ray get-auth-token --generate" in job.communicate()[0]
