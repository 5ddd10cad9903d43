"""Every kind of file gives the same rows; what cannot be read is named by its line, or its file."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from dpo_ray.config import PromptFrom, SourceConfig
from dpo_ray.data import sources
from dpo_ray.data.sources import Row, read_rows
from dpo_ray.errors import InputError

ROWS = [
    {"prompt": "What is 2 + 2?", "chosen": "Four,\nof course.", "rejected": "Fünf"},
    {"prompt": 'A "quoted", one', "chosen": "yes\tno", "rejected": " no"},
    {"prompt": "日本の首都は？", "chosen": "東京", "rejected": "🙂"},
]


def rows_of(path: Path | str, **options: object) -> list[Row]:
    return list(read_rows(SourceConfig.model_validate({"path": str(path), **options})))


def values_of(path: Path | str, **options: object) -> list[object]:
    rows = rows_of(path, **options)
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def json_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_array(rows: list[dict[str, str]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def table(delimiter: str) -> Callable[[list[dict[str, str]]], bytes]:
    def write(rows: list[dict[str, str]]) -> bytes:
        def quoted(cell: str) -> str:
            return '"' + cell.replace('"', '""') + '"'

        lines = [list(rows[0]), *([quoted(cell) for cell in row.values()] for row in rows)]
        return "".join(delimiter.join(line) + "\r\n" for line in lines).encode()

    return write


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def arrow(new_writer: Callable[..., object]) -> Callable[[list[dict[str, str]]], bytes]:
    def write(rows: list[dict[str, str]]) -> bytes:
        sink, content = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
        with new_writer(sink, content.schema) as writer:  # type: ignore[attr-defined]
            writer.write_table(content, max_chunksize=2)
        return sink.getvalue().to_pybytes()

    return write


KINDS = {
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "lines.json": json_lines,
    "array.json": json_array,
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.parquet": parquet,
    "file.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows_also_compressed(tmp_path: Path, name: str):
    content = KINDS[name](ROWS)
    zstd = pa.compress(content, codec="zstd", asbytes=True)
    for suffix, written in {
        "": content,
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".zst": zstd,
    }.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(written)
        assert values_of(path) == ROWS


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[:1])) + gzip.compress(json_lines(ROWS[1:])))
    assert values_of(tmp_path / "a.jsonl.gz") == ROWS


def test_a_row_is_named_by_the_line_it_begins_on_in_text_files_and_by_its_count_elsewhere(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + json_lines(ROWS[:1]) + b"  \n\r\n" + json_lines(ROWS[1:]))
    assert [row.number for row in rows_of(tmp_path / "a.jsonl")] == [2, 5, 6]
    (tmp_path / "a.csv").write_bytes(table(",")(ROWS))  # the first record has a line break in a cell
    assert [row.number for row in rows_of(tmp_path / "a.csv")] == [2, 4, 5]
    for name in ("array.json", "a.parquet", "file.arrow", "stream.arrow"):
        (tmp_path / name).write_bytes(KINDS[name](ROWS))
        assert [(row.source, row.number) for row in rows_of(tmp_path / name)] == [
            (str(tmp_path / name), n) for n in (1, 2, 3)
        ]


GOOD = b'{"a": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.jsonl", GOOD + b'{"a": \n' + GOOD, {2: "not JSON"}),
        ("a.jsonl", GOOD + b"\n" + b'{"a": "\xff"}\n' + GOOD, {3: "not UTF-8"}),
        ("a.jsonl", GOOD + b"[1, 2]\n" + b"null\n" + b'"x"\n', {2: "not list", 3: "not NoneType", 4: "not str"}),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", {2: "not JSON"}),
        ("a.jsonl", GOOD + b'{"a": "1"', {2: "not JSON"}),
        ("a.json", GOOD + b"oops\n", {2: "not JSON"}),
        ("a.json", b'[{"a": "1"},\n{"a": "1"},\n{"a" "1"}]', {3: "not JSON"}),
        ("a.json", b'\n[{"a": "1"},\n"\xff"]', {3: "not UTF-8"}),
        ("a.json", b'[{"a": "1"}, 7]', {2: "not int"}),
        ("a.csv", b'a,b\n1,2\n1,2,3\n"1\n",2\n1\n', {3: "3 fields", 6: "1 fields"}),
        ("a.csv", b'a,b\n1,"2"x\n1,2\n', {2: "not a table row"}),
        ("a.csv", b'a,b\n1,2\n1,\xff\n1,2\n1,"2\n', {3: "not UTF-8", 5: "not a table row"}),
        ("a.tsv", b"a\tb\n1\t2\n1,2\n", {3: "1 fields"}),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_malformed_row_is_an_error_with_its_line_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, bad: dict[int, str], is_compressed: bool
):
    path = tmp_path / (f"{name}.gz" if is_compressed else name)
    path.write_bytes(gzip.compress(content) if is_compressed else content)
    rows = rows_of(path)
    assert {row.number for row in rows if row.error} == set(bad)
    for row in rows:
        if row.error:
            assert row.value is None
            assert bad[row.number] in row.error
        else:
            assert row.value is not None
            assert row.value["a"].strip() == "1"


@given(st.binary(max_size=80), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv"]))
def test_no_text_file_raises_whatever_its_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    for row in rows_of(path):
        assert (row.value is None) == (row.error is not None)
        assert 1 <= row.number <= content.count(b"\n") + content.count(b"\r") + 1


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.parquet.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named_in_one_line(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"this is no such file, and long enough to look at\n" * 9)
    with pytest.raises(InputError, match=f"cannot read .*{name}: [^\n]+$"):
        rows_of(tmp_path / name)


def test_a_gzip_file_cut_short_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-20])
    with pytest.raises(InputError, match="cannot read"):
        rows_of(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.arrow"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    assert rows_of(tmp_path / name) == []


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + KINDS[name](ROWS))
    assert values_of(tmp_path / name) == ROWS


def test_a_large_parquet_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"n": n} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    read = []
    batches = pq.ParquetFile.iter_batches

    def recorded(self: pq.ParquetFile, **options: int) -> object:
        for batch in batches(self, **options):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    stream = read_rows(SourceConfig(path=str(tmp_path / "a.parquet")))
    assert next(stream).value == {"n": 0}
    assert sum(read) < 500
    assert [row.number for row in stream] == list(range(2, 1001))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One row in each file, saying where it stands."""
    for name in (
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.jsonl",
        "train/x.jsonl",
        "data/train-00000-of-00001.jsonl",
        "test/x.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"at": name}) + "\n")
    for name in ("README.md", ".hidden.jsonl", ".git/x.jsonl", "deep/.tmp-c.jsonl", "state.json", "dataset_info.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no rows\n")
    return tmp_path


def places(path: Path | str, **options: object) -> list[str]:
    return [row.value["at"] for row in rows_of(path, **options) if row.value]


def test_a_folder_is_read_whole_and_in_order_without_what_is_hidden_or_no_data(tree: Path):
    everything = [
        "a.jsonl",
        "b.jsonl",
        "data/train-00000-of-00001.jsonl",
        "deep/er/c.jsonl",
        "test/x.jsonl",
        "train/x.jsonl",
    ]
    assert places(tree) == everything
    assert places(f"{tree}/") == everything
    assert [row.source for row in rows_of(tree)] == [f"{tree}/{name}" for name in everything]


def test_a_split_of_a_folder_is_found_by_name(tree: Path):
    assert places(tree, split="train") == ["data/train-00000-of-00001.jsonl", "train/x.jsonl"]
    assert places(tree, split="test") == ["test/x.jsonl"]
    with pytest.raises(InputError, match="split `tr`"):
        places(tree, split="tr")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("t*/x.jsonl", ["test/x.jsonl", "train/x.jsonl"]),
        ("deep/**/*.jsonl", ["deep/er/c.jsonl"]),
        ("**/x.*", ["test/x.jsonl", "train/x.jsonl"]),
    ],
)
def test_a_glob_finds_files_on_disk_and_by_uri(tree: Path, pattern: str, found: list[str]):
    assert places(tree / pattern) == found
    if "?" not in pattern:
        rows = rows_of(f"file://{tree}/{pattern}")
        assert [row.source for row in rows] == [f"file://{tree}/{name}" for name in found]


