"""Check at start that decode can take prefill's KV blocks.

NIXL compares the two engines at their first hand-off and refuses every hand-off where they differ: on cards of another
generation vLLM picks another attention backend, with another layout of blocks. Here the ingress compares them, by vLLM's own
hash, before it takes requests.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from serve_app.handoff.errors import CannotStart


class KVLayout(NamedTuple):
    """Layout of one engine's KV blocks. ``digest``: vLLM's hash of all that they depend on."""

    digest: str
    backend: str
    card: str


def layout_of(vllm_config: Any) -> KVLayout:
    """The layout of an engine's config with the backend that vLLM picks for this process's card."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash
    from vllm.platforms import current_platform

    backend = get_current_attn_backends(vllm_config)[0].get_name()
    digest = compute_nixl_compatibility_hash(vllm_config, backend)
    return KVLayout(digest, backend, str(current_platform.get_device_name()))


def check_layouts(prefill: Iterable[KVLayout], decode: Iterable[KVLayout]) -> None:
    """Raise ``CannotStart`` where a prefill engine's blocks do not fit a decode engine."""
    takers = list(decode)
    for giver in prefill:
        for taker in takers:
            if giver.digest != taker.digest:
                raise CannotStart(
                    f"decode ({taker.card}, {taker.backend}) cannot take the KV blocks of prefill ({giver.card}, "
                    f"{giver.backend}): name one that both have, such as `engine_args: {{attention_backend: FLASH_ATTN}}`, "
                    "or keep both stages on cards of one kind (`label_selector`)."
                )
