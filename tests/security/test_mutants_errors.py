from __future__ import annotations

import pytest

from replicate_proxy_mw import errors
from replicate_proxy_mw.errors import ProxyError

BEARER = ((b"www-authenticate", b"Bearer"),)
SIGNED = ((b"www-authenticate", b"Standard-Webhooks"),)
SOON = ((b"retry-after", b"1"),)

HEADERS = {
    "KeyMissing": BEARER,
    "KeyUnknown": BEARER,
    "WebhookUnverified": SIGNED,
    "ResolverFailed": SOON,
    "StoreFailed": SOON,
    "GuardrailFailed": SOON,
    "Overloaded": SOON,
}
WITHOUT_REASON = {"KeyMissing", "KeyUnknown", "RequestTimeout", "ResolverFailed"}
TREE: list[type[ProxyError]] = [ProxyError, *ProxyError.__subclasses__()]


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_what_an_error_says_beside_its_text(error: type[ProxyError]) -> None:
    assert error().headers == HEADERS.get(error.__name__, ())
    assert error().members == {}
    assert str(error()) == error().message
    if error.__name__ not in WITHOUT_REASON:
        assert error().message == error.message
        told = error("only on Sundays")
        assert (told.message, str(told), told.headers) == ("only on Sundays", "only on Sundays", error().headers)


def test_headers_that_a_layer_adds() -> None:
    added = ((b"x-limit", b"5"),)
    assert ProxyError(headers=added).headers == added
    assert errors.GuardrailFailed(headers=added).headers == added
    assert errors.LimitExceeded(headers=added).headers == added
    assert errors.LimitExceeded(retry_after=0, headers=added).headers == ((b"retry-after", b"0"), *added)


def test_a_caller_s_own_limit_is_told_in_milliseconds() -> None:
    text = "Request exceeded the timeout sent in the request: "
    assert errors.RequestTimeout(1.5).message == text + "1500ms"
    assert errors.RequestTimeout().message == text + "0ms"


def test_what_a_guardrail_found_is_its_own() -> None:
    results = {"before_request_hooks": [1]}
    denied = errors.GuardrailDenied(hook_results=results)
    assert denied.members == {"hook_results": results}
    assert denied.anew().members == {"hook_results": results}
    assert errors.GuardrailDenied().members == {}


def test_an_answer_that_was_cut_says_so_and_no_more() -> None:
    assert str(errors.UpstreamAborted()) == errors.UpstreamAborted.message
