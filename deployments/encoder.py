"""Encoder replicas: they take an item, as media or as tensors, and answer with the key of an encoder-cache entry."""

import time
from typing import TYPE_CHECKING

from ray import serve

from serve_app.config import EPDConfig
from serve_app.handoff.types import EncodeReply, Features, MediaRequest, StageRequest
from serve_app.stage import Stage
from serve_app.stages.replica import EngineReplica

if TYPE_CHECKING:
    from serve_app.media.items import ItemProcessor


@serve.deployment(name="Encoder")
class Encoder(EngineReplica):
    stage = Stage.ENCODER
    items: "ItemProcessor"

    def __init__(self, config: EPDConfig) -> None:
        super().__init__(config)
        from serve_app.media.check import install_limits
        from serve_app.media.items import ItemProcessor

        install_limits(config.advanced.media)
        self.items = ItemProcessor(self.engine.renderer, config.advanced.media)
        # Other engines read a folder at any time, but pull blocks from this engine within the lease.
        self._lease_s = 0.0 if config.ec.uses_folder else config.advanced.ec.lease_s
        self._answered_at = -self._lease_s

    async def encode(self, request: StageRequest) -> EncodeReply:
        """Encode the one item of the request and publish its embedding through the EC connector."""
        self.refuse_other(request.version)
        with self.work.call(request.prompt.items[0].num_embeds):
            return await self._encode(request, time.perf_counter())

    async def encode_media(self, request: MediaRequest) -> EncodeReply:
        """Process one item, then encode it."""
        from serve_app.handoff.engine_input import ENCODE_PARAMS

        self.refuse_other(request.version)
        began = time.perf_counter()
        with self.work.call(request.cost) as work:
            features = await self.items.features(request.media)
            work.done = features.item.num_embeds
            call = StageRequest(request.request_id, features.prompt, ENCODE_PARAMS, request.options)
            return await self._encode(call, began, self.items.without_pixels(features))

    def holds(self) -> bool:
        """Whether embeddings may still have to be pulled: an encoder is not told when they are."""
        return time.monotonic() < self._answered_at + self._lease_s

    async def _encode(self, request: StageRequest, began: float, features: Features | None = None) -> EncodeReply:
        from serve_app.stages.tap import queued_s

        output = await self.engine.run(request)
        self._answered_at = time.monotonic()
        ran_s = time.perf_counter() - began - queued_s(output)
        return EncodeReply(output.ec_transfer_params or {}, self.replica, features, ran_s, self.version)
