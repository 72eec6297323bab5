"""Whether decode can take prefill's KV blocks, told before a request finds out.

NIXL compares the two engines at their first hand-off and refuses it where they differ, for every request again: on cards of
another generation vLLM picks another attention backend, which lays out its blocks in another way. Here the ingress compares
them, by vLLM's own hash, before it takes requests.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from serve_app.handoff.errors import CannotStart


class KVLayout(NamedTuple):
    """Of one engine. ``digest``: vLLM's hash of all that its blocks depend on."""

    digest: str
    backend: str
    card: str


def layout_of(vllm_config: Any) -> KVLayout:
    """Of an engine's config, in the process of its replica: the backend that vLLM picks for the card that is there."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash
    from vllm.platforms import current_platform

    backend = get_current_attn_backends(vllm_config)[0].get_name()
    return KVLayout(
        compute_nixl_compatibility_hash(vllm_config, backend), backend, str(current_platform.get_device_name())
    )


def check_layouts(prefill: Iterable[KVLayout], decode: Iterable[KVLayout]) -> None:
    """Raise ``CannotStart`` where some prefill's blocks do not fit some decode."""
    takers = list(decode)
    for giver in prefill:
        for taker in takers:
            if giver.digest != taker.digest:
                raise CannotStart(
                    f"decode ({taker.card}, {taker.backend}) cannot take the KV blocks of prefill ({giver.card}, "
                    f"{giver.backend}): name one that both have, such as `engine_args: {{attention_backend: FLASH_ATTN}}`, "
                    "or keep both stages on cards of one kind (`label_selector`)."
                )
