"""Bodies of the sizes that Replicate takes, over real sockets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, serve
from tests.raw_asgi import host

HEADERS = {"x-portkey-api-key": "pk-team-a"}
SLOW = FakeModel(owner="acme", name="slow", official=True, run=lambda given: "late", queue_time=0.1, run_time=3)
IMAGE = FakeModel(owner="acme", name="image", official=True, run=lambda given: "data:image/png;base64," + "A" * 400_000)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(models=[SLOW, IMAGE]).serve() as fake:
        yield fake


@pytest.fixture(scope="module", params=["default", "fast"])
def client(fake: FakeReplicate, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    resolver = MappingKeyResolver({"pk-team-a": fake.token})
    config = ProxyConfig(upstream=fake.url, fast=request.param == "fast")
    app = ReplicateProxyMiddleware(host, key_resolver=resolver, config=config)
    with (
        serve(app, http="httptools") as served,
        httpx.Client(base_url=served.url, headers=HEADERS, timeout=60) as client,
    ):
        yield client


def _upload(client: httpx.Client, size: int) -> dict[str, Any]:
    block = bytes(range(256)) * 256
    files = {"content": ("big.bin", block * (size // len(block)), "application/octet-stream")}
    response = client.post("/v1/files", files=files)
    assert response.status_code == 201, response.text
    created: dict[str, Any] = response.json()
    return created


def test_an_upload_of_100_mib_arrives_whole(client: httpx.Client, fake: FakeReplicate) -> None:
    size = 100 << 20
    created = _upload(client, size - (1 << 16))
    block = bytes(range(256)) * 256
    assert created["size"] == size - (1 << 16)
    assert created["checksums"]["sha256"] == hashlib.sha256(block * (size // len(block) - 1)).hexdigest()


def test_a_download_arrives_whole(client: httpx.Client, fake: FakeReplicate) -> None:
    created = _upload(client, 8 << 20)
    target = fake.download_url(created["id"]).removeprefix(fake.url)
    content = client.get("/v1" + target).content
    assert hashlib.sha256(content).hexdigest() == created["checksums"]["sha256"]


def test_a_create_that_is_held_until_its_end(client: httpx.Client) -> None:
    response = client.post("/v1/models/acme/slow/predictions", json={"input": {}}, headers={"prefer": "wait=10"})
    assert (response.status_code, response.json()["output"]) == (201, "late")
    assert response.headers["preference-applied"] == "wait=10"


def test_an_answer_that_holds_an_image(client: httpx.Client) -> None:
    response = client.post("/v1/models/acme/image/predictions", json={"input": {}}, headers={"prefer": "wait"})
    assert len(json.loads(response.content)["output"]) > 400_000
