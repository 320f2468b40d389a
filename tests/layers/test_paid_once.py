"""Both layers that keep creates from being paid twice: several processes, and a Redis that comes and goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from replicate_proxy_mw import sharing
from replicate_proxy_mw.layers.idempotency import idempotency_keys
from replicate_proxy_mw.layers.results import reuse_results
from replicate_proxy_mw.store.once_redis import RedisOnceStore
from replicate_proxy_mw.testing import FakeReplicate
from tests.paid import BODY, A, Replicate, code, create, paying, told
from tests.raw_asgi import TOKEN, Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.servers.running import wait_for
from tests.services import RedisServer, redis_server
from tests.tenants import JSON

pytestmark = pytest.mark.anyio

KEY = {"x-portkey-api-key": "pk-team-a", "content-type": "application/json"}
SIMPLE = (b"x-portkey-config", b'{"cache": {"mode": "simple"}}')


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN: "acme"}, "queue_time": 0.0, "run_time": 0.1}


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4()}:"


def key(text: str) -> tuple[bytes, bytes]:
    return b"idempotency-key", text.encode()


@contextmanager
def process(upstream: str, redis: str, prefix: str, *, longest_create: float = 180.0) -> Iterator[tuple[str, Any]]:
    """A uvicorn of its own with both layers; yields its URL once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"UPSTREAM": upstream, "REDIS": redis, "PREFIX": prefix, "LONGEST_CREATE": str(longest_create)}
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "uvicorn",
            "tests.layers.paid_once_app:app",
            "--port",
            str(port),
            "--log-level",
            "error",
        ],
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(running, port)
        yield f"http://127.0.0.1:{port}/v1", running
    finally:
        running.terminate()
        try:
            running.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()


async def test_two_processes_send_one_create_for_each_key(
    fake_replicate: FakeReplicate, redis_service: RedisServer, prefix: str
) -> None:
    environ = fake_replicate.url, redis_service.url, prefix
    answers: dict[str, list[httpx.Response]] = {f"k{number}": [] for number in range(8)}
    with ExitStack() as processes:
        urls = [processes.enter_context(process(*environ))[0] for _ in "ab"]
        async with httpx.AsyncClient(headers=KEY, trust_env=False, timeout=20) as client:

            async def send(url: str, name: str) -> None:
                headers = {"idempotency-key": name}
                answers[name].append(await client.post(f"{url}/predictions", content=BODY, headers=headers))

            async with anyio.create_task_group() as tasks:
                for name in answers:
                    for url in urls * 3:
                        tasks.start_soon(send, url, name)
            for name in answers:
                await send(urls[0], name)
            other = await client.post(f"{urls[1]}/predictions", content=BODY + b" 5", headers={"idempotency-key": "k0"})
    assert other.status_code == 422
    assert Counter(request.operation for request in fake_replicate.requests)["predictions.create"] == len(answers)
    for of_one in answers.values():
        assert {answer.status_code for answer in of_one} == {201}
        assert len({answer.json()["id"] for answer in of_one}) == 1
        assert [answer.headers.get("idempotency-replayed") for answer in of_one].count(None) == 1


async def test_two_processes_share_results(
    fake_replicate: FakeReplicate, redis_service: RedisServer, prefix: str
) -> None:
    environ = fake_replicate.url, redis_service.url, prefix
    with ExitStack() as processes:
        urls = [processes.enter_context(process(*environ))[0] for _ in "ab"]
        headers = KEY | {"x-portkey-config": SIMPLE[1].decode()}
        async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=20) as client:
            first = await client.post(f"{urls[0]}/predictions", content=BODY)
            fake_replicate.clock.advance(1)
            second = await client.post(f"{urls[1]}/predictions", content=BODY)
    assert [answer.headers["x-portkey-cache-status"] for answer in (first, second)] == ["MISS", "HIT"]
    assert first.json()["id"] == second.json()["id"]
    assert second.json()["status"] == "succeeded"


