from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable, Container, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from replicate.client import Client
from starlette.applications import Starlette
from starlette.routing import Mount

from replicate_proxy_mw import (
    Forward,
    ProxyConfig,
    ProxyRequest,
    ProxyResponse,
    ReplicateKey,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
    portkey,
    routing,
)
from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.json_bodies import MAX_SIZE
from replicate_proxy_mw.layers.links import PUBLIC_BASE, reached, rewrite_links, rewritten, root
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.raw_asgi import KEY, TOKEN, Arriving, call, host, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

pytestmark = pytest.mark.anyio

HERE = "http://proxy.test/v1"


def _link(url: str) -> str | None:
    return HERE + url[len(PUBLIC_BASE) :] if url.startswith(PUBLIC_BASE + "/") else None


LIST = {"next": _link, "previous": _link}
JOB = {"get": _link, "cancel": _link}


# --- text: whatever the formatting, nothing but the links changes

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

_blank = st.text(" \t\n\r", max_size=2)
_url = st.sampled_from(["/predictions?cursor=b%3D", "/x", "/é😀", "/\udc00", '/"\\']).map(PUBLIC_BASE.__add__)
_names = ["next", "previous", "results", "urls", "get", "cancel", "stream", "input", "é"]


@st.composite
def _spelled(draw: st.DrawFn, text: str) -> str:
    """A JSON string that means `text`, with escapes where they must be and where they may be."""
    spelled = []
    for character in text:
        forms = []
        if character not in '"\\' and character >= " " and not "\ud800" <= character <= "\udfff":
            forms.append(character)
        if character in '"\\/':
            forms.append("\\" + character)
        units = character.encode("utf-16-be", "surrogatepass")
        forms.append("".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)))
        spelled.append(forms[0] if len(forms) == 1 or draw(st.integers(0, 9)) else draw(st.sampled_from(forms)))
    return f'"{"".join(spelled)}"'


def _object(members: st.SearchStrategy[list[tuple[str, str]]]) -> st.SearchStrategy[str]:
    return members.map(lambda pairs: "{" + ",".join(f"{name}:{value}" for name, value in pairs) + "}")


_name = st.sampled_from(_names).flatmap(_spelled)
_number = st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
_string = (_url | st.text(max_size=5)).flatmap(_spelled)
_scalar = _string | _number | st.sampled_from(["null", "true", "false", "[ ]", "{ }", "7" * 5000])
_value = st.recursive(
    _scalar,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + " , ".join(items) + "]")
        | _object(st.lists(st.tuples(_name, inner), max_size=3))
    ),
    max_leaves=6,
)


class Member(NamedTuple):
    """A member of an object: its name, all up to its value, and the value before and after."""

    name: str
    spelling: str
    old: str
    new: str


@st.composite
def _members(draw: st.DrawFn, value: Callable[[str], st.SearchStrategy[tuple[str, str]]]) -> list[Member]:
    members = []
    for name in draw(st.lists(st.sampled_from(_names), min_size=1, max_size=6)):
        spelling = draw(_blank) + draw(_spelled(name)) + draw(_blank) + ":" + draw(_blank)
        (old, new), blank = draw(value(name)), draw(_blank)
        members.append(Member(name, spelling, old + blank, new + blank))
    return members


def _old(members: list[Member]) -> str:
    return "{" + ",".join(member.spelling + member.old for member in members) + "}"


def _new(members: list[Member]) -> str:
    return "{" + ",".join(member.spelling + member.new for member in members) + "}"


def _linked(names: Container[str]) -> Callable[[str], st.SearchStrategy[tuple[str, str]]]:
    """Values before and after, for an object that has its links in `names`."""

    def edited(value: str) -> str:
        found = _parsed(value)
        url = _link(found) if isinstance(found, str) else None
        return value if url is None else json.dumps(url)

    def pair(name: str) -> st.SearchStrategy[tuple[str, str]]:
        if name not in names:
            return _value.map(lambda old: (old, old))
        return (_url.flatmap(_spelled) | _value).map(lambda old: (old, edited(old)))

    return pair


def _job(name: str) -> st.SearchStrategy[tuple[str, str]]:
    if name != "urls":
        return _linked(())(name)
    return _members(_linked(JOB)).map(lambda urls: (_old(urls), _new(urls))) | _scalar.map(lambda old: (old, old))


def _parsed(text: str) -> Any:
    """With members of the same name, and with numbers of any length."""
    return json.loads(text, object_pairs_hook=tuple, parse_int=str, parse_float=str)


@unhurried
@given(_members(_linked(LIST)), _blank, _blank)
def test_a_list_changes_in_its_links_alone(members: list[Member], before: str, after: str) -> None:
    names = [member.name for member in members]
    if {"next", "previous"} <= set(names):
        end = max(names.index("next"), names.index("previous")) + 1
        members = [*members[:end], *(member._replace(new=member.old) for member in members[end:])]
    result = rewritten(before + _old(members) + after, edits=LIST)
    assert result == before + _new(members) + after
    assert _parsed(result) == tuple((member.name, _parsed(member.new)) for member in members)


