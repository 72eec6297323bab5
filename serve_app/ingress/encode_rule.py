"""Who encodes an item: an encoder, prefill itself, or nobody, as its tokens are in a prefix cache. The rules of an ingress
replica, and what they are decided on.

Without vLLM, so that the simulation (``tools/sim``) runs the same.
"""

from dataclasses import dataclass, field

from serve_app.config import EncodeConfig
from serve_app.handoff.types import Media


@dataclass
class Encodes:
    """What the rule is decided on, besides the item: the encoders as this ingress replica sees them."""

    outstanding: int = 0
    """Embeddings (visual or audio tokens) asked for and not answered yet."""
    down: bool = False
    """All attempts for an item failed, and none has succeeded since."""
    probe_at: float = 0.0
    """While down: ``time.monotonic`` from which one item may try an encoder again."""
    absent: bool = False
    """No encoder replica runs: scaled to zero, or the only one is being replaced."""


def encode_at_prefill(cost: int, encodes: Encodes, config: EncodeConfig, now: float) -> str | None:
    """The rule: why an item of ``cost`` embeddings is encoded by prefill itself; None: an encoder does it."""
    if cost < config.min_embeds:
        return "small"
    if encodes.absent:
        return "no encoder"
    if encodes.down and now < encodes.probe_at:
        return "encoders down"
    if config.max_outstanding_embeds and encodes.outstanding + cost > config.max_outstanding_embeds:
        return "encoders full"
    return None


FAILED_S = 0.25
"""Seconds that an attempt takes which fails, as nobody knows before the first."""


@dataclass
class Savings:
    """Whether it pays to leave items to a prefix cache. Where their tokens are not there, the attempt fails, and the next
    has them encoded."""

    item_s: float = 0.0
    """Seconds that encoders work on an item: the latest answer counts a fifth."""
    failed_s: float = FAILED_S
    """Seconds of an attempt that fails, in the same way."""

    def pays(self, seconds: float, likely: float) -> bool:
        """``seconds``: what encoders would work. ``likely``: the probability that the tokens are there."""
        return likely * seconds > (1 - likely) * self.failed_s

    def encoded(self, ran_s: float) -> None:
        self.item_s += 0.2 * (ran_s - self.item_s)

    def failed(self, seconds: float) -> None:
        self.failed_s += 0.2 * (seconds - self.failed_s)


@dataclass
class Costs:
    """Embeddings per unit of media (see ``Media.units``) by modality: as encoders told, the latest counting a fifth.

    A guess, for balance and for the rule above: an item's real cost is known once it is processed.
    """

    per_unit: dict[str, float] = field(default_factory=lambda: {"image": 1 / 28**2, "video": 1e-3, "audio": 1e-3})

    def of(self, media: Media) -> int:
        return max(round(self.per_unit.get(media.modality, 1e-3) * media.units), 1)

    def learn(self, media: Media, num_embeds: int) -> None:
        told = num_embeds / max(media.units, 1)
        self.per_unit[media.modality] = 0.8 * self.per_unit.get(media.modality, told) + 0.2 * told
