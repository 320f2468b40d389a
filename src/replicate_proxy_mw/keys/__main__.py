"""`python -m replicate_proxy_mw.keys FILE COMMAND`: hands out and revokes the keys of a key file."""

from __future__ import annotations

import argparse
import errno
import os
import re
import secrets
import stat
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from . import contract, key_file
from .file import FileKeyResolver

try:
    import fcntl
except ImportError:  # Windows: there, two commands at a time may lose one's work
    fcntl = None  # type: ignore[assignment]

PROGRAM = "python -m replicate_proxy_mw.keys"

# For another command to end: one takes some milliseconds.
LOCK_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The status to exit with: 1 for what the file does not allow, 2 for a wrong command line."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except ImportError:
        print("error: editing needs tomlkit: pip install 'replicate-proxy-mw[keys]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or parsed.file}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Hands out and revokes the keys of a key file.")
    parser.add_argument("file", metavar="FILE", type=Path, help="the key file, TOML")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    provider = commands.add_parser("provider", help="manage Replicate accounts").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = provider.add_parser("add", help="add a Replicate account; makes FILE if there is none")
    command.add_argument("name", metavar="NAME", help="its slug: callers say @NAME")
    command.add_argument("token", metavar="env:VARIABLE|file:PATH", help="where its API token is")
    command.set_defaults(run=_add_provider)

    command = commands.add_parser("add", help="make a key, and print it this once")
    command.add_argument("--tenant", metavar="NAME", required=True, help="whose it is")
    command.add_argument(
        "--new-tenant", action="store_true", help="make that tenant, with all providers; not needed for the first"
    )
    command.add_argument("--name", metavar="LABEL", help="what to call the key")
    command.add_argument("--policy", metavar="NAME", help="what it may do, in place of the tenant's policy")
    command.add_argument(
        "--expires",
        metavar="WHEN",
        type=_moment,
        help="2027-01-31 (0:00 UTC), 2027-01-31T12:00:00Z, or 30d from now",
    )
    command.set_defaults(run=_add)

    commands.add_parser("list", help="show the keys").set_defaults(run=_list)

    command = commands.add_parser("revoke", help="remove a key")
    command.add_argument("key", metavar="ID", help="its id, or its name if no other key has it")
    command.set_defaults(run=_revoke)

    commands.add_parser("check", help="read the file and all tokens as the proxy would").set_defaults(run=_check)
    return parser


def _moment(text: str) -> datetime:
    now = datetime.now(UTC).replace(microsecond=0)
    days = re.fullmatch(r"([0-9]+)d", text)
    try:
        moment = now + timedelta(days=int(days[1])) if days else datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError("must be a date, a date and time, or days such as 30d") from None
    if re.fullmatch(r"[0-9-]+", text):
        moment = moment.replace(tzinfo=UTC)
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError("must have a time zone, such as Z")
    if moment <= now:
        raise argparse.ArgumentTypeError("is in the past")
    return moment


def _add_provider(arguments: argparse.Namespace) -> None:
    name = arguments.name

    def edit(text: str) -> str:
        if name in key_file.parse(text).providers:
            raise ValueError(f'there is a provider "{name}" already')
        return _with(text, "providers", name, {"token": arguments.token})

    _edit(arguments.file, edit, create=True)
    print(f"Provider {name} is added. Next: {PROGRAM} {arguments.file} add --tenant NAME", file=sys.stderr)


def _add(arguments: argparse.Namespace) -> None:
    api_key = "pk-" + secrets.token_urlsafe(32)
    digest, id = contract.digest(api_key).hex(), ""

    def edit(text: str) -> str:
        nonlocal id
        content = key_file.parse(text)
        if not content.providers:
            command = f"{PROGRAM} {arguments.file} provider add main env:REPLICATE_API_TOKEN"
            raise ValueError(f"{arguments.file} has no provider yet: {command}")
        id = next(digest[:length] for length in range(8, 65) if digest[:length] not in content.keys)
        fields = {
            "digest": f"sha256:{digest}",
            "tenant": arguments.tenant,
            "name": arguments.name,
            "created": datetime.now(UTC).replace(microsecond=0),
            "expires_at": arguments.expires,
            "policy": arguments.policy,
        }
        if arguments.tenant not in content.tenants:
            if content.tenants and not arguments.new_tenant:  # what was mistyped would have no policy
                raise ValueError("there is no tenant of that name; --new-tenant makes one")
            text = _with(text, "tenants", arguments.tenant, {})
        elif arguments.new_tenant:
            raise ValueError("there is a tenant of that name already")
        return _with(text, "keys", id, {name: value for name, value in fields.items() if value is not None})

    _edit(arguments.file, edit, create=True, then=lambda: _print(api_key))
    print(f"This is key {id} of {arguments.tenant}. It is shown only now: the file has its digest.", file=sys.stderr)


def _list(arguments: argparse.Namespace) -> None:
    rows = [("id", "tenant", "name", "policy", "created", "expires")]
    for id, key in key_file.parse(_read(arguments.file)).keys.items():
        created, expires = _shown(key.created), _shown(key.policy.expires_at)
        rows.append((id, key.tenant, key.name or "-", key.policy_name or "-", created, expires))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    _print("\n".join(lines))


