"""Decode replicas: a prompt and the KV blocks of its prefill in, a stream of tokens out."""

import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from deployments._replica import EngineReplica
from serve_app.config import EPDConfig, Stage
from serve_app.handoff import Chunk, StageRequest, pulls_blocks


@serve.deployment(name="Decode")
class Decode(EngineReplica):
    """Prefills, and encodes, by itself where the topology has no stage for it."""

    stage = Stage.DECODE

    def __init__(self, config: EPDConfig) -> None:
        super().__init__(config)
        self._interval_s = config.chunk_interval_s

    async def generate(self, request: StageRequest) -> AsyncGenerator[tuple[Chunk, str]]:
        """New tokens, and this replica's id: the first at once, then what came in an interval, or the rest, in one chunk."""
        from serve_app.engine import coalesced, queue_s, to_chunk

        began, first = time.perf_counter(), True
        with self.work.call(1):
            # With all places taken, the wait for one cannot be told from the transfer.
            pulls = pulls_blocks(request.params) and self.work.under_way <= self.engine.slots
            interval_s = self._interval_s if request.streamed else math.inf
            async with aclosing(coalesced(self.engine.generate(request), interval_s)) as outputs:
                async for output in outputs:
                    ran_s = time.perf_counter() - began - queue_s(output) if first else None
                    kv_s = queue_s(output) if first and pulls else None
                    first = False
                    yield to_chunk(output, ran_s, kv_s), self.replica

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any]) -> None:
        """Give back the blocks of a prefill whose request will not be decoded."""
        await self.engine.release(request_id, kv_transfer_params)
