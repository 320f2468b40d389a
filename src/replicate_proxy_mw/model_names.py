"""Which models a request names, from path and body together, for rules that name models.

Only one reading is taken: whatever leaves a second one open, to whoever reads behind us, is not understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .headers import HeaderList
from .routing import Route

# Bounded, since versions are remembered: Replicate's names have up to 100 characters, its ids 64.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_MODEL = re.compile(rf"({_NAME}/{_NAME})(?::({_NAME}))?")
_VERSION = re.compile(_NAME)
_LETTERS = re.compile("[^a-z]+")
_JSON = re.compile(rb'application/json(?:\s*;\s*charset="?utf-8"?)?\s*')

_decode = json.JSONDecoder(object_pairs_hook=list).decode

# The operations whose body can name a model, and what it has to say in any case (Replicate's OpenAPI document).
_BODIES: Mapping[str, tuple[str, ...]] = {
    "predictions.create": ("version",),
    "models.predictions.create": (),
    "deployments.predictions.create": (),
    "trainings.create": ("destination",),
    "deployments.create": ("model",),
    "deployments.update": (),
    "models.create": ("owner", "name"),
}
# Whatever the operation, since what one does not know another server may read; `data` it might unwrap.
_FIELDS = frozenset(("version", "model", "destination", "deployment", "owner", "name", "data"))


class NotUnderstood(Exception):
    """What is wrong, in words for the caller."""


class Named(NamedTuple):
    """`name` is `owner/name` or `deployments/owner/name`, None where only a version is named.

    `version` is an id that runs, which is to be one of the model's.
    """

    name: str | None
    version: str | None = None


def has_body(route: Route) -> bool:
    """Whether the body of such a request can name a model."""
    return route.operation in _BODIES


def in_path(route: Route, target: str) -> Iterator[Named]:
    """The model or deployment that the path names.

    Raises:
        NotUnderstood: the name is none; or there is a query where the body is to say everything.
    """
    if has_body(route) and "?" in target:
        raise NotUnderstood("this operation takes no query")
    params = route.params
    if not params:
        return
    for prefix, kind in (("model", ""), ("deployment", "deployments/")):
        if f"{prefix}_owner" in params:
            name = kind + _model(f"{params[f'{prefix}_owner']}/{params[f'{prefix}_name']}")
            yield Named(name, _version(params["version_id"]) if route.operation == "trainings.create" else None)


def in_body(route: Route, headers: HeaderList, body: bytes) -> Iterator[Named]:
    """The models that the body names.

    Raises:
        NotUnderstood: another content type or encoding than plain JSON in UTF-8, no object, a name that comes twice or
            in another spelling, or no name where there has to be one.
    """
    given = _given(headers, body)
    for name in _BODIES[route.operation or ""]:
        if name not in given:
            raise NotUnderstood(f"the body has no {name}")
    if route.operation == "deployments.create":
        version = _version(given["version"]) if "version" in given else None
        yield Named(_model(given["model"]), version)
    else:
        # Where `model` is no field of the operation, it does not say whose the version is.
        if "model" in given:
            yield Named(_model(given["model"]))
        if "version" in given:
            yield _named(given["version"])
    if "destination" in given:
        yield Named(_model(given["destination"]))
    if "deployment" in given:
        yield Named("deployments/" + _model(given["deployment"]))
    if route.operation == "models.create":
        yield Named(_model(f"{given['owner']}/{given['name']}"))


def _given(headers: HeaderList, body: bytes) -> dict[str, Any]:
    fields = dict(headers)
    if not _JSON.fullmatch(fields.get(b"content-type", b"").lower()):
        raise NotUnderstood("the body has to be application/json in UTF-8")
    if b"content-encoding" in fields:
        raise NotUnderstood("the body has to come without content-encoding")
    given: dict[str, Any] = {}
    for name, value in _pairs(body):
        # Parsers differ in case, and some drop or end a name at control characters and lone surrogates.
        plain = name.isascii() and name.isalpha() and name.islower()
        field = name if plain else _LETTERS.sub("", name.casefold())
        if field in _FIELDS:
            if field != name or name in given or name == "data":
                raise NotUnderstood(f"the body has {field} twice, in another spelling or where it is not known")
            given[name] = value
    return given


def _pairs(body: bytes) -> list[tuple[str, Any]]:
    """The members of an object, those of the same name too; objects within it come as lists, which name nothing."""
    try:
        text = body.decode() or "{}"
        pairs = _decode(text)
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, list) or text.lstrip()[0] != "{":
        raise NotUnderstood("the body is not a JSON object")
    return pairs


def _named(version: object) -> Named:
    found = _MODEL.fullmatch(version) if isinstance(version, str) else None
    return Named(found[1], found[2]) if found else Named(None, _version(version))


def _model(name: object) -> str:
    found = _MODEL.fullmatch(name) if isinstance(name, str) else None
    if found is None or found[2]:
        raise NotUnderstood("a model is named as owner/name")
    return found[1]


def _version(version: object) -> str:
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise NotUnderstood("a version is an id, owner/name or owner/name:id")
    return version
