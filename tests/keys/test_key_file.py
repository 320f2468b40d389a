from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from replicate_proxy_mw import ReplicateKey
from replicate_proxy_mw.keys.contract import digest
from replicate_proxy_mw.keys.key_file import KeyFile, parse, read_tokens, replicate_keys
from replicate_proxy_mw.policy import Policy

TOKEN = "r8_0123456789abcdefghijklmnopqrstuvwxyz"
OTHER = "r8_zyxwvutsrqponmlkjihgfedcba9876543210"

DIGEST = "sha256:" + "9f" * 32

FULL = f"""
[providers.main]
token = "env:REPLICATE_API_TOKEN"
aliases = ["replicate-abc123", "pc-prod-1f2e"]
[providers.second]
token = "file:secrets/second"

[policies.readers]
operations = ["predictions.get", "models.*"]
own_predictions = true
expires_at = 2027-06-01T00:00:00Z

[tenants.design]
providers = ["second", "main"]
policy = "readers"
[tenants.open]

[keys.9f86d081]
digest = "{DIGEST}"
tenant = "design"
name = "Ada's laptop"
created = 2026-11-21T09:00:00Z
expires_at = 2027-01-01T00:00:00+01:00

[keys.plain]
digest = "sha256:{"AB" * 32}"
tenant = "open"

[keys.narrow]
digest = "sha256:{"cd" * 32}"
tenant = "open"
policy = "readers"
providers = ["main"]
expires_at = 2028-01-01T00:00:00Z
"""


def _read(path: str) -> bytes:
    assert path == "secrets/second"
    return f"\n {OTHER} \n".encode()


def test_what_a_key_has_from_its_tenant() -> None:
    content = parse(FULL)
    assert [*content.providers] == ["main", "second"]
    assert content.providers["main"].aliases == ("replicate-abc123", "pc-prod-1f2e")
    key = content.keys["9f86d081"]
    assert (key.digest, key.tenant, key.name) == (b"\x9f" * 32, "design", "Ada's laptop")
    assert key.created == datetime(2026, 11, 21, 9, tzinfo=UTC)
    assert (key.policy_name, key.policy.operations) == ("readers", ("predictions.get", "models.*"))
    assert key.providers == ("second", "main")


def test_a_key_without_more_than_a_tenant() -> None:
    key = parse(FULL).keys["plain"]
    assert (key.digest, key.tenant) == (b"\xab" * 32, "open")
    assert (key.name, key.created, key.policy_name, key.policy) == (None, None, None, Policy())
    assert key.providers == ("main", "second")


def test_what_a_key_says_itself() -> None:
    key = parse(FULL).keys["narrow"]
    assert (key.policy_name, key.policy.own_predictions, key.providers) == ("readers", True, ("main",))


def test_the_earlier_end_counts() -> None:
    keys = parse(FULL).keys
    assert keys["9f86d081"].policy.expires_at == datetime(2026, 12, 31, 23, tzinfo=UTC)
    assert keys["narrow"].policy.expires_at == datetime(2027, 6, 1, tzinfo=UTC)
    alone = parse(FULL.replace('policy = "readers"\nproviders', "providers")).keys["narrow"]
    assert alone.policy == Policy(expires_at=datetime(2028, 1, 1, tzinfo=UTC))


def _authorization(key: ReplicateKey | None) -> bytes:
    assert key is not None
    return key.authorization()


def test_what_each_key_may_use() -> None:
    content = parse(FULL)
    tokens, problems = read_tokens(content, environ={"REPLICATE_API_TOKEN": TOKEN}, read=_read)
    assert ([*tokens], problems) == (["main", "second"], {})
    found = replicate_keys(content, tokens)
    design = found[b"\x9f" * 32]
    assert [*design] == ["second", "main", "replicate-abc123", "pc-prod-1f2e"]
    assert _authorization(design["second"]) == b"Bearer " + OTHER.encode()
    assert _authorization(design["main"]) == b"Bearer " + TOKEN.encode()
    main = design["pc-prod-1f2e"]
    assert main is design["main"]
    assert main is not None
    assert (main.tenant, main.policy.expires_at) == ("design", datetime(2026, 12, 31, 23, tzinfo=UTC))
    assert [*found[b"\xcd" * 32]] == ["main", "replicate-abc123", "pc-prod-1f2e"]


