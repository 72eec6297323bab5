"""Decode replicas: they take a prompt and its KV blocks, and send output tokens over the channel to the calling ingress."""

import time
from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.channel.outlet import Outlets
from serve_app.channel.wire import First, ReplyTo
from serve_app.config import EPDConfig
from serve_app.handoff.shaping import generates, hand_off_id, pulled_blocks
from serve_app.handoff.types import DecodeReply, StageRequest, Version
from serve_app.handoff.waits import pulls
from serve_app.stage import Stage
from serve_app.stages.replica import EngineReplica

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput


@serve.deployment(name="Decode")
class Decode(EngineReplica):
    """Also prefills and encodes, if the topology has no stages for that. With ``runner: pooling`` it pools instead: its only
    output is a vector, or scores."""

    stage = Stage.DECODE

    def __init__(self, config: EPDConfig) -> None:
        super().__init__(config)
        from serve_app.stages.tap import codec

        self.pulls = pulls(self.engine.overdue_pulls, config.advanced.kv.lease_s)
        self.outlets: Outlets[EngineCoreOutput] = Outlets(
            self.replica, codec(), config.advanced.answers.chunk_interval_s, self.engine.abort
        )
        self.engine.tap.stepped = self.outlets.flush

    async def decode(self, request: StageRequest, reply_to: ReplyTo) -> DecodeReply:
        """Send the output tokens of a request, keyed by its id. Returns after the last, or when the ingress aborts it."""
        from serve_app.stages.tap import queued_s

        self.refuse_other(request.version)
        began, key, blocks = time.perf_counter(), request.request_id, pulled_blocks(request.params)
        hand_off, heard, tokens, pools = hand_off_id(blocks), False, 0, not generates(request.params)

        def hear(output: "EngineCoreOutput") -> None:
            nonlocal heard, tokens
            if pools and output.prefill_stats is not None:
                work.done = work.asked - output.prefill_stats.num_cached_tokens
            first = None
            if not heard:
                heard, waited = True, queued_s(output)
                ran_s = time.perf_counter() - began - waited
                first = First(key, self.replica, ran_s, waited if tells else None, self.version)
                self.pulls.over(hand_off)
            tokens += len(output.new_token_ids)
            outlet.put(key, output, first, last=output.finished)

        # Its unit is a sequence, but what pools does the work of a prefill.
        with self.work.call(len(request.prompt.token_ids) if pools else 1) as work:
            # With all slots taken, the wait for a slot cannot be told from the transfer.
            tells = blocks is not None and self.work.under_way <= self.engine.slots
            outlet = await self.outlets.to(reply_to)
            with outlet.call(key):
                await self.pulls.wait(hand_off, self.engine.run(request, hear))
        return DecodeReply(self.replica, tokens, self.version)

    async def tasks(self) -> tuple[str, ...]:
        """What vLLM calls the tasks of this engine's model: ``embed``, ``classify``."""
        return await self.engine.tasks()

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any], version: Version) -> None:
        """Free the blocks of a prefill whose request will not be decoded. Engines of two versions do not connect."""
        self.refuse_other(version)
        await self.engine.release(request_id, kv_transfer_params)

    async def __del__(self) -> None:
        if (outlets := getattr(self, "outlets", None)) is not None:
            await outlets.close()
        await super().__del__()
