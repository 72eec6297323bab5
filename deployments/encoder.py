"""Encoder replicas: pixels in, the key of an encoder-cache entry out."""

from ray import serve

from deployments._replica import EngineReplica
from serve_app.config import Stage
from serve_app.handoff import EncodeReply, StageRequest


@serve.deployment(name="Encoder")
class Encoder(EngineReplica):
    stage = Stage.ENCODER

    async def encode(self, request: StageRequest) -> EncodeReply:
        """Encode the one item of the request and publish its embedding through the EC connector."""
        output = await self.engine.final(request)
        return EncodeReply(output.ec_transfer_params or {}, self.replica)
