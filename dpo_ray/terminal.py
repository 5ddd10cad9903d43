"""How every command talks: errors as one line and an exit code, messages on stderr, the result on stdout."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console

from dpo_ray.errors import InputError, RunFailed

console = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a person can act on into one line and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except RunFailed as error:
            console.print(f"failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(3) from None
        except KeyboardInterrupt:
            console.print("interrupted")
            raise typer.Exit(130) from None

    return run


@contextmanager
def result_stream(as_json: bool) -> Iterator[Callable[[Any, Callable[[Any], None]], None]]:
    """Gives `emit(result, show)`. With JSON, stdout belongs to the result alone; all else goes to stderr."""
    if not as_json:
        yield lambda result, show: show(result)
        return
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def emit(result: Any, show: Callable[[Any], None]) -> None:
        os.write(real, (json.dumps(result, indent=2) + "\n").encode())

    try:
        yield emit
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def say(text: str, style: str | None = None) -> None:
    """A line as it is."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
