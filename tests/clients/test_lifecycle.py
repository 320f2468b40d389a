"""Every client, through the example apps on real servers: create, read to the end, cancel."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from replicate_proxy_mw.testing import FakeModel, FakeReplicate, serve
from tests.clients.drivers import Client

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
# Runs from the first moment: Replicate's client for Python does not know `aborted`, a cancel before the start.
SLOW = FakeModel(owner="acme", name="slow", run=lambda given: "late", queue_time=0, run_time=600)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(models=[SLOW], queue_time=0.02, run_time=0.05).serve() as fake:
        yield fake


@pytest.fixture(scope="module", params=["fastapi_app", "litestar_app"])
def app(request: pytest.FixtureRequest, fake: FakeReplicate) -> Any:
    example = importlib.import_module(f"examples.{request.param}.app")
    return example.create_app(upstream=fake.url, token=fake.token)


@pytest.fixture(scope="module", params=["h11", "httptools"])
def base_url(request: pytest.FixtureRequest, app: Any) -> Iterator[str]:
    http: Literal["h11", "httptools"] = request.param
    with serve(app, http=http) as served:
        yield f"{served.url}/v1"


def test_a_prediction_is_created_read_and_canceled(client: Client, base_url: str, fake: FakeReplicate) -> None:
    before = len(fake.requests)
    slow = (SLOW.versions or ())[0].id

    seen = client.run(base_url, "pk-team-a", HELLO_WORLD, slow)

    assert seen.created["status"] in ("starting", "processing")
    assert seen.read["id"] == seen.created["id"]
    assert seen.read["status"] == "succeeded"
    assert seen.read["output"] == "hello Ada"
    assert seen.canceled["id"] != seen.created["id"]
    assert seen.canceled["status"] == "canceled"

    arrived = fake.requests[before:]
    operations = [request.operation for request in arrived]
    assert set(operations) == {"predictions.create", "predictions.get", "predictions.cancel"}
    assert operations.count("predictions.create") == 2
    assert {request.header("authorization") for request in arrived} == {f"Bearer {fake.token}"}
    assert not any(b"pk-team-a" in value for request in arrived for _, value in request.headers)
    assert fake.violations == []
