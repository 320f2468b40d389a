"""docs/policies.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

import json
import re
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import Policy, operations
from replicate_proxy_mw.keys import FileKeyResolver
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import BODY, HELLO_WORLD
from tests.documents import Page, execute
from tests.raw_asgi import proxy

POLICIES = Page("docs/policies.md")
REFUSALS = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", POLICIES.text, re.MULTILINE)
FLUX, LLAMA = "black-forest-labs/flux-schnell", "meta/meta-llama-3-8b-instruct"
CREATES = {"predictions.create", "models.predictions.create", "deployments.predictions.create"}
Call = Callable[..., httpx.Response]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReplicate]:
    with FakeReplicate(run_time=30.0).serve() as fake:
        monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
        yield fake


@pytest.fixture
def known() -> dict[str, Any]:
    return execute(POLICIES.block("python", "PLANS = {"))


@pytest.fixture
def call(fake: FakeReplicate, known: dict[str, Any], tracer_provider: TracerProvider) -> Iterator[Call]:
    """Ask as one of the teams; what is refused must not have reached Replicate."""
    app = proxy(fake.url, key_resolver=known["key_resolver"], tracer_provider=tracer_provider)
    with serve(app) as served, httpx.Client(base_url=f"{served.url}/v1", timeout=30) as client:

        def ask(key: str, method: str, path: str, **more: Any) -> httpx.Response:
            sent = len(fake.requests)
            answer = client.request(method, path, headers={"x-portkey-api-key": key, **more.pop("headers", {})}, **more)
            if "x-portkey-gateway-exception" in answer.headers:
                assert len(fake.requests) == sent
            return answer

        yield ask


def _told(answer: httpx.Response) -> tuple[str, str, str]:
    return str(answer.status_code), answer.json()["error"]["code"], answer.json()["detail"]


def _create(model: str) -> tuple[str, str]:
    return "POST", f"/models/{model}/predictions"


PROMPT = {"input": {"prompt": "A tulip"}}


def test_what_the_plans_allow(known: dict[str, Any]) -> None:
    plans: dict[str, Policy] = known["PLANS"]
    everything = {one.id for one in operations.OPERATIONS}
    reads = {one.id for one in operations.OPERATIONS if one.method in ("GET", "QUERY")}
    assert plans["reader"].operation_ids == reads - {"webhooks.default.secret.get"}
    for plan in ("trial", "maker", "trainer"):
        assert plans[plan].operation_ids >= CREATES | {"predictions.get", "predictions.cancel", "files.create"}
    assert "trainings.create" not in plans["maker"].operation_ids
    assert {"trainings.create", "models.delete"} <= plans["trainer"].operation_ids
    assert plans["admin"].operation_ids == everything
    assert Policy().operation_ids == everything - {"webhooks.default.secret.get"}


def test_a_reader_creates_nothing(call: Call) -> None:
    assert call("pk-of-audit", "GET", "/predictions").status_code == 200
    assert call("pk-of-audit", *_create(FLUX), json=PROMPT).status_code == 403


def test_what_a_refusal_looks_like(call: Call) -> None:
    shown, got = (
        json.loads(POLICIES.block("json", "Permission denied")),
        call("pk-of-design", *_create(FLUX), json=PROMPT),
    )
    assert got.status_code == shown["status"]
    assert shown | {"instance": "", "request_id": ""} == got.json() | {"instance": "", "request_id": ""}


def test_each_refusal_of_the_table(
    call: Call, known: dict[str, Any], fake: FakeReplicate, exporter: InMemorySpanExporter
) -> None:
    told: list[tuple[str, str, str]] = []
    plans = known["PLANS"]
    plans["trial"] = replace(plans["trial"], expires_at=None)  # whenever this is run
    training = f"/models/acme/hello/versions/{HELLO_WORLD}/trainings"
    told.append(_told(call("pk-of-design", "POST", training, json={"destination": "acme/mine", "input": {}})))
    told.append(_told(call("pk-of-design", "GET", "/billing")))
    told.append(_told(call("pk-of-ada", *_create(LLAMA), json=PROMPT)))
    told.append(_told(call("pk-of-ada", "POST", "/predictions", json=BODY)))
    assert call("pk-of-ada", "GET", "/predictions").json()["results"] == []
    told.append(_told(call("pk-of-ada", "GET", "/predictions/of-somebody-else")))
    told.append(_too_many(call, fake))
    plans["trial"] = replace(plans["trial"], expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    told.append(_told(call("pk-of-ada", *_create(FLUX), json=PROMPT)))
    in_time = [(*first, text.replace("2020-", "2027-")) for *first, text in told]
    assert sorted(in_time) == sorted(REFUSALS)

    outcomes = {
        span.attributes.get("replicate_proxy.outcome")
        for span in exporter.get_finished_spans()
        if span.attributes and span.attributes.get("http.response.status_code") in (403, 404, 429)
    }
    assert outcomes == {"denied", "limited"}


def _too_many(call: Call, fake: FakeReplicate) -> tuple[str, str, str]:
    """The third request, while two creates are held."""
    sent, made = len(fake.requests), []

    def create() -> None:
        made.append(
            httpx.codes.is_success(
                call("pk-of-ada", *_create(FLUX), json=PROMPT, headers={"prefer": "wait"}).status_code
            )
        )

    held = [threading.Thread(target=create) for _ in range(2)]
    for thread in held:
        thread.start()
    deadline = time.monotonic() + 10
    while len(fake.requests) < sent + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refused = call("pk-of-ada", "GET", "/predictions")
    fake.clock.advance(60)
    for thread in held:
        thread.join()
    assert (made, refused.headers["retry-after"]) == ([True, True], "1")
    return _told(refused)


def test_the_key_file_says_the_same(
    known: dict[str, Any], fake: FakeReplicate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.sub(
        "sha256:[0-9a-f]{64}", "sha256:" + sha256(b"pk-of-ada").hexdigest(), POLICIES.block("toml", "[policies.")
    )
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("keys.toml").write_text(text)
    resolver = FileKeyResolver("keys.toml")
    with serve(proxy(fake.url, key_resolver=resolver)) as served:
        key = {"x-portkey-api-key": "pk-of-ada"}
        answer = httpx.get(f"{served.url}/v1/trainings", headers=key)
        refused = "operations" if datetime.now(UTC).year < 2027 else "expires_at"
        assert answer.status_code == 403
        assert answer.json()["detail"].startswith(refused)
    assert Policy(**_policy_of(text)) == known["PLANS"]["trial"]


def _policy_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(text)["policies"]["trial"]
    return found


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert [POLICIES.count(name) for name in ("python", "toml", "json")] == [1, 1, 1]
    assert len(POLICIES.code) == 3
    assert len(REFUSALS) == 7
    assert POLICIES.missing_links() == []
