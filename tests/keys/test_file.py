from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw import KeyRequest, PermissionDenied
from replicate_proxy_mw.errors import ResolverFailed
from replicate_proxy_mw.keys import file as module
from replicate_proxy_mw.keys import resolve
from replicate_proxy_mw.keys.__main__ import main
from replicate_proxy_mw.keys.contract import digest
from replicate_proxy_mw.keys.file import FileKeyResolver
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.raw_asgi import call, http_scope, proxy

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_more_than_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "replicate_proxy_mw")


TOKEN_A, TOKEN_B = "r8_aaaaaaaaaaaaaaaaaaaaaaaa", "r8_bbbbbbbbbbbbbbbbbbbbbbbb"
ENVIRON = {"A": TOKEN_A, "B": TOKEN_B}

PROVIDERS = """
[providers.main]
token = "env:A"
[providers.second]
token = "env:B"
aliases = ["replicate-abc123"]
"""


def _text(*api_keys: str, providers: str = PROVIDERS) -> str:
    keys = [f'[keys.{name}]\ndigest = "sha256:{digest(name).hex()}"\ntenant = "design"\n' for name in api_keys]
    return "".join([providers, "[tenants.design]\n", *keys])


def _write(path: Path, text: str, *, seconds_ago: float = 1) -> None:
    """So long ago by default that nobody waits to see whether more is written."""
    path.write_text(text)
    os.utime(path, (time.time() - seconds_ago,) * 2)


def _read(path: Path) -> str:
    return path.read_text()


def _request(api_key: str, **more: Any) -> KeyRequest:
    return KeyRequest(api_key=api_key, method="GET", path="/account", scope={}, **more)


async def _token(resolver: FileKeyResolver, api_key: str, **more: Any) -> str | None:
    key = await resolver(_request(api_key, **more))
    return None if key is None else key.authorization().decode().removeprefix("Bearer ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(_text("pk-1", "pk-2"))
    return path


@pytest.fixture
def resolver(path: Path) -> FileKeyResolver:
    """One that looks at each request."""
    return FileKeyResolver(path, environ=ENVIRON, check_interval=0)


@pytest.fixture
def after_reading(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Path], None]]:
    """What is called with the path of a file that was read, before anybody gets its content."""
    calls: list[Callable[[Path], None]] = []
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        content = read(path)
        for one in calls:
            one(path)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return calls


@pytest.fixture
def reads(after_reading: list[Callable[[Path], None]]) -> list[Path]:
    """The files that are read."""
    reads: list[Path] = []
    after_reading.append(reads.append)
    return reads


async def test_who_is_known_gets_a_key_of_its_tenant(resolver: FileKeyResolver) -> None:
    key = await resolver(_request("pk-1"))
    assert key is not None
    assert (key.tenant, key.authorization()) == ("design", b"Bearer " + TOKEN_A.encode())
    assert await resolver(_request("pk-3")) is None
    assert await resolver(_request("pk-1")) is await resolver(_request("pk-1"))


async def test_a_slug_chooses_the_account(resolver: FileKeyResolver) -> None:
    assert await _token(resolver, "pk-1", provider="@second") == TOKEN_B
    assert await _token(resolver, "pk-1", virtual_key="replicate-abc123") == TOKEN_B
    assert await _token(resolver, "pk-1", provider="@main") == TOKEN_A
    with pytest.raises(PermissionDenied):
        await resolver(_request("pk-1", provider="@third"))
    assert await _token(resolver, "pk-3", provider="@third") is None


async def test_an_account_that_is_not_for_the_key(path: Path) -> None:
    _write(path, _text("pk-1") + 'providers = ["main"]\n')
    resolver = FileKeyResolver(path, environ=ENVIRON)
    for provider in ("@second", "@replicate-abc123"):
        with pytest.raises(PermissionDenied):
            await resolver(_request("pk-1", provider=provider))


async def test_paths_of_tokens_are_relative_to_the_key_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "main").write_text(f"  {TOKEN_B}\n\n")
    _write(path, _text("pk-1", providers='[providers.main]\ntoken = "file:secrets/main"\n'))
    monkeypatch.chdir(tmp_path)
    resolver = FileKeyResolver("keys.toml", environ={}, check_interval=0)
    monkeypatch.chdir("/")
    assert await _token(resolver, "pk-1") == TOKEN_B
    _write(path, _text("pk-2", providers=f'[providers.main]\ntoken = "file:{tmp_path}/secrets/main"\n'))
    assert await _token(resolver, "pk-1") is None
    assert await _token(resolver, "pk-2") == TOKEN_B


