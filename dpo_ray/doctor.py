"""`dpo-ray doctor`: from facts about machines and a cluster to findings, each with its fix.

`findings` is pure; the facts are of this process (`look_here`) and of the nodes (`cluster_facts`).
"""

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_ray import machine
from dpo_ray.config import RunConfig
from dpo_ray.errors import InputError
from dpo_ray.storage import Folder, absolute, is_uri, redacted

State = Literal["ok", "warn", "fail"]
GIB = 2**30

SAME_EVERYWHERE = ("python", "ray", "torch", "deepspeed", "transformers", "dpo-ray")
"""Where these differ between nodes a run breaks or computes something else; other packages differ with a warning."""

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
"""Over a second, logs and metrics of several nodes come in the wrong order; signed requests and short-lived credentials
allow minutes (S3: 15), so a minute is where they begin to be at stake."""

SHARED_MEMORY_LEAST = GIB
"""Docker gives 64 MB, on which NCCL fails and Ray's object store moves to the disk."""

OBJECT_STORE_LEAST = GIB
"""Ray Data holds blocks of up to 128 MiB there, several for each of its actors."""

DISK_WARN, DISK_FAIL = 10 * GIB, 2 * GIB
OPEN_FILES_WARN, OPEN_FILES_FAIL = 8192, 1024
"""Ray asks for the first; raylets with many workers stop working at the second."""

MEMORY_WARN = 2 * GIB


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: State
    where: tuple[str, ...]
    """Addresses of nodes, or `driver`, or `cluster`."""
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """What `machine.describe` tells of the process it runs in."""

    versions: Mapping[str, str | None]
    """None: not installed."""
    cores: int
    gpus: Sequence[str]
    """That torch can use."""
    driver_gpus: int
    driver: str | None
    cuda: str | None
    """That torch was built for."""
    tools: Mapping[str, str | None]
    shared_memory: int | None
    disks: Mapping[str, Mapping[str, Any]]
    open_files: int
    memory: Mapping[str, int] | None
    token_mode: int | None


@dataclass(frozen=True)
class Node:
    """A node of the cluster, and what went on between it and the others."""

    address: str
    ray_gpus: float
    object_store: float
    """In bytes."""
    machine: Machine | None = None
    silence: str | None = None
    """Why there is no `machine`."""
    skew_s: float | None = None
    """Its clock less the driver's."""
    storage: str | None = None
    """What is wrong with the storage; None: nothing, or there is none to look at."""
    mlflow: str | None = None
    """Why the tracking server cannot be reached."""
    gloo: str | None = None
    """Why an all-reduce over the nodes failed."""
    nccl: str | None = None
    """Why an all-reduce over the GPUs failed."""


@dataclass(frozen=True)
class Cluster:
    address: str
    asks_for_token: bool | None
    dashboard: str | None
    dashboard_is_open: bool | None
    """Whether its job API answers without a token; None: it does not answer."""
    nodes: Sequence[Node]
    lost: Sequence[str] = ()
    """Addresses of nodes that have died and did not come back."""


@dataclass(frozen=True)
class Facts:
    driver: Machine
    storage: str | None = None
    """The path that was looked at."""
    storage_problem: str | None = None
    mlflow: str | None = None
    """The tracking store that was looked at, without its password."""
    mlflow_problem: str | None = None
    cluster: Cluster | None = None


def look_here(run: RunConfig | None = None, storage: str | None = None) -> Facts:
    """What this process sees by itself: the machine, the storage, the tracking store.

    Args:
        run: Its storage and tracking are looked at.
        storage: Looked at instead of the recipe's.
    """
    path = storage or (run.storage.path if run is not None else None)
    mlflow, problem = _try_tracking(run)
    near = "." if path is None or is_uri(path) else path
    return Facts(
        driver=Machine(**machine.describe({"ray": os.environ.get("RAY_TMPDIR", "/tmp"), "storage": near})),
        storage=None if path is None else absolute(path),
        storage_problem=None if path is None else _problem(lambda: _try_storage(absolute(path))),
        mlflow=mlflow,
        mlflow_problem=problem,
    )


def _try_storage(path: str) -> None:
    with machine.left_as_it_was(path):
        Folder(path).check_writable()


