from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import PermissionDenied, Policy, ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.checks import ALLOW, Check, Checked, Verdict
from replicate_proxy_mw.checks.lists import AT_ONCE
from replicate_proxy_mw.layers.guardrails import guardrails
from replicate_proxy_mw.testing import FakeReplicate
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.tenants import JSON, answers, sends

pytestmark = pytest.mark.anyio

HELLO = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
WAIT = (b"prefer", b"wait=5")
BODY = (
    b'{ "version":"replicate/hello-world:%s",\n "input" : {"text": "Ada", "x": 1.50, "y":"\\u00e9"} }' % HELLO.encode()
)
OUTPUT = b'{ "id":"p1",\n"status" : "succeeded", "model":"a/b", "version": "v1", "x": 1.50, "output" : ["secret"] }\n'


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN: "acme"}, "queue_time": 0, "run_time": 0, "api_url": "https://api.replicate.com/v1"}


class Seen:
    """A check that keeps what it is asked, and says what it is told to."""

    def __init__(self, verdict: object = ALLOW, *, name: str = "seen") -> None:
        self.name, self.verdict = name, verdict
        self.asked: list[Checked] = []

    async def __call__(self, checked: Checked) -> Any:
        self.asked.append(checked)
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


async def hangs(checked: Checked) -> Verdict:
    await anyio.sleep_forever()
    raise AssertionError


def _not_async(checked: Checked) -> Any:
    return ALLOW


def _app(upstream: str, *, keywords: dict[str, Any] | None = None, options: Any = None, **layer: Any) -> Any:
    return proxy(upstream, layers=[guardrails(**layer)], options=options, **(keywords or {}))


async def _post(app: Any, body: bytes = BODY, target: str = "/v1/predictions", *headers: tuple[bytes, bytes]) -> Caller:
    return await call(app, http_scope("POST", target, [KEY, JSON, *headers]), body)


async def _get(app: Any, target: str = "/v1/predictions/p1", method: str = "GET") -> Caller:
    return await call(app, http_scope(method, target, [KEY]))


def _error(caller: Caller) -> tuple[int | None, str, str]:
    error = json.loads(caller.content)["error"]
    return caller.status, error["code"], error["message"]


def _hooks(caller: Caller, which: str) -> Any:
    [hook] = json.loads(caller.content)["hook_results"][which]
    return hook


# --- inputs


async def test_an_allowed_input_goes_up_and_its_answer_comes_down_as_they_are(upstream: RawUpstream) -> None:
    upstream.script = answers(OUTPUT, b"201 Created")
    first, second = Seen(), Seen()
    caller = await _post(_app(upstream.url, input=[first], output=[second]))
    assert (caller.status, caller.content) == (201, OUTPUT)
    assert [one.body for one in upstream.requests] == [BODY]
    assert [one.value for one in first.asked] == [{"text": "Ada", "x": 1.5, "y": "é"}]
    assert [one.value for one in second.asked] == [["secret"]]


async def test_a_check_is_told_who_calls_for_what(fake_replicate: FakeReplicate) -> None:
    seen, output = Seen(), Seen()
    app = _app(fake_replicate.url, input=[seen], output=[output])
    caller = await _post(app, BODY, "/v1/predictions", (b"x-portkey-metadata", b'{"_user": "ada"}'), WAIT)
    [asked], [made] = seen.asked, output.asked
    assert (asked.kind, asked.tenant, asked.operation) == ("input", "team-a", "predictions.create")
    assert (asked.model, asked.version, asked.prediction_id) == ("replicate/hello-world", HELLO, None)
    assert asked.metadata == {"_user": "ada"}
    assert asked.identity == ReplicateKey(TOKEN, tenant="team-a").identity()
    assert "Ada" not in repr(asked)
    assert (made.kind, made.value, made.model, made.version) == ("output", "hello Ada", "replicate/hello-world", HELLO)
    assert made.prediction_id == json.loads(caller.content)["id"]


