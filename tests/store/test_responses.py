from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import anyio
import anyio.lowlevel
import hishel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.errors import PermissionDenied
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.store.responses import AS_THEY_CAME, ENTRY_SIZE, MAX_PER_KEY, SWEEP, MemoryResponses, Responses
from replicate_proxy_mw.testing import ManualClock
from tests.raw_asgi import Arriving

pytestmark = pytest.mark.anyio

KEY = "00" * 32
BODY = b"x" * 100


def _request(target: str = "/models", **headers: str) -> hishel.Request:
    return hishel.Request("GET", target, hishel.Headers(headers))


def _response(chunks: Iterable[bytes] = (BODY,), **headers: str) -> hishel.Response:
    return hishel.Response(200, hishel.Headers({AS_THEY_CAME: "[]", **headers}), aiter(Arriving(chunks)))


async def _put(
    storage: hishel.AsyncBaseStorage, key: str = KEY, target: str = "/models", body: bytes = BODY, **limits: Any
) -> hishel.Entry:
    entry = await storage.create_entry(_request(target), _response([body]), key, **limits)
    assert await _body(entry) == body
    return entry


async def _body(entry: hishel.Entry) -> bytes:
    assert isinstance(entry.response.stream, AsyncIterator)
    return b"".join([chunk async for chunk in entry.response.stream])


async def _targets(storage: hishel.AsyncBaseStorage, *keys: str) -> list[str]:
    return [entry.request.url for key in keys or (KEY,) for entry in await storage.get_entries(key)]


async def test_an_entry_is_there_once_its_body_has_been_read() -> None:
    storage = MemoryResponses()
    created = await storage.create_entry(_request(), _response([b"a", b"b"], etag='"1"'), KEY)
    stream = created.response.stream
    assert isinstance(stream, AsyncIterator)
    assert [await anext(stream), await anext(stream)] == [b"a", b"b"]
    assert await storage.get_entries(KEY) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    for _ in range(2):
        [found] = await storage.get_entries(KEY)
        assert (found.id, found.request) == (created.id, _request())
        assert (found.response.status_code, found.response.headers["etag"]) == (200, '"1"')
        assert await _body(found) == b"ab"
    assert await storage.get_entries("ff" * 32) == []


async def test_a_body_that_breaks_off_is_not_kept() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ConnectionError

    storage = MemoryResponses()
    entry = await storage.create_entry(_request(), replace(_response(), stream=broken()), KEY)
    with pytest.raises(ConnectionError):
        await _body(entry)
    assert (len(storage), storage.size) == (0, 0)


async def test_one_entry_takes_an_eighth_at_most() -> None:
    storage = MemoryResponses(max_size=80_000)
    assert storage.max_stream_size == 10_000
    longest = 10_000 - ENTRY_SIZE - len("/models" + AS_THEY_CAME + "[]")
    await _put(storage, body=b"x" * (longest + 1))
    assert len(storage) == 0
    await _put(storage, body=b"x" * longest)
    assert (len(storage), storage.size) == (1, 10_000)
    created = await storage.create_entry(_request(), _response([b"x" * 8000] * 20), KEY)
    assert len(await _body(created)) == 160_000
    assert len(storage) == 1


async def test_the_least_recently_used_goes_for_one_more() -> None:
    storage = MemoryResponses(max_entries=2)
    for key in ("aa", "bb", "cc"):
        await _put(storage, key, "/" + key)
        await storage.get_entries("aa")
    assert await _targets(storage, "aa", "bb", "cc") == ["/aa", "/cc"]
    assert (len(storage), storage.evicted) == (2, 1)


async def test_as_many_go_as_it_takes() -> None:
    storage = MemoryResponses(max_size=8 * 10_000)
    for n in range(14):
        await _put(storage, f"{n:02x}", f"/{n}", body=b"x" * 1000)
    assert (len(storage), storage.evicted) == (14, 0)
    await _put(storage, "ff", "/ff", body=b"x" * 5000)
    assert storage.size <= 80_000
    assert (len(storage), storage.evicted) == (13, 2)
    assert await _targets(storage, "00", "01", "02") == ["/2"]


async def test_an_entry_is_forgotten_at_its_time() -> None:
    clock = ManualClock()
    storage = MemoryResponses(default_ttl=100, now=clock.now)
    await _put(storage, target="/short", ttl=10)
    await _put(storage, target="/default")
    clock.advance(9)
    assert await _targets(storage) == ["/short", "/default"]
    clock.advance(1)
    assert await _targets(storage) == ["/default"]
    clock.advance(90)
    assert await _targets(storage) == []
    assert (len(storage), storage.size, storage.evicted) == (0, 0, 0)