def _revoke(arguments: argparse.Namespace) -> None:
    id = arguments.key

    def edit(text: str) -> str:
        nonlocal id
        keys = key_file.parse(text).keys
        found = [id] if id in keys else [one for one, key in keys.items() if key.name == id]
        if not found:
            raise ValueError("there is no key of that id or name")  # what was asked for may be a key itself
        if len(found) > 1:
            raise ValueError(f'more than one key has the name "{id}": {", ".join(found)}')
        id = found[0]
        return _without(text, id)

    _edit(arguments.file, edit)
    print(f"Key {id} is revoked.", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    FileKeyResolver(arguments.file)
    content = key_file.parse(_read(arguments.file))
    counts = {kind: len(getattr(content, kind)) for kind in ("providers", "policies", "tenants", "keys")}
    _print(f"{arguments.file}: {', '.join(f'{kind}: {count}' for kind, count in counts.items())}")


def _shown(moment: datetime | None) -> str:
    if moment is None:
        return "-"
    with suppress(OverflowError):  # the first day and the last of all, in other time zones
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = sys.stderr  # else the interpreter tries again when it ends
        raise OSError(error.errno, error.strerror, "standard output") from None


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _edit(
    path: Path, edit: Callable[[str], str], *, create: bool = False, then: Callable[[], None] = lambda: None
) -> None:
    """Put what `edit` makes of the text in its place, at once and only if it is a key file. Undone if `then` fails."""
    target = Path(os.path.realpath(path))
    with _locked(target.parent):
        old = target.read_bytes() if target.exists() or not create else b""
        text = edit(old.decode("utf-8-sig").replace("\r\n", "\n"))
        key_file.parse(text)
        _replace(target, (text.replace("\n", "\r\n") if b"\r\n" in old else text).encode())
        try:
            then()
        except BaseException:
            _replace(target, old)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time. The folder is locked, since the file itself is replaced and another would be left over."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise ValueError("another program has locked the folder of this file: try again later") from None
        except OSError as error:  # some network file systems have no locks
            print(f"warning: no lock: {error.strerror}; run one command at a time", file=sys.stderr)
            return None
        time.sleep(0.05)


def _replace(target: Path, content: bytes) -> None:
    """Write the file anew beside the old one, so that whoever reads sees one or the other."""
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # its mode is 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            _hand_over(name, old)
        os.replace(name, target)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and error.errno == errno.EBUSY:
            raise ValueError(f"{target} is mounted by itself and cannot be replaced: mount its folder") from None
        raise


def _hand_over(name: str, old: os.stat_result) -> None:
    """Owner, group and mode of the old file for the new one.

    Raises:
        ValueError: they cannot be kept, and whoever could read the old file might not read the new one.
    """
    for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with suppress(OSError, AttributeError):  # only root may, but for a group of one's own; Windows has none
            os.chown(name, owner, group)
    new, mode = os.stat(name), stat.S_IMODE(old.st_mode)
    of_group, of_others = mode >> 3 & 7, mode & 7
    if new.st_uid != old.st_uid and not (of_group | of_others) & 4:
        raise ValueError("its owner cannot be kept, who alone can read it: run this as its owner or as root")
    if new.st_gid != old.st_gid and of_group & ~of_others:
        raise ValueError("its group cannot be kept, which has rights to it: run this as a member of it or as root")
    os.chmod(name, mode)


def _with(text: str, kind: str, name: str, fields: Mapping[str, Any]) -> str:
    """The text with one more table, `[kind.name]`, after those of its kind."""
    import tomlkit

    document, expected = tomlkit.parse(text), tomllib.loads(text)
    for tables in (document, expected):
        tables.setdefault(kind, {})[name] = fields
    added = tomlkit.dumps(document)
    before, block, after = added.partition(tomlkit.dumps({kind: {name: fields}}))
    parts = [part for part in (before.rstrip(), block.rstrip(), after.strip("\n").rstrip()) if part]
    return _verified(expected, "\n\n".join(parts) + "\n", added)


def _without(text: str, id: str) -> str:
    """The text without a key, and with all comments that do not stand among its fields."""
    import tomlkit

    document, expected = tomlkit.parse(text), tomllib.loads(text)
    for tables in (document, expected):
        del tables["keys"][id]
    quoted = re.escape(id)
    cut = re.sub(
        rf"""^[ \t]*\[[ \t]*keys[ \t]*\.[ \t]*(?:{quoted}|"{quoted}"|'{quoted}')[ \t]*\].*\n"""
        r"(?:(?![ \t]*\[).*\n)*?(?:[ \t]*\n)*"
        r"(?=(?:[ \t]*(?:#.*)?\n)*(?:[ \t]*\[|\Z))",
        "",
        text.rstrip() + "\n",
        flags=re.MULTILINE,
    )
    return _verified(expected, cut.rstrip() + "\n", tomlkit.dumps(document))


def _verified(expected: Mapping[str, Any], *texts: str) -> str:
    """The first text that says what is `expected`, whatever its layout made of the edit."""
    for text in texts:
        with suppress(tomllib.TOMLDecodeError):
            found = tomllib.loads(text)
            if all(found.get(kind, {}) == expected.get(kind, {}) for kind in found.keys() | expected.keys()):
                return text
    raise ValueError("the layout of this file is too unusual for an edit by this command: edit it by hand")


if __name__ == "__main__":
    sys.exit(main())
