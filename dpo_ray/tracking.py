"""MLflow, through its client only: no global run, no telemetry, nothing in the working directory.

The driver is the one writer. A store that cannot be reached is an error at the start of a run and one warning later:
metrics wait in memory and go with the next ones. Importing this imports MLflow, so callers do it where they need it.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, final

from dpo_ray.config import RunConfig
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.storage import Folder, absolute, is_uri, redacted

# Read by MLflow when it is imported: no usage reports, nothing on stdout, a dead server noticed in seconds.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

Status = Literal["completed", "stopped_early", "failed", "interrupted"]

_STATUS = {
    "completed": RunStatus.FINISHED,
    "stopped_early": RunStatus.FINISHED,
    "failed": RunStatus.FAILED,
    "interrupted": RunStatus.KILLED,
}

# What a store that is away, full or misconfigured raises; an artifact store adds OSError, a missing driver ImportError.
_STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError, ImportError)

_CUT = " ... (cut)"

CHAMPION, CHALLENGER, PREVIOUS_CHAMPION = "champion", "challenger", "previous_champion"
"""Aliases of a registered model's versions: the one in use, the newest, and the one that was in use before."""


class Tracker(Protocol):
    """Where the metrics of a run go besides its folder."""

    def start(
        self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, resume: str | None = None
    ) -> str | None:
        """Begin a run, or go on with the run `resume`, and return its id.

        Raises:
            InputError: The store cannot be reached or refuses the run.
        """
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step; they are sent together with others."""
        ...

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; they go with the next metrics."""
        ...

    def log_file(self, source: Path | str, name: str) -> None:
        """Keep a text file with the run: the file at a `Path`, or the text itself."""
        ...

    def register(self, model_path: str, name: str, tags: Mapping[str, str] | None = None) -> str | None:
        """Make the exported model the newest version of a registered model, its challenger; return the version.

        Args:
            tags: Of the version: what it was made from.

        Raises:
            RunFailed: The registry did not take it; the model itself is untouched.
        """
        ...

    def finish(self, status: Status) -> None:
        """Send what is left and close the run."""
        ...


@final
class NoTracker:
    """`tracking.kind: none`: the run folder is all there is."""

    def start(
        self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, resume: str | None = None
    ) -> str | None:
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def tag(self, tags: Mapping[str, str]) -> None:
        pass

    def log_file(self, source: Path | str, name: str) -> None:
        pass

    def register(self, model_path: str, name: str, tags: Mapping[str, str] | None = None) -> str | None:
        return None

    def finish(self, status: Status) -> None:
        pass


