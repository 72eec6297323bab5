"""The simulation: its queues against formulas, its counts against what came in, and production's code in its decisions."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from serve_app.config import EncodeConfig
from serve_app.ingress import encode_rule
from serve_app.routing import routers
from serve_app.stage import Stage
from serve_app.stages.workload import Meter
from tools.sim import __main__ as command
from tools.sim.app import App, Shape
from tools.sim.control import Controller
from tools.sim.loop import Loop, OwnCore, SharedCores
from tools.sim.pools import Cards, Pool, TwoChoices
from tools.sim.replicas import Call, Decode, Encoder, Prefill, Replica
from tools.sim.run import SLO, Result, Strategy, simulate
from tools.sim.service import ServiceTimes, load
from tools.sim.traffic import Kind, Request, Traffic, burst, day, steady

TIMES = load(command.ASSUMED)
ONE_IMAGE = Kind(images=1, embeds=2000, text_tokens=300, output_tokens=50)


def request(number: int = 0, embeds: tuple[int, ...] = (), text: int = 100, output: int = 10) -> Request:
    return Request(number, 0.0, embeds, text, output)


def times(**changes: Any) -> ServiceTimes:
    """Nothing takes time but what is named."""
    nothing = {name: 0.0 for name in ServiceTimes.model_fields if name.endswith("_s") and name != "start_up_s"}
    return TIMES.model_copy(update=nothing | changes)


def replica(kind: type[Replica], loop: Loop, service: ServiceTimes, cores: Any = None) -> Any:
    return kind("one", loop, cores or OwnCore(loop), service, 1.0)


# ---- time and cores


def test_actions_run_in_time_and_those_of_a_moment_in_the_order_they_were_asked_for() -> None:
    loop, ran = Loop(), []
    for name, moment in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        loop.at(moment, lambda name=name: ran.append((name, loop.now)))
    loop.run()

    assert ran == [("a", 1.0), ("b", 2.0), ("c", 2.0)]


def test_shared_cores_are_divided_equally_among_those_that_work() -> None:
    loop, ended = Loop(), {}
    cores = SharedCores(loop, 2.0)
    for name, seconds in (("short", 1.0), ("long", 2.0), ("longer", 3.0)):
        cores.start(seconds, lambda name=name: ended.update({name: loop.now}))
    loop.run()

    # Three on two cores: 2/3 each until the short one ends at 1.5; from then on a core each.
    assert ended == pytest.approx({"short": 1.5, "long": 2.5, "longer": 3.5})


def test_work_that_is_stopped_says_how_much_is_done() -> None:
    loop = Loop()
    cores = SharedCores(loop, 1.0)
    work = cores.start(4.0, lambda: pytest.fail("stopped work does not end"))
    cores.start(4.0, lambda: None)
    loop.at(2.0, lambda: done.append(cores.stop(work)))
    done: list[float] = []
    loop.run()

    assert done == pytest.approx([1.0]) and loop.now == pytest.approx(5.0)


# ---- queues against formulas


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_an_encoder_is_an_m_d_1_queue(busy: float) -> None:
    loop, chance, waits = Loop(), np.random.default_rng(7), []
    encoder = replica(Encoder, loop, times(encode_s=1.0))

    def arrive(at: float) -> None:
        encoder.take(Call(request(), 1, lambda _: waits.append(loop.now - at - 1.0)))

    for at in np.cumsum(chance.exponential(1 / busy, 30_000)):
        loop.at(float(at), lambda at=float(at): arrive(at))
    loop.run()

    assert np.mean(waits) == pytest.approx(busy / (2 * (1 - busy)), rel=0.1)


def test_exponential_service_is_an_m_m_1_queue() -> None:
    loop, chance, waits = Loop(), np.random.default_rng(3), []
    encoder = replica(Encoder, loop, times(encode_embed_s=1e-4))
    for at in np.cumsum(chance.exponential(2.0, 30_000)):
        work = round(chance.exponential(10_000))

        def arrive(at: float, work: int) -> None:
            encoder.take(Call(request(), work, lambda _: waits.append(loop.now - at - work * 1e-4)))

        loop.at(float(at), lambda at=float(at), work=work: arrive(at, work))
    loop.run()

    assert np.mean(waits) == pytest.approx(1.0, rel=0.1)  # half busy: as long as the service takes


def test_prefill_takes_what_fits_in_a_step_and_goes_on_with_the_rest_in_the_next() -> None:
    loop, ended = Loop(), {}
    prefill = replica(
        Prefill, loop, times(prefill_step_s=1.0, prefill_token_s=0.001).model_copy(update={"batch_tokens": 1000})
    )
    for name, tokens in (("a", 600), ("b", 1000), ("c", 100)):
        prefill.take(Call(request(), tokens, lambda _, name=name: ended.update({name: loop.now})))
    loop.run()

    # a alone (it was there first): 1.6. Then 1000 of b: 2.0. Then c: 1.1.
    assert ended == pytest.approx({"a": 1.6, "b": 3.6, "c": 4.7})


def test_sequences_that_decode_together_share_the_steps() -> None:
    loop, firsts, ended = Loop(), {}, {}
    decode = replica(Decode, loop, times(decode_step_s=0.9, decode_sequence_s=0.1))

    def take(name: str, tokens: int) -> None:
        decode.take(
            Call(
                request(),
                1,
                lambda _: ended.update({name: loop.now}),
                tokens=tokens,
                first=lambda: firsts.update({name: loop.now}),
            )
        )

    take("long", 10)
    loop.at(4.0, lambda: take("short", 3))
    loop.run()

    # Alone a step takes 1.0, together 1.1. The long one has 4 tokens when the short one comes, and 3 more with it.
    assert firsts == pytest.approx({"long": 1.0, "short": 5.1})
    assert ended == pytest.approx({"short": 4 + 3 * 1.1, "long": 4 + 3 * 1.1 + 3})


def test_decode_runs_as_many_as_it_has_slots_and_room_for() -> None:
    loop, ended = Loop(), []
    service = times(decode_step_s=1.0).model_copy(update={"slots": 2, "kv_tokens": 250})
    decode = replica(Decode, loop, service)
    for name, text in (("a", 100), ("b", 100), ("c", 10), ("d", 200)):
        call = Call(request(text=text), 1, lambda _, name=name: ended.append((name, loop.now)), tokens=10)
        decode.take(call)
    loop.run()

    # c waits for a slot though its cache would fit; d waits until the cache has room for it.
    assert ended == [("a", 10.0), ("b", 10.0), ("c", 20.0), ("d", 20.0)]


# ---- replicas come and go


def pool(loop: Loop, service: ServiceTimes, cards: Cards | None = None, lease_s: float = 0.0) -> Pool:
    return Pool(
        Stage.ENCODER, loop, lambda name: Encoder(name, loop, OwnCore(loop), service, 1.0), 40.0, 256, 100,
        cards or Cards(), lease_s=lease_s,
    )  # fmt: skip


def test_a_call_without_a_replica_waits_for_its_start_and_a_drained_replica_ends_what_it_has() -> None:
    loop, answers = Loop(), []
    encoders = pool(loop, times(encode_s=5.0))
    encoders.call(Call(request(), 1, lambda _: answers.append(loop.now)), TwoChoices(random.Random(0)))
    encoders.scale(1)
    loop.at(41.0, lambda: encoders.scale(0))
    loop.run()

    assert answers == [45.0]
    assert encoders.gpu_seconds == pytest.approx(45.0) and not encoders.draining


def test_a_drained_encoder_keeps_its_card_for_the_lease() -> None:
    loop = Loop()
    encoders = pool(loop, times(), lease_s=60.0)
    encoders.scale(1, at_once=True)
    loop.at(10.0, lambda: encoders.scale(0))
    loop.run()

    assert encoders.gpu_seconds == pytest.approx(70.0)


def test_who_finds_no_card_starts_when_one_is_given_back() -> None:
    loop, cards = Loop(), Cards(1)
    first, second = pool(loop, times(), cards), pool(loop, times(), cards)
    first.scale(1, at_once=True)
    second.scale(1)
    loop.at(100.0, lambda: first.scale(0))
    loop.run(139.0)
    assert not second.running
    loop.run(141.0)

    assert second.running and cards.free == 0


# ---- whole simulations


def run(seed: int = 1, strategy: Strategy | None = None, rate: float = 30.0, **shape: Any) -> tuple[Traffic, Result]:
    traffic = steady("test", rate, 60.0, ONE_IMAGE)
    strategy = strategy or Strategy("static", dict.fromkeys(Stage, 2))
    return traffic, simulate(TIMES, traffic, strategy, Shape(**shape), SLO(2.0, 0.05), seed)


def test_every_request_ends_once() -> None:
    traffic, result = run(stage=Shape().stage.model_copy(update={"max_queued_requests": 5, "max_ongoing_requests": 2}))

    assert sum(result.outcomes.values()) == result.requests == len(list(traffic.requests(1)))
    assert set(result.outcomes) > {"ok"}  # some were refused


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    assert run(seed=5)[1] == run(seed=5)[1]
    assert run(seed=5)[1] != run(seed=6)[1]


def test_fixed_replicas_cost_their_number() -> None:
    _, result = run()

    assert result.gpu_s_per_request * result.requests == pytest.approx(6 * 60.0)


def test_decisions_are_productions(monkeypatch: pytest.MonkeyPatch) -> None:
    called: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            called[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(routers, "rank")
    counting(encode_rule, "encode_at_prefill")
    counting(Meter, "call")
    _, result = run()

    assert called["rank"] == called["encode_at_prefill"] == result.requests
    assert called["call"] == 3 * result.requests


def test_items_that_the_rule_leaves_to_prefill_never_reach_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "rank", lambda *_: pytest.fail("no encoder is asked"))
    _, result = run(rate=8.0, encode=EncodeConfig(min_embeds=10**6))

    assert result.at_prefill == 1.0 and result.outcomes == {"ok": result.requests}


def test_without_encoders_items_are_encoded_by_prefill_when_the_attempts_are_over() -> None:
    strategy = Strategy("none", {Stage.PREFILL: 2, Stage.DECODE: 2})
    _, result = run(rate=8.0, strategy=strategy, encode=EncodeConfig(timeout_s=1.0, attempts=2))

    assert result.at_prefill == 1.0 and result.outcomes == {"ok": result.requests}
    assert result.ttft_p99_s > 2.0


# ---- the autoscaling loop


def controlled(config: AutoscalingConfig, gpus: float | None = None) -> tuple[Loop, App]:
    loop = Loop()
    app = App(loop, TIMES, Shape(), 1)
    for stage_pool in app.pools.values():
        stage_pool.scale(1, at_once=True)
    configs = {Stage.ENCODER: config}
    Controller(loop, app.pools, configs, gpus).start(200.0)
    return loop, app


def keep_busy(app: App, calls: int) -> None:
    for number in range(calls):
        call = Call(request(number), 50_000, lambda _: None)  # a second each
        app.pools[Stage.ENCODER].call(call, TwoChoices(random.Random(0)))


def targets(loop: Loop, app: App) -> dict[float, int]:
    """When the target became what."""
    found: dict[float, int] = {}
    while loop.now < 200.0:
        loop.run(loop.now + 1.0)
        target = app.pools[Stage.ENCODER].target
        if not found or target != list(found.values())[-1]:
            found[loop.now] = target
    return found


@pytest.mark.parametrize("delay_s", [5.0, 25.0])
def test_more_replicas_are_asked_for_when_the_delay_is_over_in_simulated_time(delay_s: float) -> None:
    loop, app = controlled(AutoscalingConfig(max_replicas=4, target_ongoing_requests=2, upscale_delay_s=delay_s))
    loop.at(0.5, lambda: keep_busy(app, 1000))
    changed = targets(loop, app)

    # The push at 10 s is the first that knows of the calls: 10 s and the delay.
    assert list(changed.values())[:2] == [1, 4]
    assert list(changed)[1] == pytest.approx(10 + delay_s, abs=1.5)


def test_rays_clock_is_real_again_afterwards() -> None:
    import time

    loop, app = controlled(AutoscalingConfig(max_replicas=4))
    targets(loop, app)

    assert autoscaling_policy.time is time


def test_the_policies_of_a_config_decide_by_work_and_within_the_budget() -> None:
    for gpus, expected in ((None, 8), (3, 3)):
        config = command.by_work(8, None)[Stage.ENCODER]
        loop, app = controlled(config, gpus)
        loop.at(0.5, lambda app=app: keep_busy(app, 1000))
        assert max(targets(loop, app).values()) == expected


# ---- traffic and experiments


def test_a_burst_and_a_day_have_images_in_their_hours_only() -> None:
    kinds = Kind(), ONE_IMAGE
    for traffic, first, last in (
        (burst(5.0, 5.0, kinds, 100.0, 200.0, 300.0), 100.0, 200.0),
        (day(20.0, kinds, 400.0), 100.0, 300.0),
    ):
        images = [request.at for request in traffic.requests(1) if request.embeds]
        assert images and first <= min(images) and max(images) < last


def test_cards_are_split_by_need() -> None:
    need = {Stage.ENCODER: 1.0, Stage.PREFILL: 2.0, Stage.DECODE: 3.0}

    assert list(command.split(need, 12).values()) == [2, 4, 6]
    assert list(command.split(need | {Stage.ENCODER: 0.0}, 3).values()) == [1, 1, 1]


@pytest.mark.parametrize("experiment", command.EXPERIMENTS)
def test_each_experiment_runs(experiment: str) -> None:
    size = 1 if experiment in ("routing", "scale") else 6
    for strategy in command.STRATEGIES[experiment][-2:]:
        _, result, _ = command.do(command.Job(experiment, size, strategy, 0, quick=True), TIMES)
        assert sum(result.outcomes.values()) == result.requests > 0
