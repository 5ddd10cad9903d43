"""What a job is before it is sent, and what its end means; no cluster is asked."""

import json
import os
import re
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray import __version__, config, jobs
from dpo_ray import job_env as environment_of_jobs
from dpo_ray.cli import app
from dpo_ray.config import Place, parse_run, places
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.jobs import Attempt, Cluster, Step, next_step, result_in
from dpo_ray.shipping import MAX_BYTES, environment, left_behind, module_files, read_secrets, stage, tree, variables
from dpo_ray.submit import COMMANDS, PLACES, Job, Sight, Typed, build, local

HERE = Sight(is_this_machine=True)
AWAY = Sight(is_this_machine=False)


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `Cluster` sets it


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with relative paths, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    text = {"name": "small", "model": {"path": "model"}, "data": {"sources": [{"path": "pairs.jsonl"}]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "small.yaml"


def typed(*words: str) -> Typed:
    """A command as `submit` reads it."""
    from dpo_ray.cli_jobs import parsed

    seen: list[Typed] = []

    class Context:
        def find_root(self) -> Any:
            import typer

            class Root:
                command = typer.main.get_command(app)

            return Root

    seen.append(parsed(Context(), list(words), as_json=False))  # type: ignore[arg-type]
    return seen[0]


def job(*words: str, sight: Sight = HERE, **options: Any) -> Job:
    return build(typed(*words), sight, **options)


def sent(made: Job) -> dict[str, Any]:
    """The recipe that goes along."""
    content = made.files[".dpo-ray/small.yaml"]
    assert isinstance(content, bytes)
    return dict(yaml.safe_load(content))


# Paths


def test_the_recipe_goes_along_resolved_and_with_whole_paths(recipe: Path):
    made = job("train", "small.yaml", "loss.beta=0.3")
    here = str(recipe.parent)
    assert sent(made) == {
        "name": "small",
        "model": {"path": f"{here}/model"},
        "data": {"sources": [{"path": f"{here}/pairs.jsonl"}]},
        "loss": {"kind": "dpo", "beta": 0.3},
        "storage": {"path": f"{here}/runs"},
    }
    assert made.words == ("train", ".dpo-ray/small.yaml")
    assert list(made.files) == [".dpo-ray/small.yaml"]


def test_what_the_cluster_cannot_see_is_named_with_the_fix_all_at_once(recipe: Path):
    with pytest.raises(InputError) as told:
        job("train", "small.yaml", sight=AWAY)
    text = str(told.value)
    assert "\n" not in text
    for key, fix in (("storage.path", "s3://"), ("model.path", "hub"), ("data.sources.0.path", "object store")):
        assert re.search(rf"`{re.escape(key)}` \([^)]*\): [^;]*{fix}", text), text
    assert "--shared FOLDER" in text


def test_hub_names_and_object_stores_are_seen_everywhere(recipe: Path):
    words = ("storage.path=s3://b/runs", "model.path=org/name", "data.sources.0.path=s3://b/pairs.jsonl")
    made = job("train", "small.yaml", *words, "tracking.kind=none", sight=AWAY)
    assert sent(made)["model"] == {"path": "org/name"}


def test_a_shared_folder_is_seen_and_what_only_looks_like_it_is_not(recipe: Path):
    sight = Sight(False, (str(recipe.parent),))
    assert sent(job("train", "small.yaml", sight=sight)) == sent(job("train", "small.yaml"))
    for path in (f"{recipe.parent}/../elsewhere", f"{recipe.parent}-2/runs"):
        with pytest.raises(InputError, match=r"storage\.path"):
            job("train", "small.yaml", f"storage.path={path}", sight=sight)


@pytest.mark.parametrize(
    ("text", "place", "path", "whole"),
    [
        ("org/name", Place.MODEL, None, "org/name"),
        ("model", Place.MODEL, "{}/model", "{}/model"),
        ("data/*.jsonl", Place.DATA, "{}/data/*.jsonl", "{}/data/*.jsonl"),
        ("missing.jsonl.gz", Place.DATA, "{}/missing.jsonl.gz", "{}/missing.jsonl.gz"),
        ("models:/mine@best", Place.MODEL, None, "models:/mine@best"),
        ("runs", Place.FOLDER, "{}/runs", "{}/runs"),
        ("gs://b/runs", Place.FOLDER, None, "gs://b/runs"),
        ("sqlite:///mlflow.db", Place.URL, "{}/mlflow.db", "sqlite:///{}/mlflow.db"),
        ("mlruns", Place.URL, "{}/mlruns", "{}/mlruns"),
        ("https://mlflow.org:5000", Place.URL, None, "https://mlflow.org:5000"),
        ("http://localhost:5000", Place.URL, "/", "http://localhost:5000"),
        ("databricks", Place.URL, None, "databricks"),
        ("postgresql://db/mlflow", Place.URL, None, "postgresql://db/mlflow"),
    ],
)
def test_local_paths_are_told_from_names_and_addresses(
    recipe: Path, text: str, place: Place, path: str | None, whole: str
):
    here = str(recipe.parent)
    assert local(text, place) == (path and path.format(here), whole.format(here))


def test_every_key_that_leads_somewhere_is_marked():
    """By the words of its own documentation, so that a new key cannot be forgotten."""
    leads = re.compile(r"\b(folder|file|URI|URL)\b|^Hub id")
    marked, found = set(), set()
    for kind in vars(config).values():
        if isinstance(kind, type) and issubclass(kind, config.Config):
            for name, field in kind.model_fields.items():
                if any(isinstance(mark, Place) for mark in field.metadata):
                    marked.add((kind.__name__, name))
                annotation = str(field.annotation)
                if "str" in annotation and "Literal" not in annotation and leads.search(field.description or ""):
                    found.add((kind.__name__, name))
    assert found - marked == {("RunConfig", "name"), ("PromptFrom", "column"), ("SourceConfig", "columns")}  # names
    assert {name for _, name in marked} == {"path", "store", "uri", "url", "cache", "mt_bench", "task_folder"}
    whole = {
        "name": "n",
        "model": {"path": "m"},
        "reference": {"path": "r", "store": "s"},
        "data": {
            "sources": [{"path": "a", "prompt_from": {"path": "b", "on": "x", "column": "y"}}],
            "eval": {"sources": [{"path": "c"}]},
        },
        "tracking": {"uri": "u"},
        "evaluate": {
            "prompts": [{"path": "p"}],
            "judge": {"kind": "reward_model", "path": "w"},
            "mt_bench": "q",
            "retention": {"sources": [{"path": "t"}], "task_folder": "f"},
        },
        "acquire": {"oracle": {"kind": "llm", "model": "j", "cache": "k"}},
    }
    assert [key for key, _, _ in places(parse_run(whole))] == [
        "storage.path",
        "model.path",
        "reference.path",
        "reference.store",
        "data.sources.0.path",
        "data.sources.0.prompt_from.path",
        "data.eval.sources.0.path",
        "tracking.uri",
        "evaluate.prompts.0.path",
        "evaluate.judge.path",
        "evaluate.mt_bench",
        "evaluate.retention.sources.0.path",
        "evaluate.retention.task_folder",
        "acquire.oracle.url",
        "acquire.oracle.cache",
    ]


def test_every_option_that_leads_somewhere_is_known_to_submit():
    import typer

    commands: Any = typer.main.get_command(app)
    goes_along = {"recipe", "space", "keys", "overrides"}
    elsewhere = {"address", "name", "metric", "new_key", "replicas", "called"}
    for command in COMMANDS:
        for parameter in commands.commands[command].params:
            leads = re.search(r"\b(folder|model|file|path|pairs to)\b", parameter.help or "", re.IGNORECASE)
            is_text = not getattr(parameter, "is_flag", False)
            if leads and is_text and parameter.name not in goes_along | elsewhere:
                assert parameter.name in PLACES.get(command, {}), f"{command}: {parameter.name}"


def test_an_evaluation_takes_its_recipe_and_its_judge_along(recipe: Path, tmp_path: Path):
    (recipe.parent / "my_judge.py").write_text("def worth(prompt, response):\n    return 1.0\n")
    judge = "evaluate.judge={kind: function, function: 'my_judge:worth'}"
    by_word = job("evaluate", "runs/mine", "small.yaml", judge)
    assert by_word.words[:3] == ("evaluate", "--recipe", ".dpo-ray/small.yaml")
    assert "my_judge.py" in by_word.files
    assert by_word.id == job("evaluate", "runs/mine", "--recipe", "small.yaml", judge).id
    alone = job("evaluate", "runs/mine", "evaluate.num_prompts=5")
    assert alone.words == ("evaluate", "runs/mine", "evaluate.num_prompts=5")


def test_mlflow_of_this_shell_is_that_of_the_job(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.org")
    assert sent(job("train", "small.yaml"))["tracking"] == {"uri": "https://mlflow.org"}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    words = ("storage.path=s3://b/runs", "model.path=org/name", "data.sources.0.path=s3://b/pairs.jsonl")
    with pytest.raises(InputError, match=r"`tracking\.uri` \(sqlite"):  # a file of the head, lost with it
        job("train", "small.yaml", *words, sight=AWAY)


# Commands


def test_a_command_is_checked_before_it_is_sent(recipe: Path):
    def wrong(*words: str) -> str:
        result = CliRunner().invoke(app, ["submit", "--address", "http://127.0.0.1:9", "--", *words])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "submit what?" in wrong("demo")
    assert "--bogus" in wrong("train", "small.yaml", "--bogus")
    with pytest.raises(InputError, match=r"did you mean `loss\.beta`"):
        job("train", "small.yaml", "loss.betta=1")
    with pytest.raises(InputError, match="before `--`"):
        job("train", "small.yaml", "--address", "x:1")
    with pytest.raises(InputError, match="no recipe at"):
        job("train", "none.yaml")
    with pytest.raises(InputError, match="no space `betas`"):
        job("sweep", "small.yaml", "--space", "betas")


def test_an_entrypoint_is_read_by_our_parser_as_it_was_typed(recipe: Path):
    made = job("sweep", "small.yaml", "--metric", "kl:min", "--trials", "2", "--metric", "loss", "--resume")
    again = typed(*made.words)
    assert again.values == {
        "recipe": Path(".dpo-ray/small.yaml"),
        "metric": ["kl:min", "loss"],
        "trials": 2,
        "resume": True,
    }
    assert made.resume == ()
    assert job("sweep", "small.yaml").resume == ("--resume",)
    assert job("score", "small.yaml").resume == ()


def test_a_service_needs_keys_that_no_log_shows(recipe: Path):
    with pytest.raises(InputError, match="--keys FILE"):
        job("serve", "org/name")
    with pytest.raises(InputError, match="--preferences"):
        job("serve", "org/name", "--insecure", sight=AWAY)
    (recipe.parent / "keys.yaml").write_text("keys: []\n")
    made = job("serve", "org/name", "--keys", "keys.yaml", "--also", "base=model")
    assert made.files == {".dpo-ray/keys.yaml": b"keys: []\n"}
    assert made.words == (
        *("serve", "--also", f"base={recipe.parent}/model", "--keys", ".dpo-ray/keys.yaml"),
        *("--preferences", f"{recipe.parent}/runs/preferences", "org/name"),
    )
    assert job("serve", "org/name", "--preferences", "none", kept=["DPO_RAY_API_KEY"], sight=AWAY).files == {}


def test_spaces_and_functions_go_along(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    folder = recipe.parent
    (folder / "few.yaml").write_text("loss.beta: [0.1, 0.2]\n")
    made = job("sweep", "small.yaml", "--space", "few.yaml")
    assert made.files[".dpo-ray/few.yaml"] == b"loss.beta: [0.1, 0.2]\n"
    assert made.words == ("sweep", "--space", ".dpo-ray/few.yaml", ".dpo-ray/small.yaml")
    (folder / "taste.py").write_text("def shorter(prompt, response): return -len(response)\n")
    words = ("acquire.oracle.kind=function", "acquire.oracle.function=taste:shorter")
    assert job("acquire", "small.yaml", *words).files["taste.py"] == folder / "taste.py"
    with pytest.raises(InputError, match="no module `tast`"):
        job("acquire", "small.yaml", words[0], "acquire.oracle.function=tast:shorter")
    assert module_files("json:loads") == module_files("yaml:safe_load") == {}  # installed there too
    (folder / "wide.yaml").write_text("data.sources: [[{path: /elsewhere/a.jsonl}]]\n")
    with pytest.raises(InputError, match=r"data\.sources\.0\.path. of the space"):
        job("sweep", "small.yaml", "--space", "wide.yaml", sight=Sight(False, (str(folder),)))


# What is shipped


def test_ignore_files_hold_and_some_folders_never_go(tmp_path: Path):
    for name in ("a.py", "b/c.py", "b/skip.log", "d/e.bin", ".git/x", "runs/y", "b/__pycache__/z", ".venv/v"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / ".rayignore").write_text("d/\n")
    assert list(tree(tmp_path)) == ["a.py", "b/c.py"]


def test_too_much_is_refused_and_the_largest_are_named(recipe: Path):
    with open(recipe.parent / "weights.bin", "wb") as file:
        file.truncate(MAX_BYTES)
    with pytest.raises(InputError, match=r"weights\.bin \(100\.0 MiB\).*\.rayignore"):
        job("train", "small.yaml", working_dir=recipe.parent)
    (recipe.parent / ".rayignore").write_text("*.bin\n")
    made = job("train", "small.yaml", working_dir=recipe.parent)
    assert set(made.files) == {"pairs.jsonl", "small.yaml", ".dpo-ray/small.yaml"}


def test_this_dpo_ray_goes_along_when_asked(recipe: Path):
    files = job("train", "small.yaml", ships_code=True).files
    assert {"dpo_ray/cli.py", "serve/app.py", "tune_spaces/beta.py", "serve/web/chat.html"} <= files.keys()
    assert not [name for name in files if "__pycache__" in name]


def test_secrets_are_a_file_and_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "sesame")
    (tmp_path / "key").write_text("open\n")
    kept = read_secrets(["MY_TOKEN", f"OTHER={tmp_path}/key"])
    assert kept == {"MY_TOKEN": "sesame", "OTHER": "open"}
    assert "sesame" not in json.dumps(variables({}, 1.0, has_secrets=True))
    stage({"a/b.txt": b"hi"}, kept, tmp_path / "staged")
    file = tmp_path / "staged/.dpo-ray/secrets.json"
    assert file.stat().st_mode & 0o777 == 0o600
    code = "from dpo_ray import job_env; job_env.load(); import os; print(os.environ['OTHER'])"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "staged",
        env={
            **os.environ,
            **variables({}, 1.0, has_secrets=True),
            "PYTHONPATH": str(Path(jobs.__file__).parent.parent),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "open"


def test_wrong_variables_and_secrets_are_refused_and_no_value_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.delenv("GONE", raising=False)
    assert environment(["A=b=c", "HOME"]) == {"A": "b=c", "HOME": os.environ["HOME"]}
    assert environment(["TOKENIZERS_PARALLELISM=false"]) == {"TOKENIZERS_PARALLELISM": "false"}
    for call, text in (
        (lambda: environment(["HF_TOKEN"]), "--secret HF_TOKEN"),
        (lambda: environment(["HF_TOKEN=sesame"]), "--secret HF_TOKEN"),
        (lambda: environment(["GONE"]), "not set here"),
        (lambda: read_secrets(["GONE"]), "not set here"),
        (lambda: read_secrets(["GONE=sesame"]), "no such file"),
    ):
        with pytest.raises(InputError, match=text) as told:
            call()
        assert "sesame" not in str(told.value)
    assert "HF_TOKEN" in left_behind([])
    assert "HF_TOKEN" not in left_behind(["HF_TOKEN"])


def test_a_job_has_time_to_save_when_it_is_stopped(recipe: Path):
    made = job("train", "small.yaml", "checkpoint.stop_seconds=200")
    assert float(variables({}, made.stop_seconds, has_secrets=False)["RAY_JOB_STOP_WAIT_TIME_S"]) > 200


def test_another_version_says_so(monkeypatch: pytest.MonkeyPatch):
    assert list(environment_of_jobs.version_notice()) == []
    monkeypatch.setenv("DPO_RAY_SUBMITTED_BY", __version__)
    assert list(environment_of_jobs.version_notice()) == []
    monkeypatch.setenv("DPO_RAY_SUBMITTED_BY", "99.0")
    assert "99.0" in next(environment_of_jobs.version_notice())


# Which job it is


def test_the_same_command_and_recipe_are_the_same_job(recipe: Path):
    first = job("train", "small.yaml", "loss.beta=0.3")
    assert re.fullmatch(r"train-small-[0-9a-f]{8}", first.id)
    assert job("train", "small.yaml", "--resume", "loss.beta=0.3").id == first.id
    assert job("train", "small.yaml", "loss.beta=0.3", "--json").id == first.id
    recipe.with_name("copy.yaml").write_text(recipe.read_text() + "loss: {beta: 0.3}\n")
    assert job("train", "copy.yaml", ships_code=True).id == first.id
    others = [
        job("train", "small.yaml", "loss.beta=0.4"),
        job("score", "small.yaml", "loss.beta=0.3"),
        job("train", "small.yaml", "loss.beta=0.3", "storage.path=other"),
        job("train", "small.yaml", "loss.beta=0.3", "name=b"),
    ]
    assert len({first.id, *(other.id for other in others)}) == 5
    assert job("train", "small.yaml", job_id="mine").id == "mine"


def attempt(status: str, code: int | None = None, **fields: Any) -> Attempt:
    return Attempt("j", "j", "train", status, code, "", 0.0, None, "dpo-ray train r")._replace(**fields)


def test_a_job_is_started_once_and_goes_on_where_it_broke_off():
    assert next_step([]) == Step(None, 1, False)
    for status in ("PENDING", "RUNNING", "SUCCEEDED"):
        assert next_step([attempt("FAILED"), attempt(status, id="j-2")]).follow == attempt(status, id="j-2")
    for status in ("FAILED", "STOPPED"):
        assert next_step([attempt(status)]) == Step(None, 2, True)
    assert next_step([attempt("SUCCEEDED")], again=True) == Step(None, 2, False)
    with pytest.raises(InputError, match="still runs"):
        next_step([attempt("RUNNING")], again=True)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        *(("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", 130, 130), ("STOPPED", None, 130)),
        *(("FAILED", 1, 3), ("FAILED", -9, 3), ("FAILED", None, 3)),
    ],
)
def test_the_exit_code_is_that_of_the_command(status: str, code: int | None, expected: int):
    assert attempt(status, code).code == expected


def test_the_result_is_found_among_the_lines_of_a_log():
    result = {"status": "completed", "eval": {"loss": 0.5}, "list": [{"a": 1}]}
    text = json.dumps(result, indent=2)
    assert result_in(f'step 1\n{{\n "not": "this"\n}}\nreading\n{text}\nleaked objects: 1\n') == result
    assert result_in(text) == result
    assert result_in("step 1: {a}\nno result\n") is None
    assert result_in(f"{text[:-5]}") is None


# Following


class Told:
    """A client whose log comes in pieces, with what goes wrong between them."""

    def __init__(self, log: str, streams: list[list[str | Exception]], running: int) -> None:
        self._log, self._streams, self._running = log, streams, running

    async def tail_job_logs(self, job_id: str) -> Any:
        for piece in self._streams.pop(0) if self._streams else [self._log]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_logs(self, job_id: str) -> str:
        return self._log

    def get_job_info(self, job_id: str) -> Any:
        self._running -= 1
        if self._running == 0:
            raise RuntimeError("Request failed with status code 500: the dashboard restarts")

        class Details:
            submission_id, job_id, driver_exit_code, message = "j", None, 0, None
            start_time, end_time, entrypoint, metadata = 0, 0, "", None
            status = "RUNNING" if self._running >= 0 else "SUCCEEDED"

        return Details()


def cluster_of(client: Any) -> Cluster:
    made = object.__new__(Cluster)
    made.url, made._client = "http://there", client
    return made


def test_no_line_is_lost_and_none_comes_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    log = "".join(f"line {number}\n" for number in range(9))
    streams: list[list[str | Exception]] = [
        ["line 0\nline 1\n", RuntimeError("WebSocket connection closed unexpectedly")],
        [ConnectionResetError()],
        ["line 0\n", "line 1\nline 2\nli", "ne 3\n"],  # closed without a word, the job still runs
        ["line 0\nline 1\nline 2\nline 3\nline 4\n", TimeoutError()],
        [
            "line 0\n",
            RuntimeError("WebSocket connection closed unexpectedly"),
        ],  # and the job has ended: the rest at once
    ]
    written: list[str] = []
    said: list[str] = []
    end = cluster_of(Told(log, streams, running=4)).follow("j", written.append, said.append)
    assert "".join(written) == log
    assert end.status == "SUCCEEDED"
    assert said == 2 * ["lost the log (RuntimeError); trying again"]  # once for each time without any answer


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(now)))

    class Gone:
        async def tail_job_logs(self, job_id: str) -> Any:
            raise ConnectionRefusedError
            yield ""

        def get_job_info(self, job_id: str) -> Any:
            raise ConnectionError

    with pytest.raises(RunFailed, match=r"http://there, for 10 minutes.*jobs logs --follow j"):
        cluster_of(Gone()).follow("j", lambda text: None, lambda text: None)


