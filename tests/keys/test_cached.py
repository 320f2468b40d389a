from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replicate_proxy_mw import KeyRequest, PermissionDenied, ReplicateKey
from replicate_proxy_mw.errors import LimitExceeded, Overloaded, ProxyError, ResolverFailed
from replicate_proxy_mw.keys import CachedKeyResolver, FirstOf, KeyResolver, resolve
from replicate_proxy_mw.keys.cached import MAX_OF_ONE, NotVaried, _Entries

pytestmark = pytest.mark.anyio

KEY, OTHER = ReplicateKey("r8_aaaaaaaaaaaaaaaa", tenant="team-a"), ReplicateKey("r8_bbbbbbbbbbbbbbbb")
REQUEST = KeyRequest(
    api_key="pk-secret", provider="@main", metadata={"team": "a"}, method="GET", path="/account", scope={"user": "ada"}
)


class Secretive(Exception):
    pass


class Inner:
    """Answers with what is set, once it is let."""

    def __init__(self, answer: Any = KEY) -> None:
        self.answer = answer
        self.requests: list[KeyRequest] = []
        self.let = anyio.Event()
        self.let.set()
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    async def __call__(self, request: KeyRequest) -> Any:
        self.requests.append(request)
        await self.let.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @property
    def asked(self) -> int:
        return len(self.requests)


def _cached(inner: Inner, **keywords: Any) -> CachedKeyResolver:
    return CachedKeyResolver(inner, now=inner.now, **keywords)


def _of(api_key: str) -> KeyRequest:
    return replace(REQUEST, api_key=api_key)


async def _outcome(resolver: KeyResolver, request: KeyRequest = REQUEST) -> Any:
    try:
        return await resolver(request)
    except Exception as error:
        return error


async def _together(resolver: KeyResolver, inner: Inner, requests: list[KeyRequest]) -> list[Any]:
    """What each gets that asks while the first is still waiting for `inner`."""
    outcomes: list[Any] = [None] * len(requests)

    async def ask(number: int, request: KeyRequest) -> None:
        outcomes[number] = await _outcome(resolver, request)

    inner.let = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for number, request in enumerate(requests):
            tasks.start_soon(ask, number, request)
        await anyio.wait_all_tasks_blocked()
        inner.let.set()
    return outcomes


async def test_a_key_is_asked_for_once_in_its_time() -> None:
    inner = Inner()
    resolver: KeyResolver = _cached(inner, ttl=30)
    assert await resolver(REQUEST) is KEY
    inner.time, inner.answer = 1029.9, OTHER
    assert await resolver(REQUEST) is KEY
    inner.time = 1030.0
    assert await resolver(REQUEST) is OTHER
    assert inner.asked == 2


async def test_the_time_of_a_key_begins_when_it_is_asked_for() -> None:
    inner = Inner()

    async def slow(request: KeyRequest) -> ReplicateKey:
        inner.requests.append(request)
        inner.time += 20
        return KEY

    resolver = CachedKeyResolver(slow, ttl=30, now=inner.now)
    await resolver(REQUEST)
    inner.time += 10
    await resolver(REQUEST)
    assert inner.asked == 2


async def test_a_token_becomes_a_key_once() -> None:
    inner = Inner("r8_cccccccccccccccc")
    resolver = _cached(inner)
    key = await resolver(REQUEST)
    assert isinstance(key, ReplicateKey)
    assert key.authorization() == b"Bearer r8_cccccccccccccccc"
    assert await resolver(REQUEST) is key
    assert inner.asked == 1


async def test_an_unknown_caller_is_remembered_for_less_long() -> None:
    inner = Inner(None)
    resolver = _cached(inner, negative_ttl=5)
    assert await resolver(REQUEST) is None
    inner.time, inner.answer = 1004.9, KEY
    assert await resolver(REQUEST) is None
    inner.time = 1005.0
    assert await resolver(REQUEST) is KEY
    inner.time, inner.answer = 1034.9, None
    assert await resolver(REQUEST) is KEY
    inner.time = 1035.0
    assert await resolver(REQUEST) is None
    assert inner.asked == 3


class OnlyOnWeekdays(PermissionDenied):
    status = 418

    def __init__(self, *, request: KeyRequest) -> None:
        super().__init__("only on weekdays", headers=[(b"retry-after", b"9")])
        self.request = request


def _frames(error: BaseException) -> int:
    return len(traceback.extract_tb(error.__traceback__))


