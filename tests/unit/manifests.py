"""What the tests of `cluster/` share: overlays as Kustomize builds them, their pods, and our own commands parsed."""

import copy
import functools
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dpo_ray.cli import app

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
OVERLAYS = ("cpu", "gpu", "gpu-spot")

Tree = dict[str, Any]


@functools.cache
def built(overlay: str) -> tuple[Tree, ...]:
    """What `kubectl apply -k` would send."""
    folder = str(CLUSTER / "k8s" / "overlays" / overlay)
    for command in (["kubectl", "kustomize", folder], ["kustomize", "build", folder]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return tuple(yaml.safe_load_all(done.stdout))
    pytest.skip("neither kubectl nor kustomize is here to build the overlays")


def of_kind(overlay: str, kind: str) -> list[Tree]:
    return [found for found in built(overlay) if found["kind"] == kind]


def ray_clusters(overlay: str) -> dict[str, Tree]:
    """Specs of all clusters, by the name of what runs on them."""
    found = {c["metadata"]["name"]: c["spec"] for c in of_kind(overlay, "RayCluster")}
    found |= {j["metadata"]["name"]: j["spec"]["rayClusterSpec"] for j in of_kind(overlay, "RayJob")}
    return found | {s["metadata"]["name"]: s["spec"]["rayClusterConfig"] for s in of_kind(overlay, "RayService")}


def pods(overlay: str) -> Iterator[tuple[str, Tree]]:
    """Templates of all pods, with KubeRay's labels, and what they are."""
    for name, spec in ray_clusters(overlay).items():
        groups = [("head", spec["headGroupSpec"]), *(("worker", group) for group in spec["workerGroupSpecs"])]
        for kind, group in groups:
            template = copy.deepcopy(group["template"])
            template["metadata"]["labels"] |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind}
            yield f"{kind} of {name}", template
    for job in of_kind(overlay, "RayJob"):
        yield f"submitter of {job['metadata']['name']}", job["spec"]["submitterPodTemplate"]


def parsed(command: str | list[str]) -> Tree:
    """The parameters of a `dpo-ray` command, parsed by our own command line."""
    words = shlex.split(command) if isinstance(command, str) else command
    assert words[0] == "dpo-ray"
    group: Any = typer.main.get_command(app)
    params: Tree = group.commands[words[1]].make_context(words[1], words[2:]).params
    return params
