"""What spans say, from what is known without looking into a body."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult

from ..exchange import ProxyRequest
from ..portkey import MAX_TEXT, PortkeyContext
from ..routing import Route
from . import names

Attributes = dict[str, str | int | bool]

METHODS = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"))

# Query parameters of Replicate's API that hold no secret and no content; values of others are redacted.
_PLAIN_QUERY = frozenset(("created_after", "created_before", "cursor", "limit", "sort_by", "sort_direction", "source"))
_METADATA_KEY = re.compile(r"[^A-Za-z0-9_-]")


def method(value: str) -> str:
    """The method as a label: one of the known ones or `_OTHER`, since callers may invent any."""
    return value if value in METHODS else "_OTHER"


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
        attributes[names.REPLICATE_PREDICTION_ID] = params["prediction_id"]
    if "training_id" in params:
        attributes[names.REPLICATE_TRAINING_ID] = params["training_id"]
    if "version_id" in params:
        attributes[names.REPLICATE_MODEL_VERSION] = params["version_id"]
    if "deployment_name" in params:
        attributes[names.REPLICATE_DEPLOYMENT] = f"{params['deployment_owner']}/{params['deployment_name']}"
    return attributes


def of_portkey(portkey: PortkeyContext) -> Attributes:
    """What the caller says of itself; on every span of ours, so that each can be found by it."""
    attributes: Attributes = {}
    for name, value in (
        (names.PORTKEY_TRACE_ID, portkey.trace_id),
        (names.PORTKEY_SPAN_ID, portkey.span_id),
        (names.PORTKEY_PARENT_SPAN_ID, portkey.parent_span_id),
        (names.PORTKEY_SPAN_NAME, portkey.span_name),
    ):
        if value:
            attributes[name] = value
    for key, value in (portkey.metadata or {}).items():
        attributes[names.PORTKEY_METADATA + _METADATA_KEY.sub("_", key)] = value
    return attributes


def of_caller(portkey: PortkeyContext) -> Attributes:
    """What else the caller says; on the request span alone."""
    attributes: Attributes = {}
    if portkey.provider:
        attributes[names.PORTKEY_PROVIDER] = portkey.provider[:MAX_TEXT]
    if portkey.metadata is not None:
        text = json.dumps(portkey.metadata, sort_keys=True, separators=(",", ":"))
        attributes[names.PORTKEY_METADATA_JSON] = text[:4096]
    if portkey.metadata_invalid:
        attributes[names.PORTKEY_METADATA_INVALID] = True
    return attributes


def of_attempt(request: ProxyRequest, upstream: SplitResult) -> Attributes:
    """What is known of an attempt when it starts."""
    attributes: Attributes = {
        names.HTTP_REQUEST_METHOD: method(request.method),
        names.URL_FULL: upstream.geturl() + redacted(request.target),
        names.URL_TEMPLATE: upstream.path + request.route.template,
        names.SERVER_ADDRESS: upstream.hostname or "",
        names.SERVER_PORT: upstream.port or {"http": 80, "https": 443}[upstream.scheme],
        **of_portkey(request.portkey),
    }
    if request.resend_count:
        attributes[names.HTTP_REQUEST_RESEND_COUNT] = request.resend_count
    operation, params = request.route.details, request.route.params
    if operation is None:
        return attributes
    if operation.creates == "prediction":
        attributes[names.GEN_AI_PROVIDER_NAME] = "replicate"
        attributes[names.GEN_AI_OPERATION_NAME] = "create_prediction"
        if request.route.model is not None:
            attributes[names.GEN_AI_REQUEST_MODEL] = request.route.model
    elif operation.id == "predictions.get":
        attributes[names.GEN_AI_PROVIDER_NAME] = "replicate"
        attributes[names.GEN_AI_OPERATION_NAME] = "fetch_response"
        attributes[names.GEN_AI_RESPONSE_ID] = params["prediction_id"]
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
