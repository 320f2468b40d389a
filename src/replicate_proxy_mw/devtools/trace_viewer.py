"""The traces of a `TraceBuffer` in a browser: one page, and the JSON that it asks for."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any
from urllib.parse import parse_qs, quote

from anyio import CapacityLimiter, to_thread

from .trace_buffer import TraceBuffer
from .trace_story import listing, story

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?")

_REFUSED = (
    "The trace viewer answers this machine alone, asked for by the name of localhost and not through a proxy: {why}. "
    "TraceViewer(traces, allow_remote=True) lets others in; put it behind a login then."
)


class TraceViewer:
    """An ASGI app that shows what is in a `TraceBuffer`, to be mounted in the host's app.

        app.mount("/traces", TraceViewer(traces))

    Args:
        traces: where the traces are.
        allow_remote: by default it answers only this machine: the caller's address and the `host` header are
            loopback's, and no proxy has added the caller's own address. One that adds nothing cannot be told from a
            browser here. With True it answers everyone, which needs a login of the host's before it: traces hold
            paths, metadata and, where content is captured, prompts.

    Raises:
        RuntimeError: its page is not there, since the package was not installed as a whole.
    """

    def __init__(self, traces: TraceBuffer, *, allow_remote: bool = False) -> None:
        self._traces, self._allow_remote = traces, allow_remote
        text = page(files(__package__))
        self._page = text.encode()
        self._headers: Headers = [
            (b"cache-control", b"no-store"),
            (b"content-security-policy", policy(text).encode()),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, send: Send) -> None:
        # In a thread: to read thousands of spans takes a while. By a limiter of its own, since what one wants to look
        # into may be handlers that have all the threads there are.
        status, headers, body = await to_thread.run_sync(self._found, scope, limiter=CapacityLimiter(1))
        if status != 204:
            headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _found(self, scope: Scope) -> tuple[int, Headers, bytes]:
        if not self._allow_remote and (why := remote(scope)) is not None:
            return _json({"error": _REFUSED.format(why=why)}, 403)
        if scope["method"] not in ("GET", "HEAD"):
            status, headers, body = _json({"error": "It can only be read: GET and HEAD."}, 405)
            return status, [*headers, (b"allow", b"GET, HEAD")], body
        path = below(scope)
        if path == "":
            return 307, [(b"location", slashed(scope))], b""
        if path == "/":
            return 200, [(b"content-type", b"text/html; charset=utf-8")], self._page
        answer = {"/requests.json": self._requests, "/story.json": self._story}.get(path)
        if answer is None:
            return _json({"error": "There is no such page here."}, 404)
        if of_another_site(scope):
            return _json({"error": "This is for the viewer's own page."}, 403)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        return answer({name: values[0] for name, values in query.items()})

    def _requests(self, query: Mapping[str, str]) -> tuple[int, Headers, bytes]:
        if query.get("after") == str(self._traces.version):
            return 204, [], b""
        version, traces = self._traces.snapshot()
        found = listing(traces, query.get("q", ""))
        return _json({"version": version, "total": found.total, "requests": found.requests})

    def _story(self, query: Mapping[str, str]) -> tuple[int, Headers, bytes]:
        found = story(self._traces.snapshot().traces, query.get("trace", ""), query.get("span"))
        if found is None:
            return _json({"error": "This trace is not here (any more)."}, 404)
        return _json(found)


def page(folder: Traversable) -> str:
    try:
        return folder.joinpath("viewer.html").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RuntimeError("replicate_proxy_mw/devtools/viewer.html is missing: install the whole package.") from None


def policy(page: str) -> str:
    """The Content-Security-Policy that lets the page's own style and script work, and nothing else."""
    return (
        f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, element: str) -> str:
    # With line feeds alone, as a browser reads them.
    found = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", page, re.DOTALL | re.IGNORECASE)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def remote(scope: Mapping[str, Any]) -> str | None:
    """Why a request is not from this machine; None if it is.

    The `host` header is looked at, since any site may have a name that leads here (DNS rebinding).
    """
    client = scope.get("client")
    if not client:
        return "the server does not tell who asks"
    if not _is_loopback(str(client[0])):
        return "the request comes from another address than this machine's"
    if scope.get("http_version") == "1.0":
        return "no browser speaks HTTP/1.0, as nginx does to an app"
    hosts: list[str] = []
    for name, value in scope["headers"]:
        name = name.lower()
        if name in (b"forwarded", b"via", b"x-real-ip") or name.startswith(b"x-forwarded-"):
            return f"a proxy has sent {name.decode('latin-1')}"
        if name == b"host":
            hosts.append(value.decode("latin-1"))
    if len(hosts) != 1:
        return "it has no host header" if not hosts else "it has several host headers"
    host = _HOST.fullmatch(hosts[0])
    name_of_host = "" if host is None else host[1].lower()
    if name_of_host != "localhost" and not _is_loopback(name_of_host.strip("[]")):
        return "the host header names something else"
    return None


def of_another_site(scope: Mapping[str, Any]) -> bool:
    """Whether a page of another origin asks: a host with CORS for all that it serves would let it read the answer."""
    for name, value in scope["headers"]:
        name = name.lower()
        # A page's GET of its own origin has no `origin`.
        if name == b"origin" or (name == b"sec-fetch-site" and value not in (b"same-origin", b"none")):
            return True
    return False


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def below(scope: Mapping[str, Any]) -> str:
    """The path below the mount: "" for the mount itself, "/" where a slash follows.

    Starlette leaves the mount's path in `path` and tells it in `root_path`, Litestar takes it off and adds a slash.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if not (path + "/").startswith(root + "/"):
        # A mount below an app whose own root the server has taken off: Starlette tells the latter apart.
        root = root.removeprefix(scope.get("app_root_path", ""))
    if (path + "/").startswith(root + "/"):
        path = path[len(root) :]
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return path.rstrip("/") or ("/" if raw.endswith(b"/") else "")


def slashed(scope: Mapping[str, Any]) -> bytes:
    """Where the page is, from where the caller looked for it; by its last segment, since a proxy may add others."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    segment = quote(raw.rpartition(b"/")[2], safe="%!$&'()*+,;=:@~")
    query: bytes = scope["query_string"]
    return f"./{segment}/".encode() + (b"?" + query if query else b"") if segment else b"./"


def _json(content: Any, status: int = 200) -> tuple[int, Headers, bytes]:
    # In ASCII, so that there is nothing in it that ends a line or cannot be encoded.
    text = json.dumps(content, default=vars, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    return status, [(b"content-type", b"application/json")], text.encode()
