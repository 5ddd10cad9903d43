"""Jobs on a real cluster of three raylets with token authentication, by the commands as a person types them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import load_run
from dpo_ray.launch import fit

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-c", "from dpo_ray.cli import main; main()"]
TIMES = ("seconds", "_second", "share", "time_split", "peak_memory", "path", "attention", "reference")
STEPS = 30

Environment = dict[str, str]


class LocalCluster:
    """`cluster/local.sh`, in a folder and on addresses of its own."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid()
        self._environment = os.environ | {
            "FOLDER": str(folder / "c"),
            "NET": f"127.{20 + number % 200}.{number // 200 % 250}",
            "BIN": str(Path(sys.executable).parent),
            "PYTHONPATH": str(REPOSITORY),
        }

    def __call__(self, *words: str) -> str:
        script = str(REPOSITORY / "cluster/local.sh")
        done = subprocess.run([script, *words], env=self._environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def environment(self) -> Environment:
        lines = (line.removeprefix("export ") for line in self("env").splitlines() if line.startswith("export "))
        return self._environment | dict(line.split("=", 1) for line in lines)

    def node_with(self, process: str) -> int | None:
        """A node other than the head on which a process of this name runs."""
        for file in sorted(Path(self._environment["FOLDER"]).glob("node-*.pid")):
            members = subprocess.run(
                ["ps", "-o", "args=", "-s", file.read_text().strip()], capture_output=True, text=True
            ).stdout
            number = int(file.stem.removeprefix("node-"))
            if number > 1 and process in members:
                return number
        return None

    def files_with(self, text: str) -> list[str]:
        found = subprocess.run(["grep", "-rlF", text, self._environment["FOLDER"]], capture_output=True, text=True)
        return found.stdout.splitlines()


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[LocalCluster]:
    with tempfile.TemporaryDirectory(prefix="dpo-", dir="/tmp") as folder:
        cluster = LocalCluster(Path(folder))
        cluster("start", "3")
        try:
            yield cluster
        finally:
            cluster("stop")


@pytest.fixture(scope="module")
def environment(local_cluster: LocalCluster) -> Environment:
    return local_cluster.environment()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a person stands: a recipe with relative paths, pairs, a search space, a function that labels."""
    folder = tmp_path_factory.mktemp("submit")
    pairs = [
        {"prompt": f"Question {i}: ", "chosen": f"Yes, {i} it is.", "rejected": "No." * (1 + i % 3)} for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree = {
        "name": "small",
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": "pairs.jsonl"}], "max_tokens": 64, "eval": {"num_pairs": 8}},
        "batch": {"pairs_per_step": 4, "tokens_per_device": 512},
        "optim": {"learning_rate": 1.0e-3},
        "train": {"log_every_steps": 1, "max_steps": 3},
        "engine": {"precision": "fp32", "zero_stage": 1},
        "eval": {"every_steps": 3},
        "early_stopping": None,
        "tracking": {"kind": "none"},
        "acquire": {"labels_per_round": 8, "budget": 8},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    (folder / "one.yaml").write_text("loss.beta: [0.2]\n")
    (folder / "taste.py").write_text(
        "import os\n\ndef shorter(prompt, response):\n    return -len(response) * float(os.environ['TASTE_KEY'])\n"
    )
    return folder


def dpo_ray(environment: Environment, folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def attempts(environment: Environment, folder: Path) -> dict[str, dict[str, Any]]:
    """What `dpo-ray jobs list` says, by id."""
    return {job["id"]: job for job in json.loads(dpo_ray(environment, folder, "jobs", "list", "--json").stdout)}


def started(environment: Environment, folder: Path, *words: str) -> str:
    """The id of a job that was submitted and left alone."""
    told = dpo_ray(environment, folder, "submit", "--detach", "--json", *words).stdout
    return str(json.loads(told)["id"])


def wait_for(text: str, environment: Environment, folder: Path, job: str) -> str:
    """The log of a job as soon as it says something."""
    until = time.monotonic() + 280
    while text not in (log := dpo_ray(environment, folder, "jobs", "logs", job).stdout):
        assert time.monotonic() < until, log
        time.sleep(0.5)
    return log


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has taken a step, by its own file: a log comes seconds later, when a short run may be over."""
    until = time.monotonic() + 280
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < until, f"{run} does not come to step {step}"
        time.sleep(0.05)


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not any(word in key for word in TIMES)}


