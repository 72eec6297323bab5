"""The order in which an item tries encoder replicas, and the load it is decided on."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary, WeakValueDictionary

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.cloudpickle import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest, ReplicaQueueLengthCache
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.utils import generate_request_id
from ray.serve.config import RequestRouterConfig

from serve_app.handoff.types import ANY, Item, Prompt, StageRequest, Version
from serve_app.routing import handles
from serve_app.routing.affinity import Affinity
from serve_app.routing.handles import Call, KnownReplicas, StageHandle, sending
from serve_app.routing.prefix import BLOCK, Prefix
from serve_app.routing.routers import LeastCostRouter, PrefixRouter
from serve_app.routing.rules import FORGET_UNROUTED_S, Loads, rank, tiers
from serve_app.stage import Stage
from tests.fakes import FakeHandle

REPLICAS = ["a", "b", "c", "d"]


def idle(*replicas: str) -> dict[str, float]:
    return dict.fromkeys(replicas or REPLICAS, 0.0)


def test_an_item_finds_the_same_replica_again_and_items_spread() -> None:
    homes = {f"item {i}": rank(f"item {i}", 10, idle(), 1.25)[0] for i in range(400)}
    assert all(rank(key, 10, idle(), 1.25)[0] == home for key, home in homes.items())
    assert all(60 < list(homes.values()).count(replica) < 140 for replica in REPLICAS)


def test_a_replica_that_goes_moves_only_its_own_items() -> None:
    for i in range(100):
        before, after = rank(f"{i}", 1, idle(), 1.25)[0], rank(f"{i}", 1, idle("a", "b", "c"), 1.25)[0]
        assert before == after or before == "d"


def test_a_home_with_too_much_work_is_passed_over_for_the_least_loaded() -> None:
    home = rank("item", 10, idle(), 1.25)[0]
    others = [replica for replica in REPLICAS if replica != home]
    loads = {home: 100.0, others[0]: 30.0, others[1]: 10.0, others[2]: 20.0}
    assert rank("item", 10, loads, 1.25) == [others[1], others[2], others[0], home]


def test_items_whose_home_is_full_do_not_all_go_to_the_same_replica() -> None:
    names = [f"r{index}" for index in range(20)]
    second = set()
    for item in map(str, range(200)):
        home = rank(item, 1, idle(*names), 1.25)[0]
        second.add(rank(item, 1, idle(*names) | {home: 100.0}, 1.25)[0])
    assert len(second) == 20


def test_a_home_within_the_headroom_is_kept() -> None:
    home = rank("item", 10, idle(), 1.25)[0]
    loads = dict.fromkeys(REPLICAS, 100.0) | {home: 110.0}
    assert rank("item", 10, loads, 1.25)[0] == home
    assert rank("item", 10, loads, 1.0)[0] != home


@given(
    st.text(min_size=1),
    st.floats(1, 1e6),
    st.dictionaries(st.text(min_size=1), st.floats(0, 1e6), min_size=1),
    st.floats(1, 4),
)
def test_rank_names_every_replica_once_and_bounds_the_first(
    key: str, cost: float, loads: dict[str, float], headroom: float
) -> None:
    order = rank(key, cost, loads, headroom)
    assert sorted(order) == sorted(loads)
    mean = (sum(loads.values()) + cost) / len(loads)
    assert loads[order[0]] == min(loads.values()) or loads[order[0]] + cost <= max(headroom * mean, cost) + 1e-6


def test_two_replicas_of_which_no_difference_is_known_are_left_to_their_queues() -> None:
    order = rank("item", 10, idle(), 1.25)
    assert tiers(order, idle()) == [order[:2], *([replica] for replica in order[2:])]
    for loaded in order[:2]:
        assert tiers(order, idle() | {loaded: 1.0}) == [[replica] for replica in order]
    assert tiers(["a"], idle("a")) == [["a"]]


def test_ray_is_given_the_two_together_where_it_would_ask_them(router: LeastCostRouter) -> None:
    replicas = [Replica(name) for name in REPLICAS]
    ranks = asyncio.run(router.choose_replicas(replicas, pending("call", "item", 10)))
    assert [len(tier) for tier in ranks] == [2, 1, 1]


def test_of_two_with_the_same_load_the_shorter_queue_gets_an_item_and_it_counts_there_at_once(
    router: LeastCostRouter,
) -> None:
    replicas = [Replica(name) for name in ("a", "b")]
    home, other = choose(router, pending("call 1", "item", 10), replicas)
    router.on_request_completed(SimpleNamespace(unique_id=home), "call 1")
    for replica in replicas:
        router.replica_queue_len_cache.update(replica.replica_id, 3 if replica.replica_id.unique_id == home else 0)
    assert choose(router, pending("call 2", "item", 10), replicas) == [other, home]
    assert choose(router, pending("call 3", "item", 10), replicas) == [home, other]


def test_queues_that_ray_hears_of_late_do_not_make_a_replica_have_more_than_the_headroom(
    router: LeastCostRouter,
) -> None:
    replicas: Any = [Replica(name) for name in ("a", "b")]
    router._replicas = {replica.replica_id: replica for replica in replicas}
    for replica, queue in zip(replicas, (2, 0), strict=True):
        router.replica_queue_len_cache.update(replica.replica_id, queue)

    async def taken(item: str) -> str:
        """By the replica that Ray takes of the candidates."""
        ranks = await router.choose_replicas(replicas, pending(f"call of {item}", item, 100))
        return (await router._select_from_candidate_replicas(ranks[0], 0)).replica_id.unique_id  # type: ignore[union-attr]

    took = [asyncio.run(taken(f"item {i}")) for i in range(40)]
    assert max(map(took.count, "ab")) <= 1.25 * 20


def test_loads_count_from_the_choice_to_the_answer() -> None:
    loads = Loads()
    loads.chosen("call 1", "a", 5, now=0)
    loads.chosen("call 2", "a", 7, now=0)
    loads.sent("call 2", "b")  # the first choice was full
    assert loads.of(["a", "b"], now=1) == {"a": 5, "b": 7}
    loads.answered("call 2")
    assert loads.of(["a", "b"], now=FORGET_UNROUTED_S + 1) == {"a": 0, "b": 0}, "call 1 never reached a replica"


def test_a_long_call_still_counts() -> None:
    loads = Loads()
    loads.chosen("call", "a", 5, now=0)
    loads.sent("call", "a")
    assert loads.of(["a"], now=1e9) == {"a": 5}


class Replica:
    max_ongoing_requests = 100

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("Encoder", "shop"))


def pending(call: str, item_hash: str, cost: int, version: Version = ANY) -> Any:
    prompt = Prompt([1], (Item("image", item_hash, 0, cost, None, None),))
    return SimpleNamespace(
        args=[StageRequest("id", prompt, None, version=version)],
        metadata=SimpleNamespace(internal_request_id=call),
        routing_context=SimpleNamespace(should_backoff=False),
    )


@pytest.fixture
def router() -> LeastCostRouter:
    made = object.__new__(LeastCostRouter)
    made._deployment_id, made._replicas = DeploymentID("Encoder", "shop"), {}
    made._use_replica_queue_len_cache, made._replica_queue_len_cache = True, ReplicaQueueLengthCache()
    made.initialize_state(headroom=1.25)
    return made


def choose(router: LeastCostRouter, request: Any, replicas: list[Replica]) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    return [replica.replica_id.unique_id for tier in ranks for replica in tier]


def test_items_of_one_request_are_chosen_for_with_each_other_in_mind(router: LeastCostRouter) -> None:
    replicas = [Replica(name) for name in ("a", "b")]
    first = [choose(router, pending(f"call {i}", f"item {i}", 100), replicas)[0] for i in range(6)]
    assert first.count("a") == first.count("b") == 3


def test_an_answered_call_frees_its_replica(router: LeastCostRouter) -> None:
    replicas = [Replica(name) for name in ("a", "b")]
    big = pending("big", "item", 1000)
    taken = choose(router, big, replicas)[0]
    router.on_request_routed(big, SimpleNamespace(unique_id=taken), None)
    assert choose(router, pending("next", "item", 10), replicas)[0] != taken
    router.on_request_completed(SimpleNamespace(unique_id=taken), "big")
    router.on_request_completed(SimpleNamespace(unique_id=taken), "next")
    assert choose(router, pending("again", "item", 10), replicas)[0] == taken


@pytest.fixture
def avoided(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(handles, "known", KnownReplicas())

    def avoid(*replicas: Replica) -> None:
        for replica in replicas:
            handles.known.avoid(replica.replica_id.to_full_id_str())

    return avoid


def test_an_item_passes_by_an_encoder_whose_engine_is_dead(
    router: LeastCostRouter, avoided: Callable[..., None]
) -> None:
    replicas = [Replica(name) for name in ("a", "b", "c")]
    home = choose(router, pending("1", "item", 10), replicas)[0]
    dead = next(replica for replica in replicas if replica.replica_id.unique_id == home)
    avoided(dead)
    assert home not in choose(router, pending("2", "item", 10), replicas)
    avoided(*replicas)
    assert len(choose(router, pending("3", "item", 10), replicas)) == 3, (
        "a call that fails at once, and prefill encodes"
    )


def two_choices(replicas: list[Replica], waits: bool) -> Callable[..., set[str]]:
    """Asks Ray's router of prefill and decode, as ours changes it, for the candidates of a call."""
    router: Any = object.__new__(PrefixRouter)
    router._deployment_id = DeploymentID("Decode", "shop")
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router.apply_locality_routing = lambda pending_request: set(router._replicas)
    router.initialize_state(waits=waits)

    def chosen(version: Version = ANY) -> set[str]:
        request: Any = pending("call", "item", 1, version)
        request.metadata.multiplexed_model_id = ""
        ranks = asyncio.run(router.choose_replicas(replicas, request))
        return {replica.replica_id.unique_id for tier in ranks for replica in tier}

    return chosen


