from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, suppress
from traceback import TracebackException
from types import coroutine
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from replicate_proxy_mw import ingress
from replicate_proxy_mw.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    ClientDisconnected,
    ProxyError,
    UpstreamTimeout,
)
from replicate_proxy_mw.event_loops import asyncio_task
from replicate_proxy_mw.ingress import AHEAD, RequestBody, in_time, while_connected
from replicate_proxy_mw.waiting import Waiting
from tests.raw_asgi import TOKEN, Caller
from tests.tracebacks import locals_of

pytestmark = pytest.mark.anyio


def _body(caller: Caller, *, timeout: float = 5.0) -> RequestBody:
    receive: Any = caller.receive
    return RequestBody(receive, timeout=timeout)


async def _all(body: RequestBody) -> list[bytes]:
    return [chunk async for chunk in body]


async def _read(body: RequestBody, read: list[bytes]) -> None:
    async for chunk in body:
        read.append(chunk)


def _not_yet() -> bool:
    return False


@asynccontextmanager
async def _watched(body: RequestBody, *, declared: int | None = None) -> AsyncIterator[None]:
    """The body begun, and watched as long as the block lasts."""
    await body.begin(declared)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(body.watch)
            yield
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("sent", "whole"), [([b""], b""), ([b"ab"], b"ab"), ([b"ab", b""], None), ([b"", b"a", b"", b"b"], None)]
)
async def test_the_body_comes_as_it_was_sent(sent: list[bytes], whole: bytes | None) -> None:
    body = _body(Caller(list(sent)))
    await body.begin()
    assert body.whole() == whole
    assert whole is None or [chunk async for chunk in body] == []
    body = _body(Caller(list(sent)))
    async with _watched(body):
        assert [chunk async for chunk in body] == [chunk for chunk in sent if chunk]
    assert body.size == len(b"".join(sent))


async def test_a_caller_who_left_before_the_body() -> None:
    caller = Caller()
    caller.left.set()
    body = _body(caller)
    with pytest.raises(ClientDisconnected):
        await body.begin()
    assert body.disconnected


async def test_a_caller_who_leaves_within_the_body() -> None:
    caller = Caller([b"a"] * 10)
    body = _body(caller)
    async with _watched(body):
        caller.left.set()
        with pytest.raises(ClientDisconnected):
            await _all(body)


async def test_a_few_messages_are_read_ahead_and_no_more() -> None:
    caller = Caller([b"a"] * 10)
    body = _body(caller)
    async with _watched(body):
        await anyio.wait_all_tasks_blocked()
        assert caller.received == AHEAD
        assert await anext(aiter(body)) == b"a"
        await anyio.wait_all_tasks_blocked()
        assert caller.received == AHEAD + 1


async def test_a_caller_is_watched_before_anyone_reads_the_body() -> None:
    caller = Caller([b"a", b"b"])
    body = _body(caller)
    async with _watched(body):
        await anyio.wait_all_tasks_blocked()
        caller.left.set()
        await anyio.wait_all_tasks_blocked()
        assert body.disconnected


async def test_a_rest_that_nobody_wants_is_read_away() -> None:
    caller = Caller([b"a"] * 10)
    body = _body(caller)
    async with _watched(body):
        body.abandon()
        await anyio.wait_all_tasks_blocked()
        assert caller.received == 11
        with pytest.raises(ClientDisconnected):
            await anext(aiter(body))


async def test_a_body_is_read_once(caplog: pytest.LogCaptureFixture) -> None:
    body = _body(Caller([b"a", b"b", b"c"]))
    async with _watched(body):
        first, second = aiter(body), aiter(body)
        assert await anext(first) == b"a"
        with pytest.raises(ProxyError):
            await anext(second)
        assert [chunk async for chunk in first] == [b"b", b"c"]
        with pytest.raises(ProxyError):
            await anext(aiter(body))
    assert "read twice" in caplog.text


async def test_an_empty_body_is_read_as_often_as_one_likes() -> None:
    body = _body(Caller())
    async with _watched(body):
        for _ in range(2):
            assert [chunk async for chunk in body] == []


@pytest.mark.parametrize("declared", [1, 3])
async def test_a_whole_body_that_does_not_have_its_length(declared: int) -> None:
    with pytest.raises(BadRequest):
        await _body(Caller([b"ab"])).begin(declared)


