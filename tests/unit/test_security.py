"""What docs/security.md promises and no other test holds."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import load_run
from dpo_ray.errors import InputError
from dpo_ray.prepare import recipe_of
from serve.command import Wanted, configure
from serve.models import find_model

RECIPE: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "d.jsonl"}]}}


def written(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("tracking.uri", {"tracking": {"uri": "http://ada:hunter2@tracking:5000"}}),
        ("storage.path", {"storage": {"path": "s3://AKIA:hunter2@bucket/runs"}}),
        ("data.sources.1.path", {"data": {"sources": [{"path": "a"}, {"path": "s3://AKIA:hunter2@bucket/b.jsonl"}]}}),
    ],
)
def test_a_password_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, key: str, changes: dict[str, Any]):
    with pytest.raises(InputError, match=f"`{key}` holds a password") as error:
        load_run(written(tmp_path / "r.yaml", **changes))
    assert "hunter2" not in str(error.value)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--dry-run"])
    assert result.exit_code == 2
    assert "hunter2" not in result.output


def test_a_user_without_a_password_is_no_secret(tmp_path: Path):
    path = written(tmp_path / "r.yaml", storage={"path": "hdfs://ada@namenode:8020/runs"})
    assert load_run(path).storage.path == "hdfs://ada@namenode:8020/runs"


def test_a_run_folder_alone_cannot_have_its_code_run(tmp_path: Path):
    """The model in it comes with code, and its recipe says that the code is trusted."""
    code = tmp_path / "run/model/configuration_evil.py"
    written(tmp_path / "run/recipe.yaml", model={"path": str(code.parent), "trust_remote_code": True})
    code.parent.mkdir()
    code.write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig\nclass EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    )
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (code.parent / "config.json").write_text(json.dumps(config))
    run = str(tmp_path / "run")
    for command in (["evaluate", run], ["export", run], ["serve", run, "--insecure"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "would run Python code that comes with its model" in result.stderr
    with pytest.raises(InputError, match="would run Python code"):
        find_model(run)
    assert not (tmp_path / "ran").exists()
    assert recipe_of(run, {"model.trust_remote_code": True}).model.trust_remote_code
    assert not recipe_of(run, {"model.trust_remote_code": False}).model.trust_remote_code


def test_serving_code_of_a_model_is_asked_for_by_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []

    def find(path: str, *, trust_remote_code: bool, **_: Any) -> Any:
        asked.append(trust_remote_code)
        raise InputError("enough")

    monkeypatch.setattr("serve.command.find_model", find)
    for settings in ((), (("trust_remote_code", True),), (("trust_remote_code", "yes"),)):
        with pytest.raises(InputError, match="enough"):
            configure(Wanted("m", insecure=True, settings=settings), [])
    assert asked == [False, True, False]


def test_nothing_of_ours_unpickles_a_file_or_runs_text(repository: Path):
    """Pickles pass between processes of one run only: Ray's, torch.distributed's, and the engine's socket."""
    forbidden = {"torch.load", "yaml.load", "eval", "exec", "os.system", "numpy.load", "np.load", "read_pickle"}
    found = []
    for package in ("dpo_ray", "serve", "tune_spaces"):
        for path in (repository / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    loud = any(k.arg == "shell" or (k.arg, ast.unparse(k.value)) == SAFE_OFF for k in node.keywords)
                    if name in forbidden or name.startswith(("pickle.", "cloudpickle.", "joblib.")) or loud:
                        found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    found += [
                        f"{path.name}:{node.lineno}: {n}" for n in names if n in ("pickle", "cloudpickle", "dill")
                    ]
    assert not found


SAFE_OFF = ("weights_only", "False")
