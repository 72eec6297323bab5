"""The way of a request: ingress → encoders → prefill → decode, as ``client.py`` and ``encoding.py`` of production go it.

Production's code decides here too: ``Admission`` what an ingress takes on, ``encode_at_prefill`` who encodes an item,
``rank`` which encoder gets it. What is not modelled stands in ``tools/sim/README.md``.
"""

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from serve_app.config import AdmissionConfig, EncodeConfig, QueueConfig, Timeouts
from serve_app.config.advanced import AdvancedRouting
from serve_app.handoff.errors import Overloaded
from serve_app.handoff.types import Item
from serve_app.ingress import encode_rule
from serve_app.ingress.admission import Admission
from serve_app.stage import Stage
from tools.sim.by_prefix import ByPrefix, KnownTwo
from tools.sim.loop import Action, Cores, Loop, OwnCore, Thread, Timer
from tools.sim.pools import Cards, LeastCost, Pool, Router, TwoChoices
from tools.sim.replicas import Call, Decode, Encoder, Prefill, PrefillDecode, Replica
from tools.sim.service import ServiceTimes, Topology
from tools.sim.traffic import Request

EMBED_BYTES = 4096
"""Of one embedding: 2,048 numbers of 16 bits, as in a model of 3 billion parameters."""

REPLICAS: dict[Topology, dict[Stage, type[Replica]]] = {
    "E+P+D": {Stage.ENCODER: Encoder, Stage.PREFILL: Prefill, Stage.DECODE: Decode},
    "E+PD": {Stage.ENCODER: Encoder, Stage.DECODE: PrefillDecode},
}


