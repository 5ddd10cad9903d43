"""`dpo-ray doctor --address` on a real cluster with faults planted: each has to be found, at the node where it is.

The head is well. One worker is ill in every way that a machine can be: it has mounts of its own (`unshare`), another
environment and other limits. A second worker's raylet is stopped. Clocks of one machine cannot differ, and there is no
second GPU: `tests/unit/test_doctor.py` has those, from facts.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import dpo_ray

pytestmark = pytest.mark.ray

COMMAND = [sys.executable, "-c", "from dpo_ray.cli import main; main()"]
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
HEAD, ILL, STUCK = "127.0.0.61", "127.0.0.62", "127.0.0.63"
PATIENCE_S = 20

FAULTS = {
    "wrong version of a package": (ILL, "versions", "fail", r"transformers is 4\.0\.1, the driver's is \d"),
    "another dpo-ray": (ILL, "versions", "fail", r"dpo-ray is 0\.0\.1"),
    "storage is another folder": (ILL, "storage", "fail", "a folder of its own, not the driver's"),
    "tiny /dev/shm": (ILL, "shared memory", "fail", r"0\.062 GiB"),
    "no compiler": (ILL, "g++", "fail", "not found"),
    "no interface for gloo": (ILL, "gloo", "fail", "wrong0"),
    "object store too small": (ILL, "object store", "warn", r"0\.075 GiB"),
    "too few open files": (ILL, "open files", "fail", "at most 512"),
    "GPU that is not there": (ILL, "gpu count", "fail", "Ray counts 1, torch can use 0"),
    "full disk": (ILL, "disk of ray", "fail", r"of 0\.098 GiB free"),
    "token that everyone reads": (ILL, "token file", "warn", "0644"),
    "stopped raylet": (STUCK, "nodes", "fail", "does not answer: no answer within 20 s"),
    "MLflow down": ("driver", "mlflow", "fail", "Connection refused"),
    "MLflow down, seen by a node": (HEAD, "mlflow", "warn", "ConnectionRefusedError"),
    "no token": ("cluster", "token", "warn", r"off: anyone who reaches 127\.0\.0\.61"),
}


@pytest.fixture(scope="module")
def found() -> Iterator[list[dict[str, Any]]]:
    """The findings of one visit to the cluster."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here: the faults cannot be planted")
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as name:
        folder = Path(name)
        environment = {**os.environ, "RAY_TMPDIR": f"{name}/ray", "PYTHONPATH": str(Path(__file__).parents[2])}
        (folder / "storage").mkdir()
        (folder / "ray").mkdir()
        gcs, client, agent, closed = free_ports(4)
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            head = ["start", "--head", "--port", str(gcs), "--node-ip-address", HEAD, "--num-cpus", "1", "--block"]
            head += ["--object-store-memory", "1200000000", "--include-dashboard", "false", "--disable-usage-stats"]
            head += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
            nodes.append(started([*RAY, *head, "--temp-dir", f"{name}/ray"], folder / "head.log", environment))
            wait_for(folder / "head.log", nodes[0])
            joins = ["start", "--address", f"{HEAD}:{gcs}", "--num-cpus", "1", "--block", "--node-ip-address"]
            ill = [*RAY, *joins, ILL, "--num-gpus", "1", "--object-store-memory", "80000000"]
            stuck = [*RAY, *joins, STUCK, "--num-gpus", "0", "--object-store-memory", "80000000"]
            nodes.append(started(in_a_bad_way(folder, ill), folder / "ill.log", environment))
            nodes.append(started(stuck, folder / "stuck.log", environment))
            wait_for(folder / "ill.log", nodes[1])
            wait_for(folder / "stuck.log", nodes[2])
            raylet = next(p for p in family(nodes[2]) if p.name() == "raylet")
            raylet.send_signal(signal.SIGSTOP)
            doctor = ["doctor", "--address", f"{HEAD}:{gcs}", "--patience", str(PATIENCE_S)]
            doctor += ["--storage", f"{name}/storage", "--json"]
            done = subprocess.run(
                [*COMMAND, *doctor],
                env={**environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{closed}"},
                cwd=folder,  # nodes look for modules in the driver's folder first
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 3, done.stderr
            assert not list((folder / "storage").iterdir())
            yield json.loads(done.stdout)
        finally:
            for node in nodes:
                for process in family(node):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                node.wait()


def free_ports(number: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def in_a_bad_way(folder: Path, command: list[str]) -> list[str]:
    """The command on a machine where much is wrong."""
    plant = folder / "plant" / "transformers-4.0.1.dist-info"
    plant.mkdir(parents=True)
    (plant / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.1\n")
    package = Path(dpo_ray.__file__).parent
    shutil.copytree(package, folder / "plant/dpo_ray", ignore=shutil.ignore_patterns("machine.py", "cluster_facts.py"))
    (folder / "plant/dpo_ray/__init__.py").write_text('__version__ = "0.0.1"\n')  # which knows nothing of all this
    token = folder / "token"
    token.write_text("of-the-tests\n")
    token.chmod(0o644)
    script = f"""
        set -e
        mount -t tmpfs -o size=64m tmpfs /dev/shm
        mount -t tmpfs -o size=100m tmpfs {folder}/ray
        mount -t tmpfs tmpfs {folder}/storage
        ulimit -n 512
        export PATH=/nowhere PYTHONPATH={folder}/plant:$PYTHONPATH
        export GLOO_SOCKET_IFNAME=wrong0 RAY_AUTH_TOKEN_PATH={token}
        exec "$@"
    """
    return ["unshare", "-rm", "/bin/bash", "-c", script, "bash", *command]


def started(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def wait_for(log: Path, node: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > until:
            pytest.fail(log.read_text()[-3000:])
        time.sleep(0.2)


def family(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        leader = psutil.Process(node.pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_is_and_has_its_fix(found: list[dict[str, Any]], fault: str):
    where, name, state, told = FAULTS[fault]
    here = [f for f in found if f["name"] == name and where in f["where"] and f["state"] != "ok"]
    [finding] = [f for f in here if re.search(told, f["found"])]
    assert finding["state"] == state
    assert finding["fix"]


def test_what_is_well_is_not_blamed(found: list[dict[str, Any]]):
    blamed = {f["name"] for f in found if f["state"] == "fail" and (HEAD in f["where"] or "driver" in f["where"])}
    assert blamed == {"mlflow"}
    assert any(f["name"] == "nodes" and f["found"] == "2 of 3 nodes answer" for f in found)
    assert any(f["name"] == "gloo" and f["state"] == "ok" and f["where"] == [HEAD] for f in found)
