"""Everything that can be set, with the reason for each default."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, quote, urlsplit

from .headers import NEVER
from .portkey import MAX_ATTEMPTS

# Hosts that were seen in `urls.stream`, and the one in Replicate's documentation of streams.
STREAM_HOSTS = (
    "stream.replicate.com",
    "streaming.api.replicate.com",
    "streaming-api.svc.us.c.replicate.net",
    "streaming-api.svc.rno2.c.replicate.net",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyConfig:
    """Options of the proxy; checked once, when it is made. All times are in seconds.

    Raises:
        ValueError: names the option and what is wrong with it.
    """

    prefix: str = "/v1"
    """Paths at and below it are proxied. `/v1`, since that is where every client of Portkey and Replicate looks.
    Empty where the host mounts the middleware at a path of its own."""

    upstream: str = "https://api.replicate.com/v1"
    """Where the prefix is forwarded to: the only place where a token is ever sent. Plain http only to loopback."""

    exclude: Sequence[str] = ()
    """Paths below the prefix that stay the host's, with all below them."""

    public_url: str | None = None
    """The URL under which callers reach the prefix (`https://app.example/v1`): links in answers lead there. By default
    that of each request, by its Host header; set it where a proxy in front changes host, scheme or path."""

    unwrap_data: bool = True
    """Unwrap `{"data": {...}}`, as Portkey's SDK for Python sends the documented call; Replicate has no such field."""

    safe_retries: int = 0
    """More attempts of what can be sent again without harm, unless the caller's config says how many. None, since SDKs
    try again by themselves."""

    proxy_streams: bool = False
    """Whether `urls.stream` leads through the proxy, below `/-/streams/`. Not by default: it needs `stream_key`."""

    stream_key: str | None = field(default=None, repr=False)
    """The secret that signs stream URLs: at least 32 characters, the same in all replicas."""

    stream_lifetime: float = 3600.0
    """For how long a stream URL can be used: Replicate deletes a prediction's output after an hour."""

    stream_timeout: float = 600.0
    """How long a stream may be silent: a model that has to be started first may be, for minutes."""

    max_streams: int = 500
    """Streams read through the proxy at a time, apart from `max_connections`: whoever has such a URL needs no key, and
    must not be able to keep the API's connections."""

    stream_hosts: Sequence[str] = STREAM_HOSTS
    """Where streams may come from: hosts, or `*.` and a domain, with a port if it has one. No other is proxied."""

    fast: bool = False
    """Reach Replicate by the transport of the extra `fast`, whose parser is compiled. Not by default, since it is one
    dependency more."""

    connect_timeout: float = 10.0
    """How long a new connection to Replicate may take, DNS, TCP and TLS: three lost SYN packets still get through."""

    read_timeout: float = 75.0
    """How long Replicate may take from the request's last byte to the whole head of its answer, and then between two
    reads of its body: it holds a create for up to 60 s (`Prefer: wait`). A `transport` that is given has it for any two
    reads."""

    write_timeout: float = 30.0
    """How long Replicate may take for a piece of an upload: a connection that takes nothing for so long is dead."""

    body_timeout: float = 30.0
    """How long a caller's body may take to begin, and to go on when more of it is waited for, then 408: who sends no
    faster holds a connection for nothing."""

    total_timeout: float | None = None
    """How long a whole request may take, from its key to its answer's last byte; then 504, or a cut answer. None, since
    a stream or a large file takes as long as it takes."""

    max_body_size: int | None = None
    """How many bytes a caller's body may have, then 413. None, since Replicate has limits of its own, and bodies are
    not held here."""

    max_in_flight: int = 10_000
    """Requests under way at a time, of all callers, streams and webhooks too, then 503: a process with more has no
    sockets or memory left."""

    max_connections: int = 1000
    """Connections to Replicate at a time: a held create keeps one for a minute. Raise the process's limit of open files
    with it."""

    connection_wait: float = 5.0
    """How long to wait for a free connection when all are in use, then 503: longer waits only move the queue into the
    proxy."""

    require_key: bool = True
    """Answer 401 to a caller without a key, before the resolver is asked: most are mistakes. Off where the resolver
    knows callers by the host's own session; it then sees an empty key. Sessions in cookies need `SameSite`, since a key
    in a header is what keeps other sites' pages from calling."""

    resolver_timeout: float = 2.0
    """How long the key resolver may take, then 503: a create waits for it before anything is sent."""

    store_timeout: float = 2.0
    """How long each call of the prediction store may take before anything goes up, then 503, as for the resolver. An
    answer that is paid waits for 0.4 s at most."""

    lookup_versions: bool = False
    """Ask Replicate whose a bare version id is, once, where a key is restricted to some models, and whether
    `owner/name:id` is what it says. Not by default: it is a request more before a create."""

    forward_headers: Sequence[str] = ()
    """More of the caller's headers for Replicate. Credentials and hop-by-hop headers cannot be listed."""

    return_headers: Sequence[str] = ()
    """More of Replicate's headers for the caller. Credentials and hop-by-hop headers cannot be listed."""

    trust_traceparent: Literal["parent", "link", "ignore"] = "parent"
    """What an incoming `traceparent` is to the request span where the host has none of its own: its parent, since
    callers are usually services of the same house; `link` or `ignore` for a proxy that strangers reach."""

    propagate_upstream: bool = False
    """Send Replicate the attempt's `traceparent`. Not by default: trace ids are nobody's business there."""

    capture_content: bool | str | None = None
    """Show inputs and outputs, redacted and cut: `SPAN_ONLY`, `EVENT_ONLY`, `SPAN_AND_EVENT`, `NO_CONTENT`, or True for
    the first and False for the last. By default what `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` says, and
    nothing where that is not set: prompts are personal data."""

    webhook_secrets: Sequence[str] = field(default=(), repr=False)
    """Replicate's signing secrets (`whsec_…`), several while one is replaced: with one there, deliveries are taken at
    `/-/webhooks` below the prefix."""

    webhook_timeout: float = 10.0
    """How long the host's `on_webhook` may take, then 500: Replicate tries again."""

    def __post_init__(self) -> None:
        _check_path("prefix", self.prefix, may_be_empty=True)
        for path in _names("exclude", self.exclude):
            _check_path("exclude", path)
            if self.prefix and not path.startswith(self.prefix + "/"):
                raise ValueError(f"exclude: {path!r} is not below the prefix {self.prefix!r}")
        _check_upstream(self.upstream)
        for option in (
            "connect_timeout",
            "read_timeout",
            "write_timeout",
            "body_timeout",
            "total_timeout",
            "connection_wait",
            "resolver_timeout",
            "store_timeout",
            "stream_lifetime",
            "stream_timeout",
            "webhook_timeout",
        ):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ValueError(f"{option}: must be more than 0 seconds")
        for option in ("max_body_size", "max_in_flight", "max_connections", "max_streams"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option}: must be at least 1")
        if not 0 <= self.safe_retries <= MAX_ATTEMPTS:
            raise ValueError(f"safe_retries: must be from 0 to {MAX_ATTEMPTS}")
        if self.fast and not _is_installed("httptools"):
            raise ValueError("fast: needs httptools, of the extra of that name: replicate-proxy-mw[fast]")
        if self.public_url is not None:
            _check_url("public_url", self.public_url)
        if self.proxy_streams and len(self.stream_key or "") < 32:
            raise ValueError("stream_key: must have at least 32 characters, for proxy_streams")
        if not self.stream_lifetime <= 86400:
            raise ValueError("stream_lifetime: must be at most a day, since a URL cannot be taken back")
        _names("stream_hosts", self.stream_hosts)
        _names("webhook_secrets", self.webhook_secrets)
        for option in ("forward_headers", "return_headers"):
            for name in _names(option, getattr(self, option)):
                lowered = name.lower().encode("ascii", "replace")
                if lowered in NEVER or lowered.startswith(b"x-portkey-"):
                    raise ValueError(f"{option}: {name!r} is never passed on")
        if self.propagate_upstream and any(name.lower() == "traceparent" for name in self.forward_headers):
            raise ValueError("propagate_upstream: the caller's traceparent, of forward_headers, would go up beside it")
        if self.trust_traceparent not in ("parent", "link", "ignore"):
            raise ValueError("trust_traceparent: must be 'parent', 'link' or 'ignore'")


def _is_installed(module: str) -> bool:
    from importlib.util import find_spec  # late, since few ask

    return find_spec(module) is not None


def _names(option: str, value: Sequence[str]) -> Sequence[str]:
    if isinstance(value, str):
        raise ValueError(f"{option}: a list of strings, not one string")
    return value


def _check_path(option: str, path: str, *, may_be_empty: bool = False) -> None:
    if may_be_empty and not path:
        return
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError(f"{option}: {path!r} must begin with '/' and not end with it")
    if quote(path, safe="/:@!$&'()*+,;=-._~%") != path:
        raise ValueError(f"{option}: {path!r} must be percent-encoded")


def _check_url(option: str, value: str) -> SplitResult:
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{option}: must be an http or https URL")
    if url.username is not None or url.password is not None:
        raise ValueError(f"{option}: must not hold user or password")
    if url.query or url.fragment or value.endswith(("/", "?", "#")):
        raise ValueError(f"{option}: must end with its path, without '/', query or fragment")
    return url


def _check_upstream(upstream: str) -> None:
    url = _check_url("upstream", upstream)
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError("upstream: must be https, since the token goes there; plain http only to loopback")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
