"""A search through all that a test tells: no token that it used, and no caller's key, may stand there.

A plugin of pytest, loaded by `tests/conftest.py`. It watches where records, spans, warnings and answers come into
being, and where exceptions leave the middleware or are expected by a test: whatever handlers, providers and servers a
test has in this process. Frames of the tests themselves know the secrets, and are not looked at.
"""

from __future__ import annotations

import logging
import warnings
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from opentelemetry.sdk.trace import Span

from replicate_proxy_mw import KeyRequest, ReplicateKey, ReplicateProxyMiddleware
from replicate_proxy_mw.egress import Reply

# Each piece of so many characters of a token gives it away.
PIECE = 12
# Of fewer characters than this it says nothing: a test's `r8_0000…` is zeros, as many ids are.
DISTINCT = 5
# A caller's key is looked for as a whole; shorter ones are words of a test.
KEY = 8
# Characters of one answer, and of all that one test tells by one channel, that are kept: large bodies are data.
MAX_TEXT, MAX_CHANNEL = 1 << 16, 1 << 19

# So many tokens are not looked for one by one.
MANY = 20

ANSWER, EXCEPTION = "answer", "exception"

ROOT = Path(__file__).parents[1]
_OF_THE_TESTS = (f"{ROOT}/tests/", f"{ROOT}/examples/", f"{ROOT}/benchmarks/")
_OF_TOOLS = ("/_pytest/", "/pluggy/", "/pytest_timeout", "/hypothesis/", "/mutmut/")


class Canary:
    """What is secret now, and what has been told.

    Attributes:
        lasting: tokens made while no test ran, by modules of tests.
        tokens: tokens made or sent since the last test.
        keys: what callers gave as keys and tokens of their own: they stand in every scope, and so in frames.
    """

    def __init__(self) -> None:
        self.lasting: set[str] = set()
        self.tokens: set[str] = set()
        self.keys: set[str] = set()
        self.running = False
        self._told: dict[str, dict[str, None]] = {}
        self._sizes: dict[str, int] = {}

    def begin(self) -> None:
        self.tokens, self.keys, self.running = set(), set(), True
        self._told, self._sizes = {}, {}

    def token(self, token: object) -> None:
        if isinstance(token, str):
            (self.tokens if self.running else self.lasting).add(token)

    def tell(self, channel: str, text: str) -> None:
        told = self._told.setdefault(channel, {})
        size = self._sizes.get(channel, 0)
        if text not in told and size < MAX_CHANNEL:
            told[text] = None
            self._sizes[channel] = size + len(text)

    def error(self, channel: str, error: BaseException) -> None:
        """The texts of a chain of exceptions, and the locals of the frames that it has passed."""
        chain: list[BaseException | None] = [error]
        seen: set[int] = set()
        while chain:
            one = chain.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            self.tell(channel, f"{_repr(one)} {_str(one)} {getattr(one, '__notes__', '')}")
            traceback = one.__traceback__
            while traceback is not None:
                code = traceback.tb_frame.f_code
                if not code.co_filename.startswith(_OF_THE_TESTS) and not any(
                    part in code.co_filename for part in _OF_TOOLS
                ):
                    for name, value in traceback.tb_frame.f_locals.items():
                        self.tell(
                            f"{channel}: locals", f"{code.co_filename}: {code.co_qualname}: {name} = {_repr(value)}"
                        )
                traceback = traceback.tb_next
            chain += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                chain += one.exceptions

    def end(self) -> list[str]:
        """What was told that should not have been."""
        self.running = False
        tokens = self.tokens | self.lasting
        leaks = []
        for channel, told in self._told.items():
            text = "\n".join(told)
            # What a caller brings is in the scope, and that in frames of the server.
            of_frames = channel.endswith("locals")
            looked_for = tokens - self.keys if of_frames else tokens
            if len(looked_for) > MANY and not _any_in(text, looked_for):
                looked_for = set()
            for token in looked_for:
                leaks += [f"{channel}: {found}" for found in token_in(text, token)]
            for key in () if of_frames else self.keys:
                leaks += [f"{channel}: {found}" for found in key_in(text, key)]
        return leaks


def token_in(text: str, token: str) -> list[str]:
    """Where a piece of `token` stands in `text`, as it is or encoded; one place is enough."""
    pieces, blocks = _needles(token)
    if any(block in text for block in blocks):
        return [_around(text, piece) for piece in pieces if piece in text][:1]
    return []


def _any_in(text: str, tokens: set[str]) -> bool:
    """The same for all of them together, by one look at each place."""
    blocks = frozenset().union(*(_needles(token)[1] for token in tokens))
    half = PIECE // 2
    return not blocks.isdisjoint(text[start : start + half] for start in range(len(text)))


def key_in(text: str, key: str) -> list[str]:
    return [_around(text, form) for form in _forms(key) if form in text][:1] if len(key) >= KEY else []


def _around(text: str, piece: str) -> str:
    at = text.index(piece)
    return repr(text[max(0, at - 120) : at + 60])


