"""Every way a request can be refused or fail, with the status, code and text of our own answers.

    ProxyError                  500  internal_error
    ├── BadRequest              400  bad_request
    ├── WebhookUnsigned         400  webhook_unsigned
    ├── KeyMissing              401  key_missing
    ├── KeyUnknown              401  key_unknown
    ├── WebhookUnverified       401  webhook_unverified
    ├── SpendLimitReached       402  spend_limit_reached
    ├── PermissionDenied        403  permission_denied
    ├── NotOwned                404  not_found               another tenant's, or nobody's
    ├── StreamUnknown           404  stream_unknown
    ├── MethodNotAllowed        405  method_not_allowed
    ├── RequestTimeout          408  request_timeout         the caller's own limit
    ├── BodyTimeout             408  body_timeout            the caller's body stopped coming
    ├── WebhookReplayed         409  webhook_replayed
    ├── CreateUnknown           409  create_unknown          the first one of its Idempotency-Key
    ├── StreamExpired           410  stream_expired
    ├── BodyTooLarge            413  body_too_large
    ├── IdempotencyKeyReused    422  idempotency_key_reused
    ├── LimitExceeded           429  limit_exceeded
    ├── GuardrailDenied         446  hooks_failed            Portkey's number for it
    ├── ClientDisconnected      499  client_disconnected     nobody is left to read it
    ├── WebhookFailed           500  webhook_failed          the host's callback
    ├── UpstreamUnreachable     502  upstream_unreachable    not one byte was sent
    ├── UpstreamFailed          502  upstream_failed         the request may have been received
    ├── ResolverFailed          503  resolver_failed
    ├── StoreFailed             503  store_failed
    ├── GuardrailFailed         503  guardrail_failed        a check, not what it checks
    ├── Overloaded              503  overloaded
    ├── UpstreamTimeout         504  upstream_timeout
    └── LoopDetected            508  loop_detected           `upstream` leads back here

    UpstreamAborted             the body of Replicate's answer was cut
    └── AnswerTimeout           by us, in the end of `total_timeout`

A `ProxyError` becomes an answer; layers and resolvers may raise one. Once a status is out there is no other answer
to give: `UpstreamAborted` and whatever else happens then leave the middleware, so that the server truncates the answer
instead of ending it as if it were complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

Headers = Sequence[tuple[bytes, bytes]]

# A 401 has to say how to authenticate (RFC 9110, section 15.5.2).
_CHALLENGE = ((b"www-authenticate", b"Bearer"),)
_SIGNED = ((b"www-authenticate", b"Standard-Webhooks"),)  # no scheme is registered for it
_SOON = ((b"retry-after", b"1"),)


class ProxyError(Exception):
    """A request that is answered by the proxy itself. `message` reaches the caller: no secrets, no upstream text.

    `outcome` is the word for it on spans; `type` the one in the answer, by default the same. `members` stand in the
    answer beside those that all have.
    """

    status = 500
    code = "internal_error"
    outcome = "upstream_error"
    type: str | None = None
    message = "The proxy failed to handle this request."
    members: Mapping[str, Any] = {}

    def __init__(self, message: str | None = None, *, headers: Headers = ()) -> None:
        self.message = str(message or self.message)
        super().__init__(self.message)
        self.headers = headers

    def anew(self) -> Self:
        """The same, to be raised for someone else: an exception collects who it was raised for."""
        # Past `__init__`, which takes other arguments in each class.
        error = self.__new__(type(self), self.message)
        error.message, error.headers, error.members = self.message, self.headers, self.members
        return error


class BadRequest(ProxyError):
    status = 400
    code = "bad_request"
    outcome = "bad_request"
    message = "The request is malformed."


class WebhookUnsigned(ProxyError):
    status = 400
    code = "webhook_unsigned"
    outcome = "auth_missing"
    message = "A webhook needs exactly one each of webhook-id, webhook-timestamp and webhook-signature."


class KeyMissing(ProxyError):
    status = 401
    code = "key_missing"
    outcome = "auth_missing"
    message = "No API key: send it as x-portkey-api-key, or as Authorization: Bearer <key>."

    def __init__(self) -> None:
        super().__init__(headers=_CHALLENGE)


class KeyUnknown(ProxyError):
    status = 401
    code = "key_unknown"
    outcome = "auth_invalid"
    message = "This API key is not known here."

    def __init__(self) -> None:
        super().__init__(headers=_CHALLENGE)


class WebhookUnverified(ProxyError):
    status = 401
    code = "webhook_unverified"
    outcome = "auth_invalid"
    message = "No signature of this webhook is right."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers=_SIGNED)


class SpendLimitReached(ProxyError):
    status = 402
    code = "spend_limit_reached"
    outcome = "limited"
    message = "What may be spent today is spent; nothing was created."


class PermissionDenied(ProxyError):
    """Raised by a resolver or a layer: 403 with the reason."""

    status = 403
    code = "permission_denied"
    outcome = "denied"
    message = "This API key may not do that."


class NotOwned(ProxyError):
    """The same for what is another tenant's and for what does not exist."""

    status = 404
    code = "not_found"
    outcome = "denied"
    message = "own_predictions: this key has created nothing of this id."


class StreamUnknown(ProxyError):
    status = 404
    code = "stream_unknown"
    outcome = "denied"
    message = "There is no stream at this URL."


