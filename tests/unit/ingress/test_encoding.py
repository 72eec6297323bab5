"""Which items go to an encoder, each of them once, and what happens when one fails."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from serve_app.config import EncodeConfig
from serve_app.handoff.errors import BadRequest, HandoffLost, OtherVersion, StageUnavailable
from serve_app.handoff.types import EncodeReply, Item, Prompt, StageRequest, Version
from serve_app.ingress.encoding import Encoded, Encodes, EncodeStage, encode_at_prefill
from serve_app.ingress.request import Request, current
from serve_app.observe.trace import Trace
from serve_app.stage import Stage
from tests.fakes import FakeClock, FakeStage, encoded

DOWN = StageUnavailable(Stage.ENCODER, "is gone")


def request(*items: tuple[str, int] | str, id: str = "req") -> StageRequest:
    """A request for items by name, of so many embeddings each (4 unless told)."""
    places: list[Item] = []
    for each in items:
        name, cost = (each, 4) if isinstance(each, str) else each
        data = MultiModalKwargsItem(
            {
                field: MultiModalFieldElem(data=torch.zeros(1), field=MultiModalBatchedField(keep_on_cpu=kept))
                for field, kept in (("pixels", False), ("grid", True))
            }
        )
        places.append(Item("image", name, sum(item.length for item in places), cost, None, data))
    return StageRequest(id, Prompt([7] * sum(item.length for item in places), tuple(places)), None)


async def answer(call: StageRequest) -> EncodeReply:
    return encoded(call)


class Bench:
    """An encode stage in front of one fake handle. ``fails``: what the first calls raise."""

    def __init__(
        self,
        encode: Callable[[StageRequest], Awaitable[EncodeReply]] = answer,
        fails: list[Exception] | None = None,
        shareable: bool = True,
        timeout_s: float = 30,
        **config: Any,
    ) -> None:
        self.clock = FakeClock()
        self.handle: Any = FakeStage(Stage.ENCODER, fails={"encode": fails or []}, encode=encode)
        self.stage = EncodeStage(
            self.handle, EncodeConfig(**config), timeout_s, shareable, lambda modality: frozenset(), clock=self.clock
        )

    @property
    def asked(self) -> list[str]:
        """Names of the items that were sent, in order."""
        return [call.prompt.items[0].hash for call in self.handle.requests("encode")]

    async def encode(self, *items: tuple[str, int] | str, record: Trace | None = None) -> Encoded:
        return await self.stage.encode(request(*items), record or Trace("req"))

    def at_rest(self) -> bool:
        return self.stage.state.outstanding == 0 and not self.stage._flights


def with_pixels(result: Encoded) -> list[str]:
    return [item.hash for item in result.prompt.items if "pixels" in item.data]


def places(result: Encoded) -> dict[str, list[int]]:
    return {name: entry["item_indices"] for name, entry in (result.ec_transfer_params or {}).items()}


async def hang(call: StageRequest) -> EncodeReply:
    await asyncio.Event().wait()
    raise AssertionError


# ---- the rule


@pytest.mark.parametrize(
    ("cost", "encodes", "config", "reason"),
    [
        (1, Encodes(), {}, None),
        (15, Encodes(), {"min_embeds": 16}, "small"),
        (16, Encodes(), {"min_embeds": 16}, None),
        (16, Encodes(down=True, probe_at=100.1), {}, "encoders down"),
        (16, Encodes(absent=True), {}, "no encoder"),
        (1, Encodes(absent=True), {"min_embeds": 2}, "small"),
        (16, Encodes(down=True, probe_at=100.0), {}, None),
        (16, Encodes(down=False, probe_at=200.0), {}, None),
        (10, Encodes(outstanding=90), {"max_outstanding_embeds": 100}, None),
        (11, Encodes(outstanding=90), {"max_outstanding_embeds": 100}, "encoders full"),
        (10**9, Encodes(outstanding=10**9), {"max_outstanding_embeds": 0}, None),
        (1, Encodes(200, True, 200.0), {"min_embeds": 2, "max_outstanding_embeds": 100}, "small"),
        (2, Encodes(200, True, 200.0), {"min_embeds": 2, "max_outstanding_embeds": 100}, "encoders down"),
        (2, Encodes(200, True, 100.0), {"min_embeds": 2, "max_outstanding_embeds": 100}, "encoders full"),
    ],
    ids=str,
)
def test_rule(cost: int, encodes: Encodes, config: dict[str, Any], reason: str | None) -> None:
    assert encode_at_prefill(cost, encodes, EncodeConfig(**config), now=100.0) == reason


def test_only_items_that_an_encoder_has_encoded_go_on_without_their_pixels() -> None:
    bench, record = Bench(min_embeds=5), Trace("req")
    result = asyncio.run(bench.encode(("tiny", 4), ("large", 5), ("tiny", 4), record=record))
    assert bench.asked == ["large"]
    assert with_pixels(result) == ["tiny", "tiny"]
    assert [set(item.data) >= {"grid"} for item in result.prompt.items] == [True] * 3
    assert places(result) == {"large": [1]}
    assert result.hashes == {"large"}
    assert record.rungs == ["encode-at-prefill(small)"]


def test_items_whose_tokens_are_interleaved_are_encoded_by_prefill_together() -> None:
    """An encoder's engine would end by a video without the sound that belongs to it."""
    asked = request("alone", "video", "sound")
    video, sound = asked.prompt.items[1:]
    items = (asked.prompt.items[0], video, msgspec.structs.replace(sound, offset=video.offset))
    asked = msgspec.structs.replace(asked, prompt=msgspec.structs.replace(asked.prompt, items=items))
    bench, record = Bench(), Trace("req")
    result = asyncio.run(bench.stage.encode(asked, record))
    assert bench.asked == ["alone"]
    assert with_pixels(result) == ["video", "sound"]
    assert record.rungs == ["encode-at-prefill(interleaved)"]


