"""A check by the schema that a model's version has for its input, so that a wrong one is told before it costs."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import anyio.to_thread

from .contract import ALLOW, Check, Checked, Verdict
from .json_schema import errors, plain

# Nodes of schemas in memory, some 200 bytes each; the most that one has is 5000, and usual are 100.
MAX_REMEMBERED = 200_000

# Seconds until what was not found is looked up again: it may be new.
UNKNOWN_AGAIN = 60.0

# Seconds for which a schema that may have changed is good enough to deny by.
FRESH = 5.0

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_RELEASE = re.compile(rf"({_NAME}/{_NAME}) ({_NAME})")


def valid_input(
    *,
    then: Literal["deny", "flag"] = "deny",
    latest_for: float = 300.0,
    max_errors: int = 5,
    now: Callable[[], float] = time.monotonic,
) -> Check:
    """Deny or flag inputs that are not as `openapi_schema` of the model's version has them.

    That is of the version which a create names, else of the model's latest, or of a deployment's current one. What the
    schema does not know is allowed, and so is any input where there is no schema to be had: of a version that is named
    by its id alone (Replicate's SDKs make that of `run("owner/name:id")`), of a model that is unknown, and while
    Replicate cannot be asked. Formats and patterns are not checked. The reason names the fields and what they have to
    be, and not what they are.

    Args:
        then: what comes of it.
        latest_for: seconds for which a model's latest version and a deployment's release are remembered; by default
            five minutes. None is denied by one that is older than some seconds. Versions never change. All of it is
            remembered apart for each tenant and token.
        max_errors: what a reason names at most; by default what one reads.
        now: seconds that only grow.

    Raises:
        ValueError: an argument is not what it should be; the text names it.
    """
    if then not in ("deny", "flag"):
        raise ValueError("then: must be deny or flag")
    if isinstance(latest_for, bool) or not isinstance(latest_for, (int, float)) or not latest_for >= 0:
        raise ValueError("latest_for: must be a number of seconds")
    if type(max_errors) is not int or max_errors < 1:
        raise ValueError("max_errors: must be a whole number above 0")
    return _ValidInput(then, latest_for, max_errors, now)


@dataclass(frozen=True, slots=True)
class _Kept:
    value: Any
    nodes: int
    at: float


class _ValidInput:
    name = "valid_input"

    def __init__(
        self, then: Literal["deny", "flag"], latest_for: float, max_errors: int, now: Callable[[], float]
    ) -> None:
        self._then, self._latest_for, self._max_errors, self._now = then, latest_for, max_errors, now
        self._kept: OrderedDict[tuple[str, str, str], _Kept] = OrderedDict()
        self._nodes = 0

    async def __call__(self, checked: Checked) -> Verdict:
        if checked.kind != "input" or checked.model is None:
            return ALLOW
        wrong: list[str] = []
        by = None
        for max_age in (self._latest_for, min(FRESH, self._latest_for)):
            schema = await self._schema(checked, checked.model, max_age)
            if schema is None:
                return ALLOW
            if schema is not by:
                wrong = await anyio.to_thread.run_sync(self._wrong, schema, checked.value, abandon_on_cancel=True)
            if not wrong:
                return ALLOW
            by = schema
        return Verdict(self._then, "; ".join(wrong))

    def _wrong(self, schema: Mapping[str, Any], value: object) -> list[str]:
        if value is None:
            return ["input is missing"] if schema.get("required") else []
        return [f"{'.'.join(['input', *path])} {what}" for path, what in errors(schema, value, most=self._max_errors)]

    async def _schema(self, checked: Checked, model: str, max_age: float | None) -> Mapping[str, Any] | None:
        version, name = checked.version, "TrainingInput" if checked.operation == "trainings.create" else "Input"
        if model.startswith("deployments/"):
            release = await self._remembered(checked, f"/{model}", "current_release", _release, max_age)
            if release is None:
                return None
            model, version = release
        if version is None:
            target, read = f"/models/{model}", _latest(name)
        else:
            target, read, max_age = f"/models/{model}/versions/{version}", _of_version(name), None
        schema: Mapping[str, Any] | None = await self._remembered(checked, target, name, read, max_age)
        return schema

    async def _remembered(
        self,
        checked: Checked,
        target: str,
        what: str,
        read: Callable[[Any], tuple[Any, int]],
        max_age: float | None,
    ) -> Any:
        key = (checked.identity, target, what)
        kept, now = self._kept.get(key), self._now()
        if kept is not None:
            most = (
                max_age if kept.value is not None else UNKNOWN_AGAIN if max_age is None else min(UNKNOWN_AGAIN, max_age)
            )
            if most is None or now - kept.at < most:
                self._kept.move_to_end(key)
                return kept.value
        value, nodes = read(await checked.get(target))
        if old := self._kept.pop(key, None):
            self._nodes -= old.nodes
        self._kept[key] = _Kept(value, nodes, now)
        self._nodes += nodes
        while self._nodes > MAX_REMEMBERED:
            self._nodes -= self._kept.popitem(last=False)[1].nodes
        return value


def _release(deployment: Any) -> tuple[tuple[str, str] | None, int]:
    current = _member(deployment, "current_release")
    found = _RELEASE.fullmatch(f"{_member(current, 'model')} {_member(current, 'version')}")
    return (found[1], found[2]) if found else None, 1


def _latest(name: str) -> Callable[[Any], tuple[Any, int]]:
    return lambda model: _of_version(name)(_member(model, "latest_version"))


def _of_version(name: str) -> Callable[[Any], tuple[Any, int]]:
    def read(version: Any) -> tuple[Any, int]:
        schemas = _member(_member(_member(version, "openapi_schema"), "components"), "schemas")
        if not isinstance(schemas, dict) or not isinstance(schemas.get(name), dict):
            return None, 1
        return plain(schemas, name)

    return read


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
