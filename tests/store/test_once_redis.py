from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from replicate_proxy_mw.store.once import EarlierResult, KeyedCreate
from replicate_proxy_mw.store.once_redis import RedisOnceStore
from tests.services import RedisServer, redis_server

pytestmark = pytest.mark.anyio

ONE = KeyedCreate(mark="1" * 32, fingerprint="f" * 64, left=180.0)
OTHER = KeyedCreate(mark="2" * 32, fingerprint="e" * 64, left=180.0)
DONE = KeyedCreate(mark=ONE.mark, fingerprint=ONE.fingerprint, left=0, status=201, id="p1")

Use = Callable[[RedisOnceStore], Awaitable[object]]
CREATES: list[Use] = [
    lambda store: store.begin("a", OTHER, 1000),
    lambda store: store.end("a", DONE, 1000),
    lambda store: store.forget("a", ONE.mark),
]
RESULTS: list[Use] = [lambda store: store.put_result("a", "p1", 1000), lambda store: store.result("a")]
ALL = [*CREATES, *RESULTS]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4()}:"


@pytest.fixture
async def redis(redis_service: RedisServer) -> AsyncIterator[Redis]:
    async with _client(redis_service) as client:
        yield client


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop or spoil."""
    with redis_server() as server:
        yield server


def _client(server: RedisServer, **options: Any) -> Redis:
    return Redis.from_url(server.url, retry=Retry(NoBackoff(), 0), **options)


async def test_every_entry_has_an_end_and_holds_nothing_else(redis: Redis, prefix: str) -> None:
    store = RedisOnceStore(redis, prefix=prefix)
    await store.begin("a", ONE, 100)
    await store.put_result("a", "p1", 50)
    fields = {b"mark": b"1" * 32, b"fingerprint": b"f" * 64, b"status": b"", b"id": b""}
    kept = await redis.hgetall(f"{prefix}create:a")
    assert kept == fields | {b"until": kept[b"until"]}
    assert 0 < await redis.pttl(f"{prefix}create:a") <= 100_000
    kept = await redis.hgetall(f"{prefix}result:a")
    assert kept == {b"result": b"p1", b"at": kept[b"at"]}
    assert 0 < await redis.pttl(f"{prefix}result:a") <= 50_000
    await store.end("a", DONE, 200)
    assert 100_000 < await redis.pttl(f"{prefix}create:a") <= 200_000
    assert len([key async for key in redis.scan_iter(f"{prefix}*")]) == 2


class Counted(Connection):
    """Counts what is sent before an answer is waited for."""

    sent = 0

    async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
        type(self).sent += 1
        await super().send_packed_command(*arguments, **options)


async def test_each_call_is_one_round_trip(redis_service: RedisServer, prefix: str) -> None:
    pool = ConnectionPool(Counted, host="127.0.0.1", port=redis_service.port)
    async with Redis(connection_pool=pool) as redis:
        store = RedisOnceStore(redis, prefix=prefix)
        await redis.script_flush()
        for use in ALL:
            Counted.sent = 0
            await use(store)
            assert Counted.sent == 1
    await pool.aclose()


async def test_more_calls_than_there_are_connections_wait_for_their_turn(
    redis_service: RedisServer, prefix: str
) -> None:
    async with _client(redis_service, max_connections=25) as redis:
        store = RedisOnceStore(redis, prefix=prefix)
        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(store.begin, f"k{number}", ONE, 1000)
        assert len([key async for key in redis.scan_iter(f"{prefix}*")]) == 200


@pytest.mark.parametrize("lifetime", [100, 9.2233720368e15])
async def test_no_entry_is_made_that_could_not_end(own_server: RedisServer, lifetime: float) -> None:
    async with _client(own_server) as redis:
        if lifetime == 100:
            await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-pexpire"], keys=["*"])
        store = RedisOnceStore(redis)
        for _ in range(2):
            with pytest.raises(ResponseError):
                await store.begin("a", ONE, lifetime)
            with pytest.raises(ResponseError):
                await store.put_result("a", "p1", lifetime)
        assert await redis.dbsize() == 0


@pytest.mark.parametrize("kind", ["full", "replica", "misconfigured"])
async def test_a_server_that_takes_no_writes_begins_nothing_and_tells_what_it_has(
    own_server: RedisServer, kind: str
) -> None:
    async with _client(own_server) as redis:
        store = RedisOnceStore(redis)
        await store.begin("a", ONE, 1000)
        await store.put_result("a", "p1", 1000)
        if kind == "full":
            await redis.config_set("maxmemory", 1)
        elif kind == "replica":
            await redis.replicaof("127.0.0.1", "1")
        else:
            await redis.config_set("min-replicas-to-write", 1)
        with pytest.raises(RedisError):
            await store.begin("new", ONE, 1000)
        with pytest.raises(RedisError):
            await store.end("a", DONE, 1000)
        result = await store.result("a")
        assert result is not None
        assert result.id == "p1"


@pytest.mark.parametrize("content", ["text", {"other": "fields"}, {"id": "p1"}])
async def test_somebody_elses_key_is_neither_taken_nor_touched(redis: Redis, prefix: str, content: Any) -> None:
    store = RedisOnceStore(redis, prefix=prefix)
    for key, uses in ((f"{prefix}create:a", CREATES), (f"{prefix}result:a", RESULTS)):
        if isinstance(content, dict):
            await redis.hset(key, mapping=content)
        else:
            await redis.set(key, content)
        before = await redis.dump(key)
        for use in uses:
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                await use(store)
        assert await redis.dump(key) == before


@pytest.mark.parametrize("decode_responses", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"mark": "zz"},
        {"mark": "1", "fingerprint": "x" * 64},
        {"mark": "1"},
        {"mark": "1", "fingerprint": "f", "status": "many"},
        {"mark": "1", "fingerprint": "f", "status": "201", "id": "../account"},
        {"result": "../account"},
        {"result": "x" * 65},
    ],
)
async def test_a_hash_like_ours_with_other_values_is_not_believed(
    redis_service: RedisServer, prefix: str, content: dict[str, str], decode_responses: bool
) -> None:
    async with _client(redis_service, decode_responses=decode_responses) as redis:
        store = RedisOnceStore(redis, prefix=prefix)
        kind = "result" if "result" in content else "create"
        await redis.hset(f"{prefix}{kind}:a", mapping=content)  # type: ignore[arg-type]
        with pytest.raises(ValueError):  # noqa: PT011 - of int or our own
            await (store.result("a") if kind == "result" else store.begin("a", OTHER, 1000))


async def test_a_clock_that_was_set_back_makes_nothing_younger_than_new(redis: Redis, prefix: str) -> None:
    store = RedisOnceStore(redis, prefix=prefix)
    await store.put_result("a", "p1", 1000)
    await redis.hincrby(f"{prefix}result:a", "at", 3_600_000)
    assert await store.result("a") == EarlierResult("p1", 0)


async def test_an_outage_is_raised_and_ends_with_the_server(own_server: RedisServer) -> None:
    async with _client(own_server) as redis:
        store = RedisOnceStore(redis)
        await store.begin("a", ONE, 1000)
        own_server.stop()
        for use in ALL:
            with pytest.raises(RedisError):
                await use(store)
        own_server.start()
        # It is another server, an empty one.
        await store.end("a", DONE, 1000)
        known = await store.begin("a", OTHER, 1000)
        assert known is not None
        assert known.id == "p1"


@pytest.mark.parametrize("use", ALL)
async def test_a_call_that_took_too_long_leaves_no_answer_to_the_next(own_server: RedisServer, use: Use) -> None:
    async with _client(own_server, max_connections=1) as redis:
        store = RedisOnceStore(redis)
        await store.put_result("x", "p2", 1000)
        with own_server.frozen():
            for _ in range(3):
                with pytest.raises(TimeoutError), anyio.fail_after(0.05):
                    await use(store)
        result = await store.result("x")
        assert result is not None
        assert result.id == "p2"


async def test_a_cluster_is_as_good() -> None:
    with redis_server(None, "--cluster-enabled", "yes") as server:
        async with _client(server) as node:
            await node.cluster("ADDSLOTSRANGE", 0, 16383)
            while (await node.cluster("INFO"))["cluster_state"] != "ok":  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(0.05)
        async with RedisCluster("127.0.0.1", server.port) as cluster:
            store = RedisOnceStore(cluster)
            for use in ALL:
                await use(store)
            assert await store.begin("b", ONE, 1000) is None
            await store.end("b", DONE, 1000)
            known = await store.begin("b", OTHER, 1000)
            assert known is not None
            assert known.id == "p1"


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.parametrize("use", ALL)
async def test_under_trio_every_call_raises(redis_service: RedisServer, use: Use) -> None:
    redis = _client(redis_service)
    with pytest.raises((RuntimeError, RedisError), match="no running event loop"):
        await use(RedisOnceStore(redis))
