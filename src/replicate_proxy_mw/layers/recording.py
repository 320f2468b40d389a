"""Recording whose a creation is, for the rule `own_predictions`: next to Replicate, below the host's layers."""

from __future__ import annotations

import logging
from functools import partial

from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse, where
from ..json_bodies import asking_for_plain, held, id_of, plain_of
from ..store import Ledger, StoredPrediction
from ..telemetry.names import STORE_FAILED

logger = logging.getLogger("replicate_proxy_mw")


def record_creations(ledger: Ledger) -> Layer:
    """Hold the answer to a create until it is recorded whose it is; it is paid, so it leaves even if that fails."""

    def layer(forward: Forward) -> Forward:
        async def recorded(request: ProxyRequest) -> ProxyResponse:
            response = await forward(asking_for_plain(request))
            if not 200 <= response.status < 300:
                return response
            id = None
            if not response.is_event_stream:
                response, body, whole = await held(response)
                id = id_of(plain_of(response, body) if whole else body)
            if id is None:
                logger.error(
                    "own_predictions: the answer to %s has no id; nobody will reach what it made", request.operation
                )
                request.notes[STORE_FAILED] = True
            elif not await ledger.write(
                id, StoredPrediction(tenant=request.key.tenant, traceparent=request.traceparent)
            ):
                request.notes[STORE_FAILED] = True
                request.afterwards.append(partial(ledger.write_later, id))
            return response

        return where(_creates_one_s_own, then=recorded, otherwise=forward)

    return layer


def _creates_one_s_own(request: ProxyRequest) -> bool:
    operation = request.route.details
    return request.key.policy.own_predictions and operation is not None and operation.creates is not None
