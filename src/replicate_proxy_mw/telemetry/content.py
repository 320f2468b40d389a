"""Input and output of predictions as text for signals: off unless asked for, short, and without secrets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast, get_args

from .scrub import REDACTED, Scrubber, is_secret_name

Mode = Literal["NO_CONTENT", "SPAN_ONLY", "EVENT_ONLY", "SPAN_AND_EVENT"]

VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

Path = tuple[str | int, ...]
Redact = Callable[[Path, object], object]
"""The host's own rule: the value to show for a leaf of the JSON, which is at `path`."""

MARKER = "…[truncated]"

logger = logging.getLogger("replicate_proxy_mw")

_WORDS: Mapping[str, Mode] = {
    "": "NO_CONTENT",
    "FALSE": "NO_CONTENT",
    "TRUE": "SPAN_ONLY",
    **{one: one for one in get_args(Mode)},
}


def mode(option: bool | str | None, environ: Mapping[str, str]) -> Mode:
    """Where content is shown: as `option` says, else as `environ` does, else nowhere.

    Raises:
        ValueError: the option is none of the four modes, in any case, True or False.
    """
    if isinstance(option, bool):
        return "SPAN_ONLY" if option else "NO_CONTENT"
    if option is not None:
        if not isinstance(option, str) or option.upper() not in get_args(Mode):
            raise ValueError(f"capture_content: must be true, false or one of {', '.join(get_args(Mode))}")
        return cast(Mode, option.upper())
    found = _WORDS.get(environ.get(VARIABLE, "").strip().upper())
    if found is None:
        logger.warning("%s is not one of %s: no content is captured", VARIABLE, ", ".join(get_args(Mode)))
        return "NO_CONTENT"
    return found


def text(value: object, *, redact: Redact | None, scrub: Scrubber, limit: int = 8192) -> str:
    """`value`, which is JSON, as compact JSON text that shows no secret and no file.

    `data:` URIs become type and size, URLs lose query, fragment and user, and what stands under a secret's name is
    replaced, unseen by `redact`; every other leaf passes `redact`, then every string `scrub`. Work is bounded by
    `limit`, however large or deep `value` is.

    Args:
        redact: if it raises, or returns what JSON does not have, the leaf is replaced and the log gets the class name.
        limit: bytes of UTF-8 at most, `…[truncated]` at the end of what is longer included; 14 or more.
    """
    walk = _Walk(redact, scrub, limit)
    parts: list[bytes] = []
    room = limit
    for part in walk.pieces(value):
        # A host's values may have lone surrogates.
        parts.append(part.encode("utf-8", "replace"))
        room -= len(parts[-1])
        if room < 0 or walk.cut:
            kept = b"".join(parts)[: limit - len(MARKER.encode())]
            return kept.decode("utf-8", "ignore") + MARKER
    return b"".join(parts).decode()


