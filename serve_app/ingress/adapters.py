"""LoRA adapters: a client can name one once every engine that computes with it has loaded it.

vLLM's app keeps the names (``OpenAIServingModels``) and calls ``add`` for each adapter; a request that names one carries it
through all stages. A replica that starts later loads an adapter with the first request that has it (``StageEngine.run``).
Other ingress replicas are told of what was loaded or unloaded here, and one that starts asks for what there is.
"""

import asyncio
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from serve_app.handoff.errors import CannotStart, StageError
from serve_app.ingress.peers import Peers
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage

LOAD_S = 300.0
"""Seconds for all engines to load an adapter."""
ADDED, GONE, KNOWN, ALL = "new adapter", "gone adapter", "adapter", "list of adapters"
"""What ingress replicas tell and ask each other."""


def number_of(name: str, path: str) -> int:
    """What engines tell adapters by: the same from every ingress replica, another where weights come from another path. Of
    31 bits, as vLLM keeps it."""
    return int.from_bytes(blake2b(f"{name}\0{path}".encode(), digest_size=4).digest()) >> 1 or 1


class Adapters:
    """The adapters of one ingress replica. Until ``begin``, they are only noted: the stages may not run yet."""

    def __init__(self, stages: Mapping[Stage, StageHandle], peers: Peers) -> None:
        self._handles = [handle for stage, handle in stages.items() if stage is not Stage.ENCODER]
        self._peers = peers
        self._at_start: list[LoRARequest] | None = []
        self._models: Any = None

    def serve(self, models: OpenAIServingModels) -> None:
        """Share the names of vLLM's app with the other ingress replicas."""
        self._models, unload = models, models.unload_lora_adapter

        async def unload_everywhere(request: UnloadLoRAAdapterRequest) -> Any:
            answer = await unload(request)
            if isinstance(answer, str):
                await self._peers.find(GONE, request.lora_name)
            return answer

        models.unload_lora_adapter = unload_everywhere
        self._peers.offer(ADDED, self._is_new)
        self._peers.offer(GONE, self._is_gone)
        self._peers.offer(KNOWN, self._known)
        self._peers.offer(ALL, self._all)
        models.lora_resolvers.append(PeersResolver(self._peers))

    async def begin(self) -> None:
        """Load what the config names, and take over what other ingress replicas have. Raises ``CannotStart``."""
        adapters, self._at_start = self._at_start or [], None
        for adapter in adapters:
            try:
                await self._load(adapter)
            except StageError as error:
                raise CannotStart(f"`api.lora_modules`: {error}") from error
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            for adapter in await self._peers.find(ALL, "") or []:
                self._models.lora_requests.setdefault(adapter.lora_name, adapter)

    async def add(self, adapter: LoRARequest) -> None:
        """Have all engines load it; none keeps it if one of them cannot. Raises ``StageError``, and ``ValueError`` for one
        that cannot be told from another."""
        adapter.lora_int_id = number_of(adapter.lora_name, adapter.lora_path)
        self._check(adapter)
        if self._at_start is not None:
            self._at_start.append(adapter)
            return
        await self._load(adapter)
        await self._peers.find(ADDED, adapter.lora_name, adapter)

    def _check(self, adapter: LoRARequest) -> None:
        for other in self._models.lora_requests.values() if self._models is not None else ():
            if (other.lora_name, other.lora_path) == (adapter.lora_name, adapter.lora_path):
                raise ValueError(
                    f"The adapter `{adapter.lora_name}` is loaded from {adapter.lora_path} already, and requests under way "
                    "use it: load changed weights from another path."
                )
            if other.lora_int_id == adapter.lora_int_id:
                raise ValueError(f"Give the adapter another name: engines take this one for `{other.lora_name}`.")

    async def _load(self, adapter: LoRARequest) -> None:
        adapter.load_inplace = False  # another path is another adapter
        replies = await asyncio.gather(
            *(handle.broadcast("add_adapter", adapter, timeout_s=LOAD_S) for handle in self._handles),
            return_exceptions=True,
        )
        told = [reply for each in replies for reply in (each if isinstance(each, list) else [each])]
        failed = [reply for reply in told if isinstance(reply, BaseException)]
        if failed:
            await asyncio.gather(
                *(handle.broadcast("remove_adapter", adapter.lora_int_id) for handle in self._handles),
                return_exceptions=True,
            )
            raise failed[0]

    # ---- what other ingress replicas tell and ask

    async def _is_new(self, name: str, adapter: LoRARequest) -> None:
        self._models.lora_requests[name] = adapter

    async def _is_gone(self, name: str) -> None:
        self._models.lora_requests.pop(name, None)

    async def _known(self, name: str) -> LoRARequest | None:
        found: LoRARequest | None = self._models.lora_requests.get(name)
        return found

    async def _all(self, _: str) -> list[LoRARequest]:
        return list(self._models.lora_requests.values())


class PeersResolver(LoRAResolver):
    """Finds an adapter that was loaded while this ingress replica started, by another one."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        found: LoRARequest | None = await self._peers.find(KNOWN, lora_name)
        return found