@unhurried
@given(_members(_job), _blank, _blank)
def test_a_prediction_changes_in_its_links_alone(members: list[Member], before: str, after: str) -> None:
    result = rewritten(before + _old(members) + after, edits=JOB, within="urls")
    assert result == before + _new(members) + after
    assert _parsed(result) == tuple((member.name, _parsed(member.new)) for member in members)


@given(st.text() | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_what_is_no_object_stays(text: str) -> None:
    assert rewritten(text, edits=LIST) == rewritten(text, edits=JOB, within="urls") == text


NEXT = f'"next": "{PUBLIC_BASE}/x"'
GET = f'"urls": {{"get": "{PUBLIC_BASE}/x"}}'


@pytest.mark.parametrize(
    "ending",
    [
        "",
        ",",
        ", }",
        ", 1",
        ', "a"',
        ', "a" 1}',
        ', "a": }',
        ', "a": 01}',
        ', "a": "\n"}',
        ', "\n": 1}',
        "}}",
        "} {}",
        "]",
        "} x",
    ],
)
def test_what_does_not_go_on_as_json_stays(ending: str) -> None:
    for text, within in (("{" + NEXT + ending, None), ("{" + GET + ending, "urls")):
        assert rewritten(text, edits={**LIST, **JOB}, within=within) == text


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_what_is_too_deep_stays(deep: str) -> None:
    text = "{" + NEXT + ', "a": ' + deep
    assert rewritten(text, edits=LIST) == text


def test_nothing_is_read_beyond_both_links() -> None:
    text = "{" + NEXT + f', {NEXT}, "previous": null, {NEXT}, "results": [[['
    assert rewritten(text, edits=LIST) == text.replace(PUBLIC_BASE, HERE, 2)


def test_links_after_the_results_are_found() -> None:
    text = '{"results": [{' + NEXT + "}], " + NEXT + ', "previous": null}'
    assert rewritten(text, edits=LIST) == '{"results": [{' + NEXT + "}], " + NEXT.replace(PUBLIC_BASE, HERE) + (
        ', "previous": null}'
    )


def _member_by_member(text: str) -> str:
    """The same where no glance is enough: a letter is escaped."""
    escaped = '{"\\u0061":0,'
    return "{" + rewritten(escaped + text[1:], edits=JOB, within="urls").removeprefix(escaped)


OWN = f'{{"get": "{PUBLIC_BASE}/x", "web": "/é", "cancel": "{PUBLIC_BASE}/y"}}'
PRETTY = OWN.replace(", ", ",\n  ").replace(": ", " : ")


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ('{"urls": %s}', True),
        ('{"id": "a", "logs": "\\n\\u00e9<\\u003e\\u00b7\\ud83d\\ude00}", "urls":%s,"a":{"b":[{}]}}\n', True),
        ('{"a": {"urls": null}, "urls": %s}', True),
        ('{"urls": {}, "urls": %s}', True),
        ('{"a": "\\u0061", "urls": %s}', True),
        ('{"a": "\\u0070", "urls": %s}', True),
        ('{"\\u0075rls": %s}', True),
        ('{"a": "urls", "b": "urls:", "urls": %s}', True),
        ('{"a": "\\"urls\\": {", "urls": %s}', True),
        ('{"urls": [%s]}', False),
        ('{"a": {"urls": %s}}', False),
        ('{"a": {"urls": %s, "b": 1}, "c": 1}', False),
        ('{"a": [{"urls": %s}]}', False),
        ('{"a\\"urls": %s}', False),
        ('{"a": "urls", "get": %s}', False),
        ('{"urls": "%%s", "a": %s}', False),
        ('{"urls": null, "a": %s}', False),
        ('{"a": %s}', False),
        ('{"urls": %s]', False),
        ('{"urls": %s}}', False),
    ],
)
def test_a_glance_tells_what_a_look_at_each_member_tells(text: str, changed: bool) -> None:
    for own in (OWN, PRETTY, OWN.replace("/", "\\/"), OWN.replace("/é", "}"), OWN.replace('"/é"', "[]")):
        before = text % own
        after = text % own.replace(f"{PUBLIC_BASE}/", f"{HERE}/").replace(
            PUBLIC_BASE.replace("/", "\\/") + "\\/", HERE + "/"
        )
        assert rewritten(before, edits=JOB, within="urls") == (after if changed else before)
        assert rewritten(before, edits=JOB, within="urls") == _member_by_member(before)


