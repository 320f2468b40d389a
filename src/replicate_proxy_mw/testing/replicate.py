"""FakeReplicate: an ASGI app that behaves like api.replicate.com.

Notes. It judges others, so it is judged itself, by ``scripts/judge-fake DOCUMENT``. 2026-11-21, schemathesis 4.32.5,
Replicate's OpenAPI document 1.0.0-a1 (26 paths), 50 examples an operation, seed 1: 37 of 37 operations tested, 2691
cases in four phases, no failure. All checks were on, but `negative_data_rejection` for `files.create`: a number is no
wrong file name once a form has made it text. The script has valid requests name what exists, lest all answers be 404,
and amends the document where it must, each time for a reason:

- Errors in the recorded form (4XX) are allowed for every operation, since the document names hardly any; the
  statuses of success stay as they are. Requests that follow the document may still be answered with 403, 404, 409
  or 422, since a generated name may not exist, be taken or be somebody else's.
- `files.download` needs no token: the document asks for one, and shows a call that is signed instead.
- `version` of a prediction is `anyOf`, not `oneOf`: else ``hidden`` would match both branches, so none.

Where the document is silent: a create without ``Prefer`` answers 201, a wait that ran out 202 (by the descriptions of
the two); user's cancels make `canceled`, deadlines before the start `aborted`; an unsigned download is a 404.
Stricter than Replicate on purpose: headers a proxy has no business to pass on are refused with 400.
"""

from __future__ import annotations

import gzip
import secrets
import string
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import httpx
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from . import streams
from .catalogue import FakeModel, seed
from .clock import Clock
from .operations import OPERATIONS, Call, Operation
from .problems import Problem, problem, throttled
from .serve import serve
from .state import Account, Deployment, World
from .webhooks import Courier, Delivery

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

# What Cloudflare and Django put on Replicate's answers: the first are worth passing on, the others are not.
_EDGE_HEADERS = {
    "vary": "Cookie, origin",
    "replicate-edge-cluster": "us-east-1-edge",
    "cf-cache-status": "DYNAMIC",
    "server": "cloudflare",
    "strict-transport-security": "max-age=15552000",
    "access-control-allow-origin": "*",
    "set-cookie": "__cf_bm=fake; path=/; HttpOnly; Secure",
    "alt-svc": 'h3=":443"; ma=86400',
    "nel": '{"success_fraction":0,"report_to":"cf-nel","max_age":604800}',
    "report-to": '{"endpoints":[{"url":"https://a.nel.example/report"}],"group":"cf-nel","max_age":604800}',
}
_HOP_BY_HOP = (  # RFC 9110 section 7.6.1; connection and transfer-encoding are the server's own framing
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "upgrade",
)
CREATES_PER_MINUTE, CALLS_PER_MINUTE = 600, 3000  # Replicate's page "Rate limits"


@dataclass(frozen=True, kw_only=True)
class RecordedRequest:
    """A request as it arrived.

    `target`: the raw path with the query; `headers`: names in lower case, in the order sent; `body`: up to the
    bound set, and not `complete` if the caller left before its end (nothing was done then); `operation`: the
    operation id, None if the path or method is unknown; `at`: the fake's own clock.
    """

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]] = field(repr=False)  # they hold tokens
    body: bytes = field(repr=False)
    complete: bool
    operation: str | None
    at: float

    def header(self, name: str) -> str | None:
        """The value of the first header of that name."""
        return Headers(raw=self.headers).get(name)


@dataclass
class _Fault:
    answer: Problem
    operation: str | None
    times: int