class _Walk:
    """One value, piece by piece, so that nobody walks on when there is enough. Without recursion: it may be deep.

    `cut` is true once a string went out in part: nothing may follow it.
    """

    def __init__(self, redact: Redact | None, scrub: Scrubber, limit: int) -> None:
        self._redact = redact
        self._scrub = scrub
        self._limit = limit
        self._told = False
        self.cut = False

    def pieces(self, value: object, *, is_checked: bool = False) -> Iterator[str]:
        """`is_checked`: a value of the host's own, which passes `scrub` alone."""
        open_: list[tuple[Iterator[tuple[object, object]], str]] = []
        path: list[object] = []
        is_secret = False
        while True:
            if is_secret:
                yield f'"{REDACTED}"'
            elif isinstance(value, dict):
                yield "{"
                open_.append((iter(value.items()), "}"))
                path.append(_FIRST)
            elif isinstance(value, (list, tuple)):
                yield "["
                open_.append((iter(enumerate(value)), "]"))
                path.append(_FIRST)
            elif is_checked:
                yield self._written(value)
            else:
                yield from self._leaf(path, value)
            while open_ and (member := next(open_[-1][0], None)) is None:
                yield open_.pop()[1]
                path.pop()
            if not open_:
                return
            assert member is not None
            key, value = member
            if path[-1] is not _FIRST:
                yield ","
            path[-1] = key
            if open_[-1][1] == "}":
                name = str(key)
                yield self._string(*self._plain(name, self._limit)) + ":"
                is_secret = not is_checked and is_secret_name(name[: self._limit])
            else:
                is_secret = False

    def _leaf(self, path: list[object], value: object) -> Iterator[str]:
        if self._redact is None:
            yield self._string(*self._plain(value, self._limit)) if isinstance(value, str) else self._written(value)
            return
        # The hook is to see all of it.
        shown = self._plain(value, _ALL)[0] if isinstance(value, str) else value
        try:
            shown = self._redact(cast(Path, tuple(path)), shown)
        except Exception as error:
            yield self._failed(error)
            return
        yield from self.pieces(shown, is_checked=True)

    def _plain(self, string: str, room: int) -> tuple[str, bool]:
        # Known secrets first: what is left of one that a URL is cut in would not be known for one.
        return _plain(self._scrub.without_known(string), room)

    def _written(self, value: object) -> str:
        if isinstance(value, str):
            return self._string(value, True)
        if value is None or isinstance(value, bool):
            return json.dumps(value)
        if not isinstance(value, (int, float)):
            return self._failed(value)
        try:
            number = json.dumps(value, allow_nan=False)
        except ValueError:
            # No number of JSON, or longer than Python writes one.
            return "null"
        return number if self._scrub(number) == number else f'"{REDACTED}"'

    def _string(self, string: str, is_whole: bool) -> str:
        if len(string) > self._limit:
            string, is_whole = string[: self._limit], False
        self.cut = self.cut or not is_whole
        return json.dumps(self._scrub(string), ensure_ascii=False)

    def _failed(self, reason: object) -> str:
        if not self._told:
            self._told = True
            logger.warning("redact failed: %s", type(reason).__name__)
        return f'"{REDACTED}"'


_FIRST = object()
_ALL = 1 << 60

# The beginning of a URL or of a data URI (RFC 2397), and what may follow.
_BEGIN = re.compile(
    r"(?=[HhDd])(?:(?P<http>(?i:https?)://)"
    r"|(?<![A-Za-z0-9_])(?i:data):(?P<type>[\w.+-]{1,80}/[\w.+-]{1,80})?(?:;[\w.+-]{1,30}=[^\s;,<>]{1,60}){0,4}"
    r"(?P<base64>;(?i:base64))?,)"
)
_LONGEST_BEGINNING = 560
_URL = re.compile(r"[^\s\"'<>]*")
_BASE64 = re.compile(r"[A-Za-z0-9+/=_%\r\n-]*")
_ANY = re.compile(r"[^\s\"'<>]*")


def _plain(text: str, room: int) -> tuple[str, bool]:
    """The beginning of `text`, `room` characters or so, with URLs and files in short; and whether that is all."""
    parts: list[str] = []
    at = 0
    while room > 0:
        found = _BEGIN.search(text, at, min(len(text), at + room + _LONGEST_BEGINNING))
        end = min(at + room, found.start() if found else len(text))
        parts.append(text[at:end])
        room -= end - at
        at = end
        if found is None or room == 0:
            break
        short, at = _file(text, found) if found["http"] is None else _url(text, found)
        parts.append(short)
        room -= len(short)
    return "".join(parts), at == len(text)


def _url(text: str, found: re.Match[str]) -> tuple[str, int]:
    end = _matched(_URL, text, found.end())
    host, slash, path = re.split("[?#]", text[found.end() : end], maxsplit=1)[0].partition("/")
    return f"{found[0]}{host.rpartition('@')[2]}{slash}{path}", end


def _file(text: str, found: re.Match[str]) -> tuple[str, int]:
    start = found.end()
    if found["base64"]:
        end = _matched(_BASE64, text, start)
        escaped = text.count("%", start, end)
        padding = sum(text.count(one, start, end) for one in ("=", "%3D", "%3d", "\r", "\n"))
        size = (end - start - 2 * escaped - padding) * 3 // 4
    else:
        # Where it is all of the text, it may have spaces in it.
        end = len(text) if found.start() == 0 else _matched(_ANY, text, start)
        size = len(text[start:end].encode("utf-8", "replace")) - 2 * text.count("%", start, end)
    return f"data:{found['type'] or 'text/plain'} ({size} bytes)", end


def _matched(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at
