"""Files on local disk or any pyarrow filesystem: where a path leads, and writes that are whole or not there.

Every path that a recipe names goes through `Folder`. Local paths and URIs (`s3://`, `gs://`, `hdfs://`) behave alike.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dpo_ray.errors import InputError


def is_uri(path: str) -> bool:
    return "://" in path


def redacted(text: str) -> str:
    """The text without user and password in its URIs."""
    return re.sub(r"(\w://)[^\s/@\"']+@", r"\1***@", text)


def absolute(path: str) -> str:
    """A local path made absolute, so that it means the same in every process; a URI stays as it is."""
    return path if is_uri(path) else str(Path(path).expanduser().absolute())


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or URI, and the path on it.

    Raises:
        InputError: No such filesystem, or its credentials are missing.
    """
    if not is_uri(path):
        return fs.LocalFileSystem(), absolute(path)
    try:
        filesystem, inner = fs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"cannot open {path}: {_one_line(error)}") from None
    return filesystem, inner


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem; names below it are relative, with `/`."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", absolute(self.path).rstrip("/"))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.path}/{name}")

    @property
    def is_local(self) -> bool:
        return not is_uri(self.path)

    def exists(self, name: str = "") -> bool:
        filesystem, inner = self._at(name)
        return bool(filesystem.get_file_info(inner).type != fs.FileType.NotFound)

    def names(self, recursive: bool = False) -> list[str]:
        """Files below this folder, relative and sorted, without unfinished writes; none if it does not exist."""
        return sorted(self.sizes(recursive))

    def sizes(self, recursive: bool = True) -> dict[str, int]:
        """Files below this folder with their bytes; otherwise as `names`."""
        filesystem, inner = self._at()
        found = filesystem.get_file_info(fs.FileSelector(inner, recursive=recursive, allow_not_found=True))
        root = PurePosixPath(inner.lstrip("/"))
        return {
            str(PurePosixPath(file.path.lstrip("/")).relative_to(root)): file.size
            for file in found
            if file.type == fs.FileType.File and not file.base_name.startswith(".tmp-")
        }

    def folders(self) -> list[str]:
        """Folders directly below this one."""
        filesystem, inner = self._at()
        found = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        return sorted(f.base_name for f in found if f.type == fs.FileType.Directory)

    def read(self, name: str) -> bytes:
        filesystem, inner = self._at(name)
        with filesystem.open_input_stream(inner, compression=None) as stream:
            return bytes(stream.read())

    def chunks(self, name: str, num_bytes: int = 2**24) -> Iterator[bytes]:
        """The content of a file that need not fit into memory."""
        filesystem, inner = self._at(name)
        with filesystem.open_input_stream(inner, compression=None) as stream:
            while chunk := stream.read(num_bytes):
                yield chunk

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file: under another name first, then moved, so that a reader never sees a part of it.

        Raises:
            InputError: The place cannot be written, or is full.
        """
        filesystem, inner = self._at(name)
        parent, _, base = inner.rpartition("/")
        unfinished = f"{parent}/.tmp-{base}-{uuid.uuid4().hex[:8]}"
        try:
            filesystem.create_dir(parent, recursive=True)
            try:
                with filesystem.open_output_stream(unfinished, compression=None) as stream:
                    stream.write(content)
                filesystem.move(unfinished, inner)
            except OSError:
                if filesystem.get_file_info(unfinished).type != fs.FileType.NotFound:
                    filesystem.delete_file(unfinished)
                raise
        except OSError as error:
            raise InputError(f"cannot write {self.path}/{name}: {_one_line(error)}") from None

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSONL file; otherwise as `write`."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, name: str, line: str) -> None:
        """Add a line; one that a crash has cut short is taken away first.

        Object stores cannot append, so there the whole (small) file is written again.
        """
        if self.is_local:
            path = Path(self.path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                file.write(line.encode() + b"\n")
        else:
            before = self.read(name) if self.exists(name) else b""
            self.write(name, before[: before.rfind(b"\n") + 1] + line.encode() + b"\n")

    def delete(self, name: str = "") -> None:
        """Remove a file or folder; nothing happens if it is not there."""
        filesystem, inner = self._at(name)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(inner)
        elif kind == fs.FileType.File:
            filesystem.delete_file(inner)

    def copy_from(self, source: str) -> None:
        """Copy a folder (local or URI) into this one."""
        filesystem, inner = self._at()
        from_filesystem, from_inner = locate(source)
        filesystem.create_dir(inner, recursive=True)
        fs.copy_files(from_inner, inner, source_filesystem=from_filesystem, destination_filesystem=filesystem)

    def fetch(self, name: str, cache: Path) -> Path:
        """A local path of a file: itself on local disk, else a copy in `cache`, made once."""
        if self.is_local:
            return Path(self.path) / name
        target = cache / hashlib.blake2b(f"{self.path}/{name}".encode(), digest_size=16).hexdigest()
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(f".tmp-{uuid.uuid4().hex}")
            unfinished.write_bytes(self.read(name))
            os.replace(unfinished, target)
        return target

    def check_writable(self) -> None:
        """Write and remove a small file, so that a run learns at its start that it could not save.

        Raises:
            InputError: As `write`.
        """
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        self.write(probe, b"x")
        self.delete(probe)

    def _at(self, name: str = "") -> tuple[fs.FileSystem, str]:
        return locate(f"{self.path}/{name}" if name else self.path)


def read_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a last line cut short by a crash is not one."""
    for line in content.split(b"\n")[:-1]:
        if line.strip():
            yield json.loads(line)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
