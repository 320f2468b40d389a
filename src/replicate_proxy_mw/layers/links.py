"""Links in Replicate's answers lead back to the proxy: SDKs dial `next` as it stands, with the caller's key.

Only those strings change, not a byte around them. Files keep their `urls.get`: SDKs put it into inputs, and Replicate's
workers fetch it from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from .. import routing
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for_plain, for_one_caller, held, id_of, is_readable, members, plain_of, with_body

PUBLIC_BASE = "https://api.replicate.com/v1"

LISTS = frozenset(
    (
        *("collections.list", "deployments.list", "files.list", "models.list", "models.search"),
        *("models.examples.list", "models.versions.list", "predictions.list", "trainings.list"),
    )
)

# What comes in the place of a link, None to leave it.
Edit = Callable[[str], str | None]


def rewrite_links(
    *,
    upstream: str,
    prefix: str,
    public_url: str | None = None,
    stream_path: Callable[[str, str | None], str | None] | None = None,
) -> Layer:
    """Rewrite `next` and `previous` of lists, `urls.get` and `urls.cancel` of a prediction or training, and `Location`.

    Args:
        upstream: links that begin with it lead to the proxy, as do those that begin with Replicate's public URL.
        prefix: what the proxy takes in the host, percent-encoded; may be empty.
        public_url: the URL of the prefix for callers, without `/` at its end. By default as each caller has reached it,
            by scheme, Host and path; the answer is then for that caller only (`cache-control: private, no-store`).
        stream_path: from `urls.stream` of a prediction and its id to a path below the prefix, None to leave the link.
    """
    bases = sorted((PUBLIC_BASE, upstream), key=len, reverse=True)

    def layer(forward: Forward) -> Forward:
        async def rewriting(request: ProxyRequest) -> ProxyResponse:
            url = public_url or reached(request.scope, prefix)
            if url is None:
                return await forward(request)

            def link(old: str) -> str | None:
                return next((url + old[len(base) :] for base in bases if _begins(old, base)), None)

            def stream(old: str, text: str) -> str | None:
                id = id_of(text.encode()) or request.route.params.get("prediction_id")
                path = stream_path(old, id) if stream_path else None
                return None if path is None else url + path

            rewrite = _rewrite(request, link, stream if stream_path else None)
            response = await forward(request if rewrite is None else asking_for_plain(request))
            located, changed = _located(response, link)
            if rewrite is not None and is_readable(located):
                located, in_body = await _with_links(located, rewrite)
                changed = changed or in_body
            # By its Host header, or with a stream that whoever has the URL may read.
            return for_one_caller(located) if changed and (public_url is None or stream_path) else located

        return rewriting

    return layer


_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?:({_LABEL}(?:\.{_LABEL})*)\.?|\[([0-9a-f:.]+)\])(?::([0-9]{{1,5}}))?", re.IGNORECASE)
_PATH = re.compile(r"(?:/[!-~]*)?")


def reached(scope: Mapping[str, Any], prefix: str) -> str | None:
    """The URL of `prefix` as the caller has reached it; None if Host is missing, doubled or not that of a URL.

    `X-Forwarded-*` is the server's to judge: where it trusts them, it sets the scheme by them.
    """
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    scheme, path = scope.get("scheme", "http"), root(scope) + prefix
    if len(hosts) != 1 or not _is_host(hosts[0]) or scheme not in ("http", "https") or not _PATH.fullmatch(path):
        return None
    return f"{scheme}://{hosts[0]}{path}"


def root(scope: Mapping[str, Any]) -> str:
    """What lies above the prefix, percent-encoded: what `path_of` takes off, or `root_path` where the server has."""
    given: str = (scope.get("root_path") or "").rstrip("/")
    if not given:
        return ""
    if not scope["path"].startswith(given + "/"):
        return routing.path_of({"path": given})
    return routing.path_of({**scope, "root_path": ""}).removesuffix(routing.path_of(scope))


def _is_host(value: str) -> bool:
    found = _HOST.fullmatch(value)
    if found is None or len(value) > 260:
        return False
    name, v6, port = found.groups()
    try:
        if v6:
            IPv6Address(v6)
        elif name.rpartition(".")[2].isdigit():
            IPv4Address(name)
    except ValueError:
        return False
    return int(port or 0) < 1 << 16


def _begins(link: str, base: str) -> bool:
    return link.startswith(base) and link[len(base) : len(base) + 1] in ("", "/", "?")


def _rewrite(
    request: ProxyRequest, link: Edit, stream: Callable[[str, str], str | None] | None
) -> Callable[[str], str] | None:
    """What is done to the answer's text, None if that is not looked at."""
    operation = request.route.details
    if operation is None or request.method == "HEAD":
        return None
    if operation.id in LISTS:
        return partial(rewritten, edits={"next": link, "previous": link})
    edits = {"get": link, "cancel": link}
    match operation.creates or operation.reads:
        case "prediction" if stream:
            return lambda text: rewritten(text, edits={**edits, "stream": lambda old: stream(old, text)}, within="urls")
        case "prediction" | "training":
            return partial(rewritten, edits=edits, within="urls")
    return None


def rewritten(text: str, *, edits: Mapping[str, Edit], within: str | None = None) -> str:
    """A JSON object with some strings at its top level edited, or in the object there that is named `within`.

    At the top level all is done when each name has been seen: `next` and `previous` come before `results`.
    """
    spans: list[tuple[int, int, str]] = []

    def note(edit: Edit, value: Any, start: int, end: int) -> None:
        if isinstance(value, str) and (new := edit(value)) is not None:
            spans.append((start, end, json.dumps(new)))

    missing = set(edits)
    try:
        for name, value, start, end in members(text):
            if within is None and name in edits:
                note(edits[name], value, start, end)
                missing.discard(name)
                if not missing:
                    break
            elif name == within and value and isinstance(value, dict):
                for inner, url, first, last in members(text[start:end]):
                    if inner in edits:
                        note(edits[inner], url, start + first, start + last)
    except (ValueError, RecursionError):
        return text
    parts, done = [], 0
    for start, end, new in spans:
        parts += [text[done:start], new]
        done = end
    return "".join((*parts, text[done:]))


def _located(response: ProxyResponse, link: Edit) -> tuple[ProxyResponse, bool]:
    headers = []
    for name, value in response.headers:
        new = link(value.decode("latin-1")) if name == b"location" else None
        headers.append((name, value if new is None else new.encode("latin-1")))
    return replace(response, headers=tuple(headers)), tuple(headers) != response.headers


async def _with_links(response: ProxyResponse, rewrite: Callable[[str], str]) -> tuple[ProxyResponse, bool]:
    """The answer with its links rewritten, and whether it had any. A body that is too long passes as it comes."""
    response, came, whole = await held(response)
    body = plain = plain_of(response, came) if whole else None
    if plain is not None:
        with suppress(UnicodeDecodeError):
            body = rewrite(plain.decode()).encode()
    if body is None or body == came:
        return response, False
    return with_body(response, body), body != plain