@pytest.mark.parametrize(
    ("target", "body", "model", "version"),
    [
        ("/predictions", {"version": "a/b"}, "a/b", None),
        ("/predictions", {"version": "a/b", "model": "a/b"}, "a/b", None),
        ("/predictions", {"version": HELLO}, None, HELLO),
        ("/models/a/b/predictions", {}, "a/b", None),
        ("/deployments/a/b/predictions", {}, "deployments/a/b", None),
        (f"/models/a/b/versions/{HELLO}/trainings", {"destination": "c/d"}, "a/b", HELLO),
    ],
)
async def test_each_create_is_checked_for_its_model(
    upstream: RawUpstream, target: str, body: dict[str, Any], model: str | None, version: str | None
) -> None:
    seen = Seen(Verdict.deny("no"))
    caller = await _post(_app(upstream.url, input=[seen]), json.dumps({**body, "input": [1]}).encode(), "/v1" + target)
    assert caller.status == 446
    assert [(one.value, one.model, one.version) for one in seen.asked] == [([1], model, version)]
    assert upstream.connections == []


async def test_a_create_without_input_is_checked_as_none(upstream: RawUpstream) -> None:
    seen = Seen()
    app = _app(upstream.url, input=[seen])
    for body in (b"", b"{}", b'{"input":null}'):
        assert (await _post(app, body, "/v1/models/a/b/predictions")).status == 200
    assert [one.value for one in seen.asked] == [None] * 3


async def test_a_denied_input_is_answered_with_the_reason(upstream: RawUpstream) -> None:
    app = _app(upstream.url, input=[Seen(name="first"), Seen(Verdict.deny("not that"), name="second")])
    caller = await _post(app)
    assert _error(caller) == (446, "hooks_failed", "guardrails: second: not that")
    assert json.loads(caller.content)["error"]["type"] == "hooks_failed"
    hook = _hooks(caller, "before_request_hooks")
    assert (hook["verdict"], hook["deny"], hook["type"], hook["async"]) == (False, True, "guardrail", False)
    assert [(one["id"], one["verdict"], one["data"], one["error"]) for one in hook["checks"]] == [
        ("first", True, None, None),
        ("second", False, {"explanation": "not that"}, None),
    ]
    assert json.loads(caller.content)["hook_results"]["after_request_hooks"] == []
    assert upstream.connections == []


async def test_a_flagged_input_goes_up_and_its_answer_says_so(upstream: RawUpstream) -> None:
    upstream.script = answers(
        b' {"id":"p1", "x":1.50, "output":null } ', b"201 Created", b'etag: "x"\r\nlocation: /x\r\n'
    )
    caller = await _post(_app(upstream.url, input=[Seen(Verdict.flag("careful"))]))
    assert caller.status == 246
    assert caller.content.startswith(b' {"id":"p1", "x":1.50, "output":null,"hook_results":{')
    assert _hooks(caller, "before_request_hooks")["checks"][0]["data"] == {"explanation": "careful"}
    assert caller.header(b"content-length") == [str(len(caller.content)).encode()]
    assert (caller.header(b"etag"), caller.header(b"location")) == ([], [b"/x"])
    assert upstream.requests[0].header(b"accept-encoding") == [b"identity"]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 422 No\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}", 422),
        (b"HTTP/1.1 201 Yes\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\n{}", 201),
        (b"HTTP/1.1 201 Yes\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n[]", 201),
        (b"HTTP/1.1 204 Yes\r\n\r\n", 204),
    ],
)
async def test_a_flag_does_not_change_an_answer_that_is_an_error_or_no_object(
    upstream: RawUpstream, answer: bytes, status: int
) -> None:
    upstream.script = sends(answer)
    caller = await _post(_app(upstream.url, input=[Seen(Verdict.flag("careful"))]))
    assert (caller.status, caller.content) == (status, answer.partition(b"\r\n\r\n")[2])


UNREADABLE = {
    "twice": (b'{"version":"a/b","input":{},"input":{}}', JSON, ()),
    "twice within": (b'{"version":"a/b","input":{"a":1,"a":2}}', JSON, ()),
    "another spelling": (b'{"version":"a/b","Input":{}}', JSON, ()),
    "a control character": (b'{"version":"a/b","inp\\u0000ut":{}}', JSON, ()),
    "wrapped": (b'{"data":{"version":"a/b","input":{}}}', JSON, ()),
    "not a number": (b'{"version":"a/b","input":{"a":NaN}}', JSON, ()),
    "digits": (b'{"version":"a/b","input":{"a":%s}}' % (b"1" * 5000), JSON, ()),
    "no object": (b"[]", JSON, ()),
    "not JSON": (b"{", JSON, ()),
    "two models": (b'{"version":"a/b","model":"c/d","input":{}}', JSON, ()),
    "UTF-16": ('{"version":"a/b","input":{}}'.encode("utf-16"), JSON, ()),
    "a form": (b"input=x", (b"content-type", b"application/x-www-form-urlencoded"), ()),
    "a charset": (b'{"version":"a/b","input":{}}', (b"content-type", b"application/json; charset=utf-7"), ()),
    "encoded": (gzip.compress(b'{"version":"a/b","input":{}}'), JSON, ((b"content-encoding", b"gzip"),)),
    "too long": (b'{"version":"a/b","input":{"a":"%s"}}' % (b"x" * (1 << 20)), JSON, ()),
}


