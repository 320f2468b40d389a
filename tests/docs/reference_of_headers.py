"""Which headers go up, come back, are added and are refused: from the sets that the code decides by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from replicate_proxy_mw.headers import CREDENTIALS, DOWN, DOWN_PREFIXES, HOP_BY_HOP, NEVER, SINGLE, UP

# What each is for, where it goes up.
UP_FOR: Mapping[bytes, str] = {
    b"accept": "the form of the answer; `text/event-stream` for a stream",
    b"accept-encoding": "compression; `identity` in its place where the proxy has to read the answer",
    b"accept-language": "as it came",
    b"cancel-after": "Replicate ends the prediction after so long",
    b"content-encoding": "of the body, which goes up as it is encoded",
    b"content-type": "of the body; not with GET and HEAD, whose bodies are dropped",
    b"if-match": "conditional requests",
    b"if-modified-since": "conditional requests; dropped where the proxy has to read the answer",
    b"if-none-match": "conditional requests; dropped where the proxy has to read the answer",
    b"last-event-id": "where a stream goes on",
    b"prefer": "`wait` holds a create for up to 60 s",
    b"range": "parts of a file",
    b"user-agent": "the caller's own",
}

# What comes back otherwise than Replicate sent it.
WHOLE = "as it came; dropped where the body was changed"
CHANGED: Mapping[bytes, str] = {
    b"accept-ranges": WHOLE,
    b"cache-control": "`private, no-store` in its place, unless it says `no-store`; `no-transform` stays",
    b"content-encoding": WHOLE,
    b"content-length": "dropped at 204 and 304 and where the body came in chunks; anew where the body was changed",
    b"content-type": "`text/event-stream` without parameters; one is added where there is none",
    b"etag": WHOLE,
    b"last-modified": WHOLE,
    b"location": "leads to the proxy where it led to Replicate's API",
}


def lines() -> Iterator[str]:
    """What the page has between its marks."""
    yield "## Up to Replicate\n"
    yield "Of a caller's headers these go up, and no others:\n"
    yield from _table(UP, UP_FOR)
    yield "\nThe host can list more in [`forward_headers`](configuration.md#forward_headers), but none that is"
    yield "[never passed on](#never-passed-on), and no `x-portkey-*`."
    yield "\n## Back to the caller\n"
    yield "Of Replicate's headers these come back, and no others:\n"
    yield from _table(DOWN, CHANGED, otherwise="as it came")
    yield from (f"| `{prefix.decode()}*` | as it came |" for prefix in DOWN_PREFIXES)
    yield "\nThe host can list more in [`return_headers`](configuration.md#return_headers), with the same exceptions."
    yield "\n## Never passed on\n"
    yield "In neither direction, whatever a host lists:\n"
    yield f"- credentials: {_listed(CREDENTIALS)};"
    yield f"- fields of one connection (RFC 9110, section 7.6.1): {_listed(HOP_BY_HOP)},"
    yield "  and whatever `connection` names;"
    yield f"- what the proxy says itself: {_listed(NEVER - CREDENTIALS - HOP_BY_HOP)}."
    yield "\n## Only once\n"
    yield "A second line of one of these could be read by one side only, so it is a 400 `bad_request`:"
    yield f"{_listed(SINGLE)}; also `authorization` and `x-portkey-api-key`."


def _table(names: Iterable[bytes], said: Mapping[bytes, str], *, otherwise: str | None = None) -> Iterator[str]:
    yield "| header | what happens |"
    yield "| --- | --- |"
    for name in sorted(names):
        yield f"| `{name.decode()}` | {said[name] if otherwise is None else said.get(name, otherwise)} |"


def _listed(names: Iterable[bytes]) -> str:
    return ", ".join(f"`{name.decode()}`" for name in sorted(names))
