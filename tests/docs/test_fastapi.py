"""docs/fastapi.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import KEY, app_of, create
from tests.docs.programs import shell
from tests.documents import Page

FASTAPI = Page("docs/fastapi.md")


def test_an_app_with_the_proxy(fake: FakeReplicate) -> None:
    app = app_of(FASTAPI.block("python", '"service": "my own app"'), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/").json() == {"service": "my own app"}
        create(client)
        assert {*client.get("/openapi.json").json()["paths"]} == {"/"}


@pytest.mark.parametrize("around", [True, False])
def test_web_pages_may_call_where_cors_is_around(fake: FakeReplicate, around: bool) -> None:
    code = FASTAPI.block("python", "CORSMiddleware,")
    if not around:
        proxy, cors = code.index("app.add_middleware(ReplicateProxy"), code.index("app.add_middleware(  # around")
        code = code[:proxy] + code[cors:] + code[proxy:cors]
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-portkey-api-key",
    }
    with serve(app_of(code, fake)) as served, httpx.Client(base_url=served.url) as client:
        beforehand = client.options("/v1/predictions", headers=asked)
        assert beforehand.status_code == (200 if around else 401)
        create(client, origin="https://app.example")
        listed = client.get("/v1/hardware", headers=KEY | {"origin": "https://app.example"})
    assert listed.headers.get("access-control-allow-origin") == ("https://app.example" if around else None)


def test_paths_of_your_own(fake: FakeReplicate) -> None:
    app = app_of(FASTAPI.block("python", "exclude="), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/v1/status").json() == {"up": True}
        create(client)
    assert "/v1/status" not in [request.target.decode() for request in fake.requests]


def test_one_function_for_routes_and_the_proxy(fake: FakeReplicate) -> None:
    app = app_of(FASTAPI.block("python", "async def find_team"), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/me", headers=KEY).json() == "team-a"
        create(client)
        stranger = {"x-portkey-api-key": "pk-stranger"}
        assert [client.get(path, headers=stranger).status_code for path in ("/me", "/v1/account")] == [401, 401]


def test_under_a_path(fake: FakeReplicate) -> None:
    app = app_of(FASTAPI.block("python", "app.mount("), fake)
    with serve(app) as served, httpx.Client(base_url=served.url) as client:
        create(client, "/replicate/v1")
        assert [client.get(path).status_code for path in ("/replicate/other", "/v1/predictions")] == [404, 404]


@pytest.mark.parametrize("own", [True, False])
def test_the_span_of_fastapi(
    fake: FakeReplicate, own: bool, monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    code, without = FASTAPI.block("python", '"service": "my own app"'), FASTAPI.block("python", "telemetry=")
    if not own:
        [line] = [line for line in without.splitlines() if line.startswith("app = ")]
        code = code.replace("app = FastAPI()", line)
    with serve(app_of(code, fake)) as served:
        assert httpx.get(f"{served.url}/v1/hardware", headers=KEY).status_code == 200
    kinds = [span.kind.name for span in sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)]
    assert kinds == (["SERVER", "INTERNAL", "CLIENT"] if own else ["SERVER", "CLIENT"])


def test_the_tests_pass(tmp_path: Path) -> None:
    tmp_path.joinpath("test_app.py").write_text(FASTAPI.block("python", "pytest_plugins"))
    assert "2 passed" in shell("python -m pytest -q -p no:cacheprovider", tmp_path)


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert FASTAPI.count("python") == len(FASTAPI.code) == 7
    assert FASTAPI.missing_links() == []
