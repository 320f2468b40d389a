from __future__ import annotations

import gzip
import socket
import time
from typing import Any

import httpx
import pytest

from replicate_proxy_mw.testing import FakeModel, FakeReplicate, ManualClock


def test_every_answer_carries_what_replicates_do(client: httpx.Client) -> None:
    answer = client.get("account")
    assert answer.headers["ratelimit-remaining"] == "2999"
    assert 0 < int(answer.headers["ratelimit-reset"]) <= 60
    assert answer.headers["vary"] == "Cookie, origin"
    for name in ("replicate-edge-cluster", "cf-ray", "set-cookie", "strict-transport-security", "alt-svc", "nel"):
        assert name in answer.headers
    assert answer.headers["server"] == "cloudflare"
    assert client.get("account").headers["ratelimit-remaining"] == "2998"


def test_limits_are_by_the_minute() -> None:
    clock = ManualClock()
    with FakeReplicate(clock=clock).serve() as fake, httpx.Client(base_url=fake.url) as client:
        assert client.get("account").headers["ratelimit-remaining"] == "2999"
        clock.advance(60)
        answer = client.post("predictions")
        assert answer.headers["ratelimit-remaining"] == "599"
        assert "replicate-target-cluster" in answer.headers


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [("gzip", "gzip"), ("br, *", "gzip"), ("gzip;q=0, *", None), ("gzip; q=0.5", "gzip"), ("br", None), ("", None)],
)
def test_gzip_where_it_is_accepted(client: httpx.Client, accept: str, encoding: str | None) -> None:
    with client.stream("GET", "account", headers={"accept-encoding": accept}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers.get("content-encoding") == encoding
    assert ("transfer-encoding" in answer.headers) == (encoding is not None)
    assert b"username" in (gzip.decompress(raw) if encoding else raw)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer r8_wrong", "Basic {token}", "{token}"])
def test_401(fake_replicate: FakeReplicate, authorization: str | None) -> None:
    given = None if authorization is None else authorization.format(token=fake_replicate.token)
    answer = httpx.get(f"{fake_replicate.url}/account", headers={} if given is None else {"authorization": given})
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }


def test_the_token_is_clearly_fake(fake_replicate: FakeReplicate) -> None:
    assert fake_replicate.token.startswith("r8_fake")
    assert len(fake_replicate.token) == 40


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    nothing = client.get("nothing")
    assert (nothing.status_code, nothing.json()) == (404, {"detail": "Not found."})
    assert nothing.headers["content-type"] == "application/json"
    assert client.get(str(client.base_url).removesuffix("v1/")).status_code == 404
    assert client.get("models/a%2Fb/c").status_code == 404
    wrong = client.put("models")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST, QUERY")
    assert wrong.headers["content-type"] == "application/problem+json"


