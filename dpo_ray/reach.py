"""Is a Ray cluster at an address, and does it take our token? Known in seconds; Ray itself tries for minutes.

One call to the head, `CheckAlive`, over bare gRPC: what Ray reads once when it is imported (its token and whether to
send it) is not touched, and nothing is started.
"""

import os
import re
from pathlib import Path

import grpc

from dpo_ray.errors import InputError
from dpo_ray.machine import token_file

PATIENCE_S = 10.0
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_NO_PROXY = [("grpc.enable_http_proxy", 0)]


def check_address(address: str | None) -> None:
    """Refuse an address where no cluster is, or one that does not take our token. None, `auto` and `local` are Ray's.

    Raises:
        InputError: What is there, and what to do.
    """
    if address in (None, "", "auto", "local"):
        return
    assert address is not None
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{address} is the address of a dashboard, as `dpo-ray submit` takes it; this command joins the cluster "
            "itself: give HEAD:PORT (6379 unless it was set), or submit the command"
        )
    if "://" in address or ":" not in address:
        return  # Ray Client, or what Ray refuses at once
    if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return  # needs the cluster's certificates, which Ray knows how to find
    token = token_here() if sends_token() else None
    code, told = _call(address, token)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise InputError(f"no Ray cluster answers at {address}: {told}; is its head up, and is this its address?")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if token is not None:
            raise InputError(f"the Ray cluster at {address} refuses the token of {token_place()}: it has another one")
        raise InputError(
            f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token and the token, in RAY_AUTH_TOKEN, "
            "in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        )
    if code is not grpc.StatusCode.OK:
        raise InputError(f"what answers at {address} is not the head of a Ray cluster: {told}")
    if not is_node():
        raise InputError(
            f"this machine is not a node of the Ray cluster at {address}, and Ray joins one from its nodes only: "
            "run the command there, or submit it as a job"
        )


def asks_for_token(address: str) -> bool | None:
    """Whether a cluster refuses those who have no token; None if it does not answer."""
    code, _ = _call(address, None)
    return {grpc.StatusCode.OK: False, grpc.StatusCode.UNAUTHENTICATED: True}.get(code)


def sends_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_here() -> str | None:
    """The token that Ray would send from this process: of the variable, else of the file."""
    told = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if told:
        return told
    try:
        return token_file().read_text().strip() or None
    except OSError:
        return None


def token_place() -> str:
    return "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN", "").strip() else str(token_file())


def is_node() -> bool:
    """Whether a node of some Ray cluster runs on this machine; yes where one cannot tell (not Linux)."""
    processes = list(Path("/proc").glob("[0-9]*/comm"))
    return not processes or any(_name(path) == "raylet" for path in processes)


def _name(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it has ended meanwhile
        return ""


def _call(address: str, token: str | None) -> tuple[grpc.StatusCode, str]:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address, options=_NO_PROXY) as channel:
        try:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=PATIENCE_S, metadata=metadata)
        except grpc.RpcError as error:
            told = " ".join(str(error.details()).split()).rpartition("last error: ")[2]
            return error.code(), re.sub(r"^[A-Z]+: ipv[46]:\S+: (Failed to connect to remote host: )?", "", told)[:200]
    return grpc.StatusCode.OK, ""
