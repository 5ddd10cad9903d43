"""Ask every node of the cluster that this process is connected to: facts for `doctor`.

One actor on each node, which takes no CPU, runs the functions of `machine`. Every wait has an end, so a node that is
dead or stuck is a fact and not a hang.
"""

import dataclasses
import statistics
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray import machine
from dpo_ray.doctor import Cluster, Facts, Machine, Node
from dpo_ray.reach import asks_for_token
from dpo_ray.storage import Folder

PATIENCE_S = 60.0
"""A node has so long to start a process and to import torch."""

COLLECTIVE_S = 20.0
"""An all-reduce has so long; over nodes that reach each other it takes a fraction of a second."""

SMALL_S = 10.0
"""So long has what takes milliseconds on a node that is well."""

UNEXPECTED_TERMINATION = 2
"""Of Ray's reasons why a node is gone; the others were wanted."""


class Agent:
    """Runs functions on a node. It does not know them beforehand: they come by value."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Failure(NamedTuple):
    """What came instead of an answer."""

    told: str


def ask_cluster(facts: Facts, dashboard: str | None, patience_s: float = PATIENCE_S) -> Facts:
    """The facts with those of the cluster.

    Args:
        facts: What the driver found by itself: what it looked at, the nodes look at too.
        dashboard: Address of the cluster's dashboard.
    """
    gcs = str(ray.get_runtime_context().gcs_address)
    known = ray.nodes()
    alive = {node["NodeID"]: node for node in known if node["Alive"]}
    addresses = {node["NodeManagerAddress"] for node in alive.values()}
    lost = [n["NodeManagerAddress"] for n in known if not n["Alive"] and n["DeathReason"] == UNEXPECTED_TERMINATION]
    with _by_value():
        nodes = _ask_nodes(alive, facts, patience_s)
    return dataclasses.replace(
        facts,
        cluster=Cluster(
            address=gcs,
            asks_for_token=asks_for_token(gcs),
            dashboard=dashboard,
            dashboard_is_open=_is_open(dashboard),
            nodes=nodes,
            lost=sorted(set(lost) - addresses),
        ),
    )


def _ask_nodes(alive: Mapping[str, Mapping[str, Any]], facts: Facts, patience_s: float) -> list[Node]:
    agents = {key: _agent(key) for key in alive}
    try:
        described = _answers(
            {
                key: agent.call.remote(machine.describe, _places(alive[key], facts.storage))
                for key, agent in agents.items()
            },
            patience_s,
        )
        well = {key: agents[key] for key, told in described.items() if not isinstance(told, Failure)}
        machines = {key: Machine(**described[key]) for key in well}
        hosts = {key: str(alive[key]["NodeManagerAddress"]) for key in alive}
        skews = {key: _skew(agent) for key, agent in well.items()}
        storage = _storage_problems(facts, well)
        mlflow = _mlflow_problems(facts, well)
        gloo = _failures(_every(well, SMALL_S, machine.opens_gloo))
        ranks = [(key, agent, None) for key, agent in well.items() if key not in gloo]
        gloo |= _all_reduce(ranks, hosts)
        on_gpus = [(key, well[key], 0) for key in well if machines[key].gpus]
        more = [(key, _agent(key), gpu) for key in well for gpu in range(1, len(machines[key].gpus))]
        agents |= {f"{key} {gpu}": agent for key, agent, gpu in more}
        nccl = _all_reduce([*on_gpus, *more], hosts)
    finally:
        for agent in agents.values():
            ray.kill(agent)
    nodes = []
    for key in alive:
        silence = described[key]
        resources = alive[key]["Resources"]
        nodes.append(
            Node(
                address=hosts[key],
                ray_gpus=resources.get("GPU", 0.0),
                object_store=resources.get("object_store_memory", 0.0),
                machine=machines.get(key),
                silence=silence.told if isinstance(silence, Failure) else None,
                skew_s=skews.get(key),
                storage=storage.get(key),
                mlflow=mlflow.get(key),
                gloo=gloo.get(key),
                nccl=nccl.get(key),
            )
        )
    return sorted(nodes, key=lambda node: node.address)


def _agent(node_id: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_restarts=0)(Agent).options(scheduling_strategy=there).remote()


@contextmanager
def _by_value() -> Iterator[None]:
    """What is sent to nodes goes as code, not as a name of a module that may be another one there."""
    sent = (machine, sys.modules[__name__])
    for module in sent:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in sent:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _every(agents: Mapping[str, Any], seconds: float, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    return _answers({key: agent.call.remote(function, *args) for key, agent in agents.items()}, seconds)


def _answers(asked: Mapping[Any, Any], seconds: float) -> dict[Any, Any]:
    """What each answered, or a `Failure`."""
    if not asked:
        return {}
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    found: dict[Any, Any] = {}
    for key, reference in asked.items():
        if reference not in ready:
            found[key] = Failure(f"no answer within {seconds:.0f} s")
            continue
        try:
            found[key] = ray.get(reference, timeout=SMALL_S)
        except RayTaskError as error:
            found[key] = Failure(f"{type(error.cause).__name__}: {_line(error.cause)}")
        except RayError as error:
            found[key] = Failure(_line(error))
    return found


def _failures(answers: Mapping[str, Any]) -> dict[str, str]:
    return {key: answer.told for key, answer in answers.items() if isinstance(answer, Failure)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _places(node: Mapping[str, Any], storage: str | None) -> dict[str, str]:
    """Folders of a node whose disks count. Ray's own is where its sockets are: TEMP/session_.../sockets/raylet."""
    places = {"ray": str(Path(node["RayletSocketName"]).parent.parent.parent)}
    return places if storage is None or not Folder(storage).is_local else places | {"storage": storage}