def test_a_new_head_that_knows_nothing_ends_the_waiting():
    class New(Told):
        def get_job_info(self, job_id: str) -> Any:
            raise RuntimeError("Request failed with status code 404: Job j does not exist.")

    with pytest.raises(RunFailed, match="no longer knows j"):
        cluster_of(New("", [], 1)).follow("j", lambda text: None, lambda text: None)


def test_ctrl_c_ends_the_following_also_when_more_of_the_log_is_there_already():
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes when its answer is there."""

    def write(text: str) -> None:
        if text == "a":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        cluster_of(Told("abc", [["a", "b", "c"]], running=1)).follow("j", write, lambda text: None)


# The cluster's answers


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("head:6379", "head:6379 is not one"),
        ("ray://head:10001", "is not one"),
        ("http://127.0.0.1:9", "no Ray cluster answers at http://127.0.0.1:9"),
    ],
)
def test_an_address_that_is_none_is_told_in_one_line(address: str, text: str):
    with pytest.raises(InputError, match=re.escape(text)) as told:
        Cluster(address)
    assert "\n" not in str(told.value)


def test_without_an_address_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="there is none"):
        Cluster(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match=r"answers at http://127\.0\.0\.1:9$"):
        Cluster(None)


@pytest.mark.parametrize(
    ("status", "answer", "text"),
    [
        (200, {"ray_version": "2.60.0"}, None),
        (200, {"ray_version": "2.40.0"}, "runs Ray 2.40.0; dpo-ray needs 2.59 or newer"),
        (404, {}, "is no dashboard of Ray"),
        (200, "hello", "is no dashboard of Ray"),
    ],
)
def test_what_answers_must_be_a_dashboard_and_the_option_wins(
    monkeypatch: pytest.MonkeyPatch, status: int, answer: Any, text: str | None
):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode() if isinstance(answer, str) else json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        if text is None:
            assert Cluster(address).ray_version == "2.60.0"
        else:
            with pytest.raises(InputError, match=re.escape(f"{address} {text}")):
                Cluster(address)
        server.shutdown()


def test_a_tunnel_is_not_this_machine():
    class Nodes:
        def __init__(self, *nodes: tuple[str, str]) -> None:
            self._nodes = nodes

        def _do_request(self, method: str, endpoint: str) -> Any:
            summary = [{"hostname": h, "ip": ip, "raylet": {"state": "ALIVE"}} for h, ip in self._nodes]

            class Answer:
                status_code = 200

                def json(self) -> Any:
                    return {"data": {"summary": summary}}

            return Answer()

    import socket

    me = socket.gethostname()
    assert cluster_of(Nodes((me, "127.0.0.2"), (me, "127.0.0.3"))).is_this_machine()
    assert not cluster_of(Nodes((me, "127.0.0.2"), ("head", "127.0.0.3"))).is_this_machine()
    assert not cluster_of(Nodes((me, "192.0.2.77"))).is_this_machine()
    assert not cluster_of(Nodes()).is_this_machine()
