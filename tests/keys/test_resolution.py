from __future__ import annotations

import asyncio
import traceback
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from replicate_proxy_mw import (
    CachedKeyResolver,
    FirstOf,
    KeyRequest,
    MappingKeyResolver,
    PermissionDenied,
    ReplicateKey,
    StaticKeyResolver,
)
from replicate_proxy_mw.errors import KeyUnknown, ResolverFailed
from replicate_proxy_mw.keys import resolve

pytestmark = pytest.mark.anyio

REQUEST = KeyRequest(api_key="pk-1", method="GET", path="/account", scope={})


async def test_a_key_or_a_token() -> None:
    key = ReplicateKey("r8_aaaaaaaaaaaaaaaa")

    async def of_key(request: KeyRequest) -> ReplicateKey:
        return key

    async def of_token(request: KeyRequest) -> str:
        return "r8_bbbbbbbbbbbbbbbb"

    assert await resolve(of_key, REQUEST, seconds=1) is key
    found = await resolve(of_token, REQUEST, seconds=1)
    assert found.authorization() == b"Bearer r8_bbbbbbbbbbbbbbbb"


async def test_nobody_we_know() -> None:
    async def resolver(request: KeyRequest) -> None:
        return None

    with pytest.raises(KeyUnknown):
        await resolve(resolver, REQUEST, seconds=1)


async def test_somebody_who_may_not() -> None:
    async def resolver(request: KeyRequest) -> None:
        raise PermissionDenied("only on weekdays")

    with pytest.raises(PermissionDenied, match="only on weekdays"):
        await resolve(resolver, REQUEST, seconds=1)


class Secretive(Exception):
    pass


async def _raises(request: KeyRequest) -> None:
    raise Secretive("postgres://user:hunter2@db")


async def _hangs(request: KeyRequest) -> None:
    await anyio.sleep_forever()


async def _rubbish(request: KeyRequest) -> Any:
    return 42


async def _no_token(request: KeyRequest) -> str:
    return "hunter2\n"


@pytest.mark.parametrize(
    ("resolver", "named"),
    [(_raises, "Secretive"), (_hangs, "TimeoutError"), (_rubbish, "ValueError"), (_no_token, "ValueError")],
)
async def test_a_resolver_that_fails_fails_closed_and_tells_its_class_alone(
    resolver: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ResolverFailed) as raised:
        await resolve(resolver, REQUEST, seconds=0.05)
    assert caplog.messages == [f"key resolver failed: {named}"]
    assert "hunter2" not in caplog.text
    assert raised.value.__context__ is None


async def test_a_token_that_is_none_is_in_no_traceback() -> None:
    async def resolver(request: KeyRequest) -> str:
        return "r8_" + "secret" + "\n"

    with pytest.raises(ResolverFailed) as raised:
        await resolve(resolver, REQUEST, seconds=1)
    report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    assert "r8_secret" not in "".join(report.format())


def test_a_task_that_the_resolver_waited_for_and_that_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        shared = asyncio.ensure_future(asyncio.sleep(10))
        shared.cancel()

        async def resolver(request: KeyRequest) -> None:
            await shared

        with pytest.raises(ResolverFailed):
            await resolve(resolver, REQUEST, seconds=1)

    asyncio.run(main())
    assert caplog.messages == ["key resolver failed: CancelledError"]


async def test_cancellation_passes() -> None:
    with anyio.move_on_after(0.01) as scope:
        await resolve(_hangs, REQUEST, seconds=5)
    assert scope.cancelled_caught


class _Pickier(StaticKeyResolver):
    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        await anyio.lowlevel.checkpoint()
        return None if request.method == "GET" else await super().__call__(request)


class _Knows:
    async def __call__(self, request: KeyRequest, /) -> str:
        await anyio.lowlevel.checkpoint()
        return "r8_bbbbbbbbbbbbbbbb"


async def test_what_a_subclass_checks_is_not_passed_by() -> None:
    resolver = _Pickier("r8_aaaaaaaaaaaaaaaa", api_keys=["pk-1"])
    for picky in (resolver, FirstOf(resolver)):
        with pytest.raises(KeyUnknown):
            await resolve(picky, REQUEST, seconds=1)
        assert await resolve(picky, replace(REQUEST, method="POST"), seconds=1)


@pytest.mark.parametrize(("api_key", "token"), [("pk-1", "aaaa"), ("pk-2", "cccc"), ("pk-3", "bbbb")])
async def test_the_first_who_knows_is_asked_whether_or_not_it_has_to_wait(api_key: str, token: str) -> None:
    known = MappingKeyResolver({"pk-1": "r8_aaaaaaaaaaaaaaaa", "pk": "r8_aaaaaaaaaaaaaaaa"})
    also = StaticKeyResolver("r8_cccccccccccccccc", api_keys=["pk-2"])
    request = replace(REQUEST, api_key=api_key)
    key = await resolve(FirstOf(known, also, _Knows()), request, seconds=1)
    assert key.authorization().decode().endswith(token)
    with pytest.raises(KeyUnknown):
        await resolve(FirstOf(known, also), replace(REQUEST, api_key="pk-4"), seconds=1)


async def test_who_may_not_is_told_by_one_that_need_not_wait() -> None:
    resolver = MappingKeyResolver({"pk-1": {"main": "r8_aaaaaaaaaaaaaaaa"}})
    with pytest.raises(PermissionDenied):
        await resolve(resolver, replace(REQUEST, provider="@other"), seconds=1)


async def test_what_is_remembered_needs_no_waiting_and_what_is_not_is_asked_for() -> None:
    asked = []

    async def inner(request: KeyRequest) -> str:
        asked.append(request.api_key)
        await anyio.lowlevel.checkpoint()
        return "r8_aaaaaaaaaaaaaaaa"

    resolver = CachedKeyResolver(inner)
    for api_key in ("pk-1", "pk-1", "", ""):
        assert await resolve(resolver, replace(REQUEST, api_key=api_key), seconds=1)
    assert asked == ["pk-1", "", ""]


async def test_a_host_s_resolver_with_a_method_of_that_name_is_awaited() -> None:
    class Own:
        def _at_once(self, request: KeyRequest) -> None:
            raise AssertionError

        async def __call__(self, request: KeyRequest) -> str:
            return "r8_0123456789"

    key = await resolve(Own(), REQUEST, seconds=1)
    assert isinstance(key, ReplicateKey)
