"""The format of a key file: from its text to what each key may use."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..policy import Policy
from .contract import ReplicateKey, digest

P = ParamSpec("P")
T = TypeVar("T")

_OPEN = Policy()

_FIELDS = {
    "providers": ("token", "aliases"),
    "policies": tuple(one.name for one in fields(Policy) if one.init),
    "tenants": ("providers", "policy"),
    "keys": ("digest", "tenant", "name", "created", "expires_at", "policy", "providers"),
}
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"sha256:([0-9A-Fa-f]{64})")
_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:[^\s\0][^\0]*")

# Replicate's tokens, the old ones too, and our own keys: in the wrong place, they would come back in a message.
_SECRET = re.compile(r"r8_\w+|(?<!\w)[0-9a-f]{40}(?!\w)|pk-[\w-]{5,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """A Replicate account: `token` says where its token is, `env:NAME` or `file:PATH`."""

    token: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """What its keys get where they say nothing themselves."""

    providers: tuple[str, ...]
    policy: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key with all that it has from its tenant. `policy_name` is None for the default `Policy()`."""

    digest: bytes = field(repr=False)
    tenant: str
    name: str | None
    created: datetime | None
    policy_name: str | None
    policy: Policy
    providers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFile:
    """What a key file holds, by name; each in the order of the file."""

    providers: Mapping[str, Provider]
    policies: Mapping[str, Policy]
    tenants: Mapping[str, Tenant]
    keys: Mapping[str, Key]


# What documentation shows, and what a script makes of a variable that is not set.
_EXAMPLES = (digest(""), digest("test"))


def _telling_no_secret(function: Callable[P, T]) -> Callable[P, T]:
    """Its ValueErrors come from a frame that holds nothing, without their cause, and show no secret."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            message = _SECRET.sub("***", str(error))
        del args, kwargs
        raise ValueError(message)

    return guarded


@_telling_no_secret
def parse(text: str) -> KeyFile:
    """Read the TOML of a key file.

    Raises:
        ValueError: says where (`keys.9f86d081.tenant`) and what is wrong. It shows no secret.
    """
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for name in document:
        if name not in _FIELDS:
            raise ValueError(f"{name}: there is no such table, only {', '.join(_FIELDS)}")
    providers = {name: _provider(where, table) for where, name, table in _tables(document, "providers")}
    _check_slugs(providers)
    policies = {name: _policy(where, table) for where, name, table in _tables(document, "policies")}
    tenants = {
        name: Tenant(
            providers=_providers(where, table, providers) or tuple(providers),
            policy=_one_of(where, table, "policy", "policy", policies),
        )
        for where, name, table in _tables(document, "tenants")
    }
    keys: dict[str, Key] = {}
    owners: dict[bytes, str] = {}
    for where, name, table in _tables(document, "keys"):
        keys[name] = key = _key(where, table, providers, policies, tenants)
        if key.digest in owners:
            raise ValueError(f"{where}.digest: it is that of {owners[key.digest]}, too")
        owners[key.digest] = where
    return KeyFile(providers=providers, policies=policies, tenants=tenants, keys=keys)


def read_tokens(
    content: KeyFile, *, environ: Mapping[str, str], read: Callable[[str], bytes]
) -> tuple[dict[str, ReplicateKey], dict[str, str]]:
    """The tokens by the names of their providers, each in a key without tenant; and where one is not to be had, what is
    wrong, without a secret.

    Args:
        environ: where `env:NAME` is looked up.
        read: from the path in `file:PATH`, as it is written, to what the file holds. May raise OSError.
    """
    tokens: dict[str, ReplicateKey] = {}
    problems: dict[str, str] = {}
    for name, provider in content.providers.items():
        try:
            tokens[name] = _token(f"providers.{name}.token", provider.token, environ, read)
        except ValueError as error:
            problems[name] = _SECRET.sub("***", str(error))
    return tokens, problems


def replicate_keys(
    content: KeyFile, tokens: Mapping[str, ReplicateKey]
) -> Mapping[bytes, Mapping[str, ReplicateKey | None]]:
    """What each key may use: by the digest of the key, then by provider and alias; the first is the default.

    It is None where `tokens` lacks the provider.
    """
    found: dict[bytes, Mapping[str, ReplicateKey | None]] = {}
    for key in content.keys.values():
        own = {
            name: tokens[name].of(tenant=key.tenant, policy=key.policy) if name in tokens else None
            for name in key.providers
        }
        aliases = {alias: own[name] for name in own for alias in content.providers[name].aliases}
        found[key.digest] = own | aliases
    return found


def _tables(document: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each `[kind.name]`: where it is, its name, and its fields."""
    tables = document.get(kind, {})
    if not isinstance(tables, dict):
        raise ValueError(f"{kind}: must have tables, [{kind}.NAME]")
    for name, table in tables.items():
        where = f"{kind}.{name}"
        if not name or not name.isprintable():
            raise ValueError(f"{kind}.{_quoted(name)}: a name must not be empty, and must be printable")
        if not isinstance(table, dict):
            raise ValueError(f"{where}: must be a table, [{where}]")
        for given in table:
            if given not in _FIELDS[kind]:
                raise ValueError(f"{where}.{given}: there is no such field, only {', '.join(_FIELDS[kind])}")
        yield where, name, table


