from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from replicate_proxy_mw import ProxyRequest, ReplicateKey
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.portkey import PortkeyContext
from replicate_proxy_mw.routing import match
from replicate_proxy_mw.telemetry import attributes
from replicate_proxy_mw.telemetry.attributes import Attributes, Origin
from replicate_proxy_mw.telemetry.prediction import STATUSES, Prediction
from replicate_proxy_mw.telemetry.prices import Cost
from replicate_proxy_mw.telemetry.scrub import BARE, Scrubber
from tests.raw_asgi import TOKEN, http_scope


def _attempt(method: str, target: str, upstream: str = "https://api.replicate.com/v1", **more: Any) -> Attributes:
    request = ProxyRequest(
        method=method,
        target=target,
        route=match(method, target.partition("?")[0]),
        headers=(),
        body=Chunks([]),
        content_length=0,
        key=ReplicateKey(TOKEN),
        portkey=PortkeyContext(),
        scope={},
        **more,
    )
    return attributes.of_attempt(request, Origin.of(upstream))


def test_a_scope() -> None:
    scope = http_scope(target="/v1/a%2Fb?key=secret", headers=[(b"user-agent", b"x" * 300)])
    assert attributes.of_scope(scope) == {
        "url.scheme": "http",
        "url.path": "/v1/a%2Fb",
        "network.protocol.version": "1.1",
        "server.address": "proxy.test",
        "server.port": 80,
        "client.address": "192.0.2.1",
        "user_agent.original": "x" * 256,
    }


def test_a_scope_of_a_server_that_tells_little() -> None:
    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": []}
    assert attributes.of_scope(scope) == {
        "url.scheme": "http",
        "url.path": "/v1/x",
        "network.protocol.version": "1.1",
    }


def test_a_scope_of_a_unix_socket() -> None:
    scope = http_scope(server=("/run/app.sock", None), client=None)
    assert attributes.of_scope(scope)["server.address"] == "/run/app.sock"
    assert "server.port" not in attributes.of_scope(scope)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nope", {}),
        ("GET", "/account", {"replicate.operation": "account.get"}),
        (
            "POST",
            "/predictions/p1/cancel",
            {"replicate.operation": "predictions.cancel", "replicate.prediction.id": "p1"},
        ),
        ("GET", "/trainings/t1", {"replicate.operation": "trainings.get", "replicate.training.id": "t1"}),
        (
            "GET",
            "/models/o/m/versions/v1",
            {"replicate.operation": "models.versions.get", "replicate.model.version": "v1"},
        ),
        (
            "POST",
            "/deployments/acme/hello/predictions",
            {"replicate.operation": "deployments.predictions.create", "replicate.deployment": "acme/hello"},
        ),
        ("PUT", "/predictions/p1", {"replicate.prediction.id": "p1"}),
    ],
)
def test_a_route(method: str, path: str, expected: dict[str, str]) -> None:
    assert attributes.of_route(match(method, path)) == expected


def test_what_the_caller_says() -> None:
    context = PortkeyContext(
        trace_id="order-42",
        span_id="s",
        parent_span_id="p",
        span_name="n",
        provider="@team",
        metadata={"_user": "u1", "a b.c": "ü"},
    )
    on_all, on_request = attributes.of_caller(context, BARE)
    assert on_all == {
        "portkey.trace_id": "order-42",
        "portkey.span_id": "s",
        "portkey.parent_span_id": "p",
        "portkey.span_name": "n",
        "portkey.metadata._user": "u1",
        "portkey.metadata.a_b_c": "ü",
    }
    assert on_request == {
        "portkey.provider": "@team",
        "portkey.metadata_json": '{"_user":"u1","a b.c":"ü"}',
    }


def test_a_caller_who_says_nothing_or_nothing_that_can_be_read() -> None:
    assert attributes.of_caller(PortkeyContext(), BARE) == ({}, {})
    assert attributes.of_caller(PortkeyContext(metadata_invalid=True), BARE) == ({}, {"portkey.metadata_invalid": True})
    assert attributes.of_caller(PortkeyContext(metadata={}), BARE) == ({}, {"portkey.metadata_json": "{}"})