@pytest.mark.parametrize("own", ["{}", '{"get": 1}', '{"get": {"get": "x"}}', '{"get": "https://elsewhere.test/"}'])
@pytest.mark.parametrize(
    "text", ['{"urls": %s}', '[{"urls": %s}]', ' {"urls": %s}', '\ufeff{"urls": %s}', '"urls": %s}']
)
def test_what_has_no_link_stays(text: str, own: str) -> None:
    assert rewritten(text % own, edits=JOB, within="urls") == text % own


_own = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from([f"{PUBLIC_BASE}/x", "/é", '"', "}", "{", "\\", None])
        for name in ("get", "cancel", "web")
    },
)
_hostile = st.recursive(
    _own | st.sampled_from([1, float("nan"), "urls", '"urls":{', '"urls": {"get": "x"}}', "}", "\\u0075rls", "<é>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["urls", "a", 'a"urls', '"urls', "get", "urls\\"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@unhurried
@given(
    st.dictionaries(st.sampled_from(["id", "urls", "metrics", 'a"urls']), _own | _hostile, min_size=1),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from(["", "\n", "}", "x"]),
)
def test_hostile_answers_change_in_their_links_alone(content: Any, ascii: bool, indent: int | None, end: str) -> None:
    text = json.dumps(content, ensure_ascii=ascii, indent=indent) + end
    assert rewritten(text, edits=JOB, within="urls") == _member_by_member(text)


def test_what_stands_around_links_is_only_passed_over() -> None:
    around = '{"a": %s, "urls": {}, "urls": null, "\\u0075rls": {"g\\u0065t": "%s/x"}}'
    for number in ("7" * 5000, "-1e999999", "0.1000000000000000000000001"):
        result = rewritten(around % (number, PUBLIC_BASE), edits=JOB, within="urls")
        assert result == around % (number, HERE)


# --- URLs


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        *(
            (value, True)
            for value in ("app.example", "APP.Example.", "my_app:8000", "a-b.c", "10.0.0.1:80", "xn--bcher-kva")
        ),
        *((value, True) for value in ("[::1]", "[2001:DB8::1]:8443", "[::ffff:10.0.0.1]", "localhost:65535")),
        *(
            (value, False)
            for value in ("", ":80", "app:", "app:x", "app:65536", "app:123456", "-app", "app-", "a..b", ".a")
        ),
        *(
            (value, False)
            for value in ("a/b", "a@b", "a b", "a?b", "a#b", "a\\b", 'a"b', "b\u00fccher", "a\n", "a%2eb")
        ),
        *((value, False) for value in ("10.0.0", "1.2.3.256", "1.2.3.4.5", "::1", "[::1", "[1.2.3.4]", "[::1%25eth0]")),
        *((value, False) for value in ("a" * 64, "a." * 130 + "a")),
    ],
)
def test_a_host_is_one_of_a_url(value: str, accepted: bool) -> None:
    scope = http_scope()
    scope["headers"] = [(b"host", value.encode("latin-1"))]
    assert reached(scope, "/v1") == (f"http://{value}/v1" if accepted else None)


def test_the_caller_s_own_url() -> None:
    forwarded = [
        (b"x-forwarded-host", b"evil.test"),
        (b"x-forwarded-proto", b"https"),
        (b"forwarded", b"host=evil.test"),
    ]
    scope = http_scope(headers=forwarded)
    assert reached(scope, "/v1") == "http://proxy.test/v1"
    assert reached(scope, "") == "http://proxy.test"
    assert reached({**scope, "scheme": "https"}, "/v1") == "https://proxy.test/v1"
    assert reached({**scope, "scheme": "javascript"}, "/v1") is None
    assert reached({**scope, "headers": forwarded}, "/v1") is None
    assert reached({**scope, "headers": [*scope["headers"], (b"host", b"proxy.test")]}, "/v1") is None
    del scope["scheme"]
    assert reached(scope, "/v1") == "http://proxy.test/v1"
    # What could join the host, or end the URL.
    assert reached({**scope, "path": "api/v1/x", "raw_path": b"api/v1/x", "root_path": "api"}, "/v1") is None


@pytest.mark.parametrize(
    ("target", "root_path", "raw", "above"),
    [
        ("/v1/x", "", True, ""),
        ("/v1/x", None, True, ""),
        ("/v1/x", "/", True, ""),
        # uvicorn and Starlette's mounts keep it in the path
        ("/api/v1/x", "/api", True, "/api"),
        ("/a%20b/c/v1/x", "/a b/c", True, "/a%20b/c"),
        ("/a%20b/v1/x", "/a b", False, "/a%20b"),
        ("/%61pi/v1/x", "/api", True, "/%61pi"),
        ("/api/api/v1/x", "/api", True, "/api"),
        # hypercorn and granian do not
        ("/v1/x", "/api", True, "/api"),
        ("/v1/x", "/api/", True, "/api"),
        ("/v1/x", "/a b/\u00fc", True, "/a%20b/%C3%BC"),
        ("/v1beta", "/v1", True, "/v1"),
    ],
)
def test_what_lies_above_the_prefix(target: str, root_path: str | None, raw: bool, above: str) -> None:
    scope = http_scope(target=target, root_path=root_path)
    if not raw:
        del scope["raw_path"]
    assert root(scope) == above
    assert reached(scope, "/v1") == f"http://proxy.test{above}/v1"


def test_what_lies_above_a_mount_whose_app_has_a_root_too() -> None:
    scope = http_scope(target="/team/v1/x", root_path="/api/team", app_root_path="/api")
    assert root(scope) == "/api/team"


# --- the layer

LIST_BODY = (
    f'{{"next": "{PUBLIC_BASE}/predictions?cursor=b",\n "previous" : null, "results": [{{{NEXT}, {GET}}}]}}'.encode()
)
JOB_BODY = (
    f'{{"id": "a", "input": {{{NEXT}, {GET}}}, "output": ["{PUBLIC_BASE}/files/a"], "urls": {{'
    f'"get": "https:\\/\\/api.replicate.com\\/v1\\/predictions\\/a", "cancel": "{PUBLIC_BASE}/predictions/a/cancel",'
    f' "stream": "https://stream.replicate.com/v1/files/abc", "web": "https://replicate.com/p/a"}}}}'
).encode()
JOB_REWRITTEN = (
    JOB_BODY.replace(b"https:\\/\\/api.replicate.com\\/v1\\/predictions\\/a", b"http://proxy.test/v1/predictions/a")
).replace(f'"{PUBLIC_BASE}/predictions/a/cancel'.encode(), b'"http://proxy.test/v1/predictions/a/cancel')
LIST_REWRITTEN = LIST_BODY.replace(f"{PUBLIC_BASE}/predictions".encode(), b"http://proxy.test/v1/predictions")
JSON = (b"content-type", b"application/json")


class Answered(NamedTuple):
    request: ProxyRequest
    response: ProxyResponse
    chunks: list[bytes]
    closed: int

    @property
    def content(self) -> bytes:
        return b"".join(self.chunks)


async def _ask(
    method: str = "GET",
    target: str = "/predictions",
    body: bytes | AsyncIterator[bytes] = b"{}",
    *headers: tuple[bytes, bytes],
    sent: tuple[tuple[bytes, bytes], ...] = (),
    status: int = 200,
    scope: dict[str, Any] | None = None,
    **options: Any,
) -> Answered:
    """One exchange through the layer, with an upstream that answers `status`, `headers` and `body`."""
    asked: list[ProxyRequest] = []
    closed: list[bool] = []
    body = Arriving([body[:3], body[3:]]) if isinstance(body, bytes) else body

    async def upstream(request: ProxyRequest) -> ProxyResponse:
        async def aclose() -> None:
            closed.append(True)

        asked.append(request)
        return ProxyResponse(status=status, headers=headers or (JSON,), body=body, aclose=aclose)

    scope = scope or http_scope(method, "/v1" + target)
    request = ProxyRequest(
        method=method,
        target=target,
        route=routing.match(method, target.partition("?")[0]),
        headers=sent,
        body=Chunks([]),
        content_length=0,
        key=ReplicateKey(TOKEN),
        portkey=portkey.read([KEY]),
        scope=scope,
    )
    layer = rewrite_links(**{"upstream": "https://upstream.test/v1", "prefix": "/v1", **options})
    response = await layer(upstream)(request)
    chunks = [chunk async for chunk in response.body]
    await response.aclose()
    return Answered(asked[0], response, chunks, len(closed))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/predictions"),
        ("GET", "/predictions?cursor=a"),
        ("GET", "/trainings"),
        ("GET", "/models"),
        ("QUERY", "/models"),
        ("GET", "/models/a/b/versions"),
        ("GET", "/models/a/b/examples"),
        ("GET", "/collections"),
        ("GET", "/deployments"),
        ("GET", "/files"),
    ],
)
async def test_lists(method: str, target: str) -> None:
    answered = await _ask(method, target, LIST_BODY)
    assert answered.content == LIST_REWRITTEN
    assert answered.response.headers == (JSON, (b"content-length", str(len(LIST_REWRITTEN)).encode()))
    assert answered.closed == 1


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/predictions", 201),
        ("POST", "/models/a/b/predictions", 202),
        ("POST", "/deployments/a/b/predictions", 201),
        ("GET", "/predictions/a", 200),
        ("POST", "/predictions/a/cancel", 200),
        ("POST", "/models/a/b/versions/c/trainings", 201),
        ("GET", "/trainings/a", 200),
        ("POST", "/trainings/a/cancel", 200),
    ],
)
async def test_predictions_and_trainings(method: str, target: str, status: int) -> None:
    answered = await _ask(method, target, JOB_BODY, status=status)
    assert answered.content == JOB_REWRITTEN
    assert answered.response.status == status


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("HEAD", "/predictions"),
        ("HEAD", "/predictions/a"),
        ("POST", "/files"),
        ("GET", "/files/a"),
        ("GET", "/models/a/b"),
        ("GET", "/hardware"),
        ("GET", "/search"),
        ("GET", "/x"),
        ("PUT", "/predictions"),
    ],
)
async def test_all_else_is_not_looked_at(method: str, target: str) -> None:
    sent = ((b"accept-encoding", b"gzip"), (b"if-none-match", b'"a"'))
    for body in (LIST_BODY, JOB_BODY):
        answered = await _ask(method, target, body, JSON, (b"etag", b'"a"'), sent=sent)
        assert answered.chunks == [body[:3], body[3:]]
        assert answered.request.headers == sent
        assert answered.response.headers == (JSON, (b"etag", b'"a"'))