async def test_tokens_come_from_the_process_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", TOKEN_B)
    monkeypatch.setenv("B", TOKEN_A)
    assert await _token(FileKeyResolver(path), "pk-1") == TOKEN_B


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[tenants.a]\npolicy = 'p'", 'tenants.a.policy: there is no policy "p"'),
        (b'[providers.main]\ntoken = "env:NONE"', "providers.main.token: there is no environment variable NONE"),
        (b"# Andr\xe9\n", "it is not UTF-8, at byte 6"),
        (None, "it cannot be read: No such file or directory"),
        (b"", "there is no provider, [providers.NAME]"),
    ],
)
def test_a_file_that_is_broken_from_the_start(path: Path, content: bytes | None, message: str) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as raised:
        FileKeyResolver(path, environ=ENVIRON)
    assert str(raised.value) == f"{path}: {message}"


async def test_a_byte_order_mark_is_no_matter(path: Path) -> None:
    _write(path, "\ufeff" + _text("pk-1"))
    assert await _token(FileKeyResolver(path, environ=ENVIRON), "pk-1") == TOKEN_A


def test_a_broken_file_gives_no_secret_away(path: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN_A} {TOKEN_A}")
    for wrong in ('token = "file:token"', f'token = "{TOKEN_A}"', 'token = "env:TWICE"'):
        path.write_text(f"[providers.main]\n{wrong}\n")
        with pytest.raises(ValueError, match=r".") as raised:
            FileKeyResolver(path, environ=ENVIRON | {"TWICE": f"{TOKEN_A} {TOKEN_A}"})
        report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
        frames = [str(frame.locals) for frame in report.stack if frame.filename == module.__file__]
        assert frames
        assert TOKEN_A not in "".join([*frames, *report.format_exception_only()])
        assert raised.value.__context__ is None


def test_a_resolver_shows_no_secret(resolver: FileKeyResolver) -> None:
    assert "r8_" not in repr(resolver) + str(resolver)


def test_an_interval_is_not_negative(path: Path) -> None:
    with pytest.raises(ValueError, match="check_interval"):
        FileKeyResolver(path, environ=ENVIRON, check_interval=-1)


