"""Prefix caches, conversations, and who prefills: production's rule with the queue lengths that Ray knows."""

import random
from functools import partial

import pytest

from serve_app.routing.affinity import Affinity
from serve_app.routing.prefix import BLOCK, Prefix
from serve_app.stage import Stage
from tests.unit.tools.sim.parts import TIMES, replica, request, times
from tools.sim.by_prefix import ByPrefix, KnownLengths, KnownTwo
from tools.sim.caches import BlockCache
from tools.sim.conversations import Conversations, Talk, conversations
from tools.sim.loop import Loop, OwnCore
from tools.sim.pools import Cards, Pool
from tools.sim.prefix import LOADS, cases, prefix
from tools.sim.replicas import Call, Prefill
from tools.sim.run import SLO, Result, simulate
from tools.sim.service import ServiceTimes
from tools.sim.traffic import Kind, Request


def prompt(*keys: int, tokens: int | None = None) -> Prefix:
    return Prefix(keys, tokens or len(keys) * BLOCK + 1)


def asking(number: int, asked: Prefix) -> Request:
    made = request(number, text=asked.tokens)
    made.prefix = asked
    return made


def prefills(loop: Loop, count: int, service: ServiceTimes) -> Pool:
    made = Pool(
        Stage.PREFILL, loop, lambda name: Prefill(name, loop, OwnCore(loop), service, 1.0), 0.0, 256, 9, Cards()
    )
    made.scale(count, at_once=True)
    return made


# ---- caches


def test_of_a_prompt_the_leading_blocks_are_cached_and_its_last_token_never() -> None:
    cache = BlockCache(100 * BLOCK)
    for asked, cached in ((prompt(1, 2, 3), 0), (prompt(1, 2, 9), 2), (prompt(7, 2, 3), 0), (prompt(1, 2, 3), 3)):
        assert cache.begin(asked) == cached * BLOCK
        cache.end(asked.keys)

    assert cache.begin(prompt(1, 2, 3, tokens=3 * BLOCK)) == 2 * BLOCK


def test_the_prompt_that_ended_first_loses_its_tail_first_and_one_that_runs_nothing() -> None:
    cache = BlockCache(4 * BLOCK)
    first, second, third = prompt(1, 2), prompt(3, 4), prompt(5)
    for asked in (first, second):
        cache.begin(asked)
    cache.end(second.keys)
    cache.begin(third)  # 1 and 2 are older, but run

    assert cache.begin(prompt(3, 4)) == BLOCK
    assert cache.begin(first) == 2 * BLOCK
    assert BlockCache(0).begin(first) == 0


def test_prefill_computes_what_its_cache_does_not_hold() -> None:
    loop, ended = Loop(), []
    service = times(prefill_token_s=1.0).model_copy(update={"cache_tokens": 100 * BLOCK})
    one = replica(Prefill, loop, service)
    for number, asked in enumerate((prompt(1, 2), prompt(1, 2, 3))):
        call = Call(asking(number, asked), asked.tokens, lambda call: ended.append((loop.now, call.cached)))
        loop.at(1000.0 * number, partial(one.take, call))
    loop.run()

    assert ended == [(2 * BLOCK + 1.0, 0), (1000 + BLOCK + 1.0, 2 * BLOCK)]


# ---- conversations


def talk(turns: int = 3, images: int = 0) -> Talk:
    kind = Kind(images, 128, 100, 50, scatter=0.0)
    return Talk(system_tokens=3 * BLOCK, turns=turns, first=kind, later=kind, window=2)


def turns(traffic: Conversations) -> list[Request]:
    """Of the first conversation, each a second after the last one was asked."""
    made = [next(traffic.requests(1))]
    while True:
        made[-1].outcome = "ok"
        following = traffic.then(made[-1], made[-1].at + 1)
        if following is None:
            return made
        made.append(following)


def test_a_turn_begins_with_the_last_one_and_comes_after_it() -> None:
    first, second, third = turns(conversations("", 1.0, 1000.0, talk()))

    assert [each.prompt_tokens for each in (first, second, third)] == talk().prompt_tokens == [292, 442, 592]
    assert first.at + 1 < second.at and second.at + 1 < third.at
    for before, after in ((first, second), (second, third)):
        assert before.prefix and after.prefix and after.prefix.keys[: len(before.prefix.keys)] == before.prefix.keys


