from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from replicate_proxy_mw import ending, sharing
from replicate_proxy_mw.errors import LimitExceeded, ProxyError, UpstreamAborted, UpstreamFailed
from replicate_proxy_mw.exchange import ProxyRequest, ProxyResponse
from replicate_proxy_mw.sharing import SharedCall, forwarded_apart
from tests.raw_asgi import Arriving
from tests.requests import request_of

BACKENDS = ["asyncio", "trio"]


class Held:
    """A call that is under way until it is let go."""

    def __init__(self, outcome: object = "done") -> None:
        self.outcome = outcome
        self.begun = self.cancelled = 0
        self.go_on = anyio.Event()

    async def __call__(self) -> object:
        self.begun += 1
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Waiter:
    """One who waits for a call, until it leaves."""

    def __init__(self, call: SharedCall[Any]) -> None:
        self._call, self._scope = call, anyio.CancelScope()
        self.result: object = None
        self.left = False

    async def wait(self) -> None:
        with self._scope:
            try:
                self.result = await self._call.result()
            except Exception as error:
                self.result = error
        self.left = self._scope.cancelled_caught

    def leave(self) -> None:
        self._scope.cancel()


async def _settled() -> None:
    for _ in range(10):
        await checkpoint()


@asynccontextmanager
async def _waiting(call: SharedCall[Any], count: int) -> AsyncIterator[list[Waiter]]:
    waiters = [Waiter(call) for _ in range(count)]
    async with anyio.create_task_group() as tasks:
        for waiter in waiters:
            tasks.start_soon(waiter.wait)
        await _settled()
        yield waiters


# --- a call


@pytest.mark.anyio
async def test_it_begins_at_once_and_all_get_what_it_returns() -> None:
    held = Held({"a": 1})
    call = SharedCall(held)
    await _settled()
    assert (held.begun, call.is_open) == (1, True)
    async with _waiting(call, 3) as waiters:
        held.go_on.set()
    assert all(waiter.result is held.outcome for waiter in waiters)
    assert not call.is_open
    assert await call.result() is held.outcome  # who comes later
    assert held.begun == 1


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
async def test_who_leaves_disturbs_nobody(leaves: tuple[int, ...]) -> None:
    held = Held()
    call = SharedCall(held)
    async with _waiting(call, 3) as waiters:
        for i in leaves:
            waiters[i].leave()
            await _settled()
        assert call.is_open
        held.go_on.set()
    assert [waiter.left for waiter in waiters] == [i in leaves for i in range(3)]
    assert [waiter.result for waiter in waiters] == [None if i in leaves else "done" for i in range(3)]
    assert held.cancelled == 0


@pytest.mark.anyio
async def test_the_last_who_leaves_ends_it() -> None:
    held = Held()
    call = SharedCall(held)
    async with _waiting(call, 2) as waiters:
        for waiter in waiters:
            assert call.is_open
            waiter.leave()
            await _settled()
    assert not call.is_open
    assert held.cancelled == 1
    with pytest.raises(ProxyError) as raised:  # nobody should have asked
        await call.result()
    assert raised.value.code == "internal_error"


@pytest.mark.anyio
async def test_it_is_not_open_from_the_moment_that_nobody_waits() -> None:
    """Its end may take time, and whoever comes meanwhile must not wait for it."""
    ended = anyio.Event()

    async def ends_slowly() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await ended.wait()

    call = SharedCall(ends_slowly)
    async with _waiting(call, 1) as [waiter]:
        waiter.leave()
    assert not call.is_open
    ended.set()
    await _settled()


@pytest.mark.anyio
async def test_who_leaves_at_once_ends_it_before_it_begins() -> None:
    held = Held()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await SharedCall(held).result()
    await _settled()
    assert held.cancelled == held.begun


@pytest.mark.anyio
async def test_one_that_goes_on_to_the_end_when_nobody_waits() -> None:
    held = Held()
    call = SharedCall(held, to_the_end=True)
    async with _waiting(call, 1) as [waiter]:
        waiter.leave()
    assert call.is_open
    held.go_on.set()
    assert await call.result() == "done"
    assert held.cancelled == 0


@pytest.mark.anyio
async def test_one_that_nobody_ever_waits_for_goes_on() -> None:
    held = Held()
    call = SharedCall(held)
    held.go_on.set()
    await _settled()
    assert (held.begun, held.cancelled, call.is_open) == (1, 0, False)


@pytest.mark.anyio
async def test_each_gets_an_error_of_its_own() -> None:
    held = Held(LimitExceeded("no", retry_after=7))
    call = SharedCall(held)
    async with _waiting(call, 3) as waiters:
        held.go_on.set()
    errors = [waiter.result for waiter in waiters]
    assert all(isinstance(error, LimitExceeded) for error in errors)
    assert {(error.message, tuple(error.headers)) for error in errors if isinstance(error, LimitExceeded)} == {
        ("no", ((b"retry-after", b"7"),))
    }
    assert len({id(error) for error in (*errors, held.outcome)}) == 4


