from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replicate_proxy_mw.telemetry.event_stream import MAX_EVENT, EventScanner

OUTPUT = b"event: output\nid: 1690212292:0\ndata: Once\n\n"
DONE = b"event: done\nid: 1690212293:0\ndata: {}\n\n"


@dataclass
class Told:
    events: int = 0
    first_data: bool = False
    complete: bool = False
    final_status: str | None = None


def scanned(*chunks: bytes) -> Told:
    scanner = EventScanner()
    for chunk in chunks:
        scanner.feed(chunk)
    return Told(scanner.events, scanner.first_data, scanner.complete, scanner.final_status)


def byte_by_byte(text: bytes) -> Told:
    return scanned(*(text[i : i + 1] for i in range(len(text))))


def parsed(text: bytes) -> Told:
    """The same from all that came at once, line by line as the standard says."""
    told = Told()
    *lines, rest = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    fields: list[tuple[bytes, bytes]] = []
    size = 0
    for line in lines:
        if line.startswith(b":"):
            continue
        if line:
            name, _, value = line.partition(b":")
            fields.append((name, value.removeprefix(b" ")))
            size += len(line) + 1
            told.first_data = told.first_data or line.startswith(b"data:")
            continue
        if fields:
            told.events += 1
            names = [value for name, value in fields if name == b"event"]
            if names[-1:] == [b"done"] and not told.complete:
                told.complete = True
                data = b"\n".join(value for name, value in fields if name == b"data")
                told.final_status = final_status(data) if size <= MAX_EVENT else None
        fields, size = [], 0
    told.first_data = told.first_data or rest.startswith(b"data:")
    return told


def final_status(data: bytes) -> str | None:
    try:
        content = json.loads(data or b"{}")
    except ValueError:
        return None
    if not isinstance(content, dict) or "reason" not in content:
        return "succeeded"
    known = [("canceled", "canceled"), ("error", "failed")]
    return next((status for reason, status in known if content["reason"] == reason), None)


def test_nothing_has_come() -> None:
    assert scanned() == scanned(b"", b"") == Told()


def test_a_stream_to_its_end() -> None:
    scanner = EventScanner()
    told = []
    for chunk in (b"event: output\n", b"da", b"ta", b":", b" Once\n", b"\n", DONE[:-1], DONE[-1:]):
        scanner.feed(chunk)
        told.append((scanner.events, scanner.first_data, scanner.complete, scanner.final_status))
    assert told == [
        (0, False, False, None),
        (0, False, False, None),
        (0, False, False, None),
        (0, True, False, None),
        (0, True, False, None),
        (1, True, False, None),
        (1, True, False, None),
        (2, True, True, "succeeded"),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"data: a", Told(first_data=True)),
        (b"data: a\n", Told(first_data=True)),
        (b"data:\n\n", Told(events=1, first_data=True)),
        (b"data\n\n", Told(events=1)),
        (b"database: x\n\n", Told(events=1)),
        (b"id: data:\n\n", Told(events=1)),
        (b"id: 1\n\n", Told(events=1)),
        (b" \n\n", Told(events=1)),
        (b"\n\n\n", Told()),
        (b"\n\nid: 1\n\n\n\nid: 2\n\n\n", Told(events=2)),
        (b": ping\n\n", Told()),
        (b":\n\n:\n:\n\n", Told()),
        (b": event: done\n\n", Told()),
        (b": data: a\n\n", Told()),
        (b": ping\nid: 1\n\n: ping\n\nid: 2\n: ping\n\n", Told(events=2)),
        (b"id: 1\n: ping\n\n", Told(events=1)),
        (b"id: 1\n:\n:\n\n", Told(events=1)),
        (b"\xef\xbb\xbfdata: a\n\n", Told(events=1, first_data=True)),
        (b"\xef\xbb\xbf: ping\n\n", Told()),
        (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", Told(events=1)),
        (b"\xef\xbbdata: a\n\n", Told(events=1)),
        (b"data: a\n\n\xef\xbb\xbfdata: a\n\n", Told(events=2, first_data=True)),
    ],
)
def test_what_is_counted(text: bytes, told: Told) -> None:
    for ends in (b"\n", b"\r", b"\r\n"):
        spelled = text.replace(b"\n", ends)
        assert scanned(spelled) == byte_by_byte(spelled) == told == parsed(spelled)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"data: {}\n", "succeeded"),
        (b"data:{}\n", "succeeded"),
        (b"data: \n", "succeeded"),
        (b"data\n", "succeeded"),
        (b"", "succeeded"),
        (b"data: []\n", "succeeded"),
        (b'data: {"more": 1}\n', "succeeded"),
        (b'data: {"reason": "canceled"}\n', "canceled"),
        (b'data: {"reason":"error"}\n', "failed"),
        (b'data: {"reason":\ndata:  "error"}\n', "failed"),
        (b'data: {"reason":\n: ping\nid: 5\ndata: "error"}\n', "failed"),
        (b'data: {"reason": "timeout"}\n', None),
        (b'data: {"reason": ["error"]}\n', None),
        (b'data: {"reason": null}\n', None),
        (b"data: {\n", None),
        (b"data: done\n", None),
        (b"data: \xff\n", None),
    ],
)
@pytest.mark.parametrize("before", [b"", OUTPUT, b": ping\n\n", b"data: done\n\n"])
def test_how_it_ended(before: bytes, data: bytes, status: str | None) -> None:
    for event in (b"event: done\n" + data + b"\n", data + b"event:done\n\n"):
        for ends in (b"\n", b"\r", b"\r\n"):
            text = (before + event).replace(b"\n", ends)
            for told in (scanned(text), byte_by_byte(text), parsed(text)):
                assert (told.complete, told.final_status) == (True, status)
            assert not scanned(text.removesuffix(ends)).complete