def test_conversations_share_the_first_blocks_only() -> None:
    one, other, *_ = conversations("", 1.0, 1000.0, talk()).requests(1)
    assert one.prefix and other.prefix

    assert set(one.prefix.keys) & set(other.prefix.keys) == set(one.prefix.keys[:3])


def test_when_an_image_leaves_the_prompt_begins_anew() -> None:
    asked = turns(conversations("", 1.0, 1000.0, talk(turns=4, images=1)))
    keys = [each.prefix.keys for each in asked if each.prefix]

    assert [each.prompt_tokens for each in asked] == talk(4, 1).prompt_tokens
    assert keys[1][: len(keys[0])] == keys[0]
    assert set(keys[2]) & set(keys[1]) == set(keys[3]) & set(keys[2]) == set(keys[0][:3])
    assert [len(each.embeds) for each in asked] == [1, 1, 1, 1]  # the others are encoded


def test_a_conversation_ends_with_a_request_that_fails() -> None:
    traffic = conversations("", 1.0, 1000.0, talk())
    first = next(traffic.requests(1))
    first.outcome = "refused"

    assert traffic.then(first, 2.0) is None


# ---- who prefills


def test_ray_knows_the_lengths_that_it_was_told_and_forgets_them() -> None:
    loop = Loop()
    pool = prefills(loop, 2, times(prefill_step_s=100.0))
    one, other = pool.names
    for number in range(3):  # calls of another ingress replica
        pool.by_name[one].take(Call(asking(number, prompt()), 1, lambda _: None))
    lengths = KnownLengths(loop)

    assert lengths.of(one) == 0
    assert lengths.take([one, other], pool) is pool.by_name[other]  # it asked both
    assert (lengths.of(one), lengths.of(other)) == (3, 1)
    lengths.answered(pool.by_name[other])
    assert lengths.of(other) == 0
    loop.run(11.0)
    assert lengths.of(one) == 0


def test_ray_takes_the_length_that_it_knows_for_the_true_one() -> None:
    loop = Loop()
    pool = prefills(loop, 2, times(prefill_step_s=1.0))
    router = KnownTwo(loop, random.Random(1))
    first = router.choose(Call(asking(0, prompt()), 1, lambda _: None), pool)
    for number in range(1, 9):
        pool.running[0 if first is pool.running[1] else 1].take(Call(asking(number, prompt()), 1, lambda _: None))

    assert router.choose(Call(asking(9, prompt()), 1, lambda _: None), pool) is not first


def test_a_prompt_goes_by_productions_rule_to_where_its_prefix_is() -> None:
    loop = Loop()
    service = times(prefill_token_s=0.001).model_copy(update={"cache_tokens": 100 * BLOCK})
    pool, router, went = prefills(loop, 4, service), ByPrefix(loop, 1000), []

    def answered(call: Call) -> None:
        assert call.replica is not None
        router.answered(call)
        went.append((call.replica.name, call.cached))

    def send(call: Call) -> None:
        assert pool.call(call, router)

    for number, asked in enumerate((prompt(1, 2), prompt(8, 9), prompt(1, 2, 3), prompt(8, 9))):
        call = Call(asking(number, asked), asked.tokens, answered)
        call.key = str(number)
        loop.at(10.0 * number, partial(send, call))
    loop.run()

    assert went[0][0] == went[2][0] and went[1][0] == went[3][0]
    assert [cached for _, cached in went] == [0, 0, 2 * BLOCK, 2 * BLOCK]
    assert isinstance(router.affinity, Affinity)


# ---- the experiment


def play(strategy: str, traffic: str) -> Result:
    plan = prefix(4, strategy, traffic, True, TIMES)
    asked, replicas, shape, warm_s = plan
    return simulate(TIMES, asked, replicas, shape, SLO(2.0, 0.05), 3, warm_s)


@pytest.mark.parametrize("ingresses", ["1 ingress", "16 ingresses"])
def test_conversations_are_cached_by_prefix_and_work_is_shared(ingresses: str) -> None:
    ours, rays = (play(f"{rule}, {ingresses}", "conversations") for rule in ("by prefix", "two choices"))

    assert ours.cached >= 2 * rays.cached
    assert ours.ttft_p50_s <= 0.6 * rays.ttft_p50_s
    assert ours.most_work <= 1.5


def test_each_case_has_its_traffic() -> None:
    for quick in (True, False):
        assert {traffic for _, _, traffic in cases(quick)} == set(LOADS)