def test_a_provider_without_a_token_takes_nothing_from_the_others() -> None:
    content = parse(FULL)
    tokens, problems = read_tokens(content, environ={}, read=_read)
    assert [*tokens] == ["second"]
    assert problems == {"main": "providers.main.token: there is no environment variable REPLICATE_API_TOKEN"}
    design = replicate_keys(content, tokens)[b"\x9f" * 32]
    assert [*design] == ["second", "main", "replicate-abc123", "pc-prod-1f2e"]
    assert _authorization(design["second"]) == b"Bearer " + OTHER.encode()
    assert (design["main"], design["pc-prod-1f2e"]) == (None, None)


def test_no_keys_at_all_are_allowed() -> None:
    content = parse("")
    assert content == KeyFile(providers={}, policies={}, tenants={}, keys={})
    assert read_tokens(content, environ={}, read=_read) == ({}, {})
    assert replicate_keys(content, {}) == {}


def test_the_digest_of_a_key() -> None:
    assert digest("test").hex() == "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


BASE = '[providers.main]\ntoken = "env:A"\n[tenants.design]\n'
KEY = f'{BASE}[keys.k]\ndigest = "{DIGEST}"\ntenant = "design"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[providers.main]\ntoken = env:A", "Invalid value (at line 2, column 9)"),
        ("a = " + "[" * 100_000, "it is nested too deeply"),
        ("[users.a]", "users: there is no such table, only providers, policies, tenants, keys"),
        ("version = 1", "version: there is no such table, only providers, policies, tenants, keys"),
        ("[[providers]]", "providers: must have tables, [providers.NAME]"),
        ("[providers]\nmain = 1", "providers.main: must be a table, [providers.main]"),
        ("[providers.main]", "providers.main.token: is missing"),
        ("[providers.main]\ntoken = 1", "providers.main.token: must be a printable string"),
        (BASE.replace("token", "tokens"), "providers.main.tokens: there is no such field, only token, aliases"),
        ('[tenants.""]', 'tenants."": a name must not be empty, and must be printable'),
        ('[tenants."a\\n"]', 'tenants."a\\n": a name must not be empty, and must be printable'),
        (
            BASE.replace(".main", '."@main"'),
            "providers.@main: \"@main\" is no slug: letters, digits, '-', '_' and '.',",
        ),
        (BASE.replace('"\n', '"\naliases = "a"\n'), "providers.main.aliases: must be a list of strings"),
        (BASE.replace('"\n', '"\naliases = [1]\n'), "providers.main.aliases: must be a list of strings"),
        (BASE.replace('"\n', '"\naliases = ["a b"]\n'), 'providers.main.aliases: "a b" is no slug'),
        (
            BASE.replace('"\n', '"\naliases = ["b"]\n[providers.b]\ntoken = "env:A"\n'),
            'providers.main.aliases: "b" is taken by providers.b',
        ),
        (
            BASE.replace('"\n', '"\naliases = ["x"]\n[providers.b]\ntoken = "env:A"\naliases = ["x"]\n'),
            'providers.b.aliases: "x" is taken by providers.main.aliases',
        ),
        (
            "[policies.p]\nmodel = 1",
            "policies.p.model: there is no such field, only operations, models, own_predictions",
        ),
        ('[policies.p]\noperations = ["prediction"]', "policies.p.operations: 'prediction' stands for no operation"),
        ("[policies.p]\nexpires_at = 2027-01-01T00:00:00", "policies.p.expires_at: must be a date and time with a"),
        ('[tenants.design]\npolicy = "p"', 'tenants.design.policy: there is no policy "p"'),
        ('[tenants.design]\nproviders = ["b"]', 'tenants.design.providers: there is no provider "b"'),
        (BASE + "providers = []", "tenants.design.providers: must name at least one, or not be there"),
        (KEY + 'providers = ["b"]', 'keys.k.providers: there is no provider "b"'),
        (KEY + 'policy = "p"', 'keys.k.policy: there is no policy "p"'),
        (KEY + 'name = "a\\u0007"', "keys.k.name: must be a printable string"),
        (KEY + "created = 2026-11-21", "keys.k.created: must be a date and time with a time zone, such as 2027-01-01T"),
        (KEY + "expires_at = 2027-01-01T00:00:00", "keys.k.expires_at: must be a date and time with a time zone"),
        (KEY + 'expires_at = "2027-01-01"', "keys.k.expires_at: must be a date and time with a time zone"),
        (KEY.replace('tenant = "design"', 'tenant = "desing"'), 'keys.k.tenant: there is no tenant "desing"'),
        (KEY.replace('tenant = "design"', ""), "keys.k.tenant: is missing"),
        (BASE + "[keys.k]", "keys.k.digest: is missing"),
        (KEY.replace("9f", "9", 1), 'keys.k.digest: must be "sha256:" and 64 hexadecimal digits; no key stands here'),
        (
            KEY.replace(DIGEST, f"sha256:{digest('test').hex()}"),
            'keys.k.digest: it is that of the empty text, or of "te',
        ),
        (KEY.replace(DIGEST, f"sha256:{digest('').hex().upper()}"), "keys.k.digest: it is that of the empty text, or"),
        (KEY + KEY[KEY.index("[keys") :].replace(".k]", ".l]"), "keys.l.digest: it is that of keys.k, too"),
        (KEY[KEY.index("[tenants") :], "keys.k: there is no provider; a key needs one, [providers.NAME]"),
    ],
)
def test_what_is_wrong_and_where(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        parse(text)
    assert str(raised.value).startswith(message)


def _report(function: Callable[[], object]) -> tuple[str, str]:
    """The text of its ValueError, and all that a log with the variables of the module's frames would show."""
    with pytest.raises(ValueError, match=r".") as raised:
        function()
    report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    frames = [frame for frame in report.stack if "replicate_proxy_mw" in frame.filename]
    assert frames
    return str(raised.value), "".join(
        [*(str(frame.locals) for frame in frames), *report.format_exception_only(), repr(raised.value.__context__)]
    )


@pytest.mark.parametrize(
    "text",
    [
        f'[providers.main]\ntoken = "{TOKEN}"',
        f'[providers.main]\ntoken = "env:{TOKEN}"\ntoken2 = 1',
        f'[providers.main]\n{TOKEN} = "x"',
        f'[providers."{TOKEN}"]\n',
        f'[providers.main]\ntoken = "env:A"\naliases = ["@{TOKEN}"]',
        f'[tenants.a]\npolicy = "{TOKEN}"',
        f'[tenants.a]\nproviders = ["{TOKEN}"]',
        f'[policies.a]\noperations = ["{TOKEN}"]',
        f"{TOKEN} = 1\n{TOKEN} = 2",
        f'[providers.main]\ntoken = "{TOKEN}',
        f'[tenants.a]\npolicy = "{TOKEN.replace("r8_", "pk-")}"',
        f'[tenants.a]\npolicy = "{"0123456789" * 4}"',
        '[tenants.a]\npolicy = "pk-56789"',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(text: str) -> None:
    message, shown = _report(lambda: parse(text))
    assert "56789" not in message + shown


def test_a_plain_token_is_refused_with_the_way_to_write_it() -> None:
    message, _ = _report(lambda: parse(f'[providers.main]\ntoken = "{TOKEN}"'))
    assert message == (
        'providers.main.token: must say where the token is, "env:VARIABLE" or "file:PATH"; no token stands here itself'
    )


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("env:NONE", "there is no environment variable NONE"),
        (f"env:{TOKEN}", "there is no environment variable ***"),
        ("env:EMPTY", "what the environment variable EMPTY holds is not a Replicate API token: 8 to 256 letters"),
        ("env:WRONG", "what the environment variable WRONG holds is not a Replicate API token: 8 to 256 letters"),
        ("file:wrong", "what the file wrong holds is not a Replicate API token: 8 to 256 letters"),
        ("file:/run/none", "the file /run/none cannot be read: No such file or directory"),
    ],
)
def test_a_token_that_is_not_to_be_had(token: str, message: str) -> None:
    content = parse(f'[providers.main]\ntoken = "{token}"')

    def read(path: str) -> bytes:
        if path == "wrong":
            return f"{TOKEN} {TOKEN}\xff".encode("latin-1")
        raise FileNotFoundError(2, "No such file or directory", path)

    environ = {"EMPTY": "", "WRONG": f"{TOKEN} {TOKEN}", "FINE": TOKEN}
    tokens, problems = read_tokens(content, environ=environ, read=read)
    assert tokens == {}
    assert problems["main"].startswith(f"providers.main.token: {message}")
    assert "56789" not in problems["main"]


def test_printing_shows_no_digest() -> None:
    assert "9f9f" not in repr(parse(FULL))
    assert "\\x9f" not in repr(parse(FULL))