class PrefixBench:
    """Ray's side of a router of prefill: replicas, and the lengths of their queues that it has heard of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        monkeypatch.setattr(handles, "known", KnownReplicas())
        self.lengths: dict[str, int] = {}
        self.replicas = [Replica(name) for name in names]
        self.router: Any = object.__new__(PrefixRouter)
        self.router._deployment_id = DeploymentID("Stage", "shop")
        self.router._replicas = {replica.replica_id: replica for replica in self.replicas}
        self.router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: self.lengths.get(replica.unique_id))
        self.router.apply_locality_routing = lambda pending_request: set(self.router._replicas)
        self.router.initialize_state()
        self.handle = StageHandle(Stage.PREFILL, FakeHandle(lambda *_, **__: None))  # type: ignore[arg-type]
        self.affinity = Affinity(1000)
        self.handle.place_by(self.affinity)

    def choose(self, request_id: str) -> list[list[str]]:
        request = pending("call", "item", 1)
        request.args = [msgspec.structs.replace(request.args[0], request_id=request_id)]
        request.metadata.multiplexed_model_id = ""
        tiers = asyncio.run(self.router.choose_replicas(self.replicas, request))
        assert request.routing_context.should_backoff or request_id not in self.affinity._calls
        if tiers and tiers[0]:
            self.router.on_request_routed(request, tiers[0][0].replica_id, None)
        return [[replica.replica_id.unique_id for replica in tier] for tier in tiers]

    def did(self, request_id: str) -> str:
        """The replica of a call that is answered."""
        self.affinity.expect(request_id, PROMPT)
        first = self.choose(request_id)[0][0]
        self.affinity.found(request_id, 0)
        self.affinity.ended(request_id)
        return first


PROMPT = Prefix((1, 2, 3, 4), 300)


def test_an_announced_call_tries_every_replica_and_first_that_with_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefixBench(monkeypatch, "a", "b", "c")
    home = bench.did("first")
    bench.affinity.expect("second", PROMPT)
    order = bench.choose("second")
    assert order[0] == [home]
    assert sorted(name for tier in order for name in tier) == ["a", "b", "c"]
    assert bench.handle.expected(PROMPT)[0] == 4 * BLOCK


def test_calls_of_others_at_a_replica_count_as_far_as_ray_has_heard_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefixBench(monkeypatch, "a", "b")
    home = bench.did("first")
    bench.lengths[home] = 20
    bench.affinity.expect("second", PROMPT)
    assert bench.choose("second")[0] != [home]


def test_a_call_that_was_not_announced_goes_by_rays_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefixBench(monkeypatch, *REPLICAS)
    seen = [bench.choose("other") for _ in range(30)]
    assert all(len(order) == 1 and len(order[0]) == 2 for order in seen)
    assert {name for order in seen for name in order[0]} == set(REPLICAS)


def test_an_announced_call_passes_by_a_replica_whose_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefixBench(monkeypatch, "a", "b")
    handles.known.avoid(bench.replicas[0].replica_id.to_full_id_str())
    bench.affinity.expect("call", PROMPT)
    assert bench.choose("call") == [["b"]]


def test_replicas_that_serve_has_removed_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = PrefixBench(monkeypatch, "a", "b")
    home = bench.did("call")
    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "update_replicas", lambda *_: None)
    bench.router._replicas = {r.replica_id: r for r in bench.replicas if r.replica_id.unique_id != home}
    assert bench.affinity.blocks == 4
    bench.router.update_replicas([])
    assert bench.affinity.blocks == 0


OLD, NEW = Version("f", weights="old"), Version("f", weights="new")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Replica, Version], None]:
    """Have a replica tell its version."""
    monkeypatch.setattr(handles, "known", KnownReplicas())
    return lambda replica, version: handles.known.learn(replica.replica_id.to_full_id_str(), version)


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_passes_by_replicas_of_another_version(told: Callable[..., None], waits: bool) -> None:
    replicas = [Replica(name) for name in REPLICAS]
    chosen = two_choices(replicas, waits)
    told(replicas[0], OLD)
    told(replicas[1], OLD)
    for _ in range(20):  # of two at random both can be of the other version
        assert chosen(NEW) <= {"c", "d"}
        assert 1 <= len(chosen(ANY)) <= 2
    told(replicas[2], NEW)
    told(replicas[3], OLD)
    assert chosen(NEW) == {"c"}
    told(replicas[2], OLD)
    assert chosen(NEW), "one of those refuses it, and the request hears of it: no call waits behind it"


def test_an_item_passes_by_encoders_of_another_version(router: LeastCostRouter, told: Callable[..., None]) -> None:
    replicas = [Replica(name) for name in ("a", "b", "c")]
    told(replicas[0], OLD)
    told(replicas[1], NEW)
    assert set(choose(router, pending("1", "item", 10, NEW), replicas)) == {"b", "c"}
    assert set(choose(router, pending("2", "item", 10), replicas)) == {"a", "b", "c"}


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_passes_by_a_replica_whose_engine_is_dead(avoided: Callable[..., None], waits: bool) -> None:
    replicas = [Replica(name) for name in ("a", "b")]
    chosen = two_choices(replicas, waits)

    assert chosen() == {"a", "b"}
    avoided(replicas[0])
    assert chosen() == {"b"}
    avoided(*replicas)
    assert chosen() == (set() if waits else {"a", "b"})


def test_calls_without_an_item_go_anywhere(router: LeastCostRouter) -> None:
    replicas = [Replica("a"), Replica("b")]
    assert asyncio.run(router.choose_replicas(replicas, None)) == [replicas]
    assert asyncio.run(router.choose_replicas([], None)) == []


def test_a_handle_knows_whether_an_encoder_takes_calls(router: LeastCostRouter) -> None:
    def handle(stage: Stage, app_name: str) -> Any:
        made = object.__new__(StageHandle)
        made.stage, made._unary = stage, SimpleNamespace(app_name=app_name, deployment_name=stage.capitalize())  # type: ignore[assignment]
        return made

    assert handle(Stage.ENCODER, "shop").absent
    assert not handle(Stage.PREFILL, "shop").absent
    assert not handle(Stage.ENCODER, "another").absent
    router._replicas = {"a": Replica("a")}  # type: ignore[dict-item]
    assert not handle(Stage.ENCODER, "shop").absent


class Room:
    """A replica that takes so many calls."""

    def __init__(self, name: str, calls: int) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("Decode", "shop"))
        self.max_ongoing_requests, self.calls = 40, 40 - calls

    async def get_queue_len(self, deadline_s: float) -> int:
        return self.calls


def waiting(version: Version = ANY, age_s: float = 0.0) -> PendingRequest:
    """A call that no replica has taken yet."""
    request = StageRequest("id", Prompt([1]), None, version=version)
    metadata = RequestMetadata(generate_request_id(), generate_request_id(), call_method="decode")
    return PendingRequest([request], {}, metadata, created_at=time.time() - age_s)


def as_ray_sends_it(name: str) -> Any:
    """The class as it is made anew in the process of an ingress. An attribute that its base has too does not get there."""
    config = RequestRouterConfig(request_router_class=f"serve_app.routing.routers:{name}")
    with patch.multiple(
        cloudpickle,
        _DYNAMIC_CLASS_TRACKER_BY_CLASS=WeakKeyDictionary(),
        _DYNAMIC_CLASS_TRACKER_BY_ID=WeakValueDictionary(),
    ):
        return config.get_request_router_class()


def sent(name: str) -> Any:
    made: Any = object.__new__(as_ray_sends_it(name))
    made._deployment_id, made._use_replica_queue_len_cache = DeploymentID("Encoder", "sent"), False
    return made


def full(*replicas: Room) -> Any:
    """Ray's own router of decode in front of replicas. It looks again after half a second."""
    made: Any = as_ray_sends_it("PrefixRouter")(
        deployment_id=DeploymentID("Decode", "shop"),
        handle_source=DeploymentHandleSource.REPLICA,
        initial_backoff_s=0.5,
        max_backoff_s=0.5,
    )
    made._replicas = {replica.replica_id: replica for replica in replicas}
    made._replicas_list, made._replica_id_set = list(replicas), set(made._replicas)
    made.initialize_state()
    return made


