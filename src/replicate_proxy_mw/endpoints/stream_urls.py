"""URLs for Replicate's streams through the proxy: signed, good for a while, and for listed hosts only."""

from __future__ import annotations

import hmac
import math
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

import httpx

from ..config import is_loopback
from ..errors import ProxyError, StreamExpired, StreamUnknown

PATH = "/-/streams/"
MAX_URL = 2048  # characters; a path of less than 3 KiB then, where servers and proxies take 8

_EXPIRY = 5  # bytes of seconds since the epoch
_SIGNED = re.compile(PATH + r"([A-Za-z0-9_-]{8,2824})\.([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LISTED = re.compile(r"(\*\.(?=[^.]+\.))?((?:[a-z0-9-]+\.)*[a-z0-9-]+|\[[0-9a-f:]+\])(?::([1-9][0-9]{0,4}))?")


def is_meant(path: str) -> bool:
    """Whether `path` is that of a stream, in any spelling: what it holds is not for Replicate, and not for a span."""
    return unquote(path).lstrip("/").startswith(PATH.lstrip("/"))


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream of Replicate's, and the prediction's id, "" where that is not known."""

    url: httpx.URL = field(repr=False)
    id: str


class StreamUrls:
    """From Replicate's stream URLs to our own, and back. The arguments are those of `StreamEndpoint`."""

    def __init__(self, *, key: str, lifetime: float, hosts: Sequence[str], now: Callable[[], float]) -> None:
        # Derived, since the host may sign other things with it; surrogates come from bytes in the environment.
        label = b"replicate_proxy_mw stream URL, version 2"
        self._key = hmac.digest(key.encode("utf-8", "surrogatepass"), label, "sha256") if len(key) >= 32 else b""
        del key
        if not self._key:
            raise ValueError("key: must have at least 32 characters")
        if not 0 < lifetime <= 86400:
            raise ValueError("lifetime: must be more than 0 seconds and at most a day")
        if not hosts:
            raise ValueError("hosts: must list one at least")
        origins = "|".join(map(_origin, hosts))
        # Up to the path nothing but a listed origin; after it what a URI may hold (RFC 3986), without fragment.
        self._pinned = re.compile(rf"(?:{origins})/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{{2}})*")
        self._lifetime, self._now = lifetime, now

    def path_for(self, url: str, id: str | None) -> str | None:
        """The path below the proxy's prefix for a stream URL of Replicate; None for any other URL.

        It holds the prediction's `id`, but for one that does not look like Replicate's.
        """
        if self._parsed(url) is None:
            return None
        expires = math.ceil(self._now() + self._lifetime)
        id = id if id is not None and _ID.fullmatch(id) else ""
        payload = _base64(expires.to_bytes(_EXPIRY, "big") + bytes([len(id)]) + id.encode() + url.encode())
        return f"{PATH}{payload}.{self._signature(payload)}"

    def url_of(self, path: str) -> Stream | ProxyError:
        """What `path` was made for. Errors are returned: the traceback of one that is raised would show it."""
        signed = _SIGNED.fullmatch(path)
        # Compared as text, since more than one text stands for the same bytes.
        if signed is None or not hmac.compare_digest(self._signature(signed[1]), signed[2]):
            return StreamUnknown()
        content = urlsafe_b64decode(signed[1] + "==")
        if self._now() >= int.from_bytes(content[:_EXPIRY], "big"):
            return StreamExpired()
        start = _EXPIRY + 1
        end = start + content[_EXPIRY]
        # Again, since replicas may differ in their hosts, for the time of a deployment at least.
        url = self._parsed(content[end:].decode())
        return StreamUnknown() if url is None else Stream(url, content[start:end].decode())

    def _signature(self, payload: str) -> str:
        return _base64(hmac.digest(self._key, payload.encode(), "sha256"))

    def _parsed(self, text: str) -> httpx.URL | None:
        if len(text) > MAX_URL or not self._pinned.fullmatch(text):
            return None
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            return None
        # httpx repairs what it does not like, and would ask for something else than was signed.
        return url if str(url) == text else None


def _origin(listed: str) -> str:
    """A regular expression for what `listed` stands for."""
    found = _LISTED.fullmatch(listed.lower())
    if found is None or int(found[3] or 443) > 65535:
        raise ValueError(f"hosts: {listed!r} is neither a host nor '*.' and a domain, with or without a port")
    domain, name, port = found.groups()
    scheme = "https?" if not domain and port != "443" and is_loopback(name.strip("[]")) else "https"
    labels = r"(?:[a-z0-9-]+\.)+" if domain else ""
    # httpx writes no port that is the scheme's own.
    return f"{scheme}://{labels}{re.escape(name)}" + (f":{port}" if port not in (None, "443") else "")


def _base64(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()