def test_a_job_gives_the_numbers_of_a_run_here_and_is_not_run_twice(
    environment: Environment, folder: Path, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = dpo_ray(environment, folder, "submit", "--json", "--", "train", "small.yaml")
    told = json.loads(done.stdout)
    assert (told["status"], told["exit_code"]) == ("SUCCEEDED", 0)
    assert "step 3: loss" in done.stderr
    monkeypatch.chdir(folder)
    here = fit(load_run(folder / "small.yaml", {"storage.path": str(tmp_path)})).summary
    assert numbers(told["result"]) == numbers(here)
    assert told["result"]["eval"]["loss"] != pytest.approx(0.6931, abs=1e-4)

    again = dpo_ray(environment, folder, "submit", "--", "train", "small.yaml", "--resume")
    assert "is there already: succeeded" in again.stderr
    assert "step 3: loss" in again.stderr
    assert list(attempts(environment, folder)) == [told["id"]]


def test_what_is_wrong_on_the_cluster_ends_as_the_command_does(environment: Environment, folder: Path):
    words = ("submit", "--", "train", "small.yaml", "name=empty", "data.sources.0.path=none.jsonl")
    done = dpo_ray(environment, folder, *words, code=2)
    assert "error: no data at" in done.stderr
    assert "failed with exit code 2" in done.stderr
    job = next(job for job in attempts(environment, folder).values() if "empty" in job["id"])
    assert (job["status"], job["exit_code"]) == ("FAILED", 2)
    again = dpo_ray(environment, folder, *words, code=2)  # the next attempt
    assert f"submitted {job['id']}-2" in again.stderr
    assert "--resume" in attempts(environment, folder)[f"{job['id']}-2"]["line"]


def test_a_sweep_as_a_job(environment: Environment, folder: Path):
    words = ("sweep", "small.yaml", "--space", "one.yaml", "--scheduler", "none")
    told = json.loads(dpo_ray(environment, folder, "submit", "--json", "--", *words).stdout)
    assert (told["result"]["status"], len(told["result"]["trials"])) == ("completed", 1)
    assert (folder / "runs/small-one/report.html").exists()


def test_an_acquisition_as_a_job_with_a_function_and_a_secret_that_reach_its_workers(
    environment: Environment, folder: Path, local_cluster: LocalCluster
):
    """Two seeds are two actors: both the module beside the recipe and the secret have to reach them."""
    oracle = ("acquire.oracle.kind=function", "acquire.oracle.function=taste:shorter")
    words = ("acquire", "small.yaml", *oracle, "--seeds", "2", "name=asked", "train.max_steps=1", "eval.every_steps=1")
    secret = "1.00000004711"
    done = dpo_ray(
        environment | {"TASTE_KEY": secret}, folder, "submit", "--json", "--secret", "TASTE_KEY", "--", *words
    )
    result = json.loads(done.stdout)["result"]
    assert result["status"] == "completed"
    assert [arm["rounds"][-1]["asked"] for arm in result["arms"]] == [8, 8]
    places = local_cluster.files_with(secret)
    assert places
    assert all(place.endswith(".dpo-ray/secrets.json") for place in places), places
    assert secret not in done.stdout + done.stderr
    assert secret not in dpo_ray(environment, folder, "jobs", "list", "--json").stdout


def test_a_score_as_a_job(environment: Environment, folder: Path):
    told = json.loads(
        dpo_ray(environment, folder, "submit", "--json", "--", "score", "small.yaml", "name=ranked").stdout
    )
    assert told["result"]["scored"] == 40 - 8
    assert (folder / "runs/ranked/scores.parquet").exists()


def test_a_service_as_a_job_answers_and_is_drained_when_it_is_stopped(
    environment: Environment, folder: Path, tiny_model: Path
):
    secret = "a-key-of-more-than-sixteen-characters"
    port = 20000 + os.getpid() % 20000
    words = ("serve", str(tiny_model), "--name", "tiny", "--preferences", "none", "--port", str(port))
    more = environment | {"DPO_RAY_API_KEY": secret}
    job = started(more, folder, "--secret", "DPO_RAY_API_KEY", "--", *words)
    wait_for("serving tiny", environment, folder, job)
    ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {secret}"})
    with urllib.request.urlopen(ask, timeout=30) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["tiny"]
    assert "stopped" in dpo_ray(environment, folder, "jobs", "stop", job).stderr
    assert "finishing what is under way" in dpo_ray(environment, folder, "jobs", "logs", job).stdout
    assert dpo_ray(environment, folder, "jobs", "logs", "--follow", job, code=130).stderr.count("serving tiny") == 1


def test_a_job_that_was_stopped_has_saved_and_goes_on(environment: Environment, folder: Path):
    longer = 20 * STEPS  # than it takes to start the command that stops it
    words = ("--", "train", "small.yaml", "name=long", f"train.max_steps={longer}", f"eval.every_steps={longer}")
    job = started(environment, folder, *words)
    wait_for("step 3:", environment, folder, job)
    dpo_ray(environment, folder, "jobs", "stop", job)
    summary = json.loads((folder / "runs/long/summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert 3 <= summary["steps"] < longer
    told = json.loads(dpo_ray(environment, folder, "submit", "--json", *words).stdout)
    assert told["id"] == f"{job}-2"
    result = told["result"]
    assert (result["status"], result["steps"], result["resumed_from_step"]) == ("completed", longer, summary["steps"])


def test_ctrl_c_leaves_the_job_alone_and_a_lost_node_does_not_end_it(
    environment: Environment, folder: Path, local_cluster: LocalCluster
):
    longer = 20 * STEPS  # than it takes to kill a node
    words = ("train", "small.yaml", "name=lost", f"train.max_steps={longer}", f"eval.every_steps={longer}")
    process = subprocess.Popen(
        [*COMMAND, "submit", "--", *words, f"checkpoint.every_steps={STEPS}", "cluster.num_workers=2"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("training "):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, told
    assert "goes on. Follow it: dpo-ray jobs logs --follow train-lost-" in told
    job = told.partition("submitted ")[2].split()[0]

    wait_for_step(folder / "runs/lost", 3)
    node = local_cluster.node_with("RayTrainWorker")
    assert node is not None
    local_cluster("kill-node", str(node))
    done = dpo_ray(environment, folder, "jobs", "logs", "--follow", job)
    assert f"step {longer}: loss" in done.stderr
    assert "worker" in done.stderr.partition("died")[0].splitlines()[-1] or "lost the connection" in done.stderr
    summary = json.loads((folder / "runs/lost/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", longer)
    assert summary["restarts"] >= 1


def test_a_wrong_token_is_refused_in_one_line(environment: Environment, folder: Path, tmp_path: Path):
    (tmp_path / "token").write_text("wrong" * 8)
    for changes in (
        {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")},
        {"RAY_AUTH_MODE": "disabled"},
    ):
        for words in (("submit", "--", "train", "small.yaml"), ("jobs", "list")):
            done = dpo_ray(environment | changes, folder, *words, code=2)
            (line,) = done.stderr.strip().splitlines()
            assert line.startswith(f"error: {environment['RAY_ADDRESS']} refuses us")
            assert "RAY_AUTH_TOKEN_PATH" in line


def test_the_address_for_jobs_is_none_to_join(environment: Environment, folder: Path):
    done = dpo_ray(environment, folder, "train", "small.yaml", "name=direct", code=2)
    assert "is the address of a dashboard, as `dpo-ray submit` takes it" in done.stderr.splitlines()[-1]