@pytest.mark.parametrize("declared", [2, 4])
async def test_a_body_that_turns_out_not_to_have_its_length(declared: int) -> None:
    body = _body(Caller([b"a", b"b", b"c"]))
    async with _watched(body, declared=declared):
        with pytest.raises(BadRequest):
            await _all(body)


async def test_a_body_that_is_said_to_be_too_long_is_not_read() -> None:
    caller = Caller([b"abc"])
    with pytest.raises(BodyTooLarge, match="max_body_size: a body may have 2 bytes"):
        await _body(caller).begin(3, limit=2)
    assert not caller.received


async def test_a_body_as_long_as_it_may_be() -> None:
    body = _body(Caller([b"abc"]))
    await body.begin(3, limit=3)
    assert body.whole() == b"abc"


async def test_a_first_message_that_is_too_long() -> None:
    with pytest.raises(BodyTooLarge):
        await _body(Caller([b"abc"])).begin(limit=2)


async def test_a_body_that_turns_out_too_long_never_becomes_whole() -> None:
    body = _body(Caller([b"ab", b"cd", b"e"]))
    await body.begin(limit=4)
    read: list[bytes] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body.watch)
        with pytest.raises(BodyTooLarge):
            await _read(body, read)
        tasks.cancel_scope.cancel()
    assert read == [b"ab", b"cd"]


async def test_a_first_message_that_does_not_come() -> None:
    caller = Caller([], hold_upload=anyio.Event())
    body = _body(caller, timeout=0.05)
    with pytest.raises(BodyTimeout):
        await body.begin()
    assert body.failure is None


async def test_a_body_that_stops_coming() -> None:
    body = _body(Caller([b"a", b"b"], hold_upload=anyio.Event()), timeout=0.05)
    read: list[bytes] = []
    async with _watched(body):
        with pytest.raises(BodyTimeout):
            await _read(body, read)
    assert read == [b"a"]


async def test_messages_without_content_give_no_more_time() -> None:
    messages = 0

    async def receive() -> Any:
        nonlocal messages
        messages += 1
        await anyio.sleep(0.02)
        return {"type": "http.request", "body": b"", "more_body": messages < 100}

    body = RequestBody(receive, timeout=0.2)
    async with _watched(body):
        with pytest.raises(BodyTimeout):
            await _all(body)
    assert messages < 50


async def test_a_slow_body_has_its_time_for_each_piece() -> None:
    pieces = [b"a"] * 6

    async def receive() -> Any:
        await anyio.sleep(0.1)
        return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

    body = RequestBody(receive, timeout=0.5)
    await body.begin()

    async def relay() -> None:
        assert await _all(body) == [b"a"] * 6

    began = time.monotonic()
    await while_connected(body, relay, ending=_not_yet)
    assert time.monotonic() - began > 0.4


async def test_who_is_not_read_from_has_all_the_time() -> None:
    body = _body(Caller([b"a"] * (AHEAD + 2)), timeout=0.05)
    async with _watched(body):
        reading = aiter(body)
        assert await anext(reading) == b"a"
        await anyio.sleep(0.2)
        assert [chunk async for chunk in reading] == [b"a"] * (AHEAD + 1)


async def test_a_rest_that_nobody_wants_has_all_the_time() -> None:
    caller = Caller([b"a", b"b"], hold_upload=anyio.Event())
    body = _body(caller, timeout=0.05)
    await body.begin()

    async def relay() -> None:
        body.abandon()
        await anyio.sleep(0.2)

    await while_connected(body, relay, ending=_not_yet)
    assert body.failure is None


async def test_what_is_there_in_time() -> None:
    async def at_once() -> str:
        return "at once"

    async def soon() -> str:
        await anyio.sleep(0.01)
        await anyio.sleep(0.01)
        return "soon"

    @coroutine
    def of_a_generator() -> Generator[Any, Any, str]:
        yield from soon().__await__()
        return "of a generator"

    assert await in_time(of_a_generator(), 5, BodyTimeout) == "of a generator"
    assert await in_time(at_once(), 5, BodyTimeout) == "at once"
    assert await in_time(soon(), 5, BodyTimeout) == "soon"


