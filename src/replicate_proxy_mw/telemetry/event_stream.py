"""What a stream of Server-Sent Events tells as it passes (HTML standard, section 9.2): counted, and how it ended."""

from __future__ import annotations

import json
import re

# Bytes kept of an event that has begun: Replicate's last one has less than a hundred.
MAX_EVENT = 1024

# Of a line that is cut: more than `event: done` has, so that nothing cut reads like it.
_CUT = 16

_BOM = b"\xef\xbb\xbf"
_COMMENTS = re.compile(rb"^:[^\n]*\n", re.MULTILINE)
_BLANKS = re.compile(rb"\n{3,}")
_NAMES = re.compile(rb"^event(?:$|: ?([^\n]*))", re.MULTILINE)
_DATA = re.compile(rb"^data(?:$|: ?([^\n]*))", re.MULTILINE)


class EventScanner:
    """Looks at the bytes of one stream, in whatever chunks they come. It never raises.

    Attributes:
        events: how many have come to their end: a blank line after a field at least, comments aside.
        first_data: a line that begins with `data:` has begun.
        complete: the event `done` has come to its end; Replicate sends nothing after it.
        final_status: the prediction's by the data of `done`: `succeeded`, `canceled` or `failed`. None before that, and
            if it says something else or the event is longer than 1 KiB.
    """

    __slots__ = ("_begun", "_cr", "_open", "_too_long", "complete", "events", "final_status", "first_data")

    def __init__(self) -> None:
        self.events = 0
        self.first_data = self.complete = False
        self.final_status: str | None = None
        # The event that has begun, with LF as line ends and without comments; once too long, a text that reads like it.
        self._open = b""
        self._too_long = False
        self._begun = False
        self._cr = False

    def feed(self, chunk: bytes) -> None:
        if not chunk:
            return
        text = self._open + self._with_lf(chunk)
        if not self._begun:
            if _BOM.startswith(text):
                self._open = text
                return
            self._begun = True
            text = text.removeprefix(_BOM)
        # Below, the loops are C's: a stream of files has chunks of 64 KiB, and events of megabytes.
        if text.startswith(b":") or b"\n:" in text:
            text = _COMMENTS.sub(b"", text)
        text = text.lstrip(b"\n")
        if not self.first_data:
            self.first_data = text.startswith(b"data:") or b"\ndata:" in text
        if b"\n\n\n" in text:
            text = _BLANKS.sub(b"\n\n", text)
        end = text.rfind(b"\n\n")
        if end >= 0:
            self.events += text.count(b"\n\n")
            if not self.complete and (b"event: done\n" in text or b"event:done\n" in text):
                self._look_for_done(text[:end].split(b"\n\n"))
            self._too_long = False
            text = text[end + 2 :]
        self._open = text if len(text) <= MAX_EVENT else self._shortened(text)

    def _with_lf(self, chunk: bytes) -> bytes:
        if self._cr:
            chunk = chunk.removeprefix(b"\n")
        self._cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in chunk else chunk

    def _look_for_done(self, events: list[bytes]) -> None:
        for event in events:
            if b"done" in event and _name(event) == b"done":
                self.complete = True
                if not self._too_long and len(event) < MAX_EVENT:
                    self.final_status = _status(b"\n".join(_DATA.findall(event)))
                return
            self._too_long = False

    def _shortened(self, text: bytes) -> bytes:
        lines, end, line = text.rpartition(b"\n")
        if line.startswith(b":"):
            line = b":"
            if len(lines) < MAX_EVENT:
                return lines + end + line
        self._too_long = True
        return (b"event: " + _name(lines)[:_CUT] if lines else b"") + end + line[:_CUT]


def _name(event: bytes) -> bytes:
    """The last one counts."""
    names = _NAMES.findall(event)
    return bytes(names[-1]) if names else b""


def _status(data: bytes) -> str | None:
    try:
        content = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return None
    match content:
        case {"reason": "canceled"}:
            return "canceled"
        case {"reason": "error"}:
            return "failed"
        case {"reason": _}:
            return None
    return "succeeded"
