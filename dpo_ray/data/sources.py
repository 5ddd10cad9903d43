"""Rows from wherever pairs lie: files, folders, globs, any pyarrow filesystem, the Hugging Face Hub.

`read_rows` streams. A line that cannot be read is a row with an error, so that it can be named and counted; a file
that cannot be read at all is an `InputError`. What a row means is the business of `formats`.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dpo_ray.config import PromptFrom, SourceConfig
from dpo_ray.errors import InputError
from dpo_ray.storage import is_uri, locate

COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NOT_DATA = re.compile(r"(dataset_info|dataset_dict|state)\.json|cache-.*\.arrow")
"""What `datasets.save_to_disk` leaves beside the rows."""


class Row(NamedTuple):
    """One row of a source, or why it could not be read."""

    source: str
    number: int
    """Line where the row begins in a text file, else the record; from 1."""
    value: dict[str, Any] | None
    error: str | None = None


class File(NamedTuple):
    """A file to read: where it lies, and how messages name it."""

    filesystem: fs.FileSystem
    path: str
    shown: str


Numbered = Iterator[tuple[int, dict[str, Any] | None, str | None]]
"""`Row` without its source."""


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """All rows of a source, in the order of its files and lines.

    Raises:
        InputError: Nothing is there, or a file cannot be read, or the prompts of `prompt_from` are ambiguous.
    """
    files = _find(source.path, source.split)
    if files and (source.name or source.revision):
        raise InputError(f"{source.path} is on disk; `name` and `revision` are for data sets on the hub")
    rows = _file_rows(files) if files else _hub_rows(source)
    if source.columns:
        rows = (_renamed(row, source.columns) for row in rows)
    if source.prompt_from is not None:
        prompts, on = _prompts(source.prompt_from), source.prompt_from.on
        rows = (_with_prompt(row, prompts, on) for row in rows)
    return rows


def _find(path: str, split: str | None) -> list[File]:
    """The files behind a path; none where it is the name of a data set on the hub."""
    filesystem, inner = locate(path)
    kind = _info(filesystem, inner, path).type
    if kind == fs.FileType.File:
        if split is not None:
            raise InputError(f"{path} is one file; `split` is for folders and for data sets on the hub")
        if _suffixes(path)[0] not in READERS:
            raise InputError(
                f"{path} is of an unknown kind; known: {', '.join(READERS)}, also {', '.join(COMPRESSION)}"
            )
        return [File(filesystem, inner, path)]
    wildcard = re.search(r"\*" if is_uri(path) else r"[*?]", path)  # in a URI, `?` begins the filesystem's options
    if kind == fs.FileType.Directory:
        base, shown, pattern = inner.rstrip("/"), path.rstrip("/"), "**/*"
    elif wildcard:
        base = re.split(r"[*?]", inner, maxsplit=1)[0].rpartition("/")[0]
        shown = path[: wildcard.start()].rpartition("/")[0]
        pattern = inner[len(base) :].lstrip("/")
    else:
        if is_uri(path) or not may_be_hub_name(path):
            raise InputError(f"no data at {path}")
        return []
    wanted = _glob(pattern)
    in_split = re.compile(rf"(^|[/._-]){re.escape(split)}([/._-]|$)" if split else "")
    selector = fs.FileSelector(base, recursive="/" in pattern, allow_not_found=True)
    found = (PurePosixPath(f.path) for f in _info(filesystem, selector, path) if f.type == fs.FileType.File)
    names = sorted(
        name
        for name in (str(file.relative_to(base)) for file in found)
        if wanted.fullmatch(name) and in_split.search(name) and _is_data(name)
    )
    if not names:
        raise InputError(f"no data at {path}" + (f" of the split `{split}`" if split else ""))
    return [File(filesystem, str(PurePosixPath(base, name)), f"{shown}/{name}" if shown else name) for name in names]


def may_be_hub_name(path: str) -> bool:
    """Whether a path that leads nowhere on this disk can be the name of something on the hub."""
    is_file = path.startswith((".", "/", "~")) or _suffixes(path)[0] in READERS
    return not is_file and HUB_NAME.fullmatch(path) is not None


def _info(filesystem: fs.FileSystem, wanted: Any, path: str) -> Any:
    try:
        return filesystem.get_file_info(wanted)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot open {path}: {_one_line(error)}") from None


def _is_data(name: str) -> bool:
    """Neither hidden, nor unfinished, nor something else."""
    parts = name.split("/")
    is_hidden = any(part.startswith(".") for part in parts)
    return not is_hidden and not NOT_DATA.fullmatch(parts[-1]) and _suffixes(name)[0] in READERS


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` within a name, `**/` over any number of folders, also none."""
    escaped = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?")
    return re.compile(escaped.replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))


def _suffixes(name: str) -> tuple[str, str | None]:
    """The suffix that tells the kind of a file, and its compression."""
    path = Path(name)
    compression = COMPRESSION.get(path.suffix.lower())
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def _file_rows(files: list[File]) -> Iterator[Row]:
    for file in files:
        suffix, compression = _suffixes(file.path)
        try:
            for number, value, error in READERS[suffix](_open(file, suffix, compression)):
                yield Row(file.shown, number, value, error)
        except (OSError, pa.ArrowException) as broken:
            raise InputError(f"cannot read {file.shown}: {_one_line(broken)}") from None


