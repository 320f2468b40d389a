"""Every name that a span or metric of ours carries, with its standing, and where it stands.

S: stable OpenTelemetry semantic convention (schema 1.44.0). D: convention still in Development. C: our own namespace:
`replicate.*` comes from Replicate's API, `replicate_proxy.*` is about the proxy, `portkey.*` from the caller's headers.
The reference in `docs/telemetry.md` is made from this module.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

Mark = Literal["S", "D", "C"]
Kind = Literal["histogram", "counter", "up/down counter"]


class Attribute(NamedTuple):
    """`on`: the spans that may carry it, of `request`, `attempt` and `run`; none where it is a label alone."""

    name: str
    mark: Mark
    on: tuple[str, ...]
    meaning: str


class Metric(NamedTuple):
    """`buckets` are upper bounds in `unit`; only histograms have some."""

    name: str
    mark: Mark
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


ATTRIBUTES: dict[str, Attribute] = {}
METRICS: dict[str, Metric] = {}


def _name(name: str, mark: Mark, on: str, meaning: str) -> str:
    ATTRIBUTES[name] = Attribute(name, mark, tuple(on.split()), meaning)
    return name


HTTP_REQUEST_METHOD = _name(
    "http.request.method", "S", "request attempt", "`_OTHER` for methods that HTTP does not have"
)
HTTP_REQUEST_RESEND_COUNT = _name("http.request.resend_count", "S", "attempt", "from the second attempt on")
HTTP_RESPONSE_STATUS_CODE = _name("http.response.status_code", "S", "request attempt", "what went out; what came back")
HTTP_ROUTE = _name(
    "http.route",
    "S",
    "request",
    "the prefix, and the path template of Replicate's API or `/{path}`; `/-/streams/{token}` and `/-/webhooks`",
)
URL_SCHEME = _name("url.scheme", "S", "request", "as the server tells it")
URL_PATH = _name("url.path", "S", "request", "as it came; the route where the path is a secret")
URL_FULL = _name("url.full", "S", "attempt", "query values that are not known to be harmless are `REDACTED`")
NETWORK_PROTOCOL_VERSION = _name("network.protocol.version", "S", "request", "of HTTP, between caller and server")
SERVER_ADDRESS = _name("server.address", "S", "request attempt", "where the caller came to; where the attempt went")
SERVER_PORT = _name("server.port", "S", "request attempt", "its port")
CLIENT_ADDRESS = _name("client.address", "S", "request", "the caller's, as the server tells it")
USER_AGENT_ORIGINAL = _name("user_agent.original", "S", "request", "at most 256 characters")
ERROR_TYPE = _name(
    "error.type",
    "S",
    "request attempt run",
    "a status code, a code of the proxy's own errors, `host_error`, `cancelled`, `prediction_failed` or "
    "`deadline_exceeded`",
)

URL_TEMPLATE = _name("url.template", "D", "attempt", "the path template of Replicate's API, below that of `upstream`")
HTTP_REQUEST_BODY_SIZE = _name("http.request.body.size", "D", "request attempt", "bytes, counted")
HTTP_RESPONSE_BODY_SIZE = _name("http.response.body.size", "D", "request attempt", "bytes, counted")
GEN_AI_PROVIDER_NAME = _name("gen_ai.provider.name", "D", "attempt run", "`replicate`")
GEN_AI_OPERATION_NAME = _name(
    "gen_ai.operation.name", "D", "attempt run", "`create_prediction`, `fetch_response`; on the run `generate_content`"
)
GEN_AI_REQUEST_MODEL = _name(
    "gen_ai.request.model", "D", "attempt run", "`owner/name` where the path names it; on the run as Replicate says"
)
GEN_AI_RESPONSE_MODEL = _name("gen_ai.response.model", "D", "attempt run", "`owner/name` as Replicate says")
GEN_AI_RESPONSE_ID = _name("gen_ai.response.id", "D", "attempt run", "the prediction's id")
GEN_AI_RESPONSE_STATUS = _name(
    "gen_ai.response.status",
    "D",
    "attempt run",
    "`queued`, `in_progress`, `completed`, `failed` or `cancelled`, for Replicate's status",
)
GEN_AI_INPUT_TOKENS = _name("gen_ai.usage.input_tokens", "D", "run", "where Replicate counts them")
GEN_AI_OUTPUT_TOKENS = _name("gen_ai.usage.output_tokens", "D", "run", "where Replicate counts them")
GEN_AI_TIME_TO_FIRST_CHUNK = _name(
    "gen_ai.response.time_to_first_chunk", "D", "attempt", "of a stream: seconds until its first `data:`"
)

REPLICATE_OPERATION = _name(
    "replicate.operation", "C", "request", "the operation id of Replicate's OpenAPI document, as `predictions.create`"
)
PREDICTION_ID = _name("replicate.prediction.id", "C", "request run", "from the path or the answer")
PREDICTION_STATUS = _name("replicate.prediction.status", "C", "request run", "as the answer shows it")
TRAINING_ID = _name("replicate.training.id", "C", "request run", "from the path or the answer")
DEPLOYMENT = _name("replicate.deployment", "C", "request run", "`owner/name`")
MODEL_NAME = _name("replicate.model.name", "C", "request run", "`owner/name` as Replicate says")
MODEL_VERSION = _name("replicate.model.version", "C", "request run", "as Replicate says")
QUEUE_TIME = _name("replicate.prediction.queue_time", "C", "run", "seconds until it was started")
RUN_TIME = _name("replicate.prediction.run_time", "C", "run", "seconds that the model ran")
TOTAL_TIME = _name("replicate.prediction.total_time", "C", "run", "seconds from creation to end")
COST = _name("replicate.prediction.cost", "C", "run", "an estimate by the host's own prices; absent where unknown")
COST_CURRENCY = _name("replicate.prediction.cost.currency", "C", "run", "that of the prices, as `USD`")
COST_BASIS = _name(
    "replicate.prediction.cost.basis",
    "C",
    "run",
    "the rates that were used: `per_second`, `per_input_token`, `per_output_token`, `per_output`, `per_run`",
)
INPUT = _name(
    "replicate.input", "C", "run", "JSON, at most 8 KiB, redacted; only with `capture_content`, here or on an event"
)
OUTPUT = _name("replicate.output", "C", "run", "likewise")

OUTCOME = _name(
    "replicate_proxy.outcome",
    "C",
    "request",
    "`forwarded`, `answered` (without Replicate), `auth_missing`, `auth_invalid`, `denied`, `limited`, `bad_request`, "
    "`body_too_large`, `upstream_timeout`, `upstream_error`, `overloaded`, `resolver_error` (resolver, guardrail, "
    "store or `on_webhook` of the host has failed) or `client_disconnected`",
)
TENANT = _name("replicate_proxy.tenant", "C", "request run", "the tenant's name, as the key resolver gave it")
STORE_FAILED = _name(
    "replicate_proxy.store.failed", "C", "request", "true where what was created could not be recorded at once"
)
UNWRAPPED_DATA = _name(
    "replicate_proxy.request.unwrapped_data", "C", "request", 'true where `{"data": …}` was taken off'
)
REPAIRED_PATH = _name("replicate_proxy.request.repaired_path", "C", "request", "true where the path was repaired")
CACHE_STATUS = _name(
    "replicate_proxy.cache.status", "C", "request", "`HIT`, `MISS` or `REFRESH`, as in `x-portkey-cache-status`"
)
COALESCED = _name(
    "replicate_proxy.coalesced", "C", "request", "true where it waited for another request's answer, which it links to"
)
GUARDRAIL_VERDICT = _name("replicate_proxy.guardrail.verdict", "C", "request", "`allow`, `flag` or `deny`")
GUARDRAIL_CHECK = _name("replicate_proxy.guardrail.check", "C", "request", "the check that flagged, denied or failed")
TRANSITION = _name(
    "replicate_proxy.lifecycle.transition", "C", "request", "true on a poll that saw another status than the one before"
)
OBSERVED_BY = _name(
    "replicate_proxy.lifecycle.observed_by", "C", "run", "`create`, `poll`, `cancel`, `stream` or `webhook`"
)
OBSERVATION_LAG = _name(
    "replicate_proxy.lifecycle.observation_lag", "C", "run", "seconds from its end until it was first seen"
)
POLLS = _name("replicate_proxy.lifecycle.polls", "C", "run", "how often it was read until then")
ORIGIN = _name(
    "replicate_proxy.lifecycle.origin",
    "C",
    "run",
    "`store`, or `observed` where nothing is known of the create: then the run stands below the request that saw it",
)
STREAM_EVENTS = _name("replicate_proxy.stream.events", "C", "attempt", "of a stream: how many came")
STREAM_COMPLETE = _name("replicate_proxy.stream.complete", "C", "attempt", "of a stream: whether its `done` came")
RETRY_REASON = _name("replicate_proxy.retry.reason", "C", "", "what the attempt before came to, as its `error.type`")
GEN_AI_TOKEN_TYPE = _name("gen_ai.token.type", "D", "", "`input` or `output`")

PORTKEY_TRACE_ID = _name("portkey.trace_id", "C", "request attempt run", "`x-portkey-trace-id`")
PORTKEY_SPAN_ID = _name("portkey.span_id", "C", "request attempt run", "`x-portkey-span-id`")
PORTKEY_PARENT_SPAN_ID = _name(
    "portkey.parent_span_id", "C", "request attempt run", "`x-portkey-parent-span-id`; none is used as an id here"
)
PORTKEY_SPAN_NAME = _name("portkey.span_name", "C", "request attempt run", "`x-portkey-span-name`")
PORTKEY_METADATA = _name(
    "portkey.metadata.",
    "C",
    "request attempt run",
    "followed by a key of `x-portkey-metadata`, with `_` for characters outside `[A-Za-z0-9_-]`; at most 32",
)
PORTKEY_METADATA_JSON = _name("portkey.metadata_json", "C", "request", "all of it, canonical; absent above 4 KiB")
PORTKEY_METADATA_INVALID = _name("portkey.metadata_invalid", "C", "request", "true where it cannot be read")
PORTKEY_PROVIDER = _name("portkey.provider", "C", "request", "`x-portkey-provider`")

STARTED = "replicate.started"
"""The event on a run at the moment when the model was started."""

CONTENT = "replicate.content"
"""The event on a run that holds `replicate.input` and `replicate.output`, with `EVENT_ONLY` and `SPAN_AND_EVENT`."""

EVENTS = {STARTED: "the model was started", CONTENT: "the content, where it is captured as an event"}

# The convention's buckets end at 10 s, but a create may be held for a minute, and runs last longer.
_REQUEST = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, 1800.0, 3600.0),
)
_RUN = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
_OWN = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_POLLS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
_GEN_AI = (*(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92), 300.0, 3600.0)
_TOKENS = tuple(4.0**power for power in range(14))


def _metric(
    name: str, mark: Mark, kind: Kind, unit: str, labels: str, meaning: str, buckets: tuple[float, ...] = ()
) -> str:
    METRICS[name] = Metric(name, mark, kind, unit, tuple(labels.split()), meaning, buckets)
    return name


_OF_HTTP = f"{HTTP_REQUEST_METHOD} {HTTP_RESPONSE_STATUS_CODE} {ERROR_TYPE}"
_OF_GEN_AI = f"{GEN_AI_OPERATION_NAME} {GEN_AI_PROVIDER_NAME} {GEN_AI_RESPONSE_MODEL}"
_OF_RUN = f"{MODEL_NAME} {PREDICTION_STATUS}"

SERVER_DURATION = _metric(
    "http.server.request.duration",
    "S",
    "histogram",
    "s",
    f"{HTTP_ROUTE} {_OF_HTTP}",
    "requests whose SERVER span is ours; else the host counts them",
    _REQUEST,
)
CLIENT_DURATION = _metric(
    "http.client.request.duration",
    "S",
    "histogram",
    "s",
    f"{URL_TEMPLATE} {SERVER_ADDRESS} {_OF_HTTP}",
    "attempts, until the last byte; failed ones too",
    _REQUEST,
)
REQUEST_DURATION = _metric(
    "replicate_proxy.request.duration",
    "C",
    "histogram",
    "s",
    f"{REPLICATE_OPERATION} {OUTCOME}",
    "all requests, until the last byte",
    _REQUEST,
)
REQUESTS = _metric(
    "replicate_proxy.requests",
    "C",
    "counter",
    "{request}",
    f"{REPLICATE_OPERATION} {OUTCOME} {TENANT}",
    "all requests, by tenant",
)
IN_FLIGHT = _metric(
    "replicate_proxy.in_flight",
    "C",
    "up/down counter",
    "{request}",
    REPLICATE_OPERATION,
    "requests under way",
)
OVERHEAD = _metric(
    "replicate_proxy.overhead.duration",
    "C",
    "histogram",
    "s",
    REPLICATE_OPERATION,
    "the proxy's own part: without what was spent waiting for Replicate or for the caller",
    _OWN,
)
RETRIES = _metric(
    "replicate_proxy.upstream.retries", "C", "counter", "{attempt}", RETRY_REASON, "attempts after the first"
)
QUEUE_DURATION = _metric(
    "replicate.prediction.queue.duration",
    "C",
    "histogram",
    "s",
    _OF_RUN,
    "predictions from creation until they were started",
    _RUN,
)
RUN_DURATION = _metric("replicate.prediction.run.duration", "C", "histogram", "s", _OF_RUN, "how long models ran", _RUN)
TOTAL_DURATION = _metric(
    "replicate.prediction.duration", "C", "histogram", "s", _OF_RUN, "predictions from creation to end", _RUN
)
TERMINAL = _metric(
    "replicate.prediction.terminal",
    "C",
    "counter",
    "{prediction}",
    f"{_OF_RUN} {OBSERVED_BY}",
    "predictions that came to their end",
)
COST_TOTAL = _metric(
    COST,
    "C",
    "counter",
    "{currency}",
    f"{MODEL_NAME} {TENANT} {COST_CURRENCY}",
    "estimated by the host's own prices; trainings too",
)
LAG = _metric(
    "replicate_proxy.prediction.observation_lag",
    "C",
    "histogram",
    "s",
    OBSERVED_BY,
    "from a prediction's end until it was first seen",
    _RUN,
)
READS = _metric(
    "replicate_proxy.prediction.polls",
    "C",
    "histogram",
    "{poll}",
    OBSERVED_BY,
    "how often a prediction was read until its end was seen",
    _POLLS,
)
GEN_AI_DURATION = _metric(
    "gen_ai.client.operation.duration",
    "D",
    "histogram",
    "s",
    f"{_OF_GEN_AI} {ERROR_TYPE}",
    "creates of predictions, and their runs",
    _GEN_AI,
)
GEN_AI_TOKENS = _metric(
    "gen_ai.client.token.usage",
    "D",
    "histogram",
    "{token}",
    f"{_OF_GEN_AI} {GEN_AI_TOKEN_TYPE}",
    "tokens of a run, where Replicate counts them",
    _TOKENS,
)

FIXED = frozenset(
    (
        *(HTTP_REQUEST_METHOD, HTTP_ROUTE, URL_TEMPLATE, URL_SCHEME, NETWORK_PROTOCOL_VERSION, SERVER_ADDRESS),
        *(ERROR_TYPE, GEN_AI_PROVIDER_NAME, GEN_AI_OPERATION_NAME, GEN_AI_RESPONSE_STATUS, REPLICATE_OPERATION),
        *(PREDICTION_STATUS, COST_BASIS, OUTCOME, OBSERVED_BY, ORIGIN),
    )
)
"""Attributes whose values are words of fixed lists, or of the server and the host: nothing of a caller's is in them."""

OTHER = "_OTHER"
"""The label for what is not on a list, or one too many for it."""


def known(name: str) -> bool:
    """Whether a span may carry an attribute of this name."""
    if name.startswith(PORTKEY_METADATA):
        return True
    return name in ATTRIBUTES and name != PORTKEY_METADATA and bool(ATTRIBUTES[name].on)