def _try_tracking(run: RunConfig | None) -> tuple[str | None, str | None]:
    """The tracking store that runs use, and what is wrong with it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if run.tracking.kind == "none" if run is not None else uri is None:
        return None, None
    from dpo_ray.tracking import check_store, tracking_uri

    uri = tracking_uri(run) if run is not None else uri or ""
    shown, server = redacted(uri), machine.server_of(uri)
    if server is not None:
        try:
            machine.connects(*server)  # MLflow itself would try for a minute
        except OSError as error:
            return shown, f"nothing answers at {server[0]}:{server[1]}: {error.strerror or error}"
    with machine.left_as_it_was(uri.removeprefix("sqlite:///").rpartition("/")[0]):
        return shown, _problem(lambda: check_store(uri))


def _problem(call: Callable[[], None]) -> str | None:
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def findings(facts: Facts) -> list[Finding]:
    """Everything that was looked at, of one kind together; what is the same in several places is one finding."""
    found = [
        *_nodes(facts),
        *_on_machines(facts, _python),
        *_versions(facts),
        *_on_machines(facts, _missing),
        *_on_machines(facts, _devices),
        *_gpus_by_ray(facts),
        *_collectives(facts),
        *_on_machines(facts, _compilers),
        *_storage(facts),
        *_on_machines(facts, _disks),
        *_on_machines(facts, _shared_memory),
        *_object_store(facts),
        *_on_machines(facts, _memory),
        *_on_machines(facts, _open_files),
        *_clocks(facts),
        *_mlflow(facts),
        *_access(facts),
        *_on_machines(facts, _token_file),
    ]
    return list(_together(found))


def is_healthy(found: Iterable[Finding]) -> bool:
    return all(finding.state != "fail" for finding in found)


def _together(found: Iterable[Finding]) -> Iterator[Finding]:
    by_text: dict[tuple[str, State, str, str], dict[str, None]] = {}
    for name, state, where, text, fix in found:
        by_text.setdefault((name, state, text, fix), {}).update(dict.fromkeys(where))
    for (name, state, text, fix), where_all in by_text.items():
        yield Finding(name, state, tuple(where_all), text, fix)


def _on_machines(facts: Facts, check: Any) -> Iterator[Finding]:
    """A check of one machine, on all of them."""
    machines = {"driver": facts.driver, **{node.address: node.machine for node in _answering(facts)}}
    for where, there in machines.items():
        for name, state, found, fix in check(there):
            yield Finding(name, state, (where,), found, fix)


Told = tuple[str, State, str, str]
"""Name, state, what was found, the fix."""


def _python(machine: Machine) -> Iterator[Told]:
    found = machine.versions["python"] or ""
    is_ok = (3, 11) <= tuple(map(int, found.split(".")[:2])) <= (3, 13)
    yield "python", "ok" if is_ok else "fail", found, "use Python 3.11, 3.12 or 3.13"


def _missing(machine: Machine) -> Iterator[Told]:
    for name, version in machine.versions.items():
        if version is None:
            yield name, "fail", "not installed", f"pip install {name}, at the version that the other nodes have"


def _devices(machine: Machine) -> Iterator[Told]:
    yield "cpu cores", "ok", str(machine.cores), ""
    if machine.driver_gpus and not machine.gpus:
        yield (
            "gpu",
            "fail",
            f"{machine.driver_gpus} with driver {machine.driver}, of which torch (CUDA {machine.cuda}) can use none",
            "install a torch built for CUDA, and a driver that is new enough for it; look at CUDA_VISIBLE_DEVICES",
        )
    elif machine.gpus:
        yield "gpu", "ok", f"{', '.join(machine.gpus)}; driver {machine.driver}, CUDA {machine.cuda}", ""
    else:
        yield "gpu", "ok", "none: training runs on the CPU, use engine.precision=fp32", ""


def _compilers(machine: Machine) -> Iterator[Told]:
    for name, told in machine.tools.items():
        fix = f"install {name}: DeepSpeed compiles an operation with it, on a CPU at its first step"
        bad: State = "warn" if machine.gpus else "fail"
        yield name, "ok" if told else bad, told or "not found", fix


def _disks(machine: Machine) -> Iterator[Told]:
    for use, disk in machine.disks.items():
        free, total = disk["free"], disk["total"]
        state: State = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
        if total and free < 0.05 * total and use == "ray":
            state = "fail"  # Ray spills nothing to a disk that is fuller than 95 %
        fix = "free some space" + (", or point RAY_TMPDIR elsewhere" if use == "ray" else ", or set storage.path")
        yield f"disk of {use}", state, f"{_size(free)} of {_size(total)} free at {disk['path']}", fix


def _shared_memory(machine: Machine) -> Iterator[Told]:
    if machine.shared_memory is not None:
        yield (
            "shared memory",
            "ok" if machine.shared_memory >= SHARED_MEMORY_LEAST else "fail",
            f"{_size(machine.shared_memory)} at /dev/shm",
            "give the container more: docker --shm-size, or a memory-backed emptyDir there, of 30 % of its memory",
        )


def _memory(machine: Machine) -> Iterator[Told]:
    if machine.memory is not None:
        free, total = machine.memory["free"], machine.memory["total"]
        fix = "end what else runs there: Ray kills workers when memory is nearly full"
        yield "memory", "ok" if free >= MEMORY_WARN else "warn", f"{_size(free)} of {_size(total)} free", fix


def _open_files(machine: Machine) -> Iterator[Told]:
    limit = machine.open_files
    state: State = "fail" if limit < OPEN_FILES_FAIL else "warn" if limit < OPEN_FILES_WARN else "ok"
    yield "open files", state, f"at most {limit}", "ulimit -n 65536 before `ray start` (limits.conf, LimitNOFILE)"


def _token_file(machine: Machine) -> Iterator[Told]:
    if machine.token_mode is not None:
        is_ok = not machine.token_mode & 0o077
        fix = "chmod 600: whoever reads it may run anything on the cluster"
        yield "token file", "ok" if is_ok else "warn", f"mode {machine.token_mode:04o}", fix


def _nodes(facts: Facts) -> Iterator[Finding]:
    cluster = facts.cluster
    if cluster is None:
        return
    answering = _answering(facts)
    found = f"{len(answering)} of {len(cluster.nodes)} nodes answer"
    if answering:
        yield Finding("nodes", "ok", ("cluster",), found)
    else:
        yield Finding("nodes", "fail", ("cluster",), found, "start nodes: ray start --address HEAD:6379")
    for node in cluster.nodes:
        if node.machine is None:
            fix = "look at its raylet.log; end its processes and start it again"
            yield Finding("nodes", "fail", (node.address,), f"does not answer: {node.silence}", fix)
    for address in cluster.lost:
        yield Finding(
            "nodes", "warn", (address,), "has died and not come back", "start it again, if it is still wanted"
        )


def _versions(facts: Facts) -> Iterator[Finding]:
    """The driver's, and what differs from them."""
    ours = facts.driver.versions
    for name, mine in ours.items():
        if name != "python" and mine is not None:
            yield Finding(name, "ok", ("driver",), mine)
    for node in _answering(facts):
        assert node.machine is not None
        # +cpu and +cu128 of torch are the same version; what is missing has its own finding
        pairs = [(name, ours.get(name), theirs) for name, theirs in node.machine.versions.items()]
        differing = [p for p in pairs if p[1] and p[2] and p[1].partition("+")[0] != p[2].partition("+")[0]]
        for name, mine, theirs in differing:
            state: State = "fail" if name in SAME_EVERYWHERE else "warn"
            fix = "use one image, or one constraints file, on all nodes"
            yield Finding("versions", state, (node.address,), f"{name} is {theirs}, the driver's is {mine}", fix)
        if not differing:
            yield Finding("versions", "ok", (node.address,), "as the driver's")
    drivers = {node.machine.driver for node in _answering(facts) if node.machine and node.machine.driver}
    if len(drivers) > 1:
        found = f"GPU drivers differ between nodes: {', '.join(sorted(drivers))}"
        yield Finding("versions", "warn", ("cluster",), found, "install one driver on all nodes")


