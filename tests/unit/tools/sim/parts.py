"""Service times, requests and replicas to make simulations of."""

from typing import Any

from tools.sim.loop import Loop, OwnCore
from tools.sim.plan import ASSUMED
from tools.sim.replicas import Replica
from tools.sim.service import ServiceTimes, load
from tools.sim.traffic import Kind, Request

TIMES = load(ASSUMED)
ONE_IMAGE = Kind(images=1, embeds=2000, text_tokens=300, output_tokens=50)


def request(number: int = 0, embeds: tuple[int, ...] = (), text: int = 100, output: int = 10) -> Request:
    return Request(number, 0.0, embeds, text, output)


def times(**changes: Any) -> ServiceTimes:
    """Nothing takes time but what is named."""
    nothing = {name: 0.0 for name in ServiceTimes.model_fields if name.endswith("_s") and name != "start_up_s"}
    return TIMES.model_copy(update=nothing | {"prefill_embed_s": None} | changes)


def replica(kind: type[Replica], loop: Loop, service: ServiceTimes, cores: Any = None) -> Any:
    return kind("one", loop, cores or OwnCore(loop), service, 1.0)
