"""Event streams of predictions, read through the proxy by URLs that are all the permission that is needed.

Replicate serves streams from hosts of their own, and its JavaScript SDK reads `urls.stream` without a token: whoever
has the URL may read. The proxy's are of that kind too. Neither they nor Replicate's may be in a log, an exception or
the locals of a traceback.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import httpx

from .. import headers
from ..errors import MethodNotAllowed, ProxyError, UpstreamFailed
from ..exchange import ProxyResponse
from ..headers import HeaderList
from ..upstream import Answer, classify
from .stream_urls import Stream, StreamUrls, is_meant


class StreamEndpoint:
    """Makes URLs for Replicate's streams, and answers them.

    Args:
        key: the secret that signs, at least 32 characters, since guesses can be tried on any URL; the same in every
            replica, since a stream may be read from another one than its prediction.
        lifetime: seconds that a URL is good for; none can be taken back, so at most a day. The output of a prediction
            is deleted after an hour (Replicate's page "Data retention").
        hosts: `host` or `*.domain`, with `:port` unless it is the scheme's own. Nothing is asked of any other.
            By https only, but for loopback hosts that are listed by name.
        send: a transport's `handle_async_request`; a client's `send` would log URLs and may follow redirects.
        timeout: seconds, by httpx's names. `read` bounds each silence within a stream.
        now: seconds since the epoch, since replicas have to agree.

    Raises:
        ValueError: names the option and what is wrong with it, never the key.
    """

    def __init__(
        self,
        *,
        key: str,
        lifetime: float,
        hosts: Sequence[str],
        send: Callable[[httpx.Request], Awaitable[httpx.Response]],
        timeout: Mapping[str, float],
        now: Callable[[], float] = time.time,
    ) -> None:
        try:
            self._urls = StreamUrls(key=key, lifetime=lifetime, hosts=hosts, now=now)
        finally:
            del key  # an error's traceback shows locals
        self._send, self._timeout = send, dict(timeout)

    is_meant = staticmethod(is_meant)

    def path_for(self, url: str, id: str | None) -> str | None:
        """The path below the proxy's prefix for a stream URL of Replicate; None for any other URL. `id` is that of the
        prediction, and told by `find`."""
        return self._urls.path_for(url, id)

    def find(self, *, path: str, method: str) -> Stream:
        """What `path`, as it came below the prefix, leads to. Nothing is sent.

        HEAD is a GET whose body nobody reads: the stream hosts are not known to have it.

        Raises:
            MethodNotAllowed, StreamUnknown, StreamExpired
        """
        found: Stream | ProxyError
        if method in ("GET", "HEAD"):
            found = self._urls.url_of(path)
        else:
            found = MethodNotAllowed("Streams are read by GET.", headers=((b"allow", b"GET, HEAD"),))
        del path
        if isinstance(found, ProxyError):
            raise found from None
        return found

    async def fetch(self, stream: Stream, headers: HeaderList) -> ProxyResponse:
        """Ask for `stream`; `headers` are those of the caller that may go up.

        Raises:
            UpstreamUnreachable, Overloaded, UpstreamTimeout, UpstreamFailed: as of `Upstream.forward`; the last for a
                redirect too. The body may raise `UpstreamAborted`.
        """
        answer = await self._fetch(stream.url, headers)
        if isinstance(answer, ProxyError):
            raise answer from None
        return answer

    async def _fetch(self, url: httpx.URL, caller: HeaderList) -> ProxyResponse | ProxyError:
        """Errors are returned here too."""
        request = httpx.Request("GET", url, headers=_up(url, caller), extensions={"timeout": self._timeout})
        try:
            response = await self._send(request)
        except Exception as error:
            return error.with_traceback(None) if isinstance(error, ProxyError) else classify(error)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        body = Answer(response.stream)
        try:
            kept = _down(response)
        except ProxyError as error:
            await body.aclose()
            return error.with_traceback(None)
        return ProxyResponse(status=response.status_code, headers=kept, body=body, aclose=body.aclose)


def _up(url: httpx.URL, caller: HeaderList) -> HeaderList:
    """No credentials, whatever the caller sends: the URL is one (Replicate's Python SDK adds the caller's key)."""
    kept = [pair for pair in caller if pair[0] in (b"accept", b"last-event-id", b"user-agent")]
    kept += [pair for pair in caller if pair == (b"cache-control", b"no-store")]
    accept = () if any(name == b"accept" for name, _ in kept) else ((b"accept", b"text/event-stream"),)
    return ((b"host", url.netloc), *accept, (b"accept-encoding", b"identity"), *kept)


def _down(response: httpx.Response) -> HeaderList:
    status = response.status_code
    if 300 <= status < 400:
        raise UpstreamFailed("Replicate's stream host answered with a redirect, which is not followed.")
    if not 200 <= status < 600:
        raise UpstreamFailed()
    return headers.down(response.headers.raw, status)
