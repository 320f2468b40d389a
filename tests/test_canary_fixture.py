"""The search over the whole suite fails whoever tells a secret, by each of its channels, and nobody else."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.canary import PIECE, ROOT, key_in, token_in
from tests.raw_asgi import TOKEN

# Played by a pytest of its own: each of `told` has to fail, none of `kept`.
INNER = '''
import logging, types, warnings
from base64 import b64encode

import anyio, pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode

from replicate_proxy_mw import ProxyResponse, ReplicateKey
from replicate_proxy_mw.exchange import Chunks
from tests.raw_asgi import Caller, call, http_scope, proxy

LASTING = "r8_Vn3KtY8wQz5LhB2xMc7RdJ4sGf9PaEu1Xo"
ReplicateKey(LASTING)
TOKEN, KEY = "r8_Jx6WmT2qHv9ZcL4bRk8NdY5sPg7FaEu3Ki", "pk-Rw4TzM8vQk"
log, tracer = logging.getLogger("x"), TracerProvider().get_tracer("x")


async def resolver(request):
    return ReplicateKey(TOKEN, tenant="a")


def ask(answer=b"{}", headers=(), error=None, local=None, answers=True):
    def layer(forward):
        async def made(request):
            request.key.authorization()
            return ProxyResponse(status=200, headers=headers, body=pieces())

        async def pieces():
            yield answer
            if error is not None:
                elsewhere(error, local)

        return made

    app = proxy("http://127.0.0.1:1/v1", key_resolver=resolver, layers=[layer])
    scope = http_scope(headers=[(b"x-portkey-api-key", KEY.encode())])
    caller = Caller()
    if error is None:
        anyio.run(caller.call, app, scope)
        assert caller.status == 200
        return
    try:
        anyio.run(caller.call, app, scope)
    except BaseException:
        return
    raise AssertionError


def elsewhere(error, local=None):
    """Raised in a frame that is none of the tests', with a local."""
    names = {}
    exec(compile("def fails(error, local): raise error", "elsewhere.py", "exec"), names)
    names["fails"](error, local)


def raised(error, local=None):
    try:
        elsewhere(error, local)
    except Exception as error:
        return error


def caused(local):
    error = ValueError()
    error.__cause__ = raised(KeyError(), local)
    return error


def span(**given):
    with tracer.start_as_current_span(given.pop("name", "x")) as span:
        span.set_attributes(given.pop("attributes", {}))
        span.add_event(given.pop("event", "x"), given.pop("on_event", {}))
        span.set_status(given.pop("status", Status(StatusCode.OK)))


def expects(error):
    with pytest.raises(type(error)):
        elsewhere(error)


TOLD = {
    "message": lambda: log.error("a " + TOKEN),
    "arguments": lambda: log.error("%s", [TOKEN]),
    "extra": lambda: log.error("x", extra={"more": TOKEN}),
    "lasting": lambda: log.error(LASTING),
    "piece": lambda: log.error(TOKEN[9:21]),
    "last piece": lambda: log.error(TOKEN[-12:]),
    "base64": lambda: log.error(b64encode(TOKEN.encode()).decode()),
    "base64 one on": lambda: log.error(b64encode(b"." + TOKEN.encode()).decode()),
    "base64 two on": lambda: log.error(b64encode(b".." + TOKEN.encode()).decode()),
    "key": lambda: log.error(KEY),
    "exception": lambda: log.error("x", exc_info=raised(ValueError(TOKEN))),
    "local": lambda: log.error("x", exc_info=raised(ValueError(), TOKEN)),
    "local of a cause": lambda: log.error("x", exc_info=caused(TOKEN)),
    "local in a group": lambda: log.error("x", exc_info=ExceptionGroup("x", [caused(TOKEN)])),
    "span": lambda: span(name=TOKEN),
    "attribute": lambda: span(attributes={"x": [TOKEN]}),
    "attribute with the key": lambda: span(attributes={"x": KEY}),
    "event": lambda: span(event=TOKEN),
    "attribute of an event": lambda: span(on_event={"x": TOKEN}),
    "status": lambda: span(status=Status(StatusCode.ERROR, TOKEN)),
    "body": lambda: ask(answer=b"a" + TOKEN.encode()),
    "header": lambda: ask(headers=((b"location", b"/?a=" + TOKEN.encode()),)),
    "header with the key": lambda: ask(headers=((b"location", KEY.encode()),)),
    "leaves the middleware": lambda: ask(error=ValueError(TOKEN)),
    "local leaves the middleware": lambda: ask(error=ValueError(), local=TOKEN),
    "expected": lambda: expects(ValueError(TOKEN)),
}
KEPT = {
    "nothing": lambda: ask(),
    "less than a piece": lambda: log.error(TOKEN[:11]),
    "another": lambda: log.error(TOKEN[::-1]),
    "leaves without it": lambda: ask(error=ValueError()),
    "expected without it": lambda: expects(ValueError()),
    "span without it": lambda: span(),
}