@pytest.mark.parametrize(("body", "content_type", "more"), UNREADABLE.values(), ids=UNREADABLE)
async def test_an_input_that_can_be_read_in_two_ways_or_none_is_not_sent(
    upstream: RawUpstream, body: bytes, content_type: tuple[bytes, bytes], more: tuple[tuple[bytes, bytes], ...]
) -> None:
    scope = http_scope("POST", "/v1/predictions", [KEY, content_type, *more])
    seen = Seen()
    caller = await call(_app(upstream.url, input=[seen], options={"unwrap_data": False}), scope, body)
    status, code, message = _error(caller)
    assert (status, code) == (503, "guardrail_failed")
    assert message.endswith("so what goes in cannot be checked; nothing was sent.")
    assert caller.header(b"retry-after") == []
    assert upstream.connections == []
    caller = await call(_app(upstream.url, input=[seen], fail_open=True, options={"unwrap_data": False}), scope, body)
    assert caller.status == 200
    assert upstream.requests[0].body == body
    assert seen.asked == []


async def test_what_the_proxy_unwraps_is_checked_unwrapped(upstream: RawUpstream) -> None:
    seen = Seen()
    assert (await _post(_app(upstream.url, input=[seen]), b'{"data":%s}' % BODY)).status == 200
    assert [one.value["text"] for one in seen.asked] == ["Ada"]
    assert upstream.requests[0].body == BODY


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/predictions/"),
        ("POST", "/v1/Predictions"),
        ("POST", "/v1/%2570redictions"),
        ("PUT", "/v1/x"),
        ("GET", "/v1/predictions/p1/"),
        ("GET", "/v1/files/%252e%252e%252fpredictions%252fp1"),
    ],
)
async def test_a_path_that_is_not_known_is_refused(upstream: RawUpstream, method: str, target: str) -> None:
    scope = http_scope(method, target, [(b"authorization", b"Bearer pk-team-a"), JSON])
    checks: dict[str, Any] = {"input": [Seen()], "output": [Seen()]}
    caller = await call(_app(upstream.url, **checks), scope, BODY)
    assert _error(caller)[:2] == (403, "permission_denied")
    assert upstream.connections == []
    assert (await call(_app(upstream.url, fail_open=True, **checks), scope, BODY)).status == 200


@pytest.mark.parametrize(
    ("method", "target"), [("GET", "/v1/x"), ("GET", "/v1/files/%252e"), ("HEAD", "/v1/x"), ("OPTIONS", "/v1/x")]
)
async def test_a_read_of_whatever_it_may_be_passes_checks_of_inputs(
    upstream: RawUpstream, method: str, target: str
) -> None:
    assert (await _get(_app(upstream.url, input=[Seen(Verdict.deny("no"))]), target, method)).status == 200


@pytest.mark.parametrize("target", ["/v1/account", "/v1/models/a/b", "/v1/trainings/t1", "/v1/files/f1"])
async def test_what_is_no_prediction_passes_unread(upstream: RawUpstream, target: str) -> None:
    upstream.script = answers(OUTPUT)
    deny = Seen(Verdict.deny("no"))
    caller = await _get(_app(upstream.url, input=[deny], output=[deny]), target)
    assert (caller.status, caller.content, deny.asked) == (200, OUTPUT, [])


async def test_without_checks_nothing_is_looked_at(upstream: RawUpstream) -> None:
    app = _app(upstream.url)
    assert (await _post(app, b"{", "/v1/predictions/")).status == 200