def test_prompt_whose_items_prefill_encodes_has_nothing_to_load() -> None:
    bench = Bench(min_embeds=5)
    result = asyncio.run(bench.encode("tiny"))
    assert (bench.asked, result.ec_transfer_params, result.hashes) == ([], None, frozenset())


def test_items_above_the_limit_of_work_are_encoded_by_prefill_until_there_is_room() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            await go.wait()
            return encoded(call)

        bench, record = Bench(encode, max_outstanding_embeds=10), Trace("req")
        first = asyncio.create_task(bench.encode(("a", 8)))
        await asyncio.sleep(0.01)
        assert bench.stage.state.outstanding == 8
        assert with_pixels(await bench.encode(("b", 3), record=record)) == ["b"]
        assert record.rungs == ["encode-at-prefill(encoders full)"]
        go.set()
        await first
        assert with_pixels(await bench.encode(("b", 3))) == []
        assert bench.asked == ["a", "b"]

    asyncio.run(main())


def test_items_of_one_prompt_share_the_limit_of_work() -> None:
    bench = Bench(max_outstanding_embeds=10)
    result = asyncio.run(bench.encode(("a", 8), ("b", 8)))
    assert (bench.asked, with_pixels(result)) == (["a"], ["b"])


# ---- the calls


def test_largest_items_are_sent_first() -> None:
    bench = Bench()
    result = asyncio.run(bench.encode(("a", 2), ("b", 9), ("c", 5)))
    assert bench.asked == ["b", "c", "a"]
    assert [item.hash for item in result.prompt.items] == ["a", "b", "c"]
    assert places(result) == {"a": [0], "b": [1], "c": [2]}


def test_all_items_are_encoded_at_the_same_time_and_a_repeated_one_once() -> None:
    async def main() -> None:
        together = asyncio.Barrier(3)

        async def encode(call: StageRequest) -> EncodeReply:
            await together.wait()  # passes only with all three calls in flight
            return encoded(call)

        bench = Bench(encode)
        result = await bench.encode("a", "b", "a", "c")
        assert sorted(bench.asked) == ["a", "b", "c"]
        assert places(result) == {"a": [0, 2], "b": [1], "c": [3]}
        assert with_pixels(result) == []

    asyncio.run(main())


def test_encoder_gets_the_item_with_its_pixels_and_an_id_of_the_request() -> None:
    bench = Bench()
    asyncio.run(bench.encode("a", "b"))
    for index, call in enumerate(bench.handle.requests("encode")):
        assert call.request_id.startswith(f"req:{index}:")
        assert [set(item.data) for item in call.prompt.items] == [{"pixels", "grid"}]


