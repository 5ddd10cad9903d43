"""Findings from facts, and facts of this machine. A real cluster with faults: `tests/integration/test_doctor.py`."""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import machine
from dpo_ray.cluster_facts import _is_open
from dpo_ray.config import parse_run
from dpo_ray.doctor import GIB, Cluster, Facts, Finding, Machine, Node, findings, is_healthy, look_here

VERSIONS = {"python": "3.12.1", "ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.0", "datasets": "5.2"}
WELL = Machine(
    versions=VERSIONS,
    cores=8,
    gpus=(),
    driver_gpus=0,
    driver=None,
    cuda=None,
    tools={"g++": "g++ 13", "ninja": "1.11"},
    shared_memory=16 * GIB,
    disks={"ray": {"path": "/tmp", "total": 500 * GIB, "free": 100 * GIB}},
    open_files=65536,
    memory={"total": 64 * GIB, "free": 32 * GIB},
    token_mode=0o600,
)
GPU = replace(WELL, gpus=("H100 80 GiB",), driver_gpus=1, driver="570.1", cuda="12.8")
NODE = Node("10.0.0.2", ray_gpus=0, object_store=8 * GIB, machine=WELL, skew_s=0.01)
OTHER = replace(NODE, address="10.0.0.3")


def cluster(*nodes: Node, **changes: Any) -> Facts:
    whole = Cluster("10.0.0.1:6379", True, "10.0.0.1:8265", False, nodes or (NODE, OTHER))
    return Facts(WELL, storage="/runs", cluster=replace(whole, **changes))


def bad(facts: Facts) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.state != "ok"]


def only(facts: Facts) -> Finding:
    [finding] = bad(facts)
    assert finding.fix
    return finding


def test_a_cluster_that_is_well_has_nothing_but_ok():
    assert bad(cluster()) == []
    assert bad(Facts(WELL)) == []


def test_what_is_the_same_in_several_places_is_one_finding():
    [found] = [f for f in findings(cluster()) if f.name == "open files"]
    assert found.where == ("driver", "10.0.0.2", "10.0.0.3")


@pytest.mark.parametrize(
    ("name", "state", "changes"),
    [
        ("python", "fail", {"versions": VERSIONS | {"python": "3.10.4"}}),
        ("torch", "fail", {"versions": VERSIONS | {"torch": None}}),
        ("gpu", "fail", {"driver_gpus": 8, "driver": "470.1", "cuda": "12.8"}),
        ("g++", "fail", {"tools": {"g++": None, "ninja": "1.11"}}),
        ("ninja", "fail", {"tools": {"g++": "g++ 13", "ninja": None}}),
        ("disk of ray", "warn", {"disks": {"ray": {"path": "/tmp", "total": 100 * GIB, "free": 9 * GIB}}}),
        ("disk of ray", "fail", {"disks": {"ray": {"path": "/tmp", "total": 900 * GIB, "free": 30 * GIB}}}),
        ("disk of storage", "fail", {"disks": {"storage": {"path": "/runs", "total": 99 * GIB, "free": GIB}}}),
        ("shared memory", "fail", {"shared_memory": 64 * 2**20}),
        ("memory", "warn", {"memory": {"total": 64 * GIB, "free": GIB}}),
        ("open files", "warn", {"open_files": 1024}),
        ("open files", "fail", {"open_files": 256}),
        ("token file", "warn", {"token_mode": 0o644}),
    ],
)
def test_what_is_wrong_with_a_machine(name: str, state: str, changes: dict[str, Any]):
    found = only(Facts(replace(WELL, **changes)))
    assert (found.name, found.state, found.where) == (name, state, ("driver",))


def test_a_compiler_is_needed_on_cpus_and_may_be_missing_beside_gpus():
    assert only(Facts(replace(GPU, tools={"g++": None}))).state == "warn"


@pytest.mark.parametrize(
    ("name", "state", "changes"),
    [
        ("nodes", "fail", {"machine": None, "silence": "no answer within 60 s"}),
        ("gpu count", "fail", {"ray_gpus": 1}),
        ("gpu count", "warn", {"machine": GPU}),
        ("object store", "warn", {"object_store": 80 * 2**20}),
        ("object store", "fail", {"object_store": 40 * GIB}),
        ("clock", "warn", {"skew_s": -2.0}),
        ("clock", "fail", {"skew_s": 90.0}),
        ("storage", "fail", {"storage": "/runs is no such folder"}),
        ("mlflow", "warn", {"mlflow": "ConnectionRefusedError"}),
        ("gloo", "fail", {"gloo": "timeout"}),
        ("nccl", "fail", {"machine": GPU, "ray_gpus": 1, "nccl": "unhandled system error"}),
        ("versions", "fail", {"machine": replace(WELL, versions=VERSIONS | {"torch": "2.12.0"})}),
        ("versions", "fail", {"machine": replace(WELL, versions=VERSIONS | {"python": "3.12.2"})}),
        ("versions", "warn", {"machine": replace(WELL, versions=VERSIONS | {"datasets": "4.0"})}),
        ("datasets", "fail", {"machine": replace(WELL, versions=VERSIONS | {"datasets": None})}),
    ],
)
def test_what_is_wrong_with_a_node_is_found_at_its_address(name: str, state: str, changes: dict[str, Any]):
    facts = replace(cluster(replace(NODE, **changes), OTHER), mlflow="http://tracking:5000")
    found = only(facts)
    assert (found.name, found.state, found.where) == (name, state, ("10.0.0.2",))
    assert is_healthy(findings(facts)) == (state == "warn")


