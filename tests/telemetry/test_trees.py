"""What a collector gets of requests and predictions, over HTTP and decoded again."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv import attributes as semconv_attributes
from opentelemetry.semconv import metrics as semconv_metrics
from redis.asyncio import Redis

from replicate_proxy_mw import MappingKeyResolver, Policy, ReplicateKey
from replicate_proxy_mw.store import MemoryPredictionStore, StoredPrediction
from replicate_proxy_mw.store.redis import RedisPredictionStore
from replicate_proxy_mw.telemetry import PriceRequest, Rates, attempt, metrics, names, story
from replicate_proxy_mw.testing import FakeModel
from replicate_proxy_mw.testing.serve import serve
from tests.otlp import ExportedSpan, Point, tree
from tests.raw_asgi import KEY, TOKEN, Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.servers.running import wait_for
from tests.services import RedisServer
from tests.telemetry import scenarios
from tests.telemetry.scenarios import CALLER, LLAMA, QUEUE, RUN, Stage, id_of, kind, stream_of, told
from tests.tenants import HELLO_WORLD, Switched, answers, hangs, refuses

pytestmark = pytest.mark.anyio

HELLO = "replicate/hello-world"
CREATE = "POST /v1/predictions"
OFFICIAL = "POST /v1/models/{model_owner}/{model_name}/predictions"
OF_DEPLOYMENT = "POST /v1/deployments/{deployment_owner}/{deployment_name}/predictions"
TRAIN = "POST /v1/models/{model_owner}/{model_name}/versions/{version_id}/trainings"
POLL = "GET /v1/predictions/{prediction_id}"
SAID = {
    "portkey.trace_id": "order-42",
    "portkey.span_id": "span-1",
    "portkey.parent_span_id": "span-0",
    "portkey.span_name": "Summary",
    "portkey.metadata._user": "u1",
    "portkey.metadata.team_space": "t",
}


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 0.0)


@pytest.fixture
def stage() -> Iterator[Stage]:
    with scenarios.stage() as made:
        yield made
        assert made.fake.violations == []


def _created_and_polled(create: str, run: str, polls: int = 1) -> str:
    poll = f"{POLL} SERVER -> {create}\n  {POLL} CLIENT\n"
    return f"{create} SERVER\n  {create} CLIENT\n  {run} CLIENT\n{poll * polls}".rstrip()


def _of(span: ExportedSpan, *found: str) -> list[Any]:
    return [span.attributes.get(name) for name in found]


def _values(points: list[Point]) -> list[tuple[Mapping[str, Any], int | float | None]]:
    """Of counters what they count, of histograms the sum."""
    return [(point.attributes, point.sum if point.kind == "histogram" else point.value) for point in points]


async def test_an_asynchronous_create_and_its_polls(stage: Stage) -> None:
    await scenarios.asynchronous(stage)
    assert tree(stage.sink.spans) == _created_and_polled(CREATE, f"generate_content {HELLO}", 5)
    create, *polls = stage.requests
    assert len({span.trace_id for span in stage.requests}) == 6
    assert [poll.links for poll in polls] == [[(create.trace_id, create.span_id)]] * 5
    assert [poll.attributes.get("replicate_proxy.lifecycle.transition") for poll in polls] == [
        None,
        True,
        None,
        True,
        None,
    ]
    id = create.attributes["replicate.prediction.id"]
    statuses = [span.attributes["replicate.prediction.status"] for span in stage.requests]
    assert statuses == ["starting", "starting", "processing", "processing", "succeeded", "succeeded"]
    assert [_of(span, "gen_ai.response.id", "gen_ai.response.status") for span in stage.attempts] == [
        [id, status] for status in ("queued", "queued", "in_progress", "in_progress", "completed", "completed")
    ]
    assert {span.attributes.get("replicate.model.version") for span in stage.requests} == {HELLO_WORLD}
    assert stage.run.attributes == {
        **SAID,
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "replicate",
        "gen_ai.request.model": HELLO,
        "gen_ai.response.id": id,
        "gen_ai.response.model": HELLO,
        "gen_ai.response.status": "completed",
        "replicate.model.name": HELLO,
        "replicate.model.version": HELLO_WORLD,
        "replicate.prediction.id": id,
        "replicate.prediction.status": "succeeded",
        "replicate.prediction.queue_time": QUEUE,
        "replicate.prediction.run_time": RUN,
        "replicate.prediction.total_time": QUEUE + RUN,
        "replicate_proxy.lifecycle.observed_by": "poll",
        "replicate_proxy.lifecycle.observation_lag": 0.0,
        "replicate_proxy.lifecycle.origin": "store",
        "replicate_proxy.lifecycle.polls": 4,
        "replicate_proxy.tenant": "team-a",
    }


async def test_a_run_begins_with_the_prediction_and_ends_with_it(stage: Stage) -> None:
    await scenarios.asynchronous(stage)
    create, run = stage.requests[0], stage.run
    assert (run.trace_id, run.parent_id, run.parent_is_remote) == (create.trace_id, create.span_id, True)
    assert run.scope == create.scope
    assert create.start < run.start < create.end
    assert (run.end - run.start) / 1e9 == pytest.approx(QUEUE + RUN, abs=1e-5)
    [(name, at, attributes)] = run.events
    assert (name, attributes) == ("replicate.started", {})
    assert (at - run.start) / 1e9 == pytest.approx(QUEUE, abs=1e-5)
    assert (run.status, run.description, run.links) == ("UNSET", "", [])


async def test_the_numbers_of_a_prediction(stage: Stage) -> None:
    await scenarios.asynchronous(stage)
    of_run = {"replicate.model.name": HELLO, "replicate.prediction.status": "succeeded"}
    by_poll = {"replicate_proxy.lifecycle.observed_by": "poll"}
    assert _values(stage.points("replicate.prediction.queue.duration")) == [(of_run, QUEUE)]
    assert _values(stage.points("replicate.prediction.run.duration")) == [(of_run, RUN)]
    assert _values(stage.points("replicate.prediction.duration")) == [(of_run, QUEUE + RUN)]
    assert _values(stage.points("replicate.prediction.terminal")) == [({**of_run, **by_poll}, 1)]
    assert _values(stage.points("replicate_proxy.prediction.polls")) == [(by_poll, 4)]
    assert _values(stage.points("replicate_proxy.prediction.observation_lag")) == [(by_poll, 0.0)]
    assert stage.points("replicate.prediction.cost") == []
    by_operation = {
        (point.attributes["gen_ai.operation.name"], point.attributes["gen_ai.response.model"]): point.count
        for point in stage.points("gen_ai.client.operation.duration")
    }
    assert by_operation == {
        ("create_prediction", HELLO): 1,
        ("generate_content", HELLO): 1,
    }


async def test_the_numbers_of_requests(stage: Stage) -> None:
    await scenarios.asynchronous(stage)

    def counts(name: str) -> list[tuple[Mapping[str, Any], int]]:
        return [(point.attributes, point.count) for point in stage.points(name)]

    create, poll = {"replicate.operation": "predictions.create"}, {"replicate.operation": "predictions.get"}
    forwarded = {"replicate_proxy.outcome": "forwarded"}
    assert counts("replicate_proxy.request.duration") == [({**create, **forwarded}, 1), ({**poll, **forwarded}, 5)]
    tenant = {"replicate_proxy.tenant": "team-a"}
    assert _values(stage.points("replicate_proxy.requests")) == [
        ({**create, **forwarded, **tenant}, 1),
        ({**poll, **forwarded, **tenant}, 5),
    ]
    assert _values(stage.points("replicate_proxy.in_flight")) == [(create, 0), (poll, 0)]
    assert counts("replicate_proxy.overhead.duration") == [(create, 1), (poll, 5)]
    assert counts("http.server.request.duration") == [
        ({"http.request.method": "POST", "http.route": "/v1/predictions", "http.response.status_code": 201}, 1),
        (
            {
                "http.request.method": "GET",
                "http.route": "/v1/predictions/{prediction_id}",
                "http.response.status_code": 200,
            },
            5,
        ),
    ]
    assert [point.attributes["url.template"] for point in stage.points("http.client.request.duration")] == [
        "/v1/predictions",
        "/v1/predictions/{prediction_id}",
    ]
    for total, own in zip(
        stage.points("replicate_proxy.request.duration"), stage.points("replicate_proxy.overhead.duration"), strict=True
    ):
        assert 0 < own.sum < total.sum


async def test_a_synchronous_create(stage: Stage) -> None:
    await scenarios.synchronous(stage)
    model = f"generate_content {LLAMA}"
    assert tree(stage.sink.spans) == f"{OFFICIAL} SERVER\n  {OFFICIAL} CLIENT\n  {model} CLIENT"
    [create], run = stage.requests, stage.run
    assert (run.parent_id, run.parent_is_remote) == (create.span_id, False)
    found = {name: value for name, value in run.attributes.items() if "usage" in name or "cost" in name}
    assert found == {
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "replicate.prediction.cost": 0.5 * RUN + 0.25 * 2,
        "replicate.prediction.cost.currency": "USD",
        "replicate.prediction.cost.basis": "per_second,per_input_token",
    }
    assert _of(run, "replicate_proxy.lifecycle.observed_by", "replicate_proxy.lifecycle.polls") == ["create", 0]
    assert SAID.items() <= run.attributes.items()
    [cost] = stage.points("replicate.prediction.cost")
    assert (cost.value, cost.attributes) == (
        60.5,
        {
            "replicate.model.name": LLAMA,
            "replicate_proxy.tenant": "team-a",
            "replicate.prediction.cost.currency": "USD",
        },
    )
    of_gen_ai = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "replicate",
        "gen_ai.response.model": LLAMA,
    }
    assert _values(stage.points("gen_ai.client.token.usage")) == [
        ({**of_gen_ai, "gen_ai.token.type": "input"}, 2),
        ({**of_gen_ai, "gen_ai.token.type": "output"}, 4),
    ]


async def test_an_official_model(stage: Stage) -> None:
    await scenarios.official(stage)
    assert tree(stage.sink.spans) == _created_and_polled(OFFICIAL, f"generate_content {LLAMA}")
    create, poll = stage.attempts
    assert _of(create, "gen_ai.request.model", "gen_ai.response.model") == [LLAMA, LLAMA]
    assert _of(poll, "gen_ai.request.model", "gen_ai.response.model") == [None, LLAMA]


async def test_a_deployment(stage: Stage) -> None:
    await scenarios.deployment(stage)
    assert tree(stage.sink.spans) == _created_and_polled(OF_DEPLOYMENT, f"generate_content {HELLO}")
    assert [span.attributes["replicate.deployment"] for span in (*stage.requests, stage.run)] == ["acme/hello"] * 3
    assert stage.run.attributes["replicate.prediction.cost"] == 0.5 * RUN


async def test_a_training(stage: Stage) -> None:
    await scenarios.training(stage)
    poll = "GET /v1/trainings/{training_id}"
    assert tree(stage.sink.spans) == (
        f"{TRAIN} SERVER\n  {TRAIN} CLIENT\n  train {HELLO} CLIENT\n{poll} SERVER -> {TRAIN}\n  {poll} CLIENT"
    )
    run = stage.run
    assert run.attributes["replicate.training.id"] == stage.requests[0].attributes["replicate.training.id"]
    assert "replicate.prediction.id" not in run.attributes
    assert not [name for span in stage.sink.spans for name in span.attributes if name.startswith("gen_ai.")]
    assert run.attributes["replicate.prediction.total_time"] == QUEUE + RUN
    [cost] = stage.points("replicate.prediction.cost")
    assert cost.value == run.attributes["replicate.prediction.cost"] == 0.5 * RUN
    assert stage.points("replicate.prediction.terminal") == []


async def test_a_cancel(stage: Stage) -> None:
    await scenarios.canceled(stage)
    cancel = "POST /v1/predictions/{prediction_id}/cancel"
    assert tree(stage.sink.spans) == (
        f"{CREATE} SERVER\n  {CREATE} CLIENT\n  generate_content {HELLO} CLIENT\n"
        f"{cancel} SERVER -> {CREATE}\n  {cancel} CLIENT"
    )
    run = stage.run
    assert _of(run, "gen_ai.response.status", "replicate.prediction.status", "error.type") == [
        "cancelled",
        "canceled",
        None,
    ]
    assert _of(run, "replicate_proxy.lifecycle.observed_by", "replicate_proxy.lifecycle.polls") == ["cancel", 0]
    assert (run.end - run.start) / 1e9 >= QUEUE + 1
    assert "replicate_proxy.lifecycle.transition" not in stage.requests[1].attributes


async def test_one_that_fails(stage: Stage) -> None:
    await scenarios.failed(stage)
    run = f"generate_content {scenarios.ALWAYS_FAILS} CLIENT ERROR prediction_failed"
    assert f"\n  {run}\n" in tree(stage.sink.spans)
    assert stage.run.description == ""
    assert "CUDA" not in str(stage.sink.raw)
    [terminal] = stage.points("replicate.prediction.terminal")
    assert terminal.attributes["replicate.prediction.status"] == "failed"
    errors = {
        point.attributes["gen_ai.operation.name"]: point.attributes.get("error.type")
        for point in stage.points("gen_ai.client.operation.duration")
    }
    assert errors == {"create_prediction": None, "generate_content": "prediction_failed"}


async def test_one_that_runs_into_its_deadline(stage: Stage) -> None:
    await scenarios.aborted(stage)
    assert f"\n  generate_content {HELLO} CLIENT ERROR deadline_exceeded\n" in tree(stage.sink.spans)
    run = stage.run
    assert _of(run, "gen_ai.response.status", "replicate.prediction.status") == ["cancelled", "aborted"]
    assert _of(run, "replicate.prediction.queue_time", "replicate.prediction.run_time") == [None, None]
    assert run.attributes["replicate.prediction.total_time"] == pytest.approx(30, abs=0.01)
    assert run.events == []
    assert stage.points("replicate.prediction.queue.duration") == []


async def test_a_stream(stage: Stage) -> None:
    await scenarios.streamed(stage)
    stream = "GET /v1/-/streams/{token}"
    assert tree(stage.sink.spans) == (
        f"{OFFICIAL} SERVER\n  {OFFICIAL} CLIENT\n  generate_content {LLAMA} CLIENT\n"
        f"{stream} SERVER -> {OFFICIAL}\n  GET CLIENT"
    )
    create, request = stage.requests
    attempt_, run = stage.attempts[1], stage.run
    found = ("url.path", "replicate.prediction.status", "replicate_proxy.outcome", "replicate_proxy.tenant")
    assert _of(request, *found) == ["/v1/-/streams/{token}", "succeeded", "forwarded", None]
    assert 0 < attempt_.attributes["gen_ai.response.time_to_first_chunk"] < 60
    assert {name: value for name, value in attempt_.attributes.items() if name not in SAID} == {
        "gen_ai.operation.name": "fetch_response",
        "gen_ai.provider.name": "replicate",
        "gen_ai.response.id": create.attributes["replicate.prediction.id"],
        "gen_ai.response.time_to_first_chunk": attempt_.attributes["gen_ai.response.time_to_first_chunk"],
        "http.request.body.size": 0,
        "http.request.method": "GET",
        "http.response.body.size": request.attributes["http.response.body.size"],
        "http.response.status_code": 200,
        "replicate_proxy.stream.complete": True,
        "replicate_proxy.stream.events": 5,
        "server.address": "127.0.0.1",
        "server.port": httpx.URL(stage.fake.streams_url).port,
    }
    assert _of(run, "replicate_proxy.lifecycle.observed_by", "replicate_proxy.lifecycle.origin") == ["stream", "store"]
    assert _of(run, "replicate.prediction.run_time", "replicate.model.name") == [None, LLAMA]
    assert create.start < run.start <= run.end <= request.end
    opaque = stage.fake.stream_requests[0].target.rpartition(b"/")[2]
    assert not any(opaque in raw for raw in stage.sink.raw)


async def test_a_poll_soon_after_the_stream_tells_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 1.5)
    app, content = stage.streaming(), {"input": {"prompt": "Ada"}}
    created = await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", content)
    stage.fake.clock.advance(QUEUE + RUN)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope(target=stream_of(created)))
        while not caller.complete:  # noqa: ASYNC110 - the caller has no event for it
            await anyio.sleep(0.01)
        assert await stage.poll(app, id_of(created)) == "succeeded"
    await app.aclose()
    assert _of(stage.run, "replicate_proxy.lifecycle.observed_by", "replicate.prediction.run_time") == ["poll", RUN]
    [terminal] = stage.points("replicate.prediction.terminal")
    assert terminal.value == 1
    # The stream's own span did not wait for that.
    assert stage.requests[1].end < stage.requests[2].end


async def test_a_stream_of_which_nothing_is_known(stage: Stage) -> None:
    content = {"input": {"prompt": "Ada"}}
    created = await stage.ask(stage.streaming(), "POST", f"/v1/models/{LLAMA}/predictions", content)
    stage.fake.clock.advance(QUEUE + RUN)
    await stage.ask(stage.streaming(), "GET", stream_of(created))
    stream, run = stage.requests[1], stage.run
    assert (stream.links, run.parent_id, run.name) == ([], stream.span_id, "generate_content")
    assert _of(run, "replicate_proxy.lifecycle.origin", "replicate_proxy.lifecycle.polls") == ["observed", None]
    assert run.start == run.end
    assert stage.points("replicate.prediction.terminal") == []


async def test_a_stream_that_is_over_too_early(stage: Stage) -> None:
    app = stage.streaming()
    created = await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", {"input": {"prompt": "Ada"}})
    stage.fake.clock.advance(QUEUE + RUN / 2)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope(target=stream_of(created)))
        await caller.got_chunk.wait()
        caller.left.set()
    await app.aclose()
    [_, attempt_], [_, request] = stage.attempts, stage.requests
    assert (attempt_.status, request.status) == ("UNSET", "UNSET")
    assert attempt_.attributes["replicate_proxy.stream.complete"] is False
    assert _of(request, "replicate_proxy.outcome", "error.type") == ["client_disconnected", None]
    assert stage.runs == []


async def test_a_webhook(stage: Stage) -> None:
    await scenarios.delivered(stage)
    hook = f"POST /v1/-/webhooks SERVER -> {CREATE}"
    assert tree(stage.sink.wait(5)) == (
        f"{CREATE} SERVER\n  {CREATE} CLIENT\n  generate_content {HELLO} CLIENT\n{hook}\n{hook}"
    )
    _, begun, ended = stage.requests
    found = ("replicate_proxy.outcome", "http.response.status_code", "replicate.prediction.status")
    assert [_of(span, *found) for span in (begun, ended)] == [
        ["answered", 204, "processing"],
        ["answered", 204, "succeeded"],
    ]
    found = ("replicate_proxy.lifecycle.observed_by", "replicate_proxy.lifecycle.polls", "replicate_proxy.tenant")
    assert _of(stage.run, *found) == ["webhook", 0, "team-a"]
    assert SAID.items() <= stage.run.attributes.items()
    assert stage.run.attributes["replicate.prediction.queue_time"] == QUEUE
    [terminal] = stage.points("replicate.prediction.terminal")
    assert terminal.attributes["replicate_proxy.lifecycle.observed_by"] == "webhook"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_webhook_and_a_create_that_waits_tell_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 1.5)
    with scenarios.stage(queue_time=0.1, run_time=0.1) as stage:
        app = stage.proxy(options={"webhook_secrets": [stage.fake.webhook_secret]})
        with serve(app) as served:
            hook = {"webhook": f"{served.url}/v1/-/webhooks", "webhook_events_filter": ["completed"]}
            content = {"version": HELLO_WORLD, "input": {"text": "Ada"}, **hook}
            created = await stage.ask(app, "POST", "/v1/predictions", content, (b"prefer", b"wait"))
            assert told(created)["status"] == "succeeded"
            stage.sink.wait(5, seconds=1.7)
        assert sorted(span.name for span in stage.requests) == ["POST /v1/-/webhooks", CREATE]
        assert stage.run.attributes["replicate_proxy.lifecycle.origin"] == "store"


async def test_a_time_that_otlp_cannot_hold_spoils_no_export(stage: Stage, upstream: RawUpstream) -> None:
    times = {"created_at": "2026-01-01T00:00:00Z", "started_at": "9999-01-01T00:00:00Z"}
    shown = {"id": "p1", "status": "succeeded", **times, "completed_at": "9999-01-01T00:00:01Z"}
    upstream.script = answers(json.dumps(shown).encode())
    await stage.ask(stage.proxy(upstream.url), "GET", "/v1/predictions/p1")
    assert len(stage.sink.spans) == 3


async def test_what_is_refused(stage: Stage) -> None:
    await scenarios.refused(stage)
    assert tree(stage.sink.spans) == "\n".join(
        (
            "GET /v1/{path} SERVER",
            "GET /v1/account SERVER",
            "GET /v1/{path} SERVER",
            f"{CREATE} SERVER",
            *(f"{CREATE} SERVER\n  {CREATE} CLIENT ERROR {status}" for status in (401, 422, 429)),
            f"{CREATE} SERVER ERROR 503\n  {CREATE} CLIENT ERROR 503",
        )
    )
    found = ("replicate_proxy.outcome", "http.response.status_code", "error.type")
    assert [_of(span, *found) for span in stage.requests] == [
        ["auth_missing", 401, "key_missing"],
        ["auth_invalid", 401, "key_unknown"],
        ["bad_request", 400, "bad_request"],
        ["denied", 403, "permission_denied"],
        ["forwarded", 401, None],
        ["forwarded", 422, None],
        ["forwarded", 429, None],
        ["forwarded", 503, "503"],
    ]
    tenants = {
        span.attributes["replicate_proxy.outcome"]: span.attributes.get("replicate_proxy.tenant")
        for span in stage.requests
    }
    assert tenants == {
        "auth_missing": None,
        "auth_invalid": None,
        "bad_request": None,
        "denied": "team-a",
        "forwarded": "team-a",
    }
    assert {span.description for span in stage.sink.spans} == {""}
    errors = [point.attributes for point in stage.points("gen_ai.client.operation.duration")]
    assert [labels.get("error.type") for labels in errors] == ["401", "422", "429", "503"]
    assert not any("gen_ai.response.model" in labels for labels in errors)
    server = [point.attributes.get("error.type") for point in stage.points("http.server.request.duration")]
    assert server == ["key_missing", "key_unknown", "bad_request", "permission_denied", None, None, None, "503"]


async def test_more_than_a_tenant_may_have_at_a_time(stage: Stage) -> None:
    keys = {"pk-team-a": ReplicateKey(TOKEN, tenant="team-a", policy=Policy(max_in_flight=1))}
    app, caller = stage.proxy(key_resolver=MappingKeyResolver(keys)), Caller([b'{"input": {"prompt": "a"}}'])
    async with anyio.create_task_group() as tasks:
        scope = http_scope("POST", f"/v1/models/{LLAMA}/predictions", [KEY, (b"prefer", b"wait")])
        tasks.start_soon(caller.call, app, scope)
        while not stage.fake.requests:  # noqa: ASYNC110 - another thread serves
            await anyio.sleep(0.01)
        in_flight = [point.value for point in stage.points("replicate_proxy.in_flight")]
        assert (await Caller().call(app, http_scope(target="/v1/account"))).status == 429
        while not caller.complete:
            stage.fake.clock.advance(QUEUE + RUN)
            await anyio.sleep(0.01)
    await app.aclose()
    assert in_flight == [1]
    assert [point.value for point in stage.points("replicate_proxy.in_flight")] == [0, 0]
    limited = stage.requests[1]
    found = ("replicate_proxy.outcome", "http.response.status_code", "error.type")
    assert (_of(limited, *found), limited.status) == (["limited", 429, "limit_exceeded"], "UNSET")


async def test_the_caller_s_own_time_limit(stage: Stage) -> None:
    headers = (b"prefer", b"wait"), (b"x-portkey-request-timeout", b"300")
    caller = await stage.ask(
        stage.proxy(), "POST", f"/v1/models/{LLAMA}/predictions", {"input": {"prompt": "a"}}, *headers
    )
    assert caller.status == 408
    assert tree(stage.sink.spans) == f"{OFFICIAL} SERVER\n  {OFFICIAL} CLIENT"
    found = ("replicate_proxy.outcome", "http.response.status_code", "error.type")
    assert _of(stage.requests[0], *found) == ["upstream_timeout", 408, "request_timeout"]
    assert _of(stage.attempts[0], *found) == [None, None, None]


async def test_an_upstream_that_is_not_there(stage: Stage) -> None:
    await scenarios.unreachable(stage)
    error = "ERROR upstream_unreachable"
    assert tree(stage.sink.spans) == f"{CREATE} SERVER {error}\n  {CREATE} CLIENT {error}"
    found = ("replicate_proxy.outcome", "http.response.status_code", "http.response.body.size")
    assert _of(stage.requests[0], *found[:2]) == ["upstream_error", 502]
    assert _of(stage.attempts[0], *found) == [None, None, None]
    [point] = stage.points("http.client.request.duration")
    assert (point.attributes["error.type"], point.count) == ("upstream_unreachable", 1)
    assert "http.response.status_code" not in point.attributes


@pytest.mark.parametrize("within", [False, True])
async def test_a_caller_who_leaves(stage: Stage, upstream: RawUpstream, within: bool) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        if within:
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    caller, store = Caller(), MemoryPredictionStore()
    app = stage.proxy(upstream.url, store=store)
    # What creates a prediction is held until it is whole.
    method, path = ("GET", "/v1/account") if within else ("POST", "/v1/predictions")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope(method, path))
        await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        if within:
            await caller.got_chunk.wait()
        caller.left.set()
    await app.aclose()
    assert tree(stage.sink.spans) == f"{method} {path} SERVER\n  {method} {path} CLIENT"
    [request], [attempt_] = stage.requests, stage.attempts
    status = 200 if within else None
    found = ("replicate_proxy.outcome", "http.response.status_code", "error.type")
    assert _of(request, *found) == ["client_disconnected", status, None]
    assert _of(attempt_, *found) == [None, status, None]
    assert len(store) == 0


async def test_a_restart_between_create_and_polls(stage: Stage) -> None:
    await scenarios.restarted(stage)
    assert tree(stage.sink.spans) == (
        f"{CREATE} SERVER\n  {CREATE} CLIENT\n"
        f"{POLL} SERVER\n  generate_content {HELLO} CLIENT\n  {POLL} CLIENT\n{POLL} SERVER\n  {POLL} CLIENT"
    )
    run, poll = stage.run, stage.requests[1]
    assert (run.parent_id, run.parent_is_remote) == (poll.span_id, False)
    found = ("replicate_proxy.lifecycle.origin", "replicate_proxy.lifecycle.polls", "replicate_proxy.tenant")
    assert _of(run, *found) == ["observed", None, "team-a"]
    assert run.attributes["portkey.trace_id"] == "poller"
    assert not [name for name in stage.sink.metrics if name.startswith("replicate.prediction.")]
    assert not [name for name in stage.sink.metrics if name.startswith("replicate_proxy.prediction.")]
    assert "generate_content" not in str(stage.points("gen_ai.client.operation.duration"))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_two_processes_with_a_redis(stage: Stage, redis_service: RedisServer) -> None:
    prefix = f"{uuid.uuid4()}:"
    async with Redis.from_url(redis_service.url) as one, Redis.from_url(redis_service.url) as two:
        a, b = (stage.proxy(store=RedisPredictionStore(client, prefix=prefix)) for client in (one, two))
        id = await stage.create(a, *CALLER)
        await stage.poll(b, id)
        await stage.poll(a, id)
        stage.fake.clock.advance(QUEUE + RUN)
        async with anyio.create_task_group() as tasks:
            for app in (a, b) * 5:
                tasks.start_soon(Caller().call, app, http_scope(target=f"/v1/predictions/{id}"))
        for app in (a, b):
            await app.aclose()
    run, create = stage.run, stage.requests[0]
    assert (run.trace_id, run.parent_id) == (create.trace_id, create.span_id)
    assert {link for span in stage.requests[1:] for link in span.links} == {(create.trace_id, create.span_id)}
    assert _of(run, "replicate_proxy.lifecycle.origin", "portkey.trace_id") == ["store", "order-42"]
    assert 3 <= run.attributes["replicate_proxy.lifecycle.polls"] <= 12
    transitions = [span for span in stage.requests if "replicate_proxy.lifecycle.transition" in span.attributes]
    assert len(transitions) == 1
    assert [point.value for point in stage.points("replicate.prediction.terminal")] == [1]


@contextmanager
def _process(upstream: str, redis: str, collector: str) -> Iterator[str]:
    """A uvicorn of its own with the proxy; yields its URL once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "tests.telemetry.scenarios:application", "--factory"]
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        **{"UPSTREAM": upstream, "REDIS": redis, "NO_PROXY": "127.0.0.1"},
        **{"OTEL_EXPORTER_OTLP_ENDPOINT": collector, "OTEL_SERVICE_NAME": str(port)},
        **{"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_METRIC_EXPORT_INTERVAL": "50"},
    }
    process = subprocess.Popen(
        [*command, "--port", str(port), "--log-level", "warning"],
        env=environ,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_two_servers_with_a_redis(stage: Stage, redis_service: RedisServer) -> None:
    key = {"x-portkey-api-key": "pk-team-a"}
    environ = stage.fake.url, redis_service.url, stage.sink.url
    with ExitStack() as processes:
        processes_ = [_process(*environ) for _ in "ab"]
        a, b = (processes.enter_context(one) for one in processes_)
        async with httpx.AsyncClient(headers=key, trust_env=False, timeout=10) as client:
            content = {"version": HELLO_WORLD, "input": {"text": "Ada"}}
            answer = await client.post(f"{a}/v1/predictions", json=content, headers=dict(_text(CALLER)))
            id = answer.json()["id"]
            stage.sink.wait(2)  # and with them its record, which polls may overtake
            stage.fake.clock.advance(QUEUE + RUN)
            async with anyio.create_task_group() as tasks:
                for url in (a, b) * 2:
                    tasks.start_soon(client.get, f"{url}/v1/predictions/{id}")
        stage.sink.wait(11)
        deadline = time.monotonic() + 10
        while not stage.points("replicate.prediction.terminal") and time.monotonic() < deadline:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    processes_of = [span.resource["service.name"] for span in stage.requests]
    assert sorted({*processes_of}) == sorted(url.rpartition(":")[2] for url in (a, b))
    run, create = stage.run, stage.requests[0]
    assert (run.trace_id, run.parent_id) == (create.trace_id, create.span_id)
    assert [span.links for span in stage.requests[1:]] == [[(create.trace_id, create.span_id)]] * 4
    assert run.attributes["portkey.trace_id"] == "order-42"
    assert [point.value for point in stage.points("replicate.prediction.terminal")] == [1]


def _text(headers: Collection[tuple[bytes, bytes]]) -> Iterator[tuple[str, str]]:
    return ((name.decode(), value.decode()) for name, value in headers)


async def test_head_of_a_prediction_is_no_poll(stage: Stage) -> None:
    app = stage.proxy()
    id = await stage.create(app)
    stage.fake.clock.advance(QUEUE + RUN)
    # FakeReplicate has no HEAD; what Replicate answers does not matter here.
    assert (await stage.ask(app, "HEAD", f"/v1/predictions/{id}")).content == b""
    create, head = stage.requests
    assert (head.name, head.links) == (f"HEAD {POLL[4:]}", [(create.trace_id, create.span_id)])
    assert stage.runs == []
    await stage.poll(app, id)
    assert stage.run.attributes["replicate_proxy.lifecycle.polls"] == 1


async def test_a_second_attempt(stage: Stage) -> None:
    await scenarios.resent(stage)
    account = "GET /v1/account"
    assert tree(stage.sink.spans) == f"{account} SERVER\n  {account} CLIENT ERROR 503\n  {account} CLIENT"
    assert [_of(span, "http.request.resend_count") for span in stage.attempts] == [[None], [1]]
    assert _values(stage.points("replicate_proxy.upstream.retries")) == [({"replicate_proxy.retry.reason": "503"}, 1)]
    assert sum(point.count for point in stage.points("http.client.request.duration")) == 2
    assert sum(point.count for point in stage.points("replicate_proxy.request.duration")) == 1


async def test_a_poll_that_is_sent_twice_is_one(stage: Stage) -> None:
    app = stage.proxy(options={"safe_retries": 2})
    id = await stage.create(app)
    stage.fake.fail(503, operation="predictions.get", retry_after=0, times=2)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    assert len(stage.attempts) == 4
    assert stage.run.attributes["replicate_proxy.lifecycle.polls"] == 1


async def test_what_layers_answer(stage: Stage) -> None:
    await scenarios.layered(stage)
    denied, create, miss, hit, *polls = stage.requests
    verdict = "replicate_proxy.guardrail.verdict", "replicate_proxy.guardrail.check", "replicate_proxy.outcome"
    assert _of(denied, *verdict) == ["deny", "no birds", "denied"]
    assert _of(create, *verdict) == ["allow", None, "forwarded"]
    cached = "replicate_proxy.cache.status", "replicate_proxy.outcome"
    assert [_of(read, *cached) for read in (miss, hit)] == [["MISS", "forwarded"], ["HIT", "answered"]]
    asked = [attempt.parent_id for attempt in stage.attempts]
    [beginner] = [poll for poll in polls if poll.span_id in asked]
    joined = [poll for poll in polls if poll is not beginner]
    at_create = create.trace_id, create.span_id
    assert beginner.links == [at_create]
    for poll in joined:
        assert _of(poll, "replicate_proxy.coalesced", "replicate_proxy.outcome") == [True, "answered"]
        assert sorted(poll.links) == sorted([(beginner.trace_id, beginner.span_id), at_create])
    assert len(stage.attempts) == 3
    # Of three who read it, each counts, up to the first who tells the end.
    assert 1 <= stage.run.attributes["replicate_proxy.lifecycle.polls"] <= 3


async def test_own_predictions(stage: Stage) -> None:
    store = MemoryPredictionStore()
    keys = {
        f"pk-team-{name}": ReplicateKey(TOKEN, tenant=f"team-{name}", policy=Policy(own_predictions=True))
        for name in "ab"
    }
    app = stage.proxy(store=store, key_resolver=MappingKeyResolver(keys))
    id = await stage.create(app, *CALLER)
    await stage.ask(app, "GET", f"/v1/predictions/{id}", who=(b"x-portkey-api-key", b"pk-team-b"))
    await stage.poll(app, id, seconds=QUEUE + RUN)
    create, denied, _ = stage.requests
    found = ("replicate_proxy.outcome", "http.response.status_code", "replicate_proxy.tenant")
    assert _of(denied, *found) == ["denied", 404, "team-b"]
    assert denied.links == []
    found = ("replicate_proxy.tenant", "replicate_proxy.lifecycle.polls", "portkey.trace_id")
    assert (_of(stage.run, *found), stage.run.parent_id) == (["team-a", 1, "order-42"], create.span_id)
    assert len(store) == 1


async def test_what_could_not_be_recorded_at_once_is_told_all_the_same(stage: Stage) -> None:
    await scenarios.not_recorded(stage)
    assert tree(stage.sink.spans) == _created_and_polled(CREATE, f"generate_content {HELLO}")
    assert [span.attributes.get("replicate_proxy.store.failed") for span in stage.requests] == [True, None]


async def test_below_a_span_of_the_host_ours_is_internal(stage: Stage) -> None:
    await scenarios.below_a_host(stage)
    assert tree(stage.sink.spans) == "GET SERVER\n  GET /v1/account INTERNAL\n    GET /v1/account CLIENT"
    assert stage.points("http.server.request.duration") == []
    assert [point.count for point in stage.points("replicate_proxy.request.duration")] == [1]


TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (b"traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01".encode())


@pytest.mark.parametrize("trust", ["parent", "link", "ignore"])
async def test_the_caller_s_own_trace(stage: Stage, trust: str) -> None:
    app = stage.proxy(options={"trust_traceparent": trust})
    id = await stage.create(app, TRACEPARENT, (b"tracestate", b"a=b"))
    await stage.poll(app, id, TRACEPARENT, seconds=QUEUE + RUN)
    create, poll = stage.requests
    to_create, to_caller = (create.trace_id, create.span_id), (TRACE_ID, SPAN_ID)
    assert [span.parent_id for span in (create, poll)] == [SPAN_ID if trust == "parent" else None] * 2
    assert (create.trace_id == TRACE_ID) is (trust == "parent")
    assert create.links == [to_caller] * (trust == "link")
    assert poll.links == [to_caller] * (trust == "link") + [to_create]
    assert (stage.run.trace_id, stage.run.parent_id) == to_create
    assert [request.header("traceparent") for request in stage.fake.requests] == [None, None]


@pytest.mark.parametrize("propagate", [False, True])
async def test_what_replicate_is_told_of_the_trace(stage: Stage, propagate: bool) -> None:
    app = stage.proxy(options={"propagate_upstream": propagate})
    carried = (b"tracestate", b"a=b"), (b"baggage", b"c=d")
    await stage.create(app, TRACEPARENT, *carried)
    [received], [attempt_] = stage.fake.requests, stage.attempts
    own = f"00-{attempt_.trace_id}-{attempt_.span_id}-01"
    assert [received.header(name) for name in ("traceparent", "tracestate", "baggage")] == [
        own if propagate else None,
        None,
        None,
    ]


async def test_streams_are_never_told_of_the_trace(stage: Stage) -> None:
    app = stage.streaming()
    created = await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", {"input": {"prompt": "Ada"}})
    stage.fake.clock.advance(QUEUE + RUN)
    await stage.ask(app, "GET", stream_of(created), None, TRACEPARENT)
    assert [request.header("traceparent") for request in stage.fake.stream_requests] == [None]


@pytest.mark.parametrize(
    ("mode", "on_span", "on_event"),
    [
        ("SPAN_ONLY", True, False),
        ("EVENT_ONLY", False, True),
        ("SPAN_AND_EVENT", True, True),
        ("NO_CONTENT", False, False),
        (None, False, False),
    ],
)
async def test_content(stage: Stage, mode: str | None, on_span: bool, on_event: bool) -> None:
    app = stage.proxy(options={"capture_content": mode})
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    run = stage.run
    shown = {"replicate.input": '{"text":"Ada","prompt":"Ada Lovelace"}', "replicate.output": '"hello Ada"'}
    assert {name: value for name, value in run.attributes.items() if name in shown} == (shown if on_span else {})
    events = [(name, at, attributes) for name, at, attributes in run.events if name != "replicate.started"]
    assert events == ([("replicate.content", run.end, shown)] if on_event else [])
    assert any(b"Lovelace" in raw for raw in stage.sink.raw) is (on_span or on_event)


@pytest.mark.parametrize("on", ["create", "poll"])
async def test_a_caller_may_forbid_it(stage: Stage, on: str) -> None:
    app, header = stage.proxy(options={"capture_content": True}), (b"x-portkey-debug", b"false")
    id = await stage.create(app, *[header] * (on == "create"))
    await stage.poll(app, id, *[header] * (on == "poll"), seconds=QUEUE + RUN)
    assert "replicate.output" not in stage.run.attributes
    assert not any(b"Lovelace" in raw for raw in stage.sink.raw)


async def test_content_of_a_create_that_nobody_knows(stage: Stage) -> None:
    id = await stage.create(stage.proxy(), (b"x-portkey-debug", b"false"))
    await stage.poll(stage.proxy(options={"capture_content": True}), id, seconds=QUEUE + RUN)
    assert "replicate.output" not in stage.run.attributes


async def test_the_host_s_say_in_it(stage: Stage) -> None:
    def redact(path: tuple[str | int, ...], value: object) -> object:
        return "someone" if path[-1:] == ("prompt",) else value

    app = stage.proxy(options={"capture_content": True}, redact=redact)
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    assert stage.run.attributes["replicate.input"] == '{"text":"Ada","prompt":"someone"}'


async def test_prices_of_a_callable(stage: Stage) -> None:
    asked: list[PriceRequest] = []

    async def prices(request: PriceRequest) -> Rates | None:
        asked.append(request)
        return Rates(per_output=3.0, currency="EUR")

    app = stage.proxy(prices=prices)
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    assert asked == [PriceRequest(model=HELLO, version=HELLO_WORLD, tenant="team-a", status="succeeded")]
    found = ("replicate.prediction.cost", "replicate.prediction.cost.currency", "replicate.prediction.cost.basis")
    assert _of(stage.run, *found) == [3.0, "EUR", "per_output"]
    [cost] = stage.points("replicate.prediction.cost")
    assert (cost.value, cost.attributes["replicate.prediction.cost.currency"]) == (3.0, "EUR")


async def test_a_tenant_that_goes_by_its_key_is_not_named(stage: Stage) -> None:
    keys = {"pk-team-a": ReplicateKey(TOKEN, tenant="pk-team-a")}
    app = stage.proxy(key_resolver=MappingKeyResolver(keys), prices=scenarios.PRICES)
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    [cost] = stage.points("replicate.prediction.cost")
    assert cost.attributes["replicate_proxy.tenant"] == "REDACTED"
    assert not any(b"pk-team-a" in raw for raw in stage.sink.raw)


@pytest.mark.parametrize("raises", [False, True])
async def test_prices_that_are_not_known(stage: Stage, raises: bool) -> None:
    async def prices(request: PriceRequest) -> Rates | None:
        if raises:
            raise OSError("hunter2")
        return None

    app = stage.proxy(prices=prices)
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    assert not [name for name in stage.run.attributes if "cost" in name]
    assert stage.points("replicate.prediction.cost") == []
    assert [point.value for point in stage.points("replicate.prediction.terminal")] == [1]


async def test_without_an_sdk_nothing_is_parsed_and_nothing_kept(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: object, **__: object) -> Any:
        raise AssertionError("nobody wants to know")

    monkeypatch.setattr(attempt, "read", unwanted)
    monkeypatch.setattr(attempt, "plain_of", unwanted)
    monkeypatch.setattr(attempt, "EventScanner", unwanted, raising=False)
    store = MemoryPredictionStore()
    app = stage.streaming(store=store, tracer_provider=None, meter_provider=None)
    content = {"input": {"prompt": "Ada"}}
    created = await stage.ask(app, "POST", f"/v1/models/{LLAMA}/predictions", content)
    stage.fake.clock.advance(QUEUE + RUN)
    await stage.ask(app, "GET", stream_of(created))
    assert await stage.poll(app, id_of(created)) == "succeeded"
    assert len(store) == 0
    assert stage.sink.spans == []
    assert stage.sink.metrics == {}


async def test_with_spans_alone(stage: Stage) -> None:
    app = stage.proxy(meter_provider=None)
    id = await stage.create(app)
    await stage.poll(app, id, seconds=QUEUE + RUN)
    assert tree(stage.sink.spans) == _created_and_polled(CREATE, f"generate_content {HELLO}")
    assert stage.sink.metrics == {}


@pytest.mark.parametrize(
    "tracer_provider", [None, TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)], ids=["none", "unsampled"]
)
async def test_with_metrics_alone(stage: Stage, tracer_provider: TracerProvider | None) -> None:
    app = stage.proxy(tracer_provider=tracer_provider, prices=scenarios.PRICES)
    id = await stage.create(app)
    assert await stage.poll(app, id, seconds=QUEUE + RUN) == "succeeded"
    await stage.poll(app, id)
    assert stage.sink.spans == []
    assert [point.value for point in stage.points("replicate.prediction.terminal")] == [1]
    assert [point.value for point in stage.points("replicate.prediction.cost")] == [2.0]
    assert [point.sum for point in stage.points("replicate_proxy.prediction.polls")] == [1]