@pytest.mark.parametrize("tell", TOLD.values(), ids=TOLD)
def test_told(tell):
    ask()
    tell()


def test_told_by_a_warning():
    ask()
    with pytest.warns(UserWarning):
        warnings.warn(TOKEN)


@pytest.mark.parametrize("tell", KEPT.values(), ids=KEPT)
def test_kept(tell):
    ask()
    tell()


def test_kept_since_it_is_of_another_test():
    log.error(TOKEN)


def test_kept_since_its_upstream_tells(tells_secrets):
    ask(answer=TOKEN.encode())


def test_told_though_its_upstream_tells(tells_secrets):
    ask(answer=TOKEN.encode())
    log.error(TOKEN)
'''


def test_whoever_tells_a_secret_fails(tmp_path: Path) -> None:
    path = tmp_path / "test_inner.py"
    path.write_text(INNER)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "tests.canary", "-p", "no:cacheprovider"]
    options = ["-c", "/dev/null", f"--rootdir={tmp_path}", "--import-mode=importlib", str(path)]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=50)
    outcomes: dict[str, set[str]] = {"PASSED": set(), "ERROR": set(), "FAILED": set()}
    for outcome, name in re.findall(r"^(PASSED|ERROR|FAILED) \S*::(test_\w+(?:\[[^\]]*\])?)", run.stdout, re.MULTILINE):
        outcomes[outcome].add(name)
    told = {name for name in outcomes["PASSED"] if name.startswith("test_told")}
    assert not outcomes["FAILED"], run.stdout
    assert outcomes["ERROR"] == told
    assert len(told) == 28
    assert len(outcomes["PASSED"] - told) == 8


@given(
    st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=", min_size=20, max_size=50),
    st.integers(0, 30),
    st.binary(max_size=4),
    st.booleans(),
)
def test_each_piece_is_found_however_it_is_written(token: str, start: int, beside: bytes, url_safe: bool) -> None:
    start = min(start, len(token) - PIECE)
    piece = token[start : start + PIECE]
    if len(set(piece)) < 4:
        return
    assert token_in(f"a{piece}b", token)
    assert token_in(quote(token, safe=""), token)
    written = (urlsafe_b64encode if url_safe else b64encode)(beside + token.encode() + beside).decode()
    assert token_in(written, token)


@pytest.mark.parametrize(
    "text", ["0" * 60, "00000000-0000-0000-0000-000000000000", "r8_00", "", b64encode(b"0").decode()]
)
def test_what_any_text_may_hold_gives_no_token_away(text: str) -> None:
    assert token_in(text, TOKEN) == []


def test_a_key_is_looked_for_as_a_whole() -> None:
    assert key_in("a pk-team-a b", "pk-team-a")
    assert key_in(b64encode(b"x:pk-team-a").decode(), "pk-team-a")
    assert key_in("a pk-team- b", "pk-team-a") == []
    assert key_in("a key b", "key") == []
