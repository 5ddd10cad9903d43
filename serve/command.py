"""`dpo-ray serve`: from what a person typed to a running service."""

import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from dpo_ray.config import validated, with_override
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.storage import absolute
from serve.auth import KEY_VARIABLE, ApiKey, new_key, read_keys
from serve.config import ServeConfig, ServedModel
from serve.models import as_reference, find_model
from serve.process import schedule

APP = "dpo-ray"


class Wanted(NamedTuple):
    """What was typed."""

    model: str
    name: str | None = None
    reference: str | None = None
    adapters: Sequence[str] = ()
    also: Sequence[str] = ()
    split: Sequence[str] = ()
    preferences: str | None = None
    queue: Path | None = None
    keys: Path | None = None
    insecure: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    cors: Sequence[str] = ()
    replicas: str = "1"
    settings: Sequence[tuple[str, Any]] = ()
    """Keys of `ServedModel`, which hold for every model, and of `ServeConfig`."""
    log_text: bool = False


def configure(wanted: Wanted, keys: Sequence[ApiKey]) -> ServeConfig:
    """The service that is wanted.

    With preferences it compares the model and its reference, or its first two models.

    Raises:
        InputError: A model is not there, or an option is wrong.
    """
    if wanted.insecure and not is_loopback(wanted.host):
        raise InputError(f"--insecure is for loopback, and {wanted.host} is not: use keys")
    find = partial(find_model, trust_remote_code=dict(wanted.settings).get("trust_remote_code") is True)
    first = find(
        wanted.model,
        name=wanted.name,
        reference=wanted.reference,
        adapters=[_named(text, "--adapter") for text in wanted.adapters],
    )
    models = [first, *(find(path, name=name) for name, path in (_named(text, "--also") for text in wanted.also))]
    names = [name for model in models for name in (model.name, *model.adapters)]
    compare = None
    if wanted.preferences is not None:
        if len(names) == 1 and first.reference is not None:
            models.append(as_reference(first, "reference" if first.name != "reference" else "base"))
            names.append(models[-1].name)
        compare = (names[0], names[1]) if len(names) > 1 else None
    tree: dict[str, Any] = {
        "split": dict(_shares(text) for text in wanted.split),
        "compare": compare,
        "api_keys": keys,
        "insecure": wanted.insecure,
        "cors": tuple(wanted.cors),
        "preferences": None if wanted.preferences is None else absolute(wanted.preferences),
        "queue": None if wanted.queue is None else wanted.queue.absolute(),
        "log_text": wanted.log_text,
    }
    of_models = dict(zip(("min_replicas", "max_replicas"), _range(wanted.replicas), strict=True))
    for key, value in wanted.settings:
        if key in ServedModel.model_fields:
            of_models[key] = value
        else:
            tree = with_override(tree, key, value)
    listed = [validated(ServedModel, model.model_dump() | of_models) for model in models]
    return validated(ServeConfig, tree | {"models": listed})


def deploy(
    wanted: Wanted, *, tell: Callable[[str], object], connect: Callable[[], object], is_detached: bool = False
) -> None:
    """Serve until interrupted, or leave it on the cluster; again on the same cluster it is a rolling update.

    Raises:
        InputError: See `configure`; or the port is taken, or the cluster has no room.
        RunFailed: An engine does not start.
    """
    _check_import()
    secret = None
    keys = [] if wanted.insecure else list(read_keys(wanted.keys))
    if not keys and not wanted.insecure:
        secret, key = new_key("first")
        keys = [key]
    config = configure(wanted, keys)
    schedule("SCHED_BATCH")  # and with it a cluster that is started here
    connect()
    if is_detached and _is_our_cluster():
        raise InputError("--detach leaves the service on a cluster, and there is none that stays: give --address")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve.app import build_app

    if not _is_serving() and _is_taken(wanted.host, wanted.port):
        raise InputError(f"port {wanted.port} of {wanted.host} is in use: give another --port")
    _check_room(config)
    serve.start(http_options=HTTPOptions(host=wanted.host, port=wanted.port))
    try:
        serve.run(build_app(config), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise RunFailed(f"the service does not start: {_cause(APP) or error}") from None
    shown = f"http://{wanted.host}:{wanted.port}"
    tell(f"serving {', '.join((*config.split, *config.real_names))} at {shown}/v1; pages: {shown}/")
    if secret is not None:
        tell(f"API key of this service, shown once: {secret}  (set {KEY_VARIABLE}, or --keys, for one of your own)")
    if is_detached:
        return
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.wait(1):
            pass
        tell("finishing what is under way; again: stop at once")
        for number in before:
            signal.signal(number, signal.default_int_handler)
        serve.delete(APP)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_service() -> None:
    """Stop the service on the cluster; what is under way is finished.

    Raises:
        InputError: There is none.
    """
    from ray import serve

    if not _is_serving() or APP not in serve.status().applications:
        raise InputError("there is no service on this cluster")
    serve.delete(APP)


def print_new_key(name: str) -> None:
    """A new key, which nobody can show again, and its entry for the file of `--keys`."""
    try:
        secret, key = new_key(name)
    except ValidationError:
        raise InputError(f"--new-key: a name has letters, digits, dots, dashes and underscores, not {name!r}") from None
    print(f"key: {secret}\n")
    print(yaml.safe_dump({"keys": [key.model_dump(exclude_none=True)]}, sort_keys=False), end="")


def is_loopback(host: str) -> bool:
    """Whether nobody else can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _named(text: str, option: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise InputError(f"{option} takes NAME=PATH, not `{text}`")
    return name, path


def _shares(text: str) -> tuple[str, dict[str, float]]:
    name, listed = _named(text, "--split")
    try:
        return name, {model: float(share) for model, share in (part.rsplit(":", 1) for part in listed.split(","))}
    except ValueError:
        raise InputError(f"--split takes NAME=A:0.9,B:0.1, not `{text}`") from None


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise InputError(f"--replicas takes a number, or a range such as 1:4, not `{text}`") from None


def _is_our_cluster() -> bool:
    """Whether this process has started the cluster, which then ends with it."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and bool(node.head)


def _check_import() -> None:
    """Ray's workers look for modules in the driver's folder first."""
    import serve.app

    for other in (Path("serve.py"), Path("serve") / "__init__.py"):
        if other.exists() and other.resolve().parent != Path(serve.app.__file__).resolve().parent:
            raise InputError(f"./{other} here hides the package `serve` of dpo-ray: start from another folder")


def _is_serving() -> bool:
    """Whether Ray Serve runs on the cluster. To ask Serve itself would start it, with its own port."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _is_taken(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _check_room(config: ServeConfig) -> None:
    """Ray Serve itself would wait for ever."""
    import ray

    there = ray.cluster_resources()
    for resource, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        needed = sum(getattr(model, field) * model.min_replicas for model in config.models)
        if needed > there.get(resource, 0):
            raise InputError(
                f"{needed:g} {resource} are needed for {len(config.models)} models, and the cluster has "
                f"{there.get(resource, 0):g}: give fewer --replicas or --set {field}=..."
            )


def _cause(app: str) -> str | None:
    """The line in which an engine says why it does not start."""
    from ray import serve

    found = serve.status().applications.get(app)
    if found is None:
        return None
    messages = [found.message, *(deployment.message for deployment in found.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else None
