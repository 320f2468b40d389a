"""docs/errors.md has every error, and the answer that it shows is one that a caller gets."""

from __future__ import annotations

import ast
import json
import re

import httpx

from replicate_proxy_mw import MappingKeyResolver, ReplicateProxyMiddleware
from replicate_proxy_mw.errors import GuardrailDenied, ProxyError, RequestTimeout
from replicate_proxy_mw.testing import serve
from tests.docs.reference import written
from tests.docs.reference_of_config import text_of
from tests.docs.reference_of_errors import CUT, SAID, texts
from tests.documents import Page

PAGE = Page("docs/errors.md")


def test_the_reference_is_what_the_generator_writes() -> None:
    assert written("errors.md", PAGE.text) == PAGE.text, "stale: python -m tests.docs.reference --write"


def test_no_error_is_forgotten() -> None:
    assert SAID.keys() == {ProxyError, *ProxyError.__subclasses__()}
    [first, *others] = CUT
    assert others == first.__subclasses__()
    assert re.findall(r"^### `(\w+)`$", PAGE.text, re.MULTILINE) == [
        kind.code for kind in sorted(SAID, key=lambda kind: kind.status)
    ]


def test_texts_that_are_raised_are_there() -> None:
    assert "There is more than one Authorization header." in texts()["BadRequest"]
    assert "max_body_size: a body may have … bytes." in texts()["BodyTooLarge"]
    assert all(text in PAGE.text for found in texts().values() for text in found)
    assert text_of(ast.parse("1 + 1", mode="eval").body) is None


def test_the_types_that_differ_from_the_outcome_are_the_two_that_the_page_has() -> None:
    assert {kind: kind.type for kind in SAID if kind.type} == {
        RequestTimeout: "timeout_error",
        GuardrailDenied: "hooks_failed",
    }


def test_a_caller_without_a_key_gets_the_answer_that_is_shown() -> None:
    app = ReplicateProxyMiddleware(_host, key_resolver=MappingKeyResolver({"pk-for-the-designers": "r8_of_designers"}))
    with serve(app, lifespan="off") as served:
        answer = httpx.get(served.url + "/v1/account")
    head = [line.split(": ") for line in PAGE.block("http", "401").splitlines()[1:]]
    body = PAGE.block("json", "key_missing")
    id, shown_id = answer.headers["x-request-id"], dict(head)["x-request-id"]
    del answer.headers["date"]
    assert answer.status_code == 401
    assert list(answer.headers.items()) == [(name, value.replace(shown_id, id)) for name, value in head]
    assert answer.json() == json.loads(body.replace(shown_id, id))
    assert PAGE.count("http", "json") == len(PAGE.code) == 2


def test_links_lead_somewhere() -> None:
    assert PAGE.missing_links() == []


async def _host(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not called")
