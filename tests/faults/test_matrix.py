"""Every fault, for GET and POST, on both parsers of uvicorn and both transports, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from replicate_proxy_mw.testing import FAULTS, Fault, FaultServer, serve
from tests.faults.raw_caller import Answer, ask, sending
from tests.raw_asgi import TOKEN, host, proxy

LARGE = b"x" * (4 << 20)  # more than the buffers between hold

# One connection at a time, so that one that is left behind is missed by the next request.
OPTIONS: dict[str, Any] = {
    "connect_timeout": 0.4,
    "read_timeout": 0.4,
    "write_timeout": 0.4,
    "connection_wait": 0.4,
    "max_connections": 1,
    "forward_headers": ("x-fault",),
}


@dataclass
class Running:
    port: int
    upstream: FaultServer
    loop: asyncio.AbstractEventLoop
    good: int = 0
    tasks: int = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = self.count_tasks()

    def count_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(5)

    def ask(self, fault: Fault, method: str, body: bytes) -> Answer:
        if fault.origin != "http":
            return ask(self.port, method, f"/{fault.name}/v1/x", body)
        if fault.reads == "nothing":
            self.upstream.fault(fault.name)
        try:
            return ask(self.port, method, f"/v1/x/{fault.name}", body)
        finally:
            if fault.reads == "nothing":
                self.upstream.fault(None)

    def check(self, fault: Fault, method: str, caplog: pytest.LogCaptureFixture) -> None:
        self.upstream.requests.clear()
        body = LARGE if fault.reads in ("head", "part") else b"ten bytes!"
        answer = self.ask(fault, method, body if method == "POST" else b"")
        came = _outcome(answer)
        assert came in fault.expected, answer
        if isinstance(came, int):
            _is_our_own(answer)
        else:
            assert answer.status == fault.status
            assert answer.content == fault.content or (came == "cut" and fault.content.startswith(answer.content))
            assert not {name for name, _ in answer.headers} & NOT_FOR_CALLERS
        if fault.then != "hold":
            # What comes when the next request is out already passes for its answer, or for the end of it: nobody can
            # tell.
            assert self.upstream.settled()
        self.was_sent_once(fault, method)
        self.still_works()
        _logs_are_quiet(caplog, came, unreachable=not fault.sent or b"upstream_unreachable" in answer.content)

    def was_sent_once(self, fault: Fault, method: str) -> None:
        received = self.upstream.requests
        if not fault.sent:
            assert not received
        elif fault.reads == "nothing":
            # Who is refused at the door may have said a word already.
            assert [request.method for request in received] in ([], [method])
        else:
            assert [request.method for request in received] == [method]
        if fault.reads == "whole" and received:
            assert (received[0].whole, received[0].size) == (True, 10 if method == "POST" else 0)

    def still_works(self) -> None:
        """The next request gets its own answer, and nothing is left of those before."""
        self.good += 1
        answer = ask(self.port, "GET", f"/v1/good/{self.good}")
        assert (answer.status, answer.complete) == (200, True), answer
        assert json.loads(answer.content)["target"] == f"/v1/good/{self.good}"
        assert self.upstream.settled(), "a connection is left as it was"
        assert self.upstream.open <= 1, "more connections than one are open"
        deadline = time.monotonic() + 2
        while self.count_tasks() > self.tasks:
            assert time.monotonic() < deadline, "a task is left"
            time.sleep(0.005)


@pytest.fixture(
    scope="module",
    params=[(http, transport) for http in ("h11", "httptools") for transport in ("default", "fast")],
    ids="-".join,
)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    http, transport = request.param
    options = OPTIONS | {"fast": transport == "fast"}
    loops = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await host(scope, receive, send)

    with FaultServer() as upstream:
        whole = proxy(upstream.url, app=app, options=options)
        for fault in FAULTS.values():
            if fault.origin != "http":
                own = options | {"prefix": f"/{fault.name}/v1"}
                whole = proxy(upstream.url_for(fault.name), app=whole, options=own)
        with serve(whole, http=http) as served:
            yield Running(int(served.url.rpartition(":")[2]), upstream, loops[0])
        assert upstream.all_closed()
    # What was left behind warns now, and not in a test of something else.
    gc.collect()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(running: Running, name: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    """On a connection that the test before has left, where the fault leaves the choice."""
    running.check(FAULTS[name], method, caplog)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", ["reset-after-head", "close-after-head", "reset-before-head", "close-before-head"])
def test_no_answer_on_a_fresh_connection(
    running: Running, name: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    running.upstream.fault(None)
    opened = running.upstream.opened
    running.check(FAULTS[name], method, caplog)
    assert running.upstream.opened > opened


@pytest.mark.parametrize("name", ["body-with-head", "surplus", "redirect", "unavailable", "reset-before-head"])
def test_a_head(running: Running, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Has no body, whatever comes."""
    fault = FAULTS[name]
    answer = ask(running.port, "HEAD", f"/v1/x/{name}")
    assert (answer.status, answer.content) == (fault.status if "relayed" in fault.expected else 502, b"")
    assert running.upstream.settled()
    running.still_works()
    _logs_are_quiet(caplog, None)


