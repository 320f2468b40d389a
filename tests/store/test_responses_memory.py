from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import anyio
import hishel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.store.responses import AS_THEY_CAME
from replicate_proxy_mw.store.responses_memory import ENTRY_SIZE, MemoryResponses
from replicate_proxy_mw.testing import ManualClock
from tests.store.storing import BODY, KEY, body_of, request_for, response_of, targets_in

pytestmark = pytest.mark.anyio


async def _put(
    storage: hishel.AsyncBaseStorage, key: str = KEY, target: str = "/models", body: bytes = BODY, **limits: Any
) -> hishel.Entry:
    entry = await storage.create_entry(request_for(target), response_of([body]), key, **limits)
    assert await body_of(entry) == body
    return entry


async def test_an_entry_is_there_once_its_body_has_been_read() -> None:
    storage = MemoryResponses()
    created = await storage.create_entry(request_for(), response_of([b"a", b"b"], etag='"1"'), KEY)
    stream = created.response.stream
    assert isinstance(stream, AsyncIterator)
    assert [await anext(stream), await anext(stream)] == [b"a", b"b"]
    assert await storage.get_entries(KEY) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    for _ in range(2):
        [found] = await storage.get_entries(KEY)
        assert (found.id, found.request) == (created.id, request_for())
        assert (found.response.status_code, found.response.headers["etag"]) == (200, '"1"')
        assert await body_of(found) == b"ab"
    assert await storage.get_entries("ff" * 32) == []


async def test_a_body_that_breaks_off_is_not_kept() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ConnectionError

    storage = MemoryResponses()
    entry = await storage.create_entry(request_for(), replace(response_of(), stream=broken()), KEY)
    with pytest.raises(ConnectionError):
        await body_of(entry)
    assert (len(storage), storage.size) == (0, 0)


async def test_one_entry_takes_an_eighth_at_most() -> None:
    storage = MemoryResponses(max_size=80_000)
    assert storage.max_stream_size == 10_000
    longest = 10_000 - ENTRY_SIZE - len("/models" + AS_THEY_CAME + "[]")
    await _put(storage, body=b"x" * (longest + 1))
    assert len(storage) == 0
    await _put(storage, body=b"x" * longest)
    assert (len(storage), storage.size) == (1, 10_000)
    created = await storage.create_entry(request_for(), response_of([b"x" * 8000] * 20), KEY)
    assert len(await body_of(created)) == 160_000
    assert len(storage) == 1


async def test_the_least_recently_used_goes_for_one_more() -> None:
    storage = MemoryResponses(max_size=8 * 10_000)
    for n in range(9):
        await _put(storage, f"{n:02x}", f"/{n}", body=b"x" * 5000)
        await storage.get_entries("00")
    assert await targets_in(storage, "00", "01", "02") == ["/0", "/2"]
    assert len(storage) == 8


async def test_as_many_go_as_it_takes() -> None:
    storage = MemoryResponses(max_size=8 * 10_000)
    for n in range(14):
        await _put(storage, f"{n:02x}", f"/{n}", body=b"x" * 1000)
    assert len(storage) == 14
    await _put(storage, "ff", "/ff", body=b"x" * 5000)
    assert storage.size <= 80_000
    assert len(storage) == 13
    assert await targets_in(storage, "00", "01", "02") == ["/2"]


async def test_an_entry_is_forgotten_at_its_time() -> None:
    clock = ManualClock()
    storage = MemoryResponses(now=clock.now)
    await _put(storage, target="/short", ttl=10)
    await _put(storage, target="/unlimited")
    clock.advance(9)
    assert await targets_in(storage) == ["/short", "/unlimited"]
    clock.advance(1)
    assert await targets_in(storage) == ["/unlimited"]
    assert len(storage) == 1
    clock.advance(1e9)
    assert await targets_in(storage) == ["/unlimited"]


async def test_headers_are_replaced_and_counted() -> None:
    storage = MemoryResponses()
    entry = await _put(storage)
    size = storage.size
    await storage.update_headers(entry.id, hishel.Headers({AS_THEY_CAME: "[]", "etag": '"2"'}))
    assert storage.size == size + len('etag"2"')
    [found] = await storage.get_entries(KEY)
    assert found.response.headers["etag"] == '"2"'
    assert await body_of(found) == BODY


async def test_what_is_removed_is_gone() -> None:
    storage = MemoryResponses()
    first, second = await _put(storage, target="/1"), await _put(storage, target="/2")
    await storage.remove_entry(first.id)
    assert await targets_in(storage) == ["/2"]
    for id in (first.id, uuid4()):
        await storage.remove_entry(id)
        await storage.update_headers(id, hishel.Headers({}))
    await storage.remove_entry(second.id)
    assert (len(storage), storage.size) == (0, 0)


def test_an_option_out_of_range_is_told() -> None:
    with pytest.raises(ValueError, match="max_size"):
        MemoryResponses(max_size=8 * ENTRY_SIZE - 1)


def test_several_event_loops_may_share_it() -> None:
    storage = MemoryResponses(max_size=100_000)

    async def use() -> None:
        for n in range(300):
            entry = await _put(storage, f"{n % 7:02x}", f"/{n}")
            await storage.get_entries(f"{n % 5:02x}")
            await storage.update_headers(entry.id, hishel.Headers({}))
            if n % 3 == 0:
                await storage.remove_entry(entry.id)

    threads = [threading.Thread(target=anyio.run, args=(use,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < storage.size <= 100_000
    anyio.run(_empty, storage)
    assert (len(storage), storage.size) == (0, 0)


async def _empty(storage: MemoryResponses) -> None:
    for n in range(7):
        for entry in await storage.get_entries(f"{n:02x}"):
            await storage.remove_entry(entry.id)


_PUT = st.tuples(st.just("put"), st.integers(0, 3), st.integers(0, 600), st.floats(1, 100))
_STEP = st.one_of(
    _PUT,
    st.tuples(st.just("get"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("update"), st.integers(0, 20), st.integers(0, 500)),
    st.tuples(st.just("pass"), st.floats(0, 80)),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(_STEP | st.lists(_PUT, min_size=5, max_size=12), max_size=30))
def test_it_stays_within_its_bounds_and_gives_what_was_put(steps: list[Any]) -> None:
    async def play() -> None:
        clock = ManualClock()
        storage = MemoryResponses(max_size=40_000, now=clock.now)
        put: list[tuple[hishel.Entry, int, float]] = []
        flat = [step for one in steps for step in (one if isinstance(one, list) else [one])]
        for n, step in enumerate(flat):
            match step:
                case ("put", key, size, ttl):
                    entry = await _put(storage, f"{key:02x}", f"/{n}", b"x" * size, ttl=ttl)
                    put.append((entry, size, clock.now() + ttl))
                case ("get", key):
                    for found in await storage.get_entries(f"{key:02x}"):
                        [(size, until)] = [(size, until) for one, size, until in put if one.id == found.id]
                        assert until > clock.now()
                        assert len(await body_of(found)) == size
                case ("remove", at) if put:
                    await storage.remove_entry(put.pop(at % len(put))[0].id)
                case ("update", at, length) if put:
                    headers = hishel.Headers({"x": "y" * length})
                    await storage.update_headers(put[at % len(put)][0].id, headers)
                case ("pass", seconds):
                    clock.advance(seconds)
            # Headers may grow by what a 304 has, a few hundred bytes.
            assert storage.size <= 40_000 + 8 * 500
        for entry, _, _ in put:
            await storage.remove_entry(entry.id)
        assert (len(storage), storage.size) == (0, 0)

    anyio.run(play)
