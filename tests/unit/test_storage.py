"""Local paths and URIs behave alike, and a file is whole or not there."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from dpo_ray import storage
from dpo_ray.errors import InputError
from dpo_ray.storage import Folder, absolute, locate, read_lines


@pytest.fixture(params=["local", "uri"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """The same place, named as a path and as a URI."""
    return Folder(str(tmp_path / "run") if request.param == "local" else (tmp_path / "run").as_uri())


def test_what_is_written_is_read(folder: Folder):
    folder.write("a/b.bin", b"\x00\xff")
    folder.write_json("c.json", {"ü": [1, None]})
    assert folder.read("a/b.bin") == b"\x00\xff"
    assert (folder / "a").read("b.bin") == b"\x00\xff"
    assert folder.read_json("c.json") == {"ü": [1, None]}
    assert "ü" in folder.read("c.json").decode()


def test_compressed_names_are_bytes_like_any_other(folder: Folder):
    folder.write("a.gz", b"not gzip")
    assert folder.read("a.gz") == b"not gzip"


def test_writing_again_replaces(folder: Folder):
    folder.write("a", b"a long first version")
    folder.write("a", b"short")
    assert folder.read("a") == b"short"
    assert folder.names() == ["a"]


def test_names_are_relative_sorted_and_without_unfinished_files(folder: Folder, tmp_path: Path):
    for name in ("b", "a", "below/c", "below/deeper/d"):
        folder.write(name, b"x")
    (tmp_path / "run" / ".tmp-e-12345678").write_bytes(b"half")
    (tmp_path / "run" / "below" / ".tmp-f-12345678").write_bytes(b"half")
    assert folder.names() == ["a", "b"]
    assert folder.names(recursive=True) == ["a", "b", "below/c", "below/deeper/d"]
    assert folder.folders() == ["below"]


def test_a_folder_that_is_not_there_is_empty(folder: Folder):
    assert (folder.exists(), folder.names(), folder.folders()) == (False, [], [])
    folder.write("a", b"x")
    assert (folder.exists(), folder.exists("a"), folder.exists("b")) == (True, True, False)


def test_appending_adds_lines_in_order(folder: Folder):
    for line in ('{"step": 1}', '{"step": 2}', '{"text": "ü"}'):
        folder.append("below/metrics.jsonl", line)
    assert list(read_lines(folder.read("below/metrics.jsonl"))) == [{"step": 1}, {"step": 2}, {"text": "ü"}]


def test_a_line_cut_short_by_a_crash_is_no_line():
    assert list(read_lines(b'{"step": 1}\n\n{"step": 2}\n{"step')) == [{"step": 1}, {"step": 2}]
    assert list(read_lines(b"")) == []


def test_deleting_takes_files_and_folders_and_minds_nothing_missing(folder: Folder):
    folder.write("a", b"x")
    folder.write("below/b", b"x")
    folder.delete("a")
    folder.delete("below")
    folder.delete("never")
    assert folder.names(recursive=True) == []
    folder.delete()
    assert not folder.exists()


def test_a_folder_is_copied_whole(folder: Folder, tmp_path: Path):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "below" / "b").write_bytes(b"2")
    for place in (str(source), source.as_uri()):
        (folder / "copy").copy_from(place)
        assert (folder / "copy").names(recursive=True) == ["a", "below/b"]
        assert (folder / "copy").read("below/b") == b"2"
        folder.delete("copy")


def test_fetching_a_local_file_copies_nothing(tmp_path: Path):
    folder = Folder(str(tmp_path))
    folder.write("a", b"x")
    assert folder.fetch("a", tmp_path / "cache") == tmp_path / "a"
    assert not (tmp_path / "cache").exists()


def test_fetching_from_a_uri_copies_once(tmp_path: Path):
    folder, cache = Folder((tmp_path / "run").as_uri()), tmp_path / "cache"
    folder.write("a", b"first")
    folder.write("b", b"other")
    path = folder.fetch("a", cache)
    assert path.read_bytes() == b"first"
    assert folder.fetch("b", cache).read_bytes() == b"other"
    folder.write("a", b"second")
    assert folder.fetch("a", cache) == path
    assert path.read_bytes() == b"first"
    assert len(list(cache.iterdir())) == 2


class FullDisk(fs.FSSpecHandler):
    """The local disk, of which half of every file fits."""

    def __init__(self) -> None:
        import fsspec

        super().__init__(fsspec.filesystem("file"))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(HalfFile(path), mode="w")


class HalfFile:
    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115, the stream's owner closes it

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: bytes) -> int:
        self._file.write(bytes(content)[: len(content) // 2])
        self._file.flush()
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Folder(str(tmp_path))
    folder.write("a", b"old")
    full = fs.PyFileSystem(FullDisk())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "locate", lambda path: (full, path))
        with pytest.raises(InputError, match=r"cannot write .*/a: .*No space left on device"):
            folder.write("a", b"new and longer")
        with pytest.raises(InputError, match="No space left"):
            folder.check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert folder.read("a") == b"old"


def test_a_place_that_cannot_be_written_is_an_input_error(folder: Folder, tmp_path: Path):
    (tmp_path / "run").write_bytes(b"a file where a folder should be")
    with pytest.raises(InputError, match="cannot write") as caught:
        folder.check_writable()
    assert "\n" not in str(caught.value)


def test_a_writable_place_keeps_no_trace_of_the_check(folder: Folder):
    folder.check_writable()
    assert folder.names() == []


def test_an_unknown_filesystem_is_an_input_error():
    with pytest.raises(InputError, match="cannot open gopher://x/y"):
        locate("gopher://x/y")


def test_a_local_path_means_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/a/")
    monkeypatch.chdir("/")
    assert folder.path == str(tmp_path / "runs" / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/runs") == str(tmp_path / "runs")
    assert absolute("s3://bucket/runs") == "s3://bucket/runs"
