"""docs/layers.md is run as it stands there, but for addresses and tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from replicate_proxy_mw import Layer, MappingKeyResolver, ProxyConfig, ReplicateKey
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, FakeVersion, serve
from tests.documents import Page, execute
from tests.raw_asgi import host, proxy
from tests.services import RedisServer

LAYERS = Page("docs/layers.md")
TOKEN = "r8_the_token"
TENANTS = ("team-a", "interns", "batch", "production")
KEYS = MappingKeyResolver({f"pk-{tenant}": ReplicateKey(TOKEN, tenant=tenant) for tenant in TENANTS})
PAINTER = FakeModel(
    owner="acme",
    name="painter",
    official=True,
    run=lambda input: f"https://replicate.delivery/{input['prompt']}.png",
    run_time=1.0,
    versions=(FakeVersion(id="5c" * 32, created_at=0.0),),
    input_schema={"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
)
FACES = FakeModel(owner="acme", name="faces", official=True, run=lambda input: "a face")
MAKE = "POST /v1/models/acme/painter/predictions"


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(tokens={TOKEN: "acme"}, models=[PAINTER, FACES], queue_time=0.0).serve() as fake:
        yield fake


@contextmanager
def served(fake: FakeReplicate, *layers: Layer, close: Sequence[Redis] = ()) -> Iterator[httpx.Client]:
    """Callers of an app with these layers, which closes the clients of the host when it stops."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def closing(message: Any) -> None:
            if message["type"] == "lifespan.shutdown.complete":  # after it the event loop ends
                for each in close:
                    await each.aclose()
            await send(message)

        await host(scope, receive, closing)

    proxied = proxy(fake.url, app=app, key_resolver=KEYS, layers=layers)
    with serve(proxied) as running, httpx.Client(base_url=running.url) as client:
        yield client


def layer_of(containing: str) -> Any:
    return execute(LAYERS.block("python", containing))["layer"]


def paint(client: httpx.Client, tenant: str = "team-a", *, model: str = "acme/painter", **more: Any) -> httpx.Response:
    headers = {"x-portkey-api-key": f"pk-{tenant}", **more.pop("headers", {})}
    return client.post(f"/v1/models/{model}/predictions", headers=headers, json={"input": more})


