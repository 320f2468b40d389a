from __future__ import annotations

import errno
import fcntl
import os
import re
import runpy
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from replicate_proxy_mw.keys import __main__ as module
from replicate_proxy_mw.keys.__main__ import main
from replicate_proxy_mw.keys.contract import digest

COMMAND = [sys.executable, "-W", "error", "-m", "replicate_proxy_mw.keys"]

TEXT = """\
# our keys
[providers.main]   # production
token = "env:REPLICATE_API_TOKEN"

[policies.readers]
operations = ["predictions.get",
   "models.*"] # reading
expires_at = 2030-01-01T00:00:00Z

[tenants.design]
policy = "readers"

# the first one
[keys.one]  # Ada's
digest = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
# hers:
tenant = "design"
name = "Ada's laptop"
created = 2026-11-21T10:00:00+01:00

# the second one
[keys.two]
digest = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
tenant = "design"
name = "server"
expires_at = 2029-01-01T00:00:00Z

[keys.three]
digest = "sha256:3333333333333333333333333333333333333333333333333333333333333333"
tenant = "other"
name = "server"

[tenants.other]
# the end
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(TEXT)
    return path


def _keys(path: Path) -> dict[str, Any]:
    keys: dict[str, Any] = tomllib.loads(path.read_text())["keys"]
    return keys


def _refused(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> str:
    """What a command says that fails, and leaves the folder as it was."""
    before = {one: one.read_bytes() for one in path.parent.iterdir()}
    assert main([str(path), *arguments]) == 1
    assert {one: one.read_bytes() for one in path.parent.iterdir()} == before
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    return error.removeprefix("error: ").strip()


def _misused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_from_nothing_to_a_first_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.toml"
    assert _refused(capsys, path, "add", "--tenant", "design") == (
        f"{path} has no provider yet: python -m replicate_proxy_mw.keys {path} provider add main "
        "env:REPLICATE_API_TOKEN"
    )
    assert main([str(path), "provider", "add", "main", "env:REPLICATE_API_TOKEN"]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    capsys.readouterr()

    assert main([str(path), "add", "--tenant", "design", "--name", "Ada's laptop"]) == 0
    out, error = capsys.readouterr()
    assert re.fullmatch(r"pk-[\w-]{43}\n", out)
    id = digest(out.strip()).hex()[:8]
    assert error == f"This is key {id} of design. It is shown only now: the file has its digest.\n"
    created = _keys(path)[id]["created"]
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)
    assert path.read_text() == (
        '[providers.main]\ntoken = "env:REPLICATE_API_TOKEN"\n\n[tenants.design]\n\n'
        f'[keys.{id}]\ndigest = "sha256:{digest(out.strip()).hex()}"\ntenant = "design"\nname = "Ada\'s laptop"\n'
        f"created = {created:%Y-%m-%dT%H:%M:%SZ}\n"
    )
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_aaaaaaaaaaaaaaaa")
    assert main([str(path), "check"]) == 0
    assert capsys.readouterr().out == f"{path}: providers: 1, policies: 0, tenants: 1, keys: 1\n"
    assert os.listdir(tmp_path) == ["keys.toml"]


def test_a_provider_beside_others(path: Path) -> None:
    assert main([str(path), "provider", "add", "second", "file:/run/secrets/second"]) == 0
    added = '\n[providers.second]\ntoken = "file:/run/secrets/second"\n'
    assert path.read_text() == TEXT.replace('API_TOKEN"\n', f'API_TOKEN"\n{added}', 1)


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("main", "env:A", 'there is a provider "main" already'),
        ("@b", "env:A", "providers.@b: \"@b\" is no slug: letters, digits, '-', '_' and '.', without '@'"),
        (
            "b",
            "r8_aaaaaaaaaaaaaaaa",
            'providers.b.token: must say where the token is, "env:VARIABLE" or "file:PATH"; '
            "no token stands here itself",
        ),
    ],
)
def test_a_provider_that_cannot_be(
    path: Path, capsys: pytest.CaptureFixture[str], name: str, token: str, message: str
) -> None:
    assert _refused(capsys, path, "provider", "add", name, token) == message


def test_a_key_beside_others_keeps_comments_and_layout(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tenant", "design", "--policy", "readers", "--expires", "2028-01-31"]
    assert main([str(path), "add", *arguments]) == 0
    id = digest(capsys.readouterr().out.strip()).hex()[:8]
    text = path.read_text()
    block = text[text.index(f"[keys.{id}]") : text.index("[tenants.other]")]
    assert text.replace(block, "") == TEXT
    assert block.endswith('"\n\n')
    key = _keys(path)[id]
    assert (key["policy"], key["expires_at"]) == ("readers", datetime(2028, 1, 31, tzinfo=UTC))


def test_a_tenant_that_is_new(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(capsys, path, "add", "--tenant", "desing")
    assert said == "there is no tenant of that name; --new-tenant makes one"
    assert main([str(path), "add", "--tenant", "a b", "--new-tenant"]) == 0
    assert tomllib.loads(path.read_text())["tenants"]["a b"] == {}
    capsys.readouterr()
    said = _refused(capsys, path, "add", "--tenant", "design", "--new-tenant")
    assert said == "there is a tenant of that name already"


@pytest.mark.parametrize(
    ("expires", "seconds"), [("30d", 30 * 86400), ("2999-01-01T00:00:00+01:00", None), ("2999-01-01", None)]
)
def test_ways_to_say_when_a_key_ends(path: Path, expires: str, seconds: int | None) -> None:
    assert main([str(path), "add", "--tenant", "film", "--new-tenant", "--expires", expires]) == 0
    [key] = [key for key in _keys(path).values() if key["tenant"] == "film"]
    if seconds is None:
        assert key["expires_at"].isoformat().startswith(expires)
        assert key["expires_at"].utcoffset() is not None
    else:
        assert (key["expires_at"] - key["created"]).total_seconds() == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize(
    ("expires", "message"),
    [
        ("tomorrow", "must be a date, a date and time, or days such as 30d"),
        ("99999999999d", "must be a date, a date and time, or days such as 30d"),
        ("2999-13-01", "must be a date, a date and time, or days such as 30d"),
        ("2999-01-01T00:00:00", "must have a time zone, such as Z"),
        ("2020-01-01", "is in the past"),
        ("0d", "is in the past"),
    ],
)
def test_an_end_that_cannot_be(path: Path, capsys: pytest.CaptureFixture[str], expires: str, message: str) -> None:
    assert message in _misused(capsys, str(path), "add", "--tenant", "design", "--expires", expires)
    assert path.read_text() == TEXT


def test_a_key_that_cannot_be(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'there is no policy "writers"' in _refused(capsys, path, "add", "--tenant", "design", "--policy", "writers")
    assert "must be a printable string" in _refused(capsys, path, "add", "--tenant", "design", "--name", "a\nb")
    assert "a name must not be empty" in _refused(capsys, path, "add", "--tenant", "", "--new-tenant")


def test_wrong_usage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in _misused(capsys, str(path))
    assert "COMMAND" in _misused(capsys, str(path), "provider")
    assert "--tenant" in _misused(capsys, str(path), "add")
    assert "invalid choice" in _misused(capsys, str(path), "remove")


def test_the_table_of_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "id     tenant  name          policy   created               expires",
        "one    design  Ada's laptop  readers  2026-11-21T09:00:00Z  2030-01-01T00:00:00Z",
        "two    design  server        readers  -                     2029-01-01T00:00:00Z",
        "three  other   server        -        -                     -",
    ]


def test_the_first_day_and_the_last_in_the_table_of_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("2026-11-21T10:00:00+01:00", "0001-01-01T00:00:00+14:00")
    path.write_text(text.replace("expires_at = 2029-01-01T00:00:00Z", "created = 9999-12-31T23:59:59-12:00"))
    assert main([str(path), "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "0001-01-01T00:00:00+14:00" in lines[1]
    assert "9999-12-31T23:59:59-12:00" in lines[2]


def test_a_key_that_cannot_be_shown_is_not_added(path: Path) -> None:
    with open("/dev/full", "w") as full:
        for arguments in (["add", "--tenant", "design"], ["list"]):
            done = subprocess.run([*COMMAND, str(path), *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
            assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")
    assert path.read_text() == TEXT


def test_what_was_added_is_undone_if_it_cannot_be_shown(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 - it fails to close, too
    monkeypatch.setattr(sys, "stdout", full)
    assert main([str(path), "add", "--tenant", "design"]) == 1
    assert sys.stdout is sys.stderr
    with suppress(OSError):
        full.close()
    assert path.read_text() == TEXT
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_a_key_is_revoked_by_its_id(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "revoke", "two"]) == 0
    assert capsys.readouterr().err == "Key two is revoked.\n"
    block = TEXT[TEXT.index("[keys.two]") : TEXT.index("[keys.three]")]
    assert path.read_text() == TEXT.replace(block, "")


def test_a_key_is_revoked_by_its_name_and_comments_of_others_stay(path: Path) -> None:
    assert main([str(path), "revoke", "Ada's laptop"]) == 0
    block = TEXT[TEXT.index("[keys.one]") : TEXT.index("# the second one")]
    assert path.read_text() == TEXT.replace(block, "")


def test_a_name_that_more_than_one_key_has(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, path, "revoke", "server") == 'more than one key has the name "server": two, three'


def test_a_key_that_is_not_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("four", "pk-0123456789"):
        assert _refused(capsys, path, "revoke", asked) == "there is no key of that id or name"


def test_all_keys_are_revoked(path: Path) -> None:
    for id in ("one", "two", "three"):
        assert main([str(path), "revoke", id]) == 0
    assert "keys" not in tomllib.loads(path.read_text())
    assert path.read_text().endswith("[tenants.other]\n# the end\n")


D1, D2 = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.mark.parametrize(
    "keys",
    [
        f'[keys]\none = {{digest = "{D1}", tenant = "a"}}\ntwo = {{digest = "{D2}", tenant = "a"}}\n',
        f'[keys."one"]\ndigest = "{D1}"\ntenant = "a"\n[keys.two]\ndigest = "{D2}"\ntenant = "a"',
        f'[ keys . \'one\' ]\ndigest = "{D1}"\ntenant = "a"\n[tenants.b]\n[keys.two]\ndigest = "{D2}"\ntenant = \'a\'',
        f'[keys]\none.digest = "{D1}"\none.tenant = "a"\ntwo.digest = "{D2}"\ntwo.tenant = "a"\n',
        f'[keys.one]\ndigest = "{D1}"\nproviders = [\n"main",\n] # [x]\ntenant = """\\\n[keys.one]\\\n"""\n'
        f'[tenants."[keys.one]"]\n[keys.two]\ndigest = "{D2}"\ntenant = "a"',
    ],
)
def test_other_layouts(path: Path, keys: str) -> None:
    path.write_text('[providers.main]\ntoken = "env:A"\n[tenants.a]\n' + keys)
    before = tomllib.loads(path.read_text())
    assert main([str(path), "add", "--tenant", "a", "--name", "new"]) == 0
    assert main([str(path), "revoke", "one"]) == 0
    assert main([str(path), "revoke", "new"]) == 0
    del before["keys"]["one"]
    assert tomllib.loads(path.read_text()) == before


def test_a_layout_that_cannot_be_edited(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(
        f'keys.one.digest = "{D1}"\nkeys.one.tenant = "a"\n# two\nkeys.two.digest = "{D2}"\nkeys.two.tenant = "a"\n'
        '[providers.main]\ntoken = "env:A"\n[tenants.a]\n'
    )
    assert _refused(capsys, path, "add", "--tenant", "a") == (
        "the layout of this file is too unusual for an edit by this command: edit it by hand"
    )


def test_ends_of_lines_stay(path: Path) -> None:
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert main([str(path), "add", "--tenant", "film", "--new-tenant", "--name", "new"]) == 0
    assert b"\r\n[tenants.film]\r\n" in path.read_bytes()
    assert main([str(path), "revoke", "new"]) == 0
    assert b"\n" not in path.read_bytes().replace(b"\r\n", b"")


def test_an_end_of_line_of_old_macs_is_no_other(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(TEXT.replace("\n", "\r").encode())
    for arguments in (["list"], ["revoke", "one"]):
        assert "'\\r' (at line 1" in _refused(capsys, path, *arguments)


def test_a_byte_order_mark_is_no_matter(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert main([str(path), "list"]) == 0
    assert main([str(path), "revoke", "one"]) == 0
    assert "one" not in _keys(path)


@pytest.fixture
def someone_else() -> Iterator[Path]:
    """A folder that everybody may write to, and a user who is neither root nor in any group of its file's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "keys.toml"
        path.write_text(TEXT)
        if os.getuid() != 0:
            yield path
            return
        groups, group = os.getgroups(), os.getegid()
        os.setgroups([])
        os.setegid(23456)
        os.seteuid(12345)
        try:
            yield path
        finally:
            os.seteuid(0)
            os.setegid(group)
            os.setgroups(groups)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (0o600, "its owner cannot be kept, who alone can read it: run this as its owner or as root"),
        (0o640, "its group cannot be kept, which has rights to it: run this as a member of it or as root"),
        (0o664, "its group cannot be kept, which has rights to it: run this as a member of it or as root"),
        (0o644, None),
        (0o604, None),
    ],
)
def test_a_file_that_its_readers_could_not_read_any_more(someone_else: Path, mode: int, message: str | None) -> None:
    descriptor, name = tempfile.mkstemp(dir=someone_else.parent)
    os.close(descriptor)
    old = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, os.geteuid() + 1, os.getegid() + 1, 0, 0, 0, 0))
    if message is None:
        module._hand_over(name, old)
        assert stat.S_IMODE(os.stat(name).st_mode) == mode
    else:
        with pytest.raises(ValueError, match=message):
            module._hand_over(name, old)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_s_edit_is_refused_where_the_owner_could_not_read_it(
    someone_else: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chmod(mode: int, group: int) -> None:
        user = os.geteuid()
        os.seteuid(0)
        os.chown(someone_else, 0, group)
        os.chmod(someone_else, mode)
        os.seteuid(user)

    chmod(0o646, 34567)
    assert main([str(someone_else), "revoke", "two"]) == 0
    capsys.readouterr()
    chmod(0o664, 34567)
    assert "its group cannot be kept" in _refused(capsys, someone_else, "revoke", "one")
    chmod(0o660, 23456)
    assert main([str(someone_else), "revoke", "one"]) == 0
    after = someone_else.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (12345, 23456, 0o660)


def test_a_file_that_is_mounted_by_itself(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: str, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", source, None, target)

    monkeypatch.setattr(os, "replace", replace)
    said = _refused(capsys, path, "revoke", "one")
    assert said == f"{path} is mounted by itself and cannot be replaced: mount its folder"


def test_what_a_file_is_stays(path: Path, tmp_path: Path) -> None:
    path.chmod(0o640)
    os.chown(path, os.getuid(), os.getgid())
    if os.getuid() == 0:
        os.chown(path, 12345, 23456)
    before = path.stat()
    link = tmp_path / "folder" / "link.toml"
    link.parent.mkdir()
    link.symlink_to("../keys.toml")
    assert main([str(link), "revoke", "one"]) == 0
    after = path.stat()
    assert link.is_symlink()
    assert "one" not in _keys(path)
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    for arguments in (["list"], ["revoke", "one"]):
        assert _refused(capsys, path, *arguments) == f"{path}: No such file or directory"
    assert _refused(capsys, path, "check") == f"{path}: it cannot be read: No such file or directory"
    nowhere = tmp_path / "none" / "keys.toml"
    assert main([str(nowhere), "provider", "add", "main", "env:A"]) == 1
    assert capsys.readouterr().err == f"error: {nowhere.parent}: No such file or directory\n"


def test_a_write_that_fails_leaves_nothing_behind(path: Path) -> None:
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        module._replace(path, b"")
    assert os.listdir(path.parent) == ["keys.toml"]


def test_a_broken_file_is_not_edited(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(TEXT + "[tenants.other]\n")
    for arguments in (["add", "--tenant", "a"], ["revoke", "one"], ["provider", "add", "b", "env:B"], ["list"]):
        assert "Cannot declare" in _refused(capsys, path, *arguments)


def test_a_check_says_what_is_wrong(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(TEXT.replace("REPLICATE_API_TOKEN", "NOT_TO_BE_FOUND"))
    assert _refused(capsys, path, "check") == (
        f"{path}: providers.main.token: there is no environment variable NOT_TO_BE_FOUND"
    )
    path.write_text(TEXT.replace('tenant = "other"', 'tenant = "othr"'))
    assert _refused(capsys, path, "check") == f'{path}: keys.three.tenant: there is no tenant "othr"'


def test_without_tomlkit_only_editing_fails(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    assert main([str(path), "list"]) == 0
    capsys.readouterr()
    for arguments in (["add", "--tenant", "design"], ["revoke", "one"], ["provider", "add", "b", "env:B"]):
        assert main([str(path), *arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error == "error: editing needs tomlkit: pip install 'replicate-proxy-mw[keys]'\n"
    assert path.read_text() == TEXT


def test_without_fcntl_there_is_no_lock(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delitem(sys.modules, "replicate_proxy_mw.keys.__main__")
    monkeypatch.setattr(sys, "argv", ["keys", str(path), "revoke", "one"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_module("replicate_proxy_mw.keys", run_name="__main__")
    assert raised.value.code == 0
    assert "one" not in _keys(path)


def test_a_folder_that_stays_locked(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with module._locked(path.parent):
        said = _refused(capsys, path, "revoke", "one")
    assert said == "another program has locked the folder of this file: try again later"
    assert main([str(path), "revoke", "one"]) == 0


def test_a_file_system_without_locks(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main([str(path), "revoke", "one"]) == 0
    assert capsys.readouterr().err == (
        "warning: no lock: No locks available; run one command at a time\nKey one is revoked.\n"
    )


def test_commands_at_the_same_time_lose_nothing(path: Path) -> None:
    adding = [
        subprocess.Popen(
            [*COMMAND, str(path), "add", "--tenant", f"team-{number}", "--new-tenant"], stdout=subprocess.PIPE
        )
        for number in range(4)
    ]
    api_keys = [process.communicate(timeout=30)[0].decode().strip() for process in adding]
    assert [process.returncode for process in adding] == [0] * 4
    digests = {key["digest"] for key in _keys(path).values()}
    assert {f"sha256:{digest(api_key).hex()}" for api_key in api_keys} < digests
    assert len(digests) == 7
    assert os.listdir(path.parent) == ["keys.toml"]


def test_the_program(path: Path) -> None:
    done = subprocess.run([*COMMAND, str(path), "revoke", "server"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'error: more than one key has the name "server": two, three\n'
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m replicate_proxy_mw.keys")
