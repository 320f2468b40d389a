"""Every name that a span of ours carries, with its standing.

S: stable OpenTelemetry semantic convention (schema 1.44.0). D: convention still in Development. C: our own namespace:
`replicate.*` comes from Replicate's API, `replicate_proxy.*` is about the proxy, `portkey.*` from the caller's headers.
"""

from __future__ import annotations

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

MARKS: dict[str, str] = {}


def _name(name: str, mark: str) -> str:
    MARKS[name] = mark
    return name


HTTP_REQUEST_METHOD = _name("http.request.method", "S")
HTTP_REQUEST_RESEND_COUNT = _name("http.request.resend_count", "S")
HTTP_RESPONSE_STATUS_CODE = _name("http.response.status_code", "S")
HTTP_ROUTE = _name("http.route", "S")
URL_SCHEME = _name("url.scheme", "S")
URL_PATH = _name("url.path", "S")
URL_FULL = _name("url.full", "S")
NETWORK_PROTOCOL_VERSION = _name("network.protocol.version", "S")
SERVER_ADDRESS = _name("server.address", "S")
SERVER_PORT = _name("server.port", "S")
CLIENT_ADDRESS = _name("client.address", "S")
USER_AGENT_ORIGINAL = _name("user_agent.original", "S")
ERROR_TYPE = _name("error.type", "S")

URL_TEMPLATE = _name("url.template", "D")
HTTP_REQUEST_BODY_SIZE = _name("http.request.body.size", "D")
HTTP_RESPONSE_BODY_SIZE = _name("http.response.body.size", "D")
GEN_AI_PROVIDER_NAME = _name("gen_ai.provider.name", "D")
GEN_AI_OPERATION_NAME = _name("gen_ai.operation.name", "D")
GEN_AI_REQUEST_MODEL = _name("gen_ai.request.model", "D")
GEN_AI_RESPONSE_ID = _name("gen_ai.response.id", "D")

REPLICATE_OPERATION = _name("replicate.operation", "C")
REPLICATE_PREDICTION_ID = _name("replicate.prediction.id", "C")
REPLICATE_TRAINING_ID = _name("replicate.training.id", "C")
REPLICATE_DEPLOYMENT = _name("replicate.deployment", "C")
REPLICATE_MODEL_VERSION = _name("replicate.model.version", "C")
OUTCOME = _name("replicate_proxy.outcome", "C")
TENANT = _name("replicate_proxy.tenant", "C")
STORE_FAILED = _name("replicate_proxy.store.failed", "C")
UNWRAPPED_DATA = _name("replicate_proxy.request.unwrapped_data", "C")
REPAIRED_PATH = _name("replicate_proxy.request.repaired_path", "C")
PORTKEY_TRACE_ID = _name("portkey.trace_id", "C")
PORTKEY_SPAN_ID = _name("portkey.span_id", "C")
PORTKEY_PARENT_SPAN_ID = _name("portkey.parent_span_id", "C")
PORTKEY_SPAN_NAME = _name("portkey.span_name", "C")
PORTKEY_PROVIDER = _name("portkey.provider", "C")
PORTKEY_METADATA_JSON = _name("portkey.metadata_json", "C")
PORTKEY_METADATA_INVALID = _name("portkey.metadata_invalid", "C")

PORTKEY_METADATA = "portkey.metadata."
"""Followed by the caller's own key, with characters outside `[A-Za-z0-9_-]` replaced by `_`."""


def known(name: str) -> bool:
    """Whether `name` is in this registry."""
    return name in MARKS or name.startswith(PORTKEY_METADATA)
