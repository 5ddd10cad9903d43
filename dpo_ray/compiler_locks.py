"""Locks that a killed compilation leaves behind, on which every later one would wait for ever, without a word.

torch compiles DeepSpeed's operators on their first use, under a file `lock` in its cache that it removes when it is
done. A worker that dies meanwhile leaves it there.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Age from which a lock that nobody here holds is nobody's; before, another machine may hold it on a shared disk."""


def clear_compiler_locks(cache: Path | None = None, patience_s: float = PATIENCE_S) -> list[Path]:
    """Remove the locks that no compilation holds any more, after waiting for those that are too young to tell.

    Args:
        cache: torch's cache of extensions; None: where it is here.

    Returns:
        Those that were removed.
    """
    return [lock for lock in _locks(cache or _cache()) if _clear(lock, patience_s)]


def _clear(lock: Path, patience_s: float) -> bool:
    told = False
    while not _is_held(lock):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return False
        if age > patience_s:
            lock.unlink(missing_ok=True)
            logger.warning("removed %s: the process that compiled there is gone", lock)
            return True
        if not told:
            logger.warning("%s: nobody here compiles there; waiting %.0f s for another machine", lock, patience_s - age)
            told = True
        time.sleep(min(1.0, patience_s / 10))
    return False


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as the one that compiles does."""
    return os.path.realpath(lock) in _open_files()


def _open_files() -> Iterator[str]:
    """Of all processes that we may look at; a process, or a file of it, may be gone meanwhile."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(PermissionError, FileNotFoundError, ProcessLookupError):
            yield os.readlink(handle)


def _locks(cache: Path) -> list[Path]:
    return sorted([*cache.glob("*/lock"), *cache.glob("*/*/lock")])


def _cache() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
