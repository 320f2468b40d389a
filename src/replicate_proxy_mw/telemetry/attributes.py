"""What spans say, in the words of the registry."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from ..exchange import ProxyRequest
from ..portkey import MAX_METADATA_BYTES, MAX_TEXT, PortkeyContext
from ..routing import Route
from . import names
from .names import FIXED
from .prediction import Prediction
from .scrub import Scrubber

if TYPE_CHECKING:
    from .prices import Cost

Attributes = dict[str, str | int | float | bool]

# Replicate's words for the state of a prediction, in those of the convention.
_STATUSES = {
    "starting": "queued",
    "processing": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "canceled": "cancelled",
    "aborted": "cancelled",
}

METHODS = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"))

# Query parameters of Replicate's API that hold no secret and no content; values of others are redacted.
_PLAIN_QUERY = frozenset(("created_after", "created_before", "cursor", "limit", "sort_by", "sort_direction", "source"))
_METADATA_KEY = re.compile(r"[^A-Za-z0-9_-]")
_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def scrubbed(attributes: Attributes, scrub: Scrubber) -> Attributes:
    """`attributes` as they may go out. Nothing goes on a span that has not passed here; what the caller says of itself
    is scrubbed in `of_caller`."""
    if scrub.is_clean([value for value in attributes.values() if type(value) is str]):
        return attributes
    return {
        name: scrub(value) if type(value) is str and name not in FIXED else value for name, value in attributes.items()
    }


class Origin(NamedTuple):
    """Where attempts go: what each of their spans says of it."""

    url: str
    path: str
    address: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        parts = urlsplit(url)
        return cls(url, parts.path, parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])


def method(value: str) -> str:
    """The method as a label: one of the known ones or `_OTHER`, since callers may invent any."""
    return value if value in METHODS else names.OTHER


def span_name(value: str, template: str) -> str:
    return f"{value} {template}" if value in METHODS else f"HTTP {template}"


def of_scope(scope: Mapping[str, Any]) -> Attributes:
    """What the server tells of a request."""
    raw_path: bytes | None = scope.get("raw_path")
    attributes: Attributes = {
        names.URL_SCHEME: scope.get("scheme", "http"),
        names.URL_PATH: scope["path"] if raw_path is None else raw_path.decode("latin-1"),
        names.NETWORK_PROTOCOL_VERSION: scope.get("http_version", "1.1"),
    }
    if server := scope.get("server"):
        attributes[names.SERVER_ADDRESS] = server[0]
        if server[1] is not None:
            attributes[names.SERVER_PORT] = server[1]
    if client := scope.get("client"):
        attributes[names.CLIENT_ADDRESS] = client[0]
    for name, value in scope["headers"]:
        if name == b"user-agent":
            attributes[names.USER_AGENT_ORIGINAL] = value.decode("latin-1")[:MAX_TEXT]
    return attributes


def of_route(route: Route) -> Attributes:
    """What the path alone tells about the subject of a request."""
    attributes: Attributes = {}
    params = route.params
    if route.operation:
        attributes[names.REPLICATE_OPERATION] = route.operation
    if "prediction_id" in params:
        attributes[names.PREDICTION_ID] = params["prediction_id"]
    if "training_id" in params:
        attributes[names.TRAINING_ID] = params["training_id"]
    if "version_id" in params:
        attributes[names.MODEL_VERSION] = params["version_id"]
    if "deployment_name" in params:
        attributes[names.DEPLOYMENT] = f"{params['deployment_owner']}/{params['deployment_name']}"
    return attributes


def of_caller(portkey: PortkeyContext, scrub: Scrubber) -> tuple[dict[str, str], Attributes]:
    """What the caller says of itself: on every span of ours, so that each can be found by it, and on the request span
    alone. Metadata is scrubbed before its keys and values are written in other ways."""
    said: dict[str, str] = {}
    for name, value in (
        (names.PORTKEY_TRACE_ID, portkey.trace_id),
        (names.PORTKEY_SPAN_ID, portkey.span_id),
        (names.PORTKEY_PARENT_SPAN_ID, portkey.parent_span_id),
        (names.PORTKEY_SPAN_NAME, portkey.span_name),
    ):
        if value:
            said[name] = value
    metadata = portkey.metadata or {}
    if not scrub.is_clean([*said.values(), *metadata, *metadata.values()]):
        said = {name: scrub(value) for name, value in said.items()}
        metadata = {scrub(key): scrub(value) for key, value in metadata.items()}
    for key, value in metadata.items():
        said[names.PORTKEY_METADATA + _METADATA_KEY.sub("_", key)] = value
    told: Attributes = {}
    if portkey.provider:
        told[names.PORTKEY_PROVIDER] = portkey.provider[:MAX_TEXT]
    if portkey.metadata is not None:
        text = _json(metadata)
        if len(text.encode()) <= MAX_METADATA_BYTES:
            told[names.PORTKEY_METADATA_JSON] = text
    if portkey.metadata_invalid:
        told[names.PORTKEY_METADATA_INVALID] = True
    return said, told


def of_attempt(request: ProxyRequest, origin: Origin) -> Attributes:
    """What is known of an attempt when it starts."""
    attributes: Attributes = {
        names.HTTP_REQUEST_METHOD: method(request.method),
        names.URL_FULL: origin.url + redacted(request.target),
        names.URL_TEMPLATE: origin.path + request.route.template,
        names.SERVER_ADDRESS: origin.address,
        names.SERVER_PORT: origin.port,
    }
    if request.resend_count:
        attributes[names.HTTP_REQUEST_RESEND_COUNT] = request.resend_count
    if (gen_ai := _gen_ai_operation(request.route)) is not None:
        attributes[names.GEN_AI_PROVIDER_NAME] = "replicate"
        attributes[names.GEN_AI_OPERATION_NAME] = gen_ai
        if request.route.model is not None:
            attributes[names.GEN_AI_REQUEST_MODEL] = request.route.model
        if "prediction_id" in request.route.params:
            attributes[names.GEN_AI_RESPONSE_ID] = request.route.params["prediction_id"]
    return attributes


def _gen_ai_operation(route: Route) -> str | None:
    """The convention's name for what is done with a prediction; it has none for the rest of the API."""
    operation = route.details
    if operation is None:
        return None
    if operation.creates == "prediction":
        return "create_prediction"
    return "fetch_response" if operation.id == "predictions.get" else None


