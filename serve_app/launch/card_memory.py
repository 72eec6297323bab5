"""How much of a card's memory each engine on it gets. Asks NVML, and makes no CUDA context.

vLLM's ``gpu_memory_utilization`` is no cap. An engine sizes its KV cache by it, and may exceed it while it runs; for an
encoder, which has no KV cache, it only checks the free memory at start. So an engine on a share of a card also gets a real
cap, ``per_process_memory_fraction`` of PyTorch's allocator: the engine that exceeds its share is the one that fails. Memory
outside that allocator comes off the share first::

    |<------------------------- share of the card that the replica claims from Ray -------------------------->|
    |<- gpu_memory_utilization: weights, activations, KV cache ->|<- rounding of the allocator ->|<- context ->|
    |<--------------------------------- per_process_memory_fraction ---------------------------->|
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from serve_app.stage import Stage

GIB = 1 << 30

CONTEXT_GIB = 0.5
"""CUDA context, kernels and libraries of one process: 0.4 to 0.5 GiB with CUDA 13."""

SLACK = 0.05
MIN_SLACK_GIB = 1.0
"""Part of a share that PyTorch's allocator reserves above vLLM's count: fragments, batches that differ."""

ENCODER_GIB = 6.5
"""Memory of an encoder: 5.0 GiB for the tower of Qwen2.5-VL-3B and one item of 32,768 tokens, and its context."""

ENCODER_SHARE = 0.15
"""Least share of an encoder, for larger towers on larger cards."""

UNKNOWN_CARD_GIB = 22.0
"""Assumed size of a card, that of one of 24 GB: contexts are the largest part of a small card."""

SMALL_CARDS = frozenset({"A10G", "L4", "P100", "P4", "T4", "V100"})
"""Ray's names of cards of 24 GB and less, for a driver on a node without one."""

ENV = "PYTORCH_ALLOC_CONF"


class Share(NamedTuple):
    """Both as fractions of the whole card."""

    utilization: float
    cap: float


def shares_of_one(stages: Iterable[Stage], card_gib: float | None) -> dict[Stage, float]:
    """Claims of the stages that share one card: the encoder gets what it needs in steps of 0.05, the others equal parts of
    the rest."""
    shares = dict.fromkeys(stages, 0.0)
    if Stage.ENCODER in shares:
        needed = math.ceil(20 * ENCODER_GIB / card_gib) / 20 if card_gib else 0.0
        shares[Stage.ENCODER] = max(ENCODER_SHARE, needed)
    others = shares.keys() - {Stage.ENCODER}
    each = round((1 - sum(shares.values())) / len(others), 3)
    return shares | dict.fromkeys(others, each)


def share_of(stage: Stage, claimed: float, card_gib: float | None) -> Share:
    """Memory of an engine that claims a part of a card."""
    card = card_gib or UNKNOWN_CARD_GIB
    cap = claimed - CONTEXT_GIB / card
    slack = 0.0 if stage is Stage.ENCODER else max(claimed * SLACK, MIN_SLACK_GIB / card)
    return Share(*(max(math.floor(1000 * fraction) / 1000, 0.01) for fraction in (cap - slack, cap)))


def smallest_card_gib(types: Iterable[str]) -> float | None:
    """Memory of the smallest card of this node, or of the cluster's types of cards; None: unknown."""
    by_type = UNKNOWN_CARD_GIB if SMALL_CARDS & set(types) else None
    return min(cards_gib().values(), default=by_type)


def cards_gib() -> Mapping[str, float]:
    """Memory of each NVIDIA card of this node, by index and by UUID. Empty where there is none."""
    import ray._private.thirdparty.pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return {}
    try:
        found: dict[str, float] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gib = nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
            found |= {str(index): gib, str(nvml.nvmlDeviceGetUUID(handle)): gib}
        return found
    except nvml.NVMLError:  # a card without memory of its own (unified), or one that MIG has cut up
        return {}
    finally:
        nvml.nvmlShutdown()


def visible_card_gib(visible: str | None) -> float | None:
    """Memory of the smallest card that ``CUDA_VISIBLE_DEVICES`` names; None: unknown, as for a part of a card (MIG)."""
    cards = cards_gib()
    names = cards.keys() if visible is None else {name.strip() for name in visible.split(",")}
    return min((cards[name] for name in names if name in cards), default=None)
