"""What a caller says in `x-portkey-*` headers (https://portkey.ai/docs, "Headers"), and who the caller is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import BadRequest

MAX_TEXT = 256
MAX_METADATA_KEYS = 32
MAX_METADATA_BYTES = 4096

_PREFIX = b"x-portkey-"


@dataclass(frozen=True, kw_only=True, slots=True)
class PortkeyContext:
    """The caller's Portkey headers as text. `metadata` is None where there is none, or none that can be read.

    `api_key`, `virtual_key` and `config` may be or hold secrets and are not printed.
    """

    api_key: str | None = field(default=None, repr=False)
    provider: str | None = None
    virtual_key: str | None = field(default=None, repr=False)
    config: str | None = field(default=None, repr=False)
    trace_id: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None
    span_name: str | None = None
    metadata: Mapping[str, str] | None = None
    metadata_invalid: bool = False


def read(headers: Iterable[tuple[bytes, bytes]]) -> PortkeyContext:
    """Read the caller's headers. The key is `x-portkey-api-key`, else the credential of `Authorization: Bearer|Token`.

    Portkey's SDKs send an empty key header where they were given none, Replicate's SDKs and Portkey's newest page
    only `Authorization`. Both at once is normal for OpenAI's SDKs: theirs is then a placeholder.

    Raises:
        BadRequest: two `x-portkey-api-key` lines or two `Authorization` lines.
    """
    texts: dict[bytes, str] = {}
    authorization: str | None = None
    for name, value in headers:
        if name.startswith(_PREFIX):
            if name == b"x-portkey-api-key" and name[10:] in texts:
                raise BadRequest("There is more than one x-portkey-api-key header.")
            texts[name[10:]] = value.decode("latin-1").strip()
        elif name == b"authorization":
            if authorization is not None:
                raise BadRequest("There is more than one Authorization header.")
            authorization = value.decode("latin-1")
    metadata, metadata_invalid = _metadata(texts.get(b"metadata"))
    return PortkeyContext(
        api_key=texts.get(b"api-key") or _credential(authorization),
        provider=texts.get(b"provider") or None,
        virtual_key=texts.get(b"virtual-key") or None,
        config=texts.get(b"config") or None,
        trace_id=_short(texts.get(b"trace-id")),
        span_id=_short(texts.get(b"span-id")),
        parent_span_id=_short(texts.get(b"parent-span-id")),
        span_name=_short(texts.get(b"span-name")),
        metadata=metadata,
        metadata_invalid=metadata_invalid,
    )


def _credential(authorization: str | None) -> str | None:
    scheme, _, credential = (authorization or "").partition(" ")
    return credential.strip() or None if scheme.lower() in ("bearer", "token") else None


def _short(text: str | None) -> str | None:
    return text[:MAX_TEXT] if text else None


def _metadata(text: str | None) -> tuple[Mapping[str, str] | None, bool]:
    """Metadata never fails a request: what is too long, too deep or no JSON object is reported as invalid."""
    if not text:
        return None, False
    if len(text) > MAX_METADATA_BYTES:
        return None, True
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            return None, True
        entries = list(content.items())[:MAX_METADATA_KEYS]
        return {_printable(key): _printable(_text(value)) for key, value in entries}, False
    except (ValueError, RecursionError):
        return None, True


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _printable(text: str) -> str:
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()
