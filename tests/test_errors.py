from __future__ import annotations

import re

import pytest

from replicate_proxy_mw import errors
from replicate_proxy_mw.errors import GuardrailDenied, LimitExceeded, PermissionDenied, ProxyError

OUTCOMES = {
    "auth_missing",
    "auth_invalid",
    "bad_request",
    "body_too_large",
    "client_disconnected",
    "denied",
    "limited",
    "overloaded",
    "resolver_error",
    "upstream_error",
    "upstream_timeout",
}
TREE: list[type[ProxyError]] = [ProxyError, *ProxyError.__subclasses__()]


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_the_drawn_tree_is_the_tree(error: type[ProxyError]) -> None:
    assert errors.__doc__
    assert error().message
    assert re.search(rf"{error.__name__} +{error.status}  {error.code}\b", errors.__doc__)
    assert error.outcome in OUTCOMES


def test_codes_are_told_apart() -> None:
    assert len({error.code for error in TREE}) == len(TREE)


def test_a_reason_replaces_the_text() -> None:
    assert PermissionDenied("only team-a may").message == "only team-a may"
    assert str(PermissionDenied()) == PermissionDenied.message
    assert PermissionDenied(ValueError("x")).message == "x"  # type: ignore[arg-type]


def test_when_to_come_back() -> None:
    assert LimitExceeded("slow down", retry_after=7).headers == ((b"retry-after", b"7"),)
    assert LimitExceeded().headers == ()


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_the_same_for_someone_else(error: type[ProxyError]) -> None:
    first = error()
    first.members = {"hook_results": {}}
    with pytest.raises(error) as raised:
        raise first
    other = raised.value.anew()
    assert type(other) is error
    assert (other.message, other.headers, other.members) == (first.message, first.headers, first.members)
    assert str(other) == first.message
    assert other is not first
    assert other.__traceback__ is None


def test_what_a_guardrail_says_stands_in_its_answer() -> None:
    results: dict[str, list[object]] = {"before_request_hooks": [], "after_request_hooks": []}
    assert GuardrailDenied(hook_results=results).members == {"hook_results": results}
    assert GuardrailDenied("no").members == {}
    assert LimitExceeded(retry_after=7, headers=[(b"ratelimit-limit", b"600")]).headers == (
        (b"retry-after", b"7"),
        (b"ratelimit-limit", b"600"),
    )
