"""Everything that can be set, with the reason for each default."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, urlsplit

from .headers import NEVER


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

    connect_timeout: float = 10.0
    """For DNS, TCP and TLS: three lost SYN packets still get through."""

    read_timeout: float = 75.0
    """Between two reads of an answer: Replicate holds a create for up to 60 s (`Prefer: wait`)."""

    write_timeout: float = 30.0
    """Until upstream takes a piece of an upload."""

    max_connections: int = 1000
    """To upstream: a held create keeps one for a minute. Raise the file limit of the process with it."""

    connection_wait: float = 5.0
    """For a free connection when all are in use, then 503: longer waits only move the queue into the proxy."""

    resolver_timeout: float = 2.0
    """For the key resolver, then 503: a create waits for it before anything is sent."""

    forward_headers: Sequence[str] = ()
    """More of the caller's headers for Replicate. Credentials and hop-by-hop headers cannot be listed."""

    return_headers: Sequence[str] = ()
    """More of Replicate's headers for the caller, likewise."""

    trust_traceparent: Literal["parent", "link", "ignore"] = "parent"
    """What an incoming `traceparent` is to the request span where the host has none of its own: its parent, since
    callers are usually services of the same house; `link` or `ignore` for a proxy that strangers reach."""

    def __post_init__(self) -> None:
        _check_path("prefix", self.prefix, may_be_empty=True)
        for path in _names("exclude", self.exclude):
            _check_path("exclude", path)
            if self.prefix and not path.startswith(self.prefix + "/"):
                raise ValueError(f"exclude: {path!r} is not below the prefix {self.prefix!r}")
        _check_upstream(self.upstream)
        for option in ("connect_timeout", "read_timeout", "write_timeout", "connection_wait", "resolver_timeout"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option}: must be more than 0 seconds")
        if self.max_connections < 1:
            raise ValueError("max_connections: must be at least 1")
        for option in ("forward_headers", "return_headers"):
            for name in _names(option, getattr(self, option)):
                lowered = name.lower().encode("ascii", "replace")
                if lowered in NEVER or lowered.startswith(b"x-portkey-"):
                    raise ValueError(f"{option}: {name!r} is never passed on")
        if self.trust_traceparent not in ("parent", "link", "ignore"):
            raise ValueError("trust_traceparent: must be 'parent', 'link' or 'ignore'")


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


def _check_upstream(upstream: str) -> None:
    url = urlsplit(upstream)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("upstream: must be an http or https URL")
    if url.username is not None or url.password is not None:
        raise ValueError("upstream: must not hold user or password")
    if url.query or url.fragment or upstream.endswith(("/", "?", "#")):
        raise ValueError("upstream: must end with its path, without '/', query or fragment")
    if url.scheme == "http" and not _is_loopback(url.hostname):
        raise ValueError("upstream: must be https, since the token goes there; plain http only to loopback")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
