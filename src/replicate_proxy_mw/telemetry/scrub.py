"""What every exported string passes: without this request's secrets, and without what looks like one."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator
from functools import lru_cache
from urllib.parse import unquote

REDACTED = "REDACTED"

# Shorter values are in ordinary words, and no secret worth the name.
MIN_SECRET = 4

# So much of a known secret gives it away, where a text was cut in its middle before it came here.
_HEAD = 8

# Cookies also hold flags and languages; session ids are longer.
_MIN_COOKIE = 16

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_OTHER = re.compile(r"[^a-z0-9]+")
_SECRET_WORDS = re.compile(
    r"(?:^|_)(?:"
    # anywhere in a name,
    r"(?:secrets?|passwords?|passwd|passphrases?|pwd|cookies?|credentials?|authorization|jwt|apikey|api_key"
    r"|service_account_json)(?:_|$)"
    # at its end, since `token_count` and `key_points` are something else,
    r"|(?:token|authtoken|apitoken|accesstoken|key|secretkey|privatekey|accesskey|auth)[0-9_]*$"
    # or in the plural, since `max_tokens` is one, too.
    r"|(?:api|access|auth|refresh|bearer|private|hf)_(?:keys|tokens)[0-9_]*$"
    r")"
)

# Headers that are keys of something, and open to everybody.
_OPEN_HEADERS = frozenset(
    b"cache-key idempotency-key sec-websocket-key surrogate-key x-cache-key x-idempotency-key".split()
)
_CONFIG = b"x-portkey-config"


def is_secret_name(name: str) -> bool:
    """Whether what goes by `name`, a header or a key in snake, kebab or camel case, is a secret."""
    return _SECRET_WORDS.search(_OTHER.sub("_", _CAMEL.sub("_", name).lower())) is not None


@lru_cache(maxsize=512)
def _is_secret_header(name: bytes) -> bool:
    return name == _CONFIG or (name not in _OPEN_HEADERS and is_secret_name(name.decode("latin-1")))


class Scrubber:
    """Replaces secrets in a text: known values, as they are or encoded for URLs or JSON, and what has a secret's form.

    Args:
        secrets: the values that may be on no signal. Those shorter than 4 characters are ignored: they are in ordinary
            words.
    """

    __slots__ = ("_heads",)

    def __init__(self, secrets: Iterable[str]) -> None:
        self._heads = {secret: secret[:_HEAD] for secret in secrets if len(secret) >= MIN_SECRET}

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> Scrubber:
        """For the signals of a request with these headers, as ASGI has them."""
        found: list[str] = []
        for name, value in headers:
            # Names are remembered, so not any length of them.
            if _is_secret_header(name) if len(name) <= 64 else _is_secret_header.__wrapped__(name):
                found += _in_header(name, value)
        return cls(found)

    def with_secret(self, secret: str) -> Scrubber:
        """One that knows `secret`, too."""
        return Scrubber((*self._heads, secret))

    def __repr__(self) -> str:
        return f"Scrubber({len(self._heads)} secrets)"

    def __call__(self, text: str) -> str:
        """`text` without secrets, valid in UTF-8.

        A text that was cut before may end within a secret: 8 characters of a known one are replaced there, too.
        """
        if not text.isascii():
            # Lone surrogates would fail where it is encoded.
            text = text.encode("utf-8", "replace").decode()
        text = self.without_known(text)
        if "%" in text and self._heads:
            text = self._without_encoded(text)
        # Single characters are quick to look for, and most texts have none of them.
        if "_" in text and ("r8_" in text or "whsec_" in text):
            text = re.sub(_TOKEN, REDACTED, text)
        if "J" in text and "eyJ" in text:
            text = re.sub(_JWT, lambda found: REDACTED if found[1] else found[0], text)
        if "-" in text and "sk-" in text:
            text = re.sub(_SK, REDACTED, text)
        if ":" in text and "://" in text:
            if "@" in text:
                text = re.sub(_USERINFO, f"://{REDACTED}:{REDACTED}@", text)
            if text.find("://") != text.rfind(":"):
                text = re.sub(_CUT_USERINFO, f"://{REDACTED}", text)
        if "=" in text and _has_any(_PARAMETERS, text):
            text = re.sub(_PARAMETER, rf"\1={REDACTED}", text)
        if (" " in text or "%20" in text) and _has_any(_SCHEMES, text):
            text = re.sub(_SCHEME, rf"\1{REDACTED}", text)
        return text

    def without_known(self, text: str) -> str:
        """`text` without the known secrets, as they are."""
        for head in self._heads.values():
            if head in text:
                return self._without_known(text, text, range(len(text) + 1))
        return text

    def passes(self, text: str) -> bool:
        """Whether nothing in `text` is replaced."""
        return self(text) == text

    def is_clean(self, texts: Iterable[str]) -> bool:
        """Whether nothing in `texts` is replaced; False where that cannot be told at a glance. One look at all of them
        takes less time than one at each."""
        text = "\n".join(texts)
        if not text.isascii():
            return False
        for mark in (*self._heads.values(), *_MARKS):
            if mark in text:
                return False
        if "://" in text and ("@" in text or _BARE_AUTHORITY.search(text)):
            return False
        return " " not in text or not _has_any(_SCHEMES, text)

    def _without_encoded(self, text: str) -> str:
        plain = unquote(text, "latin-1")
        if not any(head in plain for head in self._heads.values()):
            return text
        at, characters = [0], []
        for found in re.finditer(_CHARACTER, text):
            characters.append(chr(int(found[1], 16)) if found[1] else found[2] or "")
            at.append(found.end())
        return self._without_known(text, "".join(characters), at)

    def _without_known(self, text: str, plain: str, at: range | list[int]) -> str:
        """`text` without the known secrets that `plain` has, whose character `n` stands at `at[n]` in `text`."""
        spans = sorted(span for secret in self._heads for span in _spans(secret, plain))
        parts: list[str] = []
        done = 0
        for start, end in spans:
            if end > done:
                # What overlaps is one.
                if start >= done:
                    parts += (text[at[done] : at[start]], REDACTED)
                done = end
        return "".join((*parts, text[at[done] :]))


# Compiled by `re` for the first text that needs them: few do, and it takes long.
# Every quantifier stops where the next match may begin, so that no text takes more than linear time.
# The last alternative is half of one, where the text was cut.
_CHARACTER = r"(?s)%([0-9A-Fa-f]{2})|((?!%[0-9A-Fa-f]?\Z).)|%[0-9A-Fa-f]?"
_TOKEN = r"r8_[A-Za-z0-9_]{8,}|whsec_[A-Za-z0-9+/=_-]{8,}"
# The run before the first dot is taken in any case. With the first dot alone it was cut in its payload.
_JWT = r"eyJ[A-Za-z0-9_-]++((?:\.[A-Za-z0-9_-]*+){2,4}|\.eyJ[A-Za-z0-9_-]*+)?"
_SK = r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}"
_USERINFO = r'://[^\s/?#"<>]*@'
# Behind the last colon of a text there is a port, or a password.
_CUT_USERINFO = r'://[^\s/?#"<>\[:@]*:[0-9]*[^\s/?#"<>@0-9][^\s/?#"<>@]*\Z'
_PARAMETERS = ("sig", "cred", "token", "secret", "passw", "key")
_PARAMETER = (
    r"(?i)(?<![\w.%-])([\w.%-]*(?:signature|credential|token|secret|passw(?:or)?d|api_?key|accesskeyid)|sig)"
    r"=[^&\s\"'<>#;,]+"
)
# What has none of them needs no second look, nor a URL that goes on after its host and port.
_MARKS = ("%", "=", "r8_", "whsec_", "eyJ", "sk-")
_BARE_AUTHORITY = re.compile(r"://[^/\n]*(?:\n|\Z)")
# "Token" and "Basic" are ordinary words, followed by others.
_SCHEMES = ("bearer", "token", "basic")
_SCHEME = (
    r"(?i)(?<![A-Za-z0-9])((?:bearer|(?:token|basic)(?=(?:\s|%20)+(?-i:[a-z._~+/=-]*[A-Z0-9])))(?:\s|%20)+)"
    r"[A-Za-z0-9._~+/=-]{8,}"
)


def _has_any(words: tuple[str, ...], text: str) -> bool:
    lowered = text.lower()
    for word in words:  # noqa: SIM110 (half the time)
        if word in lowered:
            return True
    return False


def _spans(secret: str, plain: str) -> Iterator[tuple[int, int]]:
    """Where `secret` stands in `plain`, and where a part of it is that a cut has left."""
    start = plain.find(secret)
    while start >= 0:
        yield start, start + len(secret)
        start = plain.find(secret, start + len(secret))
    start = plain.find(secret[:_HEAD], max(0, len(plain) - len(secret) + 1))
    while start >= 0:
        # The last character spares most of the longer comparisons.
        if secret[len(plain) - start - 1] == plain[-1] and secret.startswith(plain[start:]):
            yield start, len(plain)
            return
        start = plain.find(secret[:_HEAD], start + 1)


def _in_header(name: bytes, raw: bytes) -> list[str]:
    value = raw.decode("latin-1").strip()
    if " " not in value and name not in (b"cookie", _CONFIG):
        return _forms(value)
    if name == b"cookie":
        contents = [cookie.partition("=")[2].strip().strip('"') for cookie in value.split(";")]
        return _forms(value, *(content for content in contents if len(content) >= _MIN_COOKIE))
    if name == _CONFIG:
        return _forms(value, *_in_config(value))
    scheme, _, credential = value.partition(" ")
    credential = credential.strip()
    if len(credential) < MIN_SECRET:
        return _forms(value)
    if scheme.lower() == "basic":
        return _forms(credential, *_in_basic(credential))
    # A scheme may stay, if it is one.
    return _forms(credential) if scheme.lower() in ("bearer", "token") else _forms(value, credential)


def _forms(*values: str) -> list[str]:
    """The values, as they may stand in a text."""
    forms = list(values)
    for value in values:
        if not value.isascii():
            utf8 = value.encode("latin-1", "replace").decode("utf-8", "replace")
            forms += (utf8, json.dumps(value)[1:-1], json.dumps(utf8)[1:-1])
        elif '"' in value or "\\" in value:
            forms.append(json.dumps(value)[1:-1])
    return forms


def _in_basic(credential: str) -> Iterator[str]:
    try:
        user, _, password = b64decode(credential + "===").decode("latin-1").partition(":")
    except ValueError:
        return
    yield password or user


def _in_config(value: str) -> Iterator[str]:
    """The strings under secrets' names, at any depth."""
    if not value.startswith("{"):
        return
    try:
        rest = [(json.loads(value), False)]
    except (ValueError, RecursionError):
        return
    while rest:
        content, secret = rest.pop()
        if isinstance(content, dict):
            rest += ((one, secret or is_secret_name(name)) for name, one in content.items())
        elif isinstance(content, list):
            rest += ((one, secret) for one in content)
        elif secret and isinstance(content, str):
            yield content


BARE = Scrubber(())
"""For texts that belong to no request."""
