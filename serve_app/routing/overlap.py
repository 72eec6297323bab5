"""Which way a request takes while a deploy goes on and replicas of several weights run: one with the same all along.

What the next stage would refuse is not made in the first place: an encode or a prefill costs, and blocks that nobody
pulls are held until their lease ends.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from serve_app.stage import Stage


class Way(NamedTuple):
    weights: str = ""
    """All stages are to have these. Empty: whatever comes first fits."""
    without: frozenset[Stage] = frozenset()
    """Stages that have none that the next one could go on from."""


def way(
    told: Mapping[Stage, Collection[str]], weights: str = "", choose: Callable[[Sequence[str]], str] = random.choice
) -> Way:
    """``told``: the weights of each stage's replicas, as far as they are known, and ``weights`` those of the tokens that the
    request has said. Seen from its end: decode goes on from prefill, which goes on from encoders."""
    without = set()
    taken = {weights} if weights else set(told.get(Stage.DECODE, ()))
    for stage in (Stage.PREFILL, Stage.ENCODER):
        given = set(told.get(stage, ()))
        if not given:  # nothing is known
            continue
        if not taken or given <= taken:
            taken = given
        elif not (common := given & taken):
            without.add(stage)
        else:
            weights = weights or choose(sorted(common))
            taken = {weights}
    return Way(weights, frozenset(without))