def test_trace_knows_the_encoders_and_when_they_were_done() -> None:
    async def encode(call: StageRequest) -> EncodeReply:
        return encoded(call, f"encoder-{call.prompt.items[0].hash}")

    record, text = Trace("req"), Trace("req")
    bench = Bench(encode)
    asyncio.run(bench.encode("a", "b", record=record))
    assert record.replicas == {"encoder": ["encoder-a", "encoder-b"]}
    assert record.longest.keys() == {"encode", "encoder queue"}
    assert record.rungs == []
    result = asyncio.run(bench.encode(record=text))
    assert (result.ec_transfer_params, text.longest, text.replicas) == (None, {}, {})


# ---- one call for all who want an item


def test_item_of_two_requests_at_once_is_one_call_whose_answer_both_get() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            await go.wait()
            return encoded(call)

        bench = Bench(encode, remember_s=0)
        both = asyncio.gather(bench.encode("a"), bench.encode("b", "a"))
        await asyncio.sleep(0.01)
        go.set()
        first, second = await both
        assert sorted(bench.asked) == ["a", "b"]
        assert (places(first), places(second)) == ({"a": [0]}, {"a": [1], "b": [0]})
        assert with_pixels(first) == with_pixels(second) == []
        assert bench.at_rest()

    asyncio.run(main())


def test_failed_call_is_tried_again_once_for_all_who_wait() -> None:
    async def main() -> None:
        bench = Bench(fails=[DOWN])
        records = Trace("one"), Trace("two")
        results = await asyncio.gather(*(bench.encode("a", record=record) for record in records))
        assert bench.asked == ["a", "a"]
        assert [with_pixels(result) for result in results] == [[], []]
        assert [record.rungs for record in records] == [["encode-again"], ["encode-again"]]

    asyncio.run(main())


def test_call_goes_on_while_someone_waits_for_it_and_ends_with_the_last() -> None:
    async def main() -> None:
        cancelled: list[str] = []
        go = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            try:
                await go.wait()
            except asyncio.CancelledError:
                cancelled.append(call.prompt.items[0].hash)
                raise
            return encoded(call)

        async def leave(task: asyncio.Task[Encoded]) -> None:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.01)

        bench = Bench(encode)
        first, second, third = (asyncio.create_task(bench.encode("a")) for _ in range(3))
        await asyncio.sleep(0.01)
        await leave(first)  # the one that began the call
        assert (cancelled, bench.stage.state.outstanding) == ([], 4)
        await leave(second)
        assert cancelled == []
        await leave(third)
        assert cancelled == ["a"]
        assert bench.at_rest()

        fourth, fifth = (asyncio.create_task(bench.encode("a")) for _ in range(2))
        await asyncio.sleep(0.01)
        await leave(fourth)
        go.set()
        assert places(await fifth) == {"a": [0]}
        assert (bench.asked, cancelled) == (["a", "a"], ["a"])
        assert bench.at_rest()

    asyncio.run(main())


def test_shared_call_runs_outside_the_context_of_the_request() -> None:
    """Serve would cancel it with the request that happened to come first."""
    seen: list[Trace | None] = []

    async def encode(call: StageRequest) -> EncodeReply:
        seen.append(current.get())
        return encoded(call)

    async def main() -> None:
        current.set(Request("req"))
        await Bench(encode).encode("a")

    asyncio.run(main())
    assert seen == [None]


def test_answer_that_serves_one_request_only_is_asked_for_by_each() -> None:
    async def main() -> None:
        together = asyncio.Barrier(2)

        async def encode(call: StageRequest) -> EncodeReply:
            await together.wait()
            return encoded(call)

        bench = Bench(encode, shareable=False)
        for _ in range(2):
            await asyncio.gather(bench.encode("a"), bench.encode("a"))
        assert bench.asked == ["a"] * 4
        assert bench.at_rest()

    asyncio.run(main())


# ---- what is remembered


def test_encoded_item_is_not_sent_again_until_its_time_is_over() -> None:
    async def main() -> None:
        bench, record = Bench(remember_s=300), Trace("req")
        await bench.encode("a")
        bench.clock.now += 300
        result = await bench.encode("b", "a", record=record)
        assert bench.asked == ["a", "b"]
        assert places(result) == {"a": [1], "b": [0]}
        assert with_pixels(result) == []
        assert record.replicas == {"encoder": ["encoder-0"]}
        assert (record.remembered_items, len(record.calls)) == (1, 1)
        assert record.by_item == {0: (0.0, "encoder-0"), 1: (0.0, "encoder-0")}
        bench.clock.now += 0.1
        await bench.encode("a", "b")
        assert bench.asked == ["a", "b", "a"]

    asyncio.run(main())


