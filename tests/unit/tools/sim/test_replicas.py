"""Replicas of the stages as queues: against formulas, and against what can be counted by hand."""

import numpy as np
import pytest

from tests.unit.tools.sim.parts import replica, request, times
from tools.sim.loop import Loop
from tools.sim.replicas import Call, Decode, Encoder, Prefill, PrefillDecode


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


def test_an_encoder_prepares_one_after_the_other_and_encodes_together_what_fits_in_a_step() -> None:
    loop, ended = Loop(), []
    service = times(prepare_s=0.1, encode_step_s=1.0, encode_embed_s=0.001).model_copy(update={"encode_embeds": 1000})
    encoder = replica(Encoder, loop, service)
    for _ in range(4):
        encoder.take(Call(request(), 400, lambda _: ended.append(loop.now)))
    loop.run()

    # The first alone: 0.1 and 1.4. Meanwhile the others are prepared; two of them fit: 1.8, and the last takes 1.4.
    assert ended == pytest.approx([1.5, 3.3, 3.3, 4.7])
    assert encoder.begun == 4 and encoder.waited_s == pytest.approx(0.1 + 1.5 + 1.5 + 3.3)


def test_an_embedding_costs_more_the_more_are_beside_it() -> None:
    loop, ended = Loop(), []
    service = times(encode_embed_s=0.001).model_copy(update={"encode_embeds": 1000, "encode_beside_s": 0.00001})
    encoder = replica(Encoder, loop, service)
    for _ in range(3):
        encoder.take(Call(request(), 100, lambda _: ended.append(loop.now)))
    loop.run()

    assert ended == pytest.approx([0.1 + 0.1, *[0.2 + 0.2 + 0.4] * 2])


def test_decode_that_prefills_cuts_a_prompt_by_what_runs_and_holds_up_the_others() -> None:
    loop, firsts, ended = Loop(), {}, {}
    service = times(prefill_token_s=0.001, decode_step_s=0.1).model_copy(update={"batch_tokens": 101, "slots": 2})
    decode = replica(PrefillDecode, loop, service)

    def take(name: str, prompt: int, tokens: int) -> None:
        decode.take(
            Call(
                request(text=prompt),
                1,
                lambda _: ended.update({name: loop.now}),
                tokens,
                lambda: firsts.update({name: loop.now}),
            )
        )

    take("a", 100, 4)
    take("b", 200, 1)
    take("c", 10, 1)  # waits for a slot
    loop.run()

    # a alone: 0.1 (it was there first). Then 100 of b beside a token of a: 0.2, twice; a's last beside 10 of c: 0.11.
    assert firsts == pytest.approx({"a": 0.1, "b": 0.5, "c": 0.61})
    assert ended == pytest.approx({"a": 0.61, "b": 0.5, "c": 0.61})
    assert decode.kv_use == 0.0


def test_a_pull_waits_for_the_end_of_prefills_step() -> None:
    loop, pulled = Loop(), []
    service = times(prefill_token_s=0.001).model_copy(update={"batch_tokens": 100, "pull_steps": 1})
    prefill = replica(Prefill, loop, service)
    prefill.take(Call(request(text=100), 100, lambda _: None))
    for at in (0.04, 0.5):
        loop.at(at, lambda: prefill.pull(lambda: pulled.append(loop.now)))
    loop.run()

    assert pulled == pytest.approx([0.1, 0.5])


def test_embeddings_may_cost_prefill_less_than_other_tokens() -> None:
    loop, ended = Loop(), []
    prefill = replica(Prefill, loop, times(prefill_token_s=0.002, prefill_embed_s=0.001))
    prefill.take(Call(request(embeds=(300,), text=100), 400, lambda _: ended.append(loop.now)))
    loop.run()

    assert ended == pytest.approx([0.5])
