from __future__ import annotations

from dataclasses import replace

import pytest

from replicate_proxy_mw import KeyRequest, MappingKeyResolver, ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.keys import KeyResolver

pytestmark = pytest.mark.anyio

TOKEN_A, TOKEN_B = "r8_aaaaaaaaaaaaaaaa", "r8_bbbbbbbbbbbbbbbb"


def _request(api_key: str) -> KeyRequest:
    return KeyRequest(api_key=api_key, method="GET", path="/account", scope={})


async def test_one_token_for_everyone_who_is_known() -> None:
    resolver: KeyResolver = StaticKeyResolver(TOKEN_A, api_keys=["pk-1", "pk-ü"])
    for api_key in ("pk-1", "pk-ü"):
        key = await resolver(_request(api_key))
        assert isinstance(key, ReplicateKey)
        assert key.authorization().endswith(TOKEN_A.encode())
    assert await resolver(_request("pk-2")) is None
    assert await resolver(_request("pk-")) is None


async def test_one_token_with_a_tenant() -> None:
    key = ReplicateKey(TOKEN_A, tenant="team-a")
    assert await StaticKeyResolver(key, api_keys=["pk-1"])(_request("pk-1")) is key


async def test_a_token_for_each_key() -> None:
    key = ReplicateKey(TOKEN_A, tenant="team-a")
    resolver: KeyResolver = MappingKeyResolver({"pk-a": key, "pk-b": TOKEN_B})
    assert await resolver(_request("pk-a")) is key
    found = await resolver(_request("pk-b"))
    assert isinstance(found, ReplicateKey)
    assert found.authorization().endswith(TOKEN_B.encode())
    assert await resolver(_request("PK-A")) is None


@pytest.mark.parametrize(
    ("api_key", "provider", "caller_token", "token"),
    [
        ("pk-a", "replicate", "r8_cccccccccccccccc", "r8_cccccccccccccccc"),
        ("pk-a", "@replicate", "r8_cccccccccccccccc", TOKEN_A),
        ("pk-a", None, "r8_cccccccccccccccc", TOKEN_A),
        ("pk-a", "replicate", None, TOKEN_A),
        ("pk-b", "replicate", "r8_cccccccccccccccc", None),
    ],
)
async def test_tokens_that_callers_bring(
    api_key: str, provider: str | None, caller_token: str | None, token: str | None
) -> None:
    keys = {"pk-a": ReplicateKey(TOKEN_A, tenant="team-a")}
    request = replace(_request(api_key), provider=provider, caller_token=caller_token)
    found = await MappingKeyResolver(keys, caller_tokens=True)(request)
    if token is None:
        assert found is None
    else:
        assert found is not None
        assert (found.authorization(), found.tenant) == (b"Bearer " + token.encode(), "team-a")
    kept = await MappingKeyResolver(keys)(request)
    assert kept is (None if token is None else keys["pk-a"])


@pytest.mark.parametrize(
    "brought",
    ["unused", "undefined", "sk-xxxxxxxxxxxx", "pk-b", "pk-a=", "r8_known_as_a_key", "r8_short", "r8_0123\n45678"],
)
async def test_what_is_no_token_counts_as_not_brought(brought: str) -> None:
    request = replace(_request("pk-a"), provider="replicate", caller_token=brought)
    keys: dict[str, ReplicateKey | str] = {"pk-a": ReplicateKey(TOKEN_A), "pk-b": TOKEN_B, "r8_known_as_a_key": TOKEN_B}
    assert await MappingKeyResolver(keys, caller_tokens=True)(request) is keys["pk-a"]


async def test_an_old_token_is_one_too() -> None:
    request = replace(_request("pk-a"), provider="replicate", caller_token="0123456789" * 4)
    found = await MappingKeyResolver({"pk-a": TOKEN_A}, caller_tokens=True)(request)
    assert found is not None
    assert found.authorization() == b"Bearer " + b"0123456789" * 4


def test_a_resolver_without_keys_would_be_an_open_door() -> None:
    for api_keys in ([], [""], ["pk-1", ""]):
        with pytest.raises(ValueError, match="at least one key"):
            StaticKeyResolver(TOKEN_A, api_keys=api_keys)
        with pytest.raises(ValueError, match="at least one key"):
            MappingKeyResolver(dict.fromkeys(api_keys, TOKEN_A))


def test_one_key_is_no_list_of_keys() -> None:
    with pytest.raises(TypeError, match="list of keys"):
        StaticKeyResolver(TOKEN_A, api_keys="pk-1")


def test_a_wrong_token_is_refused_when_the_resolver_is_made() -> None:
    with pytest.raises(ValueError, match="not a Replicate API token"):
        MappingKeyResolver({"pk-a": "r8"})
