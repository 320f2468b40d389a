"""Whatever the spelling of a request, nothing that a key's policy forbids reaches Replicate.

The judge is what arrived there, read as leniently as any server might read it; it shares no code with the proxy.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from posixpath import normpath
from typing import Any
from unicodedata import normalize
from urllib.parse import parse_qsl, quote, unquote

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from replicate_proxy_mw import ReplicateKey, StaticKeyResolver
from replicate_proxy_mw.policy import Policy
from replicate_proxy_mw.store import MemoryPredictionStore, StoredPrediction
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, FakeVersion, ManualClock, RecordedRequest
from replicate_proxy_mw.testing.predictions import Job
from replicate_proxy_mw.testing.state import StoredFile
from tests.raw_asgi import KEY, Caller, http_scope, proxy

TOKEN, OTHER_TOKEN = "r8_" + "a" * 37, "r8_" + "b" * 37
NOW = 1.8e9
CANARY = "canary-of-team-b"

GOOD, TUNED, BAD, PRIVATE = (digit * 64 for digit in "cd9f")
VERSIONS = {GOOD: "acme/good", TUNED: "acme/tuned-1", BAD: "evil/bad", PRIVATE: "hidden/private"}
OWN = {kind: f"own{kind}000000000000000000"[:26] for kind in ("prediction", "training", "file")}
FOREIGN = {kind: f"foreign{kind}00000000000000"[:26] for kind in ("prediction", "training", "file")}


# --- Replicate, where two tenants share an account


def _run(given: Any) -> str:
    return json.dumps(given)


MODELS = (
    FakeModel(owner="acme", name="good", run=_run, versions=(FakeVersion(id=GOOD, created_at=NOW),)),
    FakeModel(owner="acme", name="tuned-1", run=_run, versions=(FakeVersion(id=TUNED, created_at=NOW),)),
    FakeModel(owner="acme", name="official", run=_run, official=True),
    FakeModel(owner="evil", name="bad", run=_run, versions=(FakeVersion(id=BAD, created_at=NOW),)),
    FakeModel(owner="evil", name="official", run=_run, official=True),
    FakeModel(
        owner="hidden",
        name="private",
        run=_run,
        versions=(FakeVersion(id=PRIVATE, created_at=NOW),),
        visibility="private",
    ),
)


def _replicate() -> FakeReplicate:
    fake = FakeReplicate(
        tokens={TOKEN: "acme", OTHER_TOKEN: "hidden"},
        models=MODELS,
        clock=ManualClock(NOW),
        queue_time=0,
        run_time=0,
        max_recorded_body=4 << 20,
    )
    account = fake._world.accounts[TOKEN]
    for name in ("allowed", "forbidden"):
        account.deployments[name] = replace(account.deployments["hello"], name=name)
    for ids, text in ((OWN, "own"), (FOREIGN, CANARY)):
        for kind in ("prediction", "training"):
            job = Job(
                id=ids[kind],
                kind="predictions" if kind == "prediction" else "trainings",
                model="acme/good",
                version=GOOD,
                input={"text": text},
                created_at=NOW - 1,
                queue_time=0,
                run_time=0,
                chunks=(text,),
                logs=(text,),
            )
            account.jobs(job.kind)[job.id] = job
        id, content = ids["file"], text.encode()
        account.files[id] = StoredFile(
            id=id, name=text, content=content, media_type="text/plain", metadata={}, created_at=NOW
        )
    return fake


class _ToReplicate(httpx.AsyncBaseTransport):
    """To a new one for each request of a caller."""

    fake: FakeReplicate

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        # Not raising: Replicate's fake gives up on JSON that is nested too deep, and that is a 500 as of any server.
        transport = httpx.ASGITransport(self.fake, raise_app_exceptions=False)
        return await transport.handle_async_request(request)


# --- what keys may do, said here once more


SECRET = "webhooks.default.secret.get"
PATHS = {
    "account.get": "GET /account",
    "collections.list": "GET /collections",
    "collections.get": "GET /collections/{slug}",
    "deployments.list": "GET /deployments",
    "deployments.create": "POST /deployments",
    "deployments.get": "GET /deployments/{owner}/{name}",
    "deployments.update": "PATCH /deployments/{owner}/{name}",
    "deployments.delete": "DELETE /deployments/{owner}/{name}",
    "deployments.predictions.create": "POST /deployments/{owner}/{name}/predictions",
    "files.list": "GET /files",
    "files.create": "POST /files",
    "files.get": "GET /files/{file}",
    "files.delete": "DELETE /files/{file}",
    "files.download": "GET /files/{file}/download",
    "hardware.list": "GET /hardware",
    "models.list": "GET /models",
    "models.create": "POST /models",
    "models.search": "QUERY /models",
    "models.get": "GET /models/{owner}/{name}",
    "models.update": "PATCH /models/{owner}/{name}",
    "models.delete": "DELETE /models/{owner}/{name}",
    "models.examples.list": "GET /models/{owner}/{name}/examples",
    "models.predictions.create": "POST /models/{owner}/{name}/predictions",
    "models.readme.get": "GET /models/{owner}/{name}/readme",
    "models.versions.list": "GET /models/{owner}/{name}/versions",
    "models.versions.get": "GET /models/{owner}/{name}/versions/{version}",
    "models.versions.delete": "DELETE /models/{owner}/{name}/versions/{version}",
    "trainings.create": "POST /models/{owner}/{name}/versions/{version}/trainings",
    "predictions.list": "GET /predictions",
    "predictions.create": "POST /predictions",
    "predictions.get": "GET /predictions/{prediction}",
    "predictions.cancel": "POST /predictions/{prediction}/cancel",
    "search": "GET /search",
    "trainings.list": "GET /trainings",
    "trainings.get": "GET /trainings/{training}",
    "trainings.cancel": "POST /trainings/{training}/cancel",
    SECRET: "GET /webhooks/default/secret",
}
LISTS = ("predictions.list", "trainings.list", "files.list")
NAMING = (
    "predictions.create",
    "models.predictions.create",
    "deployments.predictions.create",
    "trainings.create",
    "deployments.create",
    "deployments.update",
    "models.create",
)


@dataclass(frozen=True)
class Rules:
    """A policy, and what it comes to in the judge's own words."""

    policy: Policy
    operations: frozenset[str] = frozenset(PATHS) - {SECRET}
    unlisted: bool = False
    models: frozenset[str] | None = None
    own: bool = False