@final
class MlflowTracker:
    """One run in an MLflow store."""

    def __init__(
        self, uri: str, experiment: str, artifacts: str | None, send_every_s: float = 2.0, retry_every_s: float = 30.0
    ) -> None:
        """
        Args:
            uri: The tracking store.
            experiment: Its experiment, created if it is not there.
            artifacts: Where a new experiment keeps files; None: the server decides.
            send_every_s: Least time between two batches.
            retry_every_s: Least time between two attempts while the store does not answer.
        """
        self._uri, self._experiment, self._artifacts = uri, experiment, artifacts
        self._send_every_s, self._retry_every_s = send_every_s, retry_every_s
        self._run_id = ""
        self._metrics: list[Any] = []
        self._tags: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._next_send = 0.0
        self._has_warned = False
        self._client = self._connect()

    def start(
        self, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, resume: str | None = None
    ) -> str | None:
        labels = _labels(tags or {})
        try:
            if resume is not None and self._has_run(resume):
                self._run_id = resume
                self._client.update_run(resume, status=RunStatus.to_string(RunStatus.RUNNING))
                self._client.log_batch(resume, tags=[RunTag(key, value) for key, value in labels.items()])
                return self._run_id
            created = self._client.create_run(self._experiment_id(), run_name=run_name, tags=labels)
            self._run_id = created.info.run_id
            self._log_params(params)
        except _STORE_ERRORS as error:
            raise self._unreachable(error) from None
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._metrics += [Metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        if time.monotonic() >= self._next_send:
            self._send()

    def tag(self, tags: Mapping[str, str]) -> None:
        self._tags |= _labels(tags)

    def log_file(self, source: Path | str, name: str) -> None:
        self._files[name] = redacted(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        self._send()

    def register(self, model_path: str, name: str, tags: Mapping[str, str] | None = None) -> str | None:
        source = absolute(model_path)
        try:
            if _is_server(self._uri) and not is_uri(source):  # a server takes no version from a client's disk
                self._client.log_artifacts(self._run_id, source, "model")
                source = f"{self._client.get_run(self._run_id).info.artifact_uri}/model"
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = self._client.create_model_version(name, source, run_id=self._run_id, tags=_labels(tags or {}))
            self._client.set_registered_model_alias(name, CHALLENGER, version.version)
        except _STORE_ERRORS as error:
            raise RunFailed(f"the model is in {model_path} but is not registered as {name}: {_line(error)}") from None
        return str(version.version)

    def finish(self, status: Status) -> None:
        self._send()
        left = f"{len(self._metrics)} metric values and {len(self._files)} files"
        try:
            self._client.set_terminated(self._run_id, RunStatus.to_string(_STATUS[status]))
        except _STORE_ERRORS as error:
            logger.warning("MLflow at %s: the run could not be closed: %s", redacted(self._uri), _line(error))
        if self._metrics or self._files:
            logger.warning("MLflow at %s never took %s; they are in the run folder", redacted(self._uri), left)

    def _connect(self) -> Any:
        _quieten()
        try:
            return MlflowClient(tracking_uri=self._uri)
        except _STORE_ERRORS as error:
            raise self._unreachable(error) from None

    def _experiment_id(self) -> str:
        """The experiment's id. Several runs may create it at once: the first does, the others find it."""
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=self._artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id)

    def _has_run(self, run_id: str) -> bool:
        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow at %s no longer has run %s: a new one begins", redacted(self._uri), run_id)
            return False
        return True

    def _log_params(self, params: Mapping[str, Any]) -> None:
        entries = [
            Param(re.sub(r"[^\w\-./: ]", "_", key), _cut(redacted(str(value)), MAX_PARAM_VAL_LENGTH))
            for key, value in params.items()
        ]
        for start in range(0, len(entries), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self._run_id, params=entries[start : start + MAX_PARAMS_TAGS_PER_BATCH])

    def _send(self) -> None:
        """Send what has gathered. What the store does not take stays, in order, for the next time."""
        try:
            while self._metrics:
                self._client.log_batch(self._run_id, metrics=self._metrics[:MAX_METRICS_PER_BATCH])
                del self._metrics[:MAX_METRICS_PER_BATCH]
            if self._tags:
                self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in self._tags.items()])
                self._tags = {}
            for name in list(self._files):
                self._client.log_text(self._run_id, self._files[name], name)
                del self._files[name]
        except _STORE_ERRORS as error:
            self._next_send = time.monotonic() + self._retry_every_s
            if not self._has_warned:
                self._has_warned = True
                logger.warning("MLflow at %s fails, the run goes on: %s", redacted(self._uri), _line(error))
        else:
            self._next_send = time.monotonic() + self._send_every_s

    def _unreachable(self, error: BaseException) -> InputError:
        return InputError(
            f"tracking: cannot use MLflow at {redacted(self._uri)}: {_line(error)} (tracking.kind=none goes without)"
        )


def open_tracker(run: RunConfig) -> Tracker:
    """The tracker that a recipe asks for; nothing is written before `start`, but a local store is created.

    Raises:
        InputError: The store cannot be used, or `tracking.register_as` is no name for a model.
    """
    if run.tracking.kind == "none":
        return NoTracker()
    name = run.tracking.register_as
    if name is not None and (not name.strip() or set(name) & set("/:")):
        raise InputError(f"`tracking.register_as`: a model's name has no `/` and no `:`, got {name!r}")
    uri = tracking_uri(run)
    artifacts = None
    if not _is_server(uri):
        artifacts = f"{run.storage.path.rstrip('/')}/mlartifacts"
        if uri.startswith("sqlite:///"):
            folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
            Folder(str(folder)).check_writable()  # MLflow itself would try for minutes
            artifacts = str(folder / "mlartifacts")
        artifacts = absolute(artifacts)
    return MlflowTracker(uri, run.tracking.experiment, artifacts)


def tracking_uri(run: RunConfig) -> str:
    """The recipe's URI, else MLFLOW_TRACKING_URI, else a SQLite file: beside the runs, or here if those are remote."""
    folder = "." if is_uri(run.storage.path) else run.storage.path
    return run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{absolute(folder)}/mlflow.db"