async def test_links_below_the_upstream_are_rewritten_too() -> None:
    for upstream in ("https://upstream.test/v1", PUBLIC_BASE + "/below", "https://api.replicate"):
        answered = await _ask(body=b'{"next": "%s/x"}' % upstream.encode(), upstream=upstream)
        assert json.loads(answered.content) == {"next": "http://proxy.test/v1/x"}


@pytest.mark.parametrize(
    ("url", "rest"),
    [
        ("https://api.replicate.com/v1", ""),
        ("https://api.replicate.com/v1/", "/"),
        ("https://api.replicate.com/v1?cursor=a", "?cursor=a"),
        ("https://api.replicate.com/v1beta/x", None),
        ("https://api.replicate.com/v1@evil.test/", None),
        ("https://api.replicate.com/v2/x", None),
        ("http://api.replicate.com/v1/x", None),
        ("/v1/x", None),
        ("", None),
    ],
)
async def test_what_a_link_of_replicate_is(url: str, rest: str | None) -> None:
    answered = await _ask(body=json.dumps({"next": url, "previous": [url]}).encode())
    assert json.loads(answered.content) == {"next": url if rest is None else HERE + rest, "previous": [url]}


async def test_a_public_url_is_taken_as_it_is() -> None:
    for scope in (http_scope(), {**http_scope(), "headers": []}):
        answered = await _ask("GET", "/predictions", LIST_BODY, public_url="https://app.example/r", scope=scope)
        assert json.loads(answered.content)["next"] == "https://app.example/r/predictions?cursor=b"