MODEL_NAMES = ("acme/good", "acme/official", "acme/tuned*", "deployments/acme/allowed")
ALLOWED = frozenset(("acme/good", "acme/official", "acme/tuned-1", "deployments/acme/allowed"))
USED = ("predictions.create", "predictions.get", "models.*.get", "models.get", "files.get", "trainings.create")
ALLOWED_OPERATIONS = frozenset(
    (
        *("predictions.create", "predictions.get", "models.get", "models.readme.get", "models.versions.get"),
        *("files.get", "trainings.create"),
    )
)

OPEN = Rules(Policy(operations=("*", "webhooks.*")), operations=frozenset(PATHS), unlisted=True)
RULES = {
    "default": Rules(Policy(), unlisted=True),
    "models": Rules(Policy(models=MODEL_NAMES), models=ALLOWED),
    "operations": Rules(Policy(operations=USED), operations=ALLOWED_OPERATIONS),
    "own_predictions": Rules(Policy(own_predictions=True), own=True),
    "all": Rules(
        Policy(
            operations=(*USED, *LISTS, "*.cancel", "deployments.*"),
            models=MODEL_NAMES,
            own_predictions=True,
            max_in_flight=1,
            expires_at=datetime(9999, 1, 1, tzinfo=UTC),
        ),
        operations=ALLOWED_OPERATIONS
        | frozenset(LISTS)
        | {one for one in PATHS if one.endswith(".cancel") or one.startswith("deployments.")},
        models=ALLOWED,
        own=True,
    ),
}


# --- the judge


def _decoded(text: str) -> Iterator[str]:
    for _ in range(12):
        yield text
        if (text := unquote(text)) == unquote(text) == "":
            return


def _texts(text: str) -> set[str]:
    """What a part of a path or a name may stand for."""
    found = set()
    for level in _decoded(text):
        for cut in (level, re.split("[;?#]", level)[0]):
            plain = re.sub(r"[\x00-\x20\x7f-\x9f]", "", normalize("NFKC", cut))
            found |= {plain, plain.casefold(), plain.casefold().removesuffix(".json")}
    return found


def _paths(target: str) -> set[str]:
    """What the path of a target may stand for, without dots, doubled slashes and parameters."""
    found = set()
    for level in _decoded(target):
        for cut in (level, re.split("[?#]", level)[0]):
            for stripped in (cut, re.sub(";[^/]*", "", cut), cut.partition(";")[0]):
                text = re.sub(r"[\x00-\x20\x7f-\x9f]", "", normalize("NFKC", stripped)).replace("\\", "/")
                for path in (text, normpath("/" + text.lstrip("/"))):
                    found |= {path, path.rstrip("/.")}
    return {re.sub(r"^(/+v1)+(?=/)", "", path, flags=re.IGNORECASE) for path in found}


_TEMPLATES = [
    (operation, method, [part.casefold() for part in path.split("/")])
    for operation, (method, path) in ((id, text.split(" ")) for id, text in PATHS.items())
]


def _operations(method: str, target: str) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """The operations that a request may stand for, each with what its parameters may be."""
    for path in _paths(target):
        parts = path.split("/")
        for operation, verb, template in _TEMPLATES:
            if len(parts) != len(template) or verb != method.upper().replace("HEAD", "GET"):
                continue
            params = {}
            for part, expected in zip(parts, template, strict=True):
                if expected.startswith("{"):
                    # No id and no name at Replicate has other characters.
                    params[expected[1:-1]] = {one for one in _texts(part) if re.fullmatch(r"[\w.-]+", one, re.ASCII)}
                elif expected not in _texts(part):
                    break
            else:
                if all(params.values()):
                    yield operation, params


