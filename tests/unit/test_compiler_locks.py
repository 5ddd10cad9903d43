"""Locks of killed compilations go, those of living ones stay."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ray.compiler_locks import clear_compiler_locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu/op/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_of_a_process_that_was_killed_goes(tmp_path: Path, lock: Path):
    """As torch does: the file is made and kept open while it compiles."""
    lock.unlink()
    code = (
        f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print('locked', flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        old = time.time() - 1000
        os.utime(lock, (old, old))
        assert clear_compiler_locks(tmp_path) == []
        assert lock.exists(), "it compiles"
        process.kill()
        process.wait()
    assert clear_compiler_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_a_young_lock_is_waited_for_because_it_may_be_another_machines(tmp_path: Path, lock: Path):
    began = time.time()
    os.utime(lock, (began, began))
    assert clear_compiler_locks(tmp_path, patience_s=0.5) == [lock]
    assert time.time() - began >= 0.5


def test_torch_waits_on_the_file_that_we_look_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The name of the lock is torch's own business: here it is seen."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(cpp_extension._get_build_directory("an_operator", verbose=False))
    baton = cpp_extension.FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    assert clear_compiler_locks(patience_s=0) == []
    assert (folder / "lock").exists()
    baton.release()
    (folder / "lock").touch()
    assert clear_compiler_locks(patience_s=-1) == [folder / "lock"]


def test_a_cache_that_is_not_there_has_no_locks(tmp_path: Path):
    assert clear_compiler_locks(tmp_path / "none") == []
