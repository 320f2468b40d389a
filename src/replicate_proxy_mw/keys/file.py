"""Keys in a file that may change at any time: see `key_file.py` for what is in it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import anyio
from anyio.lowlevel import current_token

from .accounts import choose
from .contract import KeyRequest, ReplicateKey
from .key_file import digest, parse, replicate_keys

logger = logging.getLogger("replicate_proxy_mw")

# Two changes within a tick of a file system's clock look alike; the coarsest clock, that of FAT, ticks every 2 s.
SETTLES_NS = 2_000_000_000


class FileKeyResolver:
    """Keys, tenants, policies and Replicate accounts from a TOML file, which is read again when it has changed.

    A request that comes after a change waits until the file is read. A file that is broken or gone then leaves
    everything as it was, and the log says what is wrong; so does a token file.

    Args:
        path: the key file.
        environ: where tokens of the form `env:NAME` are, looked up whenever the file is read.
        check_interval: seconds for which nobody looks whether a file has changed: a key is revoked that fast, and a
            look costs some microseconds.

    Raises:
        ValueError: what is wrong in the file, and where.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, environ: Mapping[str, str] = os.environ, check_interval: float = 0.5
    ) -> None:
        if not check_interval >= 0:
            raise ValueError("check_interval: must not be negative")
        self._path = Path(path).absolute()
        self._environ = environ
        self._check_interval = check_interval
        self._accounts: Mapping[bytes, Mapping[str, ReplicateKey]] = {}
        self._seen: Mapping[Path, _Look] = {}
        self._good_until = 0.0
        self._loading: dict[object, anyio.Event] = {}
        self._lock = threading.Lock()
        del environ  # exceptions show the locals of their frames
        failure = self._load(_Files())
        if failure:
            raise ValueError(f"{self._path}: {failure}")

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        if time.monotonic() >= self._good_until:
            await self._look()
        known = self._accounts.get(digest(request.api_key))
        return None if known is None else choose(request, known)

    async def _look(self) -> None:
        now, seen = time.monotonic(), self._seen
        if self._is_unchanged():
            self._good_until = now + self._check_interval
            return
        event_loop = current_token()
        while self._seen is seen:
            loading = self._loading.get(event_loop)
            if loading is not None:
                await loading.wait()
                continue
            self._loading[event_loop] = loading = anyio.Event()
            try:
                # With a limiter of its own: the threads of the host may all be busy. The thread goes on where the
                # request that came first is cancelled; whoever waits then takes its place.
                await anyio.to_thread.run_sync(self._reload, seen, limiter=anyio.CapacityLimiter(1))
            finally:
                del self._loading[event_loop]
                loading.set()

    def _is_unchanged(self) -> bool:
        return all(look.settled and look.signature == _signature(path) for path, look in self._seen.items())

    def _reload(self, seen: Mapping[Path, _Look]) -> None:
        """Read what has changed since it was `seen`."""
        with self._lock:
            if self._seen is not seen:  # another thread came first
                return
            now = time.monotonic()
            files = _Files()
            if all(files.look(path).content == look.content for path, look in self._seen.items()):
                self._seen = files.looks
            elif failure := self._load(files):
                logger.error("key file %s: %s; what was read before still holds", self._path, failure)
            else:
                logger.info("key file %s: read again, keys: %d", self._path, len(self._accounts))
            self._good_until = now + self._check_interval

    def _load(self, files: _Files) -> str | None:
        """Read everything through `files`; returns what is wrong."""
        failure = None
        try:
            content = parse(_utf8(files, self._path))
            self._accounts = replicate_keys(
                content, environ=self._environ, read=lambda path: files.read(self._path.parent / path)
            )
        except OSError as error:
            failure = f"it cannot be read: {error.strerror}"
        except ValueError as error:
            failure = str(error)
        self._seen = files.looks  # after the accounts: until then, requests see that there is something to wait for
        return failure


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """How a file looked before it was read, and a digest of what was in it, or why it could not be read.

    `settled` is whether a later change would be seen in the signature.
    """

    signature: tuple[int, ...] | None
    settled: bool
    content: bytes | str | None


class _Files:
    """Reads each file once."""

    def __init__(self) -> None:
        self.looks: dict[Path, _Look] = {}
        self._contents: dict[Path, bytes | OSError] = {}

    def read(self, path: Path) -> bytes:
        self.look(path)
        content = self._contents[path]
        if isinstance(content, OSError):
            raise content
        return content

    def look(self, path: Path) -> _Look:
        if path not in self.looks:
            settled_before = time.time_ns() - SETTLES_NS
            signature = _signature(path)
            settled = signature is None or max(signature[:2]) < settled_before
            seen: bytes | str | None
            try:
                content = self._contents[path] = path.read_bytes()
                seen = sha256(content).digest()
                del content
            except OSError as error:
                self._contents[path] = error
                seen = error.strerror
            self.looks[path] = _Look(signature=signature, settled=settled, content=seen)
        return self.looks[path]


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes with a file, its two times first; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_dev


def _utf8(files: _Files, path: Path) -> str:
    try:
        return files.read(path).decode()
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8, at byte {error.start}"
    raise ValueError(message)