def _bodies(body: bytes) -> Iterator[str]:
    """What a body may say as text, in whatever encoding and charset."""
    unpacked = [body]
    for mode in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        with suppress(zlib.error):
            unpacked.append(zlib.decompressobj(mode).decompress(body))
    for data in unpacked:
        for charset in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-7"):
            with suppress(UnicodeDecodeError):
                yield data.decode(charset, "strict" if charset != "utf-8-sig" else "replace")


def _fields(text: str) -> Iterator[list[tuple[str, Any]]]:
    """The objects that a body may be: JSON wherever it begins, what it wraps, a form, or parts of one."""
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, strict=False)
    for start in [found.start() for found in re.finditer(r"[{\[]", text)][:4]:
        with suppress(ValueError, RecursionError):
            yield from _within(decoder.raw_decode(text, start)[0])
    if "=" in text and len(text) < 10_000:
        yield [*parse_qsl(text.strip())]
    yield re.findall(r'name="?(\w+)"?\r?\n(?:[^\n]+\n)*\r?\n([^\r\n]*)', text)


class _Pairs(list[tuple[str, Any]]):
    pass


def _within(value: Any, depth: int = 0) -> Iterator[list[tuple[str, Any]]]:
    if isinstance(value, _Pairs):
        yield value
        for name, inner in value:
            if _letters(name) in ("data", "body", "json", "params"):
                yield from _within(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value[:3]:
            yield from _within(inner, depth + 1)
    elif isinstance(value, str) and value[:1] == "{" and depth < 3:
        yield from _fields(value)


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", normalize("NFKC", name).casefold())


def _said(objects: Iterable[list[tuple[str, Any]]]) -> dict[str, set[str]]:
    """Every value of the fields that can name a model, of all readings together."""
    said: dict[str, set[str]] = {}
    for pairs in objects:
        for name, value in pairs:
            if isinstance(value, str):
                said.setdefault(_letters(name), set()).update(one.strip("/") for one in _texts(value))
    return said


def _models(operation: str, said: dict[str, set[str]], *, lookup: bool) -> Iterator[str]:
    """The names of the models that a body may reach; a version id that says not whose it is, by itself."""
    for version in said.get("version", ()):
        name, _, id = version.rpartition(":")
        if name:
            yield name
            if lookup:
                yield VERSIONS.get(id, id) if VERSIONS.get(id) != name else name
        elif "/" in id:
            yield id
        elif operation == "deployments.create" and not lookup:
            pass  # the version of the model in the same body
        else:
            yield VERSIONS.get(id, id) if lookup else id
    yield from said.get("model", ())
    yield from said.get("destination", ())
    for deployment in said.get("deployment", ()):
        yield "deployments/" + deployment
    if operation == "models.create":
        yield from (f"{owner}/{name}" for owner in said.get("owner", ()) for name in said.get("name", ()))


def reached(request: RecordedRequest, rules: Rules, *, lookup: bool = False) -> set[str]:
    """What a request that arrived may reach, and may not by these rules."""
    found = set()
    target = request.target.decode("latin-1")
    bodies: list[list[tuple[str, Any]]] | None = None
    readings = list(_operations(request.method, target.partition("?")[0]))
    operations = {operation for operation, _ in readings}
    if not readings and not rules.unlisted:
        found.add("operation: one that Replicate does not have")
    if rules.own and len(operations) > 1 and operations.intersection(LISTS):
        found.add("list: one that may have left unfiltered")
    for operation, params in readings:
        if operation not in rules.operations:
            found.add(f"operation: {operation}")
        if rules.models is not None:
            kind = "deployments/" if operation.startswith("deployments.") else ""
            named = {f"{kind}{owner}/{name}" for owner in params.get("owner", ()) for name in params.get("name", ())}
            if operation in NAMING:
                if bodies is None:
                    bodies = [pairs for text in _bodies(request.body) for pairs in _fields(text)]
                    bodies.append([*parse_qsl(target.partition("?")[2])])
                named.update(_models(operation, _said(bodies), lookup=lookup))
                if lookup:
                    named.update(VERSIONS.get(id, id) for id in params.get("version", ()))
            found |= {f"model: {name}" for name in named if name.casefold() not in rules.models}
        if rules.own:
            for kind in OWN:
                for id in params.get(kind, ()):
                    if id.casefold() != OWN[kind]:
                        found.add(f"{kind}: {id}")
    return found


# --- any spelling of requests


def _rarely(draw: st.DrawFn, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


_MODEL_PATHS = [
    "acme/good",
    "acme/tuned-1",
    "acme/official",
    "evil/bad",
    "evil/official",
    "hidden/private",
    "ACME/good",
]
_DEPLOYMENT_PATHS = ["acme/allowed", "acme/forbidden", "acme/hello"]
_VERSION_IDS = [GOOD, BAD, TUNED, PRIVATE, BAD.upper(), "hidden"]


def _words(*lines: str) -> list[str]:
    return " ".join(lines).split()


_INSERTED = _words(
    "/ // /./ /x/../ /..;/ /x/..;/ /%2e/ /x/%2E%2e/ /x/%252e%252E/ /x%2f%2e%2e%2f %2F %252F %5c \\ %5C..%5c ; ;a=b %3b",
    "%3Bx=/ %3F %253f %23 %253Fx/ %00 %2500 %20 + %2520 %0a %250A . %2e * %C5%BF \u017f %EF%BC%8F %zz",
)
_PREFIXES = _words(
    "/models/..; /models/x/..;/..; /collections/%252e%252e /predictions/%2e%2e /v1 /V1 /. /x%253F/%252e%252e //x",
    "/models/acme/good/../../.. /models/acme%252Fgood/%252e%252e/%252e%252e/%252e%252e /x%253B/..",
    f"/predictions/{OWN['prediction']}/.. /predictions/{OWN['prediction']}%252f..%252f..",
)
_SUFFIXES = _words("/ // .json . %20 ;x ;x=/y %3Fa %253Fa %23 /. /x/.. %2f %00 /..; %")
_METHODS = _words("HEAD OPTIONS QUERY PUT POST GET PATCH DELETE get Post PURGE TRACE")


@st.composite
def _path(draw: st.DrawFn, path: str) -> str:
    """Some spelling of a path."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        kind, at = draw(st.integers(0, 9)), draw(st.integers(0, max(0, len(path) - 1)))
        if kind <= 2 and path:
            code = f"%{ord(path[at]) % 256:02x}"
            code = draw(st.sampled_from([code, code.upper(), code.replace("%", "%25"), code.replace("%", "%2525")]))
            path = path[:at] + code + path[at + 1 :]
        elif kind == 3:
            path = quote(quote(path, safe=""), safe=draw(st.sampled_from(["", "%", "%/"]))) or path
            path = path if _rarely(draw, 3) else "/" + path.removeprefix("%2F").removeprefix("%252F")
        elif kind == 4:
            path = draw(st.sampled_from(_PREFIXES)) + path
        elif kind == 5:
            path += draw(st.sampled_from(_SUFFIXES))
        elif kind == 6:
            path = draw(st.sampled_from([path.upper(), path.title(), path.swapcase()]))
        elif kind == 7:
            slashes = [found.start() for found in re.finditer("/", path)] or [0]
            at = draw(st.sampled_from(slashes))
            path = path[:at] + draw(st.sampled_from(_INSERTED)) + path[at + 1 :]
        else:
            path = path[:at] + draw(st.sampled_from(_INSERTED)) + path[at:]
    return path


_NAMES = ["version", "version", "model", "model", "destination", "deployment", "owner", "name", "data"]
_OTHERS = [("input", '{"text":"hi"}'), ("stream", "false"), ("x", "NaN"), ("hardware", '"cpu"'), ("X", "1e999")]
_VALUES = [
    *(["acme/good"] * 6 + [*_MODEL_PATHS, *_DEPLOYMENT_PATHS, *_VERSION_IDS]),
    *_words("evil acme good bad official"),
    *(f"{name}:{id}" for name in ("acme/good", "acme/tuned-1", "evil/bad") for id in (GOOD, BAD)),
    *(" evil/bad:" + BAD, f"acme/good:{GOOD}:{BAD}", f"acme/good/../../evil/bad:{BAD}", "acme/good\0evil", ""),
]


@st.composite
def _name(draw: st.DrawFn, name: str) -> str:
    """Some spelling of a member's name."""
    kind = draw(st.integers(0, 15))
    at = draw(st.integers(0, len(name) - 1))
    if kind == 11:
        return f'"{name[:at]}\\u{ord(name[at]):04{draw(st.sampled_from("xX"))}}{name[at + 1 :]}"'
    if kind == 12:
        return json.dumps(draw(st.sampled_from([name.upper(), name.title(), name[:at] + name[at:].upper()])))
    if kind == 13:
        return json.dumps(name + draw(st.sampled_from(["\0", "\ud800", "[]", " ", "\n", '"'])))
    if kind == 14:
        return json.dumps(draw(st.sampled_from([" " + name, name.replace("s", "\u017f"), "\ufeff" + name, "$" + name])))
    return json.dumps(name)


@st.composite
def _object(draw: st.DrawFn, needs: tuple[tuple[str, str], ...]) -> str:
    members = [(json.dumps(name), json.dumps(value)) for name, value in needs if not _rarely(draw, 8)]
    members += [(json.dumps(name), value) for name, value in _OTHERS[:1]]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        value = json.dumps(draw(st.sampled_from(_VALUES)))
        if _rarely(draw, 6):
            value = draw(st.sampled_from(["null", "1", f"[{value}]", f'{{"version":{value}}}', "{}"]))
        members.insert(draw(st.integers(0, len(members))), (draw(_name(draw(st.sampled_from(_NAMES)))), value))
    if _rarely(draw, 6):
        name, value = draw(st.sampled_from(_OTHERS))
        members.append((json.dumps(name), value))
    return "{" + ",".join(f"{name}:{value}" for name, value in members) + "}"


@st.composite
def _text(draw: st.DrawFn, needs: tuple[tuple[str, str], ...]) -> str:
    text = draw(_object(needs))
    kind = draw(st.integers(0, 19))
    if kind >= 14:
        other = draw(_object(needs))
        text = [
            f'{{"data":{text}}}',
            f' {{ "data" : {{"data":{text}}}}}',
            f'{{"data":{other},"data":{text}}}',
            f'{text[:-1]},"data":{other}}}',
            f'{{"data":{other},{text[1:]}',
            f'{{"Data":{text}}}',
        ][kind - 14]
    ending = draw(st.sampled_from(["", "", "", "", "", "\n", " x", "{}", "\0", ",", "}", text, "//"]))
    if _rarely(draw, 12):
        text = draw(
            st.sampled_from([f"[{text}]", f"/**/{text}", f"\0{text}", f'{{"x":{"[" * 3000}', "[" * 2000 + text])
        )
    return text + ending


@st.composite
def _form(draw: st.DrawFn, needs: tuple[tuple[str, str], ...]) -> str:
    pairs = [*needs, (draw(st.sampled_from(_NAMES)), draw(st.sampled_from(_VALUES)))]
    if draw(st.booleans()):
        return "&".join(f"{name}={quote(value, safe='/:')}" for name, value in pairs)
    parts = (f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in pairs)
    return "".join(parts) + "--b--\r\n"


_CONTENT_TYPES = [
    *["application/json"] * 8,
    *('application/json;charset="UTF-8"', "application/json; charset=utf-16", "application/json;charset=latin-1"),
    *("application/json; charset=utf-8; x=y", "application/JSON; a=b", "application/json, text/plain"),
    *("application/vnd.api+json", "text/json", "text/plain", "*/*", ""),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=b"),
]


@st.composite
def _body(draw: st.DrawFn, needs: tuple[tuple[str, str], ...]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    headers: list[tuple[bytes, bytes]] = []
    text = draw(_form(needs)) if _rarely(draw, 10) else draw(_text(needs))
    charset = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]))
    body = text.encode(charset, "replace" if charset == "utf-7" else "surrogatepass")
    if _rarely(draw, 100):
        body = draw(st.sampled_from([b" " * (1 << 20) + body, body + b"\n" * (1 << 20)]))
    kind = draw(st.integers(0, 23))
    if kind in (20, 21):
        body = gzip.compress(body)
    if kind in (21, 22, 23):
        coding = draw(st.sampled_from([b"gzip", b"identity", b"x-gzip", b"deflate", b"GZIP", b"br"]))
        headers.append((b"content-encoding", coding))
    for _ in range(2 if _rarely(draw, 30) else 1):
        content_type = draw(st.sampled_from(_CONTENT_TYPES))
        if content_type:
            headers.append((b"content-type", content_type.encode()))
    return body, headers