@lru_cache(maxsize=4096)
def _needles(token: str) -> tuple[frozenset[str], frozenset[str]]:
    """All pieces, and blocks of half a piece's length of which each piece has one: far fewer to look for."""
    pieces, blocks = set(), set()
    half = PIECE // 2
    for form in _forms(token):
        for start in range(len(form) - PIECE + 1):
            piece = form[start : start + PIECE]
            if len(set(piece)) >= DISTINCT:
                first = -(-start // half) * half
                pieces.add(piece)
                blocks.add(form[first : first + half])
    return frozenset(pieces), frozenset(blocks)


@lru_cache(maxsize=4096)
def _forms(secret: str) -> frozenset[str]:
    """As it is, as in URLs, and in base64, which has three texts for the same bytes, by where they stand."""
    raw = secret.encode("utf-8", "surrogatepass")
    forms = {secret, quote(raw, safe="")}
    for before in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            # Its ends depend on what is beside them.
            text = encode(b" " * before + raw).decode().rstrip("=")
            forms.add(text[(0, 2, 3)[before] : len(text) - ((before + len(raw)) % 3 > 0)])
    return frozenset(forms)


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<no repr: {type(error).__name__}>"


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<no text: {type(error).__name__}>"


# --- where things come into being


canary = Canary()
_undo: list[Callable[[], None]] = []


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = vars(owner)[name]
    setattr(owner, name, wraps(original)(make(original)))
    _undo.append(lambda: setattr(owner, name, original))


def _init_of_key(original: Any) -> Any:
    def __init__(self: ReplicateKey, token: str, **options: Any) -> None:
        canary.token(token)
        try:
            original(self, token, **options)
        finally:
            del token

    return __init__


def _authorization(original: Any) -> Any:
    def authorization(self: ReplicateKey) -> bytes:
        canary.token(self._token)
        sent: bytes = original(self)
        return sent

    return authorization


def _init_of_request(original: Any) -> Any:
    def __init__(self: KeyRequest, **fields: Any) -> None:
        original(self, **fields)
        canary.keys |= {key for key in (self.api_key, self.caller_token) if key}

    return __init__


def _handle(original: Any) -> Any:
    def handle(self: logging.Logger, record: logging.LogRecord) -> None:
        canary.tell("log", f"{_message(record)} {_repr(vars(record))}")
        if record.exc_info and record.exc_info[1] is not None:
            canary.error("log: exception", record.exc_info[1])
        original(self, record)

    return handle


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:
        return f"<no message: {type(error).__name__}>"


def _end_of_span(original: Any) -> Any:
    def end(self: Span, *args: Any, **keywords: Any) -> None:
        original(self, *args, **keywords)
        links = [dict(link.attributes or {}) for link in self.links]
        events = [(event.name, dict(event.attributes or {})) for event in self.events]
        canary.tell("span", f"{self.name} {dict(self.attributes or {})} {events} {links} {self.status.description}")

    return end


def _init_of_warning(original: Any) -> Any:
    def __init__(self: warnings.WarningMessage, *args: Any, **keywords: Any) -> None:
        original(self, *args, **keywords)
        canary.tell("warning", f"{self.message} {_repr(self.message)}")

    return __init__


def _call(original: Any) -> Any:
    async def __call__(self: ReplicateProxyMiddleware, scope: Any, receive: Any, send: Any) -> None:
        try:
            await original(self, scope, receive, send)
        except GeneratorExit:  # of a coroutine that nobody waits for any more
            raise
        except BaseException as error:
            canary.error(EXCEPTION, error)
            raise

    return __call__


def _fill_unfilled(original: Any) -> Any:
    def fill_unfilled(self: pytest.ExceptionInfo[BaseException], info: Any) -> None:
        original(self, info)
        canary.error(EXCEPTION, self.value)

    return fill_unfilled


def _init_of_reply(original: Any) -> Any:
    def __init__(self: Reply, send: Any, **keywords: Any) -> None:
        left = MAX_TEXT

        # No coroutine of its own, which would be one more for each held answer.
        def watched(message: Any) -> Any:
            nonlocal left
            for name, value in message.get("headers", ()):
                canary.tell(ANSWER, f"{name.decode('latin-1')}: {value.decode('latin-1')}")
            if body := message.get("body", b"")[:left]:
                left -= len(body)
                canary.tell(ANSWER, bytes(body).decode("latin-1"))
            return send(message)

        original(self, watched, **keywords)

    return __init__


def pytest_configure(config: pytest.Config) -> None:
    _replace(ReplicateKey, "__init__", _init_of_key)
    _replace(ReplicateKey, "authorization", _authorization)
    _replace(KeyRequest, "__init__", _init_of_request)
    _replace(logging.Logger, "handle", _handle)
    _replace(Span, "end", _end_of_span)
    _replace(warnings.WarningMessage, "__init__", _init_of_warning)
    _replace(ReplicateProxyMiddleware, "__call__", _call)
    _replace(Reply, "__init__", _init_of_reply)
    _replace(pytest.ExceptionInfo, "fill_unfilled", _fill_unfilled)


def pytest_unconfigure(config: pytest.Config) -> None:
    while _undo:
        _undo.pop()()


@pytest.fixture
def tells_secrets() -> None:
    """For a test whose upstream or host tells a secret: what they say in answers and exceptions is not searched."""


@pytest.fixture
def plants_secrets() -> None:
    """For a test that tells secrets by itself, to be found by a search of its own."""


@pytest.fixture(autouse=True)
def no_secret_is_told(request: pytest.FixtureRequest) -> Iterator[None]:
    canary.begin()
    yield
    leaks = canary.end()
    if "plants_secrets" in request.fixturenames:
        return
    if "tells_secrets" in request.fixturenames:
        leaks = [leak for leak in leaks if not leak.startswith((ANSWER, EXCEPTION))]
    if leaks:
        pytest.fail("a secret was told\n" + "\n".join(leaks), pytrace=False)
