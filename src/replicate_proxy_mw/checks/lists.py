"""Outputs in a page of predictions. Each is judged by itself: a layer above may take some of them out of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from ..errors import ProxyError
from ..json_bodies import elements, members
from ..model_names import NotUnderstood
from .contract import Check
from .guard import Guard
from .reading import with_member
from .running import Result, first, hook_results

# So many predictions are checked at a time: what checks ask may have limits of its own.
AT_ONCE = 8


async def checked_list(guard: Guard, checks: Sequence[Check], text: str, answer: Mapping[str, Any]) -> str:
    """The text of a page with those items changed that are flagged, denied, or could not be checked.

    Raises:
        ProxyError: that of a check of the first item for which one raised it.
        NotUnderstood: it is no page.
    """
    items = answer.get("results")
    if not isinstance(items, list):
        raise NotUnderstood("the list has no results")
    deadline = anyio.current_time() + guard.timeout
    places = anyio.CapacityLimiter(AT_ONCE)
    came: dict[int, list[Result] | ProxyError] = {}

    async def one(place: int, item: Mapping[str, Any]) -> None:
        async with places:
            try:
                came[place] = await guard.output(checks, item, seconds=max(0.0, deadline - anyio.current_time()))
            except ProxyError as error:
                came[place] = error

    async with anyio.create_task_group() as tasks:
        for place, item in enumerate(items):
            if isinstance(item, dict) and item.get("output") is not None:
                tasks.start_soon(one, place, item)
    changed = {}
    for place, results in sorted(came.items(), key=lambda pair: pair[0]):
        if isinstance(results, ProxyError):
            raise results
        is_withheld = bool(first(results, "deny") or (first(results, "failed") and not guard.fail_open))
        if is_withheld or first(results, "flag"):
            changed[place] = is_withheld, hook_results(after=results)
    return with_results(text, changed) if changed else text


def with_results(text: str, items: Mapping[int, tuple[bool, Any]]) -> str:
    """The text of a list with some of its `results` changed, by their place: whether their content is left out, and
    what their `hook_results` are."""
    [(start, end)] = [(start, end) for name, _, start, end in members(text) if name == "results"]
    parts, done = [], 0
    for place, (_, begin, last) in enumerate(elements(text[start:end])):
        if place in items:
            withheld, hooks = items[place]
            item = text[start + begin : start + last]
            shown = with_member(_without_content(item) if withheld else item, "hook_results", hooks)
            parts += [text[done : start + begin], shown]
            done = start + last
    return "".join((*parts, text[done:]))


def _without_content(item: str) -> str:
    """A prediction as Replicate shows it when its data is gone, but for its input."""
    spans: Sequence[tuple[int, int, str]] = [
        (start, end, "null" if name == "output" else '""')
        for name, _, start, end in members(item)
        if name in ("output", "logs")
    ]
    parts, done = [], 0
    for start, end, new in spans:
        parts += [item[done:start], new]
        done = end
    return "".join((*parts, item[done:]))
