"""Outputs in a page of predictions. Each is judged by itself: a layer above may take some of them out of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio

from ..json_bodies import elements, members
from ..model_names import NotUnderstood
from .contract import Check
from .guard import Guard
from .running import Result, first, gathered, hook_results, with_hook_results

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

    async def one(item: Mapping[str, Any]) -> list[Result]:
        return await guard.output(checks, item, seconds=max(0.0, deadline - anyio.current_time()))

    outputs = {place: item for place, item in enumerate(items) if _has_output(item)}
    changed = {}
    came = await gathered([partial(one, item) for item in outputs.values()], at_once=AT_ONCE)
    for place, results in zip(outputs, came, strict=True):
        is_withheld = bool(first(results, "deny") or (first(results, "failed") and not guard.fail_open))
        if is_withheld or first(results, "flag"):
            changed[place] = is_withheld, hook_results(after=results)
    return with_results(text, changed) if changed else text


def _has_output(item: object) -> bool:
    return isinstance(item, dict) and item.get("output") is not None


def with_results(text: str, items: Mapping[int, tuple[bool, Any]]) -> str:
    """The text of a list with some of its `results` changed, by their place: whether their content is left out, and
    what their `hook_results` are."""
    [(start, end)] = [(start, end) for name, _, start, end in members(text) if name == "results"]
    spans = []
    for place, (_, begin, last) in enumerate(elements(text[start:end])):
        if place in items:
            withheld, hooks = items[place]
            item = text[start + begin : start + last]
            shown = with_hook_results(_without_content(item) if withheld else item, hooks)
            spans.append((start + begin, start + last, shown))
    return _spliced(text, spans)


def _without_content(item: str) -> str:
    """A prediction as Replicate shows it when its data is gone, but for its input."""
    gone = {"output": "null", "logs": '""'}
    return _spliced(item, [(start, end, gone[name]) for name, _, start, end in members(item) if name in gone])


def _spliced(text: str, spans: Sequence[tuple[int, int, str]]) -> str:
    """`text` with something else in the place of some parts of it, in their order."""
    parts, done = [], 0
    for start, end, new in spans:
        parts += [text[done:start], new]
        done = end
    return "".join((*parts, text[done:]))
