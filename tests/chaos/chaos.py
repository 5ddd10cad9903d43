"""Seeded chaos: kill a part of a small real run at a random moment, let it come back, compare the final weights.

`python tests/chaos/chaos.py --runs 20` writes the table `benchmarks/results/chaos.md`; `make chaos RUNS=20` calls it.
The cluster is one head (driver and controller live there) and two raylets of one CPU on loopback addresses of their
own, so that Ray takes them for two machines.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent.parent
STEPS, CHECKPOINT_EVERY = 30, 5
VICTIMS = (
    *("worker", "node", "driver", "scorer", "preempted node", "head", "stuck worker"),
    *("node for good", "node for a while"),
)
ELASTIC = ("node for good", "node for a while")
"""Of these the run goes on with one worker; of the second it grows again, and has more steps to do so in."""
NOTICE_S = 6.0
COMMAND = [sys.executable, "-c", "from dpo_ray.cli import main; main()"]
PATIENCE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run of chaos: what was killed when, and what it cost."""

    seed: int
    zero_stage: int
    victim: str
    killed_at: str
    status: str
    restarts: int
    lost_steps: int
    recovery_seconds: float | None
    """From the kill to the first step after it; of a scorer, none."""
    loss_difference: float
    """Largest difference of a step's loss to the uninterrupted run's."""
    is_identical: bool
    """The final weights are the uninterrupted run's, bit for bit."""

    @property
    def is_good(self) -> bool:
        """With fewer workers sums are taken in another order, so there the losses must agree, not the bits."""
        is_same = self.loss_difference <= 1e-4 if self.victim in ELASTIC else self.is_identical
        return self.status == "completed" and is_same


class Nodes:
    """A head and two raylets of one CPU each. Use it from the main thread only: Ray installs a signal handler."""

    def __init__(self) -> None:
        self._arguments = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
        self._next = 2
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._cluster.add_node(num_cpus=0, **self._arguments)
        self.workers = [self.add(), self.add()]

    def replace_all(self) -> None:
        """The head goes, and with it the cluster; a new one takes its place."""
        self._cluster.shutdown()
        self._start()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        """One more machine, with an address that no other had."""
        self._next += 1
        return self._cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{self._next}", **self._arguments)

    def lose(self, number: int) -> None:
        """A machine goes away without a word."""
        self._cluster.remove_node(self.workers.pop(number), allow_graceful=False)

    def take_away(self, number: int, seconds: float) -> None:
        """A machine goes away after a notice, as a spot instance does; another comes in time."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        deadline = time.time() + seconds
        accepted, refusal = GcsClient(address=self.address).drain_node(
            self.workers[number].node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot instance reclaimed",
            int(deadline * 1000),
        )
        if not accepted:
            raise RuntimeError(f"Ray refused the notice: {refusal}")
        self.workers.append(self.add())
        time.sleep(max(0.0, deadline - time.time()))
        self.lose(number)

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray workers of these nodes by the title that Ray gives them."""
        found = []
        for node in [self._cluster.head_node, *self.workers]:
            for info in node.all_processes["raylet"]:
                for process in psutil.Process(info.process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{title}"):
                            found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def stop(self) -> None:
        self._cluster.shutdown()


@contextmanager
def cluster() -> Iterator[Nodes]:
    """Two nodes in a Ray of their own; other Rays on the machine are not touched."""
    temporary = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(temporary)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.stop()
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(temporary, ignore_errors=True)


def recipe(shared: Path, storage: Path, name: str, zero_stage: int, **overrides: Any) -> dict[str, Any]:
    """30 steps of 16 HH-RLHF pairs on the 260k-parameter model, a checkpoint every 5."""
    tree: dict[str, Any] = {
        "name": name,
        "storage": {"path": str(storage)},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz")}],
            "max_tokens": 200,
            "num_pairs": 160,
            "eval": {"num_pairs": 16},
        },
        "batch": {"pairs_per_step": 16, "tokens_per_device": 4096},
        "optim": {"learning_rate": 3e-4},
        "train": {"log_every_steps": 1, "max_steps": STEPS},
        "engine": {"precision": "fp32", "zero_stage": zero_stage},
        "eval": {"every_steps": 10},
        "early_stopping": None,
        "checkpoint": {"every_steps": CHECKPOINT_EVERY},
        "cluster": {"num_workers": 2, "cpus_per_worker": 1, "wait_minutes": 4},
        "tracking": {"kind": "none"},
    }
    for section, values in overrides.items():
        tree[section] = tree.get(section, {}) | values
    return tree


