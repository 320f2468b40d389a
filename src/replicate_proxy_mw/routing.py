"""Which requests are ours, what they ask of Replicate, and which targets are refused. Bytes stay as they came.

Only `raw_path` is read: servers decode `path`, and two readings of one path are how proxies are fooled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from .errors import BadRequest, MethodNotAllowed
from .operations import OPERATIONS, Operation

# Characters that the path of a URI may hold (RFC 3986, section 3.3); "/" separates its segments.
_PATH_SAFE = "/:@!$&'()*+,;=-._~"

_DOT_SEGMENT = re.compile(r"(?:^|/)\.{1,2}(?=/|$)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_UNENCODED = re.compile(r"[^\x21-\x7e]|#")
# RFC 9110, section 5.6.2.
_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Z]+")

# Targets of which `check` has nothing to say, whatever it looks for: nearly all.
_ORDINARY = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9_.~-]*+)*+")


# A tuple takes a fifth of the time that a frozen dataclass does.
class Route(NamedTuple):
    """Where a request goes: a path template of the API, its operation if the method has one, and its parameters.

    `is_secret` says that who knows the path may read what is there: it stands on no span.
    """

    template: str
    operation: str | None = None
    details: Operation | None = None
    params: Mapping[str, str] = MappingProxyType({})
    is_secret: bool = False

    @property
    def model(self) -> str | None:
        """`owner/name` where the path names a model."""
        return f"{self.params['model_owner']}/{self.params['model_name']}" if "model_owner" in self.params else None


STREAM = Route("/-/streams/{token}", is_secret=True)
WEBHOOK = Route("/-/webhooks")
UNKNOWN = Route("/{path}")


class _Template(NamedTuple):
    path: str
    names: tuple[tuple[int, str], ...]
    literals: tuple[tuple[int, str], ...]
    operations: Mapping[str, Operation]
    routes: dict[str, Route]
    """By method, where there are no parameters."""


def _templates() -> dict[tuple[int, str], list[_Template]]:
    """By the number of segments and the first one, which no template leaves open."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        methods = by_path.setdefault(operation.path, {})
        methods[operation.method] = operation
        if operation.method == "GET":
            methods["HEAD"] = operation
    templates: dict[tuple[int, str], list[_Template]] = {}
    for path, methods in by_path.items():
        segments = path.split("/")
        names = tuple((i, text[1:-1]) for i, text in enumerate(segments) if text.startswith("{"))
        literals = tuple((i, text) for i, text in enumerate(segments) if i > 1 and not text.startswith("{"))
        routes = {} if names else {method: Route(path, one.id, one) for method, one in methods.items()}
        template = _Template(path, names, literals, methods, routes)
        templates.setdefault((len(segments), segments[1]), []).append(template)
    return templates


_TEMPLATES = _templates()


def path_of(scope: Mapping[str, Any]) -> str:
    """The path below the host's mount point, percent-encoded as the caller sent it.

    Where a server gives no `raw_path`, or an outer middleware has rewritten `path` alone, it is rebuilt from `path`.
    `root_path` is dropped when the path begins with it: uvicorn and Starlette's mounts keep it there, hypercorn and
    granian do not.
    """
    decoded: str = scope["path"]
    raw: bytes | None = scope.get("raw_path")
    path = quote(decoded, safe=_PATH_SAFE) if raw is None else raw.decode("latin-1")
    if path != decoded and raw is not None and unquote(path) != decoded:
        path = quote(decoded, safe=_PATH_SAFE)
    root: str | None = scope.get("root_path")
    if not root:
        return path
    if not decoded.startswith(root + "/"):
        # A mount below an app whose own root the server has taken off: Starlette tells the latter apart.
        root = root.removeprefix(scope.get("app_root_path") or "")
    if not root.strip("/") or not decoded.startswith(root + "/"):
        return path
    # Segment by segment, since `root_path` is decoded and `path` is not.
    segments = path.split("/")
    count = root.count("/") + 1
    return "/" + "/".join(segments[count:]) if unquote("/".join(segments[:count])) == root else path


