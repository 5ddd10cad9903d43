"""The manifests: valid by the schemas of Kubernetes and KubeRay, closed, and our own commands."""

import copy
import functools
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from dpo_ray.config import RunConfig, load_run, parse_override, validated
from dpo_ray.launch import GROWS
from serve.config import ServeConfig
from tests.unit.manifests import CLUSTER, OVERLAYS, ROOT, Tree, built, of_kind, parsed, pods, ray_clusters

CRDS = ROOT / "tests" / "golden" / "crds" / "kuberay-1.7.0.yaml"
KUBERNETES = "1.34"


def closed(schema: Any) -> Any:
    """A schema in which a field that it does not name is an error, as the API server has it with strict validation."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        inside["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return inside


def kuberay_schema(kind: str) -> Tree:
    """The recorded fields as a JSON schema; pods are Kubernetes' own."""
    kinds: dict[str, dict[str, str]] = yaml.safe_load(CRDS.read_text())

    def of(kind_of_field: str) -> Tree:
        name = kind_of_field.removesuffix("!")
        if name.startswith("["):
            return {"type": "array", "items": of(name[1:-1])}
        if "|" in name:
            return {"enum": name.split("|")}
        if name == "map":
            return {"type": "object", "additionalProperties": {"type": "string"}}
        if name.startswith("k8s."):
            package = "io.k8s." if "apimachinery" in name else "io.k8s.api."
            return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{package}{name.removeprefix('k8s.')}"}
        return {"$ref": f"#/$defs/{name}"} if name in kinds else {"type": name}

    defs = {
        name: {
            "type": "object",
            "properties": {field: of(told) for field, told in fields.items()},
            "required": [field for field, told in fields.items() if told.endswith("!")],
        }
        for name, fields in kinds.items()
    }
    for name in ("RayCluster", "RayJob", "RayService"):
        defs[name]["properties"] |= {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": name},
            "metadata": of("k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        }
    return {"$ref": f"#/$defs/{kind}", "$defs": closed(defs)}


@functools.cache
def kubernetes_definitions() -> Registry[Any]:
    path = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    return Resource.from_contents(schema_contents(path, KUBERNETES)) @ Registry()


def problems(tree: Tree, schema: Tree) -> list[str]:
    """Each as its place and what is wrong there."""
    validator = jsonschema.Draft202012Validator(schema, registry=kubernetes_definitions())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_valid(overlay: str):
    for found in built(overlay):
        if found["apiVersion"] == "ray.io/v1":
            assert problems(found, kuberay_schema(found["kind"])) == [], found["metadata"]["name"]
        else:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_valid_by_the_crds_of_an_installed_operator(overlay: str):
    folder = os.environ.get("DPO_RAY_KUBERAY_CRDS")
    if not folder:
        pytest.skip("DPO_RAY_KUBERAY_CRDS names no folder with files of `kubectl get crd rayjobs.ray.io -o yaml`")
    crds = {crd["spec"]["names"]["kind"]: crd for crd in map(yaml.safe_load, _texts(Path(folder)))}
    for found in built(overlay):
        if found["apiVersion"] == "ray.io/v1":
            (version,) = [v for v in crds[found["kind"]]["spec"]["versions"] if v["name"] == "v1"]
            schema = closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {}
            assert problems(found, schema) == [], found["metadata"]["name"]


def _texts(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("*.yaml")]


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (["headGroupSpec", "template", "spec", "containers", 0, "imagee"], "x", "imagee"),
        (["workerGroupSpecs", 0, "minReplicas"], "1", "minReplicas"),
        (["authOptions", "mode"], "on", "mode"),
        (["autoscalerOptions", "idle"], 1, "idle"),
    ],
)
def test_the_schema_finds_what_is_wrong(place: list[Any], value: Any, told: str):
    (cluster,) = copy.deepcopy(of_kind("cpu", "RayCluster"))
    inside = cluster["spec"]
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (problem,) = problems(cluster, kuberay_schema("RayCluster"))
    assert told in problem


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_everything_and_can_be_applied_in_parts(overlay: str):
    names = {
        (found["kind"], found["metadata"]["name"]) for found in built(overlay) if found["apiVersion"] == "ray.io/v1"
    }
    jobs = {("RayJob", "train"), ("RayJob", "sweep"), ("RayJob", "acquire")}
    assert names == {("RayCluster", "dpo-ray"), ("RayService", "serve"), *jobs}
    for found in built(overlay):
        label = found["metadata"]["labels"]["app.kubernetes.io/component"]
        assert label in {"shared", "cluster", "train", "sweep", "acquire", "serve"}
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "dpo-ray"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_and_service_run_the_pods_of_the_cluster(overlay: str):
    whole = ray_clusters(overlay)
    for name, spec in whole.items():
        of_cluster = whole["dpo-ray"]
        for ours, theirs in zip(_pod_specs(spec), _pod_specs(of_cluster), strict=True):
            assert ours == theirs, name
        assert (spec["rayVersion"], spec["authOptions"]) == (of_cluster["rayVersion"], of_cluster["authOptions"])