_HEADERS = [
    (b"x-http-method-override", b"DELETE"),
    (b"x-http-method", b"GET"),
    (b"x-original-url", b"/v1/webhooks/default/secret"),
    (b"x-rewrite-url", b"/v1/predictions"),
    (b"range", b"bytes=0-100000"),
    (b"range", b"bytes=10-"),
    (b"if-none-match", b"*"),
    (b"if-match", b'"x"'),
    (b"if-modified-since", b"Thu, 01 Jan 1970 00:00:00 GMT"),
    (b"accept-encoding", b"gzip"),
    (b"accept", b"text/html"),
    (b"connection", b"content-type"),
    (b"connection", b"content-encoding, close"),
    (b"content_type", b"text/plain"),
    (b"x-portkey-config", b'{"retry":{"attempts":0}}'),
    (b"x-portkey-custom-host", b"https://evil.test/v1"),
    (b"x-portkey-provider", b"@other"),
    (b"prefer", b"wait=1"),
    (b"authorization", b"Bearer " + OTHER_TOKEN.encode()),
]
_QUERIES = _words(f"version={BAD} model=evil/bad _method=DELETE cursor=x a#b version=evil%2Fbad /../webhooks")


@dataclass(frozen=True)
class Asked:
    """A request as a caller sends it."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    chunks: tuple[bytes, ...]


_FILLED = [
    (operation, *PATHS[operation].split(" "))
    for operation in (*PATHS, *NAMING, *NAMING, *LISTS, *_words("predictions.get trainings.get files.get"), SECRET)
]


_BELOW = ["/v1"] * 50 + ["/v1/", "/V1", "/%761", "/v1/[object Object]", "/v1/v1", "/v1%2F"]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    operation, method, path = draw(st.sampled_from(_FILLED))
    names = _DEPLOYMENT_PATHS if operation.startswith("deployments") else _MODEL_PATHS
    path = path.replace("{owner}/{name}", draw(st.sampled_from(names)))
    path = path.replace("{version}", draw(st.sampled_from(_VERSION_IDS)))
    path = path.replace("{slug}", "text-to-image")
    for kind in OWN:
        path = path.replace(f"{{{kind}}}", draw(st.sampled_from([OWN[kind], FOREIGN[kind], FOREIGN[kind].upper()])))
    aim = draw(st.sampled_from(["path", "body", "head", "all"])) if method not in ("GET", "DELETE") else "path"
    if aim in ("path", "all"):
        path = draw(_path(path))
    if aim != "body" and _rarely(draw, 8):
        method = draw(st.sampled_from(_METHODS))
    below = "/v1" if aim == "body" else draw(st.sampled_from(_BELOW))
    if aim != "body" and _rarely(draw, 15):
        path = path.removeprefix("/")
    target = (below + path).encode().decode("latin-1")
    if aim != "body" and _rarely(draw, 6):
        target += "?" + draw(st.sampled_from(_QUERIES))
    chunks: list[bytes] = [b""]
    headers: list[tuple[bytes, bytes]] = []
    if method not in ("GET", "HEAD") or _rarely(draw, 20):
        version = draw(st.sampled_from(["acme/good:" + GOOD, "acme/official", "evil/bad:" + BAD, GOOD, BAD]))
        model = draw(st.sampled_from(["acme/good", "evil/bad", "acme/tuned-1"]))
        needs: tuple[tuple[str, str], ...] = {
            "predictions.create": (("version", version),),
            "trainings.create": (("destination", model),),
            "deployments.create": (("name", "new"), ("model", model), ("version", version.rpartition(":")[2])),
            "deployments.update": (("version", version),),
            "models.create": (("owner", model.partition("/")[0]), ("name", model.partition("/")[2])),
        }.get(operation, ())
        body, headers = draw(_body(needs))
        cut = draw(st.integers(0, len(body)))
        chunks = [body] if draw(st.booleans()) else [body[:cut], body[cut:]]
        if draw(st.booleans()):
            headers.append((b"content-length", str(len(body)).encode()))
    for _ in range(0 if aim == "body" else draw(st.sampled_from([0, 0, 0, 1, 2]))):
        headers.append(draw(st.sampled_from(_HEADERS)))
    return Asked(method, target, tuple(headers), tuple(chunks))


# --- one exchange


@dataclass(frozen=True)
class Outcome:
    arrived: list[RecordedRequest]
    status: int
    headers: list[tuple[bytes, bytes]]
    content: bytes


class Proxies:
    """The middleware with each of some rules and settings, in one event loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._transport = _ToReplicate()
        self._apps: dict[tuple[int, bool, bool], Any] = {}
        self._asked: set[tuple[Any, ...]] = set()

    def ask(self, asked: Asked, rules: Rules, *, unwrap: bool = True, lookup: bool = False) -> Outcome:
        self._transport.fake = fake = _replicate()
        app = self._apps.get((id(rules), unwrap, lookup)) or self._app(rules, unwrap=unwrap, lookup=lookup)
        scope = http_scope(asked.method, asked.target, [KEY, *asked.headers])
        caller = Caller(list(asked.chunks))
        self._runner.run(caller.call(app, scope))
        assert caller.status is not None
        return Outcome(fake.requests, caller.status, caller.headers, caller.content)

    def _app(self, rules: Rules, *, unwrap: bool, lookup: bool) -> Any:
        store = MemoryPredictionStore()
        for ids, tenant in ((OWN, "team-a"), (FOREIGN, "team-b")):
            for one in ids.values():
                self._runner.run(store.put(one, StoredPrediction(tenant=tenant)))
        app = proxy(
            "http://127.0.0.1/v1",
            key_resolver=StaticKeyResolver(
                ReplicateKey(TOKEN, tenant="team-a", policy=rules.policy), api_keys=[KEY[1].decode()]
            ),
            store=store,
            transport=self._transport,
            options={"unwrap_data": unwrap, "lookup_versions": lookup},
        )
        self._apps[id(rules), unwrap, lookup] = app
        return app

    def is_new(self, *asked: Any) -> bool:
        """Whether it has not been asked before: half of what hypothesis makes are repetitions."""
        new = asked not in self._asked
        self._asked.add(asked)
        return new

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(scope="module")
def proxies() -> Iterator[Proxies]:
    made = Proxies()
    yield made
    made.close()