# --- outputs


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v1/predictions/p1"), ("POST", "/v1/predictions/p1/cancel"), ("POST", "/v1/predictions")],
)
@pytest.mark.parametrize("status", [b"succeeded", b"processing", b"failed"])
async def test_a_denied_output_is_in_no_answer(upstream: RawUpstream, method: str, target: str, status: bytes) -> None:
    upstream.script = answers(OUTPUT.replace(b"succeeded", status))
    deny = Seen(Verdict.deny("not that"))
    caller = await call(_app(upstream.url, output=[deny]), http_scope(method, target, [KEY, JSON]), BODY)
    assert _error(caller) == (446, "hooks_failed", "guardrails: output of p1: seen: not that")
    assert _hooks(caller, "after_request_hooks")["deny"] is True
    assert b"secret" not in caller.content
    [asked] = deny.asked
    assert (asked.prediction_id, asked.model, asked.version) == ("p1", "a/b", "v1")


async def test_a_flagged_output_comes_with_its_hook_results(upstream: RawUpstream) -> None:
    upstream.script = answers(OUTPUT, b"201 Created")
    caller = await _post(_app(upstream.url, input=[Seen(Verdict.flag("i"))], output=[Seen(Verdict.flag("o"))]))
    assert caller.status == 246
    assert caller.content.startswith(OUTPUT.rstrip().removesuffix(b" }") + b',"hook_results":{')
    for which, reason in (("before_request_hooks", "i"), ("after_request_hooks", "o")):
        hook = _hooks(caller, which)
        assert (hook["verdict"], hook["deny"]) == (False, False)
        assert hook["checks"][0]["data"] == {"explanation": reason}


async def test_an_answer_without_output_passes_as_it_is(upstream: RawUpstream) -> None:
    body = b'{ "id":"p1","output":null,"x":1.50}'
    upstream.script = answers(body, b"201 Created")
    deny = Seen(Verdict.deny("no"))
    for caller in (await _post(_app(upstream.url, output=[deny])), await _get(_app(upstream.url, output=[deny]))):
        assert (caller.status, caller.content) == (201, body)
    assert deny.asked == []


async def test_a_head_passes(upstream: RawUpstream) -> None:
    assert (await _get(_app(upstream.url, output=[Seen(Verdict.deny("no"))]), method="HEAD")).status == 200


async def test_the_answer_is_asked_for_whole_and_plain(upstream: RawUpstream) -> None:
    upstream.script = answers(OUTPUT)
    odd = [(b"range", b"bytes=1-"), (b"if-none-match", b'"x"'), (b"if-match", b'"y"'), (b"accept-encoding", b"br")]
    await call(_app(upstream.url, output=[Seen()]), http_scope("GET", "/v1/predictions/p1", [KEY, *odd]))
    names = {name for name, _ in upstream.requests[0].headers}
    assert not names & {b"range", b"if-none-match", b"if-match"}
    assert upstream.requests[0].header(b"accept-encoding") == [b"identity"]


async def test_an_output_is_checked_that_comes_encoded_all_the_same(upstream: RawUpstream) -> None:
    seen = Seen()
    upstream.script = answers(gzip.compress(OUTPUT), headers=b"content-encoding: gzip\r\n")
    caller = await _get(_app(upstream.url, output=[seen]))
    assert (caller.status, caller.content) == (200, OUTPUT)
    assert [one.value for one in seen.asked] == [["secret"]]


_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"


def _sent(body: bytes, headers: bytes = b"", *, content_type: bytes = b"application/json") -> bytes:
    return (_HEAD % (headers, len(body))).replace(b"application/json", content_type) + body


@pytest.mark.parametrize(
    "answer",
    [
        _sent(b"event: output\ndata: secret\n\n", content_type=b"text/event-stream"),
        _sent(OUTPUT, content_type=b"text/html"),
        _sent(OUTPUT, b"content-encoding: br\r\n"),
        _sent(b"\x1f\x8b damaged", b"content-encoding: gzip\r\n"),
        _sent(b'{"output":"secret","output":null}'),
        _sent(b'{"output":{"a":"secret","a":1}}'),
        _sent(b'["secret"]'),
        _sent(b'{"output":"secret"'),
        _sent(b'{"output":"secret\xff"}'),
        _sent(b'{"output":"secret%s"}' % (b"x" * (8 << 20))),
    ],
)
async def test_an_answer_that_cannot_be_read_is_not_shown(upstream: RawUpstream, answer: bytes) -> None:
    upstream.script = sends(answer)
    caller = await _get(_app(upstream.url, output=[Seen()]))
    assert _error(caller)[:2] == (503, "guardrail_failed")
    assert b"secret" not in caller.content
    caller = await _get(_app(upstream.url, output=[Seen()], fail_open=True))
    assert (caller.status, caller.content) == (200, answer.partition(b"\r\n\r\n")[2])


