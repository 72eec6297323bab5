"""What all tests of the pipeline check at their end."""

from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.ingress.client import EPDClient
from tests.unit.running import Make


@pytest.fixture
def make_client(make_client: Make) -> Iterator[Make]:
    """Clients that, however their requests end, keep nothing of them."""
    made: list[EPDClient] = []

    def make(*args: Any, **config: Any) -> EPDClient:
        made.append(make_client(*args, **config))
        return made[-1]

    yield make
    for client in made:
        processor, answers = client.pipeline._processor, client.pipeline.answers
        for kept in (processor.request_states, processor.parent_requests, processor.external_req_ids):
            assert not kept
        assert not answers._by_key and not answers._by_choice