def test_item_that_was_lost_is_sent_again() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.encode("a", "b")
        bench.stage.forget(frozenset({"a", "never seen"}))
        await bench.encode("a", "b")
        assert bench.asked == ["a", "b", "a"]

    asyncio.run(main())


@pytest.mark.parametrize("nothing", [{"remember_s": 0}, {"remember_items": 0}], ids=str)
def test_nothing_is_remembered_where_that_is_off(nothing: dict[str, Any]) -> None:
    async def main() -> None:
        bench = Bench(**nothing)
        for _ in range(2):
            assert places(await bench.encode("a")) == {"a": [0]}
        assert bench.asked == ["a", "a"]

    asyncio.run(main())


def test_item_used_longest_ago_is_forgotten_first() -> None:
    async def main() -> None:
        bench = Bench(remember_items=2)
        for name in ("a", "b", "a", "c"):
            await bench.encode(name)
        assert bench.asked == ["a", "b", "c"]
        await bench.encode("a")
        assert bench.asked == ["a", "b", "c"]
        await bench.encode("b")
        assert bench.asked == ["a", "b", "c", "b"]

    asyncio.run(main())


def test_remembered_item_needs_no_encoder_that_works() -> None:
    async def main() -> None:
        bench = Bench(attempts=1)
        await bench.encode("a")
        bench.stage.state.down, bench.stage.state.probe_at = True, bench.clock.now + 5
        assert with_pixels(await bench.encode("a", "b")) == ["b"]
        assert bench.asked == ["a"]

    asyncio.run(main())


# ---- attempts, then prefill


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_item_is_sent_so_many_times_and_then_prefill_encodes_it(attempts: int) -> None:
    bench, record = Bench(fails=[DOWN] * 9, attempts=attempts, retry_encoders_after_s=5), Trace("req")
    result = asyncio.run(bench.encode("a", record=record))
    assert bench.asked == ["a"] * attempts
    assert (with_pixels(result), result.ec_transfer_params, result.hashes) == (["a"], None, frozenset())
    assert record.rungs == ["encode-again"] * (attempts - 1) + ["encode-at-prefill(failed)"]
    assert record.replicas == {}
    assert (bench.stage.state.down, bench.stage.state.probe_at) == (True, bench.clock.now + 5)


def test_item_that_another_attempt_encodes_is_as_any_other() -> None:
    async def encode(call: StageRequest) -> EncodeReply:
        return encoded(call, "encoder-1")

    bench, record = Bench(encode, fails=[DOWN]), Trace("req")
    result = asyncio.run(bench.encode("a", record=record))
    assert (bench.asked, with_pixels(result), places(result)) == (["a", "a"], [], {"a": [0]})
    assert record.rungs == ["encode-again"]
    assert record.replicas == {"encoder": ["encoder-1"]}
    assert bench.stage.state.down is False
    first, second = (call.request_id for call in bench.handle.requests("encode"))
    assert first != second


def test_item_that_fails_does_not_hinder_the_others() -> None:
    async def encode(call: StageRequest) -> EncodeReply:
        if call.prompt.items[0].hash == "bad":
            raise DOWN
        return encoded(call)

    bench = Bench(encode)
    result = asyncio.run(bench.encode("bad", "good", "bad"))
    assert with_pixels(result) == ["bad", "bad"]
    assert places(result) == {"good": [1]}
    assert result.hashes == {"good"}


def test_encoder_that_does_not_answer_in_time_is_a_failed_attempt() -> None:
    cancelled: list[str] = []

    async def encode(call: StageRequest) -> EncodeReply:
        try:
            return await hang(call)
        except asyncio.CancelledError:
            cancelled.append(call.request_id)
            raise

    bench, record = Bench(encode, timeout_s=0.02), Trace("req")
    result = asyncio.run(bench.encode("a", record=record))
    assert with_pixels(result) == ["a"]
    assert record.rungs == ["encode-again", "encode-at-prefill(failed)"]
    assert len(bench.asked) == len(cancelled) == 2
    assert bench.stage.state.down
    assert bench.at_rest()


