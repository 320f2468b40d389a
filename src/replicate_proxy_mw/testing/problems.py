"""Replicate's errors: one exception, the bodies as recorded from real traffic or told in public threads.

`application/problem+json` is RFC 9457's media type; Replicate fills `title`, `detail` and `status` of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import Response

PROBLEM_JSON = "application/problem+json"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "object": dict,
    "array": list,
    "boolean": bool,
    "number": (int, float),
}
_STANDARD: dict[int, dict[str, Any]] = {
    401: {"title": "Unauthenticated", "detail": "You did not pass a valid authentication token", "status": 401},
    402: {
        "title": "Billing required",
        "detail": "You need to set up billing before you can run this model.",
        "status": 402,
    },
    404: {"detail": "The requested resource could not be found.", "status": 404},
    422: {"title": "Input validation failed", "detail": "- input is required\n", "status": 422},
    500: {"title": "Internal server error", "detail": "Something went wrong on our side.", "status": 500},
    503: {"title": "Service unavailable", "detail": "Please try again later.", "status": 503},
}


class Problem(Exception):
    """An answer that is an error. `body` is sent as it is, with `headers` added to those of every answer."""

    def __init__(
        self,
        status: int,
        body: Mapping[str, Any] | bytes,
        *,
        content_type: str = PROBLEM_JSON,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status)
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.content_type = content_type
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return Response(self.body, self.status, {"content-type": self.content_type, **self.headers})


def problem(status: int, detail: str | None = None, **more: Any) -> Problem:
    """The error Replicate answers with `status`, with another `detail` if given."""
    standard = _STANDARD.get(status, {"detail": "", "status": status})
    return Problem(status, {**standard, **({} if detail is None else {"detail": detail}), **more})


def throttled(retry_after: int, *, low_credit: bool = False) -> Problem:
    """429 with its headers; `low_credit` is the form of accounts with less than $5 of credit."""
    headers = {"retry-after": str(retry_after), "ratelimit-remaining": "0", "ratelimit-reset": str(retry_after)}
    if not low_credit:
        detail = f"Request was throttled. Your rate limit resets in ~{retry_after}s."
        return Problem(429, {"detail": detail}, headers=headers)
    detail = (
        "Request was throttled. Your rate limit for creating predictions is reduced to 6 requests per minute with a "
        f"burst of 1 requests while you have less than $5.0 in credit. Your rate limit resets in ~{retry_after}s."
    )
    return Problem(429, {"detail": detail, "status": 429, "retry_after": retry_after}, headers=headers)


def check(value: Any, schema: Mapping[str, Any], *, where: str = "body") -> None:
    """Raise the 422 of `value` if it does not follow `schema`, by the part of JSON Schema Replicate needs here."""
    if found := list(_faults(value, schema, where)):
        detail = "".join(f"- {place}: {text}\n" for place, text in found)
        fields = [{"type": "invalid", "field": place, "description": text} for place, text in found]
        raise problem(422, detail, invalid_fields=fields)


def _faults(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    kind = schema.get("type")
    if kind is not None and not _is(value, kind):
        yield where, f"must be of type {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield where, f"must be one of {', '.join(schema['enum'])}"
    if kind == "integer" and not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        yield where, f"must be between {schema.get('minimum')} and {schema.get('maximum')}"
    if kind == "array":
        for index, item in enumerate(value):
            yield from _faults(item, schema.get("items", {}), f"{where}.{index}")
    if kind == "object":
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield where, f"{name} is required"
        for name, item in value.items():
            if name in known:
                yield from _faults(item, known[name], f"{where}.{name}")
            elif schema.get("additionalProperties") is False:
                yield where, f"additional property {name} is not allowed"


def _is(value: Any, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
