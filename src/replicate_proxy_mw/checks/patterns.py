"""A check by regular expressions, with RE2: its time is linear in the text, so that no input can hang the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import re2  # type: ignore[import-untyped]

from .contract import ALLOW, Check, Checked, Verdict
from .threads import in_thread

# How a place is reached: what lies above it, and its own name there.
_Path = tuple[Any, str] | None

# Characters: where RE2 has to take its slowest way, it needs about a second for so many.
MAX_SIZE = 1 << 20

# Each takes some microseconds, however short it is.
MAX_TEXTS = 50_000

# Characters of a path that a reason tells: its names are the caller's.
MAX_PATH = 500


class TooLong(Exception):
    """There is more text than is searched."""


def matches(
    *patterns: str,
    fields: Sequence[str] = (),
    then: Literal["deny", "flag"] = "deny",
    name: str = "matches",
) -> Check:
    """Deny or flag what one of the patterns is found in. The reason names the field, and not what stands there.

    The texts of a list of nothing but texts are searched one by one and joined, since outputs of language models come
    in pieces. Numbers are not searched.

    With more than a million characters in the fields, or more than 50,000 texts, the check fails.

    Args:
        patterns: in RE2's syntax (https://github.com/google/re2/wiki/Syntax), which has no lookarounds and no
            backreferences, and `(?i)` where case does not matter. Found anywhere in a text.
        fields: paths from the top of the input or output, with dots, such as `prompt` or `messages.*.content`, where
            `*` is each member or element. All texts in them are searched, and names of members; by default, all.
        then: what comes of it.
        name: what spans and answers call this check.

    Raises:
        ValueError: an argument is not what it should be; the text names it.
    """
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError("patterns: must be texts, one at least")
    if isinstance(fields, str) or not all(isinstance(path, str) and all(path.split(".")) for path in fields):
        raise ValueError("fields: must be a sequence of paths such as messages.*.content")
    if then not in ("deny", "flag"):
        raise ValueError("then: must be deny or flag")
    options = re2.Options()
    options.log_errors, options.never_capture = False, True
    try:
        compiled = [re2.compile(pattern, options) for pattern in patterns]
    except (re2.error, UnicodeEncodeError):
        raise ValueError("patterns: must be regular expressions that RE2 takes") from None
    return _Matches(name, compiled, [path.split(".") for path in fields], then)


class _Matches:
    def __init__(self, name: str, patterns: list[Any], fields: list[list[str]], then: Literal["deny", "flag"]) -> None:
        self.name = name
        self._patterns, self._fields, self._then = patterns, fields, then

    async def __call__(self, checked: Checked) -> Verdict:
        found = await in_thread(partial(self._found, checked.value))
        if found is None:
            return ALLOW
        field = ".".join((checked.kind, *found))
        told = field if len(field) <= MAX_PATH else f"{field[:MAX_PATH]}…"
        return Verdict(self._then, f"{told} has what may not be there")

    def _found(self, value: Any) -> list[str] | None:
        size = 0
        for count, (path, text, is_joined) in enumerate(self._texts(value)):
            size += 0 if is_joined else len(text)
            if size > MAX_SIZE or count >= MAX_TEXTS:
                raise TooLong
            encoded = text.encode("utf-8", "replace")
            if any(pattern.search(encoded) for pattern in self._patterns):
                return _names(path)
        return None

    def _texts(self, value: Any) -> Iterator[tuple[_Path, str, bool]]:
        if not self._fields:
            yield from _below(None, value)
        for steps in self._fields:
            chosen: list[tuple[_Path, Any]] = [(None, value)]
            for step in steps:
                chosen = [child for path, one in chosen for child in _children(path, one) if step in ("*", child[0][1])]
            for path, one in chosen:
                yield from _below(path, one)


def _children(path: _Path, value: Any) -> Iterator[tuple[tuple[_Path, str], Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield (path, name), child
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield (path, str(place)), child


def _below(path: _Path, value: Any) -> Iterator[tuple[_Path, str, bool]]:
    """Each text in a value, with the names of members, and whether it is several joined."""
    left: list[tuple[_Path, Any]] = [(path, value)]
    while left:
        path, value = left.pop()
        if isinstance(value, str):
            yield path, value, False
        elif isinstance(value, dict):
            for name in value:
                yield path, name, False
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            yield from ((child, text, False) for child, text in _children(path, value))
            yield path, "".join(value), True
            continue
        left += reversed(list(_children(path, value)))


def _names(path: _Path) -> list[str]:
    names = []
    while path is not None:
        path, name = path
        names.append(name)
    return names[::-1]
