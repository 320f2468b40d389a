from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from replicate_proxy_mw.testing import FakeReplicate, ManualClock, serve
from replicate_proxy_mw.testing.webhooks import sign

VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"clock": ManualClock(), "queue_time": 1.0, "run_time": 10.0, "webhook_retry_delay": 0.01}


def hello(client: httpx.Client, url: str, **more: Any) -> dict[str, Any]:
    body = {"version": VERSION, "input": {"text": "Bob"}, "webhook": url, **more}
    answer = client.post("predictions", json=body)
    assert answer.status_code == 201
    made: dict[str, Any] = answer.json()
    return made


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_signature() -> None:
    # the example on Replicate's page "Verify webhooks" is the one of the Standard Webhooks specification
    secret = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
    key = base64.b64decode("C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
    expected = base64.b64encode(hmac.new(key, b"msg_1.1614265330.{}", hashlib.sha256).digest()).decode()
    assert sign(secret, "msg_1", "1614265330", b"{}") == f"v1,{expected}"


def test_every_event_arrives_signed(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    arrived: list[tuple[httpx.Headers, bytes]] = []

    async def receive(request: Request) -> Response:
        arrived.append((httpx.Headers(request.headers.raw), await request.body()))
        return Response()

    with serve(Starlette(routes=[Route("/hook", receive, methods=["POST"])])) as served:
        hello(client, f"{served.url}/hook", webhook_events_filter=["start", "output", "logs", "completed"])
        fake_replicate.clock.advance(1)
        until(lambda: len(arrived) == 2)
        fake_replicate.clock.advance(10)
        until(lambda: len(fake_replicate.deliveries) == 4)
    assert [json.loads(body)["status"] for _, body in arrived] == ["processing"] * 3 + ["succeeded"]
    assert [delivery.event for delivery in fake_replicate.deliveries] == ["start", "logs", "output", "completed"]
    assert [delivery.status for delivery in fake_replicate.deliveries] == [200] * 4
    assert json.loads(arrived[2][1])["output"] == "hello Bob"
    for headers, body in arrived:
        given = (headers["webhook-id"], headers["webhook-timestamp"], body)
        assert headers["webhook-signature"] == sign(fake_replicate.webhook_secret, *given)


def test_a_canceled_prediction_completes(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    async def receive(request: Request) -> Response:
        return Response()

    with serve(Starlette(routes=[Route("/", receive, methods=["POST"])])) as served:
        made = hello(client, served.url)
        client.post(made["urls"]["cancel"])
        until(lambda: fake_replicate.deliveries)
    (delivery,) = fake_replicate.deliveries
    assert (delivery.event, json.loads(delivery.body)["status"]) == ("completed", "canceled")


def test_the_last_one_is_sent_again_on_failure(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    answers = [500, 503, 200]

    async def receive(request: Request) -> Response:
        return Response(status_code=answers.pop(0))

    with serve(Starlette(routes=[Route("/", receive, methods=["POST"])])) as served:
        hello(client, served.url, webhook_events_filter=["completed"])
        fake_replicate.clock.advance(11)
        until(lambda: not answers and len(fake_replicate.deliveries) == 3)
    assert [(one.attempt, one.status) for one in fake_replicate.deliveries] == [(1, 500), (2, 503), (3, 200)]
    assert len({one.webhook_id for one in fake_replicate.deliveries}) == 1


def test_nobody_there(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    hello(client, "http://127.0.0.1:1/")
    fake_replicate.clock.advance(11)
    until(lambda: len(fake_replicate.deliveries) == 4)
    assert [(one.event, one.status) for one in fake_replicate.deliveries] == [
        ("output", None),  # only the last one is sent again
        *[("completed", None)] * 3,
    ]


def test_redirects_are_not_followed(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    async def receive(request: Request) -> Response:
        return RedirectResponse("/elsewhere")

    with serve(Starlette(routes=[Route("/", receive, methods=["POST"])])) as served:
        hello(client, served.url, webhook_events_filter=["completed"])
        fake_replicate.clock.advance(11)
        until(lambda: fake_replicate.deliveries)
    assert [one.status for one in fake_replicate.deliveries] == [307]


def test_trainings_have_webhooks_and_a_transport_can_be_given() -> None:
    bodies = []

    def receive(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200)

    fake = FakeReplicate(queue_time=0, run_time=0, webhook_transport=httpx.MockTransport(receive))
    with fake.serve(), httpx.Client(base_url=fake.url, headers={"authorization": f"Bearer {fake.token}"}) as client:
        client.post("models", json={"owner": "acme", "name": "own", "visibility": "private", "hardware": "cpu"})
        body = {"destination": "acme/own", "input": {}, "webhook": "https://hook.example/x"}
        made = client.post(f"models/replicate/hello-world/versions/{VERSION}/trainings", json=body).json()
        until(lambda: len(bodies) == 2)
    assert [body["id"] for body in bodies] == [made["id"]] * 2
    assert bodies[-1]["status"] == "succeeded"


def test_deliveries_end_with_the_server() -> None:
    fake = FakeReplicate(clock=ManualClock())
    with fake.serve(), httpx.Client(base_url=fake.url, headers={"authorization": f"Bearer {fake.token}"}) as client:
        hello(client, "http://127.0.0.1:1/")
    fake.clock.advance(100)
    assert fake.deliveries == []


@pytest.mark.anyio
async def test_without_a_lifespan_there_are_none() -> None:
    fake = FakeReplicate(queue_time=0, run_time=0)
    headers = {"authorization": f"Bearer {fake.token}"}
    transport = httpx.ASGITransport(fake)
    async with httpx.AsyncClient(transport=transport, base_url="http://fake.example/v1", headers=headers) as client:
        body = {"version": VERSION, "input": {"text": "Bob"}, "webhook": "http://127.0.0.1:1/"}
        assert (await client.post("predictions", json=body)).status_code == 201
    assert fake.deliveries == []