async def test_a_process_that_is_killed_after_sending_leaves_it_unknown(
    upstream: RawUpstream, redis_service: RedisServer, prefix: str
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        upstream.ready.set()
        connection.wait_closed(30)

    upstream.script = script
    environ = upstream.url, redis_service.url, prefix
    headers = {"idempotency-key": "k"}
    async with httpx.AsyncClient(headers=KEY, trust_env=False, timeout=20) as client:
        with process(*environ, longest_create=1.0) as (url, running):

            async def send() -> None:
                with pytest.raises(httpx.TransportError):
                    await client.post(f"{url}/predictions", content=BODY, headers=headers)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                assert await anyio.to_thread.run_sync(upstream.ready.wait, 10)
                running.send_signal(signal.SIGKILL)
        with process(*environ, longest_create=1.0) as (url, _):
            for _ in range(2):
                answer = await client.post(f"{url}/predictions", content=BODY, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (409, "create_unknown")
                assert answer.headers["x-should-retry"] == "false"
    assert len(upstream.requests) == 1


# --- a Redis that comes and goes


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop or freeze."""
    with redis_server() as server:
        yield server


@pytest.fixture
async def store(own_server: RedisServer) -> AsyncIterator[RedisOnceStore]:
    async with Redis.from_url(own_server.url, retry=Retry(NoBackoff(), 0)) as redis:
        yield RedisOnceStore(redis)
        # What is still to be written takes connections of a client that is closed.
        with anyio.fail_after(10):
            while sharing._tasks:  # noqa: ASYNC110 - they are told of by nobody
                await anyio.sleep(0.01)


@contextmanager
def out_of_order(server: RedisServer, how: str) -> Iterator[None]:
    if how == "frozen":
        with server.frozen():
            yield
    else:
        server.stop()
        try:
            yield
        finally:
            server.start()


each_outage = pytest.mark.parametrize("how", ["stopped", "frozen"])


@each_outage
async def test_before_a_create_nothing_is_sent(own_server: RedisServer, store: RedisOnceStore, how: str) -> None:
    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys(store=store, store_timeout=1.0)])
    with out_of_order(own_server, how):
        assert code(await create(app, key("k"))) == (503, "store_failed")
        assert (await create(app)).status == 201, "without a key nothing is asked of the store"
        assert len(replicate.arrived) == 1
    # What the frozen one has got all the same is taken back.
    with anyio.fail_after(5):
        assert (await create(app, key("k"))).status == 201
    assert len(replicate.arrived) == 2


@each_outage
async def test_between_sending_and_storing_the_answer_goes_out_and_is_stored_later(
    own_server: RedisServer, store: RedisOnceStore, how: str
) -> None:
    replicate = Replicate()
    options: dict[str, Any] = {"store": store, "store_timeout": 1.0}
    app, other = (paying(transport=replicate, layers=[idempotency_keys(**options)]) for _ in "ab")
    replicate.hold, replicate.waiting = anyio.Event(), anyio.Event()
    caller = Caller([BODY])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A, JSON, key("k")]))
        await replicate.waiting.wait()
        with out_of_order(own_server, how):
            replicate.hold.set()
            with anyio.fail_after(5):
                while not caller.complete:  # noqa: ASYNC110 - it is told by nobody
                    await anyio.sleep(0.01)
            assert (caller.status, told(caller)["id"]) == (201, "p0")
            # In this process it is known.
            assert told(await create(app, key("k")))["id"] == "p0"
            assert code(await create(other, key("k"))) == (503, "store_failed")
    # A stopped Redis has come back empty: until the answer is stored the other process would not know of it.
    async with Redis.from_url(own_server.url) as redis:
        with anyio.fail_after(10):
            while [await redis.hget(name, "id") async for name in redis.scan_iter("*")] != [b"p0"]:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    again = await create(other, key("k"))
    assert (again.status, told(again)["id"], again.header(b"idempotency-replayed")) == (201, "p0", [b"true"])
    assert len(replicate.arrived) == 1


@each_outage
async def test_after_it_what_was_made_is_answered_as_far_as_the_store_still_knows(
    own_server: RedisServer, store: RedisOnceStore, how: str
) -> None:
    replicate = Replicate()
    app = paying(transport=replicate, layers=[idempotency_keys(store=store, store_timeout=1.0)])
    assert (await create(app, key("k"))).status == 201
    with out_of_order(own_server, how):
        assert code(await create(app, key("k"))) == (503, "store_failed")
    again = await create(app, key("k"))
    if how == "frozen":
        assert (told(again)["id"], again.header(b"idempotency-replayed")) == ("p0", [b"true"])
    assert len(replicate.arrived) == (1 if how == "frozen" else 2)


@each_outage
async def test_without_it_results_are_made_anew(own_server: RedisServer, store: RedisOnceStore, how: str) -> None:
    replicate = Replicate()
    app = paying(transport=replicate, layers=[reuse_results(store=store, store_timeout=1.0)])
    await create(app, SIMPLE)
    with out_of_order(own_server, how):
        caller = await create(app, SIMPLE)
        assert (caller.status, caller.header(b"x-portkey-cache-status")) == (201, [b"MISS"])
    assert replicate.reads == []
    assert len(replicate.made) == 2