def test_what_the_caller_says_tells_no_secret_in_any_writing() -> None:
    secret = "pk-se.cret"
    scrub = Scrubber([secret])
    context = PortkeyContext(trace_id=f"a {secret}", span_name=secret, metadata={secret: "x", "k": f"<{secret}>"})
    on_all, on_request = attributes.of_caller(context, scrub)
    assert on_all == {
        "portkey.trace_id": "a REDACTED",
        "portkey.span_name": "REDACTED",
        "portkey.metadata.REDACTED": "x",
        "portkey.metadata.k": "<REDACTED>",
    }
    assert on_request == {"portkey.metadata_json": '{"REDACTED":"x","k":"<REDACTED>"}'}


def test_long_texts_are_cut_and_no_json_is() -> None:
    said = {f"k{number}": "ü" * 250 for number in range(8)}
    _, on_request = attributes.of_caller(PortkeyContext(provider="x" * 300, metadata=said), BARE)
    assert on_request["portkey.provider"] == "x" * 256
    assert json.loads(str(on_request["portkey.metadata_json"])) == said
    _, on_request = attributes.of_caller(PortkeyContext(metadata=said | {"k8": "ü" * 20}), BARE)
    assert on_request == {}


def test_texts_are_scrubbed_unless_they_are_words_of_a_list() -> None:
    scrub = Scrubber(["POST", "acme"])
    told: Attributes = {"http.request.method": "POST", "url.path": "/v1/acme", "server.port": 80, "x": True}
    assert attributes.scrubbed(told, scrub) == told | {"url.path": "/v1/REDACTED"}
    assert told["url.path"] == "/v1/acme"
    assert attributes.scrubbed(told, Scrubber(["hunter2"])) == told


def test_an_attempt_at_a_create() -> None:
    assert _attempt("POST", "/models/meta/llama/predictions") == {
        "http.request.method": "POST",
        "url.full": "https://api.replicate.com/v1/models/meta/llama/predictions",
        "url.template": "/v1/models/{model_owner}/{model_name}/predictions",
        "server.address": "api.replicate.com",
        "server.port": 443,
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "create_prediction",
        "gen_ai.request.model": "meta/llama",
    }


def test_an_attempt_at_a_create_of_a_version_does_not_know_the_model() -> None:
    found = _attempt("POST", "/predictions")
    assert found["gen_ai.operation.name"] == "create_prediction"
    assert "gen_ai.request.model" not in found


def test_an_attempt_at_a_read() -> None:
    found = _attempt("GET", "/predictions/p1", "http://127.0.0.1:81", resend_count=2)
    assert (found["gen_ai.operation.name"], found["gen_ai.response.id"]) == ("fetch_response", "p1")
    assert (found["server.address"], found["server.port"]) == ("127.0.0.1", 81)
    assert found["url.template"] == "/predictions/{prediction_id}"
    assert found["http.request.resend_count"] == 2


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/account"), ("GET", "/nope"), ("POST", "/predictions/p1/cancel"), ("POST", "/files"), ("GET", "/models")],
)
def test_an_attempt_at_something_else(method: str, target: str) -> None:
    assert not any(name.startswith("gen_ai.") for name in _attempt(method, target, "http://localhost"))


def test_a_training_is_nothing_of_the_convention_s() -> None:
    assert "gen_ai.operation.name" not in _attempt("POST", "/models/o/m/versions/v1/trainings")
    assert "gen_ai.operation.name" not in _attempt("GET", "/trainings/t1")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.replicate.com/v1", ("/v1", "api.replicate.com", 443)),
        ("http://localhost", ("", "localhost", 80)),
        ("http://[::1]:8000/a/b", ("/a/b", "::1", 8000)),
    ],
)
def test_where_attempts_go(url: str, expected: tuple[str, str, int]) -> None:
    origin = Origin.of(url)
    assert (origin.url, origin.path, origin.address, origin.port) == (url, *expected)


@pytest.mark.parametrize("id", ["p1", ""])
def test_a_stream_does_not_tell_its_url(id: str) -> None:
    told = attributes.of_stream(host="stream.replicate.com", port=443, prediction_id=id)
    assert told == {
        "http.request.method": "GET",
        "server.address": "stream.replicate.com",
        "server.port": 443,
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "fetch_response",
        **({"gen_ai.response.id": "p1"} if id else {}),
    }