def _pod_specs(spec: Tree) -> list[Tree]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters_that_scale_do_so_by_the_second_autoscaler_and_jobs_have_a_fixed_size(overlay: str):
    for name, spec in ray_clusters(overlay).items():
        assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        (group,) = spec["workerGroupSpecs"]
        if name in ("dpo-ray", "serve"):
            assert spec["enableInTreeAutoscaling"]
            assert spec["autoscalerOptions"]["version"] == "v2"
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        else:
            assert not spec.get("enableInTreeAutoscaling")
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    for job in of_kind(overlay, "RayJob"):
        spec = job["spec"]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dpo-ray"
        assert spec["shutdownAfterJobFinishes"]
        assert spec["backoffLimit"] > 0


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / {"Gi": 1, "Mi": 1024}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_may_nothing_that_they_need_not(overlay: str):
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in pods(overlay):
        spec = template["spec"]
        context = spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 1000), name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec.get("volumes", ()) if "hostPath" in volume], name
        if not name.startswith("head"):  # beside the head stands the autoscaler, which asks Kubernetes for pods
            assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert "privileged" not in container["securityContext"], name
            of = container["resources"]
            assert of["requests"]["memory"] == of["limits"]["memory"], name
    for name, spec in ray_clusters(overlay).items():
        assert spec["authOptions"] == {"mode": "token", "secretName": "dpo-ray-token"}, name
        if spec.get("enableInTreeAutoscaling"):
            context = spec["autoscalerOptions"]["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_object_store_fits_into_shared_memory(overlay: str):
    for name, template in pods(overlay):
        if name.startswith("submitter"):
            continue
        (container,) = template["spec"]["containers"]
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == "shm"]
        assert volume["emptyDir"]["medium"] == "Memory", name
        share = gib(volume["emptyDir"]["sizeLimit"]) / gib(container["resources"]["limits"]["memory"])
        assert 0.3 < share < 0.5, name
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_time_to_save_before_it_is_killed(overlay: str):
    for name, template in pods(overlay):
        if not name.startswith("worker"):
            continue
        (container,) = template["spec"]["containers"]
        (script,) = container["lifecycle"]["preStop"]["exec"]["command"][2:]
        deadline = int(re.search(r"--deadline-remaining-seconds (\d+)", script)[1])  # type: ignore[index]
        waits = int(re.search(r"sleep (\d+)", script)[1])  # type: ignore[index]
        assert deadline < waits < template["spec"]["terminationGracePeriodSeconds"] - 20, name
        drain = shlex.split(script.partition("&&")[0])
        from ray.scripts.scripts import drain_node

        drain_node.make_context("drain-node", drain[drain.index("drain-node") + 1 :])


def reaches(overlay: str, source: Tree, target: Tree, port: int) -> bool:
    """Whether the network policies let a pod of some labels and namespace in at a port of one of our pods."""

    def selects(selector: Tree, labels: Tree) -> bool:
        return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())

    def is_from(peer: Tree) -> bool:
        if "ipBlock" in peer:
            return False
        namespace = {"kubernetes.io/metadata.name": source["namespace"]}
        if "namespaceSelector" not in peer:
            is_there = source["namespace"] == "dpo-ray"
        else:
            is_there = selects(peer["namespaceSelector"], namespace)
        return is_there and selects(peer.get("podSelector", {}), source["labels"])

    policies = [p["spec"] for p in of_kind(overlay, "NetworkPolicy") if selects(p["spec"]["podSelector"], target)]
    assert [p for p in policies if "Ingress" in p["policyTypes"]], "a pod that no policy selects is open"
    assert [p for p in policies if "Egress" in p["policyTypes"]], "a pod that no policy selects is open"
    rules = [rule for policy in policies for rule in policy.get("ingress", ())]
    return any(
        any(is_from(peer) for peer in rule["from"])
        and ("ports" not in rule or port in [p["port"] for p in rule["ports"]])
        for rule in rules
    )