def _gpus_by_ray(facts: Facts) -> Iterator[Finding]:
    for node in _answering(facts):
        assert node.machine is not None
        usable = len(node.machine.gpus)
        found = f"Ray counts {node.ray_gpus:g}, torch can use {usable}"
        if node.ray_gpus > usable:
            fix = "workers sent there find no GPU: leave out --num-gpus, or mend the driver"
            yield Finding("gpu count", "fail", (node.address,), found, fix)
        elif node.ray_gpus < usable:
            fix = "start this node without --num-gpus, and with its GPUs visible to `ray start`"
            yield Finding("gpu count", "warn", (node.address,), found, fix)
        else:
            yield Finding("gpu count", "ok", (node.address,), found)


def _collectives(facts: Facts) -> Iterator[Finding]:
    nodes = _answering(facts)
    fixes = {
        "gloo": "open all ports between the nodes, and set GLOO_SOCKET_IFNAME where a node has several interfaces",
        "nccl": "run it with NCCL_DEBUG=INFO; set NCCL_SOCKET_IFNAME, and look at /dev/shm and the GPUs' driver",
    }
    for name, fix in fixes.items():
        members = nodes if name == "gloo" else [node for node in nodes if node.machine and node.machine.gpus]
        bad = [node for node in members if getattr(node, name) is not None]
        for node in bad:
            yield Finding(name, "fail", (node.address,), str(getattr(node, name)), fix)
        good = tuple(node.address for node in members if node not in bad)
        if good:
            told = "nodes" if name == "gloo" else "nodes, all their GPUs"
            yield Finding(name, "ok", good, f"an all-reduce over {len(good)} {told}")


