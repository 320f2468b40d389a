"""What a create has made, read from Replicate again."""

from __future__ import annotations

from dataclasses import replace

from .errors import ProxyError, UpstreamAborted, UpstreamFailed
from .exchange import Forward, ProxyRequest, ProxyResponse
from .json_bodies import asking_for, held
from .operations import Kind
from .telemetry.request import current

# What is said of a body, and not of the exchange that it came with.
_OF_THE_BODY = (b"content-type", b"content-encoding", b"content-language")


async def made(forward: Forward, request: ProxyRequest, kind: Kind, id: str, *, status: int) -> ProxyResponse:
    """What was made with an `Idempotency-Key`, as Replicate shows it now, with the `status` that the create had.

    Raises:
        UpstreamFailed: it could not be read; the text has its id.
        ProxyError: a layer refused it.
    """
    failed: object = "no answer"
    try:
        response, _, _ = await read_again(forward, request, kind, id)
        if response.status == 200:
            return replace(response, status=status)
        failed = response.status
    except UpstreamAborted:
        pass
    except ProxyError as error:
        if error.status < 500:
            raise
    raise UpstreamFailed(
        f"This Idempotency-Key has made {id}, which could not be read ({failed}); nothing was created."
    )


async def read_again(forward: Forward, request: ProxyRequest, kind: Kind, id: str) -> tuple[ProxyResponse, bytes, bool]:
    """What Replicate shows of a prediction or training now, with the key of `request`, as `held` has it, and with those
    headers alone that describe it.

    Raises:
        ProxyError, UpstreamAborted: what `forward` and its answer raised.
    """
    try:
        response = await forward(asking_for(request, f"/{kind}s/{id}"))
    finally:
        if (span := current()) is not None:
            # Replicate was asked, and yet what is answered is what another request has made.
            span.outcome = "answered"
    response, body, whole = await held(response)
    described = [pair for pair in response.headers if pair[0] in _OF_THE_BODY]
    if whole:
        described += [(b"content-length", str(len(body)).encode())]
    return replace(response, headers=tuple(described)), body, whole
