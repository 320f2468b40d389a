"""A caller of plain sockets, who believes only what the framing of an answer says."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class Answer:
    """One answer, read until the connection ended; `complete` if its own framing said so before."""

    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content: bytes = b""
    complete: bool = False

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


def ask(port: int, method: str, target: str, body: bytes = b"", *, headers: bytes = b"") -> Answer:
    """One exchange on a connection of its own. Bytes behind the answer are an error."""
    with sending(port, method, target, body, headers=headers) as connection:
        received = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                received += piece
    return _parsed(received, bodiless=method == "HEAD")


def sending(port: int, method: str, target: str, body: bytes = b"", *, headers: bytes = b"") -> socket.socket:
    """A connection on which a request has been sent."""
    head = f"{method} {target} HTTP/1.1\r\nhost: proxy.test\r\nx-portkey-api-key: pk-team-a\r\nconnection: close\r\n"
    if method == "POST":
        head += f"content-type: application/octet-stream\r\ncontent-length: {len(body)}\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    # Who answers early may close.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(head.encode() + headers + b"\r\n" + body)
    return connection


def _parsed(received: bytes, *, bodiless: bool) -> Answer:
    head, ended, rest = received.partition(b"\r\n\r\n")
    assert ended, f"no head: {received[:200]!r}"
    line, *lines = head.split(b"\r\n")
    assert re.fullmatch(rb"HTTP/1\.1 [2-5]\d\d .*", line), line
    answer = Answer(int(line[9:12]))
    for one in lines:
        name, _, value = one.partition(b": ")
        assert re.fullmatch(rb"[a-z0-9-]+", name.lower()), one
        assert not re.search(rb"[\0\r\n]", value), one
        answer.headers.append((name.lower(), value))
    lengths, codings = answer.header(b"content-length"), answer.header(b"transfer-encoding")
    assert len(lengths) + len(codings) <= 1, answer.headers
    if bodiless or answer.status in (204, 304):
        answer.complete = True
    elif codings:
        rest = _chunks(answer, rest)
    else:
        # Without a length nobody could tell a cut.
        length = int(lengths[0])
        answer.content, rest = rest[:length], rest[length:]
        answer.complete = len(answer.content) == length
    assert not rest, f"surplus: {rest[:200]!r}"
    return answer


def _chunks(answer: Answer, rest: bytes) -> bytes:
    while True:
        size, ended, rest = rest.partition(b"\r\n")
        if not ended:
            return b""
        length = int(size, 16)
        content, rest = rest[:length], rest[length:]
        answer.content += content
        if not rest.startswith(b"\r\n"):
            return rest
        rest = rest[2:]
        if length == 0:
            answer.complete = True
            return rest