def test_data_that_is_deeper_than_python_goes_is_not_understood() -> None:
    data = b"[" * (MAX_EVENT - 20)
    assert scanned(b"event: done\ndata: " + data + b"\n\n") == Told(1, True, True, None)


@pytest.mark.parametrize(
    "event",
    [
        b"event: Done\n",
        b"event:  done\n",
        b"event: done \n",
        b"event: not-done\n",
        b"event: undone\n",
        b" event: done\n",
        b"events: done\n",
        b"event\n",
        b"done\n",
        b"data: event: done\n",
        b"event: done\nevent: output\n",
        b"event: done\nevent\n",
        b"event: done\nevent:\n",
    ],
)
def test_other_events_are_not_the_end(event: bytes) -> None:
    text = event + b"data: {}\n\n"
    assert scanned(text) == byte_by_byte(text) == Told(1, True) == parsed(text)
    assert scanned(text + DONE) == byte_by_byte(text + DONE) == Told(2, True, True, "succeeded")


def test_the_last_name_of_an_event_counts() -> None:
    assert scanned(b"event: output\nevent: done\n\n") == Told(1, False, True, "succeeded")


def test_the_first_end_counts() -> None:
    canceled = DONE.replace(b"{}", b'{"reason": "canceled"}')
    assert scanned(canceled + DONE) == scanned(canceled, DONE) == Told(2, True, True, "canceled")


LONG = b"x" * 3 * MAX_EVENT


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"data: " + LONG + b"\n\n" + DONE, Told(2, True, True, "succeeded")),
        (b"id: " + LONG + b"\n\n" + DONE, Told(2, True, True, "succeeded")),
        (LONG + b"\n\n" + OUTPUT, Told(2, True)),
        (b":" + LONG + b"\n\n" + DONE, Told(1, True, True, "succeeded")),
        (DONE[:-1] + b":" + LONG + b"\n\n", Told(1, True, True, "succeeded")),
        (b"data: {}\n:" + LONG + b"\nevent: done\n\n", Told(1, True, True, "succeeded")),
        (b"id: " + LONG + b"\n:" + LONG + b"\nevent: done\n\n", Told(1, False, True, None)),
        (b"event: done\ndata: {}\nid: " + LONG + b"\n\n", Told(1, True, True, None)),
        (b"event: done\nid: " + LONG + b"\ndata: {}\n\n", Told(1, True, True, None)),
        (b"data: " + LONG + b"\nevent: done\n\n", Told(1, True, True, None)),
        (b"event: done\n" + b"data: x\n" * MAX_EVENT + b"\n", Told(1, True, True, None)),
        (b"event: done\n" + b"data: x\n" * MAX_EVENT + b"event: x\n\n" + DONE, Told(2, True, True, "succeeded")),
        (b"event:  done\n" + b"data: x\n" * MAX_EVENT + b"\n", Told(1, True)),
        (b"event: done" + LONG + b"\n\n", Told(1)),
        (b"event: done\nevent: " + LONG + b"\n\n", Told(1)),
        (b"event: " + LONG + b"done\n\n", Told(1)),
    ],
    ids=range(16),
)
def test_what_is_too_long_is_counted_all_the_same(text: bytes, told: Told) -> None:
    assert parsed(text) == told
    assert scanned(text) == byte_by_byte(text) == told
    for size in (700, 5000):
        assert scanned(*(text[i : i + size] for i in range(0, len(text), size))) == told


@pytest.mark.parametrize("more", [0, 1])
def test_the_end_is_read_up_to_a_kibibyte(more: int) -> None:
    padding = b"id: " + b"x" * (MAX_EVENT - len(DONE) - 4 + more) + b"\n"
    for text in (padding + DONE, DONE[:-1] + padding + b"\n", padding + b":" + LONG + b"\n" + DONE):
        told = Told(1, True, True, None if more else "succeeded")
        assert scanned(text) == byte_by_byte(text) == told == parsed(text)


@pytest.mark.parametrize("part", [b"x", b"data: x\n", b"event: x\n", b":", b": x\n", b"\n", b"id\n:", b"\r", b"d\r\n"])
def test_an_event_without_end_takes_no_memory(part: bytes) -> None:
    scanner, chunk = EventScanner(), part * (65536 // len(part))
    scanner.feed(chunk)
    tracemalloc.start()
    try:
        for _ in range(20):
            scanner.feed(chunk)
        assert tracemalloc.get_traced_memory()[0] < 8 * MAX_EVENT  # 1.3 MB were fed
    finally:
        tracemalloc.stop()


_line = st.sampled_from(
    [
        *(b"", b"", b":", b": ping", b"data: x", b"data", b"event: output", b"event: done", b"event:done", b"event"),
        *(b"data: {}", b'data: {"reason": "error"}', b"id: 1", b"x", b"\xef\xbb\xbf", b"done", b"event:  done"),
        *(b"data: " + LONG[:600], b"data: " + LONG, b": " + LONG[:1030], b"id: " + LONG[:1010]),
    ]
)
_lines = st.lists(st.tuples(_line, st.sampled_from([b"\n", b"\n", b"\r", b"\r\n"])), max_size=30)
_TEXTS = st.builds(
    lambda bom, lines, rest: bom + b"".join(line + end for line, end in lines) + rest,
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xef\xbb"]),
    _lines,
    _line,
)


@given(_TEXTS, st.lists(st.integers(0, 4000)))
@example(b"data: x\r\n\r\n\ndata: y\r\n", [8, 9, 10])
def test_chunks_make_no_difference(text: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    expected = parsed(text)
    assert scanned(text) == expected
    assert scanned(*(text[a:b] for a, b in pairwise(edges))) == expected
    assert byte_by_byte(text) == expected