@pytest.mark.parametrize(
    "name", ["refused", "reset-before-head", "garbage", "silence-before-head", "length-cut", "unavailable"]
)
def test_a_create_is_paid_once(running: Running, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does an answer invite a client to send it again."""
    fault = FAULTS[name]
    running.upstream.requests.clear()
    target = "/v1/predictions"
    if fault.origin == "http":
        headers = b"prefer: wait\r\nx-fault: " + name.encode() + b"\r\n"
        answer = ask(running.port, "POST", target, b"{}", headers=headers)
    else:
        answer = ask(running.port, "POST", f"/{name}{target}", b"{}")
    [expected] = fault.expected
    # What is read for its links has no status out when it is cut.
    assert (answer.status, answer.complete) == (
        {"cut": 502, "relayed": fault.status}.get(str(expected), expected),
        True,
    )
    assert answer.header(b"x-should-retry") == [b"false"]
    assert len(running.upstream.requests) == fault.sent
    running.still_works()
    _logs_are_quiet(caplog, None, unreachable=not fault.sent)


@pytest.mark.parametrize(
    ("name", "header", "value"),
    [
        ("redirect", b"location", b"https://elsewhere.invalid/v1/x"),
        ("too-many-requests", b"retry-after", b"1"),
        ("unavailable", b"retry-after", b"1"),
        ("gzip-corrupt", b"content-encoding", b"gzip"),
        ("gzip-bomb", b"content-encoding", b"gzip"),
        ("error-with-html", b"content-type", b"text/html"),
    ],
)
def test_what_says_something_of_the_answer_comes_along(
    running: Running, name: str, header: bytes, value: bytes
) -> None:
    assert ask(running.port, "GET", f"/v1/x/{name}").header(header) == [value]


def test_a_trickle_is_relayed_at_once(running: Running) -> None:
    with sending(running.port, "GET", "/v1/x/body-trickled") as caller:
        received = b""
        while not received.endswith(b"01"):
            received += caller.recv(65536)
        # Upstream has not sent its last byte, or would wait for a request.
        assert not running.upstream.settled(0)
    running.still_works()


NOT_FOR_CALLERS = frozenset(
    b"set-cookie clear-site-data strict-transport-security service-worker-allowed refresh nel report-to alt-svc"
    b" access-control-allow-origin access-control-allow-credentials public-key-pins proxy-authenticate"
    b" www-authenticate keep-alive upgrade trailer".split()
)


def _outcome(answer: Answer) -> int | Literal["relayed", "cut"]:
    if not answer.complete:
        return "cut"
    return answer.status if answer.header(b"x-portkey-gateway-exception") else "relayed"


def _is_our_own(answer: Answer) -> None:
    assert answer.header(b"content-type") == [b"application/json"]
    assert b"no-store" in answer.header(b"cache-control")[0]
    assert len(answer.content) <= 1024
    told = json.loads(answer.content)
    assert told["status"] == answer.status
    assert told["type"] in ("upstream_unreachable", "upstream_failed", "upstream_timeout")
    assert told["request_id"] == answer.header(b"x-request-id")[0].decode()
    # No host, no port, no class.
    assert not re.search(rb"127\.0\.0\.1|localhost|invalid|:\d{4,5}|[a-z](Error|Exception|Timeout)\b", answer.content)


def _logs_are_quiet(caplog: pytest.LogCaptureFixture, came: object, *, unreachable: bool = False) -> None:
    """A server says that an answer was cut, and we that nobody could be reached; nothing else is worth a warning."""
    loud = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    if unreachable:
        assert loud == ["replicate_proxy_mw"]
        assert re.fullmatch(r"Replicate could not be reached: [A-Za-z]+", caplog.messages[-1])
    else:
        assert loud in ([], ["uvicorn.error"]) if came == "cut" else loud == []
    assert TOKEN not in caplog.text