async def test_a_long_output_is_checked(upstream: RawUpstream) -> None:
    body = b'{"id":"p1","output":"%s"}' % (b"x" * (2 << 20))
    upstream.script = answers(body)
    seen = Seen(Verdict.flag("long"))
    caller = await _get(_app(upstream.url, output=[seen]))
    assert (caller.status, [len(one.value) for one in seen.asked]) == (246, [2 << 20])


async def test_only_a_poll_is_to_be_tried_again_when_a_check_fails(upstream: RawUpstream) -> None:
    upstream.script = answers(OUTPUT.replace(b'"p1"', b'"p 1"'))
    app = _app(upstream.url, output=[Seen(OSError("hunter2"))])
    poll, create = await _get(app), await _post(app)
    for caller in (poll, create):
        message = "guardrails: output of this prediction: a check failed; read it again."
        assert _error(caller) == (503, "guardrail_failed", message)
        assert b"secret" not in caller.content
    assert (poll.header(b"retry-after"), create.header(b"retry-after")) == ([b"1"], [])
    assert create.header(b"x-should-retry") == [b"false"]


# --- lists


_PAGE = (
    b'{ "next":null, "results" : [ {"id":"p1", "x":1.50, "output" : "good", "logs":"l"},\n'
    b'{"id":"p2","output":{"a": "bad"},"logs":"bad","error":null} , {"id":"p3","output":"odd"}, {"id":"p4","output":'
    b'null}, null, {"id":"p5","output":"broken"} ] , "previous":null}'
)


async def _by_value(checked: Checked) -> Verdict:
    text = json.dumps(checked.value)
    if "broken" in text:
        raise OSError("hunter2")
    return Verdict.deny("bad") if "bad" in text else Verdict.flag("odd") if "odd" in text else ALLOW


async def test_a_list_is_shown_without_what_is_denied_in_it(upstream: RawUpstream) -> None:
    upstream.script = answers(_PAGE)
    caller = await _get(_app(upstream.url, output=[_by_value]), "/v1/predictions")
    assert caller.status == 200
    assert caller.content.startswith(_PAGE.partition(b"\n")[0] + b'\n{"id":"p2","output":null,"logs":"","error":null,')
    assert caller.content.endswith(b'} ] , "previous":null}')
    page = json.loads(caller.content)
    shown = [one and (one["id"], one["output"], "hook_results" in one) for one in page["results"]]
    assert shown == [
        *(("p1", "good", False), ("p2", None, True), ("p3", "odd", True), ("p4", None, False), None),
        ("p5", None, True),
    ]
    [hook] = page["results"][1]["hook_results"]["after_request_hooks"]
    assert (hook["deny"], hook["checks"][0]["data"]) == (True, {"explanation": "bad"})
    [hook] = page["results"][5]["hook_results"]["after_request_hooks"]
    assert hook["checks"][0]["error"] == {"name": "CheckFailed", "message": "This check failed."}
    assert caller.header(b"content-length") == [str(len(caller.content)).encode()]


async def test_a_list_of_allowed_outputs_is_unchanged(upstream: RawUpstream) -> None:
    upstream.script = answers(_PAGE)
    caller = await _get(_app(upstream.url, output=[Seen()]), "/v1/predictions?cursor=x")
    assert (caller.status, caller.content) == (200, _PAGE)


async def test_a_list_shows_what_could_not_be_checked_only_by_option(upstream: RawUpstream) -> None:
    upstream.script = answers(_PAGE)
    seen = Seen(OSError("hunter2"))
    caller = await _get(_app(upstream.url, output=[seen], fail_open=True), "/v1/predictions")
    assert (caller.status, caller.content) == (200, _PAGE)
    caller = await _get(_app(upstream.url, output=[seen]), "/v1/predictions")
    assert [one["output"] for one in json.loads(caller.content)["results"] if one] == [None] * 5


