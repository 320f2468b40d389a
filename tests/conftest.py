from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import ProxyConfig, ingress
from tests.raw_upstream import RawUpstream

pytest_plugins = ["replicate_proxy_mw.testing.pytest_plugin", "tests.services", "tests.canary"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def little_patience() -> None:
    """Callers leave in hundreds of tests; servers in processes of their own wait as long as everywhere."""
    ingress.PATIENCE = 0.01


@pytest.fixture(params=["default", "fast"])
def either_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both transports, for whoever makes a `ProxyConfig`."""
    monkeypatch.setitem(vars(ProxyConfig)["__init__"].__kwdefaults__, "fast", request.param == "fast")


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as raw:
        yield raw


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer_provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()
