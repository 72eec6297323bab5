"""Replicas start, drain, and take cards from each other."""

import random

import pytest

from serve_app.stage import Stage
from tests.unit.tools.sim.parts import request, times
from tools.sim.loop import Loop, OwnCore
from tools.sim.pools import Cards, Pool, TwoChoices
from tools.sim.replicas import Call, Encoder
from tools.sim.service import ServiceTimes


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
