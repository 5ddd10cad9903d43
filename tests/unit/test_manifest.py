"""A folder is whole, or the file that is missing, cut or changed is named."""

import json
import shutil
from pathlib import Path

import pytest

from dpo_ray import manifest
from dpo_ray.manifest import Damaged, Stamp
from dpo_ray.storage import Folder

FILES = {
    0: {"state.json": b'{"step": 7}', "model/a.safetensors": bytes(100), "shards/00000-0000.safetensors": b"weights"},
    1: {"rng-00001.safetensors": b"random", "shards/00001-0000.safetensors": bytes(range(256)) * 100},
}
MANIFESTS = ["manifest-00000.json", "manifest-00001.json"]
NAMES = [*FILES[0], *FILES[1], *MANIFESTS]


def written_by(rank: int, folder: Path, step: int = 7, world_size: int = 2) -> Path:
    """A rank's own folder."""
    for name, content in FILES[rank].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.seal(folder, rank, world_size, step=step, is_best=True)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The ranks' folders in one, as Ray brings them together."""
    for rank in FILES:
        shutil.copytree(written_by(rank, tmp_path / str(rank)), tmp_path / "merged", dirs_exist_ok=True)
    return tmp_path / "merged"


@pytest.fixture(params=["local", "uri"])
def folder(request: pytest.FixtureRequest, path: Path) -> Folder:
    return Folder(str(path) if request.param == "local" else path.as_uri())


def faults(folder: Folder) -> list[str]:
    """What is found wrong, by sizes and then by content."""
    try:
        return manifest.changed(folder, manifest.read(folder).files.items())
    except Damaged as fault:
        return [str(fault)]


def test_a_whole_folder_has_no_fault(folder: Folder):
    found = manifest.read(folder)
    assert (found.step, found.world_size, found.is_best) == (7, 2, True)
    assert found.files.keys() == {*FILES[0], *FILES[1]}
    assert found.files["shards/00000-0000.safetensors"] == Stamp(7, "bdbda1eb6e05adc4800d98e5524fefbc")
    assert faults(folder) == []


def test_a_manifest_tells_what_wrote_it(path: Path):
    import torch

    fields = json.loads((path / MANIFESTS[1]).read_text())
    assert (fields["format"], fields["rank"], fields["world_size"], fields["step"]) == (1, 1, 2, 7)
    assert fields["versions"].keys() == {"dpo-ray", "torch", "deepspeed"}
    assert fields["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder: Folder, path: Path, name: str):
    (path / name).unlink()
    assert faults(folder) == [f"{name} is missing"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", ["nothing", "half", "all but a byte"])
def test_a_cut_file_is_named(folder: Folder, path: Path, name: str, kept: str):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: {"nothing": 0, "half": len(content) // 2}.get(kept, -1)])
    (fault,) = faults(folder)
    assert fault.startswith(f"{name} has ")


@pytest.mark.parametrize("name", NAMES)
def test_any_changed_byte_is_named(path: Path, name: str):
    content = (path / name).read_bytes()
    for place in {*range(0, len(content), max(1, len(content) // 50)), len(content) - 1}:
        for flip in (1, 128):
            (path / name).write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            assert faults(Folder(str(path))) == [f"{name} has changed"], (place, flip)


def test_a_longer_file_is_named(folder: Folder, path: Path):
    (path / "state.json").write_bytes(FILES[0]["state.json"] + b" ")
    assert faults(folder) == ["state.json has 12 bytes instead of 11"]


def test_all_changed_files_are_named(folder: Folder, path: Path):
    files = manifest.read(folder).files
    (path / "state.json").write_bytes(b'{"step": 8}')
    (path / "rng-00001.safetensors").write_bytes(b"mondar")
    assert manifest.changed(folder, files.items()) == ["state.json has changed", "rng-00001.safetensors has changed"]
    assert manifest.changed(folder, [("model/a.safetensors", files["model/a.safetensors"])]) == []


@pytest.mark.parametrize(("step", "world_size"), [(8, 2), (7, 3)])
def test_a_manifest_of_another_checkpoint_is_named(path: Path, tmp_path: Path, step: int, world_size: int):
    shutil.copy(written_by(1, tmp_path / "other", step, world_size) / MANIFESTS[1], path)
    assert faults(Folder(str(path))) == ["manifest-00001.json belongs to another checkpoint"]


def test_another_format_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    assert faults(Folder(str(path))) == ["manifest-00000.json has format 1; this version reads 2"]


def test_files_that_no_manifest_lists_do_not_matter(folder: Folder, path: Path):
    (path / "shards/00002-0000.safetensors").write_bytes(b"left from another attempt")
    assert faults(folder) == []


def test_a_folder_that_is_not_there_lacks_its_manifest(tmp_path: Path):
    assert faults(Folder(str(tmp_path / "none"))) == ["manifest-00000.json is missing"]