async def test_an_entry_without_a_limit_stays() -> None:
    clock = ManualClock()
    storage = MemoryResponses(default_ttl=None, now=clock.now)
    await _put(storage)
    clock.advance(1e9)
    assert len(await storage.get_entries(KEY)) == 1


async def test_an_entry_that_is_used_lives_on_up_to_its_time() -> None:
    clock = ManualClock()
    storage = MemoryResponses(default_ttl=25, default_tti=10, now=clock.now)
    await _put(storage, target="/used")
    await _put(storage, "ff", "/unused")
    await _put(storage, "fe", "/longer", tti=20)
    for _ in range(2):
        clock.advance(9)
        assert await _targets(storage) == ["/used"]
    assert await _targets(storage, "ff", "fe") == ["/longer"]
    clock.advance(7)
    assert await _targets(storage, KEY, "fe") == []


async def test_what_nobody_asks_for_is_forgotten_too() -> None:
    clock = ManualClock()
    storage = MemoryResponses(now=clock.now)
    for n in range(5):
        await _put(storage, f"{n:02x}", ttl=SWEEP - 1)
    await _put(storage, "ff", ttl=SWEEP + 10)
    clock.advance(SWEEP)
    await _put(storage, "fe")
    assert len(storage) == 2


async def test_headers_are_replaced_and_counted() -> None:
    storage = MemoryResponses()
    entry = await _put(storage)
    size = storage.size
    await storage.update_headers(entry.id, hishel.Headers({AS_THEY_CAME: "[]", "etag": '"2"'}))
    assert storage.size == size + len('etag"2"')
    [found] = await storage.get_entries(KEY)
    assert found.response.headers["etag"] == '"2"'
    assert await _body(found) == BODY


async def test_what_is_removed_is_gone() -> None:
    storage = MemoryResponses()
    first, second = await _put(storage, target="/1"), await _put(storage, target="/2")
    await storage.remove_entry(first.id)
    assert await _targets(storage) == ["/2"]
    for id in (first.id, uuid4()):
        await storage.remove_entry(id)
        await storage.update_headers(id, hishel.Headers({}))
    await storage.remove_entry(second.id)
    assert (len(storage), storage.size) == (0, 0)


@pytest.mark.parametrize("options", [{"max_size": 8 * ENTRY_SIZE - 1}, {"max_entries": 0}])
def test_an_option_out_of_range_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MemoryResponses(**options)


def test_several_event_loops_may_share_it() -> None:
    storage = MemoryResponses(max_size=30 * 10_000, max_entries=20)

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
    assert 0 < len(storage) <= 20
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
@given(st.lists(_STEP | st.lists(_PUT, min_size=5, max_size=12), max_size=30), st.sampled_from([4, 20]))
def test_it_stays_within_its_bounds_and_gives_what_was_put(steps: list[Any], max_entries: int) -> None:
    async def play() -> None:
        clock = ManualClock()
        storage = MemoryResponses(max_size=40_000, max_entries=max_entries, now=clock.now)
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
                        assert len(await _body(found)) == size
                case ("remove", at) if put:
                    await storage.remove_entry(put.pop(at % len(put))[0].id)
                case ("update", at, length) if put:
                    headers = hishel.Headers({"x": "y" * length})
                    await storage.update_headers(put[at % len(put)][0].id, headers)
                case ("pass", seconds):
                    clock.advance(seconds)
            # Headers may grow by what a 304 has, a few hundred bytes.
            assert len(storage) <= max_entries
            assert storage.size <= 40_000 + 8 * 500
        for entry, _, _ in put:
            await storage.remove_entry(entry.id)
        assert (len(storage), storage.size) == (0, 0)

    anyio.run(play)


async def nothing() -> None:
    pass


