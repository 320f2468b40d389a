"""Links in Replicate's answers lead back to the proxy: SDKs dial `next` as it stands, with the caller's key.

Only those strings change, not a byte around them. Files keep their `urls.get`: SDKs put it into inputs, and Replicate's
workers fetch it from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from .. import routing
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..json_bodies import (
    asking_for_plain,
    held,
    id_of,
    is_readable,
    is_rest,
    members,
    plain_of,
    with_body,
)

PUBLIC_BASE = "https://api.replicate.com/v1"

LISTS = frozenset(
    (
        *("collections.list", "deployments.list", "files.list", "models.list", "models.search"),
        *("models.examples.list", "models.versions.list", "predictions.list", "trainings.list"),
    )
)

# What comes in the place of a link, None to leave it.
Edit = Callable[[str], str | None]

_Place = tuple[str, str, int, int]

_quoted = json.JSONEncoder().encode


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
            by scheme, Host and path.
        stream_path: from `urls.stream` of a prediction and its id to a path below the prefix, None to leave the link.
    """
    bases = sorted({PUBLIC_BASE, upstream}, key=len, reverse=True)

    def layer(forward: Forward) -> Forward:
        async def rewriting(request: ProxyRequest) -> ProxyResponse:
            url = public_url or reached(request.scope, prefix)
            if url is None:
                return await forward(request)

            def link(old: str) -> str | None:
                for base in bases:
                    if old.startswith(base) and old[len(base) : len(base) + 1] in ("", "/", "?"):
                        return url + old[len(base) :]
                return None

            def stream(old: str, text: str) -> str | None:
                id = id_of(text.encode()) or request.route.params.get("prediction_id")
                path = stream_path(old, id) if stream_path else None
                return None if path is None else url + path

            rewrite = _rewrite(request, link, stream if stream_path else None)
            response = await forward(request if rewrite is None else asking_for_plain(request))
            if any([name == b"location" for name, _ in response.headers]):
                response = _located(response, link)
            if rewrite is None or not is_readable(response):
                return response
            response, came, whole = await held(response)
            return _with_links(response, came, rewrite) if whole else response

        return rewriting

    return layer


_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?:({_LABEL}(?:\.{_LABEL})*)\.?|\[([0-9a-f:.]+)\])(?::([0-9]{{1,5}}))?", re.IGNORECASE)
_PATH = re.compile(r"(?:/[!-~]*)?")


def reached(scope: Mapping[str, Any], prefix: str) -> str | None:
    """The URL of `prefix` as the caller has reached it; None if Host is missing, doubled or not that of a URL.

    `X-Forwarded-*` is the server's to judge: where it trusts them, it sets the scheme by them.
    """
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or len(hosts[0]) > 260:
        return None
    return _url(scope.get("scheme", "http"), hosts[0], root(scope) + prefix)


@lru_cache(maxsize=128)
def _url(scheme: str, host: bytes, path: str) -> str | None:
    text = host.decode("latin-1")
    if scheme not in ("http", "https") or not _is_host(text) or not _PATH.fullmatch(path):
        return None
    return f"{scheme}://{text}{path}"


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
    if found is None:
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


def are_rewritten(route: routing.Route, method: str) -> bool:
    """Whether answers to such requests are looked at."""
    operation = route.details
    if operation is None or method == "HEAD":
        return False
    return operation.id in LISTS or (operation.creates or operation.reads) in ("prediction", "training")


def _rewrite(
    request: ProxyRequest, link: Edit, stream: Callable[[str, str], str | None] | None
) -> Callable[[str], str] | None:
    """What is done to the answer's text, None if that is not looked at."""
    operation = request.route.details
    if operation is None or not are_rewritten(request.route, request.method):
        return None
    if operation.id in LISTS:
        return partial(rewritten, edits={"next": link, "previous": link})
    edits = {"get": link, "cancel": link}
    if stream is None or "prediction" not in (operation.creates, operation.reads):
        return partial(rewritten, edits=edits, within="urls")
    return lambda text: rewritten(text, edits={**edits, "stream": lambda old: stream(old, text)}, within="urls")


def rewritten(text: str, *, edits: Mapping[str, Edit], within: str | None = None) -> str:
    """A JSON object with some strings at its top level edited, or in the object there that is named `within`.

    At the top level all is done when each name has been seen: `next` and `previous` come before `results`.
    """
    if within is not None and (new_text := _at_a_glance(text, edits, within)) is not None:
        return new_text
    parts, done = [], 0
    try:
        for name, old, start, end in _one_by_one(text, edits, within):
            if (new := edits[name](old)) is not None:
                parts += [text[done:start], _quoted(new)]
                done = end
    except (ValueError, RecursionError):
        return text
    return "".join((*parts, text[done:]))


def _at_a_glance(text: str, edits: Mapping[str, Edit], within: str) -> str | None:
    """The same at a tenth of the cost, for JSON with one such object, of strings without escapes; None for any other.

    Names are of small letters: where none is escaped, one that stands in quotes once has no other place. What stands
    before it is not looked at; what follows tells that it is at the top.
    """
    quoted = f'"{within}"'
    at = text.find(quoted)
    if at < 1 or at != text.rfind(quoted) or text[at - 1] == "\\" or text[0] != "{":
        return None
    if "\\u00" in text and ("\\u006" in text or "\\u007" in text):
        return None
    start, end = at + len(quoted), text.find("}", at) + 1
    urls = text[start:end]
    parts = urls.split('"')  # every other one a string, by turns a name and a value
    if "".join("".join(parts[::2]).split()) != ":{" + ":," * (len(parts) // 4 - 1) + ":}" or "\\" in urls:
        return None
    if not is_rest(text[end:]):
        return None
    for i in range(1, len(parts), 4):
        if parts[i] in edits and (new := edits[parts[i]](parts[i + 2])) is not None:
            parts[i + 2] = _quoted(new)[1:-1]
    changed = '"'.join(parts)
    return f"{text[:start]}{changed}{text[end:]}"


def _one_by_one(text: str, names: Collection[str], within: str | None) -> Iterator[_Place]:
    """The strings there that `names` has: name, value and span."""
    missing = set(names)
    for name, value, start, end in members(text):
        if within is None and name in names:
            if isinstance(value, str):
                yield name, value, start, end
            missing.discard(name)
            if not missing:
                return
        elif name == within and value and isinstance(value, dict):
            for inner, url, first, last in members(text[start:end]):
                if inner in names and isinstance(url, str):
                    yield inner, url, start + first, start + last


def _located(response: ProxyResponse, link: Edit) -> ProxyResponse:
    headers = []
    for name, value in response.headers:
        new = link(value.decode("latin-1")) if name == b"location" else None
        headers.append((name, value if new is None else new.encode("latin-1")))
    return replace(response, headers=tuple(headers))


def _with_links(response: ProxyResponse, came: bytes, rewrite: Callable[[str], str]) -> ProxyResponse:
    """The answer, whose body is `came`, with its links rewritten."""
    plain = plain_of(response, came)
    if plain is None:
        return response
    try:
        body = rewrite(plain.decode()).encode()
    except UnicodeDecodeError:
        body = plain
    return response if body == came else with_body(response, body)
