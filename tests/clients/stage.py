"""Where the calls of the table are made: proxies on real ports, each row with a Replicate of its own behind them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import httpx

from replicate_proxy_mw import (
    KeyRequest,
    KeyResolver,
    MappingKeyResolver,
    PermissionDenied,
    Policy,
    ProxyConfig,
    ReplicateKey,
    ReplicateProxyMiddleware,
    routing,
)
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, serve
from tests.clients.drivers import NODE
from tests.raw_asgi import host
from tests.raw_upstream import Connection, RawUpstream

TOKEN = "r8_00000000000000000000000000000000000"
OWN_TOKEN = "r8_11111111111111111111111111111111111"  # a caller's
KEY = "pk-team-a"
KEYS = {"an unknown key": "pk-wrong", "a key without rights": "pk-archive"}
OTHERWISE = (PREDICTIONS := "25 predictions", FINAL_SLASH := "base URL with a final slash")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
PATIENCE = 30.0  # seconds for one call

SLOW = FakeModel(owner="acme", name="slow", run=lambda given: "late", queue_time=0, run_time=600)
QUEUED = FakeModel(owner="acme", name="queued", run=lambda given: "late", queue_time=600)
MINE = FakeModel(owner="acme", name="mine", visibility="private")
PRIVATE = FakeModel(owner="acme", name="private", visibility="private", run=lambda given: "mine")


def version_of(model: FakeModel) -> str:
    return (model.versions or ())[0].id


def _drop_before(connection: Connection) -> None:
    connection.request()


def _drop_within(connection: Connection) -> None:
    connection.request()
    head = b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    connection.send(head + b'{"id": "gm3qorzdhgbfurvjtvhg6dckhu", "status": "start')


async def key_of_team(request: KeyRequest) -> ReplicateKey | None:
    if request.api_key == KEYS["a key without rights"]:
        raise PermissionDenied("This team reads the archive only.")
    return ReplicateKey(TOKEN, tenant="team-a") if request.api_key == KEY else None


def environment() -> dict[str, str]:
    """Of the drivers: no proxies and no keys that SDKs would find there."""
    return {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "PATH", "TMPDIR")}


class Driver:
    """A process that makes calls, one at a time; killed and begun anew when a call hangs."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self._command, self._cwd = command, cwd
        self._start()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, cwd=self._cwd, env=environment(), stdin=pipe, stdout=pipe, text=True
        )

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._pipes()
        patience = threading.Timer(PATIENCE, self._process.kill)
        patience.start()
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        line = stdout.readline()
        patience.cancel()
        patience.join()
        if not line:
            self.close()
            self._start()
            return {"error": "nothing", "message": f"within {PATIENCE:.0f} s"}
        seen: dict[str, Any] = json.loads(line)
        return seen

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def close(self) -> None:
        for pipe in self._pipes():
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