def read(client: httpx.Client, path: str, tenant: str = "team-a", **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.get("/v1" + path, headers={"x-portkey-api-key": f"pk-{tenant}", **names})


def sent(fake: FakeReplicate) -> list[str]:
    return [f"{request.method} {request.target.decode()}" for request in fake.requests]


def test_all_of_them(fake: FakeReplicate) -> None:
    code = LAYERS.block("python", "FileKeyResolver(").replace('FileKeyResolver("keys.toml")', "resolver")
    code = code.replace("key_resolver=", "config=config, key_resolver=")
    app = execute(code, resolver=KEYS, config=ProxyConfig(upstream=fake.url))["app"]
    with serve(app) as running, httpx.Client(base_url=running.url) as client:
        assert paint(client, prompt="Project Nightjar").status_code == 446
        assert MAKE not in sent(fake)
        assert paint(client, prompt=7).status_code == 446
        assert MAKE not in sent(fake)
        made, again = (paint(client, prompt="a cat", headers={"idempotency-key": "one"}) for _ in range(2))
        assert (made.status_code, again.status_code) == (201, 201)
        assert made.json()["id"] == again.json()["id"]
        assert read(client, f"/predictions/{made.json()['id']}").json()["status"] == "processing"
        told = [read(client, "/models/acme/painter").headers["x-portkey-cache-status"] for _ in range(2)]
        assert told == ["MISS", "HIT"]
    assert sent(fake).count(MAKE) == 1


def test_requests_per_tenant(fake: FakeReplicate) -> None:
    with served(fake, layer_of("limit_requests(\n    creates=")) as client:
        answers = [paint(client, "interns", prompt="a") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [201] * 5 + [429]
        assert answers[-1].headers["ratelimit-limit"] == "5"
        assert {"retry-after", "ratelimit-remaining", "ratelimit-reset"} <= {*answers[-1].headers}
        assert paint(client, prompt="a").status_code == 201
        assert [read(client, "/hardware", tenant).status_code for tenant in ("interns", "batch")] == [200, 200]


def test_guardrails(fake: FakeReplicate) -> None:
    with served(fake, layer_of("no_faces_for_interns")) as client:
        denied = paint(client, "interns", model="acme/faces")
        assert (denied.status_code, denied.json()["error"]["type"]) == (446, "hooks_failed")
        assert "interns make no faces" in denied.text
        assert paint(client, model="acme/faces").status_code == 201
        flagged = paint(client, prompt="write to ada@example.org")
        assert (flagged.status_code, flagged.json()["status"]) == (246, "processing")
        assert "hook_results" in flagged.json()
        id = paint(client, prompt="confidential").json()["id"]
        fake.clock.advance(2)
        assert read(client, f"/predictions/{id}").status_code == 446


def test_the_schema_of_a_model(fake: FakeReplicate) -> None:
    with served(fake, layer_of("guardrails(input=[valid_input()])")) as client:
        wrong = paint(client, prompt=7)
        assert (wrong.status_code, "prompt" in wrong.text) == (446, True)
        assert MAKE not in sent(fake)
        assert paint(client, prompt="a").status_code == 201


def test_a_cache_for_the_catalogue(fake: FakeReplicate) -> None:
    wishes: list[dict[str, str]] = [
        *({}, {}, {"x_portkey_cache_force_refresh": "true"}, {}),
        {"x_portkey_cache_namespace": "design"},
    ]
    with served(fake, layer_of("cache_catalogue(lifetime=")) as client:
        told = [read(client, "/models/acme/painter", **each).headers["x-portkey-cache-status"] for each in wishes]
        assert told == ["MISS", "HIT", "REFRESH", "HIT", "MISS"]
        assert len(sent(fake)) == 3
        assert read(client, "/account").headers["x-portkey-cache-status"] == "DISABLED"


def test_a_create_is_sent_once(fake: FakeReplicate) -> None:
    code = LAYERS.block("python", "str(uuid.uuid4())").replace("VERSION", "acme/painter").replace('"text"', '"prompt"')
    with served(fake, layer_of("layer = idempotency_keys()")) as client:
        known = execute(code.replace("https://app.example", str(client.base_url).rstrip("/")))
        assert known["again"].headers["idempotency-replayed"] == "true"
        other = httpx.post(known["first"].url, headers=known["headers"], json=known["body"] | {"input": {"prompt": ""}})
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert sent(fake).count("POST /v1/predictions") == 1


def test_paid_results_paid_once(fake: FakeReplicate) -> None:
    code = LAYERS.block("python", '"mode": "simple"').replace("VERSION", "acme/painter").replace('"text"', '"prompt"')
    with served(fake, layer_of("reuse_results(max_age=")) as client:
        code = code.replace("https://app.example", str(client.base_url).rstrip("/"))
        made = []
        for _ in range(3):
            known = execute(code)
            made.append(known["prediction"].id)
            known["portkey"].close()
            fake.clock.advance(2)
    assert len({*made}) == 1
    assert sent(fake).count("POST /v1/predictions") == 1


def test_money_per_tenant_and_day(fake: FakeReplicate) -> None:
    code = LAYERS.block("python", "limit_spending(\n    per_day=20.0").replace("0.000725", "0.5")
    known = execute(code)
    with served(fake, known["layer"]) as client:
        for _ in range(2):
            id = paint(client, "interns", prompt="a").json()["id"]
            fake.clock.advance(2)
            assert read(client, f"/predictions/{id}", "interns").json()["status"] == "succeeded"
        deadline = time.monotonic() + 10  # it is counted when the answer is out
        while (spent := asyncio.run(known["spent_today"]())) != pytest.approx(1.0):
            assert time.monotonic() < deadline, spent
        refused = paint(client, "interns", prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (402, "spend_limit_reached")
        assert read(client, f"/predictions/{id}", "interns").status_code == 200
        assert paint(client, "production", prompt="a").status_code == 201


def test_one_poll_for_many(fake: FakeReplicate) -> None:
    with served(fake, layer_of("coalesce_polls(interval=")) as client:
        id = paint(client, prompt="a").json()["id"]
        before = len(sent(fake))

        async def poll() -> list[int]:
            async with httpx.AsyncClient(base_url=client.base_url) as many:
                headers = {"x-portkey-api-key": "pk-team-a"}
                answers = await asyncio.gather(*(many.get(f"/v1/predictions/{id}", headers=headers) for _ in range(25)))
                return [answer.status_code for answer in answers]

        assert asyncio.run(poll()) == [200] * 25
        assert len(sent(fake)) - before <= 2


def test_several_processes(fake: FakeReplicate, redis_service: RedisServer) -> None:
    code = LAYERS.block("python", "AsyncRedisStorage(redis)").replace('host="127.0.0.1"', f"port={redis_service.port}")
    code = code.replace("redis://127.0.0.1", redis_service.url)
    code = code.replace("cache_catalogue(", "cache_catalogue(timeout=10.0, ").replace(
        "import cache_catalogue(timeout=10.0, ", "import cache_catalogue("
    )
    processes = [execute(code) for _ in range(2)]
    clients = [[known["redis"], known["counters"].bridge.storage] for known in processes]
    with (
        served(fake, *processes[0]["layers"], close=clients[0]) as one,
        served(fake, *processes[1]["layers"], close=clients[1]) as other,
    ):
        assert read(one, "/models/acme/painter").headers["x-portkey-cache-status"] == "MISS"
        assert read(other, "/models/acme/painter").headers["x-portkey-cache-status"] == "HIT"
        ids = [paint(each, prompt="a", headers={"idempotency-key": "shared"}).json()["id"] for each in (one, other)]
        assert len({*ids}) == 1


def test_one_of_your_own(fake: FakeReplicate) -> None:
    code = LAYERS.block("python", "def weekdays(")
    with served(fake, execute(code)["weekdays"]) as client:
        weekend = datetime.now(UTC).weekday() >= 5
        assert paint(client, prompt="a").status_code == (403 if weekend else 201)
        unheard = client.post("/v1/unheard-of", headers={"x-portkey-api-key": "pk-team-a"})
        assert unheard.status_code == (403 if weekend else 404)
        assert float(read(client, "/hardware").headers["x-replicate-seconds"]) > 0


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert LAYERS.count("python") == 13
    assert LAYERS.count("sh", "toml") == 0
    assert LAYERS.missing_links() == []
