"""Keys in a file that may change at any time: see `key_file.py` for what is in it."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import anyio
from anyio.lowlevel import current_token

from .accounts import choose
from .contract import LATER, KeyRequest, Later, ReplicateKey, digest
from .key_file import parse, read_tokens, replicate_keys

logger = logging.getLogger("replicate_proxy_mw")

# Two changes within a tick of a file system's clock look alike; the coarsest clock, that of FAT, ticks every 2 s.
SETTLES = 2.0

# Half a file, as an editor leaves it for a moment, may be a valid one: what is younger is read again, for so long.
YOUNG, PATIENCE = 0.1, 0.3


class TokenMissing(Exception):
    """A caller named a provider whose token was not to be had; the log said why when the file was read."""


class FileKeyResolver:
    """Keys, tenants, policies and Replicate accounts from a TOML file, which is read again when it has changed.

    A request that comes after a change waits until the file is read. That takes about half a second for 10,000 keys;
    with more than twice as many it comes near to `resolver_timeout`. A file that is broken or gone then leaves
    everything as it was. So does a token that is not to be had, for its provider alone; where that had none before,
    requests for it fail (503). The log says what is wrong.

    Args:
        path: the key file, on a local disk: it is looked at in the event loop.
        environ: where tokens of the form `env:NAME` are, looked up whenever the file is read.
        check_interval: seconds for which nobody looks whether a file has changed: a key is revoked that fast, and a
            look costs some microseconds.

    Raises:
        ValueError: what is wrong in the file, or with a token, and where.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, environ: Mapping[str, str] = os.environ, check_interval: float = 0.5
    ) -> None:
        self._environ = environ
        del environ  # exceptions show the locals of their frames
        if not check_interval >= 0:
            raise ValueError("check_interval: must not be negative")
        self._path = Path(path).absolute()
        self._check_interval = check_interval
        self._content = parse("")
        self._tokens: Mapping[str, ReplicateKey] = {}
        self._accounts: Mapping[bytes, Mapping[str, ReplicateKey | None]] = {}
        self._seen: Mapping[Path, _Look] = {}
        self._good_until = 0.0
        self._loading: dict[object, anyio.Event] = {}
        self._lock = threading.Lock()
        problems = self._load(_Files({}))
        if problems:
            raise ValueError(f"{self._path}: {problems[0][0]}")

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        if time.monotonic() >= self._good_until:
            await self._look()
        return self._known(request)

    def _at_once(self, request: KeyRequest) -> ReplicateKey | Later | None:
        return LATER if time.monotonic() >= self._good_until else self._known(request)

    def _known(self, request: KeyRequest) -> ReplicateKey | None:
        known = self._accounts.get(digest(request.api_key))
        if known is None:
            return None
        key = choose(request, known)
        if key is None:
            raise TokenMissing
        return key

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
                # The thread of another event loop is at it, or one that its request has left.
                while self._lock.locked():  # noqa: ASYNC110 - threads have no event for it
                    await anyio.sleep(0.01)
                # With a limiter of its own: the threads of the host may all be busy. The thread goes on where the
                # request that came first is cancelled; whoever waits then takes its place.
                await anyio.to_thread.run_sync(
                    self._reload, seen, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
                )
            finally:
                del self._loading[event_loop]
                loading.set()

    def _is_unchanged(self) -> bool:
        return all(look.settled and look.signature == _signature(path) for path, look in self._seen.items())

    def _reload(self, seen: Mapping[Path, _Look]) -> None:
        """Read what has changed since it was `seen`."""
        if not self._lock.acquire(blocking=False):  # where a disk hangs, one thread does, and no more
            return
        try:
            if self._seen is not seen:  # another thread came first
                return
            now = time.monotonic()
            files, changed = _whole(seen)
            if not changed:
                self._seen = files.looks
            elif problems := self._load(files):
                for problem, consequence in problems:
                    logger.error("key file %s: %s; %s", self._path, problem, consequence)
            else:
                logger.info("key file %s: read again, keys: %d", self._path, len(self._accounts))
            self._good_until = now + self._check_interval
        finally:
            self._lock.release()

    def _load(self, files: _Files) -> list[tuple[str, str]]:
        """Read everything through `files`; returns what is wrong, each with its consequence."""
        kept = "what was read before still holds"
        problems = []
        try:
            content = parse(_utf8(files, self._path))
            if not content.providers:  # rather half a file, as an editor leaves it for a moment
                raise ValueError("there is no provider, [providers.NAME]")
            self._content = content
        except OSError as error:
            problems.append((f"it cannot be read: {error.strerror}", kept))
        except ValueError as error:
            problems.append((str(error), kept))
        folder = self._path.parent
        tokens, missing = read_tokens(self._content, environ=self._environ, read=lambda path: files.read(folder / path))
        for name, problem in missing.items():
            if name in self._tokens:
                tokens[name] = self._tokens[name]
            problems.append((problem, kept if name in tokens else f"requests for {name} fail"))
        self._tokens = tokens
        self._accounts = replicate_keys(self._content, tokens)
        self._seen = files.looks  # after the accounts: until then, requests see that there is something to wait for
        return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """How a file looked before it was read, since when, and a digest of what was in it, or why it could not be read.

    `settled` is whether a later change would be seen in the signature.
    """

    signature: tuple[int, ...] | None
    since: float
    settled: bool
    content: bytes | str | None


class _Files:
    """Reads each file once. `seen` is how they looked before."""

    def __init__(self, seen: Mapping[Path, _Look]) -> None:
        self.looks: dict[Path, _Look] = {}
        self._seen = seen
        self._contents: dict[Path, bytes | OSError] = {}

    def read(self, path: Path) -> bytes:
        self.look(path)
        content = self._contents[path]
        if isinstance(content, OSError):
            raise content
        return content

    def look(self, path: Path) -> _Look:
        if path not in self.looks:
            now, signature, before = time.monotonic(), _signature(path), self._seen.get(path)
            since = before.since if before and before.signature == signature else now
            try:
                content = self._contents[path] = _content(path)
                seen: bytes | str | None = sha256(content).digest()
                settled = now - since >= SETTLES
                del content
            except OSError as error:
                self._contents[path] = error
                seen = error.strerror
                settled = signature is None  # what is there may be readable next time
            self.looks[path] = _Look(signature=signature, since=since, settled=settled, content=seen)
        return self.looks[path]


def _whole(seen: Mapping[Path, _Look]) -> tuple[_Files, bool]:
    """The files as they are when nobody seems to be writing them any more, and whether they have changed."""
    patient_until = time.monotonic() + PATIENCE
    while True:
        files = _Files(seen)
        changed = [look.signature for path in seen if (look := files.look(path)).content != seen[path].content]
        ages = [time.time() - signature[0] / 1e9 for signature in changed if signature]
        if all(age >= YOUNG for age in ages) or time.monotonic() >= patient_until:
            return files, bool(changed)
        time.sleep(YOUNG)


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes with a file, its time of modification first; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def _content(path: Path) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe may never answer
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def _utf8(files: _Files, path: Path) -> str:
    try:
        return files.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8, at byte {error.start}"
    raise ValueError(message)
