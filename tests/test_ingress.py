from __future__ import annotations

from typing import Any

import anyio
import pytest

from replicate_proxy_mw.errors import ClientDisconnected
from replicate_proxy_mw.ingress import RequestBody, while_connected
from tests.raw_asgi import Caller

pytestmark = pytest.mark.anyio


def _body(caller: Caller) -> RequestBody:
    receive: Any = caller.receive
    return RequestBody(receive)


def _not_yet() -> bool:
    return False


@pytest.mark.parametrize(
    ("sent", "whole"), [([b""], 0), ([b"ab"], 2), ([b"ab", b""], None), ([b"", b"a", b"", b"b"], None)]
)
async def test_the_body_comes_as_it_was_sent(sent: list[bytes], whole: int | None) -> None:
    body = _body(Caller(list(sent)))
    await body.begin()
    assert body.whole == whole
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
    caller = Caller([b"a", b"b", b"c"])
    body = _body(caller)
    await body.begin()
    assert await anext(body) == b"a"
    caller.left.set()
    with pytest.raises(ClientDisconnected):
        await anext(body)
    with pytest.raises(StopAsyncIteration):
        await anext(body)


async def test_the_watcher_waits_for_the_body_s_end() -> None:
    caller = Caller([b"a", b"b"])
    body = _body(caller)
    await body.begin()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(body.departure)
        await anyio.wait_all_tasks_blocked()
        assert caller.received == 1
        assert [chunk async for chunk in body] == [b"a", b"b"]
        await anyio.wait_all_tasks_blocked()
        assert caller.received == 3
        caller.left.set()
    assert body.disconnected


async def test_a_rest_that_nobody_wants_is_read_away() -> None:
    caller = Caller([b"a", b"b", b"c"])
    body = _body(caller)
    await body.begin()
    body.hand_over()
    caller.left.set()
    await body.departure()
    assert body.disconnected


async def test_work_that_gets_done() -> None:
    body = _body(Caller())
    await body.begin()
    done = []

    async def relay() -> None:
        done.append(True)

    await while_connected(body, relay, ending=_not_yet)
    assert done


async def test_work_that_fails_fails_bare() -> None:
    body = _body(Caller())

    async def relay() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
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
    caller = Caller([b"a", b"b"])
    body = _body(caller)
    await body.begin()
    caller.left.set()

    async def relay() -> None:
        try:
            async for _ in body:
                pass
        except ClientDisconnected:
            raise ZeroDivisionError from None

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


async def test_cancellation_from_outside_passes() -> None:
    body = _body(Caller())
    with anyio.move_on_after(0.01) as scope:
        await while_connected(body, anyio.sleep_forever, ending=_not_yet)
    assert scope.cancelled_caught


async def test_a_host_that_refuses_the_rest_of_an_upload_does_not_stop_the_answer() -> None:
    class TooLarge(Exception):
        pass

    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        raise TooLarge

    body = RequestBody(receive)
    await body.begin()
    body.hand_over()
    answered = []

    async def relay() -> None:
        await anyio.sleep(0.01)
        answered.append(True)

    await while_connected(body, relay, ending=_not_yet)
    assert answered
    assert body.failure is None


async def test_what_the_host_raises_while_the_body_is_read_is_kept() -> None:
    async def receive() -> Any:
        raise ZeroDivisionError

    body = RequestBody(receive)
    with pytest.raises(ZeroDivisionError):
        await body.begin()
    assert isinstance(body.failure, ZeroDivisionError)
