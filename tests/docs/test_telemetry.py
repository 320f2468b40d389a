"""docs/telemetry.md and docs/webhooks.md are run as they stand there, but for addresses and tokens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis
from standardwebhooks.webhooks import Webhook

from replicate_proxy_mw import (
    MappingKeyResolver,
    PriceRequest,
    ProxyConfig,
    Rates,
    ReplicateKey,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
)
from replicate_proxy_mw.devtools import SpanTreePrinter
from replicate_proxy_mw.telemetry import SAMPLE_PRICES
from replicate_proxy_mw.telemetry.prediction import Prediction
from replicate_proxy_mw.telemetry.prices import PriceList
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.clients.drivers import require
from tests.documents import ROOT, Page, execute
from tests.otlp import Sink
from tests.raw_asgi import TOKEN, call, host, http_scope
from tests.services import RedisServer
from tests.trees import shown, words

TELEMETRY, WEBHOOKS = Page("docs/telemetry.md"), Page("docs/webhooks.md")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
LLAMA = "meta/meta-llama-3-8b-instruct"


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(queue_time=0.1, run_time=0.2).serve() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeReplicate) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "team-a=pk-team-a")
    monkeypatch.setenv("REPLICATE_WEBHOOK_SECRET", fake.webhook_secret)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter) -> Callable[[], tuple[ReadableSpan, ...]]:
    """The spans of a host whose provider is the global one."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter.get_finished_spans


def _proxied(code: str, fake: FakeReplicate) -> str:
    """`code` of an app, in front of the fake."""
    if "ProxyConfig(" in code:
        return code.replace("ProxyConfig(", f"ProxyConfig(upstream={fake.url!r}, ")
    code = code.replace("key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=", 1)
    return "from replicate_proxy_mw import ProxyConfig\n" + code


def _client(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=f"{url}/v1", headers={"x-portkey-api-key": "pk-team-a", **headers})


def _eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _story(fake: FakeReplicate, provider: TracerProvider) -> None:
    """What the trees on the page show."""
    app = ReplicateProxyMiddleware(
        host,
        key_resolver=MappingKeyResolver({"pk-team-a": ReplicateKey(fake.token, tenant="team-a")}),
        config=ProxyConfig(upstream=fake.url),
        prices={**SAMPLE_PRICES, "replicate/hello-world": "cpu"},
        tracer_provider=provider,
    )
    portkey = {"x-portkey-trace-id": "order-4711", "x-portkey-metadata": '{"team": "design"}'}
    with serve(app) as served, _client(served.url, **portkey) as client:
        body = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
        path = f"/predictions/{client.post('/predictions', json=body).json()['id']}"
        fake.clock.advance(0.8)
        assert client.get(path).json()["status"] == "processing"
        fake.clock.advance(60)
        assert client.get(path).json()["status"] == "succeeded"


def test_the_trees_are_those_of_a_real_run() -> None:
    written = StringIO()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanTreePrinter(written))
    with FakeReplicate(queue_time=0.4, run_time=30.0).serve() as fake:
        _story(fake, provider)
    trees = [words(tree) for tree in written.getvalue().split("\n\n")]
    assert len(shown(TELEMETRY.text)) == 2
    for tree in shown(TELEMETRY.text):
        assert tree in trees


def test_the_extra_is_there() -> None:
    [extra] = re.findall(r"pip install '\.\[(\w+)\]'", TELEMETRY.block("sh", "pip install"))
    assert extra in tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_server_that_is_stopped_exports_what_there_is(tmp_path: Path, fake: FakeReplicate) -> None:
    tmp_path.joinpath("app.py").write_text(_proxied(TELEMETRY.block("python", "configure_telemetry("), fake))
    with Sink() as sink:
        exports = TELEMETRY.block("sh", "OTEL_SERVICE_NAME").replace("https://collector.example:4318", sink.url)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = f"{exports}exec {sys.executable} -m uvicorn app:app --port {port} --log-level warning"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        with subprocess.Popen(["sh", "-ec", command], env={**environment, "NO_PROXY": "127.0.0.1"}) as process:
            try:
                with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:
                    listed = client.get(
                        f"http://127.0.0.1:{port}/v1/hardware", headers={"x-portkey-api-key": "pk-team-a"}
                    )
                assert listed.status_code == 200
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=20)
            finally:
                process.kill()
        assert {span.resource["service.name"] for span in sink.spans} == {"my-app"}
        assert "GET /v1/hardware" in {span.name for span in sink.spans}
        assert "replicate_proxy.requests" in sink.metrics
        assert {export.headers["authorization"] for export in sink.exports} == {"Bearer the-token-of-your-collector"}


