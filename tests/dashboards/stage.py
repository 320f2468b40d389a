"""The example app and narrower proxies, in one process with one `/metrics`; and traffic of every outcome."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import _internal as metrics_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app

from examples.fastapi_app.app import PRICES, create_app
from replicate_proxy_mw import KeyRequest, ProxyConfig, ReplicateKey, ReplicateProxyMiddleware, WebhookEvent
from replicate_proxy_mw.layers.cache import cache_catalogue
from replicate_proxy_mw.layers.limits import limit_requests
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, serve
from replicate_proxy_mw.testing.catalogue import seed
from tests.raw_asgi import host
from tests.raw_upstream import RawUpstream

LLAMA, FLUX = "meta/meta-llama-3-8b-instruct", "black-forest-labs/flux-schnell"
SLOW, LATE = "acme/slow", "acme/late"
VERSIONS = {model.full_name: version.id for model in seed() for version in model.versions or ()}
STREAM_KEY = "a-key-of-the-tests-that-is-long-enough"
RETRY = {"x-portkey-config": json.dumps({"retry": {"attempts": 1, "on_status_codes": [503]}})}

T = TypeVar("T")

# Predictions whose end is seen in a round, once each.
ENDS = 9


@dataclass
class Stage:
    """`example` is the app of `examples/fastapi_app`, with `/metrics`; the others are proxies around nothing."""

    fake: FakeReplicate
    registry: CollectorRegistry
    example: str
    strict: str
    narrow: str
    lonely: str

    def exposed(self) -> str:
        """What a scrape gets now."""
        return generate_latest(self.registry).decode()

    def ended(self) -> float:
        """Predictions whose end has been counted."""
        lines = self.exposed().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("replicate_prediction_terminal"))

    def play(self) -> None:
        """One round: every outcome, every end of a prediction, and every way in which an end is seen."""
        before = self.ended()
        with (
            _client(self.example) as team_a,
            _client(self.example, "pk-team-b") as team_b,
            _client(self.strict) as strict,
            ThreadPoolExecutor() as pool,
        ):
            streamed = pool.submit(self._stream, strict)
            full = pool.submit(self._fill, self.narrow)
            self._refused(team_a)
            self._limited(strict)
            self._failing(team_a)
            self._predict(team_a, team_b)
            self._deliver(strict)
            streamed.result()
            full.result()
        eventually(lambda: self.ended() == before + ENDS)

    def _refused(self, client: httpx.Client) -> None:
        for key, status in (("", 401), ("pk-stranger", 401), ("pk-archive", 403)):
            headers = {"x-portkey-api-key": key}
            assert client.get("/account", headers=headers).status_code == status
        assert client.request("TRACE", "/account").status_code == 405

    def _limited(self, client: httpx.Client) -> None:
        """By the proxy's own rules, or answered by its cache."""
        assert client.post("/predictions", content=b"x" * 2000).status_code == 413
        assert client.get("/account", headers={"x-portkey-api-key": "pk-broken"}).status_code == 503
        statuses = [client.get("/hardware", headers={"x-portkey-api-key": "pk-limited"}).status_code for _ in range(2)]
        assert statuses[-1] == 429
        assert [client.get("/hardware").status_code for _ in range(2)] == [200, 200]
        with _client(self.lonely) as lonely:
            assert lonely.get("/account").status_code == 502

    def _failing(self, client: httpx.Client) -> None:
        """Replicate refuses, throttles or fails."""
        for status in (401, 422, 429, 500):
            self.fake.fail(status, operation="predictions.create")
            assert client.post("/predictions", json=_body("replicate/hello-world")).status_code == status
        self.fake.fail(503, operation="account.get", retry_after=0)
        assert client.get("/account", headers=RETRY).status_code == 200
        held = {"prefer": "wait=5", "x-portkey-request-timeout": "300"}
        assert client.post(f"/models/{SLOW}/predictions", json={"input": {}}, headers=held).status_code == 408

    def _predict(self, team_a: httpx.Client, team_b: httpx.Client) -> None:
        held = {"prefer": "wait=10"}
        waited = team_a.post("/predictions", json=_body("replicate/hello-world"), headers=held)
        assert waited.json()["status"] == "succeeded"
        for client, model, status in (
            (team_a, "replicate/hello-world", "succeeded"),
            (team_b, "replicate/always-fails", "failed"),
        ):
            _poll(client, client.post("/predictions", json=_body(model)).json()["id"], status)
        for model in (FLUX, LLAMA):
            _poll(team_b, team_b.post(f"/models/{model}/predictions", json=_body(model)).json()["id"], "succeeded")
        id = team_b.post(f"/models/{SLOW}/predictions", json={"input": {}}).json()["id"]
        _poll(team_b, id, "processing")
        assert team_b.post(f"/predictions/{id}/cancel").json()["status"] == "canceled"
        brief = {"cancel-after": "5s"}
        id = team_a.post(f"/models/{LATE}/predictions", json={"input": {}}, headers=brief).json()["id"]
        self.fake.clock.advance(10)
        _poll(team_a, id, "aborted")

    def _deliver(self, client: httpx.Client) -> None:
        hook = {"webhook": f"{self.strict}/v1/-/webhooks", "webhook_events_filter": ["completed"]}
        assert client.post("/predictions", json={**_body("replicate/hello-world"), **hook}).status_code == 201

    def _stream(self, client: httpx.Client) -> None:
        created = client.post(f"/models/{LLAMA}/predictions", json=_body(LLAMA)).json()
        assert client.get(created["urls"]["stream"]).text.endswith("data: {}\n\n")

    def _fill(self, origin: str) -> None:
        """A caller takes the only place, another is turned away, and the first leaves."""
        full = threading.Event()

        def hold() -> None:
            left = False
            with _client(origin, timeout=1.0) as client:
                while not (left and full.is_set()):  # it may be the one who is turned away
                    try:
                        client.post(f"/models/{SLOW}/predictions", json={"input": {}}, headers={"prefer": "wait=5"})
                    except httpx.ReadTimeout:
                        left = True

        with ThreadPoolExecutor() as pool, _client(origin) as client:
            held = pool.submit(hold)
            try:
                eventually(lambda: client.get("/account").status_code == 503)
            finally:
                full.set()
            held.result()