@pytest.mark.anyio
async def test_what_else_it_raises() -> None:
    held = Held(ZeroDivisionError())
    call = SharedCall(held)
    held.go_on.set()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await call.result()


_VARIABLE: ContextVar[str] = ContextVar("variable")


@pytest.mark.anyio
async def test_it_has_the_context_of_whoever_makes_it() -> None:
    async def read() -> str:
        found = _VARIABLE.get()
        _VARIABLE.set("its own")
        return found

    _VARIABLE.set("maker")
    call = SharedCall(read)
    _VARIABLE.set("changed")
    assert await call.result() == "maker"
    assert _VARIABLE.get() == "changed"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 has it")
def test_the_event_loop_may_begin_it_where_it_is_made() -> None:
    async def now() -> int:
        return 1

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - as for mypy
        call = SharedCall(now)
        assert not call.is_open
        assert await call.result() == 1

    asyncio.run(main())


def test_nothing_keeps_it_when_it_is_over() -> None:
    async def main() -> None:
        held = Held()
        call = SharedCall(held)
        gc.collect()
        await _settled()
        assert (held.begun, len(sharing._tasks)) == (1, 1)
        held.go_on.set()
        await call.result()
        await _settled()
        assert sharing._tasks == set()

    asyncio.run(main())


def test_a_call_that_is_cancelled_by_what_it_waited_for() -> None:
    async def main() -> None:
        other = asyncio.ensure_future(asyncio.sleep(10))
        other.cancel()

        async def waits() -> None:
            await other

        with pytest.raises(ProxyError):
            await SharedCall(waits).result()

    asyncio.run(main())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to_the_end", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_an_event_loop_that_ends_ends_it(
    backend: str, to_the_end: bool, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[Held, SharedCall[object]]] = []

    async def main() -> None:
        held = Held()
        call = SharedCall(held, to_the_end=to_the_end)
        calls.append((held, call))
        if waits:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call.result)
                await _settled()
                tasks.cancel_scope.cancel()
        else:
            await _settled()

    anyio.run(main, backend=backend)
    [(held, call)] = calls
    assert (held.begun, held.cancelled, call.is_open) == (1, 1, False)
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_who_still_waits_when_the_event_loop_ends_it() -> None:
    """`asyncio.run` cancels all tasks, and some shield themselves for a while."""

    async def main() -> None:
        waiting = asyncio.ensure_future(SharedCall(Held()).result())
        await asyncio.sleep(0)
        [task] = sharing._tasks
        task.cancel()
        with pytest.raises(ProxyError):
            await waiting

    asyncio.run(main())


@pytest.mark.parametrize("backends", [("asyncio", "asyncio"), ("trio", "trio"), ("asyncio", "trio")])
def test_two_event_loops_in_two_threads(backends: tuple[str, str]) -> None:
    both, failures = threading.Barrier(2, timeout=10), []

    async def main() -> None:
        for n in range(50):
            held = Held(n)
            call = SharedCall(held)
            async with _waiting(call, 3) as waiters:
                waiters[n % 3].leave()
                held.go_on.set()
            assert sorted(str(waiter.result) for waiter in waiters if not waiter.left) == [str(n)] * 2

    def run(backend: str) -> None:
        both.wait()
        try:
            anyio.run(main, backend=backend)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sharing._tasks == set()


# --- apart from the exchange


class Opened:
    """What is closed with an exchange, and how often it was."""

    def __init__(self) -> None:
        self.closed = 0

    async def aclose(self) -> None:
        await checkpoint()
        self.closed += 1


class Upstream:
    """Opens something, leaves something to be done, and answers with `body`; and lets a layer put a close of its own
    into the answer."""

    def __init__(self, body: AsyncIterator[bytes], *, headers: Any = (), waits: bool = False) -> None:
        self._body, self._headers, self._waits = body, headers, waits
        self.opened, self.own = Opened(), Opened()
        self.ran: list[str] = []
        self.under_way, self.go_on = anyio.Event(), anyio.Event()

    async def __call__(self, request: ProxyRequest) -> ProxyResponse:
        request.opened.append(self.opened)
        request.afterwards.append(self._afterwards)
        self.under_way.set()
        if self._waits:
            await anyio.sleep_forever()
        return ProxyResponse(status=200, headers=self._headers, body=self._body, aclose=self.own.aclose)

    async def _afterwards(self) -> None:
        self.ran.append("begun")
        await self.go_on.wait()
        self.ran.append("done")


@pytest.mark.anyio
async def test_an_answer_outlives_its_exchange() -> None:
    forward = Upstream(Arriving([b"a", b"b"]), headers=[(b"etag", b"1")])
    forward.go_on.set()
    request = request_of()
    response, whole = await forwarded_apart(forward, request, max_size=2)
    assert whole
    for _ in range(2):  # for several
        assert [chunk async for chunk in response.body] == [b"ab"]
    assert (response.status, response.headers) == (200, ((b"etag", b"1"),))
    assert (request.opened, request.afterwards) == ([], [])
    assert (forward.opened.closed, forward.own.closed) == (1, 1)
    await response.aclose()
    assert forward.own.closed == 1


