from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from starlette.types import Message

from replicate_proxy_mw.testing import FakeModel, FakeReplicate, FakeVersion, ManualClock
from replicate_proxy_mw.testing.operations import OPERATIONS

HELLO = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
JSON_404 = {"detail": "The requested resource could not be found.", "status": 404}


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    private = FakeModel(
        owner="acme",
        name="toy",
        run=lambda given: given,
        visibility="private",
        versions=(FakeVersion(id="a" * 64, created_at=0.0),),
    )
    return {
        "tokens": {"r8_one": "acme", "r8_two": "other"},
        "clock": ManualClock(),
        "queue_time": 1.0,
        "run_time": 10.0,
        "models": [private, FakeModel(owner="other", name="theirs", run=len)],
    }


@pytest.fixture
def other(fake_replicate: FakeReplicate, client: httpx.Client) -> dict[str, str]:
    return {"authorization": "Token r8_two"}


def hello(client: httpx.Client, **headers: str) -> httpx.Response:
    return client.post("predictions", json={"version": HELLO, "input": {"text": "Bob"}}, headers=headers)


def test_json_that_is_too_deep_is_no_json(client: httpx.Client) -> None:
    deep = b'{"input": ' + b"[" * 100_000
    answer = client.post("predictions", content=deep, headers={"content-type": "application/json"})
    assert (answer.status_code, "JSON parse error" in answer.text) == (400, True)


def later(fake: FakeReplicate, seconds: float) -> threading.Thread:
    """Advance the clock from another thread, once the request that is about to be sent is held."""
    seen = len(fake.requests)

    def advance() -> None:
        while len(fake.requests) == seen:
            time.sleep(0.002)
        time.sleep(0.03)
        fake.clock.advance(seconds)

    thread = threading.Thread(target=advance)
    thread.start()
    return thread


def test_all_operations_are_there() -> None:
    assert len({operation.id for operation in OPERATIONS}) == len(OPERATIONS) == 37
    assert len({operation.path for operation in OPERATIONS}) == 26


def test_account(client: httpx.Client, other: dict[str, str]) -> None:
    assert client.get("account").json()["username"] == "acme"
    assert client.get("account", headers=other).json()["username"] == "other"


def test_collections(client: httpx.Client) -> None:
    listed = client.get("collections").json()["results"]
    assert {"name", "slug", "description"} == set(listed[0])
    one = client.get("collections/text-to-image").json()
    assert [model["name"] for model in one["models"]] == ["flux-schnell"]
    assert client.get("collections/none").json() == JSON_404


def test_hardware(client: httpx.Client) -> None:
    assert {"name": "CPU", "sku": "cpu"} in client.get("hardware").json()


def test_life_of_a_deployment(client: httpx.Client, other: dict[str, str]) -> None:
    body: dict[str, Any] = {"name": "own", "model": "replicate/hello-world", "version": HELLO, "hardware": "cpu"}
    body |= {"min_instances": 0, "max_instances": 1}
    made = client.post("deployments", json=body)
    assert (made.status_code, made.json()["current_release"]["number"]) == (200, 1)
    assert client.post("deployments", json=body).status_code == 409
    assert [one["name"] for one in client.get("deployments").json()["results"]] == ["own", "hello"]
    changed = client.patch("deployments/acme/own", json={"min_instances": 1.0}).json()["current_release"]
    assert (changed["number"], changed["configuration"]["min_instances"]) == (2, 1)
    assert client.patch("deployments/acme/own").json()["current_release"]["number"] == 2
    assert client.get("deployments/acme/own").json()["current_release"]["version"] == HELLO
    assert client.get("deployments/other/own").json() == JSON_404
    assert client.get("deployments/acme/own", headers=other).json() == JSON_404
    assert client.delete("deployments/acme/own").status_code == 204
    assert client.delete("deployments/acme/own").status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "no spaces"},
        {"hardware": "abacus"},
        {"model": "no/such"},
        {"version": "0"},
        {"max_instances": 21},
        {"min_instances": True},
    ],
)
def test_deployments_that_are_refused(client: httpx.Client, wrong: dict[str, Any]) -> None:
    body: dict[str, Any] = {"name": "own", "model": "replicate/hello-world", "version": HELLO, "hardware": "cpu"}
    body |= {"min_instances": 0, "max_instances": 1, **wrong}
    assert client.post("deployments", json=body).status_code == 422