def within(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` or lies below it: `/v1` and `/v1/x`, not `/v1beta`."""
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/")


def is_excluded(paths: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether one of `paths`, however it is spelled, lies within what a host keeps for itself."""
    if not exclude:
        return False
    return any(within(re.sub("/+", "/", unquote(path)), unquote(own)) for own in exclude for path in paths)


def match(method: str, path: str) -> Route:
    """The route of a path below the prefix. HEAD is its GET; a path that the API does not have is `/{path}`.

    The path is decoded for it, slashes too: Replicate may read it so, and no spelling is to hide an operation.
    """
    segments = (unquote(path) if "%" in path else path).split("/")
    count = len(segments)
    for template in _TEMPLATES.get((count, segments[1]), ()) if count > 1 else ():
        for i, text in template.literals:
            if segments[i] != text:
                break
        else:
            if not template.names:
                return template.routes.get(method) or Route(template.path)
            params = {name: segments[i] for i, name in template.names}
            if "" in params.values():
                continue
            operation = template.operations.get(method)
            return Route(template.path, operation.id if operation else None, operation, params)
    return UNKNOWN


def meant(method: str, below: str, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The path that a caller meant by what follows the prefix, None where that is the host's.

    Node's SDKs of Portkey and OpenAI concatenate: the documented `post("predictions")` becomes `/v1predictions`, and a
    base URL with a slash at its end makes `/v1//predictions`. With Portkey's headers there these are repaired, if
    Replicate has such an operation; `post({url: ...})` becomes `/v1[object Object]`, whose content is lost: it stays,
    for `check` to refuse. Without such headers the first and the last are the host's.
    """
    if below[:1] in ("", "/") and below[:2] != "//":
        return below
    as_it_came = below if below[:1] == "/" else None
    if not any(name.startswith(b"x-portkey-") for name, _ in headers):
        return as_it_came
    if unquote(below) == "[object Object]":
        return below
    repaired = below[1:] if as_it_came else "/" + below
    return repaired if match(method, repaired).operation else as_it_came


def check(method: str, path: str, query: bytes) -> str:
    """The target to send, path and query, unless it could be read differently by someone behind us.

    Bytes that no URI may hold and that harm nobody (`"<>{}` and the backtick) pass; httpx encodes some of them.

    Raises:
        MethodNotAllowed: TRACE would echo credentials, CONNECT has no target here (RFC 9110, section 9.3).
        BadRequest: a method in small letters, which httpx would send in capitals, or that is no token; dot segments,
            backslashes and control characters, plain or encoded; `#`, spaces and bytes outside ASCII; a `?` within the
            path; a path that is an object turned to text.
    """
    if method != method.upper():
        raise BadRequest("Methods are told apart by case, and are written in capitals.")
    if method in ("TRACE", "CONNECT", "TRACK"):
        raise MethodNotAllowed()
    if not (method.isascii() and method.isalpha()) and not _TOKEN.fullmatch(method):
        raise BadRequest("The method is none that HTTP has room for.")
    if not query and _ORDINARY.fullmatch(path):
        return path
    if path[:1] not in ("", "/"):
        raise BadRequest('This SDK takes path and body apart: post("/predictions", {...}).')
    decoded = unquote(path, "latin-1") if "%" in path else path
    if _DOT_SEGMENT.search(decoded):
        raise BadRequest("The path has a '.' or '..' segment.")
    if _CONTROL.search(decoded):
        raise BadRequest("The path has a backslash or a control character.")
    target = path + "?" + query.decode("latin-1") if query else path
    # A server that leaves the query there, or decodes: whoever is behind us would end the path at it.
    if "?" in path or _UNENCODED.search(target):
        raise BadRequest("The target has characters that must be percent-encoded.")
    return target
