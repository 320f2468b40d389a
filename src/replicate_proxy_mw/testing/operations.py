"""The 37 operations of Replicate's OpenAPI document, in its order, each under its operation id.

Every function answers one request of an account. What an operation may answer is the document's word; the text of
errors is as recorded where a recording exists.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .catalogue import COLLECTIONS, HARDWARE, FakeModel, FakeVersion
from .clock import until
from .predictions import WEBHOOK_EVENTS, Job, duration, outcome, prefer_wait
from .problems import Problem, check, problem
from .state import FILE_LIFETIME, Account, Deployment, Promise, StoredFile, World, new_id

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request for an operation; `params` are those of the path."""

    world: World
    account: Account
    request: Request
    params: dict[str, str]
    api_url: str

    @property
    def now(self) -> float:
        return self.world.clock.now()

    async def json(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The body, which has to follow `schema`; no body at all is an empty object."""
        body = await self.request.body()
        media_type = self.request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if body and media_type != "application/json":
            raise problem(415, f'Unsupported media type "{media_type}" in request.')
        try:
            value = json.loads(body or b"{}")
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # has to come out again
        except (ValueError, RecursionError) as exc:
            raise problem(400, f"JSON parse error - {exc}") from None
        check(value, {"type": "object", **schema})
        found: dict[str, Any] = value
        return found


Handler: TypeAlias = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """`public`: answers without a token."""

    method: str
    path: str
    id: str
    handler: Handler
    public: bool

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", self.path) + r"\Z", re.DOTALL)


OPERATIONS: list[Operation] = []


def operation(method: str, path: str, operation_id: str, *, public: bool = False) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        OPERATIONS.append(Operation(method, path, operation_id, handler, public))
        return handler

    return register


def _page(call: Call, items: Sequence[T], *, key: Callable[[T], str], show: Callable[[T], Any], size: int) -> Response:
    """A page of `items` with absolute `next` and `previous`, by a cursor that holds the key beside it."""
    size = call.world.page_size or size
    start = 0
    if cursor := call.request.query_params.get("cursor"):
        try:
            direction, _, mark = base64.b64decode(cursor, b"-_", validate=True).decode().partition("=")
            index = [key(item) for item in items].index(mark)
        except (ValueError, binascii.Error):
            raise problem(404, "Invalid cursor") from None
        start = index + 1 if direction == "p" else max(0, index - size)
    page = items[start : start + size]

    def link(direction: str, item: T) -> str:
        mark = base64.urlsafe_b64encode(f"{direction}={key(item)}".encode()).decode()
        kept = [pair for pair in call.request.query_params.multi_items() if pair[0] != "cursor"]
        path = quote(call.request.scope["path"]).removeprefix("/v1")
        return f"{call.api_url}{path}?{urlencode([('cursor', mark), *kept])}"

    return JSONResponse(
        {
            "next": link("p", page[-1]) if page and start + size < len(items) else None,
            "previous": link("r", page[0]) if page and start else None,
            "results": [show(item) for item in page],
        }
    )


def _choice(call: Call, name: str, choices: Sequence[str]) -> str | None:
    value = call.request.query_params.get(name)
    if value is not None and value not in choices:
        raise problem(422, f"- {name}: must be one of {', '.join(choices)}\n")
    return value


def _moment(call: Call, name: str) -> float | None:
    value = call.request.query_params.get(name)
    if value is None:
        return None
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", value, re.ASCII) is None:
            raise ValueError
        return datetime.fromisoformat(value.upper()).timestamp()
    except (ValueError, OverflowError):
        raise problem(422, f"- {name}: must be a date-time in ISO 8601 format\n") from None


# account, collections ------------------------------------------------------------------------------------------------


@operation("GET", "/account", "account.get")
async def account_get(call: Call) -> Response:
    return JSONResponse(call.account.as_json())


@operation("GET", "/collections", "collections.list")
async def collections_list(call: Call) -> Response:
    def show(slug: str) -> dict[str, str]:
        name, description, _ = COLLECTIONS[slug]
        return {"name": name, "slug": slug, "description": description}

    return _page(call, [*COLLECTIONS], key=str, show=show, size=100)


@operation("GET", "/collections/{collection_slug}", "collections.get")
async def collections_get(call: Call) -> Response:
    slug = call.params["collection_slug"]
    if slug not in COLLECTIONS:
        raise problem(404)
    name, description, names = COLLECTIONS[slug]
    return JSONResponse(
        {
            "name": name,
            "slug": slug,
            "description": description,
            "full_description": f"## Overview\n\n{description}",
            "models": [_model_json(call, call.world.models[full_name]) for full_name in names],
        }
    )


# deployments ---------------------------------------------------------------------------------------------------------

_RELEASE: dict[str, Any] = {
    "hardware": {"type": "string"},
    "max_instances": {"type": "integer", "minimum": 0, "maximum": 20},
    "min_instances": {"type": "integer", "minimum": 0, "maximum": 5},
    "version": {"type": "string"},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _deployment(call: Call) -> Deployment:
    found = call.account.deployments.get(call.params["deployment_name"])
    if found is None or found.owner != call.params["deployment_owner"]:
        raise problem(404)
    return found


def _name(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise problem(422, "- body.name: must consist of letters, digits, dots, dashes and underscores\n")
    return name


def _release(call: Call, body: dict[str, Any], model: str) -> dict[str, Any]:
    if "hardware" in body:
        check(body["hardware"], {"enum": [*HARDWARE]}, where="body.hardware")
    found = call.world.model(model, call.account)
    if found is None or ("version" in body and not found.version(body["version"])):
        raise _no_version()
    whole = ("min_instances", "max_instances")  # 1.0 is an integer to JSON Schema
    return {name: int(body[name]) if name in whole else body[name] for name in _RELEASE if name in body}


@operation("GET", "/deployments", "deployments.list")
async def deployments_list(call: Call) -> Response:
    newest = [*reversed(call.account.deployments.values())]
    return _page(call, newest, key=lambda one: one.name, show=lambda one: one.as_json(call.account), size=100)


@operation("POST", "/deployments", "deployments.create")
async def deployments_create(call: Call) -> Response:
    text = {"type": "string"}
    required = ("name", "model", "version", "hardware", "min_instances", "max_instances")
    body = await call.json({"required": required, "properties": {"name": text, "model": text, **_RELEASE}})
    name, owner = _name(body["name"]), call.account.username
    release = _release(call, body, body["model"])
    if name in call.account.deployments:
        raise problem(409, "A deployment with that name already exists")
    made = Deployment(owner=owner, name=name, model=body["model"], created_at=call.now, **release)
    call.account.deployments[name] = made
    return JSONResponse(made.as_json(call.account))


@operation("DELETE", "/deployments/{deployment_owner}/{deployment_name}", "deployments.delete")
async def deployments_delete(call: Call) -> Response:
    del call.account.deployments[_deployment(call).name]
    return Response(status_code=204)


@operation("GET", "/deployments/{deployment_owner}/{deployment_name}", "deployments.get")
async def deployments_get(call: Call) -> Response:
    return JSONResponse(_deployment(call).as_json(call.account))


@operation("PATCH", "/deployments/{deployment_owner}/{deployment_name}", "deployments.update")
async def deployments_update(call: Call) -> Response:
    old = _deployment(call)
    changes = _release(call, await call.json({"properties": _RELEASE}), old.model)
    new = replace(old, number=old.number + 1, created_at=call.now, **changes) if changes else old
    call.account.deployments[old.name] = new
    return JSONResponse(new.as_json(call.account))


@operation("POST", "/deployments/{deployment_owner}/{deployment_name}/predictions", "deployments.predictions.create")
async def deployments_predictions_create(call: Call) -> Response:
    found = _deployment(call)
    body = await call.json(_prediction_schema())
    model = call.world.models[found.model]
    return await _predict(call, body, model, found.version, deployment=f"{found.owner}/{found.name}")


# files ---------------------------------------------------------------------------------------------------------------


def _file(call: Call, account: Account | None) -> StoredFile:
    found = account and account.files.get(call.params["file_id"])
    if not found or call.now >= found.created_at + FILE_LIFETIME:
        raise problem(404, "File not found")
    return found


@operation("GET", "/files", "files.list")
async def files_list(call: Call) -> Response:
    newest = [file for file in reversed(call.account.files.values()) if call.now < file.created_at + FILE_LIFETIME]
    return _page(call, newest, key=lambda one: one.id, show=lambda one: one.as_json(call.api_url), size=100)


@operation("POST", "/files", "files.create")
async def files_create(call: Call) -> Response:
    if not await call.request.body():
        raise problem(422, "- body: content is required\n")
    if not call.request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise problem(415, "Files are uploaded as multipart/form-data.")
    fields: dict[str, bytes] = {}
    part: UploadFile | None = None
    try:
        async with call.request.form() as form:
            for name, value in form.multi_items():  # JavaScript sends `metadata` as a file, with a media type
                if isinstance(value, UploadFile):
                    part = value if name == "content" else part
                    fields[name] = await value.read()
                else:
                    fields[name] = value.encode()
        metadata = json.loads(fields.get("metadata", b"{}"))
        media_type = fields["type"].decode() if "type" in fields else part.content_type if part else None
        filename = fields["filename"].decode() if "filename" in fields else part.filename if part else None
    except (MultiPartException, ValueError) as exc:
        raise problem(422, f"- body: {exc}\n") from None
    check(metadata, {"type": "object"}, where="body.metadata")
    if "content" not in fields:
        raise problem(422, "- body: content is required\n")
    if len((filename or "").encode()) > 255:
        raise problem(422, "- body.filename: must be at most 255 bytes\n")
    if len(fields["content"]) > call.world.max_file_size:
        raise Problem(413, {"detail": "Files must be less than 100MB in size"})
    made = StoredFile(
        id=new_id(),
        name=filename or "file",
        content=fields["content"],
        media_type=media_type or "application/octet-stream",
        metadata=metadata,
        created_at=call.now,
    )
    call.account.files[made.id] = made
    return JSONResponse(made.as_json(call.api_url), 201)


@operation("DELETE", "/files/{file_id}", "files.delete")
async def files_delete(call: Call) -> Response:
    del call.account.files[_file(call, call.account).id]
    return Response(status_code=204)


@operation("GET", "/files/{file_id}", "files.get")
async def files_get(call: Call) -> Response:
    return JSONResponse(_file(call, call.account).as_json(call.api_url))


@operation("GET", "/files/{file_id}/download", "files.download", public=True)  # as the document's example calls it
async def files_download(call: Call) -> Response:
    query = call.request.query_params
    check(dict(query), {"type": "object", "required": ("owner", "expiry", "signature")}, where="query")
    owner, expiry = query["owner"], query["expiry"]
    if re.fullmatch(r"-?\d{1,19}", expiry, re.ASCII) is None:
        raise problem(422, "- query.expiry: must be of type integer\n")
    account = next((one for one in call.world.accounts.values() if one.username == owner), None)
    found = _file(call, account)
    expected = call.world.signature(owner, found.id, expiry)
    if not hmac.compare_digest(expected.encode(), query["signature"].encode()) or int(expiry) < call.now:
        raise problem(404, "File not found")
    return Response(found.content, media_type="application/octet-stream")


# hardware, models ----------------------------------------------------------------------------------------------------


def _model(call: Call) -> FakeModel:
    found = call.world.model(f"{call.params['model_owner']}/{call.params['model_name']}", call.account)
    if found is None:
        raise problem(404)
    return found


def _own_model(call: Call, doing: str) -> FakeModel:
    found = _model(call)
    if found.owner != call.account.username:
        raise problem(403, f"You can only {doing} models you own.")
    return found


def _version(call: Call, model: FakeModel) -> FakeVersion:
    found = model.version(call.params["version_id"])
    if found is None:
        raise problem(404)
    return found


def _examples(call: Call, model: FakeModel) -> list[Job]:
    jobs = []
    for number, given in enumerate(model.examples):
        job_id = hashlib.sha256(f"{model.full_name} {number}".encode()).hexdigest()[:26]
        jobs.append(_job(call, model, model.versions[0].id if model.versions else "hidden", given, example=job_id))
    return jobs


def _model_json(call: Call, model: FakeModel) -> dict[str, Any]:
    example = next(iter(_examples(call, model)), None)
    return {**model.as_json(), "default_example": example and example.as_json(example.ended_at)}


@operation("GET", "/hardware", "hardware.list")
async def hardware_list(call: Call) -> Response:
    return JSONResponse([{"name": name, "sku": sku} for sku, name in HARDWARE.items()])


@operation("GET", "/models", "models.list")
async def models_list(call: Call) -> Response:
    by = _choice(call, "sort_by", ("model_created_at", "latest_version_created_at"))
    ascending = _choice(call, "sort_direction", ("asc", "desc")) == "asc"

    def moment(model: FakeModel) -> float:
        latest = model.versions[0].created_at if model.versions else model.created_at
        return model.created_at if by == "model_created_at" else latest

    public = [model for model in call.world.models.values() if model.visibility == "public"]
    return _models_page(call, sorted(public, key=moment, reverse=not ascending))


def _models_page(call: Call, models: list[FakeModel]) -> Response:
    return _page(call, models, key=lambda one: one.full_name, show=lambda one: _model_json(call, one), size=25)


_URL = re.compile(r"https?://[\w.-]+(:\d+)?(/[\w./~+-]*)?(\?[\w.=&-]*)?(#[\w.-]*)?", re.ASCII)
_MODEL_TEXTS = ("description", "github_url", "license_url", "paper_url")


def _texts(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        # what goes in comes out again, where the schema of a model says `format: uri`
        if name.endswith("_url") and _URL.fullmatch(body.get(name, "https://x")) is None:
            raise problem(422, f"- body.{name}: must be an URL\n")
    return {name: body[name] for name in names if name in body}


@operation("POST", "/models", "models.create")
async def models_create(call: Call) -> Response:
    names = (*_MODEL_TEXTS, "cover_image_url")
    known: dict[str, Any] = {name: {"type": "string"} for name in (*names, "owner", "name", "hardware")}
    known["visibility"] = {"type": "string", "enum": ["public", "private"]}
    body = await call.json({"required": ("owner", "name", "visibility", "hardware"), "properties": known})
    check(body["hardware"], {"enum": [*HARDWARE]}, where="body.hardware")
    if body["owner"] != call.account.username:
        raise problem(403, "You can only create models for your own account.")
    made = FakeModel(
        owner=body["owner"],
        name=_name(body["name"]),
        visibility=body["visibility"],
        created_at=call.now,
        **_texts(body, names),
    )
    if made.full_name in call.world.models:
        raise problem(409, "A model with that name and owner already exists")
    call.world.models[made.full_name] = made
    return JSONResponse(_model_json(call, made), 201)


@operation("QUERY", "/models", "models.search")
async def models_search(call: Call) -> Response:
    # Replicate's JavaScript client sends the text in JSON's quotes, its Python client without
    body = await call.request.body()
    if not body:
        raise problem(422, "- body: the search query is required\n")
    text = body.decode("utf-8", "replace").strip().strip('"')
    described = [replace(model, description=model.description or "") for model in _found(call, text)]  # never null here
    return _models_page(call, described)


def _found(call: Call, text: str) -> list[FakeModel]:
    public = (model for model in call.world.models.values() if model.visibility == "public")
    return [one for one in public if text.lower() in f"{one.full_name} {one.description or ''}".lower()]


@operation("DELETE", "/models/{model_owner}/{model_name}", "models.delete")
async def models_delete(call: Call) -> Response:
    model = _own_model(call, "delete")
    if model.visibility == "public" or model.versions:
        raise problem(403, "You can only delete private models without versions.")
    del call.world.models[model.full_name]
    return Response(status_code=204)


@operation("GET", "/models/{model_owner}/{model_name}", "models.get")
async def models_get(call: Call) -> Response:
    return JSONResponse(_model_json(call, _model(call)))


@operation("PATCH", "/models/{model_owner}/{model_name}", "models.update")
async def models_update(call: Call) -> Response:
    model = _own_model(call, "update")
    names = (*_MODEL_TEXTS, "readme", "weights_url")
    body = await call.json({"properties": {name: {"type": "string"} for name in names}})
    changed = replace(model, **_texts(body, names))
    call.world.models[model.full_name] = changed
    return JSONResponse(_model_json(call, changed))


@operation("GET", "/models/{model_owner}/{model_name}/examples", "models.examples.list")
async def models_examples_list(call: Call) -> Response:
    jobs = _examples(call, _model(call))
    return _page(call, jobs, key=lambda one: one.id, show=lambda one: one.as_json(one.ended_at), size=100)


@operation("POST", "/models/{model_owner}/{model_name}/predictions", "models.predictions.create")
async def models_predictions_create(call: Call) -> Response:
    model = _model(call)
    if not model.official:
        raise problem(404)
    return await _predict(call, await call.json(_prediction_schema()), model, "hidden")


@operation("GET", "/models/{model_owner}/{model_name}/readme", "models.readme.get")
async def models_readme_get(call: Call) -> Response:
    readme = _model(call).readme
    if readme is None:
        return Response(status_code=404)  # without content, in the document
    return Response(readme, media_type="text/plain")


@operation("GET", "/models/{model_owner}/{model_name}/versions", "models.versions.list")
async def models_versions_list(call: Call) -> Response:
    model = _model(call)
    return _page(call, model.versions or (), key=lambda one: one.id, show=model.version_json, size=100)


@operation("DELETE", "/models/{model_owner}/{model_name}/versions/{version_id}", "models.versions.delete")
async def models_versions_delete(call: Call) -> Response:
    model = _own_model(call, "delete versions of")
    version = _version(call, model)
    used = any(
        one.version == version.id for account in call.world.accounts.values() for one in account.deployments.values()
    )
    if model.visibility == "public" or used:
        raise problem(403, "You can only delete versions of private models that no deployment uses.")
    kept = tuple(one for one in model.versions or () if one is not version)
    call.world.models[model.full_name] = replace(model, versions=kept)
    return Response(status_code=202)


@operation("GET", "/models/{model_owner}/{model_name}/versions/{version_id}", "models.versions.get")
async def models_versions_get(call: Call) -> Response:
    model = _model(call)
    return JSONResponse(model.version_json(_version(call, model)))


_HOOK = {
    "webhook": {"type": "string"},
    "webhook_events_filter": {"type": "array", "items": {"type": "string", "enum": [*WEBHOOK_EVENTS]}},
}


@operation("POST", "/models/{model_owner}/{model_name}/versions/{version_id}/trainings", "trainings.create")
async def trainings_create(call: Call) -> Response:
    model = _model(call)
    version = _version(call, model)
    known = {"destination": {"type": "string"}, "input": {"type": "object"}, **_HOOK}
    body = await call.json({"required": ("destination", "input"), "properties": known})
    _hook(body)
    target = call.world.models.get(body["destination"])
    if target is None or target.owner != call.account.username:
        raise problem(404, "The specified training destination does not exist")
    made = secrets.token_hex(32)
    output = {"version": f"{target.full_name}:{made}", "weights": f"https://replicate.delivery/weights/{made}.tar"}
    error = outcome(model.train, body["input"])[1] if model.train else None
    job = _job(call, model, version.id, body["input"], kind="trainings", body=body, result=((output,), error))
    call.account.trainings[job.id] = job
    call.world.promises.append(
        Promise(
            account=call.account,
            training=job.id,
            base=model.full_name,
            destination=target.full_name,
            version=made,
        )
    )
    call.world.deliver(call.account, job)
    return JSONResponse(job.as_json(call.now), 201)


# predictions ---------------------------------------------------------------------------------------------------------


def _prediction_schema(*names: str) -> dict[str, Any]:
    known = {"input": {"type": "object"}, "stream": {"type": "boolean"}, **_HOOK}
    return {
        "required": (*names, "input"),
        "properties": {**known, **{name: {"type": "string"} for name in names}},
        "additionalProperties": False,
    }


def _no_version() -> Problem:
    detail = "The specified version does not exist (or perhaps you don't have permission to use it?)"
    return problem(422, detail, title="Invalid version or not permitted")


def _hook(body: dict[str, Any]) -> None:
    if not re.fullmatch(r"https?://[^\s/?#]+([/?#]\S*)?", body.get("webhook", "https://x")):
        raise problem(422, "- body.webhook: must be an URL\n")


def _job(
    call: Call,
    model: FakeModel,
    version: str,
    given: Mapping[str, Any],
    *,
    kind: Any = "predictions",
    body: dict[str, Any] | None = None,
    result: tuple[tuple[Any, ...], str | None] | None = None,
    example: str = "",
    **more: Any,
) -> Job:
    job_id = example or new_id()
    chunks, error = result or outcome(model.run or (lambda _: None), given)
    here = f"{call.api_url}/{kind}/{job_id}"
    urls = {"web": f"https://replicate.com/p/{job_id}", "get": here, "cancel": f"{here}/cancel"}
    streams = model.streams and kind == "predictions"
    if streams and not example:
        opaque = secrets.token_urlsafe(24)
        call.world.streams[opaque] = (call.account, job_id)
        urls["stream"] = f"{call.world.stream_url}/v1/files/{opaque}"
    return Job(
        id=job_id,
        kind=kind,
        model=model.full_name,
        version=version,
        input=given,
        created_at=model.created_at if example else call.now,
        queue_time=call.world.queue_time if model.queue_time is None else model.queue_time,
        run_time=call.world.run_time if model.run_time is None else model.run_time,
        chunks=chunks,
        streams=streams,
        error=error,
        logs=model.logs,
        urls=urls,
        files_url=f"{call.world.stream_url}/files",
        webhook=(body or {}).get("webhook"),
        webhook_events_filter=(body or {}).get("webhook_events_filter"),
        **more,
    )


async def _predict(
    call: Call, body: dict[str, Any], model: FakeModel, version: str, *, deployment: str | None = None
) -> Response:
    """201 with ``Prefer: wait`` when all outputs are there, 202 when the wait ran out first ("does not yet have all
    outputs"), 201 without waiting. A wait ends early if the caller leaves."""
    headers = call.request.headers
    wait, lifetime = 0.0, None
    if (prefer := headers.get("prefer")) is not None:
        wait = prefer_wait(prefer) or 0.0
        if not wait:
            raise problem(422, "- header.Prefer: must be wait or wait=n, n between 1 and 60 seconds\n")
    if (after := headers.get("cancel-after")) is not None:
        lifetime = duration(after)
        if lifetime is None:
            raise problem(422, "- header.Cancel-After: must be a duration of at least 5 seconds\n")
    _hook(body)
    check(body["input"], model.input_schema, where="input")
    deadline = None if lifetime is None else call.now + lifetime
    job = _job(call, model, version, body["input"], body=body, deployment=deployment, deadline=deadline)
    call.account.predictions[job.id] = job
    call.world.models[model.full_name] = replace(model, run_count=model.run_count + 1)
    call.world.deliver(call.account, job)
    if not wait:
        return JSONResponse(job.as_json(call.now), 201)

    def done() -> bool:
        one = call.account.predictions[job.id]
        return one.ended(call.now) or (bool(one.files()) and one.output_complete(call.now))

    end = job.created_at + wait
    await until(lambda: done() or call.now >= end or call.world.closing, call.request.receive)
    finished = done()
    shown = call.account.predictions[job.id].as_json(call.now, sync=True)
    more = {"preference-applied": f"wait={wait:.0f}"} | ({} if finished else {"location": job.urls["get"]})
    return JSONResponse(shown, 201 if finished else 202, more)


@operation("GET", "/predictions", "predictions.list")
async def predictions_list(call: Call) -> Response:
    after, before = _moment(call, "created_after"), _moment(call, "created_before")
    source = _choice(call, "source", ("web",))

    def wanted(job: Job) -> bool:
        inside = (after is None or job.created_at >= after) and (before is None or job.created_at < before)
        return inside and source in (None, job.source)

    return _jobs_page(call, [job for job in call.account.predictions.values() if wanted(job)])


def _jobs_page(call: Call, jobs: list[Job]) -> Response:
    return _page(call, jobs[::-1], key=lambda one: one.id, show=lambda one: one.as_json(call.now), size=100)


@operation("POST", "/predictions", "predictions.create")
async def predictions_create(call: Call) -> Response:
    body = await call.json(_prediction_schema("version"))
    name, _, version = body["version"].rpartition(":") if ":" in body["version"] else ("", "", body["version"])
    if not name and "/" in version:
        official = call.world.model(version, call.account)
        if official is None or not official.official:
            raise _no_version()
        return await _predict(call, body, official, "hidden")
    for model in [*call.world.models.values()]:
        visible = call.world.model(model.full_name, call.account)
        if visible and visible.version(version) and name in ("", visible.full_name):
            return await _predict(call, body, visible, version)
    raise _no_version()


def _cancel(call: Call, jobs: dict[str, Job], job_id: str) -> Response:
    if job_id not in jobs:
        raise problem(404)
    if not jobs[job_id].ended(call.now):
        jobs[job_id] = replace(jobs[job_id], canceled_at=call.now)
    return JSONResponse(jobs[job_id].as_json(call.now))


def _get(call: Call, jobs: dict[str, Job], job_id: str) -> Response:
    if job_id not in jobs:
        raise problem(404)
    return JSONResponse(jobs[job_id].as_json(call.now))


@operation("GET", "/predictions/{prediction_id}", "predictions.get")
async def predictions_get(call: Call) -> Response:
    return _get(call, call.account.predictions, call.params["prediction_id"])


@operation("POST", "/predictions/{prediction_id}/cancel", "predictions.cancel")
async def predictions_cancel(call: Call) -> Response:
    return _cancel(call, call.account.predictions, call.params["prediction_id"])


# search, trainings, webhooks -----------------------------------------------------------------------------------------


@operation("GET", "/search", "search", public=True)
async def search(call: Call) -> Response:
    query = call.request.query_params
    if "query" not in query:
        raise Problem(400, {"detail": 'Query parameter "query" is required'}, content_type="application/json")
    limit = query.get("limit", "20")
    if re.fullmatch(r"[1-9]|[1-4]\d|50", limit, re.ASCII) is None:
        detail = 'Query parameter "limit" must be between 1 and 50'
        raise Problem(400, {"detail": detail}, content_type="application/json")
    text = query["query"]
    found = [
        {"model": _model_json(call, model), "metadata": {"generated_description": None, "tags": [], "score": 1.0}}
        for model in _found(call, text)[: int(limit)]
    ]
    collections = [
        {"name": name, "slug": slug, "description": description, "models": models}
        for slug, (name, description, models) in COLLECTIONS.items()
        if text.lower() in f"{name} {description}".lower()
    ]
    pages = [{"name": "Create a prediction", "href": "/docs/topics/predictions/create-a-prediction"}]
    found_pages = [page for page in pages if text.lower() in page["name"].lower()]
    return JSONResponse({"query": text, "models": found, "collections": collections, "pages": found_pages})


@operation("GET", "/trainings", "trainings.list")
async def trainings_list(call: Call) -> Response:
    return _jobs_page(call, [*call.account.trainings.values()])


@operation("GET", "/trainings/{training_id}", "trainings.get")
async def trainings_get(call: Call) -> Response:
    return _get(call, call.account.trainings, call.params["training_id"])


@operation("POST", "/trainings/{training_id}/cancel", "trainings.cancel")
async def trainings_cancel(call: Call) -> Response:
    return _cancel(call, call.account.trainings, call.params["training_id"])


@operation("GET", "/webhooks/default/secret", "webhooks.default.secret.get")
async def webhooks_default_secret_get(call: Call) -> Response:
    return JSONResponse({"key": call.account.webhook_secret})