def test_relative_paths_and_uris_lead_to_the_same_rows(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    for path in ("a.jsonl", "./a.jsonl", "deep/../a.jsonl", "~/a.jsonl", f"file://{tree}/a.jsonl"):
        assert [(row.source, row.value) for row in rows_of(path)] == [(path, {"at": "a.jsonl"})]
    assert [row.source for row in rows_of("?.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert places("deep/../deep") == ["deep/er/c.jsonl"]


def test_any_pyarrow_filesystem_will_do(tree: Path, monkeypatch: pytest.MonkeyPatch):
    store = fs.SubTreeFileSystem(str(tree), fs.LocalFileSystem())
    monkeypatch.setattr(sources, "locate", lambda path: (store, path.removeprefix("store://")))
    assert places("store://deep") == ["deep/er/c.jsonl"]
    assert places("store://t*/x.jsonl") == ["test/x.jsonl", "train/x.jsonl"]
    assert [row.source for row in rows_of("store://a.jsonl")] == ["store://a.jsonl"]


@pytest.mark.parametrize(
    "path",
    ["no.jsonl", "no/such.parquet", "./no", "../no", "~/no", "/no", "no/*.jsonl", "file:///no", "a b", "a/b/c", "*"],
)
def test_a_path_with_nothing_there_is_said_to_hold_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="no data at"):
        read_rows(SourceConfig(path=path))


def test_options_that_do_not_fit_a_file_are_refused(tree: Path):
    with pytest.raises(InputError, match="`name` and `revision`"):
        rows_of(tree / "a.jsonl", name="default")
    with pytest.raises(InputError, match="`split`"):
        rows_of(tree / "a.jsonl", split="train")
    with pytest.raises(InputError, match=r"README.md is of an unknown kind; known: .jsonl"):
        rows_of(tree / "README.md")
    with pytest.raises(InputError, match="cannot open"):
        rows_of("nowhere://x/y.jsonl")


class Hub:
    """Records what is asked of the hub."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []

    def load_dataset(self, path: str, **options: object) -> datasets.Dataset:
        self.asked.append((path, options))
        return datasets.Dataset.from_list(ROWS)


def test_a_name_that_is_no_path_is_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    monkeypatch.chdir(tmp_path)
    rows = rows_of("org/some-data_1.5", name="english", revision="abc", split="test_prefs")
    assert rows == [Row("org/some-data_1.5", n, value) for n, value in enumerate(ROWS, 1)]
    values_of("imdb")
    assert hub.asked == [
        ("org/some-data_1.5", {"name": "english", "revision": "abc", "split": "test_prefs"}),
        ("imdb", {"name": None, "revision": None, "split": "train"}),
    ]
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb/a.jsonl").write_bytes(json_lines(ROWS))
    assert len(values_of("imdb")) == 3
    assert len(hub.asked) == 2  # what is on disk is not asked for


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("no such\ndata set"),
        ConnectionError("no such\ndata set"),
        ValueError("no such\ndata set"),
        RuntimeError("no such\ndata set"),
    ],
)
def test_a_data_set_that_the_hub_does_not_give_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def load_dataset(path: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"^no data at org/data, neither on disk nor on the hub: no such data set$"):
        read_rows(SourceConfig(path="org/data"))


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert values_of(tmp_path / "saved", split="train") == ROWS
    assert values_of(tmp_path / "saved", split="test") == ROWS[:1]


def test_files_are_read_without_importing_datasets(tree: Path):
    code = f"import sys; from dpo_ray.data.sources import *; list(read_rows(SourceConfig(path={str(tree)!r})))"
    check = "; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=Path(__file__).parents[2])


def test_columns_get_our_names_beside_their_own(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"q": "Q", "good": "G", "chosen": "no", "rejected": "no"}\n{"good": "G"}\n')
    first, second = rows_of(tmp_path / "a.jsonl", columns={"prompt": "q", "chosen": "good", "rejected": "chosen"})
    assert first.value == {"q": "Q", "good": "G", "prompt": "Q", "chosen": "G", "rejected": "no"}
    assert second == Row(str(tmp_path / "a.jsonl"), 2, None, "no column `q`")


def test_columns_inside_a_list_of_objects_are_renamed_too(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"responses": [{"text": "x", "elo": 3}, {"text": "y"}], "prompt": "p"}\n')
    (row,) = rows_of(tmp_path / "a.jsonl", columns={"score": "elo"})
    assert row.value == {"responses": [{"text": "x", "elo": 3, "score": 3}, {"text": "y"}], "prompt": "p"}


def test_prompts_can_come_from_another_file(tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("id,text\n1,one\n2,two\n1,one\n")
    (tmp_path / "a.jsonl").write_text('{"id": 2, "chosen": "x"}\n{"id": "1"}\n{"id": 3}\n{"chosen": "x"}\n[]\n')
    join = {"path": str(tmp_path / "prompts.csv"), "on": "id", "column": "text"}
    rows = rows_of(tmp_path / "a.jsonl", prompt_from=join)
    assert [row.value for row in rows[:2]] == [{"id": 2, "chosen": "x", "prompt": "two"}, {"id": "1", "prompt": "one"}]
    assert [row.error for row in rows[2:]] == [
        "no prompt for `id`: 3",
        "no column `id` to find the prompt by",
        "a row is an object, not list",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,one\n1,other\n", r"prompts.csv:3: a second, different `text` for the same `id`: 1"),
        ("id,txt\n1,one\n", r"prompts.csv:2: needs `id` and `text`"),
        ("id,text\n1\n", r"prompts.csv:2: 1 fields"),
    ],
)
def test_a_file_of_prompts_must_be_whole_and_unambiguous(tmp_path: Path, content: str, message: str):
    (tmp_path / "prompts.csv").write_text(content)
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    join = PromptFrom(path=str(tmp_path / "prompts.csv"), on="id", column="text")
    with pytest.raises(InputError, match=message):
        read_rows(SourceConfig(path=str(tmp_path / "a.jsonl"), prompt_from=join))
