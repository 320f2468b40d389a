"""An upstream of plain sockets: each connection is played by a script of the test, byte by byte."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Received:
    """One request as it came over the wire."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        lines = self.head.split(b"\r\n")[1:]
        return [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Connection:
    """The upstream's end of one connection."""

    socket: socket.socket
    upstream: RawUpstream
    buffer: bytes = b""

    def head(self) -> bytes:
        """Read up to the end of a request's head; empty when the proxy has closed the connection."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._more():
                return b""
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head

    def request(self) -> Received | None:
        """Read one whole request, None when there is none any more, or only a part of one."""
        head = self.head()
        if not head:
            return None
        received = Received(head, b"")
        if received.header(b"transfer-encoding") == [b"chunked"]:
            while b"0\r\n\r\n" not in self.buffer:
                if not self._more():
                    return None
            received.body, self.buffer = self.buffer, b""
        for length in received.header(b"content-length"):
            while len(self.buffer) < int(length):
                if not self._more():
                    return None
            received.body, self.buffer = self.buffer[: int(length)], self.buffer[int(length) :]
        self.upstream.requests.append(received)
        return received

    def _more(self) -> bool:
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        self.buffer += data
        return bool(data)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(data)

    def answer(self, body: bytes = b"{}", *, status: bytes = b"200 OK", headers: bytes = b"") -> None:
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n"
        self.send(head % (status, len(body), headers) + body)

    def wait_closed(self, seconds: float = 5.0) -> bool:
        """Whether the proxy closes the connection within so many seconds."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        self.upstream.closed_at.append(time.monotonic())
        self.upstream.closed.set()
        return True

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def answer_all(connection: Connection) -> None:
    """Answer every request of a connection with 200 and `{}`."""
    while connection.request():
        connection.answer()


@dataclass
class RawUpstream:
    """Listens on a free loopback port; `script` plays each connection in a thread of its own."""

    script: Callable[[Connection], None] = answer_all
    requests: list[Received] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    closed_at: list[float] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> RawUpstream:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def all_closed(self, count: int, seconds: float = 3.0) -> None:
        """Wait until so many connections are closed by the proxy, or so many seconds."""
        deadline = time.monotonic() + seconds
        while len(self.closed_at) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(accepted, self)
            self.connections.append(connection)
            thread = threading.Thread(target=self._play, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _play(self, connection: Connection) -> None:
        with connection.socket:
            self.script(connection)

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
