"""What a caller says in `x-portkey-*` headers (https://portkey.ai/docs, "Headers"), and who the caller is."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import BadRequest

MAX_TEXT = 256
MAX_ATTEMPTS = 5
MAX_METADATA_KEYS = 32
MAX_METADATA_BYTES = 4096

_PREFIX = b"x-portkey-"

_SCHEMES = ("bearer", "token")

# What SDKs send in Authorization where they were given nothing.
_PLACEHOLDERS = frozenset(("OPENAI_API_KEY", "DUMMY-KEY"))

# For texts without white space around them.
_decode = json.JSONDecoder().raw_decode

_SWITCH = {"true": True, "false": False}


class Retry(NamedTuple):
    """`retry` of a config: so many more attempts, and on which statuses (None: on all that may be)."""

    attempts: int
    status_codes: frozenset[int] | None = None


# Not frozen, which would take several times as long to make; nobody is to change one.
@dataclass(kw_only=True, slots=True)
class PortkeyContext:
    """The caller's Portkey headers as text. `metadata` is None where there is none, or none that can be read.

    `present` says whether there is any. `caller_token` is a Replicate token that the caller brings beside its key;
    `request_timeout` is in seconds; `debug` is False where the caller wants no content logged. `api_key`,
    `caller_token`, `virtual_key` and `config` may be or hold secrets and are not printed.
    """

    present: bool = False
    api_key: str | None = field(default=None, repr=False)
    provider: str | None = None
    caller_token: str | None = field(default=None, repr=False)
    virtual_key: str | None = field(default=None, repr=False)
    config: str | None = field(default=None, repr=False)
    request_timeout: float | None = None
    retry: Retry | None = None
    trace_id: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None
    span_name: str | None = None
    metadata: Mapping[str, str] | None = None
    metadata_invalid: bool = False
    debug: bool | None = None


class Caching(NamedTuple):
    """What a caller asks of caches.

    `results` says whether an earlier result will do for a create (`{"cache": {"mode": "simple"}}` in an inline config),
    at most `max_age` seconds old, None where it does not say. `force_refresh` asks for a new answer, which is then
    kept; what is kept in one `namespace` is not found in another.
    """

    results: bool = False
    max_age: float | None = None
    force_refresh: bool = False
    namespace: str = ""


def read(headers: Iterable[tuple[bytes, bytes]]) -> PortkeyContext:
    """Read the caller's headers. The key is `x-portkey-api-key`, else the credential of `Authorization: Bearer|Token`.

    Portkey's SDKs send an empty key header where they were given none, Replicate's SDKs and Portkey's newest page
    only `Authorization`. Both at once is normal for OpenAI's SDKs: theirs is then a placeholder, or a token that the
    caller brings.

    Raises:
        BadRequest: two `x-portkey-api-key` lines or two `Authorization` lines; a custom host; a config or time limit
            that cannot be read. The text names what is wrong.
    """
    texts: dict[bytes, str] = {}
    authorization: str | None = None
    for name, value in headers:
        # Nearly all others sort before it, which is told in less time.
        if name > _PREFIX and name.startswith(_PREFIX):
            what = name[10:]
            if what == b"api-key" and what in texts:
                raise BadRequest("There is more than one x-portkey-api-key header.")
            texts[what] = value.decode("latin-1").strip()
        elif name == b"authorization":
            if authorization is not None:
                raise BadRequest("There is more than one Authorization header.")
            authorization = value.decode("latin-1").strip()
    credential = _credential(authorization)
    if not texts:
        return PortkeyContext(api_key=credential)
    get = texts.get
    if get(b"custom-host"):
        raise BadRequest("x-portkey-custom-host: this proxy sends to Replicate alone.")
    # Field by field, since most are absent and arguments take longer.
    caller = PortkeyContext(present=True)
    asked = _NOTHING
    if config := get(b"config"):
        caller.config, asked = config, _config(config)
        caller.retry = asked.retry
    if api_key := get(b"api-key"):
        caller.api_key = api_key
        caller.caller_token = _caller_token(api_key, authorization, credential, asked.api_key)
    else:
        caller.api_key = credential
    caller.provider = get(b"provider") or _mode_s_provider(get(b"mode"))
    if virtual_key := get(b"virtual-key"):
        caller.virtual_key = virtual_key
    if timeout := get(b"request-timeout") or asked.timeout:
        caller.request_timeout = _milliseconds("x-portkey-request-timeout", timeout)
    if trace_id := get(b"trace-id"):
        caller.trace_id = _short(trace_id)
    if span_id := get(b"span-id"):
        caller.span_id = _short(span_id)
    if parent_span_id := get(b"parent-span-id"):
        caller.parent_span_id = _short(parent_span_id)
    if span_name := get(b"span-name"):
        caller.span_name = _short(span_name)
    if metadata := get(b"metadata"):
        caller.metadata, caller.metadata_invalid = _metadata(metadata)
    if debug := get(b"debug"):
        caller.debug = _SWITCH.get(debug.lower())
    return caller


def _mode_s_provider(mode: str | None) -> str | None:
    """`createHeaders(mode="replicate")` of older SDKs sends `proxy replicate`."""
    if not mode:
        return None
    words = mode.split()
    return words[1] if len(words) == 2 and words[0] == "proxy" else None


def _credential(authorization: str | None) -> str | None:
    if not authorization:
        return None
    scheme, _, credential = authorization.partition(" ")
    return credential.strip() or None if scheme.lower() in _SCHEMES else None


def _caller_token(
    api_key: str, authorization: str | None, credential: str | None, configured: str | None
) -> str | None:
    """A token that the caller brings beside its key: that of `Authorization`, else `api_key` of the config.

    Portkey's SDK for Node sends it without a scheme. SDKs put placeholders there, or the key itself.
    """
    if authorization and not credential and " " not in authorization and authorization.lower() not in _SCHEMES:
        credential = authorization
    for token in (credential, configured):
        if token and token != api_key and token not in _PLACEHOLDERS:
            return token
    return None


class _Asked(NamedTuple):
    """What an inline config asks for, as far as it has a meaning here."""

    api_key: str | None = None
    timeout: object = None
    retry: Retry | None = None


_NOTHING = _Asked()


def _config(text: str) -> _Asked:
    """`x-portkey-config` is JSON, or the slug of a config that only a resolver can know."""
    if not text.startswith("{"):
        return _NOTHING
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("x-portkey-config is not valid JSON.") from None
    if config.get("custom_host"):
        raise BadRequest("x-portkey-config: custom_host: this proxy sends to Replicate alone.")
    api_key = config.get("api_key")
    if api_key is not None and not isinstance(api_key, str):
        raise BadRequest("x-portkey-config: api_key is not a string.")
    timeout = config.get("request_timeout")
    if timeout is not None:
        _milliseconds("x-portkey-config: request_timeout", timeout)
    return _Asked(api_key, timeout, _retry(config.get("retry")))


def caching(config: str | None, headers: Iterable[tuple[bytes, bytes]]) -> Caching:
    """Read what only layers that cache have to know: `x-portkey-cache-force-refresh`, `x-portkey-cache-namespace`, and
    `cache` of an inline config, which `read` has found to be JSON.

    Raises:
        BadRequest: `max_age` is not a number of seconds.
    """
    asked = {name: value.decode("latin-1").strip() for name, value in headers if name.startswith(b"x-portkey-cache-")}
    content = json.loads(config) if config and config.startswith("{") else {}
    cache = content.get("cache")
    max_age = cache.get("max_age") if isinstance(cache, dict) else None
    if max_age is not None and not (type(max_age) in (int, float) and 0 < max_age < float("inf")):
        raise BadRequest("x-portkey-config: cache.max_age is not a number of seconds above 0.")
    return Caching(
        results=isinstance(cache, dict) and cache.get("mode") == "simple",
        max_age=max_age,
        force_refresh=asked.get(b"x-portkey-cache-force-refresh", "").lower() == "true",
        namespace=asked.get(b"x-portkey-cache-namespace", ""),
    )


def _retry(retry: object) -> Retry | None:
    if retry is None:
        return None
    if not isinstance(retry, dict):
        raise BadRequest("x-portkey-config: retry is not an object.")
    attempts = retry.get("attempts")
    if type(attempts) is not int or not 0 <= attempts <= MAX_ATTEMPTS:
        raise BadRequest(f"x-portkey-config: retry.attempts is not a whole number from 0 to {MAX_ATTEMPTS}.")
    codes = retry.get("on_status_codes")
    if codes is not None and not (isinstance(codes, list) and all(type(code) is int for code in codes)):
        raise BadRequest("x-portkey-config: retry.on_status_codes is not a list of numbers.")
    # Portkey's gateway reads the first spelling, its documentation has the second.
    for name in ("use_retry_after_header", "use_retry_after_headers"):
        if not isinstance(retry.get(name, False), bool):
            raise BadRequest(f"x-portkey-config: retry.{name} is neither true nor false.")
    return Retry(attempts=attempts, status_codes=None if codes is None else frozenset(codes))


def _milliseconds(name: str, value: object) -> float:
    """A time limit in seconds."""
    try:
        seconds = float(value) / 1000 if isinstance(value, (int, float, str)) and value is not True else 0
    except (ValueError, OverflowError):
        seconds = 0
    if not 0 < seconds < 86400:
        raise BadRequest(f"{name} is not a number of milliseconds above 0.")
    return seconds


def _short(text: str) -> str | None:
    return text[:MAX_TEXT].strip() or None


def _metadata(text: str) -> tuple[Mapping[str, str] | None, bool]:
    """Metadata never fails a request: what is too long, too deep or no JSON object is reported as invalid."""
    if len(text) > MAX_METADATA_BYTES:
        return None, True
    try:
        content, end = _decode(text)
        if end != len(text) or not isinstance(content, dict):
            return None, True
        entries = list(content.items())[:MAX_METADATA_KEYS]
        return {_printable(key): _printable(_text(value)) for key, value in entries}, False
    except (ValueError, RecursionError):
        return None, True


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


_ANSWER = (
    (b"x-portkey-provider", b"replicate"),
    (b"x-portkey-last-used-option-index", b"config"),
    (b"x-portkey-cache-status", b"DISABLED"),
    (b"x-portkey-retry-attempt-count", b"0"),
)


def answer(*, trace_id: str, sent: Container[bytes]) -> list[tuple[bytes, bytes]]:
    """What Portkey's SDKs read in an answer, but for what was `sent` already.

    A trace id that is not empty keeps them from posting again.
    """
    # A value that a server would refuse to send must not cut the answer to a create.
    if not (trace_id.isascii() and trace_id.isprintable()):
        trace_id = re.sub(r"[^\x20-\x7e]", "?", trace_id)
    headers = ((b"x-portkey-trace-id", trace_id.strip().encode()), *_ANSWER)
    return [pair for pair in headers if pair[0] not in sent]


def _printable(text: str) -> str:
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
