"""Every error of the proxy: what its class has, the texts that are raised with it, and what the code cannot say."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import replicate_proxy_mw
from replicate_proxy_mw import errors
from replicate_proxy_mw.egress import render
from replicate_proxy_mw.errors import ProxyError
from tests.docs.reference_of_config import text_of

SOURCE = Path(replicate_proxy_mw.__file__).parent

YES = "yes: Replicate has not had it"
CHANGED = "no: change it first"
READS = "a read, yes; a create may have been received, and would be paid twice"
REPLICATE = "Replicate decides"


class Said(NamedTuple):
    """When an error is answered, what its caller should do, and whether the same request may be sent again."""

    when: str
    do: str
    again: str


SAID: Mapping[type[ProxyError], Said] = {
    errors.BadRequest: Said(
        "The request can be read in two ways, or not at all: a header that may come once comes twice, a path has a "
        "`..`, "
        "a config is no JSON. The text names what is wrong. The proxy refuses it before Replicate has it whole.",
        "Mend the request.",
        CHANGED,
    ),
    errors.WebhookUnsigned: Said(
        "A delivery to `/-/webhooks` lacks one of the headers that sign it. Strangers who try the address get this, "
        "too.",
        "Look at what sends there: Replicate always signs.",
        REPLICATE,
    ),
    errors.KeyMissing: Said(
        "There is no key in `x-portkey-api-key` and none in `Authorization`. A key in the URL does not count.",
        "Send the key that your team was given for this app.",
        CHANGED,
    ),
    errors.KeyUnknown: Said(
        "The key resolver does not know the key: it was mistyped, has been revoked, or is one of Replicate's or "
        "Portkey's.",
        "Ask whoever runs the app for a key.",
        CHANGED,
    ),
    errors.WebhookUnverified: Said(
        "No signature of a delivery is right by any of `webhook_secrets`, or its time is more than five minutes from "
        "now.",
        "Compare the secret with the account's, and the clock of the machine with the time.",
        REPLICATE,
    ),
    errors.SpendLimitReached: Said(
        "The layer `limit_spending`: what the tenant may spend today is spent, or reserved for what runs. Nothing "
        "was sent.",
        "Wait until the end of the day (UTC); `retry-after` has the seconds. Runs that end for less free some sooner.",
        "yes, after `retry-after`: Replicate has not had it",
    ),
    errors.PermissionDenied: Said(
        "The key is known and may not do this: its policy says so, a resolver, or a layer of the host. The text "
        "names the "
        "rule first, such as `models` or `operations`. Nothing was sent.",
        "Ask for a key that may, or use what this one may.",
        CHANGED,
    ),
    errors.NotOwned: Said(
        "The key's policy has `own_predictions`, and this prediction, training or file is another tenant's, or there "
        "is none.",
        "Check the id, and the key that it was created with.",
        CHANGED,
    ),
    errors.StreamUnknown: Said(
        "A URL below `/-/streams/` that was not signed with the present `stream_key`.",
        "Read the prediction again: its `urls.stream` is a good one.",
        CHANGED,
    ),
    errors.MethodNotAllowed: Said(
        "TRACE, CONNECT or TRACK; a webhook that is not a POST; a stream that is not read by GET or HEAD. "
        "The latter two name what is allowed in `allow`.",
        "Use the method that the text names.",
        CHANGED,
    ),
    errors.RequestTimeout: Said(
        "The caller's own limit, `x-portkey-request-timeout` or `request_timeout` of its config, was over before "
        "Replicate's "
        "answer began.",
        "Look for the prediction in the list before you create again, or allow more time.",
        READS,
    ),
    errors.BodyTimeout: Said(
        "Nothing more of the caller's body came for `body_timeout`. Replicate got nothing, or a request without its "
        "end.",
        "Look at the network between the caller and the app.",
        "yes: Replicate has not had all of it",
    ),
    errors.WebhookReplayed: Said(
        "A delivery with this `webhook-id` has been taken already.",
        "Nothing: it was handled the first time.",
        REPLICATE,
    ),
    errors.CreateUnknown: Said(
        "The layer `idempotency_keys`: a create with this `Idempotency-Key` was sent before, and its answer was lost.",
        "Look for the prediction in the list. If there is none, create with another key.",
        CHANGED,
    ),
    errors.StreamExpired: Said(
        "The URL of a stream is older than `stream_lifetime`.",
        "Read the prediction again: its `urls.stream` is a new one.",
        CHANGED,
    ),
    errors.BodyTooLarge: Said(
        "The body has more than `max_body_size`; a create with an `Idempotency-Key` has more than 16 MiB; a delivery "
        "of a "
        "webhook has more than 8 MiB.",
        "Upload files by `POST /files`, or to storage of your own, and send their URLs.",
        CHANGED,
    ),
    errors.IdempotencyKeyReused: Said(
        "The layer `idempotency_keys`: this `Idempotency-Key` came before with another path or body. Nothing was sent.",
        "Make a new key for each create.",
        CHANGED,
    ),
    errors.LimitExceeded: Said(
        "The tenant has as many requests under way as its policy's `max_in_flight` allows, or has made as many as "
        "the layer "
        "`limit_requests` allows. Nothing was sent.",
        "Wait for `retry-after` seconds.",
        "yes, after `retry-after`: Replicate has not had it",
    ),
    errors.GuardrailDenied: Said(
        "The layer `guardrails`: a check denies the input, and nothing was sent, or the output, and the prediction "
        "is there "
        "and paid. `hook_results` of the answer says which check, and why.",
        "Change the input.",
        "no: change it first; what has a denied output is paid",
    ),
    errors.ClientDisconnected: Said(
        "The caller closed its connection first. This is for spans and for the host's own log: nobody gets the "
        "answer. What "
        "was created runs on.",
        "Nothing, or give the caller more patience.",
        READS,
    ),
    ProxyError: Said(
        "Something failed that should not: a layer of the host, or the proxy. The log has the name of the "
        "exception's class.",
        "Tell whoever runs the app, with the `request_id`.",
        READS,
    ),
    errors.WebhookFailed: Said(
        "The host's `on_webhook` raised, or took longer than `webhook_timeout`.",
        "Look at the log, which has the name of the exception's class.",
        "Replicate does so by itself",
    ),
    errors.UpstreamUnreachable: Said(
        "No connection to Replicate: DNS, firewall, TLS, or Replicate is down. Not one byte of the request was sent.",
        "Try again later; whoever runs the app looks at its network.",
        YES,
    ),
    errors.UpstreamFailed: Said(
        "Replicate closed the connection before its answer was complete, or what came is no answer that can be "
        "relayed.",
        "Look for the prediction in the list before you create again, unless the text says that nothing was created.",
        READS,
    ),
    errors.GuardrailFailed: Said(
        "The layer `guardrails`: a check raised, took too long, or could not read what it has to check. If that is "
        "an input, "
        "nothing was sent; if it is an output, the text has the prediction's id.",
        "With `retry-after`: try again. Without: what you sent cannot be checked, or the prediction is there already.",
        "only with `retry-after`",
    ),
    errors.Overloaded: Said(
        "As many requests are under way as `max_in_flight` allows, all of `max_connections` were in use for "
        "`connection_wait`, or too many webhooks arrive at a time.",
        "Try again after `retry-after`; whoever runs the app adds processes, or raises the limit that the text names.",
        YES,
    ),
    errors.ResolverFailed: Said(
        "The key resolver raised, answered nonsense, or took longer than `resolver_timeout`. Nothing was sent.",
        "Try again; whoever runs the app looks at what the resolver asks (a database, a file).",
        YES,
    ),
    errors.StoreFailed: Said(
        "What has to be looked up or counted before anything is sent could not be: the prediction store, or the "
        "storage of a "
        "layer. The text names which. Nothing was sent.",
        "Try again; whoever runs the app looks at Redis.",
        YES,
    ),
    errors.UpstreamTimeout: Said(
        "No connection to Replicate within `connect_timeout`, an upload that Replicate does not take "
        "(`write_timeout`), no "
        "answer within `read_timeout`, or the end of `total_timeout`.",
        "Look for the prediction in the list before you create again, unless the text says that nothing was sent.",
        READS,
    ),
    errors.LoopDetected: Said(
        "The request has passed this proxy before, or more than 16 of its kind: `upstream`, or its name in DNS, leads "
        "back.",
        "Whoever runs the app corrects `upstream`.",
        CHANGED,
    ),
}

# What is no answer any more, since a status is out already.
CUT: Mapping[type[errors.UpstreamAborted], str] = {
    errors.UpstreamAborted: "Replicate's answer ended before its end.",
    errors.AnswerTimeout: "`total_timeout` was over before the answer was out.",
}


def lines() -> Iterator[str]:
    """What the page has between its marks."""
    kinds = sorted(SAID, key=lambda kind: kind.status)
    yield "| status | code | on spans | may it be sent again? |"
    yield "| --- | --- | --- | --- |"
    for kind in kinds:
        yield f"| {kind.status} | [`{kind.code}`](#{kind.code}) | `{kind.outcome}` | {SAID[kind].again} |"
    for kind in kinds:
        message = re.sub(r"\b0ms", "…ms", kind().message)
        yield f"\n### `{kind.code}`"
        yield f"\n**{kind.status}** · in Python `{kind.__name__}` · `title` “{title_of(kind)}”"
        yield f"\n{SAID[kind].when}\n"
        yield f"- **What to do**: {SAID[kind].do}"
        yield f"- **Sent again**: {SAID[kind].again}."
        yield f"- **On spans**: `{kind.outcome}`."
        yield f"- **Text**: {_code(message)}"
        yield from (f"- **Or**: {_code(text)}" for text in texts().get(kind.__name__, ()) if text != message)
    yield "\n### After the status is out"
    yield "\nThen there is no other answer to give: the caller's connection is cut, and the span has one of these.\n"
    yield "| code | on spans | when |"
    yield "| --- | --- | --- |"
    for cut, when in CUT.items():
        yield f"| `{cut.code}` | `{cut.outcome}` | {when} |"


def title_of(kind: type[ProxyError]) -> str:
    """`title` of the answer, as it is made."""
    body: Any = render(kind(), request_id="").body
    return str(json.loads(body.at_hand)["title"])


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


@cache
def texts() -> Mapping[str, tuple[str, ...]]:
    """The texts that the source raises an error with, by the name of its class; `…` stands for what differs."""
    found: dict[str, list[str]] = {}
    names = {kind.__name__ for kind in SAID}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.is_relative_to(SOURCE / "testing"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                text = text_of(node.args[0])
                if text and re.search(r"\w{2}", text) and text not in found.setdefault(node.func.id, []):
                    found[node.func.id].append(text)
    return {name: tuple(sorted(each)) for name, each in found.items()}