def of_stream(*, host: str, port: int, prediction_id: str) -> Attributes:
    """What is known when a stream is asked for. Its URL is all the permission that is needed, and is not told."""
    attributes: Attributes = {
        names.HTTP_REQUEST_METHOD: "GET",
        names.SERVER_ADDRESS: host,
        names.SERVER_PORT: port,
        names.GEN_AI_PROVIDER_NAME: "replicate",
        names.GEN_AI_OPERATION_NAME: "fetch_response",
    }
    if prediction_id:
        attributes[names.GEN_AI_RESPONSE_ID] = prediction_id
    return attributes


def of_fetched(prediction: Prediction) -> Attributes:
    """What an answer tells of its prediction; on the attempt that had it. The convention knows no trainings."""
    if prediction.kind == "training":
        return {}
    attributes: Attributes = {
        names.GEN_AI_RESPONSE_ID: prediction.id,
        names.GEN_AI_RESPONSE_STATUS: _STATUSES[prediction.status],
    }
    if prediction.model is not None:
        attributes[names.GEN_AI_RESPONSE_MODEL] = prediction.model
    return attributes


def of_prediction(prediction: Prediction) -> Attributes:
    """Which prediction or training it is about, and how that stands; on request and run."""
    training = prediction.kind == "training"
    attributes: Attributes = {
        names.TRAINING_ID if training else names.PREDICTION_ID: prediction.id,
        names.PREDICTION_STATUS: prediction.status,
    }
    for name, value in (
        (names.MODEL_NAME, prediction.model),
        (names.MODEL_VERSION, prediction.version),
        (names.DEPLOYMENT, prediction.deployment),
    ):
        if value is not None:
            attributes[name] = value
    return attributes


def of_run(prediction: Prediction, cost: Cost | None) -> Attributes:
    """What the end of a prediction tells of its run."""
    attributes = of_prediction(prediction)
    if prediction.kind == "prediction":
        attributes |= of_fetched(prediction)
        attributes[names.GEN_AI_PROVIDER_NAME] = "replicate"
        attributes[names.GEN_AI_OPERATION_NAME] = "generate_content"
        if prediction.model is not None:
            attributes[names.GEN_AI_REQUEST_MODEL] = prediction.model
    for name, value in (
        (names.GEN_AI_INPUT_TOKENS, prediction.input_tokens),
        (names.GEN_AI_OUTPUT_TOKENS, prediction.output_tokens),
        (names.QUEUE_TIME, prediction.queue_time),
        (names.RUN_TIME, prediction.run_time),
        (names.TOTAL_TIME, prediction.total_time),
    ):
        if value is not None:
            attributes[name] = value
    if cost is not None:
        attributes[names.COST] = cost.amount
        attributes[names.COST_CURRENCY] = cost.currency
        attributes[names.COST_BASIS] = cost.basis
    return attributes


def redacted(target: str) -> str:
    """`target` with the values of all query parameters hidden but those known to hold no secret and no content."""
    path, separator, query = target.partition("?")
    if not separator:
        return target
    return path + separator + "&".join(_redacted(*part.partition("=")) for part in query.split("&"))


def _redacted(name: str, equals: str, value: str) -> str:
    if not name or name in _PLAIN_QUERY:
        return name + equals + value
    return f"{name}=REDACTED" if equals else "REDACTED"
