"""A run whose storage is an S3 server (moto) that is slow, and refuses writes for a while: as users meet it."""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest
import yaml

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("dpo-ray"))
LATENCY_S = 0.01
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Weather:
    """An S3 server with latency, that answers 503 to what `refuses` says."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.refused = 0

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        time.sleep(LATENCY_S)
        if self.refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            self.refused += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [SLOW_DOWN]
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer


@pytest.fixture(scope="module")
def weather() -> Iterator[Weather]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it has a line for every request
    weather = Weather(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, weather, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name, value in {
            "AWS_ACCESS_KEY_ID": "of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        yield weather
    server.shutdown()


@pytest.fixture
def bucket(weather: Weather) -> str:
    import boto3

    boto3.client("s3").create_bucket(Bucket="runs")
    return "s3://runs/of"


def test_a_run_on_an_object_store_is_interrupted_and_goes_on(
    weather: Weather, bucket: str, shared: Path, tmp_path: Path, ray_tmpdir: Path
):
    from dpo_ray.storage import Folder, read_lines

    recipe = tmp_path / "hh.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "hh",
                "model": {"path": str(shared / "models/stories260K")},
                "data": {
                    "sources": [{"path": str(shared / "data/hh_rlhf/helpful-base.test.jsonl.gz")}],
                    "max_tokens": 200,
                    "num_pairs": 160,
                    "eval": {"num_pairs": 16},
                },
                "batch": {"pairs_per_step": 4, "tokens_per_device": 2048},
                "train": {"log_every_steps": 5},
                "engine": {"precision": "fp32", "zero_stage": 2},
                "eval": {"every_steps": 10},
                "checkpoint": {"every_steps": 5},
                "early_stopping": None,
                "tracking": {"kind": "none"},
            }
        )
    )

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [COMMAND, "train", str(recipe), "--address", "local", *arguments]  # the tests' cluster lacks the keys
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    def finish(process: subprocess.Popen[str], code: int) -> dict[str, Any]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        summary: dict[str, Any] = folder.read_json("summary.json")
        return summary

    folder = Folder(f"{bucket}/hh")

    # The SDK tries a request three times of itself: this many refusals reach our own second attempt.
    weather.refuses = lambda method, path: (
        method == "PUT" and "/checkpoints/step-000005" in path and weather.refused < 8
    )
    first = start(f"storage.path={bucket}")
    end = time.monotonic() + 200
    while not folder.exists("checkpoints/step-000005/manifest-00000.json"):
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    interrupted = finish(first, 130)
    assert interrupted["status"] == "interrupted"
    assert weather.refused == 8

    summary = finish(start(f"storage.path={bucket}", "--resume"), 0)
    assert summary["status"] == "completed"
    assert summary["resumed_from_step"] == interrupted["steps"] >= 5
    lines = list(read_lines(folder.read("metrics.jsonl")))
    assert [line["step"] for line in lines if "loss" in line] == [1, *range(5, 41, 5)]
    assert [line["step"] for line in lines if "eval/loss" in line] == [10, 20, 30, 40]
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set((folder / "model").names())