@pytest.mark.parametrize("names", [(), ("b",), ("a", "b")], ids=str)
def test_answer_that_does_not_name_its_item_alone_is_a_failed_attempt(names: tuple[str, ...]) -> None:
    async def encode(call: StageRequest) -> EncodeReply:
        return EncodeReply({name: {"item_indices": [0]} for name in names}, "encoder-0")

    bench, record = Bench(encode), Trace("req")
    result = asyncio.run(bench.encode("a", record=record))
    assert (bench.asked, with_pixels(result), result.ec_transfer_params) == (["a", "a"], ["a"], None)
    assert record.rungs == ["encode-again", "encode-at-prefill(failed)"]
    assert "a" not in bench.stage._known


@pytest.mark.parametrize("shareable", [True, False])
def test_answer_that_does_not_name_its_item_is_a_lost_hand_off(shareable: bool) -> None:
    async def encode(call: StageRequest) -> EncodeReply:
        return EncodeReply({"another": {"item_indices": [0]}}, "encoder-0")

    with pytest.raises(HandoffLost, match=r"answered for \['another'\], not for a"):
        stage = Bench(encode, shareable=shareable).stage
        asyncio.run(stage._call(stage._job(request("a"), 0)))


@pytest.mark.parametrize("shareable", [True, False])
def test_item_that_the_encoder_refuses_is_not_sent_again_and_the_caller_hears_of_it(shareable: bool) -> None:
    cancelled: list[str] = []

    async def main() -> None:
        both = asyncio.Barrier(2)

        async def encode(call: StageRequest) -> EncodeReply:
            await both.wait()
            if call.prompt.items[0].hash == "bad":
                raise BadRequest("no such thing")
            try:
                return await hang(call)
            except asyncio.CancelledError:
                cancelled.append(call.prompt.items[0].hash)
                raise

        bench, record = Bench(encode, shareable=shareable), Trace("req")
        with pytest.raises(BadRequest, match="no such thing"):
            await bench.encode("good", "bad", record=record)
        await asyncio.sleep(0.01)
        assert sorted(bench.asked) == ["bad", "good"]
        assert (record.rungs, bench.stage.state.down) == ([], False)
        assert bench.at_rest()

    asyncio.run(main())
    assert cancelled == ["good"]


# ---- encoders that are down


async def take_down(bench: Bench) -> None:
    """Fail all attempts for an item, and forget that it was asked for."""
    await bench.encode("first")
    assert bench.stage.state.down
    bench.handle.calls.clear()


def test_encoders_that_are_down_are_left_alone_until_one_item_probes_them() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            await go.wait()
            return encoded(call)

        bench = Bench(encode, fails=[DOWN, DOWN], retry_encoders_after_s=5)
        await take_down(bench)
        bench.clock.now += 4.9
        record = Trace("req")
        assert with_pixels(await bench.encode("a", "b", record=record)) == ["a", "b"]
        assert record.rungs == ["encode-at-prefill(encoders down)"] * 2
        assert bench.asked == []

        bench.clock.now += 0.1
        probing = asyncio.create_task(bench.encode(("a", 1), ("b", 2), "c"))
        await asyncio.sleep(0.01)
        assert with_pixels(await bench.encode("d")) == ["d"]  # while the probe is on its way
        go.set()
        assert with_pixels(await probing) == ["a", "b"]
        assert bench.asked == ["c"]

        assert not bench.stage.state.down
        assert with_pixels(await bench.encode("a", "d")) == []
        assert bench.asked == ["c", "a", "d"]

    asyncio.run(main())


def test_probe_that_fails_leaves_them_alone_again() -> None:
    async def main() -> None:
        bench = Bench(fails=[DOWN] * 2, attempts=1, retry_encoders_after_s=5)
        await take_down(bench)
        bench.clock.now += 5
        assert with_pixels(await bench.encode("a", "b")) == ["a", "b"]
        assert bench.asked == ["a"]
        bench.clock.now += 4.9
        await bench.encode("c")
        assert bench.asked == ["a"]
        bench.clock.now += 0.1
        assert with_pixels(await bench.encode("c")) == []
        assert bench.asked == ["a", "c"]

    asyncio.run(main())


