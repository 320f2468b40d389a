"""docs/keys.md and docs/migrating-from-portkey.md are run as they stand there, but for addresses and tokens."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.requests import Request

from replicate_proxy_mw import KeyRequest, KeyResolver, PermissionDenied, Policy, ReplicateKey
from replicate_proxy_mw.keys import FileKeyResolver
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.documents import Page, execute
from tests.services import RedisServer

KEYS, MIGRATING = Page("docs/keys.md"), Page("docs/migrating-from-portkey.md")
TOKENS = {"r8_the_token": "acme", "r8_the_token_for_video": "acme-video"}
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(tokens=TOKENS).serve() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_the_token")
    monkeypatch.setenv("SESSION_SECRET", "a secret of the tests")


def _app(code: str, fake: FakeReplicate) -> Any:
    """The app that `code` makes, in front of the fake."""
    code = code.replace("ProxyConfig(", f"ProxyConfig(upstream={fake.url!r}, ")
    if "config=" not in code:
        code = code.replace("key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=", 1)
    return execute("from replicate_proxy_mw import ProxyConfig\n" + code)["app"]


def _status(origin: str, key: str, **headers: str) -> int:
    return httpx.get(f"{origin}/v1/account", headers={"x-portkey-api-key": key, **headers}).status_code


def _shell(code: str) -> str:
    """What `code` prints; `python` is this one."""
    code = re.sub(r"^python\b", sys.executable, code, flags=re.MULTILINE)
    return subprocess.run(["sh", "-e", "-c", code], capture_output=True, text=True, check=True).stdout


def _request(key: str, **more: Any) -> KeyRequest:
    return KeyRequest(api_key=key, method="GET", path="/account", scope={}, **more)


def _ask(resolver: KeyResolver, key: str, **more: Any) -> Any:
    async def ask() -> Any:
        return await resolver(_request(key, **more))

    return asyncio.run(ask())


def test_one_token_in_the_environment(fake: FakeReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = _shell(
        KEYS.block("sh", "REPLICATE_PROXY_KEYS")
        + f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    )
    for name in ("REPLICATE_API_TOKEN", "REPLICATE_PROXY_KEYS"):
        monkeypatch.setenv(name, json.loads(exported)[name])
    with serve(_app(KEYS.block("python", "key_resolver=EnvKeyResolver()"), fake)) as served:
        assert [_status(served.url, key) for key in ("pk-for-the-designers", "pk-for-research", "pk-other")] == [
            200,
            200,
            401,
        ]
    assert fake.requests[-1].header("authorization") == "Bearer r8_the_token"


def test_a_file_with_two_teams(fake: FakeReplicate) -> None:
    printed = _shell(KEYS.block("sh", "provider add"))
    designers, ada = re.findall(r"^pk-[\w-]{43}$", printed, re.MULTILINE)
    assert "the designers" in printed
    with serve(_app(KEYS.block("python", "key_resolver=FileKeyResolver("), fake)) as served:
        assert [_status(served.url, key) for key in (designers, ada, "pk-other")] == [200, 200, 401]
        _shell(KEYS.block("sh", "revoke"))
        deadline = time.monotonic() + 10
        while _status(served.url, ada) != 401:
            assert time.monotonic() < deadline
            assert _status(served.url, designers) == 200
        assert _status(served.url, designers) == 200


def test_all_that_can_be_in_the_file(fake: FakeReplicate, tmp_path: Path) -> None:
    tmp_path.joinpath("video").write_text("r8_the_token_for_video\n")
    text = KEYS.block("toml", "[providers.main]").replace("/run/secrets/replicate-video", "video")
    text = re.sub("sha256:[0-9a-f]{64}", "sha256:" + sha256(b"pk-for-the-designers").hexdigest(), text)
    tmp_path.joinpath("keys.toml").write_text(text)
    resolver = FileKeyResolver("keys.toml")
    for provider, token in ((None, "r8_the_token"), ("@main", "r8_the_token"), ("@video", "r8_the_token_for_video")):
        key = _ask(resolver, "pk-for-the-designers", provider=provider)
        assert (key.tenant, key.policy.max_in_flight, key.authorization()) == (
            "design",
            20,
            b"Bearer " + token.encode(),
        )
    by_alias = _ask(resolver, "pk-for-the-designers", virtual_key="replicate-abc123")
    assert by_alias.authorization() == b"Bearer r8_the_token_for_video"


def test_several_accounts() -> None:
    resolver = execute(KEYS.block("python", '"video": ReplicateKey('))["resolver"]
    found = [_ask(resolver, "pk-for-the-designers", provider=slug) for slug in ("@video", "@replicate", None)]
    tokens = [b"Bearer r8_the_token_for_video", b"Bearer r8_the_token", b"Bearer r8_the_token"]
    assert [key.authorization() for key in found] == tokens
    with pytest.raises(PermissionDenied):
        _ask(resolver, "pk-for-the-designers", provider="@other")


def test_what_a_key_may_do() -> None:
    key = execute(KEYS.block("python", "expires_at=datetime("))["key"]
    assert key.policy.allows_model("acme/anything")
    assert not key.policy.allows_model("deployments/acme/test")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_store_in_redis(redis_service: RedisServer) -> None:
    code = KEYS.block("python", "RedisPredictionStore(").replace('host="127.0.0.1"', f"port={redis_service.port}")
    known = execute(code)
    assert await known["store"].get(["nothing"]) == {}
    await known["store"]._redis.aclose()


def _of_database(url: str) -> None:
    known = execute(KEYS.block("python", "def by_database("))

    async def use() -> list[Any]:
        engine = create_async_engine(url)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(known["Base"].metadata.drop_all)
                await connection.run_sync(known["Base"].metadata.create_all)
            sessions = async_sessionmaker(engine)
            async with sessions.begin() as session:
                digest = sha256(b"pk-for-the-designers").hexdigest()
                session.add(known["ProxyKey"](digest=digest, team="design", models="acme/* meta/llama"))
            resolver = known["by_database"](sessions)
            return [await resolver(_request(key)) for key in ("pk-for-the-designers", "pk-other")]
        finally:
            await engine.dispose()

    found, unknown = asyncio.run(use())
    assert isinstance(found, ReplicateKey)
    assert (found.tenant, found.policy) == ("design", Policy(models=["acme/*", "meta/llama"], own_predictions=True))
    assert unknown is None


def test_keys_in_sqlite(tmp_path: Path) -> None:
    _of_database(f"sqlite+aiosqlite:///{tmp_path}/keys.sqlite")


def test_keys_in_postgresql(postgres_url: str) -> None:
    _of_database(postgres_url.replace("postgresql://", "postgresql+asyncpg://"))


def test_keys_in_redis(redis_service: RedisServer) -> None:
    by_redis = execute(KEYS.block("python", "def by_redis("))["by_redis"]

    async def use() -> None:
        redis = Redis.from_url(redis_service.url)
        for key, paid in (("pk-for-the-designers", "yes"), ("pk-for-research", "no")):
            name = "replicate-key:" + sha256(key.encode()).hexdigest()
            await redis.hset(name, mapping={"team": key[7:], "paid": paid})
        resolver = by_redis(redis)
        assert (await resolver(_request("pk-for-the-designers"))).tenant == "the-designers"
        assert await resolver(_request("pk-other")) is None
        with pytest.raises(PermissionDenied, match="invoice"):
            await resolver(_request("pk-for-research"))
        await redis.aclose()

    asyncio.run(use())


def _of_session(origin: str, sign_in: Callable[[httpx.Client, str], Any], fake: FakeReplicate) -> None:
    """Two users with an account between them, and each with its own predictions."""
    body = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
    with httpx.Client(base_url=origin) as ada, httpx.Client(base_url=origin) as bob:
        sent = len(fake.requests)
        assert ada.post("/v1/predictions", json=body).status_code == 401
        assert len(fake.requests) == sent
        sign_in(ada, "ada")
        sign_in(bob, "bob")
        path = "/v1/predictions/" + ada.post("/v1/predictions", json=body).json()["id"]
        assert [client.get(path).status_code for client in (ada, bob)] == [200, 404]
        assert [len(client.get("/v1/predictions").json()["results"]) for client in (ada, bob)] == [1, 0]


def test_the_users_of_a_fastapi_app(fake: FakeReplicate) -> None:
    app = _app(KEYS.block("python", "SessionMiddleware, secret_key"), fake)

    @app.post("/sign-in")  # type: ignore[untyped-decorator]
    def sign_in(request: Request, user: str) -> None:
        request.session["user"] = user

    with serve(app) as served:
        _of_session(served.url, lambda client, user: client.post("/sign-in", params={"user": user}), fake)


def test_the_users_of_a_litestar_app(fake: FakeReplicate) -> None:
    code = KEYS.block("python", "guards=[signed_in]").replace("ProxyConfig(", f"ProxyConfig(upstream={fake.url!r}, ")
    with serve(execute(code)["app"]) as served:
        _of_session(served.url, lambda client, user: client.post("/sign-in", params={"user": user}), fake)


def test_several_resolvers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-in-the-environment")
    printed = _shell("\n".join(KEYS.block("sh", "provider add").splitlines()[:2]))
    resolver = execute(KEYS.block("python", "FirstOf("))["resolver"]
    assert all(_ask(resolver, key) for key in ("pk-in-the-environment", printed.split()[0]))
    assert _ask(resolver, "pk-other") is None


def test_from_portkey_to_here(fake: FakeReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "pk-for-the-designers")
    before, after = (code for language, code in MIGRATING.code if language == "python")
    assert after.startswith(before.replace("PORTKEY_API_KEY", "pk-for-the-designers").rstrip(")\n"))
    with serve(_app(KEYS.block("python", "key_resolver=EnvKeyResolver()"), fake)) as served:
        known = execute(after.replace("https://your.app", served.url).replace("VERSION", HELLO_WORLD))
        known["portkey"]._client.close()
        known["portkey"].openai_client.close()
    assert known["prediction"].status in ("starting", "processing")


def test_no_block_is_forgotten() -> None:
    assert KEYS.count("python", "sh", "toml") == 14
    assert MIGRATING.count("python", "sh", "toml") == 2


@pytest.mark.parametrize("page", [KEYS, MIGRATING], ids=lambda page: page.path)
def test_files_that_it_links_to_are_there(page: Page) -> None:
    assert page.missing_links() == []
