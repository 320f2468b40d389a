"""What other proxies were found to break, over real sockets: each test is one row of that comparison."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from replicate_proxy_mw.testing import serve
from tests.raw_asgi import TOKEN, proxy
from tests.raw_upstream import Connection, RawUpstream

MULTIPART = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST, SECOND = b"event: output\nid: 1:0\ndata: Hello\n\n", b"event: done\nid: 2:0\ndata: {}\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.fixture
def caller(upstream: RawUpstream) -> Iterator[httpx.Client]:
    with (
        serve(proxy(upstream.url)) as served,
        httpx.Client(base_url=served.url, headers={"x-portkey-api-key": "pk-team-a"}, trust_env=False) as client,
    ):
        yield client


def arrived(upstream: RawUpstream, method: str, target: str, body: bytes = b"") -> None:
    """The one request that upstream got is this one, with the token."""
    (request,) = upstream.requests
    assert request.line == f"{method} {target} HTTP/1.1".encode()
    assert request.body == body
    assert request.header(b"authorization") == [b"Bearer " + TOKEN.encode()]


def test_query_models_with_text(caller: httpx.Client, upstream: RawUpstream) -> None:
    answer = caller.request("QUERY", "/v1/models", content=b"llama", headers={"content-type": "text/plain"})
    assert answer.status_code == 200
    arrived(upstream, "QUERY", "/v1/models", b"llama")
    assert upstream.requests[0].header(b"content-type") == [b"text/plain"]


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_patch_and_put(method: str, caller: httpx.Client, upstream: RawUpstream) -> None:
    answer = caller.request(method, "/v1/deployments/acme/hello", content=b'{"min_instances": 1}', headers=JSON)
    assert answer.status_code == 200
    arrived(upstream, method, "/v1/deployments/acme/hello", b'{"min_instances": 1}')


def test_post_of_text(caller: httpx.Client, upstream: RawUpstream) -> None:
    assert caller.post("/v1/x", content=b"text", headers={"content-type": "text/plain"}).status_code == 200
    arrived(upstream, "POST", "/v1/x", b"text")
    assert upstream.requests[0].header(b"content-type") == [b"text/plain"]


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/predictions"),
        ("POST", "/v1/models/acme/mine/predictions"),
        ("POST", "/v1/models/acme/mine/versions/1/trainings"),
        ("GET", "/v1/models"),
        ("GET", "/v1/collections"),
        ("GET", "/v1/account"),
    ],
)
def test_the_operations_everybody_uses(method: str, target: str, caller: httpx.Client, upstream: RawUpstream) -> None:
    body = b'{"input":{}}' if method == "POST" else b""
    assert caller.request(method, target, content=body, headers=JSON).json() == {}
    arrived(upstream, method, target, body)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("target", ["/v1/files", "/v1/files/abc", "/v1/files/abc/download?signature=x%2Fy"])
def test_files_reach_their_own_path(method: str, target: str, caller: httpx.Client, upstream: RawUpstream) -> None:
    assert caller.request(method, target).status_code == 200
    arrived(upstream, method, target)


def test_post_of_files_is_streamed(caller: httpx.Client, upstream: RawUpstream) -> None:
    received: list[bytes] = []

    def play(connection: Connection) -> None:
        connection.head()
        data = connection.buffer or connection.socket.recv(65536)
        while data:
            received.append(data)
            if b"first" in b"".join(received):
                upstream.ready.set()
            if data.endswith(b"0\r\n\r\n"):
                break
            data = connection.socket.recv(65536)
        connection.answer()

    def body() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="content"\r\n\r\nfirst'
        assert upstream.ready.wait(5), "nothing reaches upstream before the end of the upload"
        yield b" and second\r\n--b--\r\n"

    upstream.script = play
    assert caller.post("/v1/files", content=body(), headers=MULTIPART).status_code == 200
    assert b"first" in b"".join(received)
    assert b" and second\r\n--b--\r\n" in b"".join(received)


def test_body_bytes_are_exact(caller: httpx.Client, upstream: RawUpstream) -> None:
    body = b'{ "version":"v", "input": {"big": 12345678901234567890, "one": 1.0, "exp": 1e5, "a": 1, "a": 2} }'
    upstream.script = lambda connection: connection.answer(body) if connection.request() else None
    assert caller.post("/v1/predictions", content=body, headers=JSON).content == body
    arrived(upstream, "POST", "/v1/predictions", body)


def test_the_hosts_cookie_stays(caller: httpx.Client, upstream: RawUpstream) -> None:
    caller.get("/v1/models", headers={"cookie": "session=host"})
    assert upstream.requests[0].header(b"cookie") == []


def test_portkeys_headers_stay(caller: httpx.Client, upstream: RawUpstream) -> None:
    caller.get("/v1/models", headers={"x-portkey-provider": "@replicate", "x-portkey-aws-secret-access-key": "secret"})
    assert [name for name, _ in upstream.requests[0].headers if name.startswith(b"x-portkey-")] == []
    assert b"pk-team-a" not in upstream.requests[0].head


def test_two_set_cookies_stay_away_and_two_links_stay_two(caller: httpx.Client, upstream: RawUpstream) -> None:
    fields = b'set-cookie: a=1\r\nset-cookie: b=2\r\nlink: </1>; rel="next"\r\nlink: </2>; rel="last"\r\n'
    upstream.script = lambda connection: connection.answer(headers=fields) if connection.request() else None
    answer = caller.get("/v1/x")
    assert answer.headers.get_list("set-cookie") == []
    assert [value for name, value in answer.headers.raw if name == b"link"] == [
        b'</1>; rel="next"',
        b'</2>; rel="last"',
    ]


def test_the_first_event_comes_at_once(caller: httpx.Client, upstream: RawUpstream) -> None:
    def play(connection: Connection) -> None:
        connection.request()
        connection.send(STREAM + chunk(FIRST))
        upstream.go_on.wait(5)
        connection.send(chunk(SECOND) + b"0\r\n\r\n")

    upstream.script = play
    with caller.stream("GET", "/v1/x") as answer:
        chunks = answer.iter_raw()
        assert next(chunks) == FIRST
        upstream.go_on.set()
        assert b"".join(chunks) == SECOND
    assert answer.headers["content-type"] == "text/event-stream"


def test_a_client_who_leaves_a_stream_ends_it_upstream(caller: httpx.Client, upstream: RawUpstream) -> None:
    def play(connection: Connection) -> None:
        connection.request()
        connection.send(STREAM + chunk(FIRST))
        connection.wait_closed()

    upstream.script = play
    with caller.stream("GET", "/v1/x") as answer:
        chunks = answer.iter_raw()  # kept, since its end would close the connection
        assert next(chunks) == FIRST
        assert not upstream.closed.is_set()
    assert upstream.closed.wait(5), "upstream goes on for a caller who has left"


def test_a_cookie_of_one_users_answer_is_not_sent_for_another(caller: httpx.Client, upstream: RawUpstream) -> None:
    def play(connection: Connection) -> None:
        while connection.request():
            connection.answer(headers=b"set-cookie: sid=of-a; path=/\r\n")

    upstream.script = play
    caller.get("/v1/account")
    caller.cookies.clear()
    caller.get("/v1/account", headers={"x-portkey-api-key": "pk-team-b"})
    assert len(upstream.connections) == 1, "the second one is to go where a jar would find the cookie"
    assert [request.header(b"cookie") for request in upstream.requests] == [[], []]