async def test_a_refusal_is_raised_anew_for_each() -> None:
    inner = Inner(OnlyOnWeekdays(request=REQUEST))
    resolver = _cached(inner, negative_ttl=5)
    errors = [await _outcome(resolver) for _ in range(5)]
    assert inner.asked == 1
    assert len(set(map(id, errors))) == 5
    for error in errors:
        assert type(error) is OnlyOnWeekdays
        assert (error.message, str(error), error.status) == ("only on weekdays", "only on weekdays", 418)
        assert error.headers == [(b"retry-after", b"9")]
        assert error.__context__ is None
    assert len({_frames(error) for error in errors[1:]}) == 1
    assert not any(hasattr(error, "request") for error in errors[1:])
    inner.time, inner.answer = 1005.0, KEY
    assert await resolver(REQUEST) is KEY


@pytest.mark.parametrize("answer", [Secretive("hunter2"), LimitExceeded("slowly", retry_after=3), Overloaded()])
async def test_no_other_exception_is_remembered(answer: Exception) -> None:
    inner = Inner(answer)
    resolver = _cached(inner)
    for _ in range(2):
        assert await _outcome(resolver) is answer
    inner.answer = KEY
    assert await resolver(REQUEST) is KEY


@pytest.mark.parametrize("answer", [42, "", "hunter2\n", False])
async def test_what_is_no_key_passes_and_is_not_remembered(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    inner = Inner(answer)
    resolver = _cached(inner)
    assert await resolver(REQUEST) is answer
    assert await _together(resolver, inner, [REQUEST] * 2) == [answer] * 2
    assert inner.asked == 2
    with pytest.raises(ResolverFailed):
        await resolve(resolver, REQUEST, seconds=1)
    assert caplog.messages == ["key resolver failed: ValueError"]


VARIED: dict[str, Any] = {
    "api_key": "pk-2",
    "provider": "@video",
    "caller_token": "r8_0000000000000000",
    "virtual_key": "video",
    "config": "pc-1",
    "metadata": {"team": "b"},
    "operation": "account.get",
    "model": "a/b",
    "method": "POST",
    "path": "/predictions",
    "client": "192.0.2.1",
}


def test_every_field_is_tried() -> None:
    assert {*VARIED, "scope"} == {one.name for one in fields(KeyRequest)}


@pytest.mark.parametrize("name", VARIED)
async def test_requests_that_differ_in_what_is_varied_share_nothing(name: str) -> None:
    inner = Inner()
    resolver = _cached(inner, vary=VARIED)
    empty: list[Any] = [] if name == "api_key" else [{}] if name == "metadata" else ["", None]
    values = [getattr(REQUEST, name), VARIED[name], *empty]
    values = [value for number, value in enumerate(values) if value not in values[:number]]
    for _ in range(2):
        for value in values:
            await resolver(replace(REQUEST, **{name: value}))
    assert [getattr(request, name) for request in inner.requests] == values


@pytest.mark.parametrize("name", [name for name in VARIED if name != "api_key"])
async def test_requests_that_differ_in_something_else_share_an_entry(name: str) -> None:
    inner = Inner()
    resolver = _cached(inner, vary=[one for one in VARIED if one != name])
    await resolver(REQUEST)
    await resolver(replace(REQUEST, **{name: VARIED[name]}))
    assert inner.asked == 1


async def test_metadata_in_another_order_is_the_same() -> None:
    inner = Inner()
    resolver = _cached(inner, vary=("api_key", "metadata"))
    await resolver(replace(REQUEST, metadata={"a": "1", "b": "2"}))
    await resolver(replace(REQUEST, metadata={"b": "2", "a": "1"}))
    assert inner.asked == 1
    await resolver(replace(REQUEST, metadata={"a": "2", "b": "1"}))
    assert inner.asked == 2


@pytest.mark.parametrize("name", [one.name for one in fields(KeyRequest) if one.name != "api_key"])
async def test_the_resolver_cannot_see_what_is_not_varied(name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def looking(request: KeyRequest) -> ReplicateKey:
        getattr(request, name)
        return KEY

    resolver = CachedKeyResolver(looking, vary=["api_key"])
    for _ in range(2):
        with pytest.raises(NotVaried, match=rf"KeyRequest\.{name} is not shown"):
            await resolver(REQUEST)
    assert caplog.record_tuples == [
        (
            "replicate_proxy_mw",
            logging.ERROR,
            f"a cached key resolver looked at KeyRequest.{name}, which its vary does not name",
        )
    ]
    with pytest.raises(ResolverFailed):
        await resolve(resolver, REQUEST, seconds=1)
    if name != "scope":
        assert await CachedKeyResolver(looking, vary=["api_key", name])(REQUEST) is KEY


async def test_the_resolver_sees_what_is_varied_and_prints_no_secret() -> None:
    inner = Inner()
    request = replace(REQUEST, caller_token="secret", virtual_key="secret", config="secret")
    await _cached(inner)(request)
    seen = inner.requests[0]
    assert isinstance(seen, KeyRequest)
    assert repr(seen) == "KeyRequest(provider='@main')"
    assert (seen.api_key, seen.caller_token, seen.config) == ("pk-secret", "secret", "secret")
    with pytest.raises(NotVaried, match="ask what needs it around the cache"):
        _ = seen.scope
    with pytest.raises(AttributeError, match="KeyRequest has no 'bearer'") as raised:
        _ = seen.bearer  # type: ignore[attr-defined]
    assert not isinstance(raised.value, NotVaried)


async def test_a_cache_in_a_cache_sees_no_more_than_the_outer_one() -> None:
    inner = Inner()
    outer = CachedKeyResolver(_cached(inner), vary=["api_key"])
    with pytest.raises(NotVaried, match="caller_token"):
        await outer(REQUEST)
    assert await CachedKeyResolver(FirstOf(Inner(None), _cached(inner)))(REQUEST) is KEY


async def test_many_at_once_ask_once() -> None:
    for answer in (KEY, None):
        inner = Inner(answer)
        assert await _together(_cached(inner), inner, [REQUEST] * 20) == [answer] * 20
        assert inner.asked == 1


async def test_many_different_at_once_wait_for_nobody_else() -> None:
    inner = Inner()
    requests = [_of(f"pk-{number}") for number in range(5)] * 2
    assert await _together(_cached(inner), inner, requests) == [KEY] * 10
    assert inner.asked == 5


async def test_many_at_once_are_refused_each_with_an_exception_of_its_own() -> None:
    inner = Inner(PermissionDenied("no"))
    errors = await _together(_cached(inner), inner, [REQUEST] * 5)
    assert inner.asked == 1
    assert [str(error) for error in errors] == ["no"] * 5
    assert len(set(map(id, errors))) == 5


@pytest.mark.parametrize(
    ("answer", "kind", "headers"),
    [
        (Secretive("hunter2"), ResolverFailed, ResolverFailed().headers),
        (LimitExceeded("slowly", retry_after=3), LimitExceeded, ((b"retry-after", b"3"),)),
    ],
)
async def test_if_it_fails_all_who_wait_fail_with_it(
    answer: Exception, kind: type[ProxyError], headers: object, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Inner(answer)
    errors = await _together(_cached(inner), inner, [REQUEST] * 5)
    assert inner.asked == 1
    others = [error for error in errors if error is not answer]
    assert len(set(map(id, others))) == 4
    for error in others:
        assert type(error) is kind
        assert error.headers == headers
        assert "hunter2" not in str(error)
        assert error.__context__ is None
    assert not caplog.messages


async def test_if_the_first_leaves_the_next_one_asks() -> None:
    inner = Inner()
    resolver = _cached(inner)
    inner.let = anyio.Event()
    outcomes: list[Any] = []
    scopes = [anyio.CancelScope() for _ in range(5)]

    async def ask(scope: anyio.CancelScope) -> None:
        with scope:
            outcomes.append(await _outcome(resolver))

    async with anyio.create_task_group() as tasks:
        for scope in scopes:
            tasks.start_soon(ask, scope)
            await anyio.wait_all_tasks_blocked()
        assert inner.asked == 1
        scopes[-1].cancel()
        await anyio.wait_all_tasks_blocked()
        assert inner.asked == 1
        scopes[0].cancel()
        await anyio.wait_all_tasks_blocked()
        assert inner.asked == 2
        inner.let.set()
    assert outcomes == [KEY] * 3
    assert inner.asked == 2
    assert await resolver(REQUEST) is KEY
    assert inner.asked == 2


async def test_a_resolver_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    inner = Inner()
    inner.let = anyio.Event()
    resolver = _cached(inner, timeout=0.01, stale_on_error=60)
    assert isinstance(await _outcome(resolver), TimeoutError)
    inner.let.set()
    await resolver(REQUEST)
    inner.time, inner.let = 1030.0, anyio.Event()
    assert await resolver(REQUEST) is KEY
    assert caplog.messages == ["key resolver failed: TimeoutError; using what it answered before"]


@pytest.mark.parametrize("answer", [Secretive("hunter2"), Overloaded()])
async def test_a_key_outlives_its_time_in_an_outage_if_that_is_wanted(
    answer: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Inner()
    strict, lenient = _cached(inner), _cached(inner, ttl=30, stale_on_error=60)
    for resolver in (strict, lenient):
        await resolver(REQUEST)
    inner.time, inner.answer = 1030.0, answer
    assert await _outcome(strict) is answer
    assert await lenient(REQUEST) is KEY
    inner.time = 1089.9
    assert await _together(lenient, inner, [REQUEST] * 3) == [KEY] * 3
    assert await _outcome(lenient, _of("pk-2")) is answer
    inner.time = 1090.0
    assert await _outcome(lenient) is answer
    assert caplog.messages == [f"key resolver failed: {type(answer).__name__}; using what it answered before"]
    assert caplog.records[0].levelno == logging.WARNING


async def test_a_long_outage_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    inner = Inner()
    resolver = _cached(inner, ttl=30, stale_on_error=3600)
    await resolver(REQUEST)
    inner.answer = Secretive("hunter2")
    for inner.time in (1030.0, 1089.9, 1090.0, 1149.9):
        assert await resolver(REQUEST) is KEY
    assert caplog.messages == ["key resolver failed: Secretive; using what it answered before"] * 2


@pytest.mark.parametrize("answer", [None, PermissionDenied("no"), LimitExceeded("slowly")])
async def test_what_is_said_of_the_caller_is_no_outage(answer: Exception | None) -> None:
    inner = Inner()
    resolver = _cached(inner, ttl=30, stale_on_error=60)
    await resolver(REQUEST)
    inner.time, inner.answer = 1030.0, answer
    outcome = await _outcome(resolver)
    assert outcome is answer


@pytest.mark.parametrize("answer", [None, PermissionDenied("no")])
async def test_who_was_refused_is_not_let_in_by_an_outage(answer: Exception | None) -> None:
    inner = Inner()
    resolver = _cached(inner, ttl=30, negative_ttl=5, stale_on_error=60)
    await resolver(REQUEST)
    inner.time, inner.answer = 1030.0, answer
    await _outcome(resolver)
    inner.time, inner.answer = 1035.0, OSError()
    assert await _outcome(resolver) is inner.answer


async def test_the_key_longest_unused_is_forgotten_for_one_more() -> None:
    inner = Inner()
    resolver = _cached(inner, max_entries=2)
    for api_key in ("pk-1", "pk-2", "pk-1", "pk-3"):
        await resolver(_of(api_key))
    assert inner.asked == 3
    for api_key in ("pk-1", "pk-3"):
        await resolver(_of(api_key))
    assert inner.asked == 3
    await resolver(_of("pk-2"))
    assert inner.asked == 4


@pytest.mark.parametrize("answer", [KEY, None])
async def test_one_that_was_asked_for_again_counts_as_used(answer: ReplicateKey | None) -> None:
    inner = Inner(answer)
    resolver = _cached(inner, max_entries=2)
    for api_key in ("pk-1", "pk-2"):
        await resolver(_of(api_key))
    inner.time += 30
    for api_key in ("pk-1", "pk-3", "pk-1"):
        await resolver(_of(api_key))
    assert inner.asked == 4


async def test_unknown_keys_push_out_no_known_one_and_are_bounded_too() -> None:
    inner = Inner()
    resolver = _cached(inner, max_entries=2)
    await resolver(REQUEST)
    for answer in (None, PermissionDenied("no")):
        inner.answer = answer
        for number in range(3):
            await _outcome(resolver, _of(f"{answer}-{number}"))
    assert await resolver(REQUEST) is KEY
    assert inner.asked == 7
    await _outcome(resolver, _of("no-2"))
    assert inner.asked == 7
    await _outcome(resolver, _of("no-0"))
    assert inner.asked == 8


async def test_forgetting_everything_or_one_caller() -> None:
    inner = Inner()
    resolver = _cached(inner, stale_on_error=60)
    requests = [_of("pk-1"), replace(_of("pk-1"), provider="@video"), _of("pk-2")]

    async def asked() -> int:
        before = inner.asked
        for request in requests:
            await _outcome(resolver, request)
        return inner.asked - before

    assert [await asked(), await asked()] == [3, 0]
    resolver.invalidate("pk-1")
    assert [await asked(), await asked()] == [2, 0]
    resolver.invalidate("pk-3")
    assert await asked() == 0
    resolver.invalidate()
    inner.answer = PermissionDenied("no")
    assert [await asked(), await asked()] == [3, 0]
    resolver.invalidate("pk-1")
    assert await asked() == 2
    inner.answer = OSError()
    resolver.invalidate()
    assert await _outcome(resolver, requests[0]) is inner.answer


@pytest.mark.parametrize("leaving", [False, True])
async def test_a_lookup_under_way_is_not_remembered_after_an_invalidation(leaving: bool) -> None:
    inner = Inner()
    resolver = _cached(inner)
    lets = [anyio.Event(), anyio.Event()]
    outcomes: dict[str, Any] = {}
    first = anyio.CancelScope()

    async def ask(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            outcomes[name] = await resolver(REQUEST)

    async with anyio.create_task_group() as tasks:
        inner.let = lets[0]
        for name, scope in (("first", first), ("waits", anyio.CancelScope())):
            tasks.start_soon(ask, name, scope)
            await anyio.wait_all_tasks_blocked()
        assert inner.asked == 1
        resolver.invalidate()
        inner.let = lets[1]
        for name in ("later", "waits with it"):
            tasks.start_soon(ask, name, anyio.CancelScope())
            await anyio.wait_all_tasks_blocked()
        assert inner.asked == 2
        if leaving:
            first.cancel()
        else:
            lets[0].set()
        await anyio.wait_all_tasks_blocked()
        assert outcomes == ({} if leaving else {"first": KEY, "waits": KEY})
        tasks.start_soon(ask, "later still", anyio.CancelScope())
        await anyio.wait_all_tasks_blocked()
        inner.answer = OTHER
        lets[1].set()
    assert outcomes["later"] is outcomes["waits with it"] is outcomes["later still"] is OTHER
    assert outcomes["waits"] is (OTHER if leaving else KEY)
    assert inner.asked == 2
    assert await resolver(REQUEST) is OTHER


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"ttl": -1}, "ttl: "),
        ({"ttl": float("nan")}, "ttl: "),
        ({"negative_ttl": -0.1}, "negative_ttl: "),
        ({"stale_on_error": -0.1}, "stale_on_error: "),
        ({"timeout": 0}, "timeout: "),
        ({"max_entries": 0}, "max_entries: "),
        ({"vary": ["api_key", "scope"]}, "vary: nothing tells two states"),
        ({"vary": ["provider"]}, "vary: has to have api_key"),
        ({"vary": ["api_key", "bearer"]}, "vary: has to have api_key"),
        ({"vary": "api_key"}, "vary: has to have api_key"),
    ],
)
async def test_what_cannot_be(keywords: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}"):
        CachedKeyResolver(Inner(), **keywords)


async def test_nothing_is_remembered_for_no_time() -> None:
    inner = Inner()
    resolver = _cached(inner, ttl=0, negative_ttl=0, stale_on_error=1)
    await resolver(REQUEST)
    await resolver(REQUEST)
    assert inner.asked == 2
    inner.answer = OSError()
    assert await resolver(REQUEST) is KEY
    inner.answer = None
    assert [await resolver(REQUEST), await resolver(REQUEST)] == [None, None]
    assert inner.asked == 5


def _texts(thing: object) -> set[str]:
    """Every string that can be reached from `thing`, but for what the interpreter itself has."""
    seen: set[int] = set()
    texts: set[str] = set()
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or callable(one) or type(one).__name__ == "module":
            continue
        seen.add(id(one))
        texts |= {one} if isinstance(one, str) else set()
        waiting += gc.get_referents(one)
    return texts


def _count(entries: _Entries) -> int:
    return sum(map(len, entries._by_caller.values()))


async def test_a_caller_without_a_key_is_asked_for_each_time() -> None:
    inner = Inner()
    resolver = _cached(inner)
    for _ in range(2):
        await resolver(replace(REQUEST, api_key=""))
    assert inner.asked == 2
    with pytest.raises(NotVaried):
        _ = inner.requests[0].scope


async def test_a_caller_who_varies_a_request_pushes_out_its_own_alone() -> None:
    inner = Inner()
    resolver = _cached(inner, max_entries=2)
    await resolver(replace(REQUEST, api_key="pk-other"))
    for number in range(MAX_OF_ONE + 1):
        await resolver(replace(REQUEST, config=str(number)))
    asked = inner.asked
    await resolver(replace(REQUEST, api_key="pk-other"))
    await resolver(replace(REQUEST, config="1"))
    assert inner.asked == asked
    await resolver(replace(REQUEST, config="0"))
    assert inner.asked == asked + 1


async def test_one_of_a_caller_s_answers_gives_way_and_the_others_stay() -> None:
    inner = Inner()
    resolver = _cached(inner, ttl=10.0, negative_ttl=100.0)
    await resolver(replace(REQUEST, config="a"))
    inner.time += 9
    await resolver(replace(REQUEST, config="b"))
    inner.time += 2
    inner.answer = None
    assert await resolver(replace(REQUEST, config="a")) is None
    assert await resolver(replace(REQUEST, config="b")) is KEY
    assert _count(resolver._known) == _count(resolver._refused) == 1
    inner.time += 9
    assert await resolver(replace(REQUEST, config="b")) is None
    assert _count(resolver._known) == 0


async def test_a_default_for_what_is_not_shown_is_no_way_around() -> None:
    inner = Inner()
    await _cached(inner)(REQUEST)
    with pytest.raises(NotVaried):
        getattr(inner.requests[0], "scope", None)


async def test_nothing_that_a_caller_sent_is_kept_or_printed(caplog: pytest.LogCaptureFixture) -> None:
    answers = [KEY, None, OnlyOnWeekdays(request=REQUEST), OSError("hunter2")]
    request = replace(REQUEST, caller_token="secret-token", virtual_key="secret-slug", config="secret-config")
    resolver = CachedKeyResolver(FirstOf(Inner(KEY)), stale_on_error=60, now=lambda: 0.0)
    for number, answer in enumerate(answers):
        resolver._inner = Inner(answer)
        await _outcome(resolver, replace(request, api_key=f"pk-secret-{number}"))
    resolver._inner = Inner()
    assert _count(resolver._known) + _count(resolver._refused) == 3
    texts = _texts([vars(resolver)])
    assert {"team-a", "only on weekdays"} <= texts
    assert not [text for text in texts if "secret" in text]
    assert "secret" not in repr(resolver) + str(vars(resolver)) + caplog.text


def _in_threads(*mains: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run(main: Callable[[], Any], backend: str) -> None:
        try:
            anyio.run(main, backend=backend)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(main, ("asyncio", "trio")[number % 2])) for number, main in enumerate(mains)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not errors


def test_one_event_loop_does_not_wait_for_another() -> None:
    asked, answered = threading.Event(), threading.Event()
    calls: list[str] = []

    async def inner(request: KeyRequest) -> ReplicateKey:
        calls.append(threading.current_thread().name)
        asked.set()
        if len(calls) == 1:
            await anyio.to_thread.run_sync(answered.wait, 5)
        return KEY

    resolver = CachedKeyResolver(inner, timeout=5)

    async def slow() -> None:
        assert await resolver(REQUEST) is KEY

    async def quick() -> None:
        await anyio.to_thread.run_sync(asked.wait, 5)
        assert await resolver(REQUEST) is KEY
        answered.set()

    _in_threads(slow, quick)
    assert len(calls) == len(set(calls)) == 2


def test_several_event_loops_use_one_cache() -> None:
    async def inner(request: KeyRequest) -> ReplicateKey | None:
        await checkpoint()
        number = int(request.api_key)
        return ReplicateKey(f"r8_{number:016}", tenant=request.api_key) if number % 3 else None

    resolver = CachedKeyResolver(inner, ttl=0.001, negative_ttl=0.001, max_entries=5, timeout=5)

    async def main() -> None:
        async def ask(offset: int) -> None:
            for number in range(offset, offset + 100):
                key = await resolver(_of(str(number % 20)))
                assert (key.tenant if isinstance(key, ReplicateKey) else key) == (
                    str(number % 20) if number % 20 % 3 else None
                )
                if number % 7 == 0:
                    resolver.invalidate(str(number % 20) if number % 2 else None)

        async with anyio.create_task_group() as tasks:
            for offset in range(5):
                tasks.start_soon(ask, offset)

    _in_threads(main, main, main, main)
    assert _count(resolver._known) <= 5
    assert _count(resolver._refused) <= 5


TTL, NEGATIVE_TTL, STALE = 8, 3, 5
_callers = st.integers(0, 2)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), _callers, st.sampled_from([None, "@main", "@video"])),
        st.tuples(st.just("set"), _callers, st.sampled_from(["key", "other key", "unknown", "refused", "fails"])),
        st.tuples(st.just("wait"), st.integers(0, 9)),
        st.tuples(st.just("invalidate"), st.none() | _callers),
    ),
    max_size=60,
)