class Switched(MemoryResponses):
    """A storage with a switch: what is awaited before each call may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.before: Callable[[], Awaitable[None]] = nothing
        self.fails_at = ""

    async def create_entry(self, *arguments: Any, **limits: Any) -> hishel.Entry:
        await self._before("create")
        return await super().create_entry(*arguments, **limits)

    async def get_entries(self, key: str) -> list[hishel.Entry]:
        await self._before("get")
        return await super().get_entries(key)

    async def update_headers(self, id: Any, headers: hishel.Headers) -> None:
        await self._before("update")
        await super().update_headers(id, headers)

    async def remove_entry(self, id: Any) -> None:
        await self._before("remove")
        await super().remove_entry(id)

    async def _before(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise ConnectionError
        await self.before()


async def _refuses() -> None:
    raise OSError("hunter2")


async def _denies() -> None:
    raise PermissionDenied("hunter2")


async def _store(responses: Responses, request: hishel.Request, key: str = KEY, body: bytes = BODY) -> None:
    generation = responses.generation(key)
    looked = await responses.look(key, request)
    assert looked is not None
    await responses.replace(key, looked, (request, _response([body])), generation=generation, ttl=60)


async def test_a_new_answer_takes_the_place_of_the_old_one() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    gzip = _request(**{"accept-encoding": "gzip"})
    for request, body in ((_request(), b"1"), (gzip, b"2"), (_request(), b"3")):
        await _store(responses, request, body=body)
    assert len(storage) == 2
    for request, body in ((_request(), b"3"), (gzip, b"2")):
        looked = await responses.look(KEY, request)
        assert looked is not None
        assert looked.found is not None
        assert (looked.found.body, looked.found.pairs) == (body, [])
        assert [entry.id for entry in looked.old] == [looked.found.entry.id]


async def test_of_two_that_were_stored_at_the_same_time_the_later_is_found() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    at_first = await responses.look(KEY, _request())
    assert at_first is not None
    for body in (b"1", b"2"):
        await responses.replace(KEY, at_first, (_request(), _response([body])), generation=0, ttl=60)
    looked = await responses.look(KEY, _request())
    assert looked is not None
    assert looked.found is not None
    assert (looked.found.body, len(looked.old)) == (b"2", 2)
    await _store(responses, _request(), body=b"3")
    assert len(storage) == 1


async def test_nothing_new_ends_the_old_one_too() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    await _store(responses, _request())
    looked = await responses.look(KEY, _request())
    assert looked is not None
    await responses.replace(KEY, looked, None, generation=0, ttl=60)
    assert len(storage) == 0


async def test_under_one_key_there_are_so_many() -> None:
    storage = MemoryResponses()
    responses = Responses(storage, timeout=1)
    targets = [f"/models?cursor={n}" for n in range(MAX_PER_KEY + 3)]
    for target in targets:
        await _store(responses, _request(target))
    assert await _targets(storage) == targets[3:]
    await _store(responses, _request(targets[-1]))
    assert len(storage) == MAX_PER_KEY


async def test_an_answer_that_is_out_of_date_is_not_stored() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    looked = await responses.look(KEY, _request())
    assert looked is not None
    before = responses.generation(KEY)
    await responses.end(KEY)
    await responses.replace(KEY, looked, (_request(), _response()), generation=before, ttl=60)
    assert "create" not in storage.calls
    assert responses.generation("ff" * 32) == 0


async def test_nor_one_that_is_so_when_it_has_been_stored() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    looked = await responses.look(KEY, _request())
    assert looked is not None

    async def ends() -> None:
        storage.before = nothing
        await responses.end(KEY)

    storage.before = ends
    await responses.replace(KEY, looked, (_request(), _response()), generation=0, ttl=60)
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
    await _store(responses, _request())
    looked = await responses.look(KEY, _request())
    assert looked is not None
    storage.before = fails
    with caplog.at_level(logging.WARNING):
        assert await responses.look(KEY, _request()) is None
        await responses.replace(KEY, looked, (_request(), _response()), generation=0, ttl=60)
        await responses.update(looked.old)
        await responses.end(KEY)
    assert caplog.messages == [f"cache storage failed: {name}"] * 4
    assert responses.generation(KEY) == 1
    storage.before = nothing
    assert len(await storage.get_entries(KEY)) == 1


@pytest.mark.parametrize("headers", [{}, {AS_THEY_CAME: "["}])
async def test_what_somebody_else_has_stored_is_not_understood(headers: dict[str, str]) -> None:
    storage = MemoryResponses()
    response = hishel.Response(200, hishel.Headers(headers), aiter(Chunks([BODY])))
    await _body(await storage.create_entry(_request(), response, KEY))
    assert await Responses(storage, timeout=1).look(KEY, _request()) is None


async def test_what_is_out_of_date_ends_even_if_the_request_does() -> None:
    storage = Switched()
    responses = Responses(storage, timeout=1)
    await _store(responses, _request())
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