LITTLE = Prediction(id="p1", status="starting")
MUCH = Prediction(
    id="p1",
    status="succeeded",
    model="a/b",
    version="v1",
    deployment="c/d",
    created_at=1.0,
    started_at=3.0,
    completed_at=9.0,
    run_time=5.5,
    input_tokens=0,
    output_tokens=7,
    input="a",
    output="b",
)


def test_what_an_answer_tells() -> None:
    assert attributes.of_fetched(LITTLE) == {"gen_ai.response.id": "p1", "gen_ai.response.status": "queued"}
    assert attributes.of_fetched(MUCH) == {
        "gen_ai.response.id": "p1",
        "gen_ai.response.status": "completed",
        "gen_ai.response.model": "a/b",
    }
    assert attributes.of_fetched(replace(MUCH, kind="training")) == {}


def test_every_status_has_its_word() -> None:
    words = {
        status: attributes.of_fetched(replace(LITTLE, status=status))["gen_ai.response.status"] for status in STATUSES
    }
    assert words == {
        "starting": "queued",
        "processing": "in_progress",
        "succeeded": "completed",
        "failed": "failed",
        "canceled": "cancelled",
        "aborted": "cancelled",
    }


def test_which_prediction_it_is_about() -> None:
    assert attributes.of_prediction(LITTLE) == {
        "replicate.prediction.id": "p1",
        "replicate.prediction.status": "starting",
    }
    of_training = attributes.of_prediction(replace(MUCH, kind="training"))
    assert of_training == {
        "replicate.training.id": "p1",
        "replicate.prediction.status": "succeeded",
        "replicate.model.name": "a/b",
        "replicate.model.version": "v1",
        "replicate.deployment": "c/d",
    }


def test_a_run() -> None:
    found = attributes.of_run(MUCH, Cost(amount=0.5, currency="EUR", basis="per_run"))
    assert found == attributes.of_prediction(MUCH) | attributes.of_fetched(MUCH) | {
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "generate_content",
        "gen_ai.request.model": "a/b",
        "gen_ai.usage.input_tokens": 0,
        "gen_ai.usage.output_tokens": 7,
        "replicate.prediction.queue_time": 2.0,
        "replicate.prediction.run_time": 5.5,
        "replicate.prediction.total_time": 8.0,
        "replicate.prediction.cost": 0.5,
        "replicate.prediction.cost.currency": "EUR",
        "replicate.prediction.cost.basis": "per_run",
    }


def test_a_run_of_which_little_is_known() -> None:
    found = attributes.of_run(LITTLE, None)
    assert found == attributes.of_prediction(LITTLE) | attributes.of_fetched(LITTLE) | {
        "gen_ai.provider.name": "replicate",
        "gen_ai.operation.name": "generate_content",
    }


def test_the_run_of_a_training_is_nothing_of_the_convention_s() -> None:
    found = attributes.of_run(replace(MUCH, kind="training", input_tokens=None, output_tokens=None), None)
    assert not [name for name in found if name.startswith("gen_ai.")]
    assert found["replicate.prediction.run_time"] == 5.5


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/predictions", "/predictions"),
        ("/predictions?cursor=abc&source=web", "/predictions?cursor=abc&source=web"),
        ("/files/f/download?expiry=1&signature=s", "/files/f/download?expiry=REDACTED&signature=REDACTED"),
        ("/search?query=secret+plan&limit=5&flag", "/search?query=REDACTED&limit=5&REDACTED"),
        ("/x?", "/x?"),
        ("/x?pk-team-a", "/x?REDACTED"),
    ],
)
def test_a_query_tells_no_secret(target: str, shown: str) -> None:
    assert attributes.redacted(target) == shown


def test_invented_methods_are_one() -> None:
    assert (attributes.method("FOO"), attributes.span_name("FOO", "/v1/{path}")) == ("_OTHER", "HTTP /v1/{path}")
    assert (attributes.method("QUERY"), attributes.span_name("QUERY", "/v1/models")) == ("QUERY", "QUERY /v1/models")