def check_store(uri: str) -> None:
    """Ask a tracking store a small question.

    Raises:
        InputError: It cannot be used, and why.
    """
    _quieten()
    try:
        if uri.startswith("sqlite:///"):  # asking would create it
            Folder(str(Path(uri.removeprefix("sqlite:///")).absolute().parent)).check_writable()
        else:
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except _STORE_ERRORS as error:
        raise InputError(f"cannot use MLflow at {redacted(uri)}: {_line(error)}") from None


def registry_uri(name: str) -> str:
    """The registry that a model's name is looked up in: MLFLOW_TRACKING_URI, else the SQLite file beside the runs in
    `runs`, or here.

    Raises:
        InputError: There is none; names the model.
    """
    files = [Path("runs/mlflow.db"), Path("mlflow.db")]
    local = next((f"sqlite:///{file.absolute()}" for file in files if file.exists()), None)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local
    if uri is None:
        raise InputError(f"{name}: no MLflow registry here: set MLFLOW_TRACKING_URI")
    return uri


def registered_model(name: str) -> str:
    """The folder of `models:/name@alias` or `models:/name/version` in MLflow's registry; see `registry_uri`.

    Raises:
        InputError: There is no such model, or no registry.
    """
    uri = registry_uri(name)
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if match is None:
        raise InputError(f"{name} is no registered model: models:/NAME@ALIAS or models:/NAME/VERSION")
    _quieten()
    try:
        client = MlflowClient(uri)
        version = match[3] or client.get_model_version_by_alias(match[1], match[2]).version
        source = str(client.get_model_version(match[1], version).source).removeprefix("file://")
        if Path(source).is_dir():
            return source
        return str(download_artifacts(artifact_uri=client.get_model_version_download_uri(match[1], version)))
    except _STORE_ERRORS as error:
        raise InputError(f"{name} is not in the registry at {redacted(uri)}: {_line(error)}") from None


class ModelVersion(NamedTuple):
    """A version of a registered model."""

    number: str
    aliases: frozenset[str]
    tags: dict[str, str]


class ModelRegistry:
    """The versions of one registered model: what there is, and who is champion."""

    def __init__(self, name: str, uri: str | None = None) -> None:
        """
        Args:
            uri: Of the registry; None: `registry_uri`.
        """
        self.name, self._uri = name, uri or registry_uri(name)
        _quieten()
        self._client = MlflowClient(self._uri)

    def versions(self) -> list[ModelVersion]:
        """The newest first.

        Raises:
            InputError: There is no model of this name, or the registry cannot be asked.
        """
        try:
            aliases = self._client.get_registered_model(self.name).aliases
            found = self._client.search_model_versions(f"name = '{self.name}'")
        except _STORE_ERRORS as error:
            raise self._refused(error) from None
        named: dict[str, set[str]] = {}
        for alias, number in aliases.items():
            named.setdefault(str(number), set()).add(alias)
        versions = [ModelVersion(str(v.version), frozenset(named.get(str(v.version), ())), dict(v.tags)) for v in found]
        return sorted(versions, key=lambda version: int(version.number), reverse=True)

    def promote(self, number: str, former: str | None, tags: Mapping[str, str]) -> None:
        """Make a version the champion, and write down why.

        The tags go first: who reads `champion` finds them there.

        Args:
            former: The champion so far, which becomes the previous one.

        Raises:
            InputError: The registry did not take it.
        """
        try:
            for key, value in _labels(tags).items():
                self._client.set_model_version_tag(self.name, number, key, value)
            if former is not None and former != number:
                self._client.set_registered_model_alias(self.name, PREVIOUS_CHAMPION, former)
            self._client.set_registered_model_alias(self.name, CHAMPION, number)
        except _STORE_ERRORS as error:
            raise self._refused(error) from None

    def _refused(self, error: BaseException) -> InputError:
        return InputError(f"registered model {self.name} at {redacted(self._uri)}: {_line(error)}")


def recipe_params(run: RunConfig) -> dict[str, str]:
    """A resolved recipe as flat parameters: dotted keys as in overrides, values as in YAML."""
    return dict(_flat(run.model_dump(mode="json"), ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{key}.{index}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value)


def _labels(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as a store takes them."""
    return {key: _cut(redacted(str(value)), MAX_TAG_VAL_LENGTH) for key, value in tags.items()}


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - len(_CUT)] + _CUT


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks", "uc:"))


def _line(error: BaseException) -> str:
    """What the operating system said, if it is behind the error (`Connection refused`), else the error's message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return _cut(redacted(" ".join(str(error).split())), 300)


def _quieten() -> None:
    """The first use of a database logs every migration to stderr, and a dead server every attempt."""
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