def test_probe_whose_client_left_is_made_again_by_another_item() -> None:
    async def main() -> None:
        bench = Bench(hang, fails=[DOWN, DOWN], timeout_s=30, retry_encoders_after_s=5)
        await take_down(bench)
        bench.clock.now += 5
        probe = asyncio.create_task(bench.encode("a"))
        await asyncio.sleep(0.01)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        await bench.encode("b")
        assert bench.asked == ["a"]
        bench.clock.now += 5
        again = asyncio.create_task(bench.encode("b"))
        await asyncio.sleep(0.01)
        assert bench.asked == ["a", "b"]
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        assert bench.at_rest()

    asyncio.run(main())


def test_probe_that_an_encoder_refuses_tells_that_it_is_up() -> None:
    """A client's broken file says nothing about the encoders."""

    async def main() -> None:
        refuse = True

        async def encode(call: StageRequest) -> EncodeReply:
            if refuse:
                raise BadRequest("no picture")
            return encoded(call)

        bench = Bench(encode, fails=[DOWN, DOWN], retry_encoders_after_s=5)
        await take_down(bench)
        bench.clock.now += 5
        with pytest.raises(BadRequest, match="no picture"):
            await bench.encode("broken")
        assert not bench.stage.state.down
        refuse = False
        assert with_pixels(await bench.encode("a")) == []

    asyncio.run(main())


def test_there_is_one_probe_as_long_as_it_takes() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            if len(bench.asked) == 1:  # the probe's first attempt, which fails late
                bench.clock.now += 29
                raise DOWN
            await go.wait()
            return encoded(call)

        bench = Bench(encode, fails=[DOWN, DOWN], timeout_s=30, retry_encoders_after_s=5)
        await take_down(bench)
        bench.clock.now += 5
        probing = asyncio.create_task(bench.encode("a"))
        await asyncio.sleep(0.01)
        assert bench.asked == ["a", "a"]
        bench.clock.now += 2
        other = asyncio.create_task(bench.encode("b"))
        await asyncio.sleep(0.01)
        go.set()
        assert with_pixels(await probing) == []
        assert with_pixels(await other) == ["b"]

    asyncio.run(main())


def test_items_do_not_wait_for_an_encoder_that_has_yet_to_start_and_one_call_wakes_it() -> None:
    async def main() -> None:
        started = asyncio.Event()
        bench = Bench()
        bench.handle._methods["check_health"] = started.wait
        bench.handle.absent = True
        record = Trace("req")
        assert with_pixels(await bench.encode("a", "b", record=record)) == ["a", "b"]
        assert with_pixels(await bench.encode("c")) == ["c"]
        await asyncio.sleep(0)
        assert record.rungs == ["encode-at-prefill(no encoder)"] * 2
        assert [method for method, _ in bench.handle.calls] == ["check_health"]
        bench.handle.absent = False
        started.set()
        assert with_pixels(await bench.encode("a")) == []

    asyncio.run(main())


def test_item_whose_only_encoder_is_gone_is_not_tried_again() -> None:
    async def main() -> None:
        async def die(call: StageRequest) -> EncodeReply:
            bench.handle.absent = True
            raise DOWN

        bench = Bench(die)
        record = Trace("req")
        assert with_pixels(await bench.encode("a", record=record)) == ["a"]
        assert record.rungs == ["encode-at-prefill(failed)"]
        assert bench.asked == ["a"]

    asyncio.run(main())


def test_remembered_items_do_not_put_the_probe_off() -> None:
    async def main() -> None:
        bench = Bench(retry_encoders_after_s=5)
        await bench.encode("known")
        bench.stage.state.down, bench.stage.state.probe_at = True, bench.clock.now + 5
        for _ in range(6):
            bench.clock.now += 1
            await bench.encode("known")
        assert with_pixels(await bench.encode("new")) == []
        assert bench.asked == ["known", "new"]

    asyncio.run(main())


def test_item_whose_time_is_over_is_not_sent_to_encoders_that_are_down() -> None:
    async def main() -> None:
        bench = Bench(remember_s=300, retry_encoders_after_s=5)
        await bench.encode("old")
        bench.clock.now += 301
        bench.stage.state.down, bench.stage.state.probe_at = True, bench.clock.now + 5
        assert with_pixels(await bench.encode("old")) == ["old"]
        assert bench.asked == ["old"]

    asyncio.run(main())


