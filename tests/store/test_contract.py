"""What holds for every store, and that they tell the same story."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from replicate_proxy_mw.store import MemoryPredictionStore, PredictionStore, StoredPrediction
from replicate_proxy_mw.store.redis import RedisPredictionStore
from tests.services import RedisServer

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MINE = StoredPrediction(tenant="team-a", traceparent=TRACEPARENT)
FULL = replace(MINE, details='{"model": "acme/painter"}', status="starting")
OTHERS = StoredPrediction(tenant="team-b")


@pytest.fixture(params=["memory-asyncio", "memory-trio", "redis-asyncio", "redis-asyncio-decoded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return kind.split("-")[1]


@pytest.fixture
async def stores(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[list[PredictionStore]]:
    """As two hosts have it that share it, by clients of their own."""
    if kind.startswith("memory"):
        yield [MemoryPredictionStore()] * 2
        return
    server: RedisServer = request.getfixturevalue("redis_service")
    options, prefix = {"decode_responses": kind.endswith("decoded")}, f"{uuid.uuid4()}:"
    async with Redis.from_url(server.url, **options) as one, Redis.from_url(server.url, **options) as other:
        yield [RedisPredictionStore(redis, prefix=prefix) for redis in (one, other)]


@pytest.fixture
def store(stores: list[PredictionStore]) -> PredictionStore:
    return stores[0]


async def test_what_was_put_is_known(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.put("b", OTHERS)
    assert await store.get(["a", "b", "c"]) == {"a": MINE, "b": OTHERS}
    assert await store.get({"b"}) == {"b": OTHERS}
    assert await store.get([]) == {}


@pytest.mark.parametrize(
    "prediction",
    [
        StoredPrediction(tenant=None),
        StoredPrediction(tenant="", traceparent="", details="", status=""),
        StoredPrediction(tenant="None", traceparent="null", details="null", status="null"),
        FULL,
        StoredPrediction(tenant=None, details='{"a":"🐈\\u0000"}\r\n' * 100, status="\udcff"),
        StoredPrediction(tenant="Büro 🐈\x00\n\"'", traceparent=TRACEPARENT),
        StoredPrediction(tenant="\udcff"),
        StoredPrediction(tenant="t" * 10_000, reads=7, reported=True),
    ],
    ids=repr,
)
async def test_every_value_comes_back_as_it_was(store: PredictionStore, prediction: StoredPrediction) -> None:
    await store.put("a", prediction)
    assert await store.get(["a"]) == {"a": prediction}


async def test_an_id_may_be_any_text(store: PredictionStore) -> None:
    ids = ["", "a", "A", "a:b", "ü", "🐈", "\udcff", "a\r\nDEL a", "x" * 10_000]
    for id in ids[1:]:
        await store.put(id, replace(MINE, tenant=id))
    assert await store.get(ids) == {id: replace(MINE, tenant=id) for id in ids[1:]}


async def test_what_is_known_stays_as_it_is(store: PredictionStore) -> None:
    await store.put("a", FULL)
    await store.read("a", "processing")
    await store.claim("a")
    known = replace(FULL, status="processing", reads=1, reported=True)
    other = StoredPrediction(tenant="team-b", traceparent="", details="[]", status="failed", reads=9)
    for again in (FULL, MINE, OTHERS, other):
        await store.put("a", again)
        assert await store.get(["a"]) == {"a": known}


async def test_what_is_not_known_is_filled_in(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.put("a", replace(OTHERS, traceparent="another", details="{}", reads=9, reported=True))
    assert await store.get(["a"]) == {"a": replace(MINE, details="{}")}
    await store.put("a", FULL)
    assert await store.get(["a"]) == {"a": replace(MINE, details="{}", status="starting")}
    await store.put("b", OTHERS)
    await store.put("b", FULL)
    assert await store.get(["b"]) == {"b": replace(FULL, tenant="team-b")}


async def test_whose_something_is_is_never_filled_in(store: PredictionStore) -> None:
    await store.put("a", StoredPrediction(tenant=None))
    await store.put("a", FULL)
    assert await store.get(["a"]) == {"a": replace(FULL, tenant=None)}


async def test_what_is_empty_is_known(store: PredictionStore) -> None:
    empty = StoredPrediction(tenant="", traceparent="", details="", status="")
    await store.put("a", empty)
    await store.put("a", FULL)
    assert await store.get(["a"]) == {"a": empty}


async def test_a_read_is_counted_and_tells_the_status_before_it(store: PredictionStore) -> None:
    await store.put("a", MINE)
    await store.put("b", OTHERS)
    assert await store.read("a", "starting") == replace(MINE, reads=1)
    assert await store.read("a", "starting") == replace(MINE, reads=2, status="starting")
    assert await store.read("a", "") == replace(MINE, reads=3, status="starting")
    assert await store.read("a", "succeeded") == replace(MINE, reads=4, status="")
    await store.put("a", FULL)
    known = replace(FULL, reads=4, status="succeeded")
    assert await store.get(["a", "b", "a"]) == {"a": known, "b": OTHERS}
    assert await store.claim("a") == known
    assert await store.read("a", "succeeded") == replace(known, reads=5, reported=True)


async def test_an_unknown_id_is_not_made_known_by_asking(store: PredictionStore) -> None:
    assert await store.get(["a"]) == {}
    assert await store.read("a", "starting") is None
    assert await store.claim("a") is None
    assert await store.get(["a"]) == {}
    await store.put("a", MINE)
    assert await store.get(["a"]) == {"a": MINE}
    assert await store.claim("a") == MINE


async def test_an_end_is_claimed_once(store: PredictionStore) -> None:
    await store.put("a", FULL)
    await store.read("a", "starting")
    assert await store.claim("a") == replace(FULL, reads=1)
    assert await store.claim("a") is None
    assert await store.get(["a"]) == {"a": replace(FULL, reads=1, reported=True)}


async def test_what_was_put_as_reported_cannot_be_claimed(store: PredictionStore) -> None:
    await store.put("a", replace(MINE, reported=True))
    assert await store.claim("a") is None


async def test_of_many_at_once_each_gets_its_share(stores: list[PredictionStore]) -> None:
    known = {id: replace(FULL, tenant=id, status=None) for id in (f"id{number}" for number in range(10))}
    claimed: list[StoredPrediction | None] = []
    reads: dict[str, list[tuple[int, str | None, str]]] = {id: [] for id in known}
    for id in known:
        await stores[0].put(id, known[id])

    async def one_caller(store: PredictionStore, name: str) -> None:
        for number in range(10):
            for id in known:
                await store.put(id, replace(OTHERS, details="[]"))
                status = f"{name}{number}"
                read = await store.read(id, status)
                assert read is not None
                reads[id].append((read.reads, read.status, status))
                claimed.append(await store.claim(id))

    async with anyio.create_task_group() as tasks:
        for name, store in zip("abcd", stores * 2, strict=True):
            tasks.start_soon(one_caller, store, name)
    assert sorted(one.tenant or "" for one in claimed if one) == sorted(known)
    for id, one in known.items():
        in_turn = sorted(reads[id])
        assert [number for number, _, _ in in_turn] == list(range(1, 41))
        assert [before for _, before, _ in in_turn] == [None, *(status for _, _, status in in_turn[:-1])]
        last = replace(one, reads=40, status=in_turn[-1][2], reported=True)
        assert await stores[1].get([id]) == {id: last}


IDS = st.sampled_from(["a", "b", "c", "d", "ü", ""])
PREDICTIONS = st.builds(
    StoredPrediction,
    tenant=st.none() | st.text(max_size=5),
    traceparent=st.none() | st.just(TRACEPARENT) | st.text(max_size=3),
    details=st.none() | st.text(max_size=3),
    status=st.none() | st.text(max_size=3),
    reads=st.integers(0, 3),
    reported=st.booleans(),
)
STEPS = st.one_of(
    st.tuples(st.just("put"), IDS, PREDICTIONS),
    st.tuples(st.just("get"), st.lists(IDS, max_size=6)),
    st.tuples(st.just("read"), IDS, st.text(max_size=3)),
    st.tuples(st.just("claim"), IDS),
)


@pytest.mark.parametrize("kind", ["redis-asyncio", "redis-asyncio-decoded"], indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
async def test_redis_answers_as_memory_does(kind: str, redis_service: RedisServer, steps: list[tuple[object]]) -> None:
    memory = MemoryPredictionStore()
    async with Redis.from_url(redis_service.url, decode_responses=kind.endswith("decoded")) as client:
        redis = RedisPredictionStore(client, prefix=f"{uuid.uuid4()}:")
        for step in steps:
            assert await _do(redis, *step) == await _do(memory, *step), step


async def _do(store: PredictionStore, name: object, *arguments: object) -> object:
    match name, *arguments:
        case "put", str(id), StoredPrediction() as prediction:
            await store.put(id, prediction)
            return None
        case "get", list(ids):
            return list((await store.get(ids)).items())
        case "read", str(id), str(status):
            return await store.read(id, status)
        case "claim", str(id):
            return await store.claim(id)
    raise AssertionError(name)