def _skew(agent: Any) -> float | None:
    """A node's clock less ours: the median of some round trips, each taken at its middle."""
    found: list[float] = []
    for _ in range(5):
        before = time.time()
        there = _every({"": agent}, SMALL_S, machine.clock)[""]
        if isinstance(there, Failure):
            return None
        found.append(there - (before + time.time()) / 2)
    return statistics.median(found)


def _storage_problems(facts: Facts, agents: Mapping[str, Any]) -> dict[str, str]:
    """The driver writes a file, every node finds it and answers with another, the driver finds those."""
    if facts.storage is None or facts.storage_problem is not None:
        return {}
    folder, mark = Folder(facts.storage), uuid.uuid4().hex
    question, answers = f".doctor-{mark}", {key: f".doctor-{mark}-{key}" for key in agents}
    with machine.left_as_it_was(folder.path):
        try:
            folder.write(question, mark.encode())
            asked = {
                key: agent.call.remote(machine.answer_in_storage, folder.path, question, answers[key], mark.encode())
                for key, agent in agents.items()
            }
            found = _answers(asked, 3 * SMALL_S)
            problems = {
                key: told.told if isinstance(told, Failure) else told for key, told in found.items() if told is not None
            }
            for key in agents:
                if key not in problems and not folder.exists(answers[key]):
                    problems[key] = f"{folder.path}: a file that was written there is not seen here"
        finally:
            for name in (question, *answers.values()):
                folder.delete(name)
    return problems


def _mlflow_problems(facts: Facts, agents: Mapping[str, Any]) -> dict[str, str]:
    """Whether the tracking server can be reached from the nodes; a file is looked at by the driver alone."""
    server = None if facts.mlflow is None else machine.server_of(facts.mlflow)
    if server is None:
        return {}
    found = _failures(_every(agents, SMALL_S, machine.connects, *server))
    return {key: f"{server[0]}:{server[1]}: {told}" for key, told in found.items()}


def _all_reduce(ranks: Sequence[tuple[str, Any, int | None]], hosts: Mapping[str, str]) -> dict[str, str]:
    """An all-reduce over the ranks (node, agent, GPU or None): what failed on which node."""
    if not ranks:
        return {}
    first, leader, _ = ranks[0]
    port = _every({"": leader}, SMALL_S, machine.free_port, hosts[first])[""]
    if isinstance(port, Failure):
        return {first: port.told}
    asked = {
        (rank, key): agent.call.remote(machine.all_reduce, gpu, rank, len(ranks), hosts[first], port, COLLECTIVE_S)
        for rank, (key, agent, gpu) in enumerate(ranks)
    }
    found = _answers(asked, 2 * COLLECTIVE_S)
    return {key: told.told for (_, key), told in found.items() if isinstance(told, Failure)}


def _is_open(dashboard: str | None) -> bool | None:
    """Whether the job API answers those who have no token; None if nothing answers."""
    if not dashboard:
        return None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{dashboard}/api/jobs/", timeout=SMALL_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except OSError:
        return None
