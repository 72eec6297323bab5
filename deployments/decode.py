"""Decode replicas: a prompt and the KV blocks of its prefill in, a stream of tokens out."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from deployments._replica import EngineReplica
from serve_app.config import EPDConfig, Stage
from serve_app.handoff import ANY, Chunk, StageRequest, Version, hand_off_id, pulled_blocks
from serve_app.kv_waits import pulls

SAVE_S = 2.0
"""How often, in seconds, what was made of an answer that is not streamed goes to the ingress: so much of it is lost with its
replica. A message costs about a millisecond of CPU, on both ends together."""


@serve.deployment(name="Decode")
class Decode(EngineReplica):
    """Prefills, and encodes, by itself where the topology has no stage for it."""

    stage = Stage.DECODE

    def __init__(self, config: EPDConfig) -> None:
        super().__init__(config)
        self._interval_s = config.chunk_interval_s
        self.pulls = pulls(self.engine.overdue_pulls, config.kv.lease_s)

    async def generate(self, request: StageRequest) -> AsyncGenerator[tuple[Chunk, str]]:
        """New tokens, and this replica's id: the first at once, then what came in an interval in one chunk."""
        from serve_app.engine import coalesced, queue_s, to_chunk

        self.refuse_other(request.version)
        began, first = time.perf_counter(), True
        with self.work.call(1):
            # With all places taken, the wait for one cannot be told from the transfer.
            blocks = pulled_blocks(request.params)
            tells = blocks is not None and self.work.under_way <= self.engine.slots
            interval_s = self._interval_s if request.streamed else max(self._interval_s, SAVE_S)
            outputs = self.pulls.first(hand_off_id(blocks), coalesced(self.engine.generate(request), interval_s))
            async with aclosing(outputs):
                async for output in outputs:
                    ran_s = time.perf_counter() - began - queue_s(output) if first else None
                    kv_s = queue_s(output) if first and tells else None
                    version = self.version if first else ANY
                    first = False
                    yield to_chunk(output, ran_s, kv_s, version), self.replica

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any], version: Version) -> None:
        """Give back the blocks of a prefill whose request will not be decoded. Engines of two versions do not connect."""
        self.refuse_other(version)
        await self.engine.release(request_id, kv_transfer_params)
