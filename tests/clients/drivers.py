"""The clients that people point at the proxy, each as one call.

A call creates a prediction, reads it until it ends, creates a slow one and cancels that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import portkey_ai
import pytest
from portkey_ai.api_resources import exceptions as portkey
from replicate.client import Client as ReplicateClient
from replicate.exceptions import ReplicateError

NODE = Path(__file__).parent / "node"
INPUT = {"text": "Ada"}
ENDED = {"succeeded", "failed", "canceled", "aborted"}
POLLS = 100

Prediction = dict[str, Any]
Run = Callable[[str, str, str, str], "Seen"]


@dataclass(frozen=True)
class Seen:
    """What a client was given: a new prediction, the same one at its end, and another one canceled."""

    created: Prediction
    read: Prediction
    canceled: Prediction


class Refused(Exception):
    """A client's own error: its class, the text a user sees, and what else the client lets through."""

    def __init__(
        self,
        kind: str,
        message: str,
        status: int | None,
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id


@dataclass(frozen=True)
class Client:
    """`run(base_url, key, version, slow)`: the base URL ends in /v1, `slow` is the version to cancel.

    An error of the client becomes `Refused`.
    """

    name: str
    needs: Literal["node", "curl"] | None
    run: Run


def require(needs: str | None) -> None:
    """Skip where a client cannot run; fail instead when REQUIRE_ALL=1."""
    if needs is None:
        return
    if not shutil.which(needs):
        reason = f"{needs} is not installed"
    elif needs == "node" and not (NODE / "node_modules").is_dir():
        reason = "the Node SDKs are not installed: run `npm ci` in tests/clients/node"
    else:
        return
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _walk(
    create: Callable[[str], Any],
    read: Callable[[str], Any],
    cancel: Callable[[str], Any],
    version: str,
    slow: str,
) -> Seen:
    created: Prediction = create(version)
    seen: Prediction = read(created["id"])
    for _ in range(POLLS):
        if seen["status"] in ENDED:
            break
        time.sleep(0.05)
        seen = read(created["id"])
    return Seen(created, seen, cancel(create(slow)["id"]))


def portkey_python(base_url: str, key: str, version: str, slow: str) -> Seen:
    # The client holds a second one, which it does not close.
    with (
        portkey_ai.Portkey(api_key=key, provider="@replicate", base_url=base_url) as client,
        client.openai_client,
    ):
        try:
            return _walk(
                lambda version: client.post("predictions", version=version, input=INPUT).model_dump(),
                lambda id: client.get(path=f"predictions/{id}").json(),
                lambda id: client.post(f"predictions/{id}/cancel").model_dump(),
                version,
                slow,
            )
        except portkey.APIStatusError as error:
            raise Refused(
                type(error).__name__,
                str(error),
                error.status_code,
                error.response.json()["error"]["code"],
                error.response.headers["x-request-id"],
            ) from error


def openai_python(base_url: str, key: str, version: str, slow: str) -> Seen:
    headers = portkey_ai.createHeaders(provider="@replicate", api_key=key)  # type: ignore[no-untyped-call]
    with openai.OpenAI(api_key="not-used", base_url=base_url, default_headers=headers) as client:

        def create(version: str) -> object:
            return client.post("/predictions", body={"version": version, "input": INPUT}, cast_to=object)

        try:
            return _walk(
                create,
                lambda id: client.get(f"/predictions/{id}", cast_to=object),
                lambda id: client.post(f"/predictions/{id}/cancel", cast_to=object),
                version,
                slow,
            )
        except openai.APIStatusError as error:
            raise Refused(type(error).__name__, str(error), error.status_code, error.code, error.request_id) from error


def replicate_python(base_url: str, key: str, version: str, slow: str) -> Seen:
    # The client cannot be closed; the transport can. Its paths begin with /v1 themselves.
    with httpx.HTTPTransport() as transport:
        client = ReplicateClient(api_token=key, base_url=base_url.removesuffix("/v1"), transport=transport)
        try:
            return _walk(
                lambda version: client.predictions.create(version=version, input=INPUT).dict(),
                lambda id: client.predictions.get(id).dict(),
                lambda id: client.predictions.cancel(id).dict(),
                version,
                slow,
            )
        except ReplicateError as error:
            raise Refused(type(error).__name__, str(error), error.status, error.type, error.instance) from error


def _curl(key_header: str) -> Run:
    def run(base_url: str, key: str, version: str, slow: str) -> Seen:
        def call(path: str, *options: str) -> Prediction:
            command = ["curl", "-sS", "--max-time", "30", "--write-out", "\n%{http_code}"]
            command += ["--header", key_header.format(key=key), *options, base_url + path]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            text, status = done.stdout.rsplit("\n", 1)
            answer: Prediction = json.loads(text)
            if int(status) >= 400:
                raise Refused("curl", text, int(status), answer["error"]["code"], answer["request_id"])
            return answer

        def create(version: str) -> Prediction:
            body = json.dumps({"version": version, "input": INPUT}, indent=2)
            return call("/predictions", "--header", "Content-Type: application/json", "--data", body)

        return _walk(
            create,
            lambda id: call(f"/predictions/{id}"),
            lambda id: call(f"/predictions/{id}/cancel", "--request", "POST"),
            version,
            slow,
        )

    return run


def _node(script: str) -> Run:
    def run(base_url: str, key: str, version: str, slow: str) -> Seen:
        command = ["node", script, base_url, key, version, slow]
        done = subprocess.run(command, cwd=NODE, check=True, stdout=subprocess.PIPE, text=True, timeout=50)
        line = json.loads(done.stdout)
        if error := line.get("error"):
            raise Refused(
                error["class"],
                error["message"],
                error.get("status"),
                error.get("code"),
                error.get("request_id"),
            )
        return Seen(**line)

    return run


CLIENTS = [
    Client("portkey-python", None, portkey_python),
    Client("portkey-node", "node", _node("portkey.mjs")),
    Client("openai-python", None, openai_python),
    Client("openai-node", "node", _node("openai.mjs")),
    Client("replicate-python", None, replicate_python),
    Client("replicate-node", "node", _node("replicate.mjs")),
    Client("curl-x-portkey-api-key", "curl", _curl("x-portkey-api-key: {key}")),
    Client("curl-bearer", "curl", _curl("Authorization: Bearer {key}")),
]
