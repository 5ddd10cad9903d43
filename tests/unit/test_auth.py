"""API keys: found by their hash and by nothing else; limits that hold to the request."""

import hmac
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import InputError
from serve.auth import ApiKey, Bucket, KeyRing, Meter, bearer, digest, new_key, read_keys


def test_a_new_key_opens_and_no_other_does():
    secret, key = new_key("ada")
    ring = KeyRing([new_key("other")[1], key])
    assert ring.find(secret) == key
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), key.sha256, "dpo-"):
        assert ring.find(wrong) is None
    assert secret not in key.model_dump_json()
    assert re.fullmatch(r"dpo-[\w-]{43}", secret)
    assert new_key("ada")[0] != secret


def test_every_hash_is_compared_in_constant_time_whichever_is_right(monkeypatch: pytest.MonkeyPatch):
    compared: list[str] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    secrets_and_keys = [new_key(name) for name in "abc"]
    ring = KeyRing(key for _, key in secrets_and_keys)
    for secret in [*(secret for secret, _ in secrets_and_keys), "wrong"]:
        compared.clear()
        ring.find(secret)
        assert compared == [key.sha256 for _, key in secrets_and_keys]


@pytest.mark.parametrize(
    ("header", "secret"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        (None, None),
        ("", None),
        ("abc", None),
        ("Basic abc", None),
        ("Bearer", None),
        ("Bearer a b", None),
        ("xBearer abc", None),
    ],
)
def test_the_secret_is_read_from_the_header(header: str | None, secret: str | None):
    assert bearer(header) == secret


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path):
    secret, key = new_key("ada")
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n- {{name: ada, sha256: {key.sha256}, requests_per_minute: 30}}\n")
    ring = read_keys(path, {"DPO_RAY_API_KEY": " a-secret-of-the-environment "})
    found = ring.find(secret)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.concurrent) == ("ada", 30, None)
    other = ring.find("a-secret-of-the-environment")
    assert other is not None
    assert other.name == "environment"
    assert len(read_keys(None, {})) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("keys: [{name: a, sha256: abc}]", "key 1: `sha256`"),
        (f"keys: [{{name: 'a b', sha256: {digest('x')}}}]", "key 1: `name`"),
        (f"keys: [{{name: a, sha256: {digest('x')}, rate: 3}}]", "key 1: `rate`"),
        (f"keys: [{{name: a, sha256: {digest('x')}}}, {{name: a, sha256: {digest('y')}}}]", "the name of `a`"),
        (f"keys: [{{name: a, sha256: {digest('x')}}}, {{name: b, sha256: {digest('x')}}}]", "the sha256 of `a`"),
        ("[1, 2]", "no list `keys`"),
        ("{", "cannot read the API keys"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, message: str):
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_keys(path, {})


def test_a_missing_file_and_a_short_secret_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none.yaml"):
        read_keys(tmp_path / "none.yaml", {})
    with pytest.raises(InputError, match="shorter than 16") as caught:
        read_keys(None, {"DPO_RAY_API_KEY": "hunter2"})
    assert "hunter2" not in str(caught.value)


def key(**limits: float) -> ApiKey:
    return ApiKey.model_validate({"name": "a", "sha256": digest("x"), **limits})


def test_a_minute_of_requests_may_come_at_once_and_then_one_by_one():
    now = [0.0]
    meter, limited = Meter(lambda: now[0]), key(requests_per_minute=3)
    assert [meter.enter(limited, 5) for _ in range(3)] == [None] * 3
    refused = meter.enter(limited, 5)
    assert refused is not None
    assert (refused.limit, refused.retry_after_s) == ("requests_per_minute", pytest.approx(20.0))
    now[0] = 19.9
    assert meter.enter(limited, 5) is not None
    now[0] = 20.0
    assert meter.enter(limited, 5) is None
    assert meter.enter(limited, 5) is not None


def test_a_refused_request_costs_nothing():
    now = [0.0]
    meter, limited = Meter(lambda: now[0]), key(requests_per_minute=10, tokens_per_minute=100, concurrent=5)
    assert meter.enter(limited, 100) is None
    for _ in range(50):
        refused = meter.enter(limited, 10)
        assert refused is not None
        assert refused.limit == "tokens_per_minute"
    now[0] = 6.0
    assert meter.enter(limited, 10) is None, "nine requests were left, and ten tokens flowed back"


def test_a_request_larger_than_a_minute_is_served_once_and_paid_for():
    now = [0.0]
    meter, limited = Meter(lambda: now[0]), key(tokens_per_minute=60)
    assert meter.enter(limited, 120) is None
    refused = meter.enter(limited, 60)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(120.0)


def test_places_at_work_come_back():
    meter, limited = Meter(lambda: 0.0), key(concurrent=2)
    assert [meter.enter(limited, 1) for _ in range(2)] == [None, None]
    refused = meter.enter(limited, 1)
    assert refused is not None
    assert refused.limit == "concurrent"
    meter.leave(limited)
    assert meter.enter(limited, 1) is None


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 8)), max_size=40))
def test_no_history_lets_more_through_than_the_limit(steps: list[tuple[float, float]]):
    bucket, now, let_in = Bucket(8.0, 0.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        wait = bucket.wait(amount, now)
        if wait == 0:
            bucket.take(amount, now)
            let_in += amount
        else:
            assert bucket.wait(amount, now + wait * 1.0000001) == pytest.approx(0.0, abs=1e-6)
        assert let_in <= 8 + 8 * now / 60 + 1e-6
