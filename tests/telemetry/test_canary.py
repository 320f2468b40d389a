"""Marked secrets on every way through the middleware, and then a search for them in all that leaves a trace."""

from __future__ import annotations

import json
import logging
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from traceback import TracebackException
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from replicate_proxy_mw import (
    Forward,
    KeyRequest,
    PermissionDenied,
    Policy,
    PriceRequest,
    ProxyRequest,
    ProxyResponse,
    Rates,
    ReplicateKey,
    WebhookEvent,
)
from replicate_proxy_mw.store import MemoryPredictionStore
from replicate_proxy_mw.testing.webhooks import sign
from tests.otlp import Sink, tracing
from tests.raw_asgi import Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.tenants import Switched

pytestmark = pytest.mark.anyio

Pair = tuple[bytes, bytes]

TESTS = str(Path(__file__).parents[1])
JSON = (b"content-type", b"application/json")

# No part of it is a secret, so that it may stand on signals where content is captured, and nowhere else.
PROSE = "canary-of-the-prompt"


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What nobody may find. `token` and `key` are of several forms; the others have one each."""

    token: str
    key: str
    virtual_key: str = "vk-Jd83LsoQ0pWm5Tz7"
    config_key: str = "cf-Yb62NxkE9rGh4Ua1"
    slug: str = "pc-Hq47ZtvB3mSd8Ke6"
    brought: str = "br-Xw58CfyP2jLn9Ro3"
    password: str = "pw-Gm91VkuA6sHe4Tb0"
    session: str = "se-Qr36DnzW7hYc2Mi8"
    proxy_password: str = "pp-Uf05JbxK4wEo1Ls9"
    webhook: str = "whsec_" + b64encode(b"webhook-canary-Vt74-of-32-bytes!").decode()
    stream_key: str = "sk.Ep29RlyC8vOg5Nd7.of.the.host.32"
    stream_path: str = "st-Zi60MhaT3uKq1Fw4"
    signature: str = "sg-Ba48SojX5nDv2Py6"
    named: str = "nm-Lt17WcgH9eUr3Iz5"
    jwt: str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.Kx82PqLwTz5Rv0Nb"


# A key may be short, or full of what is written in other ways in URLs and in JSON.
SECRETS = {
    "r8": Secrets(token="r8_Td5HsQ9kLw2XvB7nMz4RcY8pJg1FaEu6KoIi", key="pk-Fn83QsdLx0WmZt5KhRvBy2"),
    "hex": Secrets(
        token="9d3f7a1c5e8b2046af91d7c3e5082b6479fc13ad",
        key='Wq7RtY4mLx8Kd?%2F/+#"\\é@9vXz4Lm8RtQ2bN',
    ),
    "odd": Secrets(token="Tk.Vb6~Wq3/Zr9+Xm4=Yn8-Lp2_Jc7-Hd5", key="zQ7kW"),
}

# Each piece of so many characters of a secret gives it away; what is shorter is searched for as a whole.
PIECE = 12

# Locals that repeat what the frames of the server and of layers have, too: the scope, and what goes in and out.
_OF_THE_SERVER = frozenset(("scope", "path", "below", "claimed", "message", "start", "chunk", "read"))


@cache
def needles(secret: str) -> frozenset[str]:
    """The pieces of `secret` as it is, and encoded as for URLs, JSON, Python and in base64; in latin-1."""
    mangled = secret.encode().decode("latin-1")  # as ASGI's headers are decoded
    forms = {form for text in (secret, mangled) for form in (text, json.dumps(text)[1:-1], repr(text)[1:-1])}
    forms |= {quote(secret, safe=""), quote(secret), quote(secret, safe="").lower(), repr(secret.encode())[2:-1]}
    if len(secret) >= PIECE:
        # By where it stands, base64 has three texts for the same bytes; at the ends they depend on what is beside.
        forms |= {b64encode(b" " * before + secret.encode())[4:-4].decode() for before in range(3)}
    return frozenset(piece for form in forms for piece in pieces(form.encode().decode("latin-1")))


def pieces(text: str) -> set[str]:
    return {text[start : start + PIECE] for start in range(max(1, len(text) - PIECE + 1))}


class Planted(Exception):
    """What the host raises, with a secret in its text."""

    def __repr__(self) -> str:
        return "Planted()"


class PlantedDenial(PermissionDenied, Planted):
    """The same, for its caller to read."""


def shown(error: BaseException) -> str:
    """What an error tracker makes of an exception: its chain, with the locals of all frames.

    Nothing is taken of the tests' own frames, which know the secrets, nor the text of what the host has raised.
    """
    lines: list[str] = []
    rest: list[TracebackException | None] = [TracebackException.from_exception(error, capture_locals=True)]
    while rest:
        one = rest.pop()
        if one is None:
            continue
        if not issubclass(one.exc_type or Exception, Planted):
            lines += one.format_exception_only()
        for frame in one.stack:
            if not frame.filename.startswith(TESTS):
                where, found = f"{frame.filename}:{frame.name}", frame.locals or {}
                lines += [f"{where}: {name} = {value}" for name, value in found.items() if name not in _OF_THE_SERVER]
        rest += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "\n".join(lines)


class Log(logging.Handler):
    """All records of all loggers, with everything that a formatter could take from them."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # httpcore tells whoever turns that on what came from Replicate, as it came.
        if record.name.startswith("httpcore") and record.getMessage().startswith("receive_response_"):
            return
        error = record.exc_info[1] if record.exc_info else None
        self.told.append(f"{record.getMessage()} {vars(record)} {'' if error is None else shown(error)}")

    @contextmanager
    def listening(self) -> Iterator[Log]:
        root = logging.getLogger()
        level = root.level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        try:
            yield self
        finally:
            root.setLevel(level)
            root.removeHandler(self)