def test_the_network_lets_in_who_has_business_there_and_nobody_else():
    labels = {name: template["metadata"]["labels"] for name, template in pods("cpu")}
    ours = {name: {"namespace": "dpo-ray", "labels": of} for name, of in labels.items()}
    operator = {"namespace": "kuberay-system", "labels": {}}
    prometheus = {"namespace": "monitoring", "labels": {}}
    client = {"namespace": "web", "labels": {"dpo-ray/client": "true"}}
    stranger = {"namespace": "web", "labels": {"ray.io/is-ray-node": "yes"}}
    neighbour = {"namespace": "dpo-ray", "labels": {"app": "x"}}
    may = functools.partial(reaches, "cpu")
    head, worker, serving = labels["head of train"], labels["worker of train"], labels["worker of serve"]

    assert may(ours["worker of train"], head, 6379)
    assert may(ours["worker of train"], worker, 33333)
    assert may(ours["submitter of train"], head, 8265)
    assert may(operator, head, 8265)
    assert may(prometheus, worker, 8080)
    assert may(client, serving, 8000)
    assert may(prometheus, serving, 8000)

    assert not may(ours["submitter of train"], head, 6379)
    assert not may(operator, head, 6379)
    assert not may(prometheus, head, 8265)
    assert not may(client, worker, 8000)
    assert not may(client, labels["head of serve"], 8265)
    for source in (stranger, neighbour):
        for target in labels.values():
            assert not [port for port in (6379, 8000, 8080, 8265, 10001) if may(source, target, port)]


def test_pods_reach_names_the_hub_and_each_other_but_not_the_nodes_own_rights():
    (policy,) = [p["spec"] for p in of_kind("cpu", "NetworkPolicy") if "Egress" in p["spec"]["policyTypes"]]
    (outside,) = [rule for rule in policy["egress"] if "ipBlock" in rule["to"][0]]
    assert outside["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]
    assert {port["port"] for port in outside["ports"]} == {443, 6443}
    assert [rule for rule in policy["egress"] if {53} == {port["port"] for port in rule.get("ports", ())}]


def run_of(overlay: str, job: Tree) -> RunConfig:
    """What a job's entrypoint trains, with the recipe of the overlay."""
    params = parsed(job["spec"]["entrypoint"])
    (recipe,) = of_kind(overlay, "ConfigMap")
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == recipe["metadata"]["name"]]
    path = params["recipe"]
    assert str(path.parent) == mount
    assert path.name in recipe["data"]
    folder = CLUSTER / "k8s" / "overlays" / overlay
    return load_run(folder / path.name, dict(map(parse_override, params["overrides"] or [])))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_starts_and_is_retried_by_the_same_command_on_shared_storage(overlay: str):
    folders = []
    for job in of_kind(overlay, "RayJob"):
        params = parsed(job["spec"]["entrypoint"])
        assert params["resume"] is True
        run = run_of(overlay, job)
        assert run.storage.path.startswith("/shared/")
        assert str(run.reference.store).startswith("/shared/")
        folders.append(params.get("name") or run.name)
        (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > run.checkpoint.stop_seconds
        assert variables[GROWS] == "1", "the cluster that stays has no workers while there are no jobs"
    assert len(set(folders)) == 3, "two jobs would share a folder"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_has_room_for_the_workers_of_its_recipe(overlay: str):
    for job in of_kind(overlay, "RayJob"):
        cluster = run_of(overlay, job).cluster
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        in_a_pod = int(limits["cpu"]) // cluster.cpus_per_worker
        assert cluster.gpus_per_worker != "auto", "a cluster without nodes has no GPUs to count"
        if cluster.gpus_per_worker:
            in_a_pod = min(in_a_pod, int(limits["nvidia.com/gpu"]) // cluster.gpus_per_worker)
        assert cluster.num_workers <= group["replicas"] * in_a_pod


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_is_ray_serves_and_ours_and_hosts_what_was_trained(overlay: str):
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(overlay, "RayService")
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name))
    config = validated(ServeConfig, application.args)
    (model,) = config.models
    (job,) = [j for j in of_kind(overlay, "RayJob") if j["metadata"]["name"] == "train"]
    run = run_of(overlay, job)
    assert model.path == f"{run.storage.path}/{run.name}/model"
    assert config.keys is not None
    assert not config.insecure
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert str(config.keys.parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    limits = container["resources"]["limits"]
    assert model.num_cpus <= int(limits["cpu"])
    assert model.num_gpus <= int(limits.get("nvidia.com/gpu", 0))
    assert model.max_replicas <= group["maxReplicas"]