class Broken(Switched):
    """A store of which nothing comes."""

    def __init__(self, how: Callable[[str], Any]) -> None:
        super().__init__()
        self.before_put = self.before_get = how

    async def claim(self, id: str, /) -> StoredPrediction | None:
        await self.before_get(id)
        return await super().claim(id)


@pytest.mark.parametrize("how", [refuses, hangs])
async def test_a_store_that_is_out_of_order(
    stage: Stage, how: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = stage.proxy(store=Broken(how), options={"store_timeout": 0.05})
    with caplog.at_level(logging.ERROR, "replicate_proxy_mw"):
        id = await stage.create(app)
        for _ in range(2):
            assert await stage.poll(app, id, seconds=QUEUE + RUN) == "succeeded"
    assert len(stage.requests) == 3
    assert [span.status for span in stage.requests] == ["UNSET"] * 3
    assert stage.run.attributes["replicate_proxy.lifecycle.origin"] == "observed"
    assert stage.points("replicate.prediction.terminal") == []
    assert {record.message for record in caplog.records} == {
        f"prediction store failed: {'OSError' if how is refuses else 'TimeoutError'}"
    }


async def test_a_store_that_hangs_holds_up_no_answer(stage: Stage) -> None:
    release, asked = anyio.Event(), anyio.Event()

    async def waits(id: str) -> None:
        asked.set()
        await release.wait()

    app = stage.proxy(store=Broken(waits), options={"store_timeout": 60.0})
    caller = Caller([json.dumps({"version": HELLO_WORLD, "input": {"text": "Ada"}}).encode()])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions"))
        await asked.wait()
        assert caller.complete
        assert [kind(span) for span in stage.sink.spans] == ["attempt"]
        release.set()
    await app.aclose()
    assert [span.status for span in stage.requests] == ["UNSET"]


async def test_more_models_than_are_told_apart(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_MODELS", 2)
    app = stage.proxy()
    for number in range(4):
        model = FakeModel(owner="acme", name=f"model-{number}", run=lambda _: "x")
        stage.fake.add_model(model)
        [version] = model.versions or ()
        id = await stage.create(app, version=version.id)
        await stage.poll(app, id, seconds=QUEUE + RUN)
    told_apart = {
        name: {
            label: [*dict.fromkeys(point.attributes[label] for point in points if label in point.attributes)]
            for label in ("replicate.model.name", "gen_ai.response.model")
        }
        for name, points in stage.sink.metrics.items()
    }
    expected = ["acme/model-0", "acme/model-1", "_OTHER"]
    assert told_apart["replicate.prediction.terminal"] == {
        "replicate.model.name": expected,
        "gen_ai.response.model": [],
    }
    assert told_apart["gen_ai.client.operation.duration"]["gen_ai.response.model"] == expected
    assert len(stage.runs) == 4


async def test_nothing_that_was_refused_becomes_a_model(stage: Stage) -> None:
    await stage.ask(stage.proxy(), "POST", "/v1/models/invented/name/predictions", {"input": {}})
    assert "invented" not in str(stage.sink.metrics)


async def test_what_callers_say_stands_on_all_spans(stage: Stage) -> None:
    await scenarios.synchronous(stage)
    for span in stage.sink.spans:
        assert {name: value for name, value in span.attributes.items() if name in SAID} == SAID
    more = {"portkey.provider", "portkey.metadata_json"}
    assert [more <= {*span.attributes} for span in (*stage.requests, *stage.attempts, *stage.runs)] == [
        True,
        False,
        False,
    ]
    assert "order-42" not in str(stage.sink.metrics)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_registry_has_what_is_told_and_no_more(stage: Stage) -> None:
    for scenario in scenarios.SCENARIOS:
        await scenario(stage)
    attributes: dict[str, set[str]] = {}
    events: set[str] = set()
    for span in stage.sink.spans:
        if kind(span) == "host":
            continue
        carried = [*span.attributes, *(name for _, _, of_event in span.events for name in of_event)]
        events.update(name for name, _, _ in span.events)
        assert span.schema_url == names.SCHEMA_URL
        for name in carried:
            assert names.known(name)
            listed = names.PORTKEY_METADATA if name.startswith(names.PORTKEY_METADATA) else name
            attributes.setdefault(listed, set()).add(kind(span))
    labels = {label for points in stage.sink.metrics.values() for point in points for label in point.attributes}
    assert attributes == {name: {*listed.on} for name, listed in names.ATTRIBUTES.items() if listed.on}
    assert {name for name, listed in names.ATTRIBUTES.items() if not listed.on} <= labels
    assert events == {*names.EVENTS}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_registry_has_what_is_counted_and_no_more(stage: Stage) -> None:
    for scenario in scenarios.SCENARIOS:
        await scenario(stage)
    kinds = {"histogram": "histogram", "counter": "counter", "updown": "up/down counter"}
    found = {
        name: (
            {(kinds[point.kind], point.unit, tuple(point.bounds), point.scope) for point in points},
            {label for point in points for label in point.attributes},
        )
        for name, points in stage.sink.metrics.items()
    }
    assert found == {
        name: ({(metric.kind, metric.unit, metric.buckets, "replicate_proxy_mw")}, {*metric.labels})
        for name, metric in names.METRICS.items()
    }
    assert not [label for metric in names.METRICS.values() for label in metric.labels if label not in names.ATTRIBUTES]


def test_marks() -> None:
    """S and D are OpenTelemetry's, C are our own; what is S is stable there, and what is D is not."""
    own = ("replicate.", "replicate_proxy.", "portkey.")
    listed: list[names.Attribute | names.Metric] = [*names.ATTRIBUTES.values(), *names.METRICS.values()]
    assert [one.name for one in listed if (one.mark == "C") is not one.name.startswith(own)] == []
    stable = {
        value
        for package in (semconv_attributes, semconv_metrics)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, str)
    }
    assert {one.name for one in listed if one.mark == "S"} <= stable
    assert not {one.name for one in listed if one.mark == "D"} & stable
