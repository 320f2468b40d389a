from __future__ import annotations

import traceback
from collections.abc import Mapping

import pytest

from replicate_proxy_mw import KeyRequest
from replicate_proxy_mw.keys import EnvKeyResolver, KeyResolver
from replicate_proxy_mw.policy import Policy

pytestmark = pytest.mark.anyio

TOKEN = "r8_aaaaaaaaaaaaaaaa"


def _request(api_key: str) -> KeyRequest:
    return KeyRequest(api_key=api_key, method="GET", path="/account", scope={})


def _environ(keys: str, token: str = TOKEN) -> dict[str, str]:
    return {"REPLICATE_API_TOKEN": token, "REPLICATE_PROXY_KEYS": keys}


@pytest.mark.parametrize("between", [",", " ", "\n", ", ", " ,\t,\n", ",,"])
async def test_a_token_and_the_keys_of_its_callers(between: str) -> None:
    entries = ["pk-11111", "team-a=pk-22222", "Team_B.1=pk-33333", "team-a=pk-44444"]
    resolver: KeyResolver = EnvKeyResolver(environ=_environ(between.join(["", *entries, ""])))
    expected = {"pk-11111": None, "pk-22222": "team-a", "pk-33333": "Team_B.1", "pk-44444": "team-a"}
    for api_key, tenant in expected.items():
        key = await resolver(_request(api_key))
        assert key is not None
        assert not isinstance(key, str)
        assert (key.authorization(), key.tenant) == (b"Bearer " + TOKEN.encode(), tenant)
    for unknown in ("pk-55555", "team-a=pk-22222", "team-a", "pk-1111", "PK-11111"):
        assert await resolver(_request(unknown)) is None


async def test_a_key_with_an_equals_sign_needs_its_tenant() -> None:
    resolver = EnvKeyResolver(environ=_environ("team-a=c2VjcmV0IGtleQ== team-b==abcdefg"))
    for api_key, tenant in {"c2VjcmV0IGtleQ==": "team-a", "=abcdefg": "team-b"}.items():
        key = await resolver(_request(api_key))
        assert key is not None
        assert key.tenant == tenant


async def test_the_policy_is_that_of_every_key() -> None:
    policy = Policy(own_predictions=True)
    key = await EnvKeyResolver(environ=_environ("team-a=pk-22222"), policy=policy)(_request("pk-22222"))
    assert key is not None
    assert key.policy is policy


async def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_API_TOKEN", f" {TOKEN}\n")
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-11111")
    resolver = EnvKeyResolver()
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-22222")
    assert await resolver(_request("pk-11111")) is not None
    assert await resolver(_request("pk-22222")) is None


NEITHER = "neither a key of 8 characters or more, nor tenant=key"


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({}, "REPLICATE_API_TOKEN is not set, or empty"),
        ({"REPLICATE_PROXY_KEYS": "pk-secret"}, "REPLICATE_API_TOKEN is not set, or empty"),
        (_environ("pk-secret", " "), "REPLICATE_API_TOKEN is not set, or empty"),
        ({"REPLICATE_API_TOKEN": TOKEN}, "REPLICATE_PROXY_KEYS is not set, or empty"),
        (_environ(" ,\n"), "REPLICATE_PROXY_KEYS is not set, or empty"),
        (_environ("pk-secret", "sëcret"), "REPLICATE_API_TOKEN: not a Replicate API token: .*"),
        (_environ("secret7"), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        (_environ("pk-11111 team-a=secret7"), f"REPLICATE_PROXY_KEYS, entry 2: {NEITHER}"),
        (_environ("pk-11111,=pk-secret"), f"REPLICATE_PROXY_KEYS, entry 2: {NEITHER}"),
        (_environ("team-a = pk-secret"), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        (_environ("secret_team = pk-11111"), f"REPLICATE_PROXY_KEYS, entry 2: {NEITHER}"),
        (_environ("-team=pk-secret"), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        (_environ("tëam=pk-secret"), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        # What could be the first half of a key must not become the name on spans.
        (_environ("pk-secret=secret-secret"), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        (_environ("secret-secret="), f"REPLICATE_PROXY_KEYS, entry 1: {NEITHER}"),
        (_environ("pk-secret,a=pk-11111,b=pk-secret"), "REPLICATE_PROXY_KEYS, entry 3: this key is there before"),
    ],
)
def test_what_is_wrong_is_said_without_a_secret(environ: Mapping[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$") as raised:
        EnvKeyResolver(environ=environ)
    report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    assert raised.value.__context__ is None
    assert "secret" not in str(raised.value)
    inside = [frame.locals for frame in report.stack if frame.filename.endswith("keys/env.py")]
    assert inside
    assert "secret" not in str(inside)
    assert TOKEN not in str(inside)


def test_a_policy_that_counts_by_tenant_needs_one() -> None:
    with pytest.raises(ValueError, match=r"^REPLICATE_PROXY_KEYS, entry 2: own_predictions and max_in_flight"):
        EnvKeyResolver(environ=_environ("team-a=pk-22222 pk-11111"), policy=Policy(max_in_flight=1))