def test_a_deployment_predicts(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    made = client.post("deployments/acme/hello/predictions", json={"input": {"text": "Bob"}})
    assert (made.status_code, made.json()["deployment"], made.json()["version"]) == (201, "acme/hello", HELLO)
    fake_replicate.clock.advance(11)
    assert client.get(f"predictions/{made.json()['id']}").json()["output"] == "hello Bob"
    assert client.post("deployments/acme/none/predictions", json={"input": {}}).status_code == 404


def test_life_of_a_file(fake_replicate: FakeReplicate, client: httpx.Client, other: dict[str, str]) -> None:
    files = {"content": ("notes.txt", b"\x00hello", "text/plain")}
    made = client.post("files", files=files, data={"metadata": '{"a": 1}'})
    assert made.status_code == 201
    file = made.json()
    assert (file["name"], file["content_type"], file["size"], file["metadata"]) == (
        "notes.txt",
        "text/plain",
        6,
        {"a": 1},
    )
    assert file["urls"]["get"] == f"{fake_replicate.url}/files/{file['id']}"
    assert client.get(f"files/{file['id']}").json() == file
    assert client.get("files").json()["results"] == [file]
    assert client.get("files", headers=other).json()["results"] == []
    assert client.get(f"files/{file['id']}", headers=other).json()["detail"] == "File not found"
    assert client.delete(f"files/{file['id']}").status_code == 204
    gone = client.get(f"files/{file['id']}")
    assert (gone.status_code, gone.headers["content-type"]) == (404, "application/problem+json")


def test_fields_of_an_upload(client: httpx.Client) -> None:
    # as JavaScript sends it: the metadata a part with a media type
    files = {"content": ("blob", b"hi", "text/plain"), "metadata": ("blob", b'{"b": 2}', "application/json")}
    made = client.post("files", files=files, data={"filename": "name.txt", "type": "text/x-note"}).json()
    assert (made["name"], made["content_type"], made["metadata"]) == ("name.txt", "text/x-note", {"b": 2})
    plain = client.post("files", files={"content": (None, b"hi")}).json()
    assert (plain["name"], plain["content_type"]) == ("file", "application/octet-stream")


@pytest.mark.parametrize(
    ("request_options", "status"),
    [
        ({}, 422),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422),
        ({"files": {"other": b"x"}}, 422),
        ({"files": {"content": b"x"}, "data": {"metadata": "{"}}, 422),
        ({"files": {"content": b"x"}, "data": {"metadata": "[]"}}, 422),
        ({"files": {"content": b"x"}, "data": {"filename": "x" * 256}}, 422),
    ],
)
def test_uploads_that_are_refused(client: httpx.Client, request_options: dict[str, Any], status: int) -> None:
    assert client.post("files", **request_options).status_code == status


def test_downloads_need_a_signature_and_no_token(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    file_id = client.post("files", files={"content": b"\x00\xff"}).json()["id"]
    url = fake_replicate.download_url(file_id)
    answer = httpx.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"\x00\xff", "application/octet-stream")
    assert "content-encoding" not in answer.headers
    assert httpx.get(url.replace("owner=acme", "owner=other")).status_code == 404
    assert httpx.get(url.replace("owner=acme", "owner=nobody")).status_code == 404
    assert httpx.get(url + "x").status_code == 404
    assert httpx.get(url.replace("expiry=", "expiry=x")).status_code == 422
    assert httpx.get(url.partition("&signature")[0]).status_code == 422
    assert httpx.get(fake_replicate.download_url(file_id, lifetime=-1)).status_code == 404
    fake_replicate.clock.advance(3601)  # both the URL and the file have expired
    assert httpx.get(url).status_code == 404
    assert client.get("files").json()["results"] == []