_CURSORS = re.compile(rb'"(?:next|previous)": ?"[^"]*"')
_RULE = re.compile(r"(operations|models|own_predictions|max_in_flight|expires_at): ")


def leaked(outcome: Outcome) -> set[str]:
    """What an answer tells of the other tenant's. Cursors are Replicate's."""
    content = _CURSORS.sub(b"", outcome.content)
    with suppress(zlib.error):
        content += zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(outcome.content)
    said = b"\n".join((content, *(value for _, value in outcome.headers)))
    return {mark for mark in (CANARY, *FOREIGN.values(), "team-b", TOKEN) if mark.encode() in said}


def wrong(outcome: Outcome, rules: Rules, *, lookup: bool) -> set[str]:
    """All that may not be, in one exchange."""
    found = set()
    for request in outcome.arrived:
        found |= reached(request, rules, lookup=lookup)
        assert request.header("authorization") == f"Bearer {TOKEN}"
    refusal = _refusal(outcome)
    if rules.own or refusal or not outcome.arrived:
        found |= {f"told: {mark}" for mark in leaked(outcome)}
    if refusal:
        status, code, message = refusal
        by_rule = (status, code) in ((403, "permission_denied"), (404, "not_found")) and _RULE.match(message)
        if not by_rule and (status, code) not in ((400, "bad_request"), (405, "method_not_allowed")):
            found.add(f"refusal: {status} {message}")
    elif not outcome.arrived and outcome.content not in (b"", b"host"):
        found.add(f"answer: {outcome.status}")
    return found