async def test_without_a_url_links_are_left_alone() -> None:
    location = (b"location", PUBLIC_BASE.encode() + b"/x")
    sent = ((b"accept-encoding", b"gzip"),)
    answered = await _ask(
        "GET", "/predictions", LIST_BODY, JSON, location, sent=sent, scope={**http_scope(), "headers": []}
    )
    assert answered.chunks == [LIST_BODY[:3], LIST_BODY[3:]]
    assert answered.response.headers == (JSON, location)
    assert answered.request.headers == sent


@pytest.mark.parametrize(
    ("method", "target", "status"), [("POST", "/predictions", 202), ("HEAD", "/x", 302), ("GET", "/y", 500)]
)
async def test_the_location_of_any_answer(method: str, target: str, status: int) -> None:
    headers = (
        JSON,
        (b"location", PUBLIC_BASE.encode() + b"/predictions/\xff"),
        (b"etag", b'"a"'),
        (b"location", b"/v1/x"),
    )
    answered = await _ask(method, target, b"{}", *headers, status=status)
    moved = (b"location", b"http://proxy.test/v1/predictions/\xff")
    assert answered.response.headers == (JSON, moved, (b"etag", b'"a"'), (b"location", b"/v1/x"))


async def test_a_location_elsewhere_stays() -> None:
    location = (b"location", b"https://elsewhere.test/x")
    answered = await _ask("GET", "/x", b"{}", JSON, location, status=302)
    assert answered.response.headers == (JSON, location)


async def test_streams_lead_where_they_are_said_to() -> None:
    def stream_path(url: str, id: str | None) -> str | None:
        return "/-/streams/" + url.rpartition("/")[2] if "stream.replicate.com" in url else None

    answered = await _ask("POST", "/predictions", JOB_BODY, stream_path=stream_path)
    stream = b"http://proxy.test/v1/-/streams/abc"
    assert answered.content == JOB_REWRITTEN.replace(b"https://stream.replicate.com/v1/files/abc", stream)
    elsewhere = JOB_BODY.replace(b"stream.replicate.com", b"stream.test")
    answered = await _ask("GET", "/predictions/a", elsewhere, stream_path=stream_path)
    assert b'"https://stream.test/v1/files/abc"' in answered.content
    answered = await _ask("GET", "/trainings/a", JOB_BODY, stream_path=stream_path)
    assert answered.content == JOB_REWRITTEN


