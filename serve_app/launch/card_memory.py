"""What of a card's memory each engine on it gets. Arithmetic, and a question to NVML; no CUDA context is made.

vLLM's ``gpu_memory_utilization`` is no cap. An engine sizes its KV cache by it, and may overdraw it while it runs; to an
encoder, which has no KV cache, it says nothing but "as much is free at start". So an engine on a share of a card also gets
a real cap, ``per_process_memory_fraction`` of PyTorch's allocator: the engine that overdraws is the one that fails. What
an engine takes outside that allocator comes off its share first::

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
"""Of a share, for what PyTorch's allocator reserves above what vLLM has counted: fragments, batches that differ."""

ENCODER_GIB = 6.5
"""What an encoder needs of a card: of Qwen2.5-VL-3B the tower and one item of 32,768 tokens are 5.0 GiB; and its context."""

ENCODER_SHARE = 0.15
"""At least, for larger towers on larger cards."""

SMALL_CARDS = frozenset({"A10G", "L4", "P100", "P4", "T4", "V100"})
"""Ray's names of cards of 24 GB and less, for a driver on a node without one."""

ENV = "PYTORCH_ALLOC_CONF"


class Share(NamedTuple):
    """Both as fractions of the whole card."""

    utilization: float
    cap: float


def shares_of_one(stages: Iterable[Stage], card_gib: float | None) -> dict[Stage, float]:
    """What each stage of a topology claims of the one card that they share, in steps of 0.05: the encoder what it needs, the
    others the same of what is left."""
    found = list(stages)
    encoder = 0.0
    if Stage.ENCODER in found:
        encoder = max(ENCODER_SHARE, math.ceil(20 * ENCODER_GIB / card_gib) / 20 if card_gib else 0.0)
    others = [stage for stage in found if stage is not Stage.ENCODER]
    each = round((1 - encoder) / len(others), 3)
    return {stage: each if stage in others else encoder for stage in found}


def share_of(stage: Stage, claimed: float, card_gib: float | None) -> Share:
    """What an engine gets that claims a part of a card. A card of unknown size is taken for one of 24 GB, whose contexts are
    the largest part of it."""
    card = card_gib or 22.0
    cap = claimed - CONTEXT_GIB / card
    slack = 0.0 if stage is Stage.ENCODER else max(claimed * SLACK, MIN_SLACK_GIB / card)
    return Share(*(max(math.floor(1000 * fraction) / 1000, 0.01) for fraction in (cap - slack, cap)))


def smallest_card_gib(types: Iterable[str]) -> float | None:
    """Memory of the smallest card of this node, or what the cluster's types of cards say; None: unknown."""
    here = cards_gib().values()
    if here:
        return min(here)
    return 22.0 if SMALL_CARDS & set(types) else None


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
