"""Checks of what goes into models and comes out of them: async callables of the host, see `checks.contract`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checks.contract import Check
from ..checks.guard import Guard, id_of
from ..checks.lists import checked_list
from ..checks.reading import MAX_INPUT, input_of, object_of, plain_body
from ..checks.running import Result, first, hook_results, with_hook_results
from ..errors import GuardrailDenied, GuardrailFailed, PermissionDenied
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for_plain, held, with_body
from ..model_names import NotUnderstood

FLAGGED = 246

_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")


def guardrails(
    *, input: Sequence[Check] = (), output: Sequence[Check] = (), timeout: float = 5.0, fail_open: bool = False
) -> Layer:
    """Have checks look at the input of every create of a prediction or training, and at the output of predictions.

    An input is checked before anything goes up. An output is checked wherever it passes in an answer: that of a create,
    of a poll, of a cancellation, and each in a list, finished or not; so a check may see one output several times.
    `flag` lets an answer pass with status 246 and a member `hook_results`; `deny` is a 446 in its place. A list keeps
    its status, and its items have `hook_results` of their own; of one that is denied, or whose checks fail, `output` is
    null and `logs` are empty.

    Not seen here: event streams behind `urls.stream`, files behind URLs in an output, what Replicate sends to webhooks,
    logs, outputs of trainings, and the examples in the catalogue. List this layer once, and before those that remember
    answers: what they give is checked, too, and a create whose output is denied has been paid.

    Args:
        input: checks of inputs, asked all at once. The first that denies, in this order, gives the reason.
        output: checks of outputs, in the same way.
        timeout: seconds for the checks of an input, of an output, or of a list; by default five, since a caller waits
            as long, on top of what Replicate takes.
        fail_open: whether that passes which could not be checked: because a check raised, took too long or returned
            something else; because the body is no plain JSON in UTF-8 with each name once, or is longer than 1 MiB (an
            input) or 8 MiB (an answer); or because Replicate's API is not known to have such an operation. By default
            that is a 503 (the last a 403), and of an input nothing is sent. A `ProxyError` of a check, such as
            `PermissionDenied`, is the answer in any case.

    Raises:
        ValueError: an option is not what it should be; the text names it.
    """
    for name, checks in (("input", input), ("output", output)):
        if not isinstance(checks, Sequence) or not all(map(callable, checks)):
            raise ValueError(f"{name}: must be a sequence of async callables")
    if not 0 < timeout < math.inf:
        raise ValueError("timeout: must be more than 0 seconds, and finite")
    inputs, outputs = tuple(input), tuple(output)

    def layer(forward: Forward) -> Forward:
        async def guarded(request: ProxyRequest) -> ProxyResponse:
            guard = Guard(request, forward, timeout=timeout, fail_open=fail_open)
            if _may_be_something_else(request, outputs):
                guard.failed("path", PermissionDenied("guardrails: Replicate's API is not known to have this path."))
            operation, before = request.route.details, list[Result]()
            if inputs and operation and operation.creates in ("prediction", "training"):
                request, before = await _check_input(guard, inputs, request)
            checks = outputs if _may_have_output(request) else ()
            if not checks and not first(before, "flag"):
                return await forward(request)
            response = await forward(_asking_for_all(request))
            if not 200 <= response.status < 300 or response.status == 204:
                return response
            response, body = await plain_body(response)
            try:
                return await _checked(guard, checks, request, response, body, before)
            except NotUnderstood as error:
                if checks:
                    guard.failed("answer", _for_good(f"guardrails: {error}, so what it puts out cannot be checked."))
                return response

        return guarded

    return layer if inputs or outputs else lambda forward: forward


def _may_be_something_else(request: ProxyRequest, output: Sequence[Check]) -> bool:
    """Whether a server behind us might take this for what is checked here."""
    if request.method in ("HEAD", "OPTIONS") or (request.method == "GET" and not output):
        return False
    return request.operation is None or not all(map(_PLAIN.fullmatch, request.route.params.values()))


def _asking_for_all(request: ProxyRequest) -> ProxyRequest:
    headers = tuple(pair for pair in request.headers if pair[0] not in (b"range", b"if-match"))
    return asking_for_plain(replace(request, headers=headers))


async def _check_input(
    guard: Guard, checks: Sequence[Check], request: ProxyRequest
) -> tuple[ProxyRequest, list[Result]]:
    request, body, is_whole = await held(request, max_size=MAX_INPUT)
    try:
        if not is_whole:
            raise NotUnderstood(f"the body has more than {MAX_INPUT} bytes")
        value, named = input_of(request, body)
    except NotUnderstood as error:
        guard.failed("body", _for_good(f"guardrails: {error}, so what goes in cannot be checked; nothing was sent."))
        return request, []
    before = await guard.input(checks, value, named)
    if denied := first(before, "deny"):
        raise _denial("guardrails", denied, hook_results(before=before))
    if failed := first(before, "failed"):
        guard.failed(failed.check, GuardrailFailed("guardrails: a check failed; nothing was sent, try again."))
    return request, before


def _may_have_output(request: ProxyRequest) -> bool:
    operation = request.route.details
    if operation is None or request.method == "HEAD":
        return False
    return operation.id == "predictions.list" or "prediction" in (operation.creates, operation.reads)


async def _checked(
    guard: Guard,
    checks: Sequence[Check],
    request: ProxyRequest,
    response: ProxyResponse,
    body: bytes | None,
    before: Sequence[Result],
) -> ProxyResponse:
    answer, text = await object_of(body)
    if request.operation == "predictions.list":
        shown = await checked_list(guard, checks, text, answer)
        return response if shown is text else with_body(response, shown.encode())
    after: Sequence[Result] = ()
    if checks and answer.get("output") is not None:
        after = await _check_output(guard, checks, request, answer, before)
    if not first([*before, *after], "flag"):
        return response
    shown = with_hook_results(text, hook_results(before=before, after=after))
    return replace(with_body(response, shown.encode()), status=FLAGGED)


async def _check_output(
    guard: Guard,
    checks: Sequence[Check],
    request: ProxyRequest,
    prediction: Mapping[str, Any],
    before: Sequence[Result],
) -> Sequence[Result]:
    after = await guard.output(checks, prediction, seconds=guard.timeout)
    what = f"guardrails: output of {id_of(prediction) or 'this prediction'}"
    if denied := first(after, "deny"):
        raise _denial(what, denied, hook_results(before=before, after=after))
    if failed := first(after, "failed"):
        error = GuardrailFailed(f"{what}: a check failed; read it again.")
        # What was created is not to be created again.
        guard.failed(failed.check, error if request.method == "GET" else _for_good(error.message))
    return after


def _denial(what: str, denied: Result, hooks: Mapping[str, Any]) -> GuardrailDenied:
    reason = denied.verdict.reason if denied.verdict else ""
    return GuardrailDenied(f"{what}: {denied.check}: {reason}", hook_results=hooks)


def _for_good(message: str) -> GuardrailFailed:
    """Without the advice to try again."""
    return GuardrailFailed(message, headers=())