def _refusal(outcome: Outcome) -> tuple[int, str, str] | None:
    """Status, code and text of an answer of the proxy's own."""
    with suppress(ValueError, LookupError, TypeError):
        error = json.loads(outcome.content)["error"]
        return outcome.status, error["code"], error["message"]
    return None


# Without shrinking, which takes longer than a test may.
any_spelling = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@settings(any_spelling, max_examples=1000)
@given(requests(), st.booleans(), st.booleans())
def test_nothing_forbidden_arrives(proxies: Proxies, asked: Asked, unwrap: bool, lookup: bool) -> None:
    for name, rules in RULES.items() if proxies.is_new(asked, unwrap, lookup) else ():
        outcome = proxies.ask(asked, rules, unwrap=unwrap, lookup=lookup)
        assert (name, wrong(outcome, rules, lookup=lookup)) == (name, set())


def _post(target: str, body: bytes, *headers: tuple[bytes, bytes], method: str = "POST") -> Asked:
    return Asked(method, target, headers or ((b"content-type", b"application/json"),), (body,))


def _get(target: str) -> Asked:
    return Asked("GET", target, (), (b"",))


# What Replicate as it is would not fall for; servers in front of it might.
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("own_predictions", _get("/v1/models/..;/predictions")),
        ("own_predictions", _get("/v1/models/x/..;/..;/predictions")),
        ("own_predictions", _get("/v1/models/..;x=y/files")),
        ("own_predictions", _get("/v1/files/;x")),
        ("operations", _get("/v1/models/..;/account")),
        ("operations", _get("/v1/predictions/x+y")),
        ("default", _get("/v1/webhooks/default/secret.json")),
        ("default", _get("/v1/x%253F/%252e%252e/webhooks/default/secret")),
        ("default", _get("/v1/webhooks%EF%BC%8Fdefault/secret")),
        ("default", _get("/v1/webhooks/default/se%250acret")),
        ("models", _post("/v1/predictions", b'{"version":"%s","model":"acme/good","input":{}}' % BAD.encode())),
        ("models", _post("/v1/predictions", b'{"version":"acme/good","data":{"version":"evil/bad"},"input":{}}')),
        ("models", _post("/v1/models/acme/official/predictions", b'{"data":{"version":"evil/bad","input":{}}}')),
        ("models", _post("/v1/deployments/acme/allowed", b'{"data":{"version":"%s"}}' % BAD.encode(), method="PATCH")),
        ("models", _post("/v1/predictions", b'{"version":"acme/good","version":"evil/bad","input":{}}')),
        ("models", _post("/v1/predictions", b'{"version":"evil/bad","version":"acme/good","input":{}}')),
        ("models", _post("/v1/predictions?version=evil/bad", b'{"version":"acme/good","input":{}}')),
        ("models", _post("/v1/predictions", b'{"version":"acme/good","version\\u0000":"evil/bad","input":{}}')),
    ],
)
def test_spellings_that_a_server_may_fall_for(proxies: Proxies, name: str, asked: Asked) -> None:
    for lookup in (False, True):
        outcome = proxies.ask(asked, RULES[name], unwrap=False, lookup=lookup)
        assert [one for one in outcome.arrived if one.operation != "models.versions.get"] == []
        assert wrong(outcome, RULES[name], lookup=lookup) == set()
        assert outcome.status in (403, 404)


