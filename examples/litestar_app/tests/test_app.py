"""The app on a real port, with a fake Replicate on another, called as its users call it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from portkey_ai import Portkey
from portkey_ai.api_resources.exceptions import AuthenticationError, PermissionDeniedError

from examples.litestar_app.app import create_app
from replicate_proxy_mw.testing import FakeReplicate, serve

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(queue_time=0.05, run_time=0.1).serve() as fake:
        yield fake
    assert fake.violations == []


@pytest.fixture
def url(fake: FakeReplicate) -> Iterator[str]:
    with serve(create_app(upstream=fake.url, token=fake.token)) as served:
        yield served.url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


def portkey(url: str, api_key: str) -> Portkey:
    return Portkey(api_key=api_key, provider="@replicate", base_url=f"{url}/v1", max_retries=0)


@pytest.mark.parametrize("api_key", ["pk-team-a", "pk-team-b"])
def test_a_team_creates_a_prediction_and_reads_it_to_its_end(url: str, fake: FakeReplicate, api_key: str) -> None:
    with portkey(url, api_key) as client:
        prediction = client.post("predictions", version=HELLO_WORLD, input={"text": "Alice"})
        assert prediction.status == "starting"
        while (found := client.get(path=f"predictions/{prediction.id}").json())["status"] != "succeeded":
            time.sleep(0.02)
    assert found["output"] == "hello Alice"
    assert {request.header("authorization") for request in fake.requests} == {f"Bearer {fake.token}"}


def test_a_team_cancels_a_prediction(url: str, fake: FakeReplicate) -> None:
    with portkey(url, "pk-team-a") as client:
        prediction = client.post("predictions", version=HELLO_WORLD, input={"text": "Alice"})
        client.post(f"predictions/{prediction.id}/cancel")
        found = client.get(path=f"predictions/{prediction.id}").json()
    assert found["status"] in ("canceled", "aborted")


def test_a_stream_is_read_without_a_key(fake: FakeReplicate) -> None:
    app = create_app(upstream=fake.url, token=fake.token, stream_hosts=[urlsplit(fake.streams_url).netloc])
    with serve(app) as served, portkey(served.url, "pk-team-a") as client:
        prediction = client.post("models/meta/meta-llama-3-8b-instruct/predictions", input={"prompt": "Alice"})
        stream = prediction.urls["stream"]
        assert stream.startswith(f"{served.url}/v1/-/streams/")
        assert "event: done" in httpx.get(stream).text


def test_unknown_keys_are_refused(url: str, fake: FakeReplicate) -> None:
    with portkey(url, "pk-stranger") as client, pytest.raises(AuthenticationError):
        client.post("predictions", version=HELLO_WORLD, input={"text": "Alice"})
    assert fake.requests == []


def test_a_team_that_may_not_generate_is_told_so(url: str, fake: FakeReplicate) -> None:
    with portkey(url, "pk-archive") as client, pytest.raises(PermissionDeniedError, match="archive only"):
        client.post("predictions", version=HELLO_WORLD, input={"text": "Alice"})
    assert fake.requests == []


def test_nobody_sees_traces_unless_they_are_kept(client: httpx.Client) -> None:
    assert client.get("/traces/").status_code == 404


def test_the_desk_works_as_before(client: httpx.Client, fake: FakeReplicate) -> None:
    asked = client.post("/pictures", json={"article": "Spring", "wish": "A tulip"})
    assert asked.status_code == 201
    assert asked.json() == {"id": 1, "article": "Spring", "wish": "A tulip", "illustrator": None}
    assert client.get("/pictures").json() == [asked.json()]
    assert client.get("/pictures/1").json() == asked.json()
    assert fake.requests == []


def test_its_error_handler_answers_its_errors(client: httpx.Client) -> None:
    missing = client.get("/pictures/7")
    assert missing.status_code == 404
    assert missing.json() == {"error": "no_such_picture", "picture": 7}
    assert client.post("/pictures", json={"article": ""}).status_code == 400


def test_its_path_below_the_prefix_stays_its_own(client: httpx.Client, fake: FakeReplicate) -> None:
    assert client.get("/v1/status").json() == {"service": "illustration desk", "pictures": 0}
    assert fake.requests == []


@pytest.mark.parametrize("path", ["/pictures", "/v1/predictions"])
def test_cors_covers_the_desk_and_the_plugin(client: httpx.Client, fake: FakeReplicate, path: str) -> None:
    asking = {"origin": "https://desk.example", "access-control-request-method": "POST"}
    answer = client.options(path, headers=asking)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://desk.example"
    assert fake.requests == []