@pytest.mark.parametrize("first", [True, False])
async def test_what_fails_in_time_fails_as_it_is(first: bool) -> None:
    async def fails() -> None:
        if not first:
            await anyio.sleep(0.01)
        raise TimeoutError("the host's own")

    with pytest.raises(TimeoutError, match="the host's own"):
        await in_time(fails(), 5, BodyTimeout)


async def test_what_is_late_is_cleaned_up() -> None:
    cleaned_up = []

    async def late() -> None:
        try:
            await anyio.sleep(10)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            cleaned_up.append(True)

    with pytest.raises(BodyTimeout) as raised:
        await in_time(late(), 0.02, BodyTimeout)
    assert raised.value.__context__ is None
    assert cleaned_up


async def test_a_scope_of_the_host_s_passes() -> None:
    with anyio.move_on_after(0.02) as scope:
        await in_time(anyio.sleep(10), 5, BodyTimeout)
    assert scope.cancelled_caught


def test_who_cancels_what_has_a_time_is_obeyed() -> None:
    async def main() -> None:
        for late in (5.0, 0.02):
            task = asyncio.create_task(in_time(asyncio.sleep(10), late, BodyTimeout))
            await asyncio.sleep(0)
            # Both at once, the second time: nobody looks before both are over.
            asyncio.get_running_loop().call_later(0.02, task.cancel)
            asyncio.get_running_loop().call_soon(time.sleep, 0.03)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


@pytest.mark.parametrize("fails", [True, False])
def test_what_was_waited_for_is_not_shown(fails: bool) -> None:
    async def main() -> None:
        token = asyncio.get_running_loop().create_future()

        async def resolve() -> None:
            assert await token == TOKEN
            if fails:
                raise BodyTimeout
            await asyncio.sleep(10)

        asyncio.get_running_loop().call_soon(token.set_result, TOKEN)
        with pytest.raises(BodyTimeout) as raised:
            await in_time(resolve(), 0.02, BodyTimeout)
        assert "in_time" in _frames(raised.value)
        assert TOKEN[:12] not in locals_of(raised.value)

    asyncio.run(main())


def test_what_does_not_let_itself_be_stopped_is_there_in_time() -> None:
    async def stubborn() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        return "in the end"

    async def main() -> None:
        assert await in_time(stubborn(), 0.02, BodyTimeout) == "in the end"
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    asyncio.run(main())


def test_a_server_s_own_awaitable_need_not_be_a_coroutine() -> None:
    class Bare:
        """As those of servers that are not written in Python."""

        def __init__(self, future: asyncio.Future[str]) -> None:
            self.future = future

        def __await__(self) -> Iterator[Any]:
            return self

        def __iter__(self) -> Bare:
            return self

        def __next__(self) -> Any:
            if self.future.done():
                raise StopIteration(self.future.result())
            self.future._asyncio_future_blocking = True
            return self.future

    async def main() -> None:
        loop = asyncio.get_running_loop()
        soon, never = loop.create_future(), loop.create_future()
        loop.call_later(0.01, soon.set_result, "soon")
        assert await in_time(Bare(soon), 5, BodyTimeout) == "soon"  # type: ignore[arg-type]
        with pytest.raises(BodyTimeout):
            await in_time(Bare(never), 0.02, BodyTimeout)  # type: ignore[arg-type]
        assert never.cancelled()

    asyncio.run(main())


async def test_work_that_gets_done() -> None:
    body = _body(Caller())
    await body.begin()
    done = []

    async def relay() -> None:
        done.append(True)

    await while_connected(body, relay, ending=_not_yet)
    assert done


@pytest.mark.parametrize("failure", [ZeroDivisionError, SystemExit])
async def test_work_that_fails_fails_bare(failure: type[BaseException]) -> None:
    body = _body(Caller())

    async def relay() -> None:
        raise failure

    with pytest.raises(failure):
        await while_connected(body, relay, ending=_not_yet)


async def test_work_is_dropped_when_the_caller_leaves() -> None:
    caller = Caller()
    body = _body(caller)
    await body.begin()
    cleaned_up = []

    async def relay() -> None:
        caller.left.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.append(True)

    with pytest.raises(ClientDisconnected):
        await while_connected(body, relay, ending=_not_yet)
    assert cleaned_up


async def test_what_fails_because_the_caller_left_is_the_caller_s_leaving() -> None:
    caller = Caller()
    body = _body(caller)
    await body.begin()

    async def relay() -> None:
        caller.left.set()
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with pytest.raises(ClientDisconnected):
        await while_connected(body, relay, ending=_not_yet)


