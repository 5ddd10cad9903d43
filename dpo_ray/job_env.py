"""What a job is told by its environment: its secrets, and which dpo-ray has submitted it.

Secrets travel as a file beside the recipe, never as variables of Ray's `runtime_env`: Ray writes those into a log of
every node, and hands them to everyone who may list jobs.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_ray import __version__

SECRETS_VARIABLE = "DPO_RAY_SECRETS"
"""Names the file, relative to the folder that a job's processes start in."""
VERSION_VARIABLE = "DPO_RAY_SUBMITTED_BY"
WORDS = {"TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, such as HF_TOKEN."""
    return bool(WORDS & set(name.upper().split("_")))


def dump(values: Mapping[str, str]) -> bytes:
    return json.dumps(dict(values)).encode()


def load() -> None:
    """Set the variables of the job's secrets; the command does it first of all, and so does every worker of the job."""
    name = os.environ.get(SECRETS_VARIABLE)
    if name and Path(name).is_file():
        path = Path(name)
        path.chmod(0o600)  # an archive does not keep it
        os.environ.update(json.loads(path.read_bytes()))


def version_notice() -> Iterator[str]:
    """What a job says that another version has submitted than the one that runs it."""
    by = os.environ.get(VERSION_VARIABLE, __version__)
    if by != __version__:
        yield f"submitted by dpo-ray {by}, run by {__version__}: --ship-code sends the former"