async def test_a_change_holds_for_the_next_request(
    path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicate_proxy_mw")
    assert await _token(resolver, "pk-1") == TOKEN_A
    _write(path, _text("pk-2", "pk-3"))
    assert await _token(resolver, "pk-1") is None
    assert await _token(resolver, "pk-3") == TOKEN_A
    assert caplog.messages == [f"key file {path}: read again, keys: 2"]


async def test_nobody_looks_within_the_interval(path: Path, reads: list[Path]) -> None:
    resolver = FileKeyResolver(path, environ=ENVIRON, check_interval=3600)
    assert await _token(resolver, "pk-1") == TOKEN_A
    reads.clear()
    _write(path, _text())
    assert await _token(resolver, "pk-1") == TOKEN_A
    assert reads == []


async def test_a_key_that_was_revoked_long_ago_does_not_slip_through(path: Path) -> None:
    resolver = FileKeyResolver(path, environ=ENVIRON)
    _write(path, _text("pk-2"))
    assert await _token(resolver, "pk-1") is None


async def test_a_broken_edit_changes_nothing_and_is_told_once(
    path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicate_proxy_mw")
    _write(path, _text("pk-3") + f'policy = "{TOKEN_A}"\n')
    for _ in range(3):
        assert await _token(resolver, "pk-1") == TOKEN_A
        assert await _token(resolver, "pk-3") is None
    os.utime(path)
    assert await _token(resolver, "pk-1") == TOKEN_A
    [told] = caplog.records
    message = f'key file {path}: keys.pk-3.policy: there is no policy "***"; what was read before still holds'
    assert (told.levelname, told.getMessage(), told.exc_info) == ("ERROR", message, None)
    _write(path, _text("pk-3") + "x = 1\n")
    assert await _token(resolver, "pk-1") == TOKEN_A
    assert "keys.pk-3.x" in caplog.messages[1]
    _write(path, _text("pk-3"))
    assert await _token(resolver, "pk-1") is None
    assert await _token(resolver, "pk-3") == TOKEN_A
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]


async def test_a_file_that_is_gone(path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "replicate_proxy_mw")
    content = _read(path)
    os.unlink(path)
    for _ in range(3):
        assert await _token(resolver, "pk-1") == TOKEN_A
    assert caplog.messages == [
        f"key file {path}: it cannot be read: No such file or directory; what was read before still holds"
    ]
    _write(path, content)
    assert await _token(resolver, "pk-1") == TOKEN_A
    assert caplog.messages[1:] == [f"key file {path}: read again, keys: 2"]


async def test_nothing_that_it_keeps_shows_a_token(path: Path) -> None:
    _write(path, _text("pk-1"))
    resolver = FileKeyResolver(path, environ={"A": TOKEN_A, "B": TOKEN_B})
    assert await _token(resolver, "pk-1") == TOKEN_A
    kept = {name: value for name, value in vars(resolver).items() if name != "_environ"}
    assert "tenant" in repr(kept)
    assert TOKEN_A not in repr(kept)


async def test_a_token_is_rotated_in_its_file(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN_A)
    _write(path, _text("pk-1", providers='[providers.main]\ntoken = "file:token"\n'))
    resolver = FileKeyResolver(path, environ={}, check_interval=0)
    assert await _token(resolver, "pk-1") == TOKEN_A
    _write(token, TOKEN_B)
    assert await _token(resolver, "pk-1") == TOKEN_B
    _write(token, "half a t")
    assert await _token(resolver, "pk-1") == TOKEN_B
    token.unlink()
    assert await _token(resolver, "pk-1") == TOKEN_B
    _write(token, TOKEN_A)
    assert await _token(resolver, "pk-1") == TOKEN_A
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "providers.main.token: what the file token holds is not a Replicate API token: 8 to 256 letters, digits or "
        "-._~+/=; what was read before still holds",
        "providers.main.token: the file token cannot be read: No such file or directory; what was read before still "
        "holds",
    ]


NEW = '[providers.new]\ntoken = "env:NEW"\naliases = ["also-new"]\n'


async def test_a_token_that_is_not_to_be_had_fails_its_provider_alone(
    path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture
) -> None:
    _write(path, _text("pk-1", "pk-3", providers=PROVIDERS + NEW))
    for _ in range(2):
        assert await _token(resolver, "pk-2") is None
        assert await _token(resolver, "pk-3") == TOKEN_A
        assert await _token(resolver, "pk-3", provider="@second") == TOKEN_B
    problem = "providers.new.token: there is no environment variable NEW"
    assert caplog.messages == [f"key file {path}: {problem}; requests for new fail"]
    for slug in ("new", "also-new"):
        with pytest.raises(ResolverFailed):
            await resolve(resolver, _request("pk-3", provider=f"@{slug}"), seconds=5)
    assert caplog.messages[1:] == ["key resolver failed: TokenMissing"] * 2
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    with pytest.raises(ValueError, match=problem):
        FileKeyResolver(path, environ=ENVIRON)


async def test_a_token_that_is_not_to_be_had_any_more_is_kept_while_the_rest_changes(
    path: Path, tmp_path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture
) -> None:
    _write(path, _text("pk-1", providers=PROVIDERS.replace("env:B", "file:token")))
    assert await _token(resolver, "pk-2") is None
    assert await _token(resolver, "pk-1", provider="@second") == TOKEN_B
    assert await _token(resolver, "pk-1") == TOKEN_A
    problem = "providers.second.token: the file token cannot be read: No such file or directory"
    assert caplog.messages == [f"key file {path}: {problem}; what was read before still holds"]
    _write(tmp_path / "token", TOKEN_A)
    assert await _token(resolver, "pk-1", provider="@second") == TOKEN_A
    assert len(caplog.messages) == 1


async def test_a_token_is_rotated_while_the_key_file_is_broken(path: Path, tmp_path: Path) -> None:
    _write(tmp_path / "token", TOKEN_A)
    _write(path, _text("pk-1", providers='[providers.main]\ntoken = "file:token"\n'))
    resolver = FileKeyResolver(path, environ={}, check_interval=0)
    _write(path, "broken")
    assert await _token(resolver, "pk-1") == TOKEN_A
    _write(tmp_path / "token", TOKEN_B)
    assert await _token(resolver, "pk-1") == TOKEN_B


