"""While replicas of two versions run, each request is one version's from its first embedding to its last
token."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from serve_app.handoff.errors import HandoffLost, OtherVersion, StageUnavailable
from serve_app.handoff.types import EncodeReply, PrefillReply, StageRequest, Version
from serve_app.ingress.client import EPDClient
from serve_app.ingress.request import Request, current
from serve_app.stage import Stage
from tests.fakes import FakePipeline, Step, encoded
from tests.unit.running import Make, background, run

FRONT = Version("front")
WHOLE = RequestOutputKind.FINAL_ONLY
NO_PATIENCE = {"advanced": {"retry": {"ratio": 0, "floor_per_s": 0, "backoff_s": 0}}}
"""One retry that costs something, and never another."""


def weights(name: str) -> Version:
    return Version("front", weights=name)


class Versions(FakePipeline):
    """Stages with replicas of these weights, which take turns. A call goes to one that fits it, as ``StageHandle`` finds it.

    Decode says its own weights, and remembers what its calls came with. ``ends``: after how many tokens a stream breaks off.
    """

    def __init__(self, encode: str, prefill: str, decode: str, without: tuple[Stage, ...] = (), ends: int = 99) -> None:
        super().__init__(without)
        self.ends = ends
        self.of = {Stage.ENCODER: encode.split(), Stage.PREFILL: prefill.split(), Stage.DECODE: decode.split()}
        self.turns: dict[Stage, Iterator[int]] = {stage: itertools.count() for stage in Stage}
        self.came_with: list[tuple[str, set[str]]] = []
        """Of each decode: its weights, and those of the embeddings and blocks that it got."""
        self.embeddings: dict[str, set[str]] = {}
        """By request id of a prefill: what it read."""

    def replica(self, stage: Stage, call: StageRequest) -> Version:
        replicas = [weights(name) for name in self.of[stage]]
        fitting = [version for version in replicas if version.fits(call.version)]
        if not replicas:
            raise StageUnavailable(stage, "is gone")
        if not fitting:
            raise OtherVersion(stage, "is of another version", "r", replicas[0])
        return fitting[next(self.turns[stage]) % len(fitting)]

    async def encode(self, request: StageRequest) -> EncodeReply:
        version = self.replica(Stage.ENCODER, request)
        reply = msgspec.structs.replace(encoded(request), version=version)
        for entry in reply.ec_transfer_params.values():
            entry["by"] = version.weights
        return reply

    async def prefill(self, request: StageRequest) -> PrefillReply:
        version = self.replica(Stage.PREFILL, request)
        read = self.read(request) | {version.weights}
        return PrefillReply({"read": sorted(read)}, None, 3, "prefill-0", node="node-0", version=version)

    async def steps(self, request: StageRequest) -> AsyncIterator[Step]:
        version = self.replica(Stage.DECODE, request)
        blocks = set((request.params.extra_args or {}).get("kv_transfer_params", {}).get("read", ()))
        self.came_with.append((version.weights, blocks or self.read(request)))
        for number in range(min(self.ends, request.params.max_tokens)):
            last = number == request.params.max_tokens - 1
            yield Step([5], "length" if last else None, f"decode-{version.weights}", version=version)
        if self.ends < request.params.max_tokens:
            self.ends = 99
            raise StageUnavailable(Stage.DECODE, "is gone")

    def read(self, request: StageRequest) -> set[str]:
        """Weights of the embeddings that a request comes with."""
        return {entry["by"] for entry in ((request.params.extra_args or {}).get("ec_transfer_params") or {}).values()}

    @property
    def mixed(self) -> list[tuple[str, set[str]]]:
        return [(own, others) for own, others in self.came_with if others - {own}]


def ask(
    make: Make, pipeline: Versions, *colours: str, requests: int = 1, config: Any = NO_PATIENCE, **more: Any
) -> tuple[list[list[RequestOutput]], Request]:
    async def main() -> tuple[list[list[RequestOutput]], Request]:
        client: EPDClient = make(pipeline.stages, **config)
        client._version = FRONT
        answers = []
        for _ in range(requests):
            current.set(request := Request("req"))
            answers.append(await run(client, *colours, **{"ignore_eos": True} | more))
        await background(client)
        return answers, request

    return asyncio.run(main())


OVERLAPS = [
    ("old new", "old new", "old new"),
    ("old", "new", "new"),
    ("new", "old", "old"),
    ("old new", "old", "new"),
    ("old", "old new", "new"),
    ("old new", "new", "old"),
    ("", "old", "new"),
]


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
@pytest.mark.parametrize(("encode", "prefill", "decode"), OVERLAPS)
def test_whatever_versions_overlap_every_request_is_answered_by_one(
    make_client: Make, encode: str, prefill: str, decode: str, without: tuple[Stage, ...]
) -> None:
    """Requests one after the other, and no budget of retries."""
    pipeline = Versions(encode, prefill, decode, without)
    answers, _ = ask(make_client, pipeline, "red", "green", "blue", requests=8)
    assert [len(outputs) for outputs in answers] == [8] * 8
    assert not pipeline.mixed


def test_items_of_one_prompt_are_encoded_by_one_version(make_client: Make) -> None:
    pipeline = Versions("old new", "old new", "old new")
    ask(make_client, pipeline, "red", "green", "blue", config={"advanced": {"encode": {"remember_s": 0}}})
    first, again = pipeline.encoder.requests("encode")[:3], pipeline.encoder.requests("encode")[3:]
    assert [call.version for call in first] == [FRONT] * 3
    assert [call.version for call in again] == [weights("old")], "one of three had new weights"
    assert pipeline.came_with == [("old", {"old"})]


def test_blocks_go_where_their_weights_are(make_client: Make) -> None:
    pipeline = Versions("", "new", "old new", (Stage.ENCODER,))
    ask(make_client, pipeline, requests=4)
    assert pipeline.came_with == [("new", {"new"})] * 4
    assert not pipeline.released()


def test_blocks_are_given_back_by_an_engine_that_can_connect(make_client: Make) -> None:
    pipeline = Versions("", "old", "new", (Stage.ENCODER,))
    ask(make_client, pipeline)
    ((_, (_, _, version)),) = [call for call in pipeline.decoder.calls if call[0] == "release"]
    assert version == weights("old")


def test_remembered_items_of_weights_that_are_gone_are_encoded_anew(make_client: Make) -> None:
    async def main() -> None:
        pipeline = Versions("old", "old", "old")
        client = make_client(pipeline.stages, **NO_PATIENCE)
        client._version = FRONT
        await run(client, "red", "green")
        pipeline.of = {stage: ["new"] for stage in Stage}
        pipeline.came_with.clear()
        for _ in range(3):
            await run(client, "red", "green")
        assert [own for own, _ in pipeline.came_with] == ["new"] * 3 and not pipeline.mixed
        assert len(pipeline.encoder.requests("encode")) == 4, "each item once by either version"
        assert pipeline.came_with[-1] == ("new", {"new"})

    asyncio.run(main())


@pytest.mark.parametrize("without", [(), (Stage.PREFILL,), (Stage.ENCODER,)], ids=["E+P+D", "E+PD", "P+D"])
@pytest.mark.parametrize(("encode", "prefill", "decode"), OVERLAPS)
def test_where_versions_are_known_nothing_is_made_that_nobody_goes_on_from(
    make_client: Make, encode: str, prefill: str, decode: str, without: tuple[Stage, ...]
) -> None:
    pipeline = Versions(encode, prefill, decode, without)
    for stage, handle in pipeline.stages.items():
        handle.weights = frozenset(pipeline.of[stage])
    ask(make_client, pipeline, "red", "green", requests=8, config={"advanced": {"retry": {"attempts": 1}}})
    assert len(pipeline.came_with) == 8 and not pipeline.mixed
    assert not pipeline.released()


def test_layout_of_prefills_blocks_is_asked_of_decode(make_client: Make) -> None:
    class OtherCards(Versions):
        async def prefill(self, request: StageRequest) -> PrefillReply:
            reply = await super().prefill(request)
            return msgspec.structs.replace(reply, version=reply.version._replace(layout="hopper"))

    pipeline = OtherCards("", "old", "old", (Stage.ENCODER,))
    ask(make_client, pipeline)
    assert [call.version for call in pipeline.decoder.requests("decode")] == [weights("old")._replace(layout="hopper")]
    assert [call.version.layout for call in pipeline.prefiller.requests("prefill")] == [""]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, WHOLE], ids=["streamed", "whole"])
def test_answer_goes_on_with_the_weights_that_began_it(make_client: Make, kind: RequestOutputKind) -> None:
    pipeline = Versions("", "", "new old", (Stage.ENCODER, Stage.PREFILL), ends=3)
    ask(make_client, pipeline, output_kind=kind)
    first, second = pipeline.decoder.requests("decode")
    assert second.prompt.token_ids == [*first.prompt.token_ids, 5, 5, 5]
    assert [own for own, _ in pipeline.came_with] == ["new", "new"]


def leaves(pipeline: Versions) -> None:
    """Have the weights that a stream breaks off with go with it."""

    async def and_goes(request: StageRequest) -> AsyncIterator[Step]:
        try:
            async for each in pipeline.steps(request):
                yield each
        except StageUnavailable:
            pipeline.of[Stage.DECODE] = ["new"]
            raise

    pipeline.decodes._steps = and_goes


def test_stream_whose_weights_are_gone_ends(make_client: Make) -> None:
    pipeline = Versions("", "", "old", (Stage.ENCODER, Stage.PREFILL), ends=3)
    leaves(pipeline)
    with pytest.raises(GracefulHTTPError, match="The decode stage is of another version"):
        ask(make_client, pipeline)
    assert [own for own, _ in pipeline.came_with] == ["old"]


def test_answer_that_is_not_streamed_and_whose_weights_are_gone_is_made_anew(make_client: Make) -> None:
    pipeline = Versions("", "", "old", (Stage.ENCODER, Stage.PREFILL), ends=3)
    leaves(pipeline)
    (((output,),), _) = ask(make_client, pipeline, output_kind=WHOLE)
    assert len(output.outputs[0].token_ids) == 8
    assert [own for own, _ in pipeline.came_with] == ["old", "new"]
    assert pipeline.decoder.requests("decode")[-1].version == FRONT


def test_stream_goes_on_at_decode_alone_where_prefill_has_its_weights_no_more(make_client: Make) -> None:
    pipeline = Versions("old", "old", "old", ends=3)
    leaves(pipeline)

    def gone(request: StageRequest) -> AsyncIterator[Step]:
        pipeline.of |= {Stage.ENCODER: ["new"], Stage.PREFILL: ["new"], Stage.DECODE: ["new", "old"]}
        return pipeline.steps(request)

    pipeline.decodes._steps = gone
    ((outputs,), _) = ask(make_client, pipeline, "red")
    assert len(outputs) == 8
    assert [own for own, _ in pipeline.came_with] == ["old", "old"] and not pipeline.mixed


def test_choices_of_one_request_have_the_weights_of_whichever_spoke_first(make_client: Make) -> None:
    pipeline = Versions("", "", "old new", (Stage.ENCODER, Stage.PREFILL))
    both = asyncio.Barrier(2)

    async def together(request: StageRequest) -> AsyncIterator[Step]:
        if not request.version.weights:
            await both.wait()
        async for each in pipeline.steps(request):
            yield each

    pipeline.decodes._steps = together
    ((outputs,), _) = ask(make_client, pipeline, n=2)
    calls = [own for own, _ in pipeline.came_with]
    assert calls[:2] == ["old", "new"] and calls[2:] == ["old"]
    said = dict.fromkeys(range(2), 0)
    for choice in (choice for output in outputs for choice in output.outputs):
        said[choice.index] += len(choice.token_ids)
    assert said == {0: 8, 1: 8}


def test_choice_whose_tokens_have_other_weights_has_pulled_its_blocks_and_is_ended(make_client: Make) -> None:
    pipeline = Versions("", "old new", "old new", (Stage.ENCODER,))
    both = asyncio.Barrier(2)

    async def together(request: StageRequest) -> AsyncIterator[Step]:
        if len(pipeline.decoder.requests("decode")) <= 2:
            await both.wait()
        async for each in pipeline.steps(request):
            yield each

    pipeline.decodes._steps = together
    (((output,),), _) = ask(make_client, pipeline, n=2, output_kind=WHOLE)
    assert [len(choice.token_ids) for choice in output.outputs] == [8, 8]
    taken, refused, *again = [own for own, _ in pipeline.came_with]
    assert {taken, refused} == {"old", "new"} and again == [taken] and not pipeline.mixed
    (ended,) = pipeline.decodes.links[f"decode-{refused}"].aborted
    assert ended in [call.request_id for call in pipeline.decoder.requests("decode")[:2]]
    assert pipeline.decodes.links[f"decode-{taken}"].aborted == []
    assert not pipeline.released()


def test_versions_of_decode_replicas_are_learnt_from_their_first_tokens(make_client: Make) -> None:
    """Not from the end of their calls, which may be much later."""
    pipeline = Versions("", "", "old new", (Stage.ENCODER, Stage.PREFILL))
    learnt: list[dict[str, Version]] = []

    async def learns(request: StageRequest) -> AsyncIterator[Step]:
        async for each in pipeline.steps(request):
            yield each
            learnt.append(dict(pipeline.decoder.learnt))

    pipeline.decodes._steps = learns
    ask(make_client, pipeline, requests=2)
    assert learnt[0] == {"decode-old": weights("old")}
    assert learnt[-1] == {"decode-old": weights("old"), "decode-new": weights("new")}


def test_request_of_a_front_that_no_stage_has_fails_as_if_they_were_gone(make_client: Make) -> None:
    pipeline = Versions("old", "old", "old")

    def other(*_: Any) -> Version:
        raise OtherVersion(Stage.DECODE, "runs in another version than the request began with (front)")

    pipeline.replica = other  # type: ignore[method-assign]
    with pytest.raises(GracefulHTTPError, match=r"runs in another version .* \(front\)") as caught:
        ask(make_client, pipeline, "red")
    assert caught.value.http_status == 503


def test_lost_hand_off_still_asks_for_no_version(make_client: Make) -> None:
    """What was lost before a token was said binds nothing."""
    pipeline = Versions("", "old new", "old new", (Stage.ENCODER,))
    pipeline.decoder._fails["decode"] = [HandoffLost(Stage.DECODE, "lost the blocks")]
    ask(make_client, pipeline)
    assert [call.version for call in pipeline.prefiller.requests("prefill")] == [FRONT, FRONT]
    assert not pipeline.mixed
