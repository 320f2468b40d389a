from __future__ import annotations

from typing import Any

import anyio
import pytest

from replicate_proxy_mw import KeyRequest, ReplicateKey
from replicate_proxy_mw.errors import ProxyError
from replicate_proxy_mw.keys import CachedKeyResolver
from replicate_proxy_mw.keys.cached import NotVaried
from replicate_proxy_mw.keys.contract import LATER

pytestmark = pytest.mark.anyio

KEY = ReplicateKey("r8_aaaaaaaaaaaaaaaa", tenant="team-a")


def _request(api_key: str = "pk-1") -> KeyRequest:
    return KeyRequest(api_key=api_key, method="GET", path="/account", scope={})


async def test_a_lookup_under_way_is_not_remembered_after_the_second_invalidation_either() -> None:
    let, begun, asked = anyio.Event(), anyio.Event(), 0

    async def inner(request: KeyRequest) -> ReplicateKey:
        nonlocal asked
        asked += 1
        begun.set()
        await let.wait()
        return KEY

    resolver = CachedKeyResolver(inner)
    resolver.invalidate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(resolver, _request())
        await begun.wait()
        resolver.invalidate()
        let.set()
    await resolver(_request())
    assert asked == 2


async def test_what_is_remembered_is_answered_at_once_and_nothing_else() -> None:
    async def inner(request: KeyRequest) -> ReplicateKey | None:
        return KEY if request.api_key == "pk-1" else None

    resolver = CachedKeyResolver(inner)
    for request in (_request(), _request("pk-2")):
        assert resolver._at_once(request) is LATER
        await resolver(request)
    assert resolver._at_once(_request()) is KEY
    assert resolver._at_once(_request("pk-2")) is None
    resolver._remembered = lambda digest: pytest.fail("looked up")  # type: ignore[method-assign]
    assert resolver._at_once(_request("")) is LATER


async def test_an_internal_error_is_an_outage() -> None:
    answers: list[Any] = [KEY, ProxyError()]
    time = 0.0

    async def inner(request: KeyRequest) -> ReplicateKey:
        answer = answers.pop(0)
        if isinstance(answer, ProxyError):
            raise answer
        assert isinstance(answer, ReplicateKey)
        return answer

    resolver = CachedKeyResolver(inner, ttl=30, stale_on_error=30, now=lambda: time)
    await resolver(_request())
    time = 45.0
    assert await resolver(_request()) is KEY
    assert not answers


@pytest.mark.parametrize(
    ("field", "cure"),
    [("scope", "ask what needs it around the cache"), ("metadata", "name it in vary of CachedKeyResolver")],
)
def test_what_is_not_shown_comes_with_its_cure(field: str, cure: str) -> None:
    assert str(NotVaried(field)) == f"KeyRequest.{field} is not shown to a cached resolver: {cure}"
