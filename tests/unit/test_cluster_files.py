"""The image, the cluster launcher, monitoring, and what all files of `cluster/` have in common."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dpo_ray import __version__
from tests.unit.manifests import CLUSTER, OVERLAYS, ROOT, Tree, of_kind, pods

LAUNCHERS = sorted(path.name for path in (CLUSTER / "launcher").glob("*.yaml"))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])


def test_the_dockerfile_passes_its_linter():
    linter = shutil.which("hadolint") or shutil.which(str(Path(sys.executable).parent / "hadolint"))
    if linter is None:
        pytest.skip("hadolint is not here")
    command = [linter, "--no-color", "--failure-threshold", "warning", str(CLUSTER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def stages() -> dict[str, tuple[str, list[str]]]:
    """Name of a stage -> what it starts from, and its instructions."""
    text = re.sub(r"\\\n(\s*#.*\n)*", " ", (CLUSTER / "Dockerfile").read_text())
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if begun := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            lines: list[str] = []
            found[begun[2]] = (begun[1], lines)
        elif line and not line.startswith("#"):
            lines.append(" ".join(line.split()))
    return found


def test_both_images_are_alike_but_for_torch_and_run_as_nobody_special():
    found = stages()
    assert set(found) == {"system", "cpu", "gpu"}
    own = re.compile("pip install (--no-deps )?torch |DS_ACCELERATOR=cpu")
    cpu, gpu = ([line for line in found[name][1] if not own.search(line)] for name in ("cpu", "gpu"))
    assert cpu == gpu
    for name in ("cpu", "gpu"):
        base, lines = found[name]
        assert base == "system"
        assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
        assert lines.index("RUN pip install -r requirements.txt -c constraints.txt") < lines.index("COPY . .")
    base, lines = found["system"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base)
    assert [line for line in lines if "apt-get install" in line and "rm -rf /var/lib/apt/lists/*" in line]
    needed = {"g++", "wget", "rsync", "openssh-client"}  # DeepSpeed and Triton, KubeRay's probes, the launcher
    assert needed <= set(" ".join(lines).split())


def test_what_the_image_installs_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = next(line for line in stages()["system"][1] if "tomllib" in line)
    code = re.search(r'python -c "(.*)" >', command)[1]  # type: ignore[index]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*project["dependencies"], *project["optional-dependencies"]["cloud"]]
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert {re.split(r"[\[>=]", line)[0].lower() for line in done.stdout.splitlines()} <= pinned


def test_the_build_sees_the_code_and_no_data():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"dpo_ray", "serve", "tune_spaces", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(
        allowed
    )
    assert all((ROOT / name).exists() for name in allowed)
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_one_version_of_ray_and_python_stands_everywhere():
    python = re.search(r"python:(3\.\d+)", stages()["system"][0])[1]  # type: ignore[index]
    expected = f"{__version__}-ray{PINS['ray']}-py{python.replace('.', '')}"
    for path in sorted(CLUSTER.rglob("*")):
        if not path.is_file():
            continue
        told = path.read_text()
        for tag in re.findall(r"dpo-ray:(\d\S+)", told) + re.findall(r"newTag: (\S+)", told):
            assert re.fullmatch(rf"{re.escape(expected)}-(cpu|gpu)", tag), f"{path}: {tag}"
        for version in re.findall(r"rayVersion: (\S+)", told):
            assert version == PINS["ray"], path
        assert ":latest" not in told, path
    for overlay in OVERLAYS:
        images = {container["image"] for _, template in pods(overlay) for container in template["spec"]["containers"]}
        kind = overlay.removesuffix("-spot")
        assert images == {f"registry.example.com/dpo-ray:{expected}-{kind}"}


def test_monitors_name_ports_and_labels_that_pods_have():
    pod, service = yaml.safe_load_all((CLUSTER / "monitoring" / "podmonitors.yaml").read_text())
    ports = {
        port["name"]
        for name, template in pods("cpu")
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }
    assert {endpoint["port"] for endpoint in pod["spec"]["podMetricsEndpoints"]} <= ports
    for name, template in pods("cpu"):
        if not name.startswith("submitter"):
            assert pod["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (endpoint,) = service["spec"]["endpoints"]
    assert endpoint["port"] in ports
    (named,) = of_kind("cpu", "RayService")
    assert service["spec"]["selector"]["matchLabels"]["ray.io/serve"] == f"{named['metadata']['name']}-serve"


def test_prometheus_of_machines_finds_rays_nodes_and_has_a_key_for_the_service():
    config = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yaml").read_text())
    nodes, service = config["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (files,) = [entry["files"] for entry in nodes["file_sd_configs"]]
    assert [Path(path).name for path in files] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
    assert "credentials_file" in service["authorization"]


def test_nothing_listens_on_every_address():
    for path in sorted(CLUSTER.rglob("*")):
        if path.is_file():
            told = path.read_text().replace("0.0.0.0/0", "")
            assert "0.0.0.0" not in told, path


@functools.cache
def launcher(name: str) -> Tree:
    """A launcher file with Ray's defaults filled in, as `ray up` takes it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Tree = prepare_config(yaml.safe_load((CLUSTER / "launcher" / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_is_valid_with_the_defaults_that_ray_adds(name: str):
    config = launcher(name)
    told = json.dumps(config)
    assert "0.0.0.0" not in told, "Ray's own defaults open the dashboard"
    assert "pip install" not in told, "the image has everything"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launched_cluster_has_the_token_and_its_dashboard_on_loopback(name: str):
    config = launcher(name)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    docker = config["docker"]
    assert "--env RAY_AUTH_MODE=token" in docker["run_options"]
    assert "--cap-drop=ALL" in docker["run_options"]
    assert not [option for option in docker["run_options"] if "privileged" in option.replace("no-new-privileges", "")]
    shared = [*docker["run_options"], *docker.get("head_run_options", ()), *docker.get("worker_run_options", ())]
    assert [option for option in shared if option.startswith("--shm-size=")]
    head, worker = (config[f"{kind}_start_ray_commands"] for kind in ("head", "worker"))
    assert ray_start(head[-1])["dashboard_host"] == "127.0.0.1"
    assert ray_start(head[-1])["head"] is True
    assert ray_start(worker[-1])["address"] == "$RAY_HEAD_IP:6379"


def ray_start(command: str) -> Tree:
    """The options of a `ray start`, parsed by Ray itself."""
    from ray.scripts.scripts import start

    words = shlex.split(command)
    assert words[:2] == ["ray", "start"]
    params: Tree = start.make_context("start", words[2:]).params
    return params


def test_workers_of_the_clouds_are_spot_machines_that_go_when_they_are_idle():
    for name in ("aws.yaml", "gcp.yaml"):
        config = launcher(name)
        assert config["idle_timeout_minutes"] <= 10
        assert config["available_node_types"]["worker"]["min_workers"] == 0
        assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    aws, gcp = (launcher(name)["available_node_types"]["worker"]["node_config"] for name in ("aws.yaml", "gcp.yaml"))
    assert aws["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["scheduling"]["provisioningModel"] == "SPOT"