def _open(file: File, suffix: str, compression: str | None) -> Any:
    if suffix in COLUMNAR:  # they need random access
        if compression is None:
            return file.filesystem.open_input_file(file.path)
        return pa.BufferReader(file.filesystem.open_input_stream(file.path, compression=compression).read())
    return io.BufferedReader(file.filesystem.open_input_stream(file.path, compression=compression))


def _json_lines(lines: Iterable[bytes]) -> Numbered:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield number, None, "not UTF-8"
        except (ValueError, RecursionError) as error:
            yield number, None, f"not JSON: {error}"
        else:
            yield (number, *_object(value))


def _object(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    return (value, None) if isinstance(value, dict) else (None, f"a row is an object, not {type(value).__name__}")


def _json(stream: io.BufferedReader) -> Numbered:
    """An array of objects, read whole, or an object per line."""
    content = stream.read()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_lines(content.split(b"\n"))
        return
    try:
        items = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield content.count(b"\n", 0, error.start) + 1, None, "not UTF-8"
    except (ValueError, RecursionError) as error:
        yield getattr(error, "lineno", 1), None, f"not JSON: {error}"
    else:
        yield from ((number, *_object(item)) for number, item in enumerate(items, 1))


def _table(delimiter: str) -> Callable[[Iterator[bytes]], Numbered]:
    def rows(lines: Iterator[bytes]) -> Numbered:
        csv.field_size_limit(sys.maxsize)
        text = (line.decode("utf-8", "surrogateescape") for line in lines)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
                "".join(cells).encode()
            except StopIteration:
                return
            except csv.Error as error:
                yield number, None, f"not a table row: {error}"
            except UnicodeEncodeError:
                yield number, None, "not UTF-8"
            else:
                if not header:
                    header = [cell.removeprefix("\ufeff") for cell in cells]
                elif len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True)), None
                elif cells:
                    yield number, None, f"{len(cells)} fields, but the header has {len(header)}"

    return rows


def _parquet(file: Any) -> Numbered:
    return _records(pq.ParquetFile(file).iter_batches(batch_size=256))


def _arrow(file: Any) -> Numbered:
    """Both IPC layouts: the file, and the stream that `datasets` writes."""
    magic = file.read(6)
    file.seek(0)
    if not magic:
        return iter(())
    if magic != b"ARROW1":
        return _records(iter(pa.ipc.open_stream(file)))
    reader = pa.ipc.open_file(file)
    return _records(reader.get_batch(i) for i in range(reader.num_record_batches))


def _records(batches: Iterator[Any]) -> Numbered:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield number, value, None


COLUMNAR: dict[str, Callable[[Any], Numbered]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".ipc": _arrow,
    ".feather": _arrow,
}
READERS: dict[str, Callable[[Any], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    **COLUMNAR,
}


def _hub_rows(source: SourceConfig) -> Iterator[Row]:
    import datasets  # slow to import, and files do not need it

    try:
        rows = datasets.load_dataset(
            source.path, name=source.name, revision=source.revision, split=source.split or "train"
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"no data at {source.path}, neither on disk nor on the hub: {_one_line(error)}") from None
    return (Row(source.path, number, dict(value)) for number, value in enumerate(rows, 1))


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """Our names beside the file's. A name that is no column is sought in lists of objects (a ranked list's scores)."""
    if row.value is None:
        return row
    value = dict(row.value)
    for ours, theirs in columns.items():
        inside = [key for key, items in value.items() if isinstance(items, list) and _hold(items, theirs)]
        if theirs in row.value:
            value[ours] = row.value[theirs]
        elif inside:
            for key in inside:
                value[key] = [{**item, ours: item[theirs]} if theirs in item else item for item in value[key]]
        else:
            return row._replace(value=None, error=f"no column `{theirs}`")
    return row._replace(value=value)


def _hold(items: list[Any], key: str) -> bool:
    return all(isinstance(item, dict) for item in items) and any(key in item for item in items)


def _prompts(join: PromptFrom) -> dict[str, Any]:
    prompts: dict[str, Any] = {}
    for row in read_rows(SourceConfig(path=join.path)):
        value, place = row.value or {}, f"{row.source}:{row.number}"
        if row.error or value.get(join.on) is None or value.get(join.column) is None:
            raise InputError(f"{place}: {row.error or f'needs `{join.on}` and `{join.column}`'}")
        key, prompt = str(value[join.on]), value[join.column]
        if prompts.setdefault(key, prompt) != prompt:
            raise InputError(f"{place}: a second, different `{join.column}` for the same `{join.on}`: {key}")
    return prompts


def _with_prompt(row: Row, prompts: dict[str, Any], on: str) -> Row:
    if row.value is None:
        return row
    if on not in row.value:
        return row._replace(value=None, error=f"no column `{on}` to find the prompt by")
    key = str(row.value[on])  # a number in JSON is text in CSV
    if key not in prompts:
        return row._replace(value=None, error=f"no prompt for `{on}`: {key}")
    return row._replace(value={**row.value, "prompt": prompts[key]})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