class MethodNotAllowed(ProxyError):
    status = 405
    code = "method_not_allowed"
    outcome = "bad_request"
    message = "TRACE and CONNECT are not proxied."


class RequestTimeout(ProxyError):
    """The caller's own limit ran out, with the text that Portkey's gateway has for it. `seconds` is that limit."""

    status = 408
    code = "request_timeout"
    outcome = "upstream_timeout"
    type = "timeout_error"

    def __init__(self, seconds: float = 0) -> None:
        super().__init__(f"Request exceeded the timeout sent in the request: {seconds * 1000:.0f}ms")


class BodyTimeout(ProxyError):
    """Nothing more of the caller's body has come for `body_timeout`."""

    status = 408
    code = "body_timeout"
    outcome = "bad_request"
    message = "The request's body stopped coming; what has come of it may have been sent."


class WebhookReplayed(ProxyError):
    status = 409
    code = "webhook_replayed"
    outcome = "denied"
    message = "This webhook has been taken already."


class CreateUnknown(ProxyError):
    """It may have been received and paid, so it is not sent again."""

    status = 409
    code = "create_unknown"
    outcome = "denied"
    message = (
        "What became of the first create with this Idempotency-Key is not known, and it is not sent again: look for it "
        "in the list of predictions, or create with another key."
    )


class StreamExpired(ProxyError):
    status = 410
    code = "stream_expired"
    outcome = "denied"
    message = "This stream URL has expired: read the prediction again for a new one."


class BodyTooLarge(ProxyError):
    status = 413
    code = "body_too_large"
    outcome = "body_too_large"
    message = "The body is too large."


class IdempotencyKeyReused(ProxyError):
    status = 422
    code = "idempotency_key_reused"
    outcome = "bad_request"
    message = "This Idempotency-Key was sent with another create; nothing was created."


class LimitExceeded(ProxyError):
    """Raised by a layer that counts: 429. `retry_after` is in seconds."""

    status = 429
    code = "limit_exceeded"
    outcome = "limited"
    message = "Too many requests."

    def __init__(self, message: str | None = None, *, retry_after: int | None = None, headers: Headers = ()) -> None:
        after = () if retry_after is None else ((b"retry-after", str(retry_after).encode()),)
        super().__init__(message, headers=(*after, *headers))


class GuardrailDenied(ProxyError):
    """`hook_results` is what Portkey's gateway has under that name."""

    status = 446
    code = "hooks_failed"
    outcome = "denied"
    type = "hooks_failed"
    message = "A guardrail has denied this; `hook_results` says which."

    def __init__(self, message: str | None = None, *, hook_results: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.members = {} if hook_results is None else {"hook_results": hook_results}


class ClientDisconnected(ProxyError):
    """The caller left. 499 is nginx's number for it; servers drop the answer."""

    status = 499
    code = "client_disconnected"
    outcome = "client_disconnected"
    message = "The caller closed the connection."


class WebhookFailed(ProxyError):
    """What takes deliveries failed: Replicate tries again."""

    status = 500
    code = "webhook_failed"
    outcome = "resolver_error"
    message = "This webhook could not be taken; send it again."


class UpstreamUnreachable(ProxyError):
    status = 502
    code = "upstream_unreachable"
    outcome = "upstream_error"
    message = "Replicate could not be reached; nothing was sent."


class UpstreamFailed(ProxyError):
    status = 502
    code = "upstream_failed"
    outcome = "upstream_error"
    message = "Replicate closed the connection or answered with something that is not HTTP."


class ResolverFailed(ProxyError):
    status = 503
    code = "resolver_failed"
    outcome = "resolver_error"
    message = "The key of this request could not be looked up; try again."

    def __init__(self) -> None:
        super().__init__(headers=_SOON)


class StoreFailed(ProxyError):
    status = 503
    code = "store_failed"
    outcome = "resolver_error"
    message = "own_predictions: whose this is could not be looked up, and nothing was changed; try again."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers=_SOON)


class GuardrailFailed(ProxyError):
    status = 503
    code = "guardrail_failed"
    outcome = "resolver_error"
    message = "What has to check this failed; try again."

    def __init__(self, message: str | None = None, *, headers: Headers = _SOON) -> None:
        super().__init__(message, headers=headers)


class Overloaded(ProxyError):
    status = 503
    code = "overloaded"
    outcome = "overloaded"
    message = "All connections to Replicate are in use; nothing was sent, try again."

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message, headers=_SOON)


class UpstreamTimeout(ProxyError):
    status = 504
    code = "upstream_timeout"
    outcome = "upstream_timeout"
    message = "Replicate did not answer in time."


class LoopDetected(ProxyError):
    """The request has passed this proxy before (RFC 5842, section 7.2, has the number for it)."""

    status = 508
    code = "loop_detected"
    outcome = "bad_request"
    message = "This request has come through this proxy already: its upstream leads back to it."


class UpstreamAborted(Exception):
    """The upstream body ended before its end. Says no more: exception texts reach logs."""

    code = "upstream_aborted"
    outcome = "upstream_error"

    message = "the upstream answer was cut; the caller's connection is cut too"

    def __init__(self) -> None:
        super().__init__(self.message)


class AnswerTimeout(UpstreamAborted):
    """It was not complete in time: `total_timeout`."""

    code = UpstreamTimeout.code
    outcome = UpstreamTimeout.outcome
    message = "the answer was not complete in time; the caller's connection is cut"
