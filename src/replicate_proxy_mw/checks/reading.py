"""Inputs and outputs out of bodies, by the one reading that nobody behind us can take otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from .. import model_names, routing
from ..errors import BadRequest, ProxyError, UpstreamAborted
from ..exchange import Forward, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for, held, is_readable, plain_of
from ..model_names import Named, NotUnderstood
from .threads import in_thread

# Parsing a longer one holds up all other requests: the worst of this size a tenth of a second.
MAX_INPUT = 1 << 20

_LETTERS = re.compile("[^a-z]+")
_MODEL = re.compile(r"[^/]+/[^/]+")


def parsed(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        NotUnderstood: it is none in UTF-8; an object has a name twice; or a number is none that JSON has.
    """
    try:
        return json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise NotUnderstood("this is not JSON that can be read in one way only") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name comes twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def input_of(request: ProxyRequest, body: bytes) -> tuple[Any, Named]:
    """The member `input` of a create, None where it has none, and the one model that the request names.

    Raises:
        NotUnderstood: see `model_names`; there is no single reading of the input, or of whose it is.
    """
    in_path = list(model_names.in_path(request.route, request.target))
    in_body = list(model_names.in_body(request.route, request.headers, body))
    # A training's body names what comes of it.
    named = set(in_path if request.operation == "trainings.create" else in_path + in_body)
    if len(named) != 1:
        raise NotUnderstood("more than one model is named")
    given = parsed(body or b"{}")
    # Parsers differ in case, and some drop or end a name at control characters and lone surrogates.
    if any(name != "input" and _LETTERS.sub("", name.casefold()) == "input" for name in given):
        raise NotUnderstood("the body has input in another spelling")
    return given.get("input"), named.pop()


async def plain_body(response: ProxyResponse) -> tuple[ProxyResponse, bytes | None]:
    """`response` with its body at hand, and that body without encoding; None if it is no JSON, damaged, or longer than
    8 MiB, and then it goes on as it comes."""
    if not is_readable(response):
        return response, None
    response, body, is_whole = await held(response)
    return response, plain_of(response, body) if is_whole else None


async def object_of(body: bytes | None) -> tuple[dict[str, Any], str]:
    """The object that a body is, and its text.

    Raises:
        NotUnderstood: it is none.
    """
    if body is None:
        raise NotUnderstood("the answer is no JSON, damaged or too long")
    answer = await in_thread(partial(parsed, body)) if len(body) > MAX_INPUT else parsed(body)
    if not isinstance(answer, dict):
        raise NotUnderstood("the answer is no JSON object")
    return answer, body.decode()


async def got(request: ProxyRequest, forward: Forward, target: str) -> object | None:
    """What Replicate has at `target` for the caller of `request`; None for anything but a 200 that can be read.

    Raises:
        ValueError: this is no target.
    """
    path, _, query = target.partition("?")
    try:
        routing.check("GET", path, query.encode("latin-1"))
    except BadRequest:
        raise ValueError("not a target") from None
    try:
        # Whole, so that the connection can be used again.
        response, _, _ = await held(await forward(asking_for(request, target)))
        await response.aclose()
        if response.status == 200:
            _, body = await plain_body(response)
            return (await object_of(body))[0]
    except (NotUnderstood, ProxyError, UpstreamAborted):
        pass
    return None


def model_of(prediction: Mapping[str, Any]) -> Named:
    """Which model and version an answer says that it is of."""
    model, version = prediction.get("model"), prediction.get("version")
    known = isinstance(model, str) and _MODEL.fullmatch(model)
    return Named(model if known else None, version if isinstance(version, str) else None)