@pytest.mark.parametrize("name", ["models", "all"])
def test_a_training_of_another_model_s_version(proxies: Proxies, name: str) -> None:
    asked = _post(f"/v1/models/acme/good/versions/{BAD}/trainings", b'{"destination":"acme/good","input":{}}')
    outcome = proxies.ask(asked, RULES[name], lookup=True)
    assert outcome.status == 403
    assert {request.operation for request in outcome.arrived} == {"models.versions.get"}


# --- what shows that a bypass would be seen


PREDICT = b'{"version":"acme/good:%s","input":{}}' % GOOD.encode()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        _post("/v1/predictions", PREDICT),
        _post("/v1/predictions", b'{"data": ' + PREDICT + b"}"),
        Asked(
            "POST",
            "/v1predictions",
            ((b"content-type", b"application/json; charset=utf-8"),),
            (PREDICT[:5], PREDICT[5:]),
        ),
        _post("/v1/predictions", b'{"version":"acme/official","input":{}}'),
        _post(f"/v1/models/acme/good/versions/{GOOD}/trainings", b'{"destination":"acme/tuned-1","input":{}}'),
        _get(f"/v1/predictions/{OWN['prediction']}"),
        _get(f"/v1/%70redictions%2F{OWN['prediction']}"),
        _get(f"/v1/files/{OWN['file']}"),
        _get("/v1/models/acme/good/readme"),
    ],
)
def test_what_is_allowed_arrives(proxies: Proxies, name: str, lookup: bool, asked: Asked) -> None:
    outcome = proxies.ask(asked, RULES[name], lookup=lookup)
    assert outcome.arrived
    assert outcome.arrived[-1].method == asked.method
    assert wrong(outcome, RULES[name], lookup=lookup) == set()