async def test_the_checks_of_a_list_share_one_time_limit(upstream: RawUpstream) -> None:
    begun: list[Checked] = []

    async def begins(checked: Checked) -> Verdict:
        await anyio.lowlevel.checkpoint()
        begun.append(checked)
        return await hangs(checked)

    upstream.script = answers(json.dumps({"results": [{"id": "p", "output": "x"}] * 100}).encode())
    caller = await _get(_app(upstream.url, output=[begins], timeout=0.2), "/v1/predictions")
    assert [one["output"] for one in json.loads(caller.content)["results"]] == [None] * 100
    assert len(begun) == AT_ONCE


async def test_a_refusal_by_a_check_refuses_the_list(upstream: RawUpstream) -> None:
    upstream.script = answers(_PAGE)
    caller = await _get(_app(upstream.url, output=[Seen(PermissionDenied("not you"))]), "/v1/predictions")
    assert _error(caller) == (403, "permission_denied", "not you")


@pytest.mark.parametrize("page", [b"{}", b'{"results":{}}', b'{"results":[],"results":[{"output":"bad"}]}'])
async def test_a_list_that_is_none_is_not_shown(upstream: RawUpstream, page: bytes) -> None:
    upstream.script = answers(page)
    assert _error(await _get(_app(upstream.url, output=[Seen()]), "/v1/predictions"))[0] == 503


async def test_what_another_tenant_s_predictions_are_flagged_for_stays_with_them(fake_replicate: FakeReplicate) -> None:
    flag = Seen(Verdict.flag("odd"))
    keys = {name: ReplicateKey(TOKEN, tenant=name, policy=Policy(own_predictions=True)) for name in ("a", "b")}
    app = _app(
        fake_replicate.url,
        keywords={"key_resolver": StaticKeyResolver(keys["a"], api_keys=["pk-team-a"])},
        output=[flag],
    )
    other = proxy(fake_replicate.url, key_resolver=StaticKeyResolver(keys["b"], api_keys=["pk-team-a"]))
    assert (await _post(other, BODY, "/v1/predictions", WAIT)).status == 201
    assert json.loads((await _get(app, "/v1/predictions")).content)["results"] == []
    assert len(flag.asked) == 1


# --- what comes of checks


class Stop(Exception):
    pass


OUTCOMES: dict[str, Check] = {
    "allow": Seen(),
    "flag": Seen(Verdict.flag("f")),
    "deny": Seen(Verdict.deny("d")),
    "raise": Seen(Stop("hunter2")),
    "hang": hangs,
    "nothing": Seen(None),
    "text": Seen("allow"),
    "not async": _not_async,
    "refuse": Seen(PermissionDenied("not you")),
}


def _expected(outcomes: list[str], *, fail_open: bool) -> int:
    if "refuse" in outcomes:
        return 403
    if "deny" in outcomes:
        return 446
    if not fail_open and not set(outcomes) <= {"allow", "flag"}:
        return 503
    return 246 if "flag" in outcomes else 201


class _Recorder:
    """An upstream that answers each create with the same finished prediction."""

    def __init__(self, answer: bytes = OUTPUT) -> None:
        self.answer, self.bodies = answer, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message, body = {"more_body": True}, b""
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        self.bodies.append(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.answer))]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer})


def _through(upstream: Any, **layer: Any) -> Any:
    return _app("https://upstream.test/v1", keywords={"transport": httpx.ASGITransport(app=upstream)}, **layer)