# ---- work outstanding


@pytest.mark.parametrize("shareable", [True, False])
def test_work_is_outstanding_exactly_as_long_as_calls_are(shareable: bool) -> None:
    async def main() -> None:
        seen: list[int] = []
        asked = asyncio.Event()

        async def encode(call: StageRequest) -> EncodeReply:
            seen.append(bench.stage.state.outstanding)
            match call.prompt.items[0].hash:
                case "fails":
                    raise DOWN
                case "refused":
                    raise BadRequest("no")
                case "hangs":
                    asked.set()
                    await hang(call)
            return encoded(call)

        bench = Bench(encode, shareable=shareable)
        await bench.encode(("good", 3))
        assert (seen, bench.stage.state.outstanding) == ([3], 0)
        await bench.encode(("fails", 5))
        assert (seen, bench.stage.state.outstanding) == ([3, 5, 5], 0)
        bench.stage.state.down = False
        with pytest.raises(BadRequest):
            await bench.encode(("refused", 7))
        assert (seen, bench.stage.state.outstanding) == ([3, 5, 5, 7], 0)
        task = asyncio.create_task(bench.encode(("hangs", 9)))
        await asked.wait()
        assert bench.stage.state.outstanding == 9
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert bench.at_rest()

    asyncio.run(main())


# ---- encoders of several versions

OLD, NEW = Version("f", weights="old"), Version("f", weights="new")


class Overlap(Bench):
    """Encoders of these weights, which take turns among those that a call fits."""

    def __init__(self, *versions: Version, **config: Any) -> None:
        super().__init__(self._encode, **config)
        self.versions, self.turns = list(versions), itertools.count()

    async def _encode(self, call: StageRequest) -> EncodeReply:
        if not (fitting := [version for version in self.versions if version.fits(call.version)]):
            raise OtherVersion(Stage.ENCODER, "is of another version", "r", self.versions[0])
        version = fitting[next(self.turns) % len(fitting)]
        return msgspec.structs.replace(encoded(call), version=version)

    async def asked_for(self, version: Version, *items: str) -> tuple[Encoded, Trace]:
        record = Trace("req")
        call = msgspec.structs.replace(request(*items), version=version)
        return await self.stage.encode(call, record), record


def test_items_are_encoded_by_the_version_that_is_asked_for_and_remembered_with_theirs() -> None:
    async def main() -> None:
        bench = Overlap(OLD)
        assert (await bench.asked_for(Version("f"), "a"))[0].version == OLD
        bench.versions = [NEW, OLD]
        assert (await bench.asked_for(NEW, "a"))[0].version == NEW
        assert bench.asked == ["a", "a"]
        for version in (NEW, Version("f")):
            assert (await bench.asked_for(version, "a"))[0].version == NEW
        assert bench.asked == ["a", "a"], "remembered"
        bench.stage.forget_version(NEW)
        await bench.asked_for(NEW, "a")
        assert len(bench.asked) == 3

    asyncio.run(main())


def test_item_that_two_requests_ask_two_versions_for_is_two_calls() -> None:
    async def main() -> None:
        bench = Overlap(OLD, NEW)
        results = await asyncio.gather(bench.asked_for(OLD, "a"), bench.asked_for(NEW, "a"), bench.asked_for(NEW, "a"))
        assert [result.version for result, _ in results] == [OLD, NEW, NEW]
        assert bench.asked == ["a", "a"] and bench.at_rest()

    asyncio.run(main())


def test_item_that_no_encoder_has_the_weights_for_is_encoded_by_prefill_and_encoders_are_up() -> None:
    async def main() -> None:
        bench = Overlap(OLD)
        result, record = await bench.asked_for(NEW, "a")
        assert with_pixels(result) == ["a"] and result.version == Version()
        assert record.rungs == ["encode-at-prefill(other version)"] and bench.asked == ["a"]
        assert not bench.stage.state.down

    asyncio.run(main())


def test_prompt_whose_items_two_versions_answered_for_keeps_those_of_most() -> None:
    async def main() -> None:
        bench = Overlap(OLD, NEW)
        result, _ = await bench.asked_for(Version("f"), "a", "b", "c")
        assert result.version == OLD and with_pixels(result) == []
        assert bench.asked == ["a", "b", "c", "b"]

    asyncio.run(main())