def exchange(fake: FakeReplicate, *lines: str, body: str = "") -> bytes:
    url = httpx.URL(fake.url)
    head = [f"host: {url.netloc.decode()}", f"authorization: Bearer {fake.token}", *lines]
    with socket.create_connection((url.host, url.port or 0), timeout=2) as sock:
        sock.sendall("\r\n".join(["GET /v1/account HTTP/1.0", *head, "", body]).encode())
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize(
    ("line", "violation"),
    [
        ("x-portkey-api-key: pk", ["x-portkey-api-key"]),
        ("cookie: a=b", ["cookie"]),
        ("authorization: Bearer pk", ["authorization"]),
        ("x-forwarded-for: 10.0.0.1", ["x-forwarded-for"]),
        ("forwarded: for=10.0.0.1", ["forwarded"]),
        ("te: trailers", ["te"]),
        ("connection: close, x-mine", ["connection"]),
        ("transfer-encoding: chunked\r\ncontent-length: 5", ["content-length", "transfer-encoding"]),
    ],
)
def test_what_a_proxy_must_not_pass_on(fake_replicate: FakeReplicate, line: str, violation: list[str]) -> None:
    answer = exchange(fake_replicate, line, body="0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert ", ".join(violation).encode() in answer
    assert fake_replicate.violations == violation
    fake_replicate.violations.clear()


def test_requests_are_recorded(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    client.post("predictions?a=%2F", content=b"{}", headers={"X-Mine": "1"})
    client.get("nothing")
    first, second = fake_replicate.requests
    assert (first.method, first.target, first.body) == ("POST", b"/v1/predictions?a=%2F", b"{}")
    assert first.complete
    assert (first.operation, second.operation) == ("predictions.create", None)
    assert (first.header("x-mine"), first.header("x-other")) == ("1", None)
    assert (b"authorization", f"Bearer {fake_replicate.token}".encode()) in first.headers
    assert abs(first.at - fake_replicate.clock.now()) < 5


def test_recorded_bodies_are_bounded() -> None:
    with FakeReplicate(max_recorded_body=3, max_file_size=5).serve() as fake:
        headers = {"authorization": f"Bearer {fake.token}"}
        httpx.post(f"{fake.url}/account", content=b"12345", headers=headers)
        assert fake.requests[0].body == b"123"
        answer = httpx.post(f"{fake.url}/files", files={"content": b"123456"}, headers=headers)
    assert (answer.status_code, answer.json()) == (413, {"detail": "Files must be less than 100MB in size"})


@pytest.mark.parametrize("origin", ["url", "streams_url"])
def test_half_a_request_does_nothing(fake_replicate: FakeReplicate, origin: str) -> None:
    url = httpx.URL(getattr(fake_replicate, origin))
    with socket.create_connection((url.host, url.port or 0)) as sock:
        sock.sendall(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf")
    recorded = fake_replicate.requests if origin == "url" else fake_replicate.stream_requests
    end = time.monotonic() + 5
    while not recorded:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert (recorded[0].complete, recorded[0].body) == (False, b"half")


def test_nothing_prints_tokens(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    client.get("account")
    printed = repr(fake_replicate) + repr(fake_replicate.requests)
    assert fake_replicate.url in printed
    assert fake_replicate.token not in printed
    assert repr(FakeReplicate()) == "<FakeReplicate not served>"


@pytest.mark.parametrize("status", [401, 402, 404, 422, 500, 503])
def test_errors_on_demand(fake_replicate: FakeReplicate, client: httpx.Client, status: int) -> None:
    fake_replicate.fail(status)
    answer = client.get("account")
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("account").status_code == 200


def test_errors_for_one_operation(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    fake_replicate.fail(429, operation="hardware.list", times=2, retry_after=5)
    assert client.get("account").status_code == 200
    answers = [client.get("hardware") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].json() == {"detail": "Request was throttled. Your rate limit resets in ~5s."}
    names = ("retry-after", "ratelimit-remaining", "ratelimit-reset")
    assert [answers[0].headers[name] for name in names] == ["5", "0", "5"]


def test_errors_with_a_text_of_ones_own(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    fake_replicate.fail(429, low_credit=True)
    fake_replicate.fail(503, detail="Down for a while", retry_after=7)
    fake_replicate.fail(413, body=b"<html>too large</html>")
    low, down, edge = (client.get("account") for _ in range(3))
    assert low.json()["retry_after"] == 30
    assert (down.json()["detail"], down.headers["retry-after"]) == ("Down for a while", "7")
    assert (edge.text, edge.headers["content-type"]) == ("<html>too large</html>", "text/html")


def test_links_can_be_replicates_own() -> None:
    fake = FakeReplicate(api_url="https://api.replicate.com/v1", stream_url="https://stream.replicate.com")
    with fake.serve(), httpx.Client(base_url=fake.url, headers={"authorization": f"Bearer {fake.token}"}) as client:
        body = {"input": {"prompt": "hi"}}
        urls = client.post("models/meta/meta-llama-3-8b-instruct/predictions", json=body).json()["urls"]
        assert urls["get"].startswith("https://api.replicate.com/v1/predictions/")
        assert urls["stream"].startswith("https://stream.replicate.com/v1/files/")
        assert client.get("models").json()["next"].startswith("https://api.replicate.com/v1/models?cursor=")
        assert fake.url.startswith("http://127.0.0.1:")
        assert fake.streams_url == "https://stream.replicate.com"
    assert fake.api_url == "https://api.replicate.com/v1"


def test_a_model_of_ones_own_and_the_size_of_pages() -> None:
    own = FakeModel(owner="acme", name="add", run=lambda given: given["a"] + given["b"], queue_time=0, run_time=0)
    with FakeReplicate(models=[own], page_size=2).serve() as fake:
        headers = {"authorization": f"Bearer {fake.token}"}
        body: dict[str, Any] = {"version": own.as_json()["latest_version"]["id"], "input": {"a": 1, "b": 2}}
        made = httpx.post(f"{fake.url}/predictions", json=body, headers=headers | {"prefer": "wait"})
        assert (made.status_code, made.json()["output"]) == (201, 3)
        assert len(httpx.get(f"{fake.url}/models", headers=headers).json()["results"]) == 2


def test_it_can_be_served_again() -> None:
    fake = FakeReplicate()
    for _ in range(2):
        with fake.serve():
            answer = httpx.get(f"{fake.url}/account", headers={"authorization": f"Bearer {fake.token}"})
            assert answer.status_code == 200
