"""serve_app.ingress.client, pipeline: the order of the stages and what each is asked, over stages that are fakes."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import torch
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.outputs import LogprobsTensors

from serve_app.config import EPDConfig
from serve_app.handoff.errors import StageUnavailable
from serve_app.handoff.types import EncodeReply, PrefillReply, StageRequest
from serve_app.ingress.assembly import assemble
from serve_app.ingress.request import Request, current
from serve_app.stage import Stage
from tests.fakes import A, B, FakePipeline, Step, encoded
from tests.unit.running import Make, generate, params, render


def test_encode_then_prefill_then_decode(make_client: Make) -> None:
    pipeline = FakePipeline()
    outputs = generate(make_client, pipeline, "red")
    assert pipeline.log == ["encode", "prefill", "decode"]
    assert [(o.outputs[0].text, o.outputs[0].token_ids, o.finished) for o in outputs] == [
        ("a", A, False),
        ("b", B, True),
    ]


@pytest.mark.parametrize(
    ("without", "log"),
    [
        ((), ["encode", "prefill", "decode"]),
        ((Stage.PREFILL,), ["encode", "decode"]),
        ((Stage.ENCODER,), ["prefill", "decode"]),
        ((Stage.ENCODER, Stage.PREFILL), ["decode"]),
    ],
)
def test_topology_decides_which_stages_work(make_client: Make, without: tuple[Stage, ...], log: list[str]) -> None:
    pipeline = FakePipeline(without)
    generate(make_client, pipeline, "red")
    assert pipeline.log == log
    (decode,) = pipeline.decoder.requests("decode")
    assert ("kv_transfer_params" in (decode.params.extra_args or {})) == (Stage.PREFILL not in without)
    # Pixels stay where no encoder has seen them.
    assert ("pixel_values" in decode.prompt.items[0].data) == (Stage.ENCODER in without)


def test_text_needs_no_encoder(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline)
    assert pipeline.log == ["prefill", "decode"]
    (call,) = pipeline.prefiller.requests("prefill")
    assert "ec_transfer_params" not in call.params.extra_args


@pytest.mark.parametrize(("colours", "log"), [((), ["decode"]), (("red", "blue"), ["encode", "prefill", "decode"])])
def test_short_prompt_is_prefilled_by_decode(make_client: Make, colours: tuple[str, ...], log: list[str]) -> None:
    pipeline, token = FakePipeline(), current.set(request := Request("req"))
    try:
        generate(partial(make_client, advanced={"kv": {"min_prompt_tokens": 6}}), pipeline, *colours)
    finally:
        current.reset(token)
    assert list(dict.fromkeys(pipeline.log)) == log
    assert request.trace.rungs == ["prefill-at-decode(short)"] * ("prefill" not in log)
    assert pipeline.released() == []


def test_decode_that_prefills_a_short_prompt_gets_its_embeddings(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(partial(make_client, advanced={"kv": {"min_prompt_tokens": 1000}}), pipeline, "red")
    assert pipeline.log == ["encode", "decode"]
    (decode,) = pipeline.decoder.requests("decode")
    (item,) = decode.prompt.items
    assert set(item.data) == {"image_grid_thw"}
    assert decode.params.extra_args == {
        "ec_transfer_params": {item.hash: {"item_indices": [0], "metadata": {"of": item.hash}}}
    }


def test_stages_get_what_the_one_before_gave(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red", "blue")
    encodes = pipeline.encoder.requests("encode")
    (prefill,), (decode,) = pipeline.prefiller.requests("prefill"), pipeline.decoder.requests("decode")
    hashes = [item.hash for item in prefill.prompt.items]
    ec = {name: {"item_indices": [i], "metadata": {"of": name}} for i, name in enumerate(hashes)}
    assert {call.prompt.items[0].hash for call in encodes} == set(hashes)
    assert prefill.params.extra_args["ec_transfer_params"] == ec
    assert decode.params.extra_args == {"kv_transfer_params": {"remote_block_ids": [1]}, "ec_transfer_params": ec}
    for call in (prefill, decode):
        assert call.request_id.startswith("req-")
        assert [set(item.data) for item in call.prompt.items] == [{"image_grid_thw"}] * 2
    for call in encodes:
        assert "pixel_values" in call.prompt.items[0].data
        assert call.request_id.startswith("req:")


def test_options_of_the_request_reach_the_stages(make_client: Make) -> None:
    async def main() -> FakePipeline:
        client = make_client((pipeline := FakePipeline()).stages)
        prompt = await render(client, "red")
        options: dict[str, Any] = {"priority": 5}
        assert [o async for o in client.generate(prompt, params(), "req", **options)]
        return pipeline

    pipeline = asyncio.run(main())
    (encode,) = pipeline.encoder.requests("encode")
    assert encode.options == {"priority": 5}
    for call in pipeline.prefiller.requests("prefill") + pipeline.decoder.requests("decode"):
        assert call.options["priority"] == 5


@pytest.mark.parametrize(("by_tenant", "names"), [(False, 1), (True, 3)])
def test_tenants_have_embeddings_of_their_own_where_that_is_asked_for(
    make_client: Make, by_tenant: bool, names: int
) -> None:
    async def main() -> FakePipeline:
        client = make_client((pipeline := FakePipeline()).stages, ec={"salt_by_tenant": by_tenant})
        for salt in ("one", "other", None, "one"):
            prompt = await render(client, "red") | {"cache_salt": salt}
            assert [o async for o in client.generate(prompt, params(), "req")]
        return pipeline

    pipeline = asyncio.run(main())
    of_stages = [
        [call.prompt.items[0].hash for call in calls]
        for calls in (
            pipeline.encoder.requests("encode"),
            pipeline.prefiller.requests("prefill"),
            pipeline.decoder.requests("decode"),
        )
    ]
    encodes, prefills, decodes = of_stages
    assert prefills == decodes
    assert encodes == list(dict.fromkeys(prefills))  # every stage knows the item by the same name; encoded once by each
    assert len(set(prefills)) == names
    assert prefills[0] == prefills[3]


def test_distinct_items_are_encoded_once_and_all_at_the_same_time(make_client: Make) -> None:
    together = asyncio.Barrier(3)

    async def encode(request: StageRequest) -> EncodeReply:
        await together.wait()  # passes only with all three calls in flight
        return encoded(request)

    pipeline = FakePipeline(encode=encode)
    generate(make_client, pipeline, "red", "blue", "red", "green")
    assert len(pipeline.encoder.calls) == 3
    (prefill,) = pipeline.prefiller.requests("prefill")
    places = [entry["item_indices"] for entry in prefill.params.extra_args["ec_transfer_params"].values()]
    assert sorted(places) == [[0, 2], [1], [3]]


def test_each_choice_has_a_hand_off_of_its_own(make_client: Make) -> None:
    pipeline = FakePipeline()
    generate(make_client, pipeline, "red", n=3, seed=7)
    assert pipeline.log.count("encode") == 1
    decodes = pipeline.decoder.requests("decode")
    assert sorted(c.params.extra_args["kv_transfer_params"]["remote_block_ids"] for c in decodes) == [[1], [2], [3]]
    assert sorted(c.params.seed for c in decodes) == [7, 8, 9]
    assert pipeline.released() == []


def test_choices_are_decoded_at_the_same_time(make_client: Make) -> None:
    together = asyncio.Barrier(2)

    async def steps(request: StageRequest) -> AsyncIterator[Step]:
        await together.wait()
        yield Step(A, "length")

    outputs = generate(make_client, FakePipeline(steps=steps), n=2)
    assert sorted(choice.index for output in outputs for choice in output.outputs) == [0, 1]
    assert outputs[-1].finished


def test_what_only_prefill_knows_comes_with_the_first_output(make_client: Make) -> None:
    logprobs = LogprobsTensors(torch.tensor([[64, 65]]), torch.tensor([[-0.5, -1.0]]), torch.tensor([1]))

    async def prefill(request: StageRequest) -> PrefillReply:
        return PrefillReply({"k": 1}, logprobs, 3, "prefill-0")

    first, second = generate(make_client, FakePipeline(prefill=prefill), prompt_logprobs=1)
    assert first.prompt_logprobs is not None
    beginning, after = first.prompt_logprobs
    assert beginning is None
    assert (after[64].logprob, after[64].decoded_token) == (-0.5, "a")
    assert (second.prompt_logprobs, second.num_cached_tokens) == ([], 3)
    assert first.num_cached_tokens == 3


def test_answer_repeats_id_and_prompt_as_one_engine_would(make_client: Make) -> None:
    (*_, last) = generate(make_client, FakePipeline())
    assert last.request_id == "req"
    assert last.prompt == " what?"
    assert last.prompt_token_ids and last.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("key", ["kv_transfer_params", "ec_transfer_params"])
def test_transfer_parameters_of_a_client_are_refused(make_client: Make, key: str) -> None:
    pipeline = FakePipeline()
    with pytest.raises(VLLMValidationError, match=f"`{key}` is passed between the stages"):
        generate(make_client, pipeline, extra_args={key: {}})
    assert pipeline.log == []


def test_request_that_every_stage_would_refuse_reaches_none(make_client: Make) -> None:
    pipeline = FakePipeline()
    with pytest.raises(VLLMValidationError):
        generate(make_client, pipeline, logprobs=10_000)
    assert pipeline.log == []


# ---- the trace of a request


def traced(make: Make, pipeline: FakePipeline, *colours: str, **more: Any) -> Request:
    request = Request("req")
    token = current.set(request)
    try:
        generate(make, pipeline, *colours, **more)
    except GracefulHTTPError:
        pass
    finally:
        current.reset(token)
    return request


def test_trace_knows_who_worked_on_the_request_and_how_much(make_client: Make) -> None:
    request = traced(make_client, FakePipeline(), "red", "blue")
    record = request.trace
    assert record.replicas == {"encoder": ["encoder-0"], "prefill": ["prefill-0"], "decode": ["decode-0"]}
    assert (record.items, record.output_tokens, record.error) == ({"image": 2}, 2, None)
    assert record.prompt_tokens > 4 * 2
    assert list(record.stage_times()) == ["render", "queue", "encode", "prefill", "first_token"]
    assert request.decided.is_set()


def test_trace_of_a_failure_has_its_error_and_is_decided(make_client: Make) -> None:
    gone = StageUnavailable(Stage.DECODE, "is gone")
    request = traced(make_client, FakePipeline(fails={"decode": [gone] * 9}), "red")
    assert isinstance(request.error, GracefulHTTPError)
    assert request.decided.is_set()
    assert not request.answered


# ---- the rest of vLLM's protocol


def test_adapters_of_a_server_without_any_are_refused(make_client: Make) -> None:
    with pytest.raises(ValueError, match="enable_lora: true"):
        asyncio.run(make_client({}).add_lora(LoRARequest("x", 1, "/x")))


def test_what_an_ingress_cannot_do_is_refused_as_the_clients_mistake(make_client: Make) -> None:
    client = make_client({})
    for refused in (client.sleep(), client.reset_prefix_cache(), client.pause_generation()):
        with pytest.raises(VLLMValidationError, match="not available here"):
            asyncio.run(refused)  # type: ignore[arg-type]


def test_ingress_itself_is_always_well(make_client: Make) -> None:
    client = make_client({})
    assert (client.is_running, client.is_stopped, client.errored) == (True, False, False)
    assert asyncio.run(client.get_supported_tasks()) == ("generate",)
    assert asyncio.run(client.is_sleeping()) is False


@pytest.mark.parametrize(
    ("ec", "shared", "remembered_s"),
    [
        ({}, True, 300),
        ({"connector": "ECExampleConnector"}, True, 300),
        ({"connector": "ECCPUConnector"}, True, 0),
        ({"connector": "Mine"}, False, 0),
    ],
)
def test_answers_of_encoders_are_used_as_long_as_the_embedding_is_surely_there(
    demo_vllm_config: Any, ec: dict[str, Any], shared: bool, remembered_s: float
) -> None:
    pipeline = FakePipeline()
    own = {"ec": {"module_path": "mine"}} if ec.get("connector") == "Mine" else {}
    client = assemble(EPDConfig(ec=ec, advanced=own), demo_vllm_config, pipeline.stages).client
    try:
        assert client.pipeline.encoders is not None
        assert (client.pipeline.encoders.shareable, client.pipeline.encoders.config.remember_s) == (
            shared,
            remembered_s,
        )
    finally:
        client.shutdown()