async def test_work_that_is_ending_is_left_to_its_end() -> None:
    caller = Caller()
    body = _body(caller)
    await body.begin()
    ended = []

    async def relay() -> None:
        caller.left.set()
        await anyio.wait_all_tasks_blocked()
        ended.append(True)

    await while_connected(body, relay, ending=lambda: True)
    assert ended


@pytest.mark.parametrize("fails", [True, False])
async def test_work_has_its_time(fails: bool) -> None:
    body = _body(Caller())
    await body.begin()
    cleaned_up = []

    async def relay() -> None:
        try:
            await anyio.sleep(10)
        finally:
            cleaned_up.append(True)
            if fails:
                raise ZeroDivisionError

    with pytest.raises(UpstreamTimeout, match="total_timeout"):
        await while_connected(body, relay, ending=_not_yet, deadline=anyio.current_time() + 0.05)
    assert cleaned_up


async def test_a_caller_who_leaves_before_the_time_is_over_has_left() -> None:
    caller = Caller()
    body = _body(caller)
    await body.begin()

    async def relay() -> None:
        caller.left.set()
        await anyio.sleep(10)

    with pytest.raises(ClientDisconnected):
        await while_connected(body, relay, ending=_not_yet, deadline=anyio.current_time() + 5)


async def test_work_that_is_done_in_time_is_done() -> None:
    body = _body(Caller())
    await body.begin()

    async def fails() -> None:
        raise ZeroDivisionError

    await while_connected(body, anyio.lowlevel.checkpoint, ending=_not_yet, deadline=anyio.current_time() + 5)
    with pytest.raises(ZeroDivisionError):
        await while_connected(body, fails, ending=_not_yet, deadline=anyio.current_time() + 5)


async def test_cancellation_from_outside_passes() -> None:
    body = _body(Caller())
    with anyio.move_on_after(0.01) as scope:
        await while_connected(body, anyio.sleep_forever, ending=_not_yet)
    assert scope.cancelled_caught


async def test_a_host_that_refuses_the_rest_of_an_upload_does_not_stop_the_answer() -> None:
    class TooLarge(Exception):
        pass

    abandoned = anyio.Event()
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await abandoned.wait()
        raise TooLarge

    body = RequestBody(receive)
    await body.begin()
    answered = []

    async def relay() -> None:
        body.abandon()
        abandoned.set()
        await anyio.wait_all_tasks_blocked()
        answered.append(True)

    await while_connected(body, relay, ending=_not_yet)
    assert answered
    assert body.failure is None


async def test_what_the_host_raises_while_the_body_is_wanted_is_kept() -> None:
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        raise ZeroDivisionError

    body = RequestBody(receive)
    async with _watched(body):
        with pytest.raises(ZeroDivisionError):
            await _all(body)
    assert isinstance(body.failure, ZeroDivisionError)


def test_a_task_that_work_waited_for_and_that_was_cancelled_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        body = _body(Caller())
        await body.begin()
        shared = asyncio.ensure_future(asyncio.sleep(10))
        shared.cancel()

        async def relay() -> None:
            await shared

        with pytest.raises(ProxyError):
            await while_connected(body, relay, ending=_not_yet)

    asyncio.run(main())
    assert "cancelled by what it waited for" in caplog.text


async def test_nobody_looks_out_for_the_caller_of_an_exchange_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "PATIENCE", 60)
    caller = Caller()
    body = _body(caller)
    await body.begin()
    caller.left.set()

    async def relay() -> None:
        await anyio.sleep(0.1)

    if asyncio_task() is None:
        with pytest.raises(ClientDisconnected):
            await while_connected(body, relay, ending=_not_yet)
    else:
        await while_connected(body, relay, ending=_not_yet)
    assert body.disconnected == (asyncio_task() is None)


async def test_an_upload_is_read_from_the_first_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "PATIENCE", 60)
    body = _body(Caller([b"a", b"b"]))
    await body.begin()

    async def relay() -> None:
        assert await _all(body) == [b"a", b"b"]

    await while_connected(body, relay, ending=_not_yet)


