"""``NixlECConnector``: vLLM's ``ECCPUConnector`` with NIXL, for a stage that must not die of one request.

An encoder copies embeddings into a buffer in its shared memory and answers with its address; prefill and decode, on any
node, read them from there into their own buffers. A consumer that cannot get an embedding fails the request that needs it,
for a retry. The scheduler's side here closes vLLM's gaps:

- An encoder answers with a key only for items that can be read. vLLM also names items for which its buffer had no room; they
  would go on without pixels, and an engine with neither pixels nor address dies.
- A buffer smaller than the longest prompt's items is refused at start, because an item larger than the buffer would end each
  encoder that gets it. A buffer smaller than an encoder's own cache is refused too: an item that is only in that cache is
  not saved again, and could not be read.
- Items that are asked for again stay longest. An encoder has such an item still in its own cache and does not save it again,
  so otherwise repeated items would be evicted first, and could not be read any more.
- An item that was left to the prefix cache and is not there fails its request too.
- The buffer's file is unlinked once all processes of the engine have opened it, so it ends with them.
"""

import os
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.cpu.connector import ECCPUConnector
from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler
from vllm.v1.request import Request


class NixlECConnector(ECCPUConnector):
    def _make_scheduler(self, vllm_config: VllmConfig) -> "NixlECScheduler":
        return NixlECScheduler(vllm_config)

    def shutdown(self) -> None:
        for half in (self.connector_scheduler, self.connector_worker):
            if half is not None and not os.path.exists(half._region._mmap_path):
                half._region._is_creator = False  # nothing left to remove
        super().shutdown()


class NixlECScheduler(ECCPUScheduler):
    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        if not self._region._is_creator:  # vLLM makes an engine's workers before its scheduler: all have it open
            os.unlink(self._region._mmap_path)
        try:
            self._check_room(vllm_config)
        except ValueError:
            self.shutdown()
            raise

    def _check_room(self, vllm_config: VllmConfig) -> None:
        widths = self._ec_config.mm_encoder_output_widths  # only encoders measure them; all stages have the same buffer
        room, block = self._region.num_blocks, self._region.block_size_bytes
        cached = vllm_config.scheduler_config.encoder_cache_size
        for what, of, tokens in (
            ("the items of one prompt", "max_model_len", vllm_config.model_config.max_model_len),
            ("an encoder's own cache", "encoder.engine_args.max_num_batched_tokens", cached),
        ):
            needed = max((self._num_blocks((tokens, width)) for width in widths.values()), default=0)
            if needed > room:
                raise ValueError(
                    f"`ec.max_bytes` holds {room * block} bytes of embeddings, and {what} may have {needed * block} with "
                    f"`{of}: {tokens}`: raise the one or lower the other."
                )

    def _nixl_consumer_admit(self, request: Request, num_computed_tokens: int) -> bool:
        for feature in request.mm_features:
            beyond = feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
            if beyond and self._has_nothing_of(request, feature):
                return bool(self._fail_or_fallback(request, feature, "its tokens are not in the prefix cache"))
        return bool(super()._nixl_consumer_admit(request, num_computed_tokens))

    def _has_nothing_of(self, request: Request, feature: Any) -> bool:
        """Whether an item has neither an address nor pixels, and is not here: it was left to the prefix cache."""
        if feature.identifier in (request.ec_transfer_params or {}) or self.has_cache_item(feature.identifier):
            return False
        metadata = self._metadata_resolver.fields_for(feature.modality)
        return all(field.data is None for key, field in (feature.data or {}).items() if key not in metadata)

    def ensure_cache_available(self, request: Request, *args: Any, **kwargs: Any) -> bool:
        if self._is_producer:
            for feature in request.mm_features:
                entry = self._cache.pin_if_ready(feature.identifier)
                if entry is not None and entry.ready:
                    self._cache.unpin(feature.identifier)  # makes it the last to be evicted
        available: bool = super().ensure_cache_available(request, *args, **kwargs)
        return available

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        delayed, items = super().request_finished(request)
        readable = {name: item for name, item in (items or {}).items() if "peer_host" in item}
        return delayed, readable or None