def _storage(facts: Facts) -> Iterator[Finding]:
    if facts.storage is None:
        return
    if facts.storage_problem is not None:
        fix = "give a place that can be written, by storage.path or --storage, or its credentials"
        yield Finding("storage", "fail", ("driver",), redacted(facts.storage_problem), fix)
        return
    good = f"{redacted(facts.storage)} can be written"
    yield Finding("storage", "ok", ("driver",), good)
    for node in _answering(facts):
        if node.storage is not None:
            fix = "mount one shared file system at this path on every node, or use a URI such as s3://bucket/runs"
            yield Finding("storage", "fail", (node.address,), redacted(node.storage), fix)
        else:
            yield Finding("storage", "ok", (node.address,), good)


def _object_store(facts: Facts) -> Iterator[Finding]:
    for node in _answering(facts):
        assert node.machine is not None
        found = f"{_size(node.object_store)}"
        shared = node.machine.shared_memory
        if node.object_store < OBJECT_STORE_LEAST:
            fix = "leave out --object-store-memory (Ray takes 30 % of the memory), or give it more"
            yield Finding("object store", "warn", (node.address,), found, fix)
        elif shared is not None and shared < node.object_store:
            fix = "enlarge /dev/shm, or set --object-store-memory: it lies on the disk now"
            yield Finding("object store", "fail", (node.address,), f"{found}, /dev/shm has {_size(shared)}", fix)
        else:
            yield Finding("object store", "ok", (node.address,), found)


def _clocks(facts: Facts) -> Iterator[Finding]:
    for node in _answering(facts):
        if node.skew_s is None:
            continue
        ahead = abs(node.skew_s)
        state: State = "fail" if ahead > SKEW_FAIL_S else "warn" if ahead > SKEW_WARN_S else "ok"
        found = "within a second of the driver's"
        if state != "ok":
            found = f"{ahead:.0f} s {'ahead of' if node.skew_s > 0 else 'behind'} the driver's"
        yield Finding("clock", state, (node.address,), found, "run chrony or ntpd on every node")


def _mlflow(facts: Facts) -> Iterator[Finding]:
    if facts.mlflow is None:
        return
    if facts.mlflow_problem is not None:
        fix = "start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or set tracking.kind=none"
        yield Finding("mlflow", "fail", ("driver",), facts.mlflow_problem, fix)
    else:
        yield Finding("mlflow", "ok", ("driver",), f"{facts.mlflow} can be used")
    for node in _answering(facts):
        if node.mlflow is not None:
            fix = "a job whose driver runs there cannot track: open the way to the server from every node"
            yield Finding("mlflow", "warn", (node.address,), node.mlflow, fix)


def _access(facts: Facts) -> Iterator[Finding]:
    """Who may run code on the cluster."""
    cluster = facts.cluster
    if cluster is None:
        return
    reach = "loopback" if _is_loopback(cluster.address) else "the network"
    if cluster.asks_for_token:
        yield Finding("token", "ok", ("cluster",), "the cluster asks for a token")
    else:
        yield Finding(
            "token",
            "warn" if reach == "loopback" else "fail",
            ("cluster",),
            f"off: anyone who reaches {cluster.address} ({reach}) may run anything there",
            "ray get-auth-token --generate, and start every node with RAY_AUTH_MODE=token (docs/security.md)",
        )
    if cluster.dashboard is None or cluster.dashboard_is_open is None:
        yield Finding("dashboard", "ok", ("cluster",), "does not answer here")
    elif not cluster.dashboard_is_open:
        yield Finding("dashboard", "ok", ("cluster",), f"{cluster.dashboard} asks for a token")
    else:
        is_near = _is_loopback(cluster.dashboard)
        yield Finding(
            "dashboard",
            "warn" if is_near else "fail",
            ("cluster",),
            f"{cluster.dashboard} takes jobs from anyone" + (" on this machine" if is_near else " who reaches it"),
            "turn token authentication on; leave --dashboard-host at 127.0.0.1 and reach it by ssh -L or port-forward",
        )


def _answering(facts: Facts) -> list[Node]:
    return [] if facts.cluster is None else [node for node in facts.cluster.nodes if node.machine is not None]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.0f} GiB" if num_bytes >= 10 * GIB else f"{num_bytes / GIB:.2g} GiB"