@given(
    inputs=st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=3),
    outputs=st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=3),
    fail_open=st.booleans(),
    backend=st.sampled_from(["asyncio", "trio"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_of_checks_has_its_answer(
    inputs: list[str], outputs: list[str], fail_open: bool, backend: str
) -> None:
    upstream = _Recorder()
    app = _through(
        upstream,
        input=[OUTCOMES[one] for one in inputs],
        output=[OUTCOMES[one] for one in outputs],
        timeout=0.02,
        fail_open=fail_open,
    )
    caller = anyio.run(_post, app, backend=backend)
    before, after = _expected(inputs, fail_open=fail_open), _expected(outputs, fail_open=fail_open)
    assert caller.status == (before if before not in (201, 246) else max(before, after))
    assert upstream.bodies == ([BODY] if before in (201, 246) else [])
    if caller.status == 201:
        assert caller.content == OUTPUT
    elif caller.status != 246:
        assert b"secret" not in caller.content
    assert b"hunter2" not in caller.content


async def test_a_check_that_fails_is_logged_by_class_name(
    upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    app = _app(upstream.url, input=[Seen(Stop("hunter2"), name="a"), hangs, Seen(7, name="b")], timeout=0.05)
    with caplog.at_level(logging.ERROR, "replicate_proxy_mw"):
        assert _error(await _post(app)) == (
            503,
            "guardrail_failed",
            "guardrails: a check failed; nothing was sent, try again.",
        )
    assert sorted(one.message for one in caplog.records) == [
        "guardrails: a failed: Stop",
        "guardrails: b failed: it returned int",
        "guardrails: hangs failed: TimeoutError",
    ]
    assert upstream.connections == []


@pytest.mark.parametrize(
    ("inputs", "outputs", "fail_open", "verdict", "check"),
    [
        (["allow"], ["allow"], False, "allow", None),
        (["flag"], ["allow"], False, "flag", "flag"),
        (["allow", "deny"], ["allow"], False, "deny", "deny"),
        (["flag"], ["deny"], False, "deny", "deny"),
        (["raise"], ["allow"], False, "deny", "raise"),
        (["raise"], ["allow"], True, "allow", "raise"),
        (["raise"], ["flag"], True, "flag", "flag"),
        (["flag"], ["raise"], True, "flag", "flag"),
    ],
)
async def test_the_verdict_and_its_check_stand_on_the_span(
    upstream: RawUpstream,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    inputs: list[str],
    outputs: list[str],
    fail_open: bool,
    verdict: str,
    check: str | None,
) -> None:
    upstream.script = answers(OUTPUT, b"201 Created")
    verdicts = {"allow": ALLOW, "flag": Verdict.flag("f"), "deny": Verdict.deny("d"), "raise": Stop()}
    app = _app(
        upstream.url,
        keywords={"tracer_provider": tracer_provider},
        input=[Seen(verdicts[one], name=one) for one in inputs],
        output=[Seen(verdicts[one], name=one) for one in outputs],
        fail_open=fail_open,
    )
    await _post(app)
    [attributes] = [
        one.attributes or {}
        for one in exporter.get_finished_spans()
        if "replicate_proxy.guardrail.verdict" in (one.attributes or {})
    ]
    assert attributes["replicate_proxy.guardrail.verdict"] == verdict
    assert attributes.get("replicate_proxy.guardrail.check") == check


# --- what a check may ask


async def _asking(app_of: Callable[[Check], Any], target: str) -> Any:
    got: list[Any] = []

    async def asks(checked: Checked) -> Verdict:
        got.append(await checked.get(target))
        return ALLOW

    assert (await _post(app_of(asks))).status == 201
    return got[0]


async def test_a_check_asks_replicate_with_the_caller_s_key(fake_replicate: FakeReplicate) -> None:
    def app_of(check: Check) -> Any:
        return _app(fake_replicate.url, input=[check])

    assert (await _asking(app_of, "/account"))["username"] == "acme"
    assert (await _asking(app_of, "/models?cursor="))["results"]
    assert await _asking(app_of, "/models/no/such") is None
    fake_replicate.fail(200, operation="account.get", body=b"<html>")
    assert await _asking(app_of, "/account") is None
    fake_replicate.fail(202, operation="account.get", body=b"{}", content_type="application/json")
    assert await _asking(app_of, "/account") is None
    assert await _asking(app_of, "") is None


async def test_a_check_gets_nothing_where_replicate_cannot_be_asked(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.line.startswith(b"GET"):
                return
            connection.answer(OUTPUT, status=b"201 Created")

    upstream.script = script
    assert await _asking(lambda check: _app(upstream.url, input=[check]), "/account") is None

    def cut(connection: Connection) -> None:
        while request := connection.request():
            if request.line.startswith(b"GET"):
                connection.send(_HEAD % (b"", 10) + b"{")
                return
            connection.answer(OUTPUT, status=b"201 Created")

    upstream.script = cut
    assert await _asking(lambda check: _app(upstream.url, input=[check]), "/account") is None


@pytest.mark.parametrize("target", ["account", "/../account", "/a b", "/ü", "/a#b"])
async def test_a_check_that_asks_for_no_target_fails(upstream: RawUpstream, target: str) -> None:
    async def asks(checked: Checked) -> Verdict:
        await checked.get(target)
        return ALLOW

    assert _error(await _post(_app(upstream.url, input=[asks])))[0] == 503
    assert upstream.connections == []


# --- whatever the body looks like

_WORD = "forbidden"
_BAD: dict[str, Any] = {"prompt": _WORD}
_TARGETS = (
    *("/v1/predictions", "/v1/models/a/b/predictions", "/v1/deployments/a/b/predictions", "/v1/pre%64ictions"),
    *(f"/v1/models/a/b/versions/{HELLO}/trainings", "/v1predictions", "/v1//predictions", "/v1/predictions/"),
    *("/v1/predictions?input=x", "/v1/models/a%2Fb/predictions", "/v1/PREDICTIONS", "/v1/predictions%252F"),
)
_TYPES = (
    *("application/json", "application/json; charset=utf-8", "application/json;charset=utf-16", "text/plain", ""),
    *(
        "application/json, text/plain",
        "application/x-www-form-urlencoded",
        "APPLICATION/JSON",
        "application/problem+json",
    ),
)


async def _no_such_word(checked: Checked) -> Verdict:
    return Verdict.deny("no") if _WORD in json.dumps(checked.value) else ALLOW


@st.composite
def _members(draw: st.DrawFn) -> list[tuple[str, Any]]:
    names = st.sampled_from(["input", "Input", "INPUT", "inp\x00ut", "input ", "\u0131nput", "input\ud800"])
    values = st.sampled_from([_BAD, {"prompt": "fine"}, [_WORD], _WORD, {_WORD: 1}, None])
    made = draw(st.lists(st.tuples(names, values), min_size=1, max_size=3))
    more = draw(st.lists(st.sampled_from([("version", "a/b"), ("version", HELLO), ("model", "a/b")]), max_size=2))
    return draw(st.permutations([*made, ("destination", "a/c"), *more]))


def _written(pairs: list[tuple[str, Any]], *, escaped: bool) -> str:
    text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    return "{" + (text.replace(_WORD, "\\u0066orbidden") if escaped else text) + "}"


@given(
    members=_members(),
    wraps=st.sampled_from(
        ["{}", '{{"data":{}}}', '{{"data":{},"x":1}}', '{{"data":{{"data":{}}}}}', "[{}]", "{} {{}}"]
    ),
    escaped=st.booleans(),
    codec=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-7"]),
    is_gzip=st.booleans(),
    says_gzip=st.booleans(),
    target=st.sampled_from(_TARGETS),
    content_type=st.sampled_from(_TYPES),
    unwrap=st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_denied_input_reaches_nothing(
    members: list[tuple[str, Any]],
    wraps: str,
    escaped: bool,
    codec: str,
    is_gzip: bool,
    says_gzip: bool,
    target: str,
    content_type: str,
    unwrap: bool,
) -> None:
    body = wraps.format(_written(members, escaped=escaped)).encode(codec)
    body = gzip.compress(body, mtime=0) if is_gzip else body
    headers = [KEY, *([(b"content-type", content_type.encode())] if content_type else [])]
    headers += [(b"content-encoding", b"gzip")] if says_gzip else []
    upstream = _Recorder()
    app = _through(upstream, input=[_no_such_word], options={"unwrap_data": unwrap})
    caller = anyio.run(call, app, http_scope("POST", target, headers), body)
    has_word = any(_WORD in json.dumps(value) for _, value in members)
    for arrived in upstream.bodies:
        assert not has_word
        assert arrived in body
    assert (caller.status == 201) == bool(upstream.bodies)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=_values, output=_values, ascii=st.booleans(), indent=st.none() | st.integers(0, 3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_allowed_is_unchanged_in_both_directions(
    value: Any, output: Any, ascii: bool, indent: int | None
) -> None:
    def written(content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=ascii, indent=indent).encode()

    body, answer = written({"input": value, "webhook": "x"}), written({"id": "p1", "output": output, "urls": {}})
    upstream, before, after = _Recorder(answer), Seen(), Seen()
    app = _through(upstream, input=[before], output=[after])
    caller = anyio.run(call, app, http_scope("POST", "/v1/models/a/b/predictions", [KEY, JSON]), body)
    assert (caller.status, caller.content, upstream.bodies) == (201, answer, [body])
    assert [one.value for one in before.asked] == [value]
    assert [one.value for one in after.asked] == ([] if output is None else [output])


# --- options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"input": "x"}, "input: "),
        ({"input": Seen()}, "input: "),
        ({"output": [1]}, "output: "),
        ({"timeout": 0}, "timeout: "),
        ({"timeout": float("inf")}, "timeout: "),
    ],
)
def test_an_option_that_is_wrong_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        guardrails(**options)
