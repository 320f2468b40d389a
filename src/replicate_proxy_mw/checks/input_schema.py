"""A check by the schema that a model's version has for its input, so that a wrong one is told before it costs."""

from __future__ import annotations

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import anyio

from ..event_loops import OfLoop
from .contract import ALLOW, Check, Checked, Verdict
from .json_schema import errors, plain
from .threads import in_thread

# Nodes of schemas in memory, some 200 bytes each; the most that one has is 5000, and usual are 100.
MAX_REMEMBERED = 200_000

# Seconds for which a model's latest version and a deployment's release are good enough to allow by, and to deny by.
LATEST, FRESH = 300.0, 5.0

# Seconds until what was not found is looked up again: it may be new.
UNKNOWN_AGAIN = 60.0

# What a reason names at most: as much as one reads.
MAX_ERRORS = 5

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
# Whose, at which target, by which name.
_Key = tuple[str, str, str]
# From an answer and a name to what is remembered of it, and how many nodes that has.
_Read = Callable[[Any, str], tuple[Any, int]]

_RELEASE = re.compile(rf"({_NAME}/{_NAME}) ({_NAME})")


def valid_input(*, then: Literal["deny", "flag"] = "deny", now: Callable[[], float] = time.monotonic) -> Check:
    """Deny or flag inputs that are not as `openapi_schema` of the model's version has them.

    That is of the version which a create names, else of the model's latest, or of a deployment's current one. What the
    schema does not know is allowed, and so is any input where there is no schema to be had: of a version that is named
    by its id alone (Replicate's SDKs make that of `run("owner/name:id")`), of a model that is unknown, and while
    Replicate cannot be asked. Formats and patterns are not checked. The reason names the fields and what they have to
    be, and not what they are.

    Schemas are remembered, apart for each tenant and token: those of a version for good, of what is the latest now for
    five minutes. Nothing is denied by one of these that is older than five seconds.

    Args:
        then: what comes of it.
        now: seconds that only grow.

    Raises:
        ValueError: `then` is not what it should be.
    """
    if then not in ("deny", "flag"):
        raise ValueError("then: must be deny or flag")
    return _ValidInput(then, now)


@dataclass(frozen=True, slots=True)
class _Kept:
    value: Any
    nodes: int
    at: float


class _ValidInput:
    name = "valid_input"

    def __init__(self, then: Literal["deny", "flag"], now: Callable[[], float]) -> None:
        self._then, self._now = then, now
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._nodes = 0
        self._turns = OfLoop(WeakValueDictionary[_Key, anyio.Lock])

    async def __call__(self, checked: Checked) -> Verdict:
        if checked.kind != "input" or checked.model is None:
            return ALLOW
        schema = await self._schema(checked, checked.model, LATEST)
        wrong = await _wrong(schema, checked.value)
        if wrong and (newer := await self._schema(checked, checked.model, FRESH)) is not schema:
            wrong = await _wrong(newer, checked.value)
        return Verdict(self._then, "; ".join(wrong)) if wrong else ALLOW

    async def _schema(self, checked: Checked, model: str, max_age: float) -> Mapping[str, Any] | None:
        version, name = checked.version, "TrainingInput" if checked.operation == "trainings.create" else "Input"
        read: _Read = _of_latest
        if model.startswith("deployments/"):
            release = await self._remembered(checked, f"/{model}", "current_release", _release, max_age)
            if release is None:
                return None
            model, version = release
        if version is None:
            target = f"/models/{model}"
        else:
            target, read, max_age = f"/models/{model}/versions/{version}", _of_version, math.inf
        schema: Mapping[str, Any] | None = await self._remembered(checked, target, name, read, max_age)
        return schema

    async def _remembered(self, checked: Checked, target: str, name: str, read: _Read, max_age: float) -> Any:
        """What `read` finds by that name in what is at `target`."""
        key = (checked.identity, target, name)
        if (kept := self._known(key, max_age)) is None:
            # Of many at the same time one asks, and if it leaves, the next.
            async with self._turns.get().setdefault(key, anyio.Lock(fast_acquire=True)):
                if (kept := self._known(key, max_age)) is None:
                    now = self._now()
                    kept = _Kept(*read(await checked.get(target), name), now)
                    self._keep(key, kept)
        return kept.value

    def _known(self, key: _Key, max_age: float) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if self._now() - kept.at >= (min(max_age, UNKNOWN_AGAIN) if kept.value is None else max_age):
            return None
        self._kept.move_to_end(key)
        return kept

    def _keep(self, key: _Key, kept: _Kept) -> None:
        if old := self._kept.pop(key, None):
            self._nodes -= old.nodes
        self._kept[key] = kept
        self._nodes += kept.nodes
        while self._nodes > MAX_REMEMBERED:
            self._nodes -= self._kept.popitem(last=False)[1].nodes


def _release(deployment: Any, name: str) -> tuple[tuple[str, str] | None, int]:
    current = _member(deployment, name)
    found = _RELEASE.fullmatch(f"{_member(current, 'model')} {_member(current, 'version')}")
    return (found[1], found[2]) if found else None, 1


def _of_latest(model: Any, name: str) -> tuple[Any, int]:
    return _of_version(_member(model, "latest_version"), name)


def _of_version(version: Any, name: str) -> tuple[Any, int]:
    schemas = _member(_member(_member(version, "openapi_schema"), "components"), "schemas")
    if not isinstance(schemas, dict) or not isinstance(schemas.get(name), dict):
        return None, 1
    return plain(schemas, name)


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


async def _wrong(schema: Mapping[str, Any] | None, value: object) -> list[str]:
    if schema is None:
        return []
    if value is None:
        return ["input is missing"] if schema.get("required") else []
    found = await in_thread(partial(errors, schema, value, most=MAX_ERRORS))
    return [f"{'.'.join(['input', *path])} {what}" for path, what in found]