@pytest.mark.parametrize(
    ("method", "target", "body", "id"),
    [
        ("POST", "/predictions", JOB_BODY, "a"),
        ("POST", "/deployments/acme/x/predictions", JOB_BODY, "a"),
        ("GET", "/predictions/p1", JOB_BODY, "a"),
        ("GET", "/predictions/p1", JOB_BODY.replace(b'"id"', b'"no"'), "p1"),
        ("POST", "/predictions/p1/cancel", JOB_BODY.replace(b'"a"', b"[5]"), "p1"),
        ("POST", "/predictions", JOB_BODY.replace(b'"id"', b'"no"'), None),
        ("POST", "/predictions", b'{"input": "\xc3\xa9", ' + JOB_BODY[1:].replace(b'"a"', b'"\xc3\xa9"'), "é"),
    ],
)
async def test_streams_are_told_by_the_id_of_their_prediction(
    method: str, target: str, body: bytes, id: str | None
) -> None:
    told: list[tuple[str, str | None]] = []

    def stream_path(url: str, id: str | None) -> str | None:
        told.append((url, id))
        return None

    await _ask(method, target, body, stream_path=stream_path)
    assert told == [("https://stream.replicate.com/v1/files/abc", id)]


# --- headers and encodings

VALIDATORS = ((b"etag", b'"a"'), (b"last-modified", b"Sat, 21 Nov 2026 00:00:00 GMT"), (b"accept-ranges", b"bytes"))
DIGESTS = ((b"content-md5", b"x"), (b"digest", b"x"), (b"content-digest", b"x"), (b"repr-digest", b"x"))


async def test_upstream_is_asked_for_what_can_be_read() -> None:
    sent = (
        (b"accept-encoding", b"br"),
        (b"prefer", b"wait"),
        (b"if-none-match", b'"a"'),
        (b"if-modified-since", b"x"),
        (b"accept-encoding", b"gzip"),
    )
    answered = await _ask("GET", "/predictions", LIST_BODY, sent=sent)
    assert answered.request.headers == ((b"prefer", b"wait"), (b"accept-encoding", b"identity"))


async def test_what_was_said_of_other_bytes_is_dropped() -> None:
    given = (JSON, *VALIDATORS, (b"content-length", b"1000"), *DIGESTS, (b"content-encoding", b"identity"))
    answered = await _ask("GET", "/predictions", LIST_BODY, *given, public_url=HERE)
    assert answered.content == LIST_REWRITTEN
    assert answered.response.headers == (JSON, (b"content-length", str(len(LIST_REWRITTEN)).encode()))


async def test_an_answer_without_links_stays_as_it_is() -> None:
    body = b'{ "next":null,"previous":"https://elsewhere.test/" ,"results":[1e400,"\\u00fc"] }'
    given = (JSON, *VALIDATORS, (b"content-length", b"%d" % len(body)), (b"cache-control", b"max-age=60"))
    answered = await _ask("GET", "/predictions", body, *given)
    assert answered.content == body
    assert answered.response.headers == given


def _deflated(body: bytes) -> bytes:
    return zlib.compress(body)


@pytest.mark.parametrize(
    ("encoding", "encode"), [(b"gzip", gzip.compress), (b"X-GZip", gzip.compress), (b"deflate", _deflated)]
)
async def test_an_answer_that_comes_encoded(encoding: bytes, encode: Callable[[bytes], bytes]) -> None:
    given = (JSON, *VALIDATORS, (b"content-encoding", encoding))
    answered = await _ask("GET", "/predictions", encode(LIST_BODY), *given)
    assert answered.content == LIST_REWRITTEN
    assert answered.response.headers == (JSON, (b"content-length", str(len(LIST_REWRITTEN)).encode()))
    answered = await _ask("GET", "/predictions", encode(b"\xff"), *given)
    assert answered.content == b"\xff"
    assert answered.response.headers == (JSON, (b"content-length", b"1"))


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"br", LIST_BODY),
        (b"gzip, gzip", gzip.compress(gzip.compress(LIST_BODY))),
        (b"gzip", gzip.compress(LIST_BODY)[:-1]),
        (b"gzip", gzip.compress(LIST_BODY) + b"more"),
        (b"gzip", gzip.compress(LIST_BODY) * 2),
        (b"gzip", gzip.compress(LIST_BODY)[:-8] + bytes(8)),
        (b"deflate", LIST_BODY),
        (b"gzip", b""),
    ],
)
async def test_an_encoding_that_cannot_be_undone(encoding: bytes, body: bytes) -> None:
    given = (JSON, *VALIDATORS, (b"content-encoding", encoding))
    answered = await _ask("GET", "/predictions", body, *given)
    assert answered.content == body
    assert answered.response.headers == given


async def test_two_encodings_in_two_lines() -> None:
    given = (JSON, (b"content-encoding", b"gzip"), (b"content-encoding", b"gzip"))
    body = gzip.compress(gzip.compress(LIST_BODY))
    answered = await _ask("GET", "/predictions", body, *given)
    assert (answered.content, answered.response.headers) == (body, given)