@dataclass(frozen=True)
class Shape:
    """What is fixed while a simulation runs."""

    topology: Topology = "E+P+D"
    ingresses: int = 1
    free_ingress: bool = False
    """Its work takes no time: one does for any number of replicas."""
    cards: float = float("inf")
    two_choices_for_encoders: bool = False
    """Ray's own rule in place of production's, to compare."""
    prefill_by: Literal["true lengths", "known lengths", "prefix"] = "true lengths"
    """Two choices, by the true queue lengths or by those that Ray knows; or production's rule for prompts."""
    prefix_blocks: int = AdvancedRouting().prefix_blocks
    lease_s: float = 0.0
    """A draining encoder stays so long for embeddings that were not pulled: the lease, unless they are in a folder."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)


UNBOUND = Shape().admission.model_copy(update={"max_embed_bytes": 2**60, "max_requests": 10**9, "max_items": 10**9})
NO_LIMIT = Shape().encode.model_copy(update={"max_outstanding_embeds": 0})


class Ingress:
    """One ingress replica: one event loop, so one piece of work after the other."""

    def __init__(self, loop: Loop, cores: Cores, shape: Shape, encoders: Router, prefills: Router) -> None:
        self.encoders, self.prefills = encoders, prefills
        self.encodes = encode_rule.Encodes()
        self.admission = Admission(shape.admission, EMBED_BYTES)
        self._thread = None if shape.free_ingress else Thread(cores)

    def work(self, seconds: float, done: Action) -> None:
        if self._thread is None:
            done()
        else:
            self._thread.work(seconds, done)


@dataclass
class Way:
    """A request under way at its ingress."""

    request: Request
    ingress: Ingress
    places: AbstractContextManager[None]
    open_items: int = 0
    attempts: dict[str, int] = field(default_factory=dict)


class App:
    """All stages. ``cores``: whom the work of all shares, None where every replica has its own."""

    def __init__(self, loop: Loop, times: ServiceTimes, shape: Shape, seed: int, cores: Cores | None = None) -> None:
        self.loop, self.times, self.shape = loop, times, shape
        self._cores = cores or OwnCore(loop)
        self._chance = random.Random(seed)
        self._two_choices = TwoChoices(self._chance)
        self.cards = Cards(shape.cards)
        self.pools = {
            stage: Pool(
                stage,
                loop,
                partial(self._replica, stage),
                times.start_up_s[stage],
                shape.queue.max_ongoing_requests,
                shape.queue.max_queued_requests * shape.ingresses,
                self.cards,
                lease_s=shape.lease_s if stage is Stage.ENCODER else 0.0,
                start_work=partial(self._around, times.start_up_cpu_s),
            )
            for stage in REPLICAS[shape.topology]
        }
        self.ingresses = [self._ingress() for _ in range(shape.ingresses)]
        self.ended: list[Request] = []
        self.on_end: Callable[[Request], None] = lambda _: None

    def _replica(self, stage: Stage, name: str) -> Replica:
        return REPLICAS[self.shape.topology][stage](name, self.loop, self._cores, self.times, 1.0)

    def _ingress(self) -> Ingress:
        encoders: Router = self._two_choices
        prefills: Router = KnownTwo(self.loop, self._chance)
        if not self.shape.two_choices_for_encoders:
            encoders = LeastCost(self.loop, self.shape.encode.affinity_headroom)
        if self.shape.prefill_by == "true lengths":
            prefills = self._two_choices
        elif self.shape.prefill_by == "prefix":
            prefills = ByPrefix(self.loop, self.shape.prefix_blocks)
        return Ingress(self.loop, self._cores, self.shape, encoders, prefills)

    # ---- ingress

    def play(self, requests: Iterable[Request]) -> None:
        """Requests come one after the other, each at its time."""
        coming = iter(requests)

        def expect() -> None:
            request = next(coming, None)
            if request is not None:
                self.loop.at(request.at, partial(arrive, request))

        def arrive(request: Request) -> None:
            expect()
            self.arrive(request)

        expect()

    def arrive(self, request: Request) -> None:
        ingress = self._chance.choice(self.ingresses)
        items = tuple(
            Item("image", f"{request.number}:{index}", 0, embeds, None, None)
            for index, embeds in enumerate(request.embeds)
        )
        places = ingress.admission.admit(items)
        try:
            places.__enter__()
        except Overloaded:
            self._end(request, "refused by ingress")
            return
        way = Way(request, ingress, places)
        seconds = self.times.render_item_s * len(items)
        around_s = self.times.around_s + self.times.around_item_s * len(items)
        self._around(around_s, lambda: ingress.work(seconds, partial(self._encode, way)))

    def _around(self, seconds: float, done: Action) -> None:
        """Work of the proxy and the client: beside everything else, on the same cores where cores are shared."""
        if seconds:
            self._cores.start(seconds, done)
        else:
            done()

    def _finish(self, way: Way, outcome: str) -> None:
        way.places.__exit__(None, None, None)
        self._end(way.request, outcome)

    def _end(self, request: Request, outcome: str) -> None:
        assert request.outcome is None, "a request ends once"
        request.outcome, request.ended_at = outcome, self.loop.now
        self.ended.append(request)
        self.on_end(request)

    def _late(self, way: Way, stage: Stage) -> bool:
        late = self.loop.now - way.request.at > self.shape.timeouts.request_s
        if late:
            self._finish(way, f"timeout before {stage}")
        return late

    # ---- encoders

    def _encode(self, way: Way) -> None:
        """Largest first, all at the same time, as ``EncodeStage.run``."""
        config, state, taken = self.shape.encode, way.ingress.encodes, 0
        at_encoder = []
        for index, embeds in sorted(enumerate(way.request.embeds), key=lambda item: -item[1]):
            seen = replace(state, outstanding=state.outstanding + taken)
            if encode_rule.encode_at_prefill(embeds, seen, config, self.loop.now) is not None:
                way.request.at_prefill += 1
                continue
            at_encoder.append((f"{way.request.number}:{index}", embeds))
            taken += embeds
            if state.down:
                state.probe_at = self.loop.now + self.shape.timeouts.encode_s * config.attempts
        way.open_items = len(at_encoder)
        for key, embeds in at_encoder:
            self._ask(way, key, embeds, attempt=1)
        if not at_encoder:
            self._prefill(way)

    def _ask(self, way: Way, key: str, embeds: int, attempt: int) -> None:
        config, ingress = self.shape.encode, way.ingress
        if attempt > config.attempts:
            way.request.at_prefill += 1
            ingress.encodes.down = True
            ingress.encodes.probe_at = self.loop.now + config.retry_encoders_after_s
            self._item_done(way)
            return
        pool = self.pools[Stage.ENCODER]
        ingress.encodes.outstanding += embeds

        def answered(call: Call) -> None:
            ingress.encoders.answered(call)
            if call.request is way.request and limit.action is not None:
                limit.cancel()
                ingress.encodes.outstanding -= embeds
                ingress.encodes.down = False
                self._item_done(way)

        def gave_up() -> None:
            limit.cancel()
            pool.forget(call)
            ingress.encodes.outstanding -= embeds
            self._ask(way, key, embeds, attempt + 1)

        def send() -> None:
            if not pool.call(call, ingress.encoders):
                gave_up()

        call = Call(way.request, embeds, answered)
        call.key = key if attempt == 1 else f"{key}:{attempt}"
        limit: Timer = self.loop.after(self.shape.timeouts.encode_s, gave_up)
        self.loop.after(self.times.hop_s, send)

    def _item_done(self, way: Way) -> None:
        way.open_items -= 1
        if not way.open_items:
            self._prefill(way)

    # ---- prefill, decode

    def _prefill(self, way: Way) -> None:
        """The prompt is rendered around what the encoders replied."""
        way.ingress.work(self.times.render_s, partial(self._rendered, way))

    def _rendered(self, way: Way) -> None:
        if Stage.PREFILL not in self.pools:
            self._decode(way, lambda: None, None)
            return
        if self._late(way, Stage.PREFILL):
            return
        call = Call(way.request, way.request.prompt_tokens, partial(self._prefilled, way))
        call.key, router = str(way.request.number), way.ingress.prefills

        def send() -> None:
            if not self.pools[Stage.PREFILL].call(call, router):
                router.answered(call)
                self._finish(way, f"refused by {Stage.PREFILL}")

        self.loop.after(self.times.hop_s, send)

    def _prefilled(self, way: Way, prefill: Call) -> None:
        assert prefill.replica is not None
        way.ingress.prefills.answered(prefill)
        way.request.cached_tokens, way.request.prefilled_by = prefill.cached, prefill.replica.name
        assert isinstance(prefill.replica, Prefill)
        self._decode(way, partial(self.pools[Stage.PREFILL].pulled, prefill.replica), prefill.replica.pull)

    def _decode(self, way: Way, free_blocks: Action, pull: Callable[[Action], None] | None) -> None:
        """``pull``: from the replica that prefilled; None: decode prefills."""
        if self._late(way, Stage.DECODE):
            free_blocks()
            return

        def first() -> None:
            free_blocks()
            first = partial(self._first_token, way)
            way.ingress.work(self.times.chunk_s, lambda: self._around(self.times.around_chunk_s, first))

        def decoded(call: Call) -> None:
            left = call.tokens - 1
            finish = partial(self._finish, way, "ok")
            around_s = self.times.around_chunk_s * left
            way.ingress.work(self.times.chunk_s * left, lambda: self._around(around_s, finish))

        call = Call(way.request, 1, decoded, tokens=way.request.output_tokens, first=first)

        def arrived() -> None:
            if pull is None:
                send()
            else:
                pull(lambda: self._cores.start(self.times.pull(way.request.prompt_tokens), send))

        def send() -> None:
            if not self.pools[Stage.DECODE].call(call, self._two_choices):
                free_blocks()
                self._finish(way, f"refused by {Stage.DECODE}")

        self.loop.after(self.times.hop_s, arrived)

    def _first_token(self, way: Way) -> None:
        way.request.first_token_at = self.loop.now
