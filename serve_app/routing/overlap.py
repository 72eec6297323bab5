"""How a request keeps to replicas of the same weights while a deploy goes on and replicas of several run.

A call that the next stage would refuse is not made: it would cost an encode or a prefill, and hold blocks until their lease
ends.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from serve_app.stage import Stage


class Way(NamedTuple):
    weights: str = ""
    """The weights that all stages are to have. Empty: any."""
    without: frozenset[Stage] = frozenset()
    """Stages to leave out: the next stage can go on from none of their replicas."""


def way(
    told: Mapping[Stage, Collection[str]], weights: str = "", choose: Callable[[Sequence[str]], str] = random.choice
) -> Way:
    """The way of a request, found from its end: decode goes on from prefill, which goes on from encoders.

    ``told``: known weights of each stage's replicas; ``weights``: those that made the output tokens so far.
    """
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
