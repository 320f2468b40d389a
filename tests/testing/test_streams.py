from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from replicate_proxy_mw.testing import FakeModel, FakeReplicate, ManualClock

LLAMA = "models/meta/meta-llama-3-8b-instruct/predictions"
TOKENS = ["You", " said:", " a", " fox"]


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"clock": ManualClock(), "queue_time": 1.0, "run_time": 10.0}


def start(client: httpx.Client, prompt: str = "a fox") -> dict[str, Any]:
    answer: dict[str, Any] = client.post(LLAMA, json={"input": {"prompt": prompt}}).json()
    return answer


def events(text: str) -> list[tuple[str, str]]:
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = [line.partition(": ") for line in block.split("\n")]
        data = "\n".join(value for name, _, value in fields if name == "data")
        found.append((next(value for name, _, value in fields if name == "event"), data))
        assert any(name == "id" for name, _, _ in fields)
    return found


def test_a_stream_from_start_to_end(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    url = start(client)["urls"]["stream"]
    assert url.startswith(f"{fake_replicate.streams_url}/v1/files/")
    with httpx.stream("GET", url) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        fake_replicate.clock.advance(4)
        assert [next(lines) for _ in range(3)] == ["event: output", "id: 1790000003:1", "data: You"]
        fake_replicate.clock.advance(7)
        rest = events("\n".join([*lines, ""])[1:])
    assert rest == [*(("output", token) for token in TOKENS[1:]), ("done", "{}")]


def test_a_stream_of_the_past(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    url = start(client)["urls"]["stream"]
    fake_replicate.clock.advance(11)
    answer = httpx.get(url, headers={"authorization": "Bearer wrong"})
    assert events(answer.text) == [*(("output", token) for token in TOKENS), ("done", "{}")]
    assert fake_replicate.stream_requests[0].header("authorization") == "Bearer wrong"
    again = httpx.get(url, headers={"last-event-id": "1790000005:2"})
    assert events(again.text) == [("output", " a"), ("output", " fox"), ("done", "{}")]
    ended = httpx.get(url, headers={"last-event-id": "unknown"})
    assert events(ended.text) == [("done", "{}")]


def test_the_end_of_a_canceled_one(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    made = start(client)
    client.post(made["urls"]["cancel"])
    assert events(httpx.get(made["urls"]["stream"]).text) == [("done", '{"reason":"canceled"}')]


def test_the_end_of_a_failed_one(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    def failing(given: Mapping[str, Any]) -> Iterator[str]:
        yield "two\nlines"
        raise ValueError("out of memory")

    model = FakeModel(owner="acme", name="failing", official=True, streams=True, run=failing, logs=("loading",))
    fake_replicate.add_model(model)
    made = client.post("models/acme/failing/predictions", json={"input": {}}).json()
    fake_replicate.clock.advance(11)
    assert events(httpx.get(made["urls"]["stream"]).text) == [
        ("logs", "loading"),
        ("output", "two\nlines"),
        ("error", '{"detail": "out of memory"}'),
        ("done", '{"reason":"error"}'),
    ]


def test_a_caller_may_leave(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    with httpx.stream("GET", start(client)["urls"]["stream"]) as answer:
        assert answer.status_code == 200
    time.sleep(0.05)
    assert client.get("account").status_code == 200


def test_open_streams_end_with_the_server() -> None:
    fake = FakeReplicate(clock=ManualClock())
    with fake.serve(), httpx.Client(base_url=fake.url, headers={"authorization": f"Bearer {fake.token}"}) as client:
        url = start(client)["urls"]["stream"]
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(httpx.get(url).text))
        thread.start()
        while not fake.stream_requests:
            time.sleep(0.002)
    thread.join()
    assert texts == [""]


def test_nothing_else_is_there(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    body = {"input": {"prompt": "a fox"}}
    drawn = client.post("models/black-forest-labs/flux-schnell/predictions", json=body).json()
    url = f"{fake_replicate.streams_url}/files/{drawn['id']}"
    assert httpx.get(f"{url}/0").status_code == 404  # not drawn yet
    fake_replicate.clock.advance(11)
    assert httpx.get(f"{url}/0").headers["content-type"] == "image/png"
    for wrong in (f"{url}/1", f"{url}/x", f"{fake_replicate.streams_url}/files/none/0"):
        assert httpx.get(wrong).status_code == 404
    for method, path in (("GET", "/v1/files/none"), ("POST", "/v1/files/none"), ("GET", "/")):
        assert httpx.request(method, fake_replicate.streams_url + path).status_code == 404
    fake_replicate.clock.advance(3600)
    assert httpx.get(f"{url}/0").status_code == 404  # removed
