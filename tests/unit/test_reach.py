"""An address without a cluster, or with one that wants another token: told in one line and at once."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from dpo_ray import reach
from dpo_ray.cli import app
from dpo_ray.errors import InputError

TOKEN = "the-token-of-the-cluster"


class Head(grpc.GenericRpcHandler):
    """Answers as a Ray head with token authentication does."""

    token: str | None = TOKEN

    def service(self, details: Any) -> Any:
        if details.method != "/ray.rpc.NodeInfoGcsService/CheckAlive":
            return None
        presented = dict(details.invocation_metadata).get("authorization")

        def answer(request: bytes, context: Any) -> bytes:
            if self.token is not None and presented != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head() -> Iterator[Head]:
    handler = Head()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    handler.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    server.start()
    yield handler
    server.stop(None).wait()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(reach, "is_node", lambda: True)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)


def test_a_cluster_without_token_is_joined_with_or_without_one(head: Any, monkeypatch: pytest.MonkeyPatch):
    head.token = None
    reach.check_address(head.address)
    assert reach.asks_for_token(head.address) is False
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    reach.check_address(head.address)


def test_the_token_is_taken_from_where_ray_takes_it(head: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(f"{TOKEN}\n")
    reach.check_address(head.address)
    (tmp_path / "other").write_text("another")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    with pytest.raises(InputError, match=rf"refuses the token of {tmp_path}/other"):
        reach.check_address(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    reach.check_address(head.address)


def test_a_missing_token_is_asked_for(head: Any, monkeypatch: pytest.MonkeyPatch):
    assert reach.asks_for_token(head.address) is True
    with pytest.raises(InputError, match="asks for a token: set RAY_AUTH_MODE=token"):
        reach.check_address(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)  # is not sent without the mode
    with pytest.raises(InputError, match="asks for a token"):
        reach.check_address(head.address)


def test_an_error_never_holds_the_token(head: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-and-secret")
    with pytest.raises(InputError, match="refuses the token of RAY_AUTH_TOKEN") as error:
        reach.check_address(head.address)
    assert "wrong-and-secret" not in str(error.value)


def test_a_machine_that_is_no_node_is_told_before_ray_waits_for_one(head: Any, monkeypatch: pytest.MonkeyPatch):
    head.token = None
    monkeypatch.setattr(reach, "is_node", lambda: False)
    with pytest.raises(InputError, match="this machine is not a node"):
        reach.check_address(head.address)


@pytest.mark.parametrize("address", [None, "", "auto", "local", "head", "ray://head:10001"])
def test_what_only_ray_can_resolve_is_left_to_it(address: str | None):
    reach.check_address(address)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9: Connection refused"),
        ("nosuch.invalid:6379", "no Ray cluster answers at nosuch.invalid:6379"),
        ("http://127.0.0.1:8265", "is the address of a dashboard"),
    ],
)
@pytest.mark.parametrize("command", [["doctor"], ["score", "hh-rlhf"]])
def test_a_command_ends_at_once_with_one_line(command: list[str], address: str, told: str, monkeypatch: Any):
    if command[0] == "score":  # any command that joins a cluster: here without the data that comes before
        import dpo_ray.score  # takes its seconds before the clock starts

        monkeypatch.setattr(dpo_ray.score, "score_pool", lambda *_, connect, **__: connect())
    began = time.monotonic()
    result = CliRunner().invoke(app, [*command, "--address", address])
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert time.monotonic() - began < 15