@dataclass
class Stage:
    """Where a case is played: what it has to hide, its upstream, and what was raised."""

    secrets: Secrets
    upstream: RawUpstream
    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    capture: str
    raised: list[str] = field(default_factory=list)

    @property
    def key(self) -> Pair:
        return (b"x-portkey-api-key", self.secrets.key.encode())

    def app(self, *, options: dict[str, Any] | None = None, layers: Iterable[Any] = (), **keywords: Any) -> Any:
        async def resolver(request: KeyRequest) -> ReplicateKey:
            return ReplicateKey(self.secrets.token, tenant="team-a")

        async def prices(request: PriceRequest) -> Rates:
            return Rates(per_run=1.0)

        keywords = {"key_resolver": resolver, "prices": prices} | keywords
        return proxy(
            keywords.pop("url", self.upstream.url),
            options={"capture_content": self.capture, "read_timeout": 0.3} | (options or {}),
            layers=[self._watching, *layers],
            tracer_provider=self.tracer_provider,
            meter_provider=self.meter_provider,
            **keywords,
        )

    def _watching(self, forward: Forward) -> Forward:
        """A layer of the host that reports what comes from below."""

        async def watching(request: ProxyRequest) -> ProxyResponse:
            try:
                return await forward(request)
            except Exception as error:
                self.raised.append(shown(error))
                raise

        return watching

    async def ask(
        self,
        app: Any,
        method: str = "POST",
        target: str = "/v1/predictions",
        headers: Iterable[Pair] | None = None,
        body: bytes | None = None,
        *,
        caller: Caller | None = None,
        send: Any = None,
        receive: Any = None,
    ) -> Caller:
        """One request; what leaves the middleware is taken down."""
        headers = [self.key, JSON] if headers is None else headers
        body = json.dumps({"version": "v", "input": self.content()}).encode() if body is None else body
        caller = caller or Caller([body[:10], body[10:]])
        try:
            with anyio.fail_after(10):
                scope = http_scope(method, target, headers)
                # Not its methods as they are, since their text is all that it has got.
                await app(scope, receive or (lambda: caller.receive()), send or (lambda message: caller.send(message)))
        except Exception as error:
            self.raised.append(shown(error))
        finally:
            await app.aclose()
        return caller

    def content(self) -> dict[str, Any]:
        """An input or output with secrets under names, of known forms, and of the caller's own, among prose."""
        secrets = self.secrets
        of_names = {"api_key": secrets.named, "nested": [{"hfToken": secrets.named, "password": [secrets.named]}]}
        of_forms = f"{secrets.webhook} and {secrets.jwt}, r8_{secrets.named.replace('-', '')} Bearer {secrets.named}"
        url = f"https://user:{secrets.named}@files.test/a?X-Amz-Signature={secrets.signature}&x={secrets.signature}"
        own = f"my key is {secrets.key}, {secrets.key}"
        data = f"data:text/plain;base64,{b64encode(secrets.key.encode()).decode()}"
        return {"prompt": PROSE, **of_names, "text": of_forms, "url": url, "own": own, "file": data, secrets.key: 1}

    def prediction(self, **changed: Any) -> dict[str, Any]:
        """One that is done, and that says nothing it should not."""
        return {
            "id": "p1",
            "model": "acme/canary",
            "version": "5c7d5dc6",
            "status": "succeeded",
            "created_at": "2026-11-01T10:00:00Z",
            "started_at": "2026-11-01T10:00:01Z",
            "completed_at": "2026-11-01T10:00:02Z",
            "input": self.content(),
            "output": [PROSE],
            "logs": "",
            "error": None,
            "metrics": {"predict_time": 1.0},
            "urls": {"get": "https://api.replicate.com/v1/predictions/p1"},
            **changed,
        }

    def answers(self, content: Any = None, *, status: bytes = b"201 Created", headers: bytes = b"") -> None:
        body = json.dumps(self.prediction() if content is None else content).encode()

        def script(connection: Connection) -> None:
            while connection.request():
                connection.answer(body, status=status, headers=headers)

        self.upstream.script = script

    def sends(self, *pieces: bytes, reset: bool = False) -> None:
        def script(connection: Connection) -> None:
            connection.request()
            for piece in pieces:
                connection.send(piece)
            if reset:
                connection.reset()

        self.upstream.script = script


Play = Callable[[Stage], Awaitable[None]]
CASES: dict[str, Play] = {}


def case(play: Play) -> Play:
    """Puts `play` into the table."""
    CASES[getattr(play, "__name__", "").replace("_", " ")] = play
    return play


# --- what callers send, and where


def _headers(name: str, *each: Callable[[Secrets], list[Pair]]) -> None:
    async def play(stage: Stage) -> None:
        stage.answers()
        for headers in each:
            assert (await stage.ask(stage.app(), headers=[JSON, *headers(stage.secrets)])).status is not None

    CASES[name] = play