def test_an_instrumented_host_has_one_server_span_and_no_twins(
    fake: FakeReplicate, exported: Callable[[], tuple[ReadableSpan, ...]]
) -> None:
    app = execute(_proxied(TELEMETRY.block("python", "FastAPIInstrumentor"), fake))["app"]
    with serve(app) as served, _client(served.url) as client:
        assert client.get("/hardware").status_code == 200
        _eventually(lambda: len(exported()) >= 3)
    assert sorted(span.kind.name for span in exported()) == ["CLIENT", "INTERNAL", "SERVER"]


@pytest.mark.anyio
async def test_the_sampler_leaves_no_holes(exporter: InMemorySpanExporter) -> None:
    provider = execute(TELEMETRY.block("python", "remote_parent_not_sampled"))["provider"]
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = ReplicateProxyMiddleware(
        host, key_resolver=StaticKeyResolver(TOKEN, api_keys=["pk-team-a"]), tracer_provider=provider
    )
    unsampled = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
    assert (await call(app, http_scope("GET", "/v1/hardware", [unsampled]))).status == 401
    [span] = exporter.get_finished_spans()
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    provider.shutdown()


def _dropped(condition: str, attributes: Mapping[str, Any]) -> bool:
    """A condition of the collector's, which reads as Python does but for its `nil`."""
    code = re.sub(r'attributes\["([\w.]+)"\]', r'attributes.get("\1")', condition).replace("nil", "None")
    return bool(eval(code, {"attributes": attributes}))