@pytest.mark.parametrize("stale", [0, STALE])
@given(steps=_steps, max_entries=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_answer_is_one_that_the_resolver_gave_not_long_ago(
    stale: int, steps: list[tuple[Any, ...]], max_entries: int
) -> None:
    async def main() -> None:
        time = 0
        truth = dict.fromkeys(range(3), "unknown")
        # What was true of each caller, and since when; an invalidation begins anew.
        history: dict[int, list[tuple[int, str]]] = {caller: [(0, "unknown")] for caller in truth}

        async def inner(request: KeyRequest) -> str | None:
            state = truth[int(request.api_key)]
            if state == "refused":
                raise PermissionDenied(f"{request.api_key}{request.provider}")
            if state == "fails":
                raise OSError()
            provider = (request.provider or "none").removeprefix("@")
            return None if state == "unknown" else f"r8_{state.replace(' ', '-')}_{request.api_key}_{provider}"

        def possible(caller: int, word: str, seconds: int) -> bool:
            """Whether `word` was true of `caller` at some moment of the last `seconds`, now included."""
            spans = zip(history[caller], [since for since, _ in history[caller][1:]] + [time + 1], strict=True)
            return any(state == word and until > time - seconds for (_, state), until in spans)

        resolver = CachedKeyResolver(
            inner,
            ttl=TTL,
            negative_ttl=NEGATIVE_TTL,
            stale_on_error=stale,
            max_entries=max_entries,
            vary=("api_key", "provider"),
            now=lambda: float(time),
        )
        for what, *arguments in steps:
            if what == "wait":
                time += arguments[0]
            elif what == "set":
                truth[arguments[0]] = arguments[1]
                history[arguments[0]].append((time, arguments[1]))
            elif what == "invalidate":
                resolver.invalidate(None if arguments[0] is None else str(arguments[0]))
                for caller in truth if arguments[0] is None else arguments:
                    history[caller] = [(time, truth[caller])]
            else:
                caller, provider = arguments
                outcome = await _outcome(resolver, replace(_of(str(caller)), provider=provider))
                if isinstance(outcome, ReplicateKey):
                    state, of, account = outcome.authorization().decode().removeprefix("Bearer r8_").split("_")
                    assert (of, account) == (str(caller), (provider or "none").removeprefix("@"))
                    lasting = TTL + (stale if truth[caller] == "fails" else 0)
                    assert possible(caller, state.replace("-", " "), lasting)
                elif isinstance(outcome, PermissionDenied):
                    assert str(outcome) == f"{caller}{provider}"
                    assert possible(caller, "refused", NEGATIVE_TTL)
                elif outcome is None:
                    assert possible(caller, "unknown", NEGATIVE_TTL)
                else:
                    assert isinstance(outcome, OSError)
                    assert truth[caller] == "fails"

    anyio.run(main)


_texts_of_fields = st.none() | st.sampled_from(["", "a", '"', '","', "null", "\ud800\udc00", "\U00010000"]) | st.text()
_requests = st.builds(
    KeyRequest,
    api_key=st.sampled_from(["a", '"', "a,"]),
    provider=_texts_of_fields,
    caller_token=_texts_of_fields,
    metadata=st.dictionaries(st.sampled_from(["a", "b", '":"']), st.sampled_from(["", "a", '","'])),
    method=st.just("GET"),
    path=st.just("/"),
    scope=st.just({}),
)


@given(one=_requests, other=_requests)
@example(one=replace(REQUEST, provider="\ud800\udc00"), other=replace(REQUEST, provider="\U00010000"))
@settings(deadline=None)
def test_different_requests_never_share_an_entry(one: KeyRequest, other: KeyRequest) -> None:
    async def main() -> None:
        inner = Inner()
        resolver = _cached(inner, vary=("api_key", "provider", "caller_token", "metadata"))
        await resolver(one)
        await resolver(other)
        assert inner.asked == (1 if one == other else 2)

    anyio.run(main)