def _beside(*headers: tuple[str, str]) -> Callable[[Secrets], list[Pair]]:
    """The key and, beside it, these headers, in which `{key}` stands for it, and names for other secrets.

    What is a credential is put into metadata, too."""

    def made(secrets: Secrets) -> list[Pair]:
        written = [(name.encode(), _filled(text, secrets).encode()) for name, text in headers]
        return [(b"x-portkey-api-key", secrets.key.encode()), *written]

    return made


def _filled(text: str, secrets: Secrets) -> str:
    for name, value in vars(secrets).items():
        text = text.replace("{" + name + "}", value)
    return text


def _metadata(**entries: str) -> Callable[[Secrets], list[Pair]]:
    def made(secrets: Secrets) -> list[Pair]:
        filled = {_filled(key, secrets): _filled(value, secrets) for key, value in entries.items()}
        return [
            (b"x-portkey-api-key", secrets.key.encode()),
            (b"x-portkey-metadata", json.dumps(filled).encode()),
        ]

    return made


def _basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


_REST = "x" * 245  # what is cut at 256 characters is cut within the key

_headers("the key as Portkey sends it", _beside())
for scheme in ("Bearer ", "Token ", "bearer  "):
    _headers(
        f"the key after {scheme.strip()}{len(scheme)}",
        lambda secrets, scheme=scheme: [  # type: ignore[misc]
            (b"authorization", scheme.encode() + secrets.key.encode()),
            (b"x-portkey-trace-id", b"t " + secrets.key.encode()),
        ],
    )
for place in ("trace-id", "span-id", "parent-span-id", "span-name", "provider", "metadata", "request-timeout", "debug"):
    texts = ("{key}", "a {key} b", _REST + "{key}")
    _headers(f"the key as x-portkey-{place}", *(_beside((f"x-portkey-{place}", text)) for text in texts))
for place in (
    *("user-agent", "traceparent", "tracestate", "baggage", "accept", "content-type", "content-length"),
    *("host", "referer", "x-forwarded-for", "webhook-id", "prefer", "x-portkey-custom-host", "idempotency-key"),
):
    _headers(f"the key as {place}", _beside((place, "{key}")))