def _provider(where: str, table: Mapping[str, Any]) -> Provider:
    token = _text(where, table, "token", required=True) or ""
    if not _REFERENCE.fullmatch(token):
        raise ValueError(
            f'{where}.token: must say where the token is, "env:VARIABLE" or "file:PATH"; no token stands here itself'
        )
    return Provider(token=token, aliases=_texts(where, table, "aliases") or ())


def _check_slugs(providers: Mapping[str, Provider]) -> None:
    owners: dict[str, str] = {}
    for name in providers:
        _check_slug(f"providers.{name}", name, owners)
    for name, provider in providers.items():
        for alias in provider.aliases:
            _check_slug(f"providers.{name}.aliases", alias, owners)


def _check_slug(where: str, slug: str, owners: dict[str, str]) -> None:
    if not _SLUG.fullmatch(slug):
        raise ValueError(f"{where}: {_quoted(slug)} is no slug: letters, digits, '-', '_' and '.', without '@'")
    if slug in owners:
        raise ValueError(f"{where}: {_quoted(slug)} is taken by {owners[slug]}")
    owners[slug] = where


def _policy(where: str, table: Mapping[str, Any]) -> Policy:
    try:
        return Policy(**table)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _key(
    where: str,
    table: Mapping[str, Any],
    providers: Mapping[str, Provider],
    policies: Mapping[str, Policy],
    tenants: Mapping[str, Tenant],
) -> Key:
    of_digest = _DIGEST.fullmatch(_text(where, table, "digest", required=True) or "")
    if not of_digest:
        raise ValueError(f'{where}.digest: must be "sha256:" and 64 hexadecimal digits; no key stands here itself')
    of_key = bytes.fromhex(of_digest[1])
    if of_key in _EXAMPLES:
        raise ValueError(f'{where}.digest: it is that of the empty text, or of "test", which anybody can guess')
    tenant_name = _one_of(where, table, "tenant", "tenant", tenants, required=True) or ""
    tenant = tenants[tenant_name]
    policy_name = _one_of(where, table, "policy", "policy", policies) or tenant.policy
    policy = policies[policy_name] if policy_name else _OPEN
    expires_at = _moment(where, table, "expires_at")
    if expires_at and (policy.expires_at is None or expires_at < policy.expires_at):
        policy = replace(policy, expires_at=expires_at)
    if not providers:
        raise ValueError(f"{where}: there is no provider; a key needs one, [providers.NAME]")
    return Key(
        digest=of_key,
        tenant=tenant_name,
        name=_text(where, table, "name"),
        created=_moment(where, table, "created"),
        policy_name=policy_name,
        policy=policy,
        providers=_providers(where, table, providers) or tenant.providers,
    )


def _providers(where: str, table: Mapping[str, Any], providers: Mapping[str, Provider]) -> tuple[str, ...] | None:
    names = _texts(where, table, "providers")
    if names == ():
        raise ValueError(f"{where}.providers: must name at least one, or not be there")
    for name in names or ():
        if name not in providers:
            raise ValueError(f"{where}.providers: there is no provider {_quoted(name)}")
    return names


def _one_of(
    where: str, table: Mapping[str, Any], name: str, kind: str, known: Mapping[str, Any], *, required: bool = False
) -> str | None:
    value = _text(where, table, name, required=required)
    if value is not None and value not in known:
        raise ValueError(f"{where}.{name}: there is no {kind} {_quoted(value)}")
    return value


def _text(where: str, table: Mapping[str, Any], name: str, *, required: bool = False) -> str | None:
    value = table.get(name)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{where}.{name}: {'is missing' if value is None else 'must be a printable string'}")
    return value


def _texts(where: str, table: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    value = table.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{where}.{name}: must be a list of strings")
    return tuple(value)


def _moment(where: str, table: Mapping[str, Any], name: str) -> datetime | None:
    value = table.get(name)
    if value is not None and (not isinstance(value, datetime) or value.tzinfo is None):
        raise ValueError(f"{where}.{name}: must be a date and time with a time zone, such as 2027-01-01T00:00:00Z")
    return value


def _token(where: str, reference: str, environ: Mapping[str, str], read: Callable[[str], bytes]) -> ReplicateKey:
    kind, _, place = reference.partition(":")
    if kind == "env":
        token, holder = environ.get(place, ""), f"the environment variable {place}"
        if place not in environ:
            raise ValueError(f"{where}: there is no environment variable {place}")
    else:
        holder = f"the file {place}"
        try:
            token = read(place).decode("ascii", "replace")
        except OSError as error:
            raise ValueError(f"{where}: {holder} cannot be read: {error.strerror}") from None
    try:
        return ReplicateKey(token.strip())
    except ValueError as error:
        raise ValueError(f"{where}: what {holder} holds is {error}") from None


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
