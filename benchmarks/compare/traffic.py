"""What goes over the wire: a create as a Portkey client sends it, and Replicate's answer."""

from __future__ import annotations

import json

TOKEN = "r8_0000000000000000000000000000"
KEY = "pk-0123456789"

BODY = json.dumps(
    {
        "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
        "input": {"prompt": "an astronaut on a horse, " * 7, "seed": 42, "guidance": 7.5},
    }
)

# With `host` and `content-length` they are 13.
REQUEST_HEADERS = {
    "content-type": "application/json",
    "accept": "application/json",
    "accept-encoding": "gzip, deflate",
    "user-agent": "portkey-python/2.3",
    "authorization": f"Bearer {KEY}",
    "x-portkey-api-key": KEY,
    "x-portkey-provider": "@replicate",
    "x-portkey-trace-id": "order-42",
    "x-portkey-metadata": '{"_user":"ada","team":"design"}',
    "prefer": "wait=60",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}

ID = "gm3qorzdhgbfurvjtvhg6dckhu"
API = f"https://api.replicate.com/v1/predictions/{ID}"
PREDICTION = json.dumps(
    {
        "id": ID,
        "model": "acme/painter",
        "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
        "input": {"prompt": "an astronaut on a horse, " * 7, "seed": 42, "guidance": 7.5},
        "logs": "Using seed: 42\n" + "100%|##########| 4/4 [00:00<00:00, 11.62it/s]\n" * 7,
        "output": None,
        "data_removed": False,
        "error": None,
        "source": "api",
        "status": "starting",
        "created_at": "2026-11-22T09:00:00.000Z",
        "urls": {
            "cancel": f"{API}/cancel",
            "get": API,
            "stream": "https://stream.replicate.com/v1/files/bcwr-3okdfv3o2wehstv5f2okyftwxy57hhypqsi6osiim5iaq5k7u24a",
            "web": f"https://replicate.com/p/{ID}",
        },
    }
)

# With `server`, `date`, `content-type`, `content-length` and `connection` they are 14.
RESPONSE_HEADERS = {
    "ratelimit-limit": "3000",
    "ratelimit-remaining": "2999",
    "ratelimit-reset": "1",
    "strict-transport-security": "max-age=15552000",
    "cf-cache-status": "DYNAMIC",
    "cf-ray": "8e2b4a7f1c2d3e4f-AMS",
    "nel": '{"success_fraction":0,"report_to":"cf-nel","max_age":604800}',
    "vary": "Accept-Encoding",
    "x-request-id": "9f3c6d2e-7f0a-4f0c-b9a3-0d9c54e5f0a1",
}
