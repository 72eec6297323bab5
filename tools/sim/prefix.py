"""The experiment "prefix": fixed replicas, and prompts that begin as others did."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from serve_app.stage import Stage
from tools.sim.app import NO_LIMIT, UNBOUND, Shape
from tools.sim.conversations import Conversations, Talk, conversations
from tools.sim.run import Strategy
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Kind


@dataclass(frozen=True)
class Load:
    talk: Talk
    busy: float = 0.7
    """Share of the time that prefill replicas would work under two choices."""
    cached: dict[int, float] = field(default_factory=dict)
    """Share of prompt tokens that are cached under two choices, by replicas: measured at 70 %."""
    seconds: float = 240.0
    warm_s: float = 120.0


TALK = Talk()
PICTURES = Talk(first=Kind(1, 2_700, 200, 300), later=Kind(1, 2_700, 200, 300))
NO_REUSE = Talk(system_tokens=0, turns=1, first=Kind(text_tokens=8_000))
ONE_PREFIX = Talk(system_tokens=8_192, turns=1, first=Kind(text_tokens=2_000))

LOADS = {
    "conversations": Load(TALK, cached={4: 0.33, 10: 0.21, 100: 0.12}),
    "conversations, light load": Load(TALK, 0.2, {4: 0.33, 10: 0.21, 100: 0.12}),
    "a picture a turn": Load(PICTURES, cached={4: 0.22, 10: 0.17, 100: 0.15}),
    "no reuse": Load(NO_REUSE, seconds=60.0, warm_s=15.0),
    "one prefix for all": Load(ONE_PREFIX, cached=dict.fromkeys((4, 10, 100), 0.8), seconds=45.0, warm_s=15.0),
}
FILLED = 0.65
"""Share of all caches together that live conversations fill at 70 % load. Their think times follow from it."""
ANSWER_S = 4.0
"""From a prompt to the end of its answer, about."""
INGRESSES = ("1 ingress", "4 ingresses", "16 ingresses")
STRATEGIES = tuple(f"{rule}, {ingresses}" for rule in ("by prefix", "two choices") for ingresses in INGRESSES)


def cases(quick: bool) -> Iterator[tuple[int, str, str]]:
    """Size, strategy, traffic."""
    for size in (4,) if quick else (100, 10, 4):
        for traffic in LOADS:
            if size >= 100 and traffic in ("conversations, light load", "a picture a turn"):
                continue
            for strategy in STRATEGIES:
                if strategy.split(", ")[1] != "4 ingresses" or (not quick and size < 100):
                    yield size, strategy, traffic


def prefix(
    size: int, strategy: str, traffic: str, quick: bool, times: ServiceTimes
) -> tuple[Conversations, Strategy, Shape, float]:
    """As many encoders and decode replicas, which have little to do."""
    load, by_prefix = LOADS[traffic], strategy.startswith("by prefix")
    prompts = load.talk.prompt_tokens
    computed = sum(prompts) * (1 - load.cached.get(size, 0.0))
    full = size / computed / (times.prefill_token_s + times.prefill_step_s / times.batch_tokens)
    lasts_s = (
        FILLED * size * times.cache_tokens / (sum(prompts) / len(prompts) - load.talk.system_tokens) / (0.7 * full)
    )
    talk = replace(load.talk, think_s=max(lasts_s / len(prompts) - ANSWER_S, 1.0))
    shape = Shape(
        ingresses=int(strategy.split()[2]),
        free_ingress=True,
        prefill_by="prefix" if by_prefix else "known lengths",
        two_choices_for_encoders=True,
        admission=UNBOUND,
        encode=NO_LIMIT,
    )
    seconds, warm_s = (load.seconds / 2, load.warm_s / 2) if quick else (load.seconds, load.warm_s)
    plan = Strategy(strategy, dict.fromkeys(Stage, size))
    return conversations(traffic, load.busy * full, seconds, talk), plan, shape, warm_s
