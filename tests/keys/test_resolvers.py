from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from replicate_proxy_mw import KeyRequest, MappingKeyResolver, PermissionDenied, ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.keys import FirstOf, KeyResolver
from replicate_proxy_mw.policy import Policy

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
    with pytest.raises(ValueError, match="list of keys"):
        StaticKeyResolver(TOKEN_A, api_keys="pk-1")


def test_a_wrong_token_is_refused_when_the_resolver_is_made() -> None:
    with pytest.raises(ValueError, match="not a Replicate API token"):
        MappingKeyResolver({"pk-a": "r8"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: StaticKeyResolver("hunter2", api_keys=["pk-hunter2"]),
        lambda: StaticKeyResolver(TOKEN_A, api_keys=["pk-hunter2", ""]),
        lambda: MappingKeyResolver({"pk-hunter2": "hunter2"}),
        lambda: MappingKeyResolver({"pk-hunter2": {"@": "hunter2"}}),
        lambda: MappingKeyResolver({"pk-hunter2": {"main": "hunter2"}}),
    ],
)
def test_no_frame_of_an_error_shows_a_key(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make()
    shown = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    frames = [frame for frame in shown.stack if "replicate_proxy_mw" in frame.filename]
    assert frames
    assert not any("hunter2" in text for frame in frames for text in (frame.locals or {}).values())
    assert "hunter2" not in str(raised.value)


MAIN, VIDEO = (
    ReplicateKey(TOKEN_A, tenant="team-a"),
    ReplicateKey(TOKEN_B, tenant="team-v", policy=Policy(models=["a/*"])),
)


async def test_several_accounts_for_one_key() -> None:
    resolver = MappingKeyResolver({"pk-a": {"main": MAIN, "video": VIDEO}, "pk-b": {"video": TOKEN_B}, "pk-c": TOKEN_A})
    for provider, key in ((None, MAIN), ("@main", MAIN), ("@video", VIDEO), ("@replicate", MAIN)):
        assert await resolver(replace(_request("pk-a"), provider=provider)) is key
    assert await resolver(replace(_request("pk-a"), virtual_key="video")) is VIDEO
    assert await resolver(replace(_request("pk-a"), config='{"provider": "@video"}')) is VIDEO
    found = await resolver(_request("pk-b"))
    assert found is not None
    assert found.authorization().endswith(TOKEN_B.encode())
    for api_key in ("pk-a", "pk-b"):
        with pytest.raises(PermissionDenied):
            await resolver(replace(_request(api_key), provider="@other"))
    assert await resolver(replace(_request("pk-c"), provider="@other")) is not None
    assert await resolver(replace(_request("pk-d"), provider="@other")) is None


async def test_a_token_that_a_caller_brings_goes_by_the_account_it_names() -> None:
    resolver = MappingKeyResolver({"pk-a": {"main": MAIN, "video": VIDEO}}, caller_tokens=True)
    brought = replace(_request("pk-a"), provider="replicate", caller_token="r8_cccccccccccccccc")
    for virtual_key, account in ((None, MAIN), ("video", VIDEO)):
        found = await resolver(replace(brought, virtual_key=virtual_key))
        assert found is not None
        assert found.authorization() == b"Bearer r8_cccccccccccccccc"
        assert (found.tenant, found.policy) == (account.tenant, account.policy)
    with pytest.raises(PermissionDenied):
        await resolver(replace(brought, virtual_key="other"))


@pytest.mark.parametrize(
    ("accounts", "problem"),
    [
        ({}, "at least one"),
        ({"": TOKEN_A}, "not empty"),
        ({"main": TOKEN_A, "@secret": TOKEN_A}, "without @"),
        ({"main": "secret"}, "not a Replicate API token"),
    ],
)
def test_accounts_that_are_none(accounts: Mapping[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        MappingKeyResolver({"pk-secret": accounts})
    assert "secret" not in str(raised.value)


class _Answering:
    def __init__(self, answer: Any) -> None:
        self._answer, self.asked = answer, 0

    async def __call__(self, request: KeyRequest) -> Any:
        self.asked += 1
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("answer", [MAIN, TOKEN_A, "", False])
async def test_the_first_who_knows_the_caller_answers(answer: object) -> None:
    resolvers = [_Answering(None), _Answering(answer), _Answering(VIDEO)]
    resolver: KeyResolver = FirstOf(*resolvers)
    assert await resolver(_request("pk-a")) is answer
    assert [one.asked for one in resolvers] == [1, 1, 0]


async def test_nobody_knows_the_caller() -> None:
    assert await FirstOf(_Answering(None), _Answering(None))(_request("pk-a")) is None


@pytest.mark.parametrize("error", [PermissionDenied("no"), OSError(), KeyError("pk-a")])
async def test_one_who_refuses_or_fails_is_not_passed_over(error: Exception) -> None:
    after = _Answering(MAIN)
    with pytest.raises(type(error)) as raised:
        await FirstOf(_Answering(None), _Answering(error), after)(_request("pk-a"))
    assert raised.value is error
    assert after.asked == 0


def test_nobody_to_ask() -> None:
    with pytest.raises(ValueError, match="at least one resolver"):
        FirstOf()