def shell(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make a call of cURL as it is typed, but for the status that it then prints last."""
    function = 'curl() { command curl -sS --max-time 20 -w "\\n%{http_code}" "$@"; }\n'
    host = request["url"].removeprefix("http://").removesuffix("/v1")
    names = {**request["names"], "HOST": host, "PORTKEY_API_KEY": request["key"]}
    command = ["sh", "-c", function + request["call"]]
    done = subprocess.run(command, env=environment() | names, capture_output=True, timeout=PATIENCE)
    body, _, status = done.stdout.decode().rpartition("\n")
    if done.returncode:
        return {"error": f"curl ends with {done.returncode}", "message": ""}
    try:
        content = json.loads(body) if body else None
    except ValueError:
        content = body
    return {"value": {"$response": int(status), "body": content}}


@dataclass
class Seen:
    """What came of one call: `answer` as the driver tells it, `reached` the requests that went up, in order."""

    answer: dict[str, Any]
    reached: list[str]
    violations: list[str]


class Stage:
    """A context: servers and drivers run as long as it lasts."""

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            self._set_up(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set_up(self, stack: ExitStack) -> None:
        node = Driver("node", "driver.mjs", cwd=NODE)
        python = Driver(sys.executable, "-m", "tests.clients.python_driver", cwd=NODE.parents[2])
        for driver in (node, python):
            stack.callback(driver.close)
        self._drivers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "Node": node,
            "Python": python,
            "shell": shell,
        }
        self._upload = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hello.txt"
        self._upload.write_text("hello")

        async def api(scope: Any, receive: Any, send: Any) -> None:
            await self._fake(scope, receive, send)

        async def streams(scope: Any, receive: Any, send: Any) -> None:
            await self._fake.streams(scope, receive, send)

        self._fake = FakeReplicate()
        served = stack.enter_context(serve(api, streams))
        self._streams_url = served.urls[1]
        self._api = f"{served.url}/v1"
        self._direct = stack.enter_context(
            httpx.Client(base_url=self._api, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
        )
        self._raw = {
            "the connection drops before the answer": stack.enter_context(RawUpstream(_drop_before)),
            "the connection drops within the answer": stack.enter_context(RawUpstream(_drop_within)),
        }
        bring = MappingKeyResolver({KEY: ReplicateKey(TOKEN, tenant="team-a")}, caller_tokens=True)
        secret = ReplicateKey(TOKEN, tenant="team-a", policy=Policy(operations=["webhooks.*"]))
        apps: dict[str, Any] = {
            "": self._proxy(self._api),
            "read_timeout=0.2": self._proxy(self._api, read_timeout=0.2),
            "caller_tokens=True": self._proxy(self._api, key_resolver=bring),
            'Policy(operations=["webhooks.*"])': self._proxy(self._api, key_resolver=MappingKeyResolver({KEY: secret})),
        }
        apps |= {when: self._proxy(raw.url) for when, raw in self._raw.items()}
        apps["proxy_streams=True"] = self._proxy(
            self._api,
            proxy_streams=True,
            stream_key="a-key-of-more-than-32-characters-for-tests",
            stream_hosts=[self._streams_url.removeprefix("http://")],
        )
        for framework in ("fastapi", "litestar"):
            example = importlib.import_module(f"examples.{framework}_app.app")
            apps[f"the example {framework}_app"] = example.create_app(upstream=self._api, token=TOKEN)
        self._urls = {when: f"{stack.enter_context(serve(app)).url}/v1" for when, app in apps.items()}

    @staticmethod
    def _proxy(upstream: str, *, key_resolver: KeyResolver = key_of_team, **options: Any) -> Any:
        config = ProxyConfig(upstream=upstream, **options)
        return ReplicateProxyMiddleware(host, key_resolver=key_resolver, config=config)

    def play(self, driver: str, call: str, when: str = "") -> Seen:
        """Make `call` with a Replicate that has just begun, under the circumstances that `when` names."""
        status = re.fullmatch(r"Replicate answers (\d+)( once)?", when)
        assert status or when in self._urls or when in KEYS or when in OTHERWISE, when
        self._fake = fake = FakeReplicate(
            tokens={TOKEN: "acme", OWN_TOKEN: "ada"},
            models=[SLOW, QUEUED, MINE, PRIVATE],
            queue_time=0.02,
            run_time=0.15,
            api_url="https://api.replicate.com/v1",
            stream_url=self._streams_url,
            page_size=10,
        )
        names = {name: value() for name, value in self._names().items() if re.search(rf"\b{name}\b", call)}
        if when == PREDICTIONS:
            for _ in range(25):
                self._create(version_of(SLOW))
        fake.requests.clear()
        if status:
            code, times = int(status[1]), 1 if status[2] else 9
            detail = HTTPStatus(code).phrase if code in (408, 409) else None
            fake.fail(code, times=times, detail=detail, retry_after=1 if code == 429 else None)
        raw = self._raw.get(when)
        if raw is not None:
            raw.requests.clear()
        url = self._urls.get(when, self._urls[""]) + ("/" if when == FINAL_SLASH else "")
        key = KEYS.get(when, KEY)
        request = {"call": call, "url": url, "key": key, "names": {**names, "URL": url, "KEY": key}}
        answer = self._drivers[driver](request)
        if raw is not None:
            return Seen(answer, *self._at(raw))
        return Seen(answer, self._reached(fake), self._violations(fake, when))

    @staticmethod
    def _at(raw: RawUpstream) -> tuple[list[str], list[str]]:
        reached = []
        for request in raw.requests:
            method, target, _ = request.line.decode().split()
            reached.append(routing.match(method, target.removeprefix("/v1")).operation or target)
        leaks = ["the caller's key"] if any(KEY.encode() in request.head for request in raw.requests) else []
        return reached, leaks

    @staticmethod
    def _reached(fake: FakeReplicate) -> list[str]:
        reached = [request.operation or f"{request.method} {request.target.decode()}" for request in fake.requests]
        for stream in fake.stream_requests:
            credential = (stream.header("authorization") or "").removeprefix("Bearer ")
            whose = {"": "", KEY: " with the caller's key", TOKEN: " with the token"}[credential]
            reached.append(f"the stream host{whose}")
        return reached

    @staticmethod
    def _violations(fake: FakeReplicate, when: str) -> list[str]:
        found, token = list(fake.violations), OWN_TOKEN if when == "caller_tokens=True" else TOKEN
        for request in fake.requests:
            if request.header("authorization") != f"Bearer {token}":
                found.append("another authorization than the token's")
            if any(KEY.encode() in value for _, value in request.headers):
                found.append("the caller's key")
        return found

    def _names(self) -> dict[str, Callable[[], Any]]:
        """What calls may name; made only where they do."""
        return {
            "VERSION": lambda: HELLO_WORLD,
            "SLOW": lambda: version_of(SLOW),
            "ECHO": lambda: self._version("replicate/echo-00"),
            "FAILS": lambda: self._version("replicate/always-fails"),
            "PRIVATE_VERSION": lambda: version_of(PRIVATE),
            "PREDICTION": lambda: self._ended(self._create(HELLO_WORLD)),
            "RUNNING": lambda: self._create(version_of(SLOW)),
            "ABORTED": lambda: self._ended(self._create(version_of(QUEUED), {"cancel-after": "5"})),
            "TRAINING": lambda: self._ended(self._train("replicate/hello-world", HELLO_WORLD)),
            "RUNNING_TRAINING": lambda: self._train("acme/slow", version_of(SLOW)),
            "FILE": self._file,
            "DOWNLOAD": lambda: self._fake.download_url(self._file()).partition("/v1")[2],
            "OWN_TOKEN": lambda: OWN_TOKEN,
            "PATH_TO_FILE": lambda: str(self._upload),
        }

    def _version(self, model: str) -> str:
        return str(self._direct.get(f"models/{model}").json()["latest_version"]["id"])

    def _create(self, version: str, headers: Mapping[str, str] | None = None) -> str:
        body = {"version": version, "input": {"text": "Ada"}}
        return str(self._direct.post("predictions", json=body, headers=headers).json()["id"])

    def _train(self, model: str, version: str) -> str:
        body = {"destination": "acme/mine", "input": {}}
        return str(self._direct.post(f"models/{model}/versions/{version}/trainings", json=body).json()["id"])

    def _file(self) -> str:
        return str(self._direct.post("files", files={"content": ("hello.txt", b"hello", "text/plain")}).json()["id"])

    def _ended(self, job: str) -> str:
        self._fake.clock.advance(60)
        return job


def counted(reached: list[str]) -> str:
    """The requests that went up, in the order of their first one; how often a client polls is left to it."""
    words = []
    for name, count in Counter(reached).items():
        polled = name == "predictions.get" and reached[0] != name
        times = " (polled)" if polled else f" ({count} times)" if count > 1 else ""
        words.append(name + times)
    return ", ".join(words) or "nothing"