@contextmanager
def stage() -> Iterator[Stage]:
    slow = FakeModel(owner="acme", name="slow", official=True, run=_nothing, run_time=3600.0)
    late = FakeModel(owner="acme", name="late", official=True, run=_nothing, queue_time=3600.0)
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry)], shutdown_on_exit=False)
    tracer_provider = TracerProvider(shutdown_on_exit=False)
    with (
        pytest.MonkeyPatch.context() as patch,
        FakeReplicate(models=[slow, late], queue_time=0.05, run_time=0.15).serve() as fake,
    ):
        patch.setattr(metrics_api, "_METER_PROVIDER", provider)
        patch.setattr(trace, "_TRACER_PROVIDER", tracer_provider)
        example = create_app(upstream=fake.url, token=fake.token)
        example.mount("/metrics", make_asgi_app(registry))
        with RawUpstream() as gone:
            lonely = gone.url
        strict = _proxy(
            fake,
            ProxyConfig(
                upstream=fake.url,
                max_body_size=1000,
                proxy_streams=True,
                stream_key=STREAM_KEY,
                stream_hosts=[httpx.URL(fake.streams_url).netloc.decode()],
                webhook_secrets=[fake.webhook_secret],
            ),
            layers=[limit_requests(tenants={"limited": {"others": "1/hour"}}), cache_catalogue()],
            on_webhook=_taken,
        )
        narrow = _proxy(fake, ProxyConfig(upstream=fake.url, max_in_flight=1))
        with serve(example, strict, narrow, _proxy(fake, ProxyConfig(upstream=lonely)), grace=0.1) as served:
            yield Stage(fake, registry, *served.urls)
    provider.shutdown()
    tracer_provider.shutdown()


def eventually(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _proxy(fake: FakeReplicate, config: ProxyConfig, **keywords: Any) -> ReplicateProxyMiddleware:
    async def resolver(request: KeyRequest) -> ReplicateKey:
        if request.api_key == "pk-broken":
            raise ConnectionError("the database is gone")
        return ReplicateKey(fake.token, tenant=request.api_key.removeprefix("pk-"))

    return ReplicateProxyMiddleware(host, key_resolver=resolver, config=config, prices=PRICES, **keywords)


def _nothing(given: Any) -> None:
    pass


async def _taken(event: WebhookEvent) -> None:
    pass


def _client(origin: str, key: str = "pk-team-a", *, timeout: float = 20.0) -> httpx.Client:
    return httpx.Client(base_url=f"{origin}/v1", headers={"x-portkey-api-key": key}, timeout=timeout)


def _body(model: str) -> dict[str, Any]:
    version = {"version": VERSIONS[model]} if model in VERSIONS else {}
    return {**version, "input": {"text": "Ada", "prompt": "Ada Lovelace"}}


def _poll(client: httpx.Client, id: str, status: str) -> None:
    eventually(lambda: client.get(f"/predictions/{id}").json()["status"] == status)
