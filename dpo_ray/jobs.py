"""Ray Jobs: send a job, find it again, follow its log through lost connections, stop it, say how it ended.

A job that is submitted again is not started twice: one that runs or is done is followed, one that broke off goes on as
its next attempt. Ray's own ids cannot be used again, so an attempt has a number behind the job's id.
"""

import asyncio
import json
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from dpo_ray import __version__
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.shipping import stage, variables
from dpo_ray.submit import Job

OLDEST_RAY = "2.59"
CONNECT_S, ANSWER_S, AGENT_S = 10, 120, 60
SILENCE_S = 60.0
"""A log that has said nothing for so long is asked for anew: a lost connection may look like silence."""
PATIENCE_S = 600.0
"""A cluster that has not answered for so long is given up."""
RUNNING, ENDED = ("PENDING", "RUNNING"), ("SUCCEEDED", "FAILED", "STOPPED")
OUR_CODES = (2, 3, 130)

Say = Callable[[str], object]


class Attempt(NamedTuple):
    """One Ray job of ours."""

    id: str
    job: str
    """Id of the job that this is an attempt of."""
    command: str
    status: str
    exit_code: int | None
    message: str
    started: float
    """Seconds since 1970."""
    ended: float | None
    line: str
    """The command line."""

    @property
    def is_running(self) -> bool:
        return self.status in RUNNING

    @property
    def code(self) -> int:
        """The exit code for the person who waits: the command's own where it is one of ours."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 130
        return self.exit_code if self.exit_code in OUR_CODES else 3

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.status == "FAILED" and self.exit_code is None:  # not our command's fault: Ray says why
            return f"failed: {' '.join(self.message.split())[:300]}"
        told = f" with exit code {self.exit_code}" if self.exit_code else ""
        return f"{self.status.lower()}{told}"


class Step(NamedTuple):
    """What a submission comes to: an attempt that is there, or a new one."""

    follow: Attempt | None
    number: int = 1
    goes_on: bool = False
    """The new attempt takes up what the last one left."""


def next_step(attempts: Sequence[Attempt], again: bool = False) -> Step:
    """What to do about a job with these attempts, oldest first.

    Raises:
        InputError: It is to be started again, and still runs.
    """
    if not attempts:
        return Step(None)
    last = attempts[-1]
    if again and last.is_running:
        raise InputError(f"{last.id} still runs: dpo-ray jobs stop {last.id}, then --again")
    if last.is_running or (last.status == "SUCCEEDED" and not again):
        return Step(last)
    return Step(None, len(attempts) + 1, last.status != "SUCCEEDED")


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's, with an end to waiting."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)


class Cluster:
    """The jobs of a cluster.

    Args:
        address: Of its dashboard, such as http://HEAD:8265; None: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Raises:
        InputError: Nothing answers there, or it refuses the token, or its Ray is too old.
    """

    def __init__(self, address: str | None) -> None:
        self.url = _url(address)
        for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # or Ray's client takes RAY_ADDRESS, whatever it is told
        with self._asked():
            self._client = _Client(self.url)
            self.ray_version = str(self._client._server_ray_version)
        if Version(self.ray_version) < Version(OLDEST_RAY):
            raise InputError(f"{self.url} runs Ray {self.ray_version}; dpo-ray needs {OLDEST_RAY} or newer there")

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Say in one line what is wrong with the cluster, or the address, or the token."""
        try:
            yield
        except AuthenticationError as error:
            told = str(error).split("\n")[0].partition(". Ensure")[0]
            raise InputError(
                f"{self.url} refuses us: {told}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file of the "
                "cluster's token"
            ) from None
        except (ConnectionError, requests.ConnectionError, requests.Timeout):
            raise InputError(f"no Ray cluster answers at {self.url}") from None
        except requests.RequestException as error:
            raise InputError(f"{self.url} is no dashboard of Ray: {' '.join(str(error).split())[:200]}") from None
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if "does not exist" in text:
                raise InputError(f"{self.url} has no such job; dpo-ray jobs list") from None
            if "404" in text:
                raise InputError(f"{self.url} is no dashboard of Ray (often on port 8265), or too old a one") from None
            raise InputError(f"{self.url}: {text[:300]}") from None

    def is_this_machine(self) -> bool:
        """Whether every node runs here, so that it sees our files. A loopback address alone says nothing: it may be a
        tunnel."""
        with self._asked():
            answer = self._client._do_request("GET", "/nodes?view=summary")
        if answer.status_code != 200:
            return False
        nodes = [node for node in answer.json()["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
        return bool(nodes) and all(node["hostname"] == socket.gethostname() and is_ours(node["ip"]) for node in nodes)

    def attempts(self) -> list[Attempt]:
        """Every job of ours on the cluster, oldest first."""
        with self._asked():
            found = self._client.list_jobs()
        ours = (attempt_of(details) for details in found if "dpo-ray-job" in (details.metadata or {}))
        return sorted(ours, key=lambda attempt: attempt.started)

    def attempt(self, job_id: str) -> Attempt:
        with self._asked():
            return attempt_of(self._client.get_job_info(job_id))

    def submit(
        self,
        job: Job,
        *,
        given: Mapping[str, str],
        kept: Mapping[str, str],
        cpus: float | None = None,
        gpus: float | None = None,
        again: bool = False,
        say: Say = lambda text: None,
    ) -> str:
        """Start a job, or the next attempt of it, or find the one that runs or is done; the attempt's id.

        Args:
            given, kept: Environment and secrets.
            cpus, gpus: Of the node that the command itself runs on; None: it runs on the head.
        """
        step = next_step([one for one in self.attempts() if one.job == job.id], again)
        if step.follow is not None:
            there = step.follow
            is_done = "" if there.is_running else " (--again starts it anew)"
            say(f"{there.id} is there already: {there.ending}{is_done}")
            return there.id
        attempt_id = job.id if step.number == 1 else f"{job.id}-{step.number}"
        words = (*job.words, *(job.resume if step.goes_on else ()))
        environment: dict[str, Any] = {"env_vars": variables(given, job.stop_seconds, bool(kept))}
        if kept:
            environment["worker_process_setup_hook"] = "dpo_ray.job_env.load"
        with tempfile.TemporaryDirectory(prefix="dpo-ray-") as folder, self._asked():
            stage(job.files, kept, Path(folder))
            is_new = self._send(
                entrypoint=shlex.join(("dpo-ray", *words)),
                submission_id=attempt_id,
                runtime_env={"working_dir": folder, **environment},
                metadata={"dpo-ray": __version__, "dpo-ray-job": job.id, "command": job.command},
                entrypoint_num_cpus=cpus,
                entrypoint_num_gpus=gpus,
            )
        if not is_new:
            say(f"{attempt_id} was submitted by someone else meanwhile")  # of equal content: it is this job
            return attempt_id
        size = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in job.files.values())
        say(f"submitted {attempt_id} to {self.url} ({len(job.files)} files, {size / 1024:.0f} KiB)")
        return attempt_id

    def _send(self, **request: Any) -> bool:
        """Hand a job to Ray; whether there was none of its id. A head that has just started has no agent yet."""
        until = time.monotonic() + AGENT_S
        while True:
            try:
                self._client.submit_job(**request)
                return True
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                if "try again later" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(1)

    def stop(self, job_id: str, say: Say) -> Attempt:
        """Ask a job to save and end, and wait until it has."""
        attempt = self.attempt(job_id)
        if attempt.is_running:
            with self._asked():
                self._client.stop_job(job_id)
            say(f"asked {job_id} to save and end")
        while (attempt := self.attempt(job_id)).is_running:
            time.sleep(1)
        return attempt

    def log(self, job_id: str) -> str:
        with self._asked():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], object], say: Say) -> Attempt:
        """Write a job's log from its beginning, as it grows, until the job has ended.

        The log is sent anew after every lost connection; what was written already is left out by its length, so that no
        line is lost and none comes twice.

        Raises:
            RunFailed: The cluster does not answer any more, or no longer knows the job.
        """
        written, heard_at, is_lost = 0, time.monotonic(), False

        def take(text: str, begin: int) -> int:
            nonlocal written, heard_at, is_lost
            heard_at, is_lost = time.monotonic(), False
            write(text[max(0, written - begin) :])
            written = max(written, begin + len(text))
            return begin + len(text)

        async def tail() -> None:
            stream, place = self._client.tail_job_logs(job_id).__aiter__(), 0
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):  # `wait_for` may swallow Ctrl-C (Python 3.11)
                        text = await anext(stream)
                except StopAsyncIteration:
                    return
                place = take(text, place)

        while True:
            try:
                asyncio.run(tail())
            except TimeoutError:
                pass
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                if not is_lost:
                    say(f"lost the log ({type(error).__name__}); trying again")
                is_lost = True
            try:
                attempt = self.attempt(job_id)
                heard_at = time.monotonic()
                if not attempt.is_running:
                    with suppress(InputError):  # the log is gone with its node
                        take(self.log(job_id), 0)
                    return attempt
            except InputError as error:
                if "no such job" in str(error):
                    raise RunFailed(
                        f"the cluster no longer knows {job_id} (a new head?); submit it with --resume behind `--`"
                    ) from None
                if time.monotonic() - heard_at > PATIENCE_S:
                    raise RunFailed(
                        f"{error}, for {PATIENCE_S / 60:g} minutes now; the job may go on: dpo-ray jobs logs --follow "
                        f"{job_id}"
                    ) from None
            time.sleep(2)


def attempt_of(details: Any) -> Attempt:
    """What we tell of a job: never its environment."""
    metadata = details.metadata or {}
    return Attempt(
        id=details.submission_id or details.job_id,
        job=metadata.get("dpo-ray-job", ""),
        command=metadata.get("command", ""),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        line=details.entrypoint,
    )


def result_in(log: str) -> Any:
    """The JSON that a command with `--json` has printed among the lines of its log; None: there is none."""
    place = f"\n{log}".rfind("\n{\n")
    if place < 0:
        return None
    try:
        return json.JSONDecoder().raw_decode(log[place:])[0]
    except json.JSONDecodeError:
        return None


def _url(address: str | None) -> str:
    found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if urlsplit(found).scheme not in ("http", "https") or not urlsplit(found).hostname:
        what = f"{found} is not one" if found else "there is none"
        raise InputError(
            f"jobs go to the address of a cluster's dashboard, such as http://HEAD:8265, and {what}: give --address, "
            "or set RAY_ADDRESS"
        )
    return found.rstrip("/")


def is_ours(ip: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True
