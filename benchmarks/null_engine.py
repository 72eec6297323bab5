"""The real deployments around an engine that does nothing: what is left is the orchestration.

``serve run benchmarks.null_engine:build_app`` takes the arguments of ``serve_app.app:build_app``. Media are decoded and
processed as ever; embeddings and KV blocks are not there, tokens come at a fixed pace.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray import serve
from ray.serve import Application
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config

from deployments.decode import Decode
from deployments.encoder import Encoder
from deployments.prefill import Prefill
from serve_app import app, engine
from serve_app.config import EPDConfig, Stage
from serve_app.handoff import StageRequest

TOKEN_S = 0.01
"""Time per output token."""


class NullEngine(engine.StageEngine):
    """Answers at once: "a a a …"."""

    kv_use = 0.0
    slots = 256
    holds_blocks = False

    def __init__(
        self,
        stage: Stage,
        args: dict[str, Any],
        metrics_in_ray: bool,
        hang_timeout_s: float,
        check: Callable[[VllmConfig], None],
    ) -> None:
        self._stage = stage
        self._args = args
        self._vllm_config = engine.engine_config(AsyncEngineArgs(**args))
        check(self._vllm_config)

    @property
    def vllm_config(self) -> VllmConfig:
        return self._vllm_config

    @property
    def renderer(self) -> Any:
        from serve_app.openai_app import ingress_vllm_config

        return renderer_from_config(ingress_vllm_config({"model": self._args["model"]}))

    async def generate(self, request: StageRequest) -> AsyncGenerator[RequestOutput]:
        count = request.params.max_tokens if self._stage is Stage.DECODE else 1
        streamed = request.params.output_kind.name == "DELTA"
        for number in range(count):
            if number:
                await asyncio.sleep(TOKEN_S)
            if streamed or number + 1 == count:
                yield self._output(request, 1 if streamed else count, finished=number + 1 == count)

    def _output(self, request: StageRequest, tokens: int, finished: bool) -> RequestOutput:
        prompt = request.prompt
        reason = "length" if finished else None
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=prompt.token_ids,
            prompt_logprobs=None,
            outputs=[CompletionOutput(0, " a" * tokens, [1] * tokens, None, None, finish_reason=reason)],
            finished=finished,
            num_cached_tokens=0,
            kv_transfer_params={
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": "null",
                "remote_block_ids": [list(range(len(prompt.token_ids) // 16 + 1))],
                "remote_host": "127.0.0.1",
                "remote_port": 1,
            },
            ec_transfer_params={item.hash: {"item_indices": [0], "metadata": {}} for item in prompt.items},
        )

    async def release(self, request_id: str, kv_transfer_params: dict[str, Any]) -> None:
        pass

    async def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class _Null:
    def __init__(self, config: EPDConfig) -> None:
        engine.StageEngine = NullEngine  # type: ignore[misc]
        super().__init__(config)  # type: ignore[call-arg]


def null(deployment: Any) -> Any:
    real = deployment.func_or_class
    return serve.deployment(name=deployment.name)(type(f"Null{deployment.name}", (_Null, real), {}))


def build_app(args: dict[str, Any]) -> Application:
    app.DEPLOYMENTS = {Stage.ENCODER: null(Encoder), Stage.PREFILL: null(Prefill), Stage.DECODE: null(Decode)}
    return app.build_app(args)