class Run:
    """`dpo-ray train` in a process of its own, and what it has written."""

    def __init__(self, tree: dict[str, Any], address: str) -> None:
        self.folder = Path(tree["storage"]["path"]) / tree["name"]
        self._recipe, self._address = self.folder.with_suffix(".yaml"), address
        self._recipe.parent.mkdir(parents=True, exist_ok=True)
        self._recipe.write_text(yaml.safe_dump(tree))
        self.process = self._start()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        with self._recipe.with_suffix(".log").open("ab") as log:
            command = [*COMMAND, "train", str(self._recipe), "--address", self._address, *options]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")

    def resume(self, address: str) -> None:
        self._address = address
        self.process = self._start("--resume")

    def lines(self) -> list[dict[str, Any]]:
        return _json_lines(self.folder / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in _json_lines(self.folder / "attempts.jsonl") if event["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines() if "loss" in line}

    def summary(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return result

    def step(self) -> int:
        return max(self.losses(), default=0)

    def wait_until(self, is_so: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.folder.name}: {what} did not come; see {self._recipe.with_suffix('.log')}")
            time.sleep(0.01)

    def finish(self) -> dict[str, Any]:
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.summary()

    def weights(self) -> str:
        """Hash of the last checkpoint's weights."""
        steps = sorted((self.folder / "checkpoints").glob("step-*"))
        return hashlib.sha256((steps[-1] / "model/model.safetensors").read_bytes()).hexdigest()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def strike(run: Run, nodes: Nodes, victim: str, chance: random.Random) -> str:
    """Kill the victim at a random moment; when that was, in words."""
    if victim == "scorer":
        run.wait_until(lambda: nodes.processes("MapWorker"), "a scoring actor")
        time.sleep(chance.uniform(0, 3))
        scorers = nodes.processes("MapWorker")
        if scorers:
            scorers[chance.randrange(len(scorers))].kill()
        return "reference pass" if scorers else "after the reference pass"
    # A notice takes a second or two to be seen, so it comes early enough to find the run still at work.
    at = chance.randrange(1, STEPS // 3 if victim == "preempted node" else STEPS - 1)
    run.wait_until(lambda: run.step() >= at, f"step {at}")
    time.sleep(chance.uniform(0, 0.1))
    reached = run.step()
    if victim == "stuck worker":
        with suppress(psutil.NoSuchProcess):
            chance.choice(nodes.processes("RayTrainWorker")).suspend()
    elif victim == "worker":
        workers = nodes.processes("RayTrainWorker")
        if workers:
            with suppress(psutil.NoSuchProcess):
                workers[chance.randrange(len(workers))].kill()
    elif victim == "node":
        nodes.lose(chance.randrange(len(nodes.workers)))
        nodes.workers.append(nodes.add())
    elif victim == "preempted node":
        nodes.take_away(chance.randrange(len(nodes.workers)), NOTICE_S)
    elif victim in ELASTIC:
        nodes.lose(chance.randrange(len(nodes.workers)))
        if victim == "node for a while":
            run.wait_until(lambda: [event["world_size"] for event in run.events("start")][-1:] == [1], "one worker")
            run.wait_until(lambda: run.step() > reached + 2, "a step of one worker")
            nodes.workers.append(nodes.add())
            run.wait_until(lambda: [event["world_size"] for event in run.events("start")][-1:] == [2], "two workers")
    elif victim in ("driver", "head"):
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        if victim == "head":
            nodes.replace_all()
        run.resume(nodes.address)
    return f"step {reached}"


def steps_of(victim: str) -> int:
    return 10 * STEPS if victim == "node for a while" else STEPS


def one(seed: int, zero_stage: int, victim: str, nodes: Nodes, storage: Path, shared: Path, calm: Run) -> Outcome:
    """A run with one blow, against the uninterrupted `calm`."""
    chance = random.Random(seed)
    own: dict[str, dict[str, dict[str, Any]]] = {
        "scorer": {"reference": {"store": str(storage / f"reference-{seed}")}},  # else there is nothing to score
        "stuck worker": {"cluster": {"hang_minutes": 0.75}},
        "node for good": {"cluster": {"min_workers": 1}},
        "node for a while": {
            "cluster": {"min_workers": 1, "resize_seconds": 2},
            "train": {"max_steps": steps_of(victim)},
        },
    }
    name = f"chaos-{seed}-{victim.replace(' ', '-')}-zero{zero_stage}"
    run = Run(recipe(shared, storage, name, zero_stage, **own.get(victim, {})), nodes.address)
    try:
        killed_at = strike(run, nodes, victim, chance)
        struck = time.time()
        summary = run.finish()
    finally:
        if run.process.poll() is None:
            run.process.kill()
        while len(nodes.workers) < 2:
            nodes.workers.append(nodes.add())
    again = [event["time"] for event in run.events("start") if event["time"] > struck]
    calm_losses, losses = calm.losses(), run.losses()
    return Outcome(
        seed=seed,
        zero_stage=zero_stage,
        victim=victim,
        killed_at=killed_at,
        status=summary["status"],
        restarts=summary.get("restarts", -1),
        lost_steps=summary.get("lost_steps", -1),
        recovery_seconds=round(again[0] - struck, 1) if again and victim != "scorer" else None,
        loss_difference=max(abs(losses.get(step, float("inf")) - loss) for step, loss in calm_losses.items()),
        is_identical=run.weights() == calm.weights(),
    )


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    head = ("seed", "ZeRO", "killed", "at", "status", "restarts", "lost steps", "recovery (s)", "same weights")
    rows = [
        (
            o.seed,
            o.zero_stage,
            o.victim,
            o.killed_at,
            o.status,
            o.restarts,
            o.lost_steps,
            "" if o.recovery_seconds is None else f"{o.recovery_seconds:.0f}",
            "bit for bit" if o.is_identical else f"losses within {o.loss_difference:.1e}",
        )
        for o in outcomes
    ]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def write(outcomes: list[Outcome], folder: Path) -> None:
    """`chaos.json` and `chaos.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    (folder / "chaos.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "chaos.md").write_text(
        f"# Chaos\n\n{STEPS} steps on two nodes, a checkpoint every {CHECKPOINT_EVERY}; one blow a run, at a random "
        "moment: SIGKILL, for `stuck worker` SIGSTOP, for `preempted node` a notice of "
        f"{NOTICE_S:g} s. `make chaos`.\n\n" + table(outcomes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--victim", choices=VICTIMS, help="always this one")
    options = parser.parse_args()
    shared = Path(os.environ.get("DPO_RAY_SHARED") or ROOT.parent / "shared")
    storage = Path(tempfile.mkdtemp(prefix="chaos-runs-"))
    outcomes: list[Outcome] = []
    with cluster() as nodes:
        calm: dict[tuple[int, int], Run] = {}
        for seed in range(options.first_seed, options.first_seed + options.runs):
            stage, victim = (2, 3)[seed % 2], options.victim or VICTIMS[seed // 2 % len(VICTIMS)]
            kind = stage, steps_of(victim)
            if kind not in calm:
                steps = {"train": {"max_steps": kind[1]}}
                calm[kind] = Run(recipe(shared, storage, f"calm-{kind[1]}-zero{stage}", stage, **steps), nodes.address)
                print(f"uninterrupted, ZeRO {stage}: {calm[kind].finish()['status']}", flush=True)
            outcomes.append(one(seed, stage, victim, nodes, storage, shared, calm[kind]))
            print(outcomes[-1], flush=True)
            write(outcomes, options.output)
    bad = [o for o in outcomes if not o.is_good]
    shutil.rmtree(storage, ignore_errors=True) if not bad else print(f"runs are kept in {storage}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
