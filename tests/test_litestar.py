from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from litestar import Litestar, get, websocket
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection, WebSocket
from litestar.exceptions import ImproperlyConfiguredException, NotAuthorizedException, WebSocketDisconnect
from litestar.handlers import BaseRouteHandler
from litestar.testing import TestClient
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import (
    Forward,
    MappingKeyResolver,
    MemoryPredictionStore,
    Policy,
    ProxyConfig,
    ProxyRequest,
    ProxyResponse,
    Rates,
    ReplicateKey,
    WebhookEvent,
)
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.raw_asgi import TOKEN, Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry.scenarios import labels, of
from tests.tenants import HELLO_WORLD, answers

HEADERS = {"x-portkey-api-key": "pk-team-a"}


@get("/v1/own", sync_to_thread=False)
def own() -> str:
    return "own"


@get("/v1beta/5", sync_to_thread=False)
def beta() -> str:
    return "beta"


@websocket("/socket")
async def socket(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def _plugin(upstream: str, **more: Any) -> ReplicateProxyPlugin:
    options = more.pop("options", {})
    resolver = MappingKeyResolver({"pk-team-a": TOKEN})
    return ReplicateProxyPlugin(key_resolver=resolver, config=ProxyConfig(upstream=upstream, **options), **more)


def _app(upstream: str, *handlers: BaseRouteHandler, on_shutdown: Any = (), **more: Any) -> Litestar:
    return Litestar(
        [own, *handlers],
        plugins=[_plugin(upstream, **more)],
        cors_config=CORSConfig(allow_origins=["https://app.test"]),
        logging_config=None,
        on_shutdown=list(on_shutdown),
    )


@pytest.mark.parametrize("target", ["/v1", "/v1/", "/v1/predictions", "/v1/a%2Fb//c/", "/v1/a%20b?x=%20", "/v1//x"])
def test_targets_arrive_as_they_were_sent(upstream: RawUpstream, target: str) -> None:
    with serve(_app(upstream.url)) as served:
        assert httpx.get(served.url + target, headers=HEADERS).json() == {}
    assert upstream.requests[0].line == f"GET {target} HTTP/1.1".encode()


@pytest.mark.parametrize("method", ["POST", "PATCH", "QUERY", "DELETE", "HEAD"])
def test_every_method_arrives(upstream: RawUpstream, method: str) -> None:
    with serve(_app(upstream.url)) as served:
        assert httpx.request(method, served.url + "/v1/x", headers=HEADERS).status_code == 200
    assert upstream.requests[0].line.startswith(method.encode())


def test_the_host_s_routes_stay_its_own(upstream: RawUpstream) -> None:
    with serve(_app(upstream.url)) as served:
        assert httpx.get(served.url + "/v1/own").text == "own"
        for target in ("/v1beta", "/v10/x", "/v2"):
            assert httpx.get(served.url + target, headers=HEADERS).status_code == 404
    assert not upstream.requests


def test_a_route_that_the_mount_would_shadow_stops_the_start() -> None:
    with pytest.raises(ImproperlyConfiguredException, match="/v1beta/5"):
        _app("http://127.0.0.1:1", beta)


def test_litestar_s_cors_stays_around_the_proxy(upstream: RawUpstream) -> None:
    with serve(_app(upstream.url)) as served:
        headers = HEADERS | {"origin": "https://app.test"}
        response = httpx.get(served.url + "/v1/x", headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://app.test"


def test_websockets_below_the_prefix_are_closed(upstream: RawUpstream) -> None:
    with TestClient(_app(upstream.url, socket)) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/socket"):
            pass
        with client.websocket_connect("/socket") as connection:
            assert connection.receive_text() == "hello"


def test_the_lifespan_closes_what_was_opened(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer()
        connection.wait_closed()

    upstream.script = script
    with serve(_app(upstream.url)) as served:
        httpx.get(served.url + "/v1/x", headers=HEADERS)
        assert not upstream.closed.is_set()
    assert upstream.closed.wait(2)


def test_the_plugin_takes_the_middleware_s_keywords(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    passed = []

    def layer(forward: Forward) -> Forward:
        async def noted(request: ProxyRequest) -> ProxyResponse:
            passed.append(request.target)
            return await forward(request)

        return noted

    transport = httpx.AsyncHTTPTransport()
    app = _app(
        upstream.url,
        layers=[layer],
        transport=transport,
        on_shutdown=[transport.aclose],
        tracer_provider=tracer_provider,
        options={"prefix": "/replicate"},
    )
    with serve(app) as served:
        assert httpx.get(served.url + "/replicate/x", headers=HEADERS).json() == {}
        assert httpx.get(served.url + "/v1/x", headers=HEADERS).status_code == 404
    assert passed == ["/x"]
    assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/{path}", "GET /replicate/{path}"]


@pytest.mark.parametrize(
    "target", ["/v1", "/v1/", "/v1/account", "//v1/account", "/v1//account", "/v1/a%2Fb/../c", "/%761"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "QUERY"])
def test_guards_are_asked_before_anything_else(upstream: RawUpstream, method: str, target: str) -> None:
    def nobody(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        raise NotAuthorizedException("Sign in first.")

    with serve(_app(upstream.url, guards=[nobody])) as served:
        url = httpx.URL(served.url, raw_path=target.encode())
        assert httpx.request(method, url, headers=HEADERS).status_code in (401, 404)
    assert upstream.requests == []


def test_a_store_is_the_middleware_s(fake_replicate: FakeReplicate) -> None:
    store = MemoryPredictionStore()
    key = ReplicateKey(fake_replicate.token, tenant="team-a", policy=Policy(own_predictions=True))
    plugin = ReplicateProxyPlugin(
        key_resolver=MappingKeyResolver({"pk-team-a": key}),
        config=ProxyConfig(upstream=fake_replicate.url),
        store=store,
    )
    with serve(Litestar(plugins=[plugin], logging_config=None)) as served:
        body = {"input": {"prompt": "Hi"}}
        path = "/v1/models/meta/meta-llama-3-8b-instruct/predictions"
        assert httpx.post(served.url + path, headers=HEADERS, json=body).status_code == 201
    assert len(store) == 1


def test_below_a_path_of_the_app_s_own(upstream: RawUpstream) -> None:
    plugin = _plugin(upstream.url, options={"exclude": ["/v1/mine"]})
    with serve(Litestar([own], path="/api", plugins=[plugin], logging_config=None)) as served:
        assert httpx.get(served.url + "/api/v1/own").text == "own"
        assert httpx.get(served.url + "/api/v1/x", headers=HEADERS).json() == {}
        assert httpx.get(served.url + "/api/v1/mine", headers=HEADERS).status_code == 404
        assert httpx.get(served.url + "/v1/x", headers=HEADERS).status_code == 404
    assert [received.line for received in upstream.requests] == [b"GET /v1/x HTTP/1.1"]


def test_the_prefix_has_to_be_there() -> None:
    with pytest.raises(ImproperlyConfiguredException, match="prefix"):
        _app("http://127.0.0.1:1", options={"prefix": ""})


@pytest.mark.anyio
async def test_a_server_without_raw_path(upstream: RawUpstream) -> None:
    app = _app(upstream.url)
    scope = http_scope(target="/v1/predictions")
    del scope["raw_path"]
    caller = await Caller().call(app, scope)
    assert caller.status == 200
    assert upstream.requests[0].line == b"GET /v1/predictions HTTP/1.1"
    await app.plugins.get(ReplicateProxyPlugin).aclose()


def test_webhooks_are_the_middleware_s(fake_replicate: FakeReplicate) -> None:
    events: list[WebhookEvent] = []

    async def on_webhook(event: WebhookEvent) -> None:
        events.append(event)

    plugin = ReplicateProxyPlugin(
        key_resolver=MappingKeyResolver({"pk-team-a": fake_replicate.token}),
        config=ProxyConfig(upstream=fake_replicate.url, webhook_secrets=[fake_replicate.webhook_secret]),
        on_webhook=on_webhook,
    )
    with serve(Litestar([own], path="/api", plugins=[plugin], logging_config=None)) as served:
        content = {
            "version": HELLO_WORLD,
            "input": {"text": "Ada"},
            "webhook": f"{served.url}/api/v1/-/webhooks",
            "webhook_events_filter": ["completed"],
        }
        created = httpx.post(f"{served.url}/api/v1/predictions", headers=HEADERS, json=content).json()
        fake_replicate.clock.advance(3600)
        end = time.monotonic() + 10
        while not fake_replicate.deliveries and time.monotonic() < end:
            time.sleep(0.01)
        refused = httpx.get(f"{served.url}/api/v1/-/webhooks")
    assert [delivery.status for delivery in fake_replicate.deliveries] == [204]
    assert [event.prediction["id"] for event in events] == [created["id"]]
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_what_telemetry_takes_is_the_middleware_s(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    def redact(path: str, value: object) -> object:
        return f"<{path}>"

    reader = InMemoryMetricReader()
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    upstream.script = answers(b'{"id": "p1", "model": "a/b", "status": "succeeded", "output": {"x": "hunter2"}}')
    app = _app(
        upstream.url,
        prices={"a/b": Rates(per_run=2.0)},
        redact=redact,
        tracer_provider=tracer_provider,
        meter_provider=meter_provider,
        options={"capture_content": True},
    )
    with serve(app) as served:
        assert httpx.post(f"{served.url}/v1/models/a/b/predictions", headers=HEADERS, json={}).status_code == 200
    [run] = [span for span in exporter.get_finished_spans() if span.name == "generate_content a/b"]
    assert of(run, "replicate.prediction.cost") == [2.0]
    assert "hunter2" not in run.to_json()
    assert labels(reader, "replicate_proxy.requests") == [
        {"replicate.operation": "models.predictions.create", "replicate_proxy.outcome": "forwarded"}
    ]


def test_what_is_wrong_is_named_when_the_app_is_made() -> None:
    async def on_webhook(event: WebhookEvent) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="on_webhook"):
        _app("http://127.0.0.1:1", on_webhook=on_webhook)
    with pytest.raises(ValueError, match="capture_content"):
        _app("http://127.0.0.1:1", options={"capture_content": "sometimes"})