@pytest.mark.anyio
async def test_what_is_left_to_be_done_delays_nobody() -> None:
    forward = Upstream(Arriving([]))
    await forwarded_apart(forward, request_of(), max_size=2)
    await _settled()
    assert forward.ran == ["begun"]
    forward.go_on.set()
    await _settled()
    assert forward.ran == ["begun", "done"]


@pytest.mark.anyio
async def test_nothing_is_begun_where_nothing_is_left_to_be_done() -> None:
    async def forward(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse.json(200, {})

    _, whole = await forwarded_apart(forward, request_of(), max_size=2)
    assert whole
    assert sharing._tasks == set()


@pytest.mark.anyio
@pytest.mark.parametrize("headers", [(), ((b"content-type", b"application/json"),)])
async def test_a_longer_body_is_cut_off(headers: Any) -> None:
    forward = Upstream(Arriving([b"a", b"bc", b"d"]), headers=headers)
    forward.go_on.set()
    response, whole = await forwarded_apart(forward, request_of(), max_size=2)
    assert not whole
    assert (response.status, response.headers) == (200, headers)
    assert (forward.opened.closed, forward.own.closed) == (1, 1)


@pytest.mark.anyio
async def test_a_stream_of_events_is_not_waited_for() -> None:
    class Silent:
        def __aiter__(self) -> Silent:
            return self

        async def __anext__(self) -> bytes:
            raise AssertionError

    forward = Upstream(Silent(), headers=((b"content-type", b"text/event-stream"),))
    forward.go_on.set()
    _, whole = await forwarded_apart(forward, request_of(), max_size=2)
    assert not whole
    assert (forward.opened.closed, forward.own.closed) == (1, 1)


def _cut() -> Iterator[bytes]:
    yield b"a"
    raise UpstreamAborted()


@pytest.mark.anyio
async def test_a_cut_body_is_an_error_that_can_be_answered() -> None:
    forward = Upstream(Arriving(_cut()))
    forward.go_on.set()
    with pytest.raises(UpstreamFailed) as raised:
        await forwarded_apart(forward, request_of(), max_size=2)
    assert raised.value.__suppress_context__
    assert (forward.opened.closed, forward.own.closed) == (1, 1)
    await _settled()
    assert forward.ran == ["begun", "done"]


@pytest.mark.anyio
@pytest.mark.parametrize("error", [UpstreamFailed(), ZeroDivisionError()])
async def test_what_fails_is_closed_too(error: Exception) -> None:
    inner = Upstream(Arriving([]))
    inner.go_on.set()

    async def forward(request: ProxyRequest) -> ProxyResponse:
        await inner(request)
        raise error

    with pytest.raises(type(error)):
        await forwarded_apart(forward, request_of(), max_size=2)
    assert inner.opened.closed == 1
    await _settled()
    assert inner.ran == ["begun", "done"]


@pytest.mark.anyio
async def test_what_nobody_waits_for_any_more_is_closed_too() -> None:
    forward = Upstream(Arriving([]), waits=True)
    forward.go_on.set()
    call = SharedCall(partial(forwarded_apart, forward, request_of(), max_size=2))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call.result)
        await forward.under_way.wait()
        tasks.cancel_scope.cancel()
    await _settled()
    assert forward.opened.closed == 1
    assert forward.ran == ["begun", "done"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_event_loop_that_ends_waits_for_what_is_left_to_be_done(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    forwards: list[Upstream] = []

    async def main() -> None:
        forward = Upstream(Arriving([b"a"]), waits=True)
        forwards.append(forward)
        SharedCall(partial(forwarded_apart, forward, request_of(), max_size=2))
        await forward.under_way.wait()
        if backend == "asyncio":
            asyncio.get_running_loop().call_later(0.05, forward.go_on.set)
        else:
            trio.lowlevel.spawn_system_task(_later, forward.go_on)

    async def _later(go_on: anyio.Event) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
        go_on.set()

    anyio.run(main, backend=backend)
    [forward] = forwards
    assert forward.opened.closed == 1
    assert forward.ran == ["begun", "done"]
    gc.collect()
    assert sharing._tasks == set()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_event_loop_that_ends_before_that_is_done(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ending, "AFTERWARDS_TIMEOUT", 0.2)

    async def main() -> None:
        forward = Upstream(Arriving([b"a"]))
        await forwarded_apart(forward, request_of(), max_size=2)
        assert forward.opened.closed == 1

    anyio.run(main, backend=backend)
    gc.collect()
    assert sharing._tasks == set()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.anyio
async def test_the_request_is_the_same_but_for_that() -> None:
    seen: list[ProxyRequest] = []

    async def forward(request: ProxyRequest) -> ProxyResponse:
        seen.append(request)
        return ProxyResponse.json(200, {})

    request = request_of(resend_count=1, traceparent="t")
    await forwarded_apart(forward, request, max_size=2)
    assert seen == [replace(request)]
    assert seen[0].notes is request.notes
