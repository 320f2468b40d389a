from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import hishel
import pytest

from replicate_proxy_mw.errors import PermissionDenied
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.store.responses import AS_THEY_CAME, MAX_CALLS, MAX_PER_KEY, Responses
from replicate_proxy_mw.store.responses_memory import MemoryResponses
from tests.store.storing import BODY, KEY, Switched, body_of, nothing, request_for, response_of, targets_in

pytestmark = pytest.mark.anyio


async def _refuses() -> None:
    raise OSError("hunter2")


async def _denies() -> None:
    raise PermissionDenied("hunter2")


async def _store(responses: Responses, request: hishel.Request, key: str = KEY, body: bytes = BODY) -> None:
    generation = responses.generation(key)
    looked = await responses.look(key, request)
    assert looked is not None
    await responses.replace(key, looked, (request, response_of([body])), generation=generation, ttl=60)


async def test_a_new_answer_takes_the_place_of_the_old_one() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    gzip = request_for(**{"accept-encoding": "gzip"})
    for request, body in ((request_for(), b"1"), (gzip, b"2"), (request_for(), b"3")):
        await _store(responses, request, body=body)
    assert len(storage) == 2
    for request, body in ((request_for(), b"3"), (gzip, b"2")):
        looked = await responses.look(KEY, request)
        assert looked is not None
        assert looked.found is not None
        assert (looked.found.body, looked.found.pairs) == (body, [])
        assert [entry.id for entry in looked.old] == [looked.found.entry.id]


async def test_of_two_that_were_stored_at_the_same_time_the_later_is_found() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    at_first = await responses.look(KEY, request_for())
    assert at_first is not None
    for body in (b"1", b"2"):
        await responses.replace(KEY, at_first, (request_for(), response_of([body])), generation=0, ttl=60)
    looked = await responses.look(KEY, request_for())
    assert looked is not None
    assert looked.found is not None
    assert (looked.found.body, len(looked.old)) == (b"2", 2)
    await _store(responses, request_for(), body=b"3")
    assert len(storage) == 1


async def test_nothing_new_ends_the_old_one_too() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    await _store(responses, request_for())
    looked = await responses.look(KEY, request_for())
    assert looked is not None
    await responses.replace(KEY, looked, None, generation=0, ttl=60)
    assert len(storage) == 0


async def test_under_one_key_there_are_so_many() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    targets = [f"/models?cursor={n}" for n in range(MAX_PER_KEY + 3)]
    for target in targets:
        await _store(responses, request_for(target))
    assert await targets_in(storage) == targets[3:]
    await _store(responses, request_for(targets[-1]))
    assert len(storage) == MAX_PER_KEY


async def test_an_answer_that_is_out_of_date_is_not_stored() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    looked = await responses.look(KEY, request_for())
    assert looked is not None
    before = responses.generation(KEY)
    await responses.end(KEY)
    await responses.replace(KEY, looked, (request_for(), response_of()), generation=before, ttl=60)
    assert "create" not in storage.calls
    assert responses.generation("ff" * 32) == 0


async def test_nor_one_that_is_so_when_it_has_been_stored() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    looked = await responses.look(KEY, request_for())
    assert looked is not None

    async def ends() -> None:
        storage.before = nothing
        await responses.end(KEY)

    storage.before = ends
    await responses.replace(KEY, looked, (request_for(), response_of()), generation=0, ttl=60)
    assert storage.calls == ["get", "create", "get", "remove"]
    assert len(storage) == 0


@pytest.mark.parametrize(
    ("fails", "name"),
    [(_refuses, "OSError"), (_denies, "PermissionDenied"), (anyio.sleep_forever, "TimeoutError")],
)
async def test_what_a_storage_does_not_do_is_not_done(
    fails: Callable[[], Awaitable[None]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Switched()
    responses = Responses(storage, timeout=0.02)
    await _store(responses, request_for())
    looked = await responses.look(KEY, request_for())
    assert looked is not None
    storage.before = fails
    with caplog.at_level(logging.WARNING):
        assert await responses.look(KEY, request_for()) is None
        await responses.replace(KEY, looked, (request_for(), response_of()), generation=0, ttl=60)
        await responses.update(looked.old[0])
        await responses.end(KEY)
    assert caplog.messages == [f"cache storage failed: {name}"]
    assert responses.generation(KEY) == 1
    storage.before = nothing
    assert len(await storage.get_entries(KEY)) == 1


@pytest.mark.parametrize("headers", [{}, {AS_THEY_CAME: "["}])
async def test_what_somebody_else_has_stored_is_not_understood(headers: dict[str, str]) -> None:
    storage = MemoryResponses()
    response = hishel.Response(200, hishel.Headers(headers), aiter(Chunks([BODY])))
    await body_of(await storage.create_entry(request_for(), response, KEY))
    assert await Responses(storage, timeout=1).look(KEY, request_for()) is None


async def test_what_is_out_of_date_ends_even_if_the_request_does() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    await _store(responses, request_for())
    storage.before = anyio.lowlevel.checkpoint
    with anyio.CancelScope() as scope:
        scope.cancel()
        await responses.end(KEY)
    assert len(storage) == 0


async def test_the_bound_of_a_body_is_the_storage_s() -> None:
    assert Responses(MemoryResponses(max_size=80_000), timeout=1).max_body == 10_000
    assert Responses(MemoryResponses(max_size=1 << 40), timeout=1).max_body == 8 << 20
    unbounded = MemoryResponses()
    unbounded.max_stream_size = None
    assert Responses(unbounded, timeout=1).max_body == 8 << 20


async def test_so_many_calls_are_under_way_at_a_time() -> None:
    storage, go_on = Switched(), anyio.Event()
    responses = Responses(storage, timeout=60)
    storage.before = go_on.wait
    looked = []

    async def look() -> None:
        looked.append(await responses.look(KEY, request_for()))

    async with anyio.create_task_group() as tasks:
        for _ in range(3 * MAX_CALLS):
            tasks.start_soon(look)
        await anyio.wait_all_tasks_blocked()
        assert storage.calls == ["get"] * MAX_CALLS
        # What ends answers has turns of its own.
        tasks.start_soon(responses.end, KEY)
        await anyio.wait_all_tasks_blocked()
        assert len(storage.calls) == MAX_CALLS + 1
        go_on.set()
    assert len(looked) == 3 * MAX_CALLS
    assert None not in looked


async def test_who_gets_no_turn_in_time_finds_nothing() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=0.05)
    storage.before = anyio.sleep_forever
    looked = []

    async def look() -> None:
        looked.append(await responses.look(KEY, request_for()))

    async with anyio.create_task_group() as tasks:
        for _ in range(2 * MAX_CALLS):
            tasks.start_soon(look)
    assert looked == [None] * 2 * MAX_CALLS
