"""What is shipped: the wheel's names and files, the pins, the version."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dpo_ray

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_three_packages_and_no_other_name(wheel: zipfile.ZipFile):
    names = {name.partition("/")[0] for name in wheel.namelist()}
    assert names == {"dpo_ray", "serve", "tune_spaces", f"dpo_ray-{dpo_ray.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if re.match(r"dpo_ray/(serve|tune_spaces)\b", name)]


def test_the_only_command_is_dpo_ray(wheel: zipfile.ZipFile):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert wheel.read(entry_points).decode().split() == ["[console_scripts]", "dpo-ray", "=", "dpo_ray.cli:main"]


def test_the_wheel_carries_every_module_and_every_recipe(wheel: zipfile.ZipFile):
    in_tree = {
        str(path.relative_to(ROOT))
        for package in ("dpo_ray", "serve", "tune_spaces")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".yaml", ".html", ".css", ".js", ".svg", ".json"}
    }
    assert any(name.startswith("dpo_ray/recipes/") and name.endswith(".yaml") for name in in_tree)
    assert in_tree <= set(wheel.namelist())


def test_every_dependency_is_pinned_to_a_version_it_allows():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines[1:])}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text} does not allow {pin}"
    assert not [pin for pin in pins.values() if "+" in pin], "a local version exists on one machine only"


def test_the_changelog_knows_the_version():
    assert re.search(rf"\b{re.escape(dpo_ray.__version__)}\b", (ROOT / "CHANGELOG.md").read_text())
