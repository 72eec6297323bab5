"""Prefill replicas: they take a prompt, and hold its KV blocks for one decode request."""

import time
from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.handoff.errors import HandoffLost
from serve_app.handoff.types import READ_S, PrefillReply, StageRequest
from serve_app.stage import Stage
from serve_app.stages.replica import EngineReplica

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput


@serve.deployment(name="Prefill")
class Prefill(EngineReplica):
    stage = Stage.PREFILL

    async def prefill(self, request: StageRequest) -> PrefillReply:
        """Run the prompt. Its blocks are held until decode has pulled them or the lease ends."""
        from serve_app.stages.tap import queued_s

        self.refuse_other(request.version)
        began, prompt_logprobs = time.perf_counter(), None

        def hear(output: "EngineCoreOutput") -> None:
            nonlocal prompt_logprobs
            logprobs: Any = output.new_prompt_logprobs_tensors
            prompt_logprobs = prompt_logprobs if logprobs is None else logprobs

        with self.work.call(len(request.prompt.token_ids)) as call:
            output = await self.engine.run(request, hear if request.params.prompt_logprobs is not None else None)
            call.done = call.asked - (output.num_cached_tokens or 0)
        if output.kv_transfer_params is None:
            raise HandoffLost(self.stage, "ended without KV blocks to hand over")
        ran_s = time.perf_counter() - began - queued_s(output)
        ec_s = (output.ec_transfer_params or {}).get(READ_S, 0.0)
        return PrefillReply(
            output.kv_transfer_params,
            prompt_logprobs,
            output.num_cached_tokens,
            self.replica,
            ran_s,
            ec_s,
            self.node,
            self.version,
        )

    async def renew(self, request_ids: list[str]) -> set[str]:
        """Renew the leases of hand-offs. Returns those whose leases have ended."""
        return await self.engine.renew_leases(request_ids)

    def holds(self) -> bool:
        """Whether the engine has blocks that decode has not pulled and whose lease has not ended."""
        return self.engine.holds_blocks
