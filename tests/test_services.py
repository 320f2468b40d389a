from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests import services
from tests.services import RedisServer, postgres, redis_server


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_postgresql_answers(postgres_url: str) -> None:
    engine = create_async_engine(postgres_url.replace("postgresql:", "postgresql+asyncpg:", 1))
    try:
        async with engine.connect() as connection:
            assert (await connection.execute(text("select 1"))).scalar_one() == 1
    finally:
        await engine.dispose()


def _client(server: RedisServer) -> Redis:
    return Redis.from_url(server.url, retry=Retry(NoBackoff(), 0))


def test_redis_comes_back_at_its_port_and_empty() -> None:
    with redis_server() as server, _client(server) as client:
        assert client.set("key", 1)
        server.stop()
        with pytest.raises(RedisConnectionError):
            client.get("key")
        server.start()
        assert client.get("key") is None


def test_redis_takes_options_and_a_port() -> None:
    with redis_server() as server:
        port = server.port
    with redis_server(port, "--maxmemory", "7mb") as server, _client(server) as client:
        assert server.url == f"redis://127.0.0.1:{port}"
        assert client.config_get("maxmemory") == {"maxmemory": str(7 * 1024**2)}


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(AssertionError, match="no-such-option"), redis_server(None, "--no-such-option", "1"):
        pass


@pytest.mark.parametrize("service", [redis_server, postgres])
def test_without_a_server_tests_are_skipped_unless_all_have_to_run(
    service: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(services, "POSTGRES", os.devnull)
    monkeypatch.setenv("REQUIRE_ALL", "0")
    with pytest.raises(pytest.skip.Exception, match="is not installed"), service():
        pass
    monkeypatch.setenv("REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="is not installed"), service():
        pass
