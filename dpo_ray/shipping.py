"""What goes along with a job: files, within Ray's limit, and variables. Secrets are files too, see `job_env`."""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from dpo_ray import __version__, job_env
from dpo_ray.errors import InputError

MAX_BYTES = 100 * 2**20
"""Ray takes no larger upload."""
OWN = ".dpo-ray"
"""Folder of the recipe and the secrets in what is shipped."""
CODE = ("dpo_ray", "serve", "tune_spaces")
NEVER = [".git", ".venv", "venv", "__pycache__", "runs", "node_modules", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
IGNORE_FILES = (".gitignore", ".rayignore")

Files = Mapping[str, Path | bytes]
"""Relative name -> file or content."""


def tree(folder: Path) -> dict[str, Path]:
    """The files below a folder, without what `.gitignore` and `.rayignore` there leave out, in the way that Ray does.

    Raises:
        InputError: There is no such folder.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    found: list[Path] = []
    _dir_travel(folder.absolute(), [_get_excludes(folder, NEVER)], found.append, include_gitignore=True)
    files = (path for path in found if path.is_file() and path.name not in IGNORE_FILES)
    return {str(path.relative_to(folder.absolute())): path for path in sorted(files)}


def check_size(files: Files) -> None:
    """Refuse what Ray would not take.

    Raises:
        InputError: Names the largest files.
    """
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if sum(sizes.values()) > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise InputError(
            f"{_mib(sum(sizes.values()))} in {len(sizes)} files would be shipped, and {_mib(MAX_BYTES)} is the limit; "
            f"the largest: {', '.join(f'{name} ({_mib(sizes[name])})' for name in largest)}. Name them in .rayignore, "
            "or give a smaller --working-dir"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def stage(files: Files, kept: Mapping[str, str], folder: Path) -> None:
    """Lay out what is shipped, with the secrets, in an empty folder."""
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    if kept:
        path = folder / OWN / "secrets.json"
        path.parent.mkdir(exist_ok=True)
        path.touch(0o600)
        path.write_bytes(job_env.dump(kept))


def code_files() -> dict[str, Path]:
    """This dpo-ray."""
    root = Path(__file__).parent.parent
    return {f"{name}/{file}": path for name in CODE for file, path in tree(root / name).items()}


def module_files(name: str) -> dict[str, Path]:
    """The files of the module in `module:NAME`: a file, or its whole package; none where it is installed.

    Raises:
        InputError: There is no such module.
    """
    top = name.partition(":")[0].partition(".")[0]
    if not top or top in CODE:
        return {}
    for folder in (os.getcwd(), *sys.path):
        package, file = Path(folder or ".") / top, Path(folder or ".") / f"{top}.py"
        if package.is_dir() or file.is_file():
            installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")]
            if any(package.absolute().is_relative_to(root) for root in installed):
                return {}
            return {f"{top}/{n}": p for n, p in tree(package).items()} if package.is_dir() else {file.name: file}
    if importlib.util.find_spec(top) is not None:
        return {}
    raise InputError(f"no module `{top}` here, for {name}")


def environment(given: Sequence[str]) -> dict[str, str]:
    """Variables from NAME=VALUE, or from NAME with the value that it has here.

    Raises:
        InputError: It is not set, or holds a secret.
    """
    found = {}
    for text in given:
        name, separator, value = text.partition("=")
        if job_env.is_secret(name):
            raise InputError(
                f"--env {name}: Ray writes such values into its logs; --secret {name} keeps it out of them"
            )
        if not separator and name not in os.environ:
            raise InputError(f"--env {name}: it is not set here; give {name}=VALUE")
        found[name] = value if separator else os.environ[name]
    return found


def read_secrets(given: Sequence[str]) -> dict[str, str]:
    """Secrets from NAME with the value that it has here, or from NAME=FILE.

    Raises:
        InputError: It is not set, or there is no such file; never says a value.
    """
    found = {}
    for text in given:
        name, separator, file = text.partition("=")
        if separator and not Path(file).is_file():
            raise InputError(f"--secret {name}=FILE: there is no such file; a value itself does not belong here")
        if not separator and not os.environ.get(name):
            raise InputError(f"--secret {name}: it is not set here; what the nodes have themselves needs no --secret")
        found[name] = Path(file).read_text().strip() if separator else os.environ[name]
    return found


def left_behind(kept: Iterable[str]) -> list[str]:
    """Secrets that are set here, that our libraries read, and that do not go along."""
    read = ("HF_TOKEN", "MLFLOW_TRACKING_*", "AWS_*", "OPENAI_API_KEY")
    return sorted(
        name
        for name in os.environ
        if job_env.is_secret(name) and name not in set(kept) and any(fnmatch(name, pattern) for pattern in read)
    )


def variables(given: Mapping[str, str], stop_seconds: float, has_secrets: bool) -> dict[str, str]:
    """The environment of a job: what was given, and what we need ourselves."""
    own = {
        job_env.VERSION_VARIABLE: __version__,
        # Ray gives a job 3 seconds after the signal; ours save a checkpoint, or finish answers.
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(stop_seconds)),
    }
    return {**given, **own, **({job_env.SECRETS_VARIABLE: f"{OWN}/secrets.json"} if has_secrets else {})}


def is_checkout() -> bool:
    """Whether this dpo-ray runs from a checkout, which may hold changes that no image has."""
    return (Path(__file__).parent.parent / "pyproject.toml").is_file()