def test_a_replica_takes_the_call_that_it_was_chosen_for(told: Callable[..., None]) -> None:
    old, new = Room("a", calls=0), Room("b", calls=1)
    told(old, OLD)  # type: ignore[arg-type]
    told(new, NEW)  # type: ignore[arg-type]

    async def places() -> list[Room]:
        router = full(old, new)
        first, second = (asyncio.create_task(router._choose_replica_for_request(waiting(each))) for each in (OLD, NEW))
        await second
        assert not first.done()
        old.calls = 0
        return [await first, await second]

    assert asyncio.run(asyncio.wait_for(places(), 10)) == [old, new]


def test_calls_that_waited_come_through_at_once_when_there_is_room(told: Callable[..., None]) -> None:
    """Those included that had been sent to a replica which then had no room: they are older than what waits already."""
    replica = Room("a", calls=0)

    async def come() -> float:
        router = full(replica)
        calls = [asyncio.create_task(router._choose_replica_for_request(waiting())) for _ in range(2)]
        await asyncio.sleep(0.1)  # both look for room
        for _ in range(30):
            refused = router._choose_replica_for_request(waiting(age_s=1.0), is_retry=True)
            calls.append(asyncio.create_task(refused))
        await asyncio.sleep(0.1)
        assert not any(call.done() for call in calls)
        replica.calls, began = 0, time.monotonic()
        await asyncio.gather(*calls)
        return time.monotonic() - began

    assert asyncio.run(asyncio.wait_for(come(), 60)) < 2, "two come with each look"


@pytest.mark.parametrize("name", ["LeastCostRouter", "PrefixRouter"])
def test_the_router_is_known_to_the_handle_as_ray_sends_it(name: str) -> None:
    made = sent(name)
    made.initialize_state()
    assert handles.known.routers["sent", "Encoder"] is made


@pytest.mark.parametrize("name", ["LeastCostRouter", "PrefixRouter"])
def test_a_call_is_told_where_it_is_sent(name: str) -> None:
    router, call = sent(name), Call(0.0)
    first, second, third = (ReplicaID(each, DeploymentID("Decode", "shop")) for each in ("r1", "r2", "r3"))
    token = sending.set(call)
    router.on_send_request(first)
    assert call.replica == "SERVE_REPLICA::shop#Decode#r1"
    router.on_send_request(second)  # the first had no room
    assert call.replica == "SERVE_REPLICA::shop#Decode#r2"
    sending.reset(token)
    router.on_send_request(third)  # of another call
    assert call.replica == "SERVE_REPLICA::shop#Decode#r2"