def test_without_a_policy_forbidden_things_arrive(proxies: Proxies) -> None:
    found: Counter[tuple[str, str]] = Counter()
    told: Counter[str] = Counter()

    @settings(any_spelling, max_examples=1000)
    @given(requests(), st.booleans())
    def count(asked: Asked, unwrap: bool) -> None:
        if not proxies.is_new("open", asked, unwrap):
            return
        outcome = proxies.ask(asked, OPEN, unwrap=unwrap)
        told.update(leaked(outcome))
        for name, rules in RULES.items():
            for request in outcome.arrived:
                found.update((name, one.partition(":")[0]) for one in reached(request, rules))

    count()
    assert CANARY in told
    for name, kinds in {
        "default": ["operation"],
        "models": ["operation", "model"],
        "operations": ["operation"],
        "own_predictions": ["prediction", "training", "file"],
        "all": ["operation", "model", "prediction", "training", "file"],
    }.items():
        for kind in kinds:
            assert found[name, kind], (name, kind)


EVIL = '{"version":"evil/bad","input":{}}'


@pytest.mark.parametrize(
    ("name", "method", "target", "body"),
    [
        ("default", "HEAD", "/v1//Webhooks%252Fdefault/x/..;/secret.json;y", b""),
        ("default", "GET", "/v1/x/%252e%252e/webhooks%5Cdefault/secret/", b""),
        ("operations", "GET", "/v1/%2570redictions", b""),
        ("operations", "PUT", "/v1/predictions", b""),
        ("own_predictions", "GET", f"/v1/predictions/{FOREIGN['prediction'].upper()}", b""),
        ("own_predictions", "GET", f"/v1/predictions/{OWN['prediction']}/%2e%2e/{FOREIGN['prediction']}", b""),
        ("own_predictions", "POST", f"/v1/trainings/x%252F..%252F{FOREIGN['training']}/cancel", b""),
        ("own_predictions", "GET", f"/v1/files/{FOREIGN['file']};x/download", b""),
        ("own_predictions", "GET", "/v1/models/..;/predictions", b""),
        ("models", "GET", "/v1/models/evil%2Fbad", b""),
        ("models", "GET", "/v1/models/acme/good/..;/..;/evil/bad", b""),
        ("models", "POST", f"/v1/models/evil/bad/versions/{BAD}/trainings", b"{}"),
        ("models", "POST", "/v1/predictions?version=evil/bad", b"{}"),
        *(
            ("models", "POST", "/v1/predictions", body)
            for body in (
                EVIL.encode(),
                EVIL.encode("utf-8-sig"),
                EVIL.encode("utf-16"),
                EVIL.encode("utf-32"),
                EVIL.encode("utf-16-be"),
                gzip.compress(EVIL.encode(), mtime=0),
                zlib.compress(EVIL.encode()),
                b"\0 // x" + EVIL.encode() + b"x",
                b'{"version":"acme/good","version":"evil/bad"}',
                b'{"version":"evil/bad","version":"acme/good"}',
                b'{"version":"acme/good","\\u0076ersion":"evil/bad"}',
                b'{"version":"acme/good","VERSION ":"evil/bad"}',
                b'{"version":"acme/good","model":"evil/bad"}',
                b'{"version":"acme/good","deployment":"acme/forbidden"}',
                b'{"version":"%s","model":"acme/good"}' % GOOD.encode(),
                b'{"version":" evil/bad\\u0000"}',
                b'{"version":"evil%2fbad"}',
                b'{"version":"acme/good","data":[' + EVIL.encode() + b"]}",
                b'{"data":{"data":' + EVIL.encode() + b"}}",
                json.dumps({"data": EVIL}).encode(),
                b"version=evil/bad",
                b'--b\r\ncontent-disposition: form-data; name="version"\r\n\r\nevil/bad\r\n--b--',
            )
        ),
    ],
)
def test_the_judge_reads_leniently(name: str, method: str, target: str, body: bytes) -> None:
    request = RecordedRequest(
        method=method, target=target.encode(), headers=[], body=body, complete=True, operation=None, at=0
    )
    assert reached(request, RULES[name]) != set()
    assert reached(request, OPEN) == set()


def test_the_judge_knows_whose_a_version_is() -> None:
    body = b'{"version":"acme/good:%s"}' % BAD.encode()
    request = RecordedRequest(
        method="POST", target=b"/v1/predictions", headers=[], body=body, complete=True, operation=None, at=0
    )
    # Without lookups it is taken for what it says.
    assert reached(request, RULES["models"]) == set()
    assert reached(request, RULES["models"], lookup=True) == {"model: evil/bad"}