class FakeReplicate:
    """An ASGI app that behaves like api.replicate.com; `streams` is the app of its second origin.

    Options, all by keyword:

    - `tokens`: API token to username; each username is an account of its own. By default one token, made up anew
      so that it cannot be mistaken for a real one, of the account ``acme``.
    - `models`: added to the ones that are there from the start (`replicate/hello-world`,
      `meta/meta-llama-3-8b-instruct`, `black-forest-labs/flux-schnell`, `replicate/always-fails` and more), or in
      the place of one with the same name. Every account has a deployment ``hello`` of hello-world.
    - `clock`: real time by default, which a test may advance; `ManualClock` stands still.
    - `queue_time`, `run_time`: seconds that predictions wait and run. Short, and yet long enough to be seen.
    - `api_url`, `stream_url`: what the links in answers begin with. By default the origins it is served at; give
      ``https://api.replicate.com/v1`` to see what a proxy does with Replicate's own links.
    - `page_size`: items on a page of a list; by default 100, and 25 models, as Replicate has it.
    - `max_file_size`: bytes; Replicate's limit is 100 MiB.
    - `max_recorded_body`: bytes of a body kept in `requests`, so that uploads do not fill the memory.
    - `webhook_transport`: where deliveries go; the network by default. An `httpx.ASGITransport` of your own app
      needs no port.
    - `webhook_retry_delay`: seconds before the second attempt, then doubled. Replicate takes about a minute in all.

    Deliveries need the ASGI lifespan, which `serve` sees to.

    For tests: `requests` and `stream_requests` (what arrived), `violations` (what a proxy must not pass on),
    `deliveries`, `clock`, `fail`. They may be used from any thread.
    """

    def __init__(
        self,
        *,
        tokens: Mapping[str, str] | None = None,
        models: Sequence[FakeModel] = (),
        clock: Clock | None = None,
        queue_time: float = 0.2,
        run_time: float = 0.6,
        api_url: str | None = None,
        stream_url: str | None = None,
        page_size: int | None = None,
        max_file_size: int = 100 * 2**20,
        max_recorded_body: int = 2**20,
        webhook_transport: httpx.AsyncBaseTransport | None = None,
        webhook_retry_delay: float = 0.1,
    ) -> None:
        self.clock = clock or Clock()
        self.requests: list[RecordedRequest] = []
        self.stream_requests: list[RecordedRequest] = []
        self.violations: list[str] = []
        self.deliveries: list[Delivery] = []
        self.url = ""
        self.api_url = api_url
        self._stream_url = stream_url
        self._max_recorded_body = max_recorded_body
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._courier = Courier(
            self.clock, self.deliveries, transport=webhook_transport, retry_delay=webhook_retry_delay
        )
        self._window, self._calls = 0, 0
        self._world = World(
            clock=self.clock,
            queue_time=queue_time,
            run_time=run_time,
            page_size=page_size,
            max_file_size=max_file_size,
            stream_url=stream_url or "https://stream.replicate.com",
            models={model.full_name: model for model in (*seed(), *models)},
            deliver=self._courier.deliver,
        )
        made = f"r8_fake{''.join(secrets.choice(string.ascii_letters) for _ in range(33))}"
        accounts: dict[str, Account] = {}
        for token, username in (tokens or {made: "acme"}).items():
            self._world.accounts[token] = accounts.setdefault(username, self._account(username))
        self.token = next(iter(self._world.accounts))

    def _account(self, username: str) -> Account:
        hello = self._world.models["replicate/hello-world"]
        deployment = Deployment(
            owner=username,
            name="hello",
            model=hello.full_name,
            version=(hello.versions or ())[0].id,
            hardware="cpu",
            min_instances=0,
            max_instances=1,
            created_at=self.clock.now(),
        )
        return Account(username=username, deployments={"hello": deployment})

    def __repr__(self) -> str:
        return f"<FakeReplicate {self.url or 'not served'}>"

    @property
    def streams_url(self) -> str:
        """What `urls.stream` of predictions begins with; the origin of `streams` once served."""
        return self._world.stream_url

    @property
    def webhook_secret(self) -> str:
        """The signing secret of the account of `token`, as `webhooks.default.secret.get` gives it."""
        return self._world.accounts[self.token].webhook_secret

    def add_model(self, model: FakeModel) -> None:
        """Offer `model` from now on; takes the place of one with the same name."""
        self._world.models[model.full_name] = model

    def download_url(self, file_id: str, *, lifetime: float = 3600) -> str:
        """A signed URL for `files.download` of a file of the account of `token`; `lifetime` in seconds."""
        owner, expiry = self._world.accounts[self.token].username, str(int(self.clock.now() + lifetime))
        signature = quote(self._world.signature(owner, file_id, expiry), safe="")
        return (
            f"{self.api_url or self.url}/files/{file_id}/download?expiry={expiry}&owner={owner}&signature={signature}"
        )

    def fail(
        self,
        status: int,
        *,
        operation: str | None = None,
        times: int = 1,
        retry_after: int | None = None,
        low_credit: bool = False,
        detail: str | None = None,
        body: bytes | None = None,
        content_type: str = "text/html",
    ) -> None:
        """Answer the next `times` requests (for `operation`, an operation id, if given) with an error.

        The body and headers are those known of Replicate for `status`; `detail` replaces its text. For 429,
        `retry_after` is in seconds (30 by default) and `low_credit` chooses the form of accounts with little credit.
        `body`, with its `content_type`, replaces everything, for the HTML of an edge. Faults queue up.
        """
        headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if body is not None:
            answer = Problem(status, body, content_type=content_type, headers=headers)
        elif status == 429:
            answer = throttled(30 if retry_after is None else retry_after, low_credit=low_credit)
        else:
            answer = problem(status, detail)
            answer.headers.update(headers)
        with self._lock:
            self._faults.append(_Fault(answer, operation, times))

    @contextmanager
    def serve(self) -> Iterator[FakeReplicate]:
        """Serve both origins on loopback ports: `url` (with ``/v1``) and `streams_url` say where."""
        api_url, self._world.closing = self.api_url, False
        with serve(self, self.streams) as served:
            self.url = f"{served.url}/v1"
            self.api_url = api_url or self.url
            self._world.stream_url = self._stream_url or served.urls[1]
            try:
                yield self
            finally:
                self._world.closing = True  # held requests and open streams end themselves
                self.api_url, self.url = api_url, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        found, allowed = _match(scope["method"], _raw_path(scope).decode("ascii", "replace"))
        replay = await self._record(scope, receive, self.requests, found and found[0].id)
        if replay is None:
            return
        headers = Headers(scope=scope)
        try:
            response = await self._answer(Request(scope, replay), headers, found, allowed)
        except Problem as exc:
            response = exc.response()
        self._finish(response, headers, found and found[0].id)
        await response(scope, replay, send)

    async def streams(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app of the second origin: event streams and output files."""
        replay = await self._record(scope, receive, self.stream_requests, None)
        if replay is not None:
            await streams.answer(self._world, scope, replay, send)

    async def _record(
        self, scope: Scope, receive: Receive, into: list[RecordedRequest], operation: str | None
    ) -> Receive | None:
        chunks: list[bytes] = []
        message: Message = {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
            chunks.append(message.get("body", b""))
        body = b"".join(chunks)
        complete = message["type"] == "http.request"
        into.append(
            RecordedRequest(
                method=scope["method"],
                target=_raw_path(scope) + (b"?" + scope["query_string"] if scope["query_string"] else b""),
                headers=[*scope["headers"]],
                body=body[: self._max_recorded_body],
                complete=complete,
                operation=operation,
                at=self.clock.now(),
            )
        )
        if not complete:
            return None
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _answer(
        self, request: Request, headers: Headers, found: tuple[Operation, dict[str, str]] | None, allowed: list[str]
    ) -> Response:
        if found_violations := _violations(headers):
            self.violations.extend(found_violations)
            raise problem(
                400, f"These headers must not reach Replicate: {', '.join(found_violations)}", title="Bad request"
            )
        if found is None and allowed:
            raise Problem(
                405,
                {"detail": f'Method "{request.method}" not allowed.', "status": 405},
                headers={"allow": ", ".join(allowed)},
            )
        if found is None:
            raise Problem(404, {"detail": "Not found."}, content_type="application/json")
        operation, params = found
        with self._lock:
            fault = next((one for one in self._faults if one.operation in (None, operation.id)), None)
            if fault is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                raise fault.answer
        scheme, _, token = headers.get("authorization", "").partition(" ")
        account = self._world.accounts.get(token.strip()) if scheme.lower() in ("bearer", "token") else None
        if account is None:
            if not operation.public:
                raise problem(401)
            account = Account(username="")
        self._world.settle()
        api_url = self.api_url or f"{request.url.scheme}://{headers.get('host', 'api.replicate.com')}/v1"
        return await operation.handler(Call(self._world, account, request, params, api_url))

    def _finish(self, response: Response, headers: Headers, operation: str | None) -> None:
        """Add what every answer of Replicate carries, and compress it as most recorded ones were."""
        window = int(self.clock.now() // 60)
        self._window, self._calls = window, self._calls + 1 if window == self._window else 1
        limit = CREATES_PER_MINUTE if operation and operation.endswith("predictions.create") else CALLS_PER_MINUTE
        own = {
            "ratelimit-remaining": str(max(0, limit - self._calls)),
            "ratelimit-reset": str(60 - int(self.clock.now() % 60)),
            "cf-ray": f"{secrets.token_hex(8)}-FRA",
            **_EDGE_HEADERS,
        }
        if operation and operation.endswith("predictions.create"):
            own["replicate-target-cluster"] = "us-east-1-models"
        for name, value in own.items():
            response.headers.setdefault(name, value)
        text = response.headers.get("content-type", "").startswith(("application/json", "application/problem", "text/"))
        if text and _accepts_gzip(headers.get("accept-encoding", "")):
            response.body = gzip.compress(bytes(response.body), compresslevel=1)
            response.headers["content-encoding"] = "gzip"
            del response.headers["content-length"]  # so the server sends it in chunks, as recorded

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        async with self._courier.running():
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def _match(method: str, path: str) -> tuple[tuple[Operation, dict[str, str]] | None, list[str]]:
    """The operation and its path parameters; else the methods that the path knows."""
    allowed: list[str] = []
    for operation in OPERATIONS:
        if path.startswith("/v1/") and (match := operation.pattern.match(path[3:])):
            if operation.method == method:
                return (operation, {name: unquote(value) for name, value in match.groupdict().items()}), []
            allowed.append(operation.method)
    return None, allowed


def _raw_path(scope: Scope) -> bytes:
    """Before decoding, so that an encoded slash stays within its segment."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return raw


def _violations(headers: Headers) -> list[str]:
    """The names of headers that no proxy may send to Replicate."""
    names = [name.decode("latin-1") for name, _ in headers.raw]
    found = {
        name
        for name in names
        if name.startswith(("x-portkey-", "x-forwarded-")) or name in ("cookie", "forwarded", *_HOP_BY_HOP)
    }
    if names.count("authorization") > 1:
        found.add("authorization")
    if headers.get("connection", "close").lower() not in ("close", "keep-alive"):
        found.add("connection")
    if "content-length" in names and "transfer-encoding" in names:
        found.update(("content-length", "transfer-encoding"))
    return sorted(found)


def _accepts_gzip(accept_encoding: str) -> bool:
    """RFC 9110 section 12.5.3, for the one coding that matters here."""
    weights: dict[str, bool] = {}
    for part in accept_encoding.lower().split(","):
        coding, _, weight = part.partition(";")
        weights[coding.strip()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return weights.get("gzip", weights.get("*", False))