async def test_a_read_that_fails_once_is_tried_again(
    path: Path,
    resolver: FileKeyResolver,
    after_reading: list[Callable[[Path], None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "SETTLES", 0.0)
    _write(path, _text("pk-1"))
    after_reading.append(fail)
    for _ in range(2):
        assert await _token(resolver, "pk-2") == TOKEN_A
    after_reading.clear()
    assert await _token(resolver, "pk-2") is None
    assert caplog.messages == [
        f"key file {path}: it cannot be read: Too many open files; what was read before still holds"
    ]


async def test_only_files_are_read(path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture) -> None:
    os.unlink(path)
    os.mkfifo(path)
    with anyio.fail_after(10):
        assert await _token(resolver, "pk-1") == TOKEN_A
    assert caplog.messages == [
        f"key file {path}: it cannot be read: not a regular file; what was read before still holds"
    ]
    with pytest.raises(ValueError, match="not a regular file"):
        FileKeyResolver(path, environ=ENVIRON)


async def test_half_of_a_file_is_not_believed(
    path: Path, resolver: FileKeyResolver, after_reading: list[Callable[[Path], None]], caplog: pytest.LogCaptureFixture
) -> None:
    def write_on(path: Path) -> None:
        path.write_text(_text("pk-1", "pk-2", "pk-3"))

    after_reading.append(write_on)
    for half in ("", PROVIDERS, _text("pk-1")):
        _write(path, half, seconds_ago=0)
        assert await _token(resolver, "pk-2") == TOKEN_A
    assert await _token(resolver, "pk-3") == TOKEN_A
    assert caplog.messages == []


@pytest.mark.parametrize("hours", [0, 24])
async def test_a_file_that_is_written_all_the_time_is_believed_in_the_end(
    path: Path, resolver: FileKeyResolver, after_reading: list[Callable[[Path], None]], hours: float
) -> None:
    def touch(path: Path) -> None:
        os.utime(path, (time.time() + hours * 3600,) * 2)

    _write(path, _text("pk-1"), seconds_ago=0)
    after_reading.append(touch)
    assert await _token(resolver, "pk-2") is None


async def test_an_empty_file_changes_nothing(
    path: Path, resolver: FileKeyResolver, caplog: pytest.LogCaptureFixture
) -> None:
    _write(path, "")
    assert await _token(resolver, "pk-1") == TOKEN_A
    assert caplog.messages == [
        f"key file {path}: there is no provider, [providers.NAME]; what was read before still holds"
    ]


async def test_a_volume_of_kubernetes(tmp_path: Path) -> None:
    def publish(name: str, token: str, *api_keys: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(token)
        (tmp_path / name / "keys.toml").write_text(
            _text(*api_keys, providers='[providers.main]\ntoken = "file:token"\n')
        )
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..2026_11_21", TOKEN_A, "pk-1")
    for name in ("keys.toml", "token"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    resolver = FileKeyResolver(tmp_path / "keys.toml", environ={}, check_interval=0)
    assert await _token(resolver, "pk-1") == TOKEN_A
    publish("..2026_11_22", TOKEN_B, "pk-1", "pk-2")
    assert await _token(resolver, "pk-1") == TOKEN_B
    assert await _token(resolver, "pk-2") == TOKEN_B


async def test_a_change_within_a_tick_of_the_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = module._signature

    def coarse(path: Path) -> tuple[int, ...] | None:
        found = signature(path)
        return found and tuple(time // 10**9 * 10**9 for time in found[:2]) + found[2:]

    monkeypatch.setattr(module, "_signature", coarse)
    resolver = FileKeyResolver(path, environ=ENVIRON, check_interval=0)
    for name in ("pk-3", "pk-4", "pk-5", "pk-6"):
        _write(path, _text("pk-1", name))
        assert await _token(resolver, name) == TOKEN_A


async def test_what_was_changed_just_now_is_read_until_it_cannot_have_changed_unseen(
    path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicate_proxy_mw")
    resolver = FileKeyResolver(path, environ=ENVIRON, check_interval=0)
    await resolver(_request("pk-1"))
    await resolver(_request("pk-1"))
    assert reads == [path] * 3
    monkeypatch.setattr(module, "SETTLES", 0.0)
    await resolver(_request("pk-1"))
    assert reads == [path] * 4
    await resolver(_request("pk-1"))
    assert reads == [path] * 4
    assert caplog.messages == []


async def test_a_file_of_the_future_is_not_read_for_ever(
    path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(path, (time.time() + 86400,) * 2)
    resolver = FileKeyResolver(path, environ=ENVIRON, check_interval=0)
    monkeypatch.setattr(module, "SETTLES", 0.0)
    await resolver(_request("pk-1"))
    reads.clear()
    await resolver(_request("pk-1"))
    assert reads == []


@pytest.fixture
def let(after_reading: list[Callable[[Path], None]]) -> Iterator[threading.Event]:
    """Until it is set, the read of a token file hangs."""
    let = threading.Event()
    let.set()

    def wait(path: Path) -> None:
        assert path.name != "token" or let.wait(30)

    after_reading.append(wait)
    yield let
    let.set()


@pytest.fixture
def slow(path: Path, tmp_path: Path, let: threading.Event) -> FileKeyResolver:
    """One that has to read a token file again, which takes until it is `let`."""
    _write(tmp_path / "token", TOKEN_A)
    _write(path, _text("pk-1", providers='[providers.main]\ntoken = "file:token"\n'))
    resolver = FileKeyResolver(path, environ={}, check_interval=3600)
    _write(tmp_path / "token", TOKEN_B)
    let.clear()
    return resolver


async def _until_reading(resolver: FileKeyResolver) -> None:
    while not resolver._loading:  # noqa: ASYNC110 - a thread is started, without an event
        await anyio.sleep(0.001)
    await anyio.wait_all_tasks_blocked()


async def test_requests_that_meet_a_change_wait_for_it_together(slow: FileKeyResolver, let: threading.Event) -> None:
    tokens: list[str | None] = []

    async def ask() -> None:
        tokens.append(await _token(slow, "pk-1"))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
            await _until_reading(slow)
            assert tokens == []
            let.set()
    assert tokens == [TOKEN_B] * 20


async def test_a_caller_who_leaves_takes_nothing_from_those_who_wait_with_it(
    slow: FileKeyResolver, let: threading.Event
) -> None:
    tokens: list[str | None] = []
    leaving = anyio.CancelScope()

    async def leave() -> None:
        with leaving:
            await _token(slow, "pk-1")

    async def ask() -> None:
        tokens.append(await _token(slow, "pk-1"))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)
            await _until_reading(slow)
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            leaving.cancel()
            await anyio.wait_all_tasks_blocked()
            assert tokens == []
            let.set()
    assert tokens == [TOKEN_B]


def test_a_task_that_asyncio_cancels_takes_nothing_either(slow: FileKeyResolver, let: threading.Event) -> None:
    async def main() -> None:
        leaving = asyncio.ensure_future(_token(slow, "pk-1"))
        await _until_reading(slow)
        staying = asyncio.ensure_future(_token(slow, "pk-1"))
        await anyio.wait_all_tasks_blocked()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await anyio.wait_all_tasks_blocked()
        assert not staying.done()
        let.set()
        assert await asyncio.wait_for(staying, 10) == TOKEN_B

    asyncio.run(main())


async def test_a_disk_that_hangs_keeps_one_thread_and_no_request(
    slow: FileKeyResolver, tmp_path: Path, let: threading.Event, reads: list[Path]
) -> None:
    async def ask() -> None:
        with pytest.raises(ResolverFailed):
            await resolve(slow, _request("pk-1"), seconds=0.2)

    with anyio.fail_after(10):
        await ask()
        threads = threading.active_count()
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(ask)
        assert threading.active_count() <= threads
        assert reads.count(tmp_path / "token") == 0  # it is still being read
        let.set()
        assert await _token(slow, "pk-1") == TOKEN_B
    assert reads.count(tmp_path / "token") == 1


def test_one_thread_reads_at_a_time_and_what_has_changed(path: Path, reads: list[Path]) -> None:
    resolver = FileKeyResolver(path, environ=ENVIRON)
    reads.clear()
    with resolver._lock:
        resolver._reload(resolver._seen)
    resolver._reload({})
    assert reads == []


def test_two_event_loops_share_what_is_read(path: Path, reads: list[Path], anyio_backend: str) -> None:
    resolver = FileKeyResolver(path, environ=ENVIRON, check_interval=3600)
    _write(path, _text("pk-1", "pk-2", "pk-3"))
    reads.clear()
    tokens: list[str | None] = []

    async def ask() -> None:
        with anyio.fail_after(10):
            tokens.append(await _token(resolver, "pk-3"))

    threads = [threading.Thread(target=anyio.run, args=[ask], kwargs={"backend": anyio_backend}) for _ in range(2)]
    with resolver._lock:
        for thread in threads:
            thread.start()
        while len(resolver._loading) < 2:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert tokens == [TOKEN_A] * 2
    assert reads == [path]


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"tokens": {TOKEN_A: "acme", TOKEN_B: "globex"}}


@pytest.fixture
def served(fake_replicate: FakeReplicate, path: Path) -> Iterator[str]:
    """The proxy on a real port, with a key file."""
    with serve(proxy(fake_replicate.url, key_resolver=FileKeyResolver(path, environ=ENVIRON))) as proxied:
        yield f"{proxied.url}/v1/account"


def _headers(api_key: str, **more: str) -> dict[str, str]:
    return {"x-portkey-api-key": api_key} | {f"x-portkey-{name}": value for name, value in more.items()}


async def test_a_slug_reaches_the_other_account(served: str) -> None:
    async with httpx.AsyncClient() as client:

        async def ask(**more: str) -> Any:
            return (await client.get(served, headers=_headers("pk-1", **more))).json()

        assert (await ask())["username"] == "acme"
        assert (await ask(provider="replicate"))["username"] == "acme"
        assert (await ask(provider="@replicate"))["username"] == "acme"
        assert (await ask(provider="@second"))["username"] == "globex"
        assert (await ask(provider="@third"))["error"]["code"] == "permission_denied"
        assert (await client.get(served, headers=_headers("pk-1", provider="@third"))).status_code == 403


async def test_a_key_is_added_and_revoked_while_another_s_requests_keep_coming(
    served: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    done = False

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while not done:
            statuses.append((await client.get(served, headers=_headers("pk-2"))).status_code)

    async def until(status: int, api_key: str) -> None:
        while (await client.get(served, headers=_headers(api_key))).status_code != status:  # noqa: ASYNC110
            await anyio.sleep(0.02)

    async def run(*arguments: str) -> str:
        command = [sys.executable, "-W", "error", "-m", "replicate_proxy_mw.keys", str(path), *arguments]
        return (await anyio.run_process(command)).stdout.decode().strip()

    with anyio.fail_after(15):
        async with httpx.AsyncClient() as client, anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(keep_asking, client)
            added = await run("add", "--tenant", "design", "--name", "Ada's laptop")
            await until(200, added)
            await run("revoke", "Ada's laptop")
            await until(401, added)
            done = True
    assert len(statuses) > 3
    assert set(statuses) == {200}


async def test_a_token_file_is_rotated_under_the_proxy(
    fake_replicate: FakeReplicate, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN_A)
    _write(path, _text("pk-1", providers='[providers.main]\ntoken = "file:token"\n'))
    app = proxy(fake_replicate.url, key_resolver=FileKeyResolver(path, environ={}, check_interval=0))
    scope = http_scope(target="/v1/account", headers=[(b"x-portkey-api-key", b"pk-1")])
    assert json.loads((await call(app, scope)).content)["username"] == "acme"
    _write(tmp_path / "token", TOKEN_B)
    assert json.loads((await call(app, scope)).content)["username"] == "globex"


async def test_a_key_is_refused_from_the_next_request_on(
    fake_replicate: FakeReplicate, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = proxy(fake_replicate.url, key_resolver=FileKeyResolver(path, environ=ENVIRON, check_interval=0))

    async def status(api_key: str) -> int | None:
        headers = [(b"x-portkey-api-key", api_key.encode())]
        return (await call(app, http_scope(target="/v1/account", headers=headers))).status

    assert main([str(path), "add", "--tenant", "film", "--new-tenant"]) == 0
    added = capsys.readouterr().out.strip()
    assert await status(added) == 200
    content = _read(path)
    _write(path, "broken " + content)
    assert await status(added) == 200
    _write(path, content)
    assert main([str(path), "revoke", digest(added).hex()[:8]]) == 0
    assert (await status(added), await status("pk-1")) == (401, 200)
