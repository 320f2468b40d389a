from __future__ import annotations

import json
from typing import Any

import pytest

from replicate_proxy_mw.testing.problems import Problem, check, problem, throttled


def test_known_and_unknown_statuses() -> None:
    assert json.loads(problem(401).body) == {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }
    assert json.loads(problem(418, "teapot").body) == {"detail": "teapot", "status": 418}


def test_both_forms_of_429() -> None:
    plain, low = throttled(30), throttled(5, low_credit=True)
    assert json.loads(plain.body) == {"detail": "Request was throttled. Your rate limit resets in ~30s."}
    assert json.loads(low.body)["retry_after"] == 5
    assert low.headers == {"retry-after": "5", "ratelimit-remaining": "0", "ratelimit-reset": "5"}


@pytest.mark.parametrize(
    ("value", "schema", "detail"),
    [
        ([], {"type": "object"}, "- body: must be of type object\n"),
        ({}, {"type": "object", "required": ["a"]}, "- body: a is required\n"),
        (
            {"a": True},
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            "- body.a: must be of type integer\n",
        ),
        (
            {"a": 1.5},
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            "- body.a: must be of type integer\n",
        ),
        (True, {"type": "number"}, "- body: must be of type number\n"),
        (6, {"type": "integer", "minimum": 0, "maximum": 5}, "- body: must be between 0 and 5\n"),
        (["x"], {"type": "array", "items": {"enum": ["y", "z"]}}, "- body.0: must be one of y, z\n"),
        (
            {"a": 1},
            {"type": "object", "additionalProperties": False},
            "- body: additional property a is not allowed\n",
        ),
    ],
)
def test_what_is_wrong_is_named(value: Any, schema: dict[str, Any], detail: str) -> None:
    with pytest.raises(Problem) as caught:
        check(value, schema)
    assert (caught.value.status, json.loads(caught.value.body)["detail"]) == (422, detail)


def test_what_is_right_passes() -> None:
    properties = {"a": {"type": "integer", "minimum": 0}, "b": {"type": "boolean"}, "c": {"type": "array"}}
    check({"a": 2.0, "b": True, "c": [1], "d": None}, {"type": "object", "properties": properties})
    check(None, {})
