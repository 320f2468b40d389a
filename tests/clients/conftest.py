from __future__ import annotations

import pytest

from tests.clients.drivers import CLIENTS, Client, require


@pytest.fixture(params=CLIENTS, ids=lambda client: client.name)
def client(request: pytest.FixtureRequest) -> Client:
    client: Client = request.param
    require(client.needs)
    return client