def test_a_clock_says_which_way_it_is_off():
    assert only(cluster(replace(NODE, skew_s=90.0))).found == "90 s ahead of the driver's"
    assert only(cluster(replace(NODE, skew_s=-90.0))).found == "90 s behind the driver's"


def test_a_build_of_torch_for_another_device_is_the_same_version():
    assert bad(cluster(replace(NODE, machine=replace(WELL, versions=VERSIONS | {"torch": "2.13.0+cu128"})))) == []


def test_gpu_drivers_that_differ_are_told_of_the_cluster():
    nodes = [
        replace(NODE, ray_gpus=1, address=f"10.0.0.{n}", machine=replace(GPU, driver=driver))
        for n, driver in enumerate(("570.1", "580.2"))
    ]
    assert only(cluster(*nodes)).found == "GPU drivers differ between nodes: 570.1, 580.2"


def test_nodes_that_died_and_a_cluster_without_any():
    assert only(cluster(lost=["10.0.0.9"])).where == ("10.0.0.9",)
    silent = replace(NODE, machine=None, silence="gone")
    assert [f.where for f in bad(cluster(silent))] == [("cluster",), ("10.0.0.2",)]


@pytest.mark.parametrize(("address", "state"), [("10.0.0.1", "fail"), ("127.0.0.1", "warn"), ("[::1]", "warn")])
def test_a_cluster_that_asks_for_no_token_is_worse_on_the_network(address: str, state: str):
    facts = cluster(address=f"{address}:6379", asks_for_token=False)
    assert (only(facts).name, only(facts).state) == ("token", state)
    facts = cluster(dashboard=f"{address}:8265", dashboard_is_open=True)
    assert (only(facts).name, only(facts).state) == ("dashboard", state)


def test_storage_and_tracking_of_the_driver():
    found = only(replace(cluster(), storage_problem="cannot write /runs: Permission denied"))
    assert (found.name, found.where) == ("storage", ("driver",))
    found = only(Facts(WELL, mlflow="http://tracking:5000", mlflow_problem="nothing answers at tracking:5000"))
    assert (found.name, found.state) == ("mlflow", "fail")


def recipe(folder: Path, **tracking: Any) -> Any:
    tree = {
        "name": "a",
        "storage": {"path": str(folder)},
        "model": {"path": "m"},
        "data": {"sources": [{"path": "d.jsonl"}]},
    }
    return parse_run(tree | {"tracking": tracking}, {})


def test_looking_leaves_no_trace(tmp_path: Path):
    facts = look_here(recipe(tmp_path / "new/runs", kind="mlflow"))
    assert (facts.storage, facts.storage_problem, facts.mlflow_problem) == (str(tmp_path / "new/runs"), None, None)
    assert facts.mlflow == f"sqlite:///{tmp_path}/new/runs/mlflow.db"
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    problem = look_here(storage=str(tmp_path / "file/runs")).storage_problem
    assert problem is not None
    assert problem.startswith("cannot write")
    assert look_here(storage="nosuch://bucket/runs").storage_problem is not None


def test_a_tracking_server_that_is_down_is_told_at_once_without_its_password(tmp_path: Path):
    facts = look_here(recipe(tmp_path, kind="mlflow", uri="http://ada:secret@127.0.0.1:9"))
    assert facts.mlflow_problem == "nothing answers at 127.0.0.1:9: Connection refused"
    assert "secret" not in str(findings(facts))
    assert look_here(recipe(tmp_path, kind="none")).mlflow is None


def test_a_folder_in_which_something_has_appeared_stays(tmp_path: Path):
    with machine.left_as_it_was(str(tmp_path / "a/b/c")):
        (tmp_path / "a/b/c").mkdir(parents=True)
        (tmp_path / "a/other").write_text("x")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["a", "a/other"]


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("http://tracking", ("tracking", 80)),
        ("https://ada:x@tracking/mlflow", ("tracking", 443)),
        ("postgresql+psycopg://db:5433/mlflow", ("db", 5433)),
        ("sqlite:////runs/mlflow.db", None),
        ("databricks", None),
    ],
)
def test_the_server_of_a_uri(uri: str, server: tuple[str, int] | None):
    assert machine.server_of(uri) == server


def test_a_node_answers_only_in_the_folder_of_the_driver(tmp_path: Path):
    shared, own, missing = tmp_path / "shared", tmp_path / "own", tmp_path / "missing"
    shared.mkdir()
    own.mkdir()
    (shared / "q").write_bytes(b"mark")
    assert machine.answer_in_storage(str(shared), "q", "a", b"mark") is None
    assert (shared / "a").read_bytes() == b"mark"
    assert "reads differently" in str(machine.answer_in_storage(str(shared), "q", "b", b"other"))
    assert "of its own" in str(machine.answer_in_storage(str(own), "q", "a", b"mark", patience_s=0.0))
    assert "no such folder" in str(machine.answer_in_storage(str(missing), "q", "a", b"mark", patience_s=0.0))
    assert not list(own.iterdir())
    assert not missing.exists()


def test_an_all_reduce_of_one_and_one_whose_partner_never_comes():
    machine.opens_gloo()
    with pytest.raises(Exception, match=r"(?i)time"):
        machine.all_reduce(None, 0, 2, "127.0.0.1", machine.free_port("127.0.0.1"), 1.0)


@pytest.mark.parametrize(("status", "is_open"), [(200, True), (401, False), (403, False), (404, True)])
def test_a_dashboard_is_open_unless_it_asks_for_a_token(status: int, is_open: bool):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/api/jobs/" else 500)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert _is_open(f"127.0.0.1:{server.server_port}") is is_open
        thread.join()
    assert _is_open(f"127.0.0.1:{server.server_port}") is None
    assert _is_open(None) is None