def test_the_collector_drops_what_polls_have_not_learnt(
    exporter: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    with FakeReplicate(queue_time=30.0, run_time=30.0).serve() as fake:
        app = ReplicateProxyMiddleware(
            host,
            key_resolver=StaticKeyResolver(fake.token, api_keys=["pk-team-a"]),
            config=ProxyConfig(upstream=fake.url),
            tracer_provider=tracer_provider,
        )
        with serve(app) as served, _client(served.url) as client:
            body = {"version": HELLO_WORLD, "input": {"text": "Alice"}}
            path = f"/predictions/{client.post('/predictions', json=body).json()['id']}"
            for seconds in (0, 31, 0, 31, 0):
                fake.clock.advance(seconds)
                client.get(path)
            client.get("/predictions/unknown")
    conditions = re.findall(r"^ +- '(.*)'$", TELEMETRY.block("yaml", "filter/polls"), re.MULTILINE)
    assert len(conditions) == 2
    kept = [
        f"{span.kind.name} {span.name.split()[0]} {attributes.get('replicate.prediction.status', '')}".strip()
        for span in exporter.get_finished_spans()
        if not any(_dropped(condition, attributes := span.attributes or {}) for condition in conditions)
    ]
    assert sorted(kept) == [
        "CLIENT GET",  # the end,
        "CLIENT GET",  # the end once more,
        "CLIENT GET",  # an error
        "CLIENT POST",
        "CLIENT generate_content succeeded",
        "SERVER GET",
        "SERVER GET processing",
        "SERVER GET succeeded",
        "SERVER GET succeeded",
        "SERVER POST starting",
    ]


def _ended(**more: Any) -> Prediction:
    told: dict[str, Any] = {"id": "p1", "status": "succeeded", "run_time": 2.0} | more
    return Prediction(**told)


@pytest.mark.anyio
async def test_a_table_of_prices() -> None:
    prices = PriceList(execute(TELEMETRY.block("python", "SAMPLE_PRICES"))["prices"], timeout=5)
    for prediction, amount, basis in (
        (_ended(model="acme/upscaler"), 0.00195, "per_second"),
        (_ended(model="acme/upscaler", version=HELLO_WORLD), 0.00145, "per_second"),
        (_ended(model="acme/upscaler", deployment="acme/prod"), 0.0028, "per_second"),
        (_ended(model="acme/chat", input_tokens=10, output_tokens=2), 1e-6, "per_input_token,per_output_token"),
        (_ended(model="acme/pictures", outputs=3), 0.01, "per_output,per_run"),
    ):
        cost = await prices.estimate(prediction, tenant=None)
        assert cost is not None
        assert cost.amount == pytest.approx(amount)
        assert cost.basis == basis
    assert await prices.estimate(_ended(model="acme/other"), tenant=None) is None
    assert await prices.estimate(_ended(model="acme/chat"), tenant=None) is None
    assert await prices.estimate(_ended(model="acme/pictures", status="failed"), tenant=None) is None


@pytest.mark.anyio
async def test_prices_of_a_database() -> None:
    async def find_contract(tenant: str | None) -> Any:
        return SimpleNamespace(price_per_second=0.5) if tenant == "team-a" else None

    prices = execute(TELEMETRY.block("python", "find_contract"), find_contract=find_contract)["prices"]
    assert await prices(PriceRequest(status="succeeded", tenant="team-a")) == Rates(per_second=0.5)
    assert await prices(PriceRequest(status="succeeded", tenant="team-b")) is None


def test_content_that_is_captured(fake: FakeReplicate, exported: Callable[[], tuple[ReadableSpan, ...]]) -> None:
    app = execute(_proxied(TELEMETRY.block("python", "capture_content"), fake))["app"]
    given = {"prompt": "of Ada's", "system_prompt": "Be brief."}
    with serve(app) as served, _client(served.url, prefer="wait") as client:
        for debug in ("true", "false"):
            created = client.post(
                f"/models/{LLAMA}/predictions", json={"input": given}, headers={"x-portkey-debug": debug}
            )
            assert created.json()["status"] == "succeeded"
    visible, hidden = [span.attributes or {} for span in exported() if span.name.startswith("generate_content")]
    assert json.loads(str(visible["replicate.input"])) == {"prompt": "…", "system_prompt": "Be brief."}
    assert "replicate.output" in visible
    assert not {"replicate.input", "replicate.output"} & set(hidden)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_store_in_redis(redis_service: RedisServer) -> None:
    code = TELEMETRY.block("python", "RedisPredictionStore(").replace('host="127.0.0.1"', f"port={redis_service.port}")
    known = execute(code)
    assert isinstance(known["store"]._redis, Redis)
    assert await known["store"].get(["nothing"]) == {}
    await known["store"]._redis.aclose()


def test_the_secret_is_where_the_page_says(fake: FakeReplicate) -> None:
    require("curl")
    code = WEBHOOKS.block("sh", "curl").replace("https://api.replicate.com/v1", fake.url)
    done = subprocess.run(["sh", "-ec", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"key": fake.webhook_secret}


def test_a_webhook_from_the_create_to_the_host(
    fake: FakeReplicate, exported: Callable[[], tuple[ReadableSpan, ...]]
) -> None:
    known = execute(_proxied(WEBHOOKS.block("python", "on_webhook=on_webhook"), fake))
    with serve(known["app"]) as served:
        code = WEBHOOKS.block("python", "portkey.post(").replace("https://app.example", served.url)
        caller = execute(code.replace("VERSION", HELLO_WORLD))
        id = caller["prediction"].id
        caller["portkey"]._client.close()
        caller["portkey"].openai_client.close()
        _eventually(lambda: fake.deliveries)
    assert known["results"] == {id: "hello Alice"}
    assert [(delivery.event, delivery.status) for delivery in fake.deliveries] == [("completed", 204)]
    [run] = [span for span in exported() if span.name.startswith("generate_content")]
    assert (run.attributes or {})["replicate_proxy.lifecycle.observed_by"] == "webhook"
    [create] = [span for span in exported() if (span.attributes or {}).get("replicate.operation")]
    [received] = [span for span in exported() if span.name == "POST /v1/-/webhooks"]
    assert (received.attributes or {})["replicate_proxy.outcome"] == "answered"
    assert [link.context.span_id for link in received.links] == [create.context.span_id]
    assert run.parent is not None
    assert run.parent.span_id == create.context.span_id


@pytest.mark.anyio
async def test_work_that_is_not_done_twice() -> None:
    sent: list[str] = []

    def send_mail(text: str) -> None:
        sent.append(text)
        if len(sent) == 1:
            raise OSError("hunter2")

    known = execute(WEBHOOKS.block("python", "import sqlite3"), send_mail=send_mail)
    event = known["WebhookEvent"](id="msg_1", sent_at=0.0, prediction={"id": "p1", "status": "failed"}, body=b"")
    with pytest.raises(OSError, match="hunter2"):
        await known["on_webhook"](event)
    for _ in range(2):
        await known["on_webhook"](event)
    assert sent == ["p1: failed"] * 2
    known["database"].close()


@pytest.mark.anyio
async def test_each_of_two_secrets_lets_a_delivery_in_once() -> None:
    config = execute(WEBHOOKS.block("python", "webhook_timeout=5.0"))["config"]
    app = ReplicateProxyMiddleware(host, key_resolver=StaticKeyResolver(TOKEN, api_keys=["pk-team-a"]), config=config)
    body = b'{"id": "p1", "status": "succeeded"}'
    for number, secret in enumerate(config.webhook_secrets):
        id, now = f"msg_{number}", datetime.now(UTC)
        signature = Webhook(secret).sign(id, now, body.decode())
        headers = [
            (b"webhook-id", id.encode()),
            (b"webhook-timestamp", str(int(now.timestamp())).encode()),
            (b"webhook-signature", signature.encode()),
        ]
        for status in (204, 409):
            assert (await call(app, http_scope("POST", "/v1/-/webhooks", headers), body)).status == status
        forged = await call(app, http_scope("POST", "/v1/-/webhooks", headers), body + b" ")
        assert forged.status == 401


def test_no_block_is_forgotten() -> None:
    assert TELEMETRY.count("python", "sh", "yaml") == 10
    assert WEBHOOKS.count("python", "sh") == 5


@pytest.mark.parametrize("page", [TELEMETRY, WEBHOOKS], ids=lambda page: page.path)
def test_files_that_it_links_to_are_there(page: Page) -> None:
    assert page.missing_links() == []
