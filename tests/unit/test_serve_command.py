"""What a person types becomes the service they mean, or one clear line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.errors import InputError
from serve.app import build_app
from serve.auth import digest, read_keys
from serve.command import Wanted, configure
from serve.config import ServeConfig


@pytest.fixture
def run_dir(tiny_model: Path, tmp_path: Path) -> Path:
    """A finished run of the tiny model."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(tiny_model, folder / "model")
    recipe = {
        "name": "mine",
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": "pairs.jsonl"}]},
        "loss": {"kind": "dpo", "beta": 0.25},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_a_run_folder_knows_its_reference_and_its_beta(run_dir: Path, tiny_model: Path, tmp_path: Path):
    config = configure(Wanted(str(run_dir), preferences=str(tmp_path / "kept")), [])
    first, second = config.models
    assert (first.name, first.path, first.reference, first.beta) == (
        "mine",
        str(run_dir / "model"),
        str(tiny_model),
        0.25,
    )
    assert (second.name, second.path, second.reference) == ("reference", str(tiny_model), None)
    assert config.compare == ("mine", "reference")
    assert first.chat == "plain"


def test_a_model_folder_is_served_as_it_is(tiny_model: Path):
    config = configure(Wanted(str(tiny_model), preferences=None, replicas="1:3", settings=(("concurrency", 8),)), [])
    (model,) = config.models
    assert (model.name, model.reference, config.compare) == ("model", None, None)
    assert (model.min_replicas, model.max_replicas, model.concurrency) == (1, 3, 8)


def test_settings_reach_models_and_service(run_dir: Path, tiny_model: Path):
    wanted = Wanted(
        str(run_dir),
        also=(f"base={tiny_model}",),
        split=("chat=mine:0.9,base:0.1",),
        settings=(("max_queued", 3), ("limits.max_tokens", 50), ("ingress_replicas", 2)),
    )
    config = configure(wanted, [])
    assert [model.max_queued for model in config.models] == [3, 3]
    assert (config.limits.max_tokens, config.ingress_replicas) == (50, 2)
    assert config.split == {"chat": {"mine": 0.9, "base": 0.1}}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "/nowhere"}, "no model at /nowhere"),
        ({"settings": (("concurency", 3),)}, "did you mean `models.*.concurrency`"),
        ({"settings": (("concurrency", "many"),)}, "`concurrency`"),
        ({"settings": (("limits.max_tokens", 0),)}, "`limits.max_tokens`"),
        ({"replicas": "several"}, "--replicas"),
        ({"replicas": "3:1"}, "max_replicas=1"),
        ({"split": ("a=b:1",)}, "there is no model `b`"),
        ({"split": ("a",)}, "--split takes NAME=PATH"),
        ({"also": ("x",)}, "--also takes NAME=PATH"),
        ({"insecure": True, "host": "0.0.0.0"}, "--insecure is for loopback"),
        ({"name": "two words"}, "`name`"),
    ],
)
def test_what_is_wrong_is_named(tiny_model: Path, options: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told.replace("*", r"\*")) as caught:
        configure(Wanted(**({"model": str(tiny_model)} | options)), [])
    assert "\n" not in str(caught.value)


def test_an_adapter_must_be_one_and_on_these_weights(tiny_model: Path):
    with pytest.raises(InputError, match=r"it has no adapter_config.json"):
        configure(Wanted(str(tiny_model), adapters=(f"x={tiny_model}",)), [])


def test_a_file_that_hides_the_package_is_named(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "serve.py").touch()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", str(tiny_model)])
    assert done.exit_code == 2
    assert "./serve.py here hides the package" in " ".join(done.stderr.split())


def test_a_new_key_is_shown_once_and_its_entry_opens(tmp_path: Path):
    done = CliRunner().invoke(app, ["serve", "--new-key", "ada"])
    assert done.exit_code == 0
    first, _, entry = done.stdout.partition("\n\n")
    secret = first.removeprefix("key: ")
    assert secret not in entry
    (tmp_path / "keys.yaml").write_text(entry)
    found = read_keys(tmp_path / "keys.yaml", {}).find(secret)
    assert found is not None
    assert (found.name, found.sha256) == ("ada", digest(secret))


def test_the_application_is_one_that_ray_serve_can_deploy(run_dir: Path):
    """Its arguments are JSON, as in a Serve config file; the schema is Ray's own."""
    from ray.serve.schema import ServeDeploySchema

    config = configure(Wanted(str(run_dir)), [])
    args = json.loads(config.model_dump_json())
    assert ServeConfig.model_validate(args) == config
    application = {"name": "dpo-ray", "route_prefix": "/", "import_path": "serve.app:build_app", "args": args}
    ServeDeploySchema.model_validate({"applications": [application]})
    build_app(args)
    with pytest.raises(InputError, match="unknown key `model`; did you mean `models`"):
        build_app({"model": []})