def test_models_are_listed_in_pages(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    first = client.get("models", params={"sort_by": "model_created_at", "sort_direction": "asc"}).json()
    assert (len(first["results"]), first["previous"]) == (25, None)
    assert first["next"].startswith(f"{fake_replicate.url}/models?cursor=")
    second = client.get(first["next"]).json()
    assert second["next"] is None
    names = [model["name"] for model in first["results"] + second["results"]]
    assert len(set(names)) == len(names)
    assert "toy" not in names  # private
    assert client.get(second["previous"]).json() == first
    for query in ({"cursor": "?"}, {"cursor": "cD1ub25l"}):
        assert client.get("models", params=query).json()["detail"] == "Invalid cursor"
    assert client.get("models", params={"sort_by": "name"}).status_code == 422
    newest = client.get("models").json()["results"][0]["name"]
    assert newest == "hello-world"


@pytest.mark.parametrize("body", [b"hello", b'"hello"'])
def test_search_by_query(client: httpx.Client, body: bytes) -> None:
    found = client.request("QUERY", "models", content=body, headers={"content-type": "text/plain"})
    assert [model["name"] for model in found.json()["results"]] == ["hello-world"]
    (bare,) = client.request("QUERY", "models", content=b"theirs").json()["results"]
    assert bare["description"] == ""  # null elsewhere
    assert client.request("QUERY", "models").status_code == 422


def test_search_needs_no_token(fake_replicate: FakeReplicate) -> None:
    def search(**params: str) -> httpx.Response:
        return httpx.get(f"{fake_replicate.url}/search", params=params)

    found = search(query="language").json()
    assert [hit["model"]["name"] for hit in found["models"]] == ["meta-llama-3-8b-instruct"]
    assert [hit["slug"] for hit in found["collections"]] == ["language-models"]
    assert search(query="prediction").json()["pages"][0]["name"] == "Create a prediction"
    assert len(search(query="echo", limit="2").json()["models"]) == 2
    assert search().json() == {"detail": 'Query parameter "query" is required'}
    assert search(query="x", limit="51").status_code == 400


def test_life_of_a_model(client: httpx.Client, other: dict[str, str]) -> None:
    body = {"owner": "acme", "name": "mine", "visibility": "private", "hardware": "cpu", "description": "d"}
    made = client.post("models", json=body)
    assert (made.status_code, made.json()["latest_version"], made.json()["description"]) == (201, None, "d")
    assert client.post("models", json=body).status_code == 409
    assert client.post("models", json=body, headers=other).status_code == 403
    assert client.post("models", json={**body, "paper_url": "x"}).status_code == 422
    assert client.get("models/acme/mine", headers=other).json() == JSON_404
    missing = client.get("models/acme/mine/readme")
    assert (missing.status_code, missing.content) == (404, b"")
    changed = client.patch("models/acme/mine", json={"readme": "# Mine", "github_url": "https://github.com/acme/mine"})
    assert changed.json()["github_url"] == "https://github.com/acme/mine"
    readme = client.get("models/acme/mine/readme")
    assert (readme.text, readme.headers["content-type"]) == ("# Mine", "text/plain; charset=utf-8")
    assert client.delete("models/acme/mine").status_code == 204
    assert client.get("models/acme/mine").status_code == 404


def test_models_of_others_stay(client: httpx.Client) -> None:
    assert client.patch("models/replicate/hello-world", json={}).status_code == 403
    assert client.delete("models/replicate/hello-world").status_code == 403
    assert client.delete("models/acme/toy").status_code == 403  # has a version


def test_versions(client: httpx.Client) -> None:
    listed = client.get("models/replicate/hello-world/versions").json()["results"]
    assert [version["id"] for version in listed] == [HELLO]
    one = client.get(f"models/replicate/hello-world/versions/{HELLO}").json()
    assert one["openapi_schema"]["components"]["schemas"]["Input"]["required"] == ["text"]
    assert client.get("models/replicate/hello-world/versions/0").json() == JSON_404


def test_versions_are_deleted_when_private_and_unused(client: httpx.Client) -> None:
    deployment = {"name": "own", "model": "acme/toy", "version": "a" * 64, "hardware": "cpu"}
    client.post("deployments", json=deployment | {"min_instances": 0, "max_instances": 1})
    assert client.delete(f"models/acme/toy/versions/{'a' * 64}").status_code == 403
    client.delete("deployments/acme/own")
    gone = client.delete(f"models/acme/toy/versions/{'a' * 64}")
    assert (gone.status_code, gone.content) == (202, b"")
    assert client.delete("models/acme/toy").status_code == 204


def test_examples(client: httpx.Client) -> None:
    (example,) = client.get("models/replicate/hello-world/examples").json()["results"]
    assert (example["status"], example["output"]) == ("succeeded", "hello Alice")
    assert example["created_at"] == "2022-04-15T05:20:00.000000Z"
    model = client.get("models/replicate/hello-world").json()
    assert model["default_example"]["id"] == example["id"]


@pytest.mark.parametrize("version", [HELLO, f"replicate/hello-world:{HELLO}"])
def test_life_of_a_prediction(fake_replicate: FakeReplicate, client: httpx.Client, version: str) -> None:
    made = client.post("predictions", json={"version": version, "input": {"text": "Bob"}})
    assert (made.status_code, made.json()["status"], made.json()["output"]) == (201, "starting", None)
    assert "preference-applied" not in made.headers
    url = made.json()["urls"]["get"]
    assert url == f"{fake_replicate.url}/predictions/{made.json()['id']}"
    fake_replicate.clock.advance(1)
    assert client.get(url).json()["status"] == "processing"
    fake_replicate.clock.advance(10)
    done = client.get(url).json()
    assert (done["status"], done["output"], done["metrics"]["total_time"]) == ("succeeded", "hello Bob", 11.0)
    assert client.post(done["urls"]["cancel"]).json() == done


def test_official_models_hide_their_version(client: httpx.Client) -> None:
    body = {"input": {"prompt": "hi"}}
    one = client.post("models/meta/meta-llama-3-8b-instruct/predictions", json=body)
    two = client.post("predictions", json={"version": "meta/meta-llama-3-8b-instruct", **body})
    assert one.json()["version"] == two.json()["version"] == "hidden"
    assert client.post("models/replicate/hello-world/predictions", json=body).status_code == 404


@pytest.mark.parametrize("version", ["0", "replicate/hello-world", "no/such", f"meta/x:{HELLO}", "acme/toy:b"])
def test_versions_that_do_not_exist(client: httpx.Client, version: str) -> None:
    answer = client.post("predictions", json={"version": version, "input": {}})
    assert (answer.status_code, answer.json()["title"]) == (422, "Invalid version or not permitted")


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"version": HELLO}, {}),
        ({"version": HELLO, "input": {}}, {}),
        ({"version": HELLO, "input": {"text": 1}}, {}),
        ({"version": HELLO, "input": {"text": ""}, "extra": 1}, {}),
        ({"version": HELLO, "input": {"text": ""}, "webhook": "x"}, {}),
        ({"version": HELLO, "input": {"text": ""}, "webhook_events_filter": ["end"]}, {}),
        ({"version": HELLO, "input": {"text": ""}}, {"prefer": "wait=0"}),
        ({"version": HELLO, "input": {"text": ""}}, {"cancel-after": "4s"}),
    ],
)
def test_predictions_that_are_refused(client: httpx.Client, body: dict[str, Any], headers: dict[str, str]) -> None:
    answer = client.post("predictions", json=body, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"input": "\\ud800"}', "application/json", 400),
        (b"NaN", "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_bodies_that_are_no_json(client: httpx.Client, content: bytes, media_type: str, status: int) -> None:
    answer = client.post("predictions", content=content, headers={"content-type": media_type})
    assert answer.status_code == status


def test_others_see_nothing(client: httpx.Client, other: dict[str, str]) -> None:
    url = hello(client).json()["urls"]["get"]
    assert client.get(url, headers=other).json() == JSON_404
    assert client.post(f"{url}/cancel", headers=other).status_code == 404
    assert client.get("predictions", headers=other).json()["results"] == []


def test_cancel(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    waiting, running = hello(client).json(), hello(client).json()
    assert client.post(waiting["urls"]["cancel"]).json()["status"] == "canceled"
    fake_replicate.clock.advance(5)
    answer = client.post(running["urls"]["cancel"])
    assert (answer.status_code, answer.json()["status"], answer.json()["output"]) == (200, "canceled", None)


def test_cancel_after(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    made = hello(client, **{"cancel-after": "5s"}).json()
    assert "deadline" in made
    fake_replicate.clock.advance(5)
    assert client.get(made["urls"]["get"]).json()["status"] == "canceled"


def test_a_wait_to_the_end(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    thread = later(fake_replicate, 11)
    answer = hello(client, prefer="wait")
    thread.join()
    assert (answer.status_code, answer.headers["preference-applied"]) == (201, "wait=60")
    assert (answer.json()["status"], answer.json()["output"]) == ("succeeded", "hello Bob")
    assert "location" not in answer.headers


def test_a_wait_that_runs_out(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    thread = later(fake_replicate, 5)
    answer = hello(client, prefer="wait=5")
    thread.join()
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=5")
    assert (answer.json()["status"], answer.json()["output"]) == ("starting", None)
    assert client.get(answer.headers["location"]).json()["status"] == "processing"


def test_a_wait_for_files_ends_when_they_are_there(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    thread = later(fake_replicate, 10.5)
    body = {"input": {"prompt": "a fox", "num_outputs": 2}}
    answer = client.post("models/black-forest-labs/flux-schnell/predictions", json=body, headers={"prefer": "wait"})
    thread.join()
    assert (answer.status_code, answer.json()["status"]) == (201, "processing")
    assert answer.json()["output"][0].startswith("data:image/png;base64,")
    assert "metrics" not in answer.json()
    fake_replicate.clock.advance(1)
    first, second = client.get(answer.json()["urls"]["get"]).json()["output"]
    assert first != second
    assert httpx.get(first).content.startswith(b"\x89PNG")


@pytest.mark.anyio
async def test_a_wait_ends_when_the_caller_leaves() -> None:
    fake = FakeReplicate(clock=ManualClock())
    body = json.dumps({"version": HELLO, "input": {"text": "Bob"}}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    headers = [(b"authorization", f"Bearer {fake.token}".encode()), (b"prefer", b"wait")]
    scope = {"type": "http", "method": "POST", "path": "/v1/predictions", "query_string": b"", "headers": headers}

    async def receive() -> Message:
        await anyio.lowlevel.checkpoint()
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    with anyio.fail_after(2):  # the clock stands still
        await fake(scope, receive, send)
    assert sent[0]["status"] == 202


@pytest.mark.anyio
async def test_a_wait_without_a_server() -> None:
    fake = FakeReplicate(queue_time=0, run_time=0.02)
    transport = httpx.ASGITransport(fake)
    headers = {"authorization": f"Bearer {fake.token}", "prefer": "wait=2"}
    async with httpx.AsyncClient(transport=transport, base_url="http://fake.example/v1", headers=headers) as client:
        with anyio.fail_after(2):
            answer = await client.post("predictions", json={"version": HELLO, "input": {"text": "Bob"}})
    assert answer.json()["output"] == "hello Bob"
    assert answer.json()["urls"]["get"].startswith("http://fake.example/v1/predictions/")


def test_predictions_are_listed_newest_first(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    made = []
    for _ in range(101):
        made.append(hello(client).json()["id"])
        fake_replicate.clock.advance(1)
    first = client.get("predictions").json()
    assert [one["id"] for one in first["results"]] == made[:0:-1]
    assert [one["id"] for one in client.get(first["next"]).json()["results"]] == made[:1]


def test_predictions_can_be_filtered(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    old = hello(client).json()
    fake_replicate.clock.advance(60)
    new = hello(client).json()

    def listed(**params: str) -> list[str]:
        return [one["id"] for one in client.get("predictions", params=params).json()["results"]]

    assert listed(created_after=new["created_at"]) == [new["id"]]
    assert listed(created_before=new["created_at"].replace("Z", "+00:00")) == [old["id"]]
    assert listed(source="web") == []
    for wrong in ({"created_after": "today"}, {"created_before": "2025-13-01T00:00:00Z"}, {"source": "api"}):
        assert client.get("predictions", params=wrong).status_code == 422


def train(client: httpx.Client, model: str = "acme/toy", version: str = "a" * 64, **body: Any) -> httpx.Response:
    given = {"destination": "acme/toy", "input": {}, **body}
    return client.post(f"models/{model}/versions/{version}/trainings", json=given)


def test_life_of_a_training(fake_replicate: FakeReplicate, client: httpx.Client, other: dict[str, str]) -> None:
    made = train(client)
    assert (made.status_code, made.json()["status"]) == (201, "starting")
    url = made.json()["urls"]["get"]
    assert url == f"{fake_replicate.url}/trainings/{made.json()['id']}"
    fake_replicate.clock.advance(11)
    done = client.get(url).json()
    trained = done["output"]["version"].removeprefix("acme/toy:")
    versions = [version["id"] for version in client.get("models/acme/toy/versions").json()["results"]]
    assert versions == [trained, "a" * 64]
    assert client.post("predictions", json={"version": trained, "input": {"x": 1}}).status_code == 201
    assert [one["id"] for one in client.get("trainings").json()["results"]] == [done["id"]]
    assert client.get(url, headers=other).json() == JSON_404
    assert client.get(f"predictions/{done['id']}").json() == JSON_404


def test_trainings_that_add_no_version(fake_replicate: FakeReplicate, client: httpx.Client) -> None:
    def broken(given: Mapping[str, Any]) -> Any:
        raise ValueError("bad data")

    fake_replicate.add_model(FakeModel(owner="acme", name="broken", run=len, train=broken))
    version = client.get("models/acme/broken/versions").json()["results"][0]["id"]
    failing, canceled = train(client, "acme/broken", version).json(), train(client).json()
    assert client.post(canceled["urls"]["cancel"]).json()["status"] == "canceled"
    fake_replicate.clock.advance(11)
    failed = client.get(failing["urls"]["get"]).json()
    assert (failed["status"], failed["error"]) == ("failed", "bad data")
    assert len(client.get("models/acme/toy/versions").json()["results"]) == 1


def test_destinations_that_do_not_exist(client: httpx.Client) -> None:
    for destination in ("acme/none", "other/theirs"):
        answer = train(client, destination=destination)
        assert answer.json() == {"detail": "The specified training destination does not exist", "status": 404}


def test_the_webhook_secret(fake_replicate: FakeReplicate, client: httpx.Client, other: dict[str, str]) -> None:
    key = client.get("webhooks/default/secret").json()["key"]
    assert key.startswith("whsec_")
    assert key == fake_replicate.webhook_secret
    assert client.get("webhooks/default/secret", headers=other).json()["key"] != key