@pytest.mark.parametrize(
    ("content_type", "looked_at"),
    [
        (b"application/json; charset=utf-8", True),
        (b"Application/JSON ;x", True),
        (b"application/hal+json", True),
        (b"text/plain", False),
        (b"application/jsonl", False),
        (b"application/json, application/json", False),
        (b"", False),
    ],
)
async def test_only_json_is_looked_at(content_type: bytes, looked_at: bool) -> None:
    answered = await _ask("GET", "/predictions", LIST_BODY, (b"content-type", content_type))
    assert answered.content == (LIST_REWRITTEN if looked_at else LIST_BODY)


@pytest.mark.parametrize("status", [206, 300, 400, 401, 404, 500])
async def test_only_whole_answers_of_success_are_looked_at(status: int) -> None:
    answered = await _ask("GET", "/predictions", LIST_BODY, status=status)
    assert answered.chunks == [LIST_BODY[:3], LIST_BODY[3:]]


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", LIST_BODY.decode().encode("utf-16"), b'{"next": "\xff"}'])
async def test_a_body_that_is_something_else(body: bytes) -> None:
    answered = await _ask("GET", "/predictions", body, JSON, *VALIDATORS)
    assert (answered.content, answered.response.headers) == (body, (JSON, *VALIDATORS))


# --- sizes


def _padded(size: int) -> bytes:
    return LIST_BODY[:-1] + b" " * (size - len(LIST_BODY)) + b"}"


async def test_the_largest_answer_that_is_read() -> None:
    for body, headers in (
        (_padded(MAX_SIZE), ((b"content-length", b"%d" % MAX_SIZE),)),
        (gzip.compress(_padded(MAX_SIZE)), ((b"content-encoding", b"gzip"),)),
    ):
        answered = await _ask("GET", "/predictions", body, JSON, *headers)
        assert b"http://proxy.test" in answered.content[:100]


async def test_an_answer_that_is_longer_once_decoded_passes_encoded() -> None:
    body, headers = gzip.compress(_padded(MAX_SIZE + 1)), (JSON, (b"content-encoding", b"gzip"), *VALIDATORS)
    answered = await _ask("GET", "/predictions", body, *headers)
    assert (answered.content, answered.response.headers) == (body, headers)


@pytest.mark.parametrize("length", [b"%d" % (MAX_SIZE + 1), b"9" * 5000])
async def test_an_answer_that_says_it_is_longer_is_not_read(length: bytes) -> None:
    headers = (JSON, (b"content-length", length))
    answered = await _ask("GET", "/predictions", LIST_BODY, *headers)
    assert answered.chunks == [LIST_BODY[:3], LIST_BODY[3:]]
    assert answered.response.headers == headers


class Counted(Arriving):
    taken = 0

    async def __anext__(self) -> bytes:
        self.taken += 1
        return await super().__anext__()