_headers("the key cut in user-agent", _beside(("user-agent", _REST + "{key}")))
_headers("the key in a traceparent's place", _beside(("traceparent", "00-{key}-b7ad6b7169203331-01")))
_headers(
    "the key in a tracestate that goes with a traceparent",
    lambda secrets: [
        (b"x-portkey-api-key", secrets.key.encode()),
        (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        # One with a character of no tracestate (W3C Trace Context, section 3.3.1.3.2) is dropped anyway.
        (b"tracestate", b"vendor=" + secrets.key.encode()),
    ],
)
_headers("the key as the name of a header", lambda secrets: [(secrets.key.lower().encode(), b"x")])
_headers("the key as a value of metadata", _metadata(user="{key}", more="a {key} b", cut=_REST + "{key}"))
_headers("the key as a key of metadata", _metadata(**{"{key}": "x", "a {key}": "y"}))
_headers("the key deep in metadata", _metadata(user='{"a": ["{key}"]}'))
_headers("the key in metadata that is no JSON", _beside(("x-portkey-metadata", '{"a": "{key}"')))
_headers("the key in metadata that is too long", _beside(("x-portkey-metadata", '{"a": "{key}' + "x" * 5000 + '"}')))
_headers("the key twice", _beside(("x-portkey-api-key", "{key}")))
for name, header, text, secret in (
    ("a virtual key", "x-portkey-virtual-key", "{virtual_key}", "{virtual_key}"),
    ("a config", "x-portkey-config", '{"api_key": "{config_key}", "targets": [{"api_key": "x"}]}', "{config_key}"),
    ("a deep config", "x-portkey-config", '{"targets": [{"virtual_key": "{config_key}"}]}', "{config_key}"),
    # Who has sent what is no JSON is not searched for its parts.
    ("a broken config", "x-portkey-config", '{"api_key": "{config_key}"', "{key}"),
    ("a config of another type", "x-portkey-config", '{"api_key": ["{config_key}"]}', "{config_key}"),
    ("a config's retry", "x-portkey-config", '{"retry": "{config_key}"}', "{key}"),
    ("a slug of a config", "x-portkey-config", "{slug}", "{slug}"),
    ("a token that is brought", "authorization", "Bearer {brought}", "{brought}"),
    ("a token that is brought bare", "authorization", "{brought}", "{brought}"),
    ("a token of an old SDK", "authorization", "Token {brought}", "{brought}"),
    ("basic authentication", "authorization", _basic("user", Secrets.password), "{password}"),
    ("a proxy's authentication", "proxy-authorization", _basic("u", Secrets.proxy_password), "{proxy_password}"),
    ("cookies", "cookie", "theme=dark; session={session}", "{session}"),
    ("another key", "x-api-key", "{brought}", "{brought}"),
):
    elsewhere = [("x-portkey-trace-id", secret), ("user-agent", f"x/1 {secret}"), ("x-portkey-provider", secret)]
    _headers(name, _beside((header, text)), *(_beside((header, text), other) for other in elsewhere))


def _target(name: str, target: str, method: str = "GET") -> None:
    """The key where `{encoded}` stands: as clients encode it, with its slashes as they are, and each byte encoded."""

    async def play(stage: Stage) -> None:
        key = stage.secrets.key
        stage.answers()
        for encoded in (quote(key, safe=""), quote(key), "".join(f"%{byte:02x}" for byte in key.encode())):
            filled = _filled(target.replace("{encoded}", encoded), stage.secrets)
            assert (await stage.ask(stage.app(), method, filled, body=b"")).status is not None

    CASES[name] = play


_target("the key in a path", "/v1/{encoded}")
_target("the key as an id", "/v1/predictions/{encoded}")
_target("the key as an owner", "/v1/models/{encoded}/x")
_target("the key as a model", "/v1/models/acme/{encoded}/predictions", "POST")
_target("the key as a version", "/v1/models/acme/x/versions/{encoded}/trainings", "POST")
_target("the key as a deployment", "/v1/deployments/{encoded}/x/predictions", "POST")
_target("the key as a training", "/v1/trainings/{encoded}/cancel", "POST")
_target("the key in a query", "/v1/predictions?cursor={encoded}&limit={encoded}&{encoded}={encoded}&{encoded}")
_target("the key in what is refused", "/v1/../{encoded}?{encoded}")
_target("the key without a slash", "/v1predictions/{encoded}")
_target("the key as a method", "/v1/predictions", "{key}")
_target("signatures in a query", "/v1/predictions?sig={signature}&X-Amz-Signature={signature}&cursor=1&x={signature}")
_target("a token in a path", "/v1/models/acme/r8_{encoded}AbCdEfGhIjKl/versions")


@case
async def secrets_of_known_forms_in_headers(stage: Stage) -> None:
    secrets = stage.secrets
    text = f"{secrets.webhook} {secrets.jwt} https://x.test/a?sig={secrets.signature} Bearer {secrets.named}"
    stage.answers()
    headers = [stage.key, (b"x-portkey-trace-id", text.encode()), (b"user-agent", text.encode())]
    await stage.ask(stage.app(), headers=[*headers, (b"x-portkey-metadata", json.dumps({"a": text}).encode())])


# --- what Replicate answers


def _field(name: str, *, of: str = "token", **fields: Any) -> None:
    """A prediction in whose `fields` the token that came up is told, or the key."""

    async def play(stage: Stage) -> None:
        secret = getattr(stage.secrets, of)
        stage.answers(stage.prediction(**json.loads(json.dumps(fields).replace("{}", json.dumps(secret)[1:-1]))))
        app = stage.app()
        await stage.ask(app)
        await stage.ask(app, "GET", "/v1/predictions/p1", body=b"")

    CASES[f"the {of} as {name}"] = play


for of in ("token", "key"):
    for name in ("id", "model", "version", "deployment", "status", "logs", "error", "output", "created_at", "source"):
        _field(f"a prediction's {name}", of=of, **{name: "{}"})
    for name in ("model", "version", "deployment"):
        _field(f"a part of a prediction's {name}", of=of, **{name: "acme/{}"})
    _field("a part of the output", of=of, output=["a {} b", {"{}": "{}"}])
    _field("metrics", of=of, metrics={"predict_time": "{}", "{}": 1, "input_token_count": "{}"})
    _field("links", of=of, urls={"get": "https://api.replicate.com/v1/predictions/{}", "stream": "https://x.test/{}"})
    _field("a failed prediction's", of=of, status="failed", error="{}", model="acme/{}")
    _field("an aborted prediction's", of=of, status="aborted", logs="{}", version="{}")
    _field("a running prediction's", of=of, status="processing", logs="{}", model="{}", input={"a": "{}"})


for of in ("token", "key"):
    _field("a URL in the content", of=of, output="see https://x.test/{} and https://{}@x.test/?{} too")


def _echo(name: str, status: bytes, *, content_type: bytes = b"application/json", location: bool = False) -> None:
    async def play(stage: Stage) -> None:
        token, key = stage.secrets.token.encode(), quote(stage.secrets.key).encode()
        body = b'{"detail": "Invalid token: %s", "title": "%s"}' % (token, token)
        headers = b"x-request-id: %s\r\nreplicate-token: %s\r\nset-cookie: a=%s\r\n" % (token, token, token)
        if location:
            headers += b"location: https://api.replicate.com/v1/%s?%s\r\n" % (token, key)
        head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n"
        stage.sends(head % (status, content_type, len(body), headers) + body)
        assert (await stage.ask(stage.app())).status == int(status[:3])

    CASES[name] = play


for code in (b"400 Bad", b"401 No", b"404 No", b"422 No", b"429 Slow", b"500 No", b"503 No"):
    _echo(f"the token in a {code[:3].decode()}", code)
for code in (b"302 There", b"307 There"):
    _echo(f"the token in a {code[:3].decode()}", code, location=True)
_echo("the token in a text", b"200 OK", content_type=b"text/plain")


# --- where upstream fails


@case
async def nothing_listens(stage: Stage) -> None:
    with RawUpstream() as gone:
        url = gone.url
    assert (await stage.ask(stage.app(url=url))).status == 502


@case
async def nothing_speaks_tls(stage: Stage) -> None:
    stage.upstream.script = lambda connection: connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert (await stage.ask(stage.app(url=stage.upstream.url.replace("http:", "https:")))).status == 502


@case
async def a_reset(stage: Stage) -> None:
    stage.sends(reset=True)
    assert (await stage.ask(stage.app())).status == 502


@case
async def nothing_comes(stage: Stage) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    stage.upstream.script = script
    assert (await stage.ask(stage.app())).status == 504


@case
async def the_caller_s_own_limit(stage: Stage) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    stage.upstream.script = script
    assert (await stage.ask(stage.app(), headers=[stage.key, (b"x-portkey-request-timeout", b"100")])).status == 408


def _garbage(name: str, *pieces: str, status: int | None = 502, reset: bool = False) -> None:
    async def play(stage: Stage) -> None:
        stage.sends(*(_filled(piece, stage.secrets).encode() for piece in pieces), reset=reset)
        assert (await stage.ask(stage.app())).status == status

    CASES[name] = play


_OK = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
_garbage("garbage", "{token} {key}\r\n\r\n")
_garbage("a head with garbage", "HTTP/1.1 200 OK\r\n{token} {key}\r\n\r\n")
_garbage("a head with a line too many", "HTTP/1.1 200 OK\r\ncontent-length: {token}\r\n\r\n")
_garbage("half a head", "HTTP/1.1 200 OK\r\nx-token: {token}\r\n")
_garbage("half a head and a reset", "HTTP/1.1 200 OK\r\nx-token: {token}\r\n", reset=True)
_garbage("a status that is none", "HTTP/1.1 101 {token}\r\nupgrade: {key}\r\n\r\n")
_garbage("a status of 7", "HTTP/1.1 700 {token}\r\ncontent-length: 0\r\n\r\n")
_garbage("a cut body", _OK + "content-length: 9999\r\n\r\n", '{"error": "{token} {key}"', status=502)
_garbage("a broken chunk", _OK + "transfer-encoding: chunked\r\n\r\n", "{token}\r\n{key}", status=502)


def _cut(name: str, ending: str, *, reset: bool = False) -> None:
    """An answer that is relayed as it comes, and does not end as it should."""

    async def play(stage: Stage) -> None:
        piece = f"{stage.secrets.token} {PROSE}"
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        pieces = (head, f"{len(piece):x}\r\n{piece}\r\n", _filled(ending, stage.secrets))

        def script(connection: Connection) -> None:
            connection.request()
            for one in pieces:
                connection.send(one.encode())
            stage.upstream.go_on.wait(5)
            if reset:
                connection.reset()

        async def send(message: Any) -> None:
            await caller.send(message)
            if caller.chunks:
                stage.upstream.go_on.set()

        stage.upstream.script = script
        caller = Caller()
        await stage.ask(stage.app(), "GET", "/v1/predictions/p1", caller=caller, send=send)
        assert (caller.status, caller.complete) == (200, False)
        assert "UpstreamAborted" in stage.raised[-1]

    CASES[name] = play


_cut("a stream that ends too early", "")
_cut("a stream with a broken chunk", "{token}\r\n{key}\r\n")
_cut("a stream that is reset", "", reset=True)


@case
async def a_retry(stage: Stage) -> None:
    stage.answers({"detail": stage.secrets.token}, status=b"503 No")
    app = stage.app(options={"safe_retries": 1})
    assert (await stage.ask(app, "GET", "/v1/predictions/p1", body=b"")).status == 503


# --- where the caller leaves


def _leaving(name: str, *, upload: bool = False, head: bool = False) -> None:
    async def play(stage: Stage) -> None:
        def script(connection: Connection) -> None:
            if not upload:
                connection.request()
            if head:
                connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n")
                connection.send(stage.secrets.token[:2].encode() + b"\r\n")
            stage.upstream.ready.set()
            connection.wait_closed()

        stage.upstream.script = script
        caller = Caller([b"a", b"b"], hold_upload=anyio.Event()) if upload else Caller([b"{}"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: stage.ask(stage.app(options={"read_timeout": 5.0}), caller=caller))
            await anyio.to_thread.run_sync(stage.upstream.ready.wait, 5)
            if head:
                await caller.got_chunk.wait()
            caller.left.set()

    CASES[name] = play


_leaving("a caller who leaves within the upload", upload=True)
_leaving("a caller who leaves before the answer")
_leaving("a caller who leaves within the answer", head=True)


@case
async def a_caller_who_was_never_there(stage: Stage) -> None:
    caller = Caller([])
    caller.left.set()
    await stage.ask(stage.app(), caller=caller)


# --- where the host fails


def _host_raises(
    name: str, *, receive_at: int | None = None, send_at: int | None = None, error: type[Exception]
) -> None:
    async def play(stage: Stage) -> None:
        stage.answers()
        caller = Caller([b"{", b"}"])
        received = sent = 0

        async def receive() -> Any:
            nonlocal received
            received += 1
            if received == receive_at:
                raise error(stage.secrets.key)
            return await caller.receive()

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == send_at:
                raise error(stage.secrets.key)
            await caller.send(message)

        await stage.ask(stage.app(), receive=receive, send=send)

    CASES[name] = play


for at in (1, 2, 3):
    _host_raises(f"receive raises at {at}", receive_at=at, error=Planted)
    _host_raises(f"send raises at {at}", send_at=at, error=Planted)
    _host_raises(f"send says at {at} that the caller has left", send_at=at, error=ConnectionResetError)


def _resolver(name: str, resolve: Callable[[KeyRequest, Secrets], Any], status: int) -> None:
    async def play(stage: Stage) -> None:
        async def resolver(request: KeyRequest) -> Any:
            return resolve(request, stage.secrets)

        stage.answers()
        assert (await stage.ask(stage.app(key_resolver=resolver))).status == status

    CASES[name] = play


def _raising(error: Exception) -> Any:
    raise error


def _chained(secrets: Secrets) -> Any:
    try:
        raise Planted(secrets.token)
    except Planted as error:
        raise KeyError(secrets.key) from error


_resolver("a resolver that raises", lambda request, secrets: _raising(Planted(request.api_key, secrets.token)), 503)
_resolver("a resolver that raises from", lambda request, secrets: _chained(secrets), 503)
_resolver("a resolver that denies", lambda request, secrets: _raising(PlantedDenial(secrets.token)), 403)
_resolver("a resolver that knows no such key", lambda request, secrets: None, 401)
_resolver(
    "a resolver that answers with what is no token", lambda request, secrets: f"{secrets.token} {secrets.key}", 503
)
_resolver("a resolver that answers with the bare token", lambda request, secrets: secrets.token, 201)
_resolver(
    "a resolver that names the tenant by the key",
    lambda request, secrets: ReplicateKey(secrets.token, tenant=f"of {request.api_key}"),
    201,
)
_resolver(
    "a resolver that names the tenant by the token",
    lambda request, secrets: ReplicateKey(secrets.token, tenant=secrets.token),
    201,
)


@case
async def a_resolver_that_hangs(stage: Stage) -> None:
    async def resolver(request: KeyRequest) -> str:
        key = request.api_key
        await anyio.sleep_forever()
        return key

    assert (await stage.ask(stage.app(key_resolver=resolver, options={"resolver_timeout": 0.05}))).status == 503


def _layer(name: str, make: Callable[[Secrets], Any], status: int | None) -> None:
    async def play(stage: Stage) -> None:
        stage.answers()
        caller = await stage.ask(stage.app(layers=[make(stage.secrets)]))
        assert caller.status == status

    CASES[name] = play


def _fails_before(error: Callable[[Secrets], Exception]) -> Callable[[Secrets], Any]:
    def made(secrets: Secrets) -> Any:
        def layer(forward: Forward) -> Forward:
            async def failing(request: ProxyRequest) -> ProxyResponse:
                raise error(secrets)

            return failing

        return layer

    return made


def _fails_behind(secrets: Secrets) -> Any:
    def layer(forward: Forward) -> Forward:
        async def failing(request: ProxyRequest) -> ProxyResponse:
            await forward(request)
            raise Planted(f"{secrets.token} {secrets.key}")

        return failing

    return layer


def _fails_within(secrets: Secrets) -> Any:
    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        raise Planted(f"{secrets.token} {secrets.key}")

    def layer(forward: Forward) -> Forward:
        async def failing(request: ProxyRequest) -> ProxyResponse:
            return ProxyResponse(status=200, headers=(), body=body())

        return failing

    return layer


def _lengthens(secrets: Secrets) -> Any:
    def layer(forward: Forward) -> Forward:
        async def longer(request: ProxyRequest) -> ProxyResponse:
            return await forward(replace(request, content_length=1))

        return longer

    return layer


_layer("a layer that raises", _fails_before(lambda secrets: Planted(f"{secrets.token} {secrets.key}")), 500)
_layer("a layer that refuses", _fails_before(lambda secrets: PlantedDenial(secrets.token)), 403)
_layer("a layer that raises behind the answer", _fails_behind, 500)
_layer("a layer that raises within the answer", _fails_within, 200)
_layer("a layer that makes it one that cannot be sent", _lengthens, 500)


@case
async def a_layer_that_closes_badly(stage: Stage) -> None:
    def layer(forward: Forward) -> Forward:
        async def odd(request: ProxyRequest) -> ProxyResponse:
            async def aclose() -> None:
                raise Planted(stage.secrets.token)

            async def afterwards() -> None:
                raise Planted(stage.secrets.token)

            request.afterwards.append(afterwards)
            response = await forward(request)
            return ProxyResponse(status=response.status, headers=(), body=response.body, aclose=aclose)

        return odd

    stage.answers()
    assert (await stage.ask(stage.app(layers=[layer]))).status == 201


class _Failing(MemoryPredictionStore):
    """A store whose `method` fails, with what it was given in the text."""

    def __init__(self, method: str, secret: str) -> None:
        super().__init__()
        self._secret = secret

        async def failing(*given: Any) -> Any:
            raise Planted(f"{given} {secret}")

        setattr(self, method, failing)


for method in ("put", "get", "read", "claim"):

    async def _play_store(stage: Stage, method: str = method) -> None:
        stage.answers(stage.prediction(status="processing"))
        app = stage.app(store=_Failing(method, stage.secrets.token), options={"store_timeout": 0.2})
        await stage.ask(app)
        stage.answers()
        await stage.ask(app, "GET", "/v1/predictions/p1", body=b"")
        await stage.ask(app, "POST", "/v1/predictions/p1/cancel", body=b"")

    CASES[f"a store whose {method} fails"] = _play_store


@case
async def a_store_that_fails_where_predictions_are_owned(stage: Stage) -> None:
    async def resolver(request: KeyRequest) -> ReplicateKey:
        return ReplicateKey(stage.secrets.token, tenant="team-a", policy=Policy(own_predictions=True))

    async def fails(id: str) -> None:
        raise Planted(stage.secrets.token)

    store = Switched()
    store.before_put = store.before_get = fails
    app = stage.app(key_resolver=resolver, store=store)
    stage.answers()
    assert (await stage.ask(app)).status == 503
    assert (await stage.ask(app, "GET", "/v1/predictions/p1", body=b"")).status == 503


@case
async def prices_that_fail(stage: Stage) -> None:
    async def prices(request: PriceRequest) -> Rates:
        raise Planted(stage.secrets.token, request)

    stage.answers()
    assert (await stage.ask(stage.app(prices=prices))).status == 201


@case
async def prices_that_are_none(stage: Stage) -> None:
    async def prices(request: PriceRequest) -> Any:
        return stage.secrets.token

    stage.answers()
    assert (await stage.ask(stage.app(prices=prices))).status == 201


@case
async def a_hook_that_fails(stage: Stage) -> None:
    def redact(path: Any, value: object) -> object:
        raise Planted(stage.secrets.token, path, value)

    stage.answers()
    assert (await stage.ask(stage.app(redact=redact))).status == 201


@case
async def a_hook_that_puts_secrets_in(stage: Stage) -> None:
    def redact(path: Any, value: object) -> object:
        return [value, stage.secrets.key, {stage.secrets.key: stage.secrets.token}, Planted(stage.secrets.token)]

    stage.answers()
    assert (await stage.ask(stage.app(redact=redact))).status == 201


# --- webhooks and streams


def _webhook(
    name: str, status: int, *, fails: bool = False, signed: bool = True, at: float = 0.0, **fields: Any
) -> None:
    async def play(stage: Stage) -> None:
        taken: list[WebhookEvent] = []

        async def on_webhook(event: WebhookEvent) -> None:
            taken.append(event)
            if fails:
                raise Planted(event, event.body, event.prediction, stage.secrets.webhook)

        secrets = stage.secrets
        filled = {name: _filled(value, secrets) for name, value in fields.items()}
        stream = f"https://stream.replicate.com/v1/{secrets.stream_path}"
        # Of the caller's key a webhook knows nothing, so that it is not recognised in content.
        content = {"prompt": PROSE, "api_key": secrets.named}
        event = stage.prediction(input=content, urls={"stream": stream}, **filled)
        body, when = json.dumps(event).encode(), str(int(time.time() + at))
        signature = sign(secrets.webhook, "msg_1", when, body) if signed else f"v1,{'A' * 43}="
        headers = [
            (b"webhook-id", b"msg_1"),
            (b"webhook-timestamp", when.encode()),
            (b"webhook-signature", signature.encode()),
            (b"user-agent", secrets.webhook.encode()),
        ]
        app = stage.app(on_webhook=on_webhook, options={"webhook_secrets": [secrets.webhook]})
        assert (await stage.ask(app, "POST", "/v1/-/webhooks", headers, body)).status == status
        assert bool(taken) is (status in (204, 500))

    CASES[name] = play


_webhook("a webhook", 204)
_webhook("a webhook that fails", 500, fails=True)
_webhook("a webhook that is not signed", 401, signed=False)
_webhook("a webhook that is too old", 401, at=-1000.0)
_webhook("a webhook that tells a secret", 204, model="acme/{webhook}", version="{jwt}", deployment="{webhook}")


@case
async def a_webhook_without_headers(stage: Stage) -> None:
    app = stage.app(options={"webhook_secrets": [stage.secrets.webhook]})
    body = json.dumps({"secret": stage.secrets.webhook}).encode()
    assert (await stage.ask(app, "POST", "/v1/-/webhooks", [], body)).status == 400


def _stream(
    name: str, script: Callable[[Connection], None], status: int, *, change: Any = None, model: str = "acme/canary"
) -> None:
    async def play(stage: Stage) -> None:
        secrets = stage.secrets

        def upstream(connection: Connection) -> None:
            while (request := connection.request()) is not None:
                if not request.line.startswith(b"POST"):
                    script(connection)
                    return
                query = f"sig={secrets.signature}"
                url = f"http://127.0.0.1:{connection.upstream.port}/v1/files/{secrets.stream_path}?{query}"
                created = stage.prediction(status="starting", model=model.format(secrets.key), urls={"stream": url})
                connection.answer(json.dumps(created).encode(), status=b"201 Created")

        stage.upstream.script = upstream
        hosts = [f"127.0.0.1:{stage.upstream.port}"]
        options = {
            "proxy_streams": True,
            "stream_key": secrets.stream_key,
            "stream_hosts": hosts,
            "stream_timeout": 0.3,
        }
        app = stage.app(options=options)
        caller = await stage.ask(app)
        url = json.loads(caller.content)["urls"]["stream"]
        path = url.removeprefix("http://proxy.test")
        assert path.startswith("/v1/-/streams/")
        # Our URL is a secret as long as it is good for something.
        token = path.rpartition("/")[2]
        stage.secrets = _Streamed(**vars(secrets), url=token)
        target = path if change is None else change(path)
        caller = await stage.ask(app, "GET", target, [(b"x-portkey-trace-id", b"reads")], body=b"")
        assert caller.status == status

    CASES[name] = play


@dataclass(frozen=True, kw_only=True)
class _Streamed(Secrets):
    url: str


def _events(connection: Connection) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    connection.send(b"event: output\ndata: %s\n\nevent: done\ndata: {}\n\n" % PROSE.encode())


def _half_events(connection: Connection) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n")
    connection.send(b"event: output\ndata: %s\n\n" % PROSE.encode())


def _redirects(connection: Connection) -> None:
    connection.answer(status=b"302 There", headers=b"location: https://x.test/%s\r\n" % PROSE.encode())


_stream("a stream", _events, 200)
_stream("a stream of a model with the key in its name", _events, 200, model="acme/{}")
_stream("a stream that is cut", _half_events, 200)
_stream("a stream that leads elsewhere", _redirects, 502)
_stream("a stream that is reset", Connection.reset, 502)
_stream("a stream that says nothing", lambda connection: time.sleep(0.5), 504)
_stream("a stream whose URL is changed", _events, 404, change=lambda path: path[:-1] + "-")
_stream("a stream whose URL is cut", _events, 404, change=lambda path: path[:-20])
_stream("a stream whose URL has more", _events, 404, change=lambda path: path + "/x")


# --- the search


def _found(text: str, secrets: Secrets) -> list[str]:
    """Which secrets stand in `text`, with what stands around them."""
    parts = pieces(text)
    found = []
    for name, secret in vars(secrets).items():
        for needle in needles(secret):
            if needle in parts if len(needle) == PIECE else needle in text:
                at = text.index(needle)
                found.append(f"{name}: {text[max(0, at - 150) : at + 80]!r}")
                break
    return found


def _as_latin_1(texts: Iterable[str]) -> str:
    return "\n".join(texts).encode("utf-8", "replace").decode("latin-1")


def _leaks(sink: Sink, log: Log, stages: Iterable[Stage]) -> list[str]:
    exported, logged = b"\n".join(sink.raw).decode("latin-1"), _as_latin_1(log.told)
    leaks = []
    for stage in stages:
        for where, text in (("exported", exported), ("logged", logged), ("raised", _as_latin_1(stage.raised))):
            leaks += [f"{where}: {leak}" for leak in _found(text, stage.secrets)]
            if stage.capture == "NO_CONTENT" and PROSE in text:
                leaks.append(f"{where}: content")
    return leaks


@pytest.mark.parametrize("play", CASES.values(), ids=CASES)
async def test_no_secret_is_told(play: Play, anyio_backend: str, tells_secrets: None) -> None:
    # One of the two on each: what is captured has nothing to do with the event loop.
    capture = {"asyncio": "SPAN_AND_EVENT", "trio": "NO_CONTENT"}[anyio_backend]
    stages = []
    with Sink() as sink, tracing(sink) as (tracer_provider, meter_provider), Log().listening() as log:
        for secrets in SECRETS.values():
            with RawUpstream() as upstream:
                stage = Stage(secrets, upstream, tracer_provider, meter_provider, capture)
                stages.append(stage)
                await play(stage)
        leaks = _leaks(sink, log, stages)
        assert len([span for span in sink.spans if "replicate_proxy.outcome" in span.attributes]) >= len(stages)
        assert "replicate_proxy.requests" in sink.metrics
    assert leaks == []


@pytest.mark.usefixtures("plants_secrets")
@pytest.mark.parametrize("where", ["span", "name", "event", "metric", "log", "logged exception", "local", "content"])
@pytest.mark.parametrize("form", SECRETS)
async def test_the_search_finds_what_is_told(where: str, form: str) -> None:
    """Half a secret is enough, encoded in any way."""
    secrets = SECRETS[form]
    secret = secrets.key if len(secrets.key) < PIECE else secrets.token[-PIECE - 2 : -1]
    with Sink() as sink, tracing(sink) as (tracer_provider, meter_provider), RawUpstream() as upstream:
        stage = Stage(secrets, upstream, tracer_provider, meter_provider, "NO_CONTENT")
        tracer = tracer_provider.get_tracer("planted")
        with Log().listening() as log:
            stage.answers()
            await stage.ask(stage.app())
            assert _leaks(sink, log, [stage]) == []
            with tracer.start_as_current_span(secret if where == "name" else "x") as span:
                if where == "span":
                    span.set_attribute("x", f"a {quote(secret, safe='')} b")
                if where == "event":
                    span.add_event("x", {"x": [json.dumps({"x": secret})]})
                if where == "content":
                    span.set_attribute("x", PROSE)
            if where == "metric":
                meter_provider.get_meter("planted").create_counter("x").add(1, {"x": secret})
            if where == "log":
                logging.getLogger("replicate_proxy_mw").debug("%s", "x", extra={"x": secret})
            if where in ("logged exception", "local"):
                error = _with_a_local(secret)
                if where == "local":
                    stage.raised.append(shown(error))
                else:
                    logging.getLogger("x").error("x", exc_info=error)
            assert len(_leaks(sink, log, [stage])) == 1


def _with_a_local(secret: str) -> Exception:
    """An exception whose cause has passed a frame that is none of the tests', with `secret` among its locals."""
    names: dict[str, Any] = {}
    exec(compile("def fails(local): raise KeyError", "elsewhere.py", "exec"), names)
    try:
        try:
            names["fails"](secret)
        except KeyError as error:
            raise ValueError from error
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.usefixtures("tells_secrets")
@pytest.mark.parametrize(("capture", "seen"), [("NO_CONTENT", 0), ("SPAN_ONLY", 2), ("SPAN_AND_EVENT", 4)])
async def test_where_content_is_captured_the_search_looks_through_it(capture: str, seen: int) -> None:
    with Sink() as sink, tracing(sink) as (tracer_provider, meter_provider), RawUpstream() as upstream:
        stage = Stage(SECRETS["r8"], upstream, tracer_provider, meter_provider, capture)
        stage.answers()
        await stage.ask(stage.app())
        assert b"\n".join(sink.raw).count(PROSE.encode()) == seen
