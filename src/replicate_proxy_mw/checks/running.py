"""Checks at work: all at once, bounded in time, and what came of them in the shape of Portkey's `hook_results`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import anyio

from ..errors import ProxyError
from ..host_calls import HostFailed, ask
from .contract import Check, Checked, Verdict

T = TypeVar("T")

logger = logging.getLogger("replicate_proxy_mw")


def name_of(check: Check) -> str:
    return str(getattr(check, "name", None) or getattr(check, "__name__", None) or type(check).__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check; `verdict` is None where it failed."""

    check: str
    verdict: Verdict | None
    created_at: str
    milliseconds: int

    @property
    def word(self) -> str:
        return "failed" if self.verdict is None else self.verdict.word


async def run(checks: Sequence[Check], checked: Checked, *, seconds: float) -> list[Result]:
    """Ask all `checks` at once, so that none takes the time of another: each is cancelled after `seconds`.

    Raises:
        ProxyError: the first that one of them raised, in their order.
    """
    return await gathered([partial(_asked, check, checked, seconds) for check in checks])


async def gathered(calls: Sequence[Callable[[], Awaitable[T]]], *, at_once: int | None = None) -> list[T]:
    """What all `calls` return, of which all or so many are under way at a time.

    Raises:
        ProxyError: the first that one of them raised, in their order.
    """
    came: dict[int, T | ProxyError] = {}
    places = anyio.Semaphore(at_once or len(calls), fast_acquire=True)

    async def one(place: int, call: Callable[[], Awaitable[T]]) -> None:
        async with places:
            try:
                came[place] = await call()
            except ProxyError as error:
                came[place] = error

    async with anyio.create_task_group() as tasks:
        for place, call in enumerate(calls):
            tasks.start_soon(one, place, call)
    results = []
    for place in range(len(calls)):
        result = came[place]
        if isinstance(result, ProxyError):
            raise result
        results.append(result)
    return results


async def _asked(check: Check, checked: Checked, seconds: float) -> Result:
    name, created_at, begun = name_of(check), datetime.now(UTC).isoformat(), time.monotonic()
    verdict, failure = None, ""
    try:
        answer: object = await ask(partial(check, checked), seconds=seconds)
        if isinstance(answer, Verdict):
            verdict = answer
        else:
            failure = f"it returned {type(answer).__name__}"
    except HostFailed as error:
        failure = error.name
    if verdict is None:
        logger.error("guardrails: %s failed: %s", name, failure)
    return Result(name, verdict, created_at, round((time.monotonic() - begun) * 1000))


def first(results: Sequence[Result], word: str) -> Result | None:
    return next((one for one in results if one.word == word), None)


def hook_results(*, before: Sequence[Result] = (), after: Sequence[Result] = ()) -> dict[str, Any]:
    """What Portkey's gateway puts into answers that a guardrail has flagged or denied."""
    return {"before_request_hooks": _hooks("input", before), "after_request_hooks": _hooks("output", after)}


def _hooks(kind: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    if not results:
        return []
    hook = {
        "verdict": all(one.word in ("allow", "failed") for one in results),
        "id": kind,
        "transformed": False,
        "checks": [_shown(one) for one in results],
        "feedback": None,
        "execution_time": max(one.milliseconds for one in results),
        "async": False,
        "type": "guardrail",
        "created_at": results[0].created_at,
        "deny": first(results, "deny") is not None,
        "skipped": False,
    }
    return [hook]


def _shown(result: Result) -> dict[str, Any]:
    verdict = result.verdict
    return {
        "id": result.check,
        # One that failed and is shown was let pass.
        "verdict": result.word in ("allow", "failed"),
        "data": {"explanation": verdict.reason} if verdict and verdict.reason else None,
        "error": {"name": "CheckFailed", "message": "This check failed."} if verdict is None else None,
        "execution_time": result.milliseconds,
        "created_at": result.created_at,
        "transformed": False,
    }


def with_hook_results(text: str, hooks: Mapping[str, Any]) -> str:
    """The text of an object with these as one more member at its end."""
    begun = text.rstrip()[:-1].rstrip()
    comma = "" if begun.endswith("{") else ","
    return f'{begun}{comma}"hook_results":{json.dumps(hooks, separators=(",", ":"))}}}'