async def test_an_answer_that_turns_out_longer_is_streamed_from_there() -> None:
    whole = _padded(MAX_SIZE + 4096)
    body = Counted(
        [whole[:1024], whole[1024:MAX_SIZE], b"", whole[MAX_SIZE : MAX_SIZE + 1], whole[MAX_SIZE + 1 :], b"end"]
    )
    taken = []

    async def upstream(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse(status=200, headers=(JSON, *VALIDATORS), body=body)

    layer = rewrite_links(upstream=PUBLIC_BASE, prefix="/v1")
    chunks = []

    def look(forward: Forward) -> Forward:
        async def looking(request: ProxyRequest) -> ProxyResponse:
            response = await layer(upstream)(request)
            taken.append(body.taken)
            async for chunk in response.body:
                taken.append(body.taken)
                chunks.append(chunk)
            assert response.headers == (JSON, *VALIDATORS)
            return ProxyResponse(status=204, headers=(), body=Chunks([]))

        return looking

    assert (
        await call(proxy("http://127.0.0.1:1/v1", layers=[look]), http_scope(target="/v1/predictions"))
    ).status == 204
    assert chunks == [whole[: MAX_SIZE + 1], whole[MAX_SIZE + 1 :], b"end"]
    assert taken == [4, 4, 5, 6]


class Cut(Arriving):
    async def __anext__(self) -> bytes:
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            raise UpstreamAborted() from None


@pytest.mark.parametrize("size", [3, MAX_SIZE + 1])
async def test_an_answer_that_is_cut_stays_cut(size: int) -> None:
    with pytest.raises(UpstreamAborted):
        await _ask("GET", "/predictions", Cut([_padded(MAX_SIZE + 1)[:size]]))


async def test_a_cut_answer_is_a_failure_that_can_be_told(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")

    upstream.script = script
    assert (await call(proxy(upstream.url), http_scope(target="/v1/predictions"))).status == 502


# --- clients on real servers


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"api_url": PUBLIC_BASE, "page_size": 2, "queue_time": 0, "run_time": 0}


def _proxied(fake: FakeReplicate, **options: Any) -> dict[str, Any]:
    """The keywords of the middleware and the plugin."""
    return {
        "key_resolver": StaticKeyResolver(fake.token, api_keys=["pk-team-a"]),
        "config": ProxyConfig(upstream=fake.url, **options),
    }


def _bare(fake: FakeReplicate) -> Any:
    return ReplicateProxyMiddleware(host, **_proxied(fake))


def _fastapi(fake: FakeReplicate) -> Any:
    app = FastAPI()
    app.add_middleware(ReplicateProxyMiddleware, **_proxied(fake))
    return app


def _mount(fake: FakeReplicate) -> Any:
    app = ReplicateProxyMiddleware(host, **_proxied(fake))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await app.aclose()

    return Starlette(routes=[Mount("/team", app)], lifespan=lifespan)


def _litestar(fake: FakeReplicate) -> Any:
    return Litestar(plugins=[ReplicateProxyPlugin(**_proxied(fake))], logging_config=None)


HOSTS = [(_bare, ""), (_fastapi, ""), (_mount, "/team"), (_litestar, "")]


@pytest.fixture(params=HOSTS, ids=["bare", "fastapi", "mount", "litestar"])
def base_url(request: pytest.FixtureRequest, fake_replicate: FakeReplicate) -> Iterator[str]:
    make, path = request.param
    with serve(make(fake_replicate)) as served:
        yield served.url + path


@pytest.fixture
def client(base_url: str) -> Iterator[Client]:
    """Without `/v1`, as Replicate's SDK takes its base URL; it has no way of closing what it opens."""
    client = Client(api_token="pk-team-a", base_url=base_url)
    with client._client:
        yield client


def _to_the_end(first: Any, follow: Callable[[str], Any], base_url: str) -> list[Any]:
    page, found = first, [*first.results]
    while page.next:
        assert page.next.startswith(f"{base_url}/v1/")
        page = follow(page.next)
        assert page.previous.startswith(f"{base_url}/v1/")
        found += page.results
    return found


def test_replicate_s_client_stays_on_the_proxy(client: Client, base_url: str, fake_replicate: FakeReplicate) -> None:
    model = client.models.get("replicate/hello-world")
    assert model.latest_version is not None
    made = [client.predictions.create(version=model.latest_version.id, input={"text": "Ada"}) for _ in range(5)]
    for prediction in made:
        own = f"{base_url}/v1/predictions/{prediction.id}"
        assert prediction.urls is not None
        assert (prediction.urls["get"], prediction.urls["cancel"]) == (own, f"{own}/cancel")
    listed = _to_the_end(client.predictions.list(), client.predictions.list, base_url)
    assert {prediction.id for prediction in listed} == {prediction.id for prediction in made}
    assert all(prediction.urls["get"].startswith(PUBLIC_BASE) for prediction in listed)
    models = _to_the_end(client.models.list(), client.models.list, base_url)
    assert len(models) > 4
    assert {request.header("authorization") for request in fake_replicate.requests} == {
        f"Bearer {fake_replicate.token}"
    }
    count = [request.operation for request in fake_replicate.requests].count
    assert (count("predictions.list"), count("models.list")) == (3, -(-len(models) // 2))


def test_files_keep_the_links_that_replicate_s_workers_fetch(client: Client) -> None:
    file = client.files.create(io.BytesIO(b"abc"))
    assert file.urls["get"] == client.files.get(file.id).urls["get"] == f"{PUBLIC_BASE}/files/{file.id}"


@pytest.mark.parametrize(
    ("target", "root_path", "next_page"),
    [
        ("/api/v1/models", "/api", "http://proxy.test/api/v1/models?"),
        ("/a%20b/v1/models", "/a b", "http://proxy.test/a%20b/v1/models?"),
        ("/v1/models", "/api", "http://proxy.test/api/v1/models?"),
    ],
)
async def test_below_a_root_path(fake_replicate: FakeReplicate, target: str, root_path: str, next_page: str) -> None:
    app = _bare(fake_replicate)
    caller = await call(app, http_scope(target=target, root_path=root_path))
    assert json.loads(caller.content)["next"].startswith(next_page)
    assert caller.header(b"content-length") == [b"%d" % len(caller.content)]


async def test_a_mount_with_no_prefix_of_its_own(fake_replicate: FakeReplicate) -> None:
    app = ReplicateProxyMiddleware(host, **_proxied(fake_replicate, prefix=""))
    caller = await call(app, http_scope(target="/replicate/models", root_path="/replicate"))
    assert json.loads(caller.content)["next"].startswith("http://proxy.test/replicate/models?")
