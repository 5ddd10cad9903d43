"""What a job is before it is sent: a checked command, a recipe whose paths the cluster sees, files, a name of its own.

A job is one of our own commands with one resolved recipe. Two submissions of the same are the same job: its id is
derived from what decides the result. Nothing here talks to a cluster; `jobs` does.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from dpo_ray.config import Place, RunConfig, load_run, parse_override, parse_run, places, split_recipe, with_override
from dpo_ray.data.sources import may_be_hub_name
from dpo_ray.errors import InputError
from dpo_ray.shipping import OWN, Files, check_size, code_files, module_files, tree
from dpo_ray.space import SHIPPED, Range, load_space
from dpo_ray.storage import Folder, absolute, is_uri

COMMANDS = ("train", "sweep", "acquire", "score", "evaluate", "serve")

PLACES: Mapping[str, Mapping[str, Place]] = {
    "score": {"model": Place.MODEL},
    "evaluate": {
        **dict.fromkeys(("model", "against", "reference"), Place.MODEL),
        **dict.fromkeys(("data", "annotations"), Place.DATA),
        "output": Place.FOLDER,
    },
    "serve": {
        **dict.fromkeys(("model", "reference", "adapter", "also"), Place.MODEL),
        **dict.fromkeys(("preferences", "queue"), Place.FOLDER),
    },
}
"""Options and arguments of commands that lead somewhere, as `Place` says of the keys of a recipe."""
NAMED = {"adapter", "also"}
"""Those that are NAME=PATH."""
NOT_OF_A_JOB = {
    "address": "a job runs on the cluster that it is submitted to: give --address before `--`",
    "new_key": "a new key is not for a job's log: dpo-ray serve --new-key NAME runs here",
}
FIXES = {
    Place.FOLDER: "take an object store, such as s3://bucket/folder",
    Place.DATA: "put it into an object store, or on the hub",
    Place.MODEL: "put it on the hub",
    Place.URL: "take a server that the nodes reach",
}
HOW_NOT_WHAT = {"resume", "as_json"}
"""Options that do not make it another job."""


class Typed(NamedTuple):
    """A command behind `--`, as our own parser read it."""

    command: str
    values: Mapping[str, Any]
    """Parameter -> value, of what was typed."""
    spelling: Mapping[str, str | None]
    """Parameter -> its option, of all that the command has; None: an argument."""


class Sight(NamedTuple):
    """Which local paths the nodes of a cluster see."""

    is_this_machine: bool
    shared: tuple[str, ...] = ()
    """Folders that every node mounts where they are here."""

    def sees(self, path: str) -> bool:
        real = os.path.normpath(path)
        return self.is_this_machine or any(Path(real).is_relative_to(absolute(folder)) for folder in self.shared)


class Job(NamedTuple):
    """What a cluster is asked to run."""

    id: str
    command: str
    words: tuple[str, ...]
    """Of the command line, behind `dpo-ray`."""
    resume: tuple[str, ...]
    """What goes on with a job that broke off: `--resume`, or nothing where the command does so anyway."""
    files: Files
    """What is shipped."""
    stop_seconds: float
    """Time between the signal to stop and the end."""


def build(
    typed: Typed,
    sight: Sight,
    *,
    working_dir: Path | None = None,
    ships_code: bool = False,
    job_id: str | None = None,
    kept: Iterable[str] = (),
) -> Job:
    """Check a command and its recipe, and collect what it needs.

    Args:
        working_dir: Ship this folder too; None: only what the command names.
        ships_code: Ship this dpo-ray.
        job_id: Instead of a derived one.
        kept: Names of the secrets that go along.

    Raises:
        InputError: The command or the recipe is wrong, or names paths that the cluster does not see.
    """
    values = dict(typed.values)
    for name, reason in NOT_OF_A_JOB.items():
        if name in values:
            raise InputError(reason)
    files: dict[str, Path | bytes] = dict(tree(working_dir)) if working_dir is not None else {}
    hidden: list[str] = []
    run, stop_seconds = None, 30.0
    if typed.command == "evaluate":
        named, settings = split_recipe(values.pop("overrides", None) or [])
        values |= ({"recipe": named} if named else {}) | ({"overrides": settings} if settings else {})
    if "recipe" in values:
        run = load_run(values["recipe"], dict(map(parse_override, values.pop("overrides", None) or ())))
        run = located(run, sight, hidden)
        values["recipe"] = f"{OWN}/{run.name}.yaml"
        files[values["recipe"]] = yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)).encode()
        for asked in (run.acquire and run.acquire.oracle, run.evaluate.judge):
            files |= module_files(asked.function if asked and asked.kind == "function" else "")
        stop_seconds += run.checkpoint.stop_seconds
    if "space" in values and run is not None:
        values["space"] = _space(values, run, sight, files, hidden)
    for name, place in PLACES.get(typed.command, {}).items():
        if name in values:
            values[name] = _located_option(
                typed.spelling[name] or name, values[name], place, name in NAMED, sight, hidden
            )
    if typed.command == "serve":
        _check_service(values, sight, set(kept), files, hidden)
    if hidden:
        raise InputError(
            f"the cluster does not see what is on this machine only: {'; '.join(hidden)}. Where every node mounts the "
            "same folder: --shared FOLDER"
        )
    if ships_code:
        files |= code_files()
    check_size(files)
    words = _words(typed.spelling, values)
    name = run.name if run is not None else str(values.get("model", "")).rstrip("/").rpartition("/")[2]
    content = [typed.command, _words(typed.spelling, {k: v for k, v in values.items() if k not in HOW_NOT_WHAT})]
    content += sorted((file, text.decode()) for file, text in files.items() if isinstance(text, bytes))
    derived = hashlib.blake2b(repr(content).encode(), digest_size=4).hexdigest()
    return Job(
        id=job_id or "-".join(filter(None, (typed.command, re.sub(r"[^\w.-]", "-", name), derived))),
        command=typed.command,
        words=(typed.command, *words),
        resume=("--resume",) if "resume" in typed.spelling and "resume" not in values else (),
        files=files,
        stop_seconds=stop_seconds,
    )


def located(run: RunConfig, sight: Sight, hidden: list[str]) -> RunConfig:
    """The recipe with its local paths absolute; those that the cluster does not see are told in `hidden`."""
    if run.tracking.kind == "mlflow" and run.tracking.uri is None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or ("sqlite:///mlflow.db" if is_uri(run.storage.path) else "")
        run = parse_run(run.model_dump(mode="json", exclude_unset=True), {"tracking.uri": uri} if uri else {})
    overrides = {}
    for key, place, text in places(run):
        if key == "tracking.uri" and run.tracking.kind == "none":
            continue
        overrides[key] = _visible(f"`{key}`", text, place, sight, hidden)
    return parse_run(run.model_dump(mode="json", exclude_unset=True), overrides)


def _visible(named: str, text: str, place: Place, sight: Sight, hidden: list[str]) -> str:
    """The text with a local path made absolute, or as it is where it leads elsewhere."""
    path, whole = local(text, place)
    if path is None:
        return text
    if not sight.sees(path):
        hidden.append(f"{named} ({text}): {FIXES[place]}")
    return whole


def local(text: str, place: Place) -> tuple[str | None, str]:
    """The absolute local path that a text leads to, None where it leads elsewhere; and the text with it."""
    if place is Place.URL:
        scheme, separator, _ = text.partition("://")
        if scheme in ("http", "https") and separator:
            is_here = urlsplit(text).hostname in ("localhost", "127.0.0.1", "::1")
            return ("/" if is_here else None), text
        if text.startswith(("sqlite:///", "file:")):
            head = "sqlite:///" if scheme == "sqlite" else "file://" if separator else "file:"
            path = absolute(text.removeprefix(head))
            return path, f"{head}{path}"
        return (None, text) if separator or text.startswith(("databricks", "uc:")) else (absolute(text),) * 2
    if is_uri(text) or text.startswith("models:/"):
        return None, text
    is_path = place is Place.FOLDER or not may_be_hub_name(text) or Folder(text).exists()
    return (absolute(text),) * 2 if is_path else (None, text)


def _located_option(option: str, value: Any, place: Place, is_named: bool, sight: Sight, hidden: list[str]) -> Any:
    if isinstance(value, list | tuple):
        return [_located_option(option, item, place, is_named, sight, hidden) for item in value]
    name, separator, text = str(value).partition("=") if is_named else ("", "", str(value))
    if (option, text) == ("--preferences", "none"):
        return text
    return f"{name}{separator}{_visible(option, text, place, sight, hidden)}"


def _space(
    values: Mapping[str, Any], run: RunConfig, sight: Sight, files: dict[str, Path | bytes], hidden: list[str]
) -> str:
    """The search space under the name that the job finds it by; checked, and with what it needs in `files`."""
    name = str(values["space"])
    for key, settings in load_space(name, run, values.get("metric") or (), values.get("seeds")).settings.items():
        if isinstance(settings, Range) or key.startswith("loss"):  # keys of a loss hold only together
            continue
        for choice in settings:
            tried = parse_run(with_override(run.model_dump(mode="json", exclude_unset=True), key, choice.value))
            for path, place, text in places(tried):
                if local(text, place)[1] != text:
                    raise InputError(f"the space {name}: `{path}` ({text}) is relative; a job needs the whole path")
                if path.startswith(key):
                    _visible(f"`{path}` of the space", text, place, sight, hidden)
    if name.endswith((".yaml", ".yml")):
        files[f"{OWN}/{Path(name).name}"] = Path(name).read_bytes()
        return f"{OWN}/{Path(name).name}"
    if name not in SHIPPED:
        files |= module_files(name)
    return name


def _check_service(
    values: dict[str, Any], sight: Sight, sent: set[str], files: dict[str, Path | bytes], hidden: list[str]
) -> None:
    """What a service needs to be a job: keys that are known, and preferences that stay."""
    if "stop" in values:
        return
    if not {"keys", "insecure"} & values.keys() and "DPO_RAY_API_KEY" not in sent:
        raise InputError(
            "a service without keys makes one, which would stand in the job's log: give --keys FILE "
            "(dpo-ray serve --new-key NAME makes an entry), or --secret DPO_RAY_API_KEY"
        )
    if "keys" in values:
        try:
            files[f"{OWN}/{Path(values['keys']).name}"] = Path(values["keys"]).read_bytes()
        except OSError as error:
            raise InputError(f"--keys: {values['keys']}: {error.strerror}") from None
        values["keys"] = f"{OWN}/{Path(values['keys']).name}"
    if "preferences" not in values:
        values["preferences"] = _visible("--preferences", "runs/preferences", Place.FOLDER, sight, hidden)


def _words(spelling: Mapping[str, str | None], values: Mapping[str, Any]) -> list[str]:
    """A command line in one order, whatever the order that was typed: options by name, then the arguments."""
    words = []
    for name in sorted(values, key=lambda name: (spelling[name] is None, spelling[name] or "")):
        option, value = spelling[name], values[name]
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is True:
                words.append(str(option))
            elif item is not False and item is not None:
                words += [str(item)] if option is None else [option, str(item)]
    return words