class Asyncio:
    """Cases of asyncio alone: what cancels a task there, and how often."""

    def __init__(self) -> None:
        self.caller = Caller()
        self.body = _body(self.caller)
        self.is_left = asyncio.Event()

    async def exchange(self) -> None:
        await self.body.begin()
        await while_connected(self.body, self.relay, ending=_not_yet)

    async def relay(self) -> None:
        self.caller.left.set()
        try:
            await asyncio.sleep(10)
        finally:
            self.is_left.set()


def _frames(error: BaseException) -> list[str]:
    return [frame.name for frame in TracebackException.from_exception(error).stack]


@pytest.mark.parametrize("times", [1, 2])
def test_a_host_s_task_that_is_cancelled_interrupts_nothing_that_is_shielded(times: int) -> None:
    async def main() -> None:
        ran = []
        begun = asyncio.Event()
        body = _body(Caller())
        await body.begin()

        async def relay() -> None:
            try:
                begun.set()
                await asyncio.sleep(10)
            finally:
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(0.05)
                    ran.append("recorded")

        async def host() -> None:
            await while_connected(body, relay, ending=_not_yet)

        exchange = asyncio.create_task(host())
        await begun.wait()
        for _ in range(times):
            exchange.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError) as raised:
            await exchange
        assert ran == ["recorded"]
        # Who cancels is shown nothing of what was on its way.
        assert "_end_of" in _frames(raised.value)
        assert "relay" not in _frames(raised.value)

    asyncio.run(main())


def test_a_host_s_timeout_is_its_own() -> None:
    async def main() -> None:
        body = _body(Caller())
        await body.begin()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await while_connected(body, anyio.sleep_forever, ending=_not_yet)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())


def test_a_caller_who_left_leaves_the_host_s_task_uncancelled() -> None:
    async def main() -> None:
        with pytest.raises(ClientDisconnected):
            await Asyncio().exchange()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    asyncio.run(main())


def test_who_cancels_the_host_s_task_while_the_caller_leaves_is_obeyed() -> None:
    async def main() -> None:
        case = Asyncio()

        async def relay() -> None:
            case.caller.left.set()
            try:
                await asyncio.sleep(10)
            finally:
                exchange.cancel()
                await asyncio.sleep(10)

        case.relay = relay  # type: ignore[method-assign]
        exchange = asyncio.create_task(case.exchange())
        with pytest.raises(asyncio.CancelledError):
            await exchange
        assert exchange.cancelled()

    asyncio.run(main())


def test_an_exchange_that_does_not_let_itself_be_cancelled_goes_on() -> None:
    async def main() -> None:
        case = Asyncio()

        async def relay() -> None:
            with suppress(asyncio.CancelledError):
                await Asyncio.relay(case)

        case.relay = relay  # type: ignore[method-assign]
        await case.exchange()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())


class Watched(Waiting):
    """Tells whether somebody waits, and how often anybody did."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.times = 0

    def __enter__(self) -> None:
        super().__enter__()
        self.now += 1
        self.times += 1

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.now -= 1


async def test_waiting_for_the_caller_is_counted() -> None:
    caller = Caller([b"a", b"b"], hold_upload=anyio.Event())
    body = _body(caller)
    body.waiting = watched = Watched()
    async with _watched(body):
        assert (watched.now, watched.times) == (0, 1)
        reading = body.__aiter__()
        assert await anext(reading) == b"a"
        assert watched.times == 1
        assert caller.hold_upload is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_rest, reading)
            await anyio.wait_all_tasks_blocked()
            assert watched.now == 1
            caller.hold_upload.set()
    assert (watched.now, watched.times) == (0, 2)


async def _rest(reading: AsyncIterator[bytes]) -> None:
    assert [chunk async for chunk in reading] == [b"b"]


async def test_watching_is_no_waiting() -> None:
    caller = Caller()
    body = _body(caller)
    await body.begin()
    body.waiting = watched = Watched()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body.watch)
        await anyio.wait_all_tasks_blocked()
        assert watched.now == 0
        caller.left.set()
    assert watched.times == 0


async def test_what_the_host_raises_ends_the_waiting() -> None:
    async def receive() -> Any:
        raise ZeroDivisionError

    body = RequestBody(receive)
    body.waiting = watched = Watched()
    with pytest.raises(ZeroDivisionError):
        await body.begin()
    assert (watched.now, watched.times) == (0, 1)
