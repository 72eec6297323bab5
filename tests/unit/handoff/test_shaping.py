"""What crosses a handle, and how a request is shaped for each stage."""

import copy
import re
from typing import Any

import cloudpickle
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.outputs import LogprobsTensors

from serve_app.handoff.shaping import (
    can_resume,
    child_id,
    decode_params,
    distinct,
    for_encoder,
    merge_ec_params,
    prefill_params,
    resumed,
    salted,
    unique_id,
    without_pixels,
)
from serve_app.handoff.types import REMOTE_DECODE, DecodeReply, EncodeReply, Item, PrefillReply, Prompt, StageRequest


def fields(**on_cpu: bool) -> MultiModalKwargsItem:
    """An item's processed tensors: field name → whether vLLM keeps it on the CPU."""
    return MultiModalKwargsItem(
        {
            name: MultiModalFieldElem(data=torch.tensor([1, 4, 4]), field=MultiModalBatchedField(keep_on_cpu=kept))
            for name, kept in on_cpu.items()
        }
    )


def item(name: str, offset: int, length: int = 2, data: Any = None, is_embed: Any = None) -> Item:
    return Item("image", name, offset, length, is_embed, data)


def qwen(name: str, offset: int, **more: Any) -> Item:
    return item(name, offset, data=fields(pixel_values=False, image_grid_thw=True), **more)


#               text  A      text  B      A again
PROMPT = Prompt([7, 101, 102, 8, 201, 202, 101, 102, 9], (qwen("A", 1), qwen("B", 4), qwen("A", 6)), cache_salt="salt")


@pytest.mark.parametrize(
    ("index", "tokens", "name"), [(0, [101, 102], "A"), (1, [201, 202], "B"), (2, [101, 102], "A")]
)
def test_encoder_sees_one_item_and_no_text(index: int, tokens: list[int], name: str) -> None:
    call = for_encoder(PROMPT, index)
    assert call.token_ids == tokens
    (only,) = call.items
    assert (only.hash, only.offset, only.length, only.data) == (name, 0, 2, PROMPT.items[index].data)
    assert call.cache_salt is None


def test_encoder_sees_which_placeholders_take_an_embedding() -> None:
    mask = torch.tensor([True, False, True])
    prompt = Prompt([7, 1, 2, 3], (qwen("A", 1, length=3, is_embed=mask),))
    (only,) = for_encoder(prompt, 0).items
    assert only.is_embed is mask
    assert only.num_embeds == 2
    assert qwen("A", 1, length=3).num_embeds == 3


def names(prompt: Prompt) -> list[str]:
    return [item.hash for item in prompt.items]


def test_without_a_salt_an_item_keeps_its_name() -> None:
    assert salted(PROMPT, None) is PROMPT
    assert salted(PROMPT, "") is PROMPT


def test_salt_changes_names_and_nothing_else() -> None:
    own = salted(PROMPT, "tenant")
    assert (own.token_ids, own.cache_salt) == (PROMPT.token_ids, PROMPT.cache_salt)
    for before, after in zip(PROMPT.items, own.items, strict=True):
        assert msgspec.structs.replace(after, hash=before.hash) == before
    a, b, again = names(own)
    assert a == again != b
    assert names(salted(PROMPT, "tenant")) == names(own)


@given(
    first=st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=5)),
    second=st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=5)),
)
@settings(deadline=None)
def test_no_two_pairs_of_salt_and_item_have_a_name_in_common(first: tuple[str, str], second: tuple[str, str]) -> None:
    one, other = (names(salted(Prompt([], (item(name, 0),)), salt)) for salt, name in (first, second))
    assert (one == other) == (first == second)
    assert names(Prompt([], (item(first[1], 0),))) != one  # nor with an unsalted one


def test_repeated_item_is_named_once_at_its_first_place() -> None:
    assert distinct(PROMPT.items) == {"A": 0, "B": 1}
    assert distinct(()) == {}


def test_id_of_an_encode_call_names_request_and_item_and_never_repeats() -> None:
    ids = {child_id("req", 3) for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("req:3:[0-9a-f]{6}", each) for each in ids)


def test_id_of_a_call_of_an_engine_names_its_request_and_never_repeats() -> None:
    """An engine may get two calls of one request: choices, and what is made anew."""
    ids = {unique_id("req") for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("req-[0-9a-f]{8}", each) for each in ids)


def reply(name: str, **more: Any) -> EncodeReply:
    return EncodeReply({name: {"item_indices": [0], "metadata": {"of": name}} | more}, "e")


def test_merged_answers_name_every_place_of_each_item_in_the_whole_prompt() -> None:
    replies = {0: reply("A", peer_host="h"), 1: reply("B")}
    assert merge_ec_params(replies, PROMPT) == {
        "A": {"item_indices": [0, 2], "metadata": {"of": "A"}, "peer_host": "h"},
        "B": {"item_indices": [1], "metadata": {"of": "B"}},
    }
    assert replies[0].ec_transfer_params["A"]["item_indices"] == [0]  # the answers themselves stay


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ({0: reply("A"), 1: reply("A")}, "asked for item B, the encoder answered for ['A']"),
        ({0: EncodeReply({}, "e"), 1: reply("B")}, "asked for item A, the encoder answered for []"),
        (
            {0: EncodeReply(reply("A").ec_transfer_params | reply("B").ec_transfer_params, "e")},
            "asked for item A, the encoder answered for ['A', 'B']",
        ),
    ],
)
def test_answers_that_do_not_fit_the_items_are_an_error_and_never_a_guess(
    replies: dict[int, EncodeReply], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        merge_ec_params(replies, PROMPT)


def test_items_that_no_encoder_was_asked_for_are_not_named() -> None:
    """Prefill encodes them."""
    assert merge_ec_params({1: reply("B")}, PROMPT) == {"B": {"item_indices": [1], "metadata": {"of": "B"}}}
    assert merge_ec_params({}, PROMPT) == {}


def kept(prompt: Prompt) -> list[set[str] | None]:
    return [None if each.data is None else set(each.data) for each in prompt.items]


def test_item_without_pixels_keeps_what_its_positions_need() -> None:
    mask = torch.tensor([True, False])
    prompt = Prompt([1, 2], (qwen("A", 0, is_embed=mask),), cache_salt="salt")
    bare = without_pixels(prompt, lambda modality: frozenset(), {"A"})
    assert kept(bare) == [{"image_grid_thw"}]
    assert isinstance(bare.items[0].data, MultiModalKwargsItem)
    assert bare.items[0].is_embed is mask
    assert (bare.token_ids, bare.cache_salt, bare.items[0].hash) == ([1, 2], "salt", "A")
    assert kept(prompt) == [{"pixel_values", "image_grid_thw"}]  # the encoder still needs them


@pytest.mark.parametrize(
    ("encoded", "with_pixels"),
    [((), [True, True, True]), ({"B"}, [True, False, True]), ({"A"}, [False, True, False]), ({"A", "B"}, [False] * 3)],
)
def test_item_that_may_still_have_to_be_encoded_keeps_its_pixels(encoded: Any, with_pixels: list[bool]) -> None:
    bare = without_pixels(PROMPT, lambda modality: frozenset(), encoded)
    assert ["pixel_values" in each.data for each in bare.items] == with_pixels
    assert all("image_grid_thw" in each.data for each in bare.items)


def test_item_keeps_the_fields_that_its_model_declares_for_its_modality() -> None:
    data = fields(pixel_values=False, second_per_grid=False, grid=True)
    prompt = Prompt(
        [1, 2, 3, 4], (item("A", 0, data=data), msgspec.structs.replace(item("V", 2, data=data), modality="video"))
    )
    bare = without_pixels(prompt, lambda modality: {"second_per_grid"} if modality == "video" else set(), {"A", "V"})
    assert kept(bare) == [{"grid"}, {"grid", "second_per_grid"}]


def test_item_of_a_model_that_declares_nothing_keeps_everything() -> None:
    """Nothing says that its engine could do without."""
    prompt = Prompt([1, 2], (item("A", 0, data=fields(pixel_values=False)),))
    assert kept(without_pixels(prompt, lambda modality: (), {"A"})) == [{"pixel_values"}]


def test_item_whose_declared_fields_it_lacks_loses_its_pixels() -> None:
    prompt = Prompt([1, 2], (item("A", 0, data=fields(pixel_values=False)), item("B", 1)))
    assert kept(without_pixels(prompt, lambda modality: {"elsewhere"}, {"A", "B"})) == [set(), None]


def client_params(**more: Any) -> SamplingParams:
    defaults: dict[str, Any] = {
        "n": 2,
        "seed": 11,
        "temperature": 0.7,
        "max_tokens": 40,
        "min_tokens": 3,
        "stop": ["end"],
        "stop_token_ids": [5],
        "logprobs": 2,
        "output_kind": RequestOutputKind.DELTA,
        "extra_args": {"mine": 1},
    }
    return SamplingParams(**defaults | more)


KV = {"remote_block_ids": [1, 2], "remote_engine_id": "e"}
EC = {"A": {"item_indices": [0]}}


def test_prefill_runs_one_token_that_cannot_end_the_request_early() -> None:
    """NIXL holds blocks only of requests that ran to their length."""
    params = prefill_params(client_params(structured_outputs=StructuredOutputsParams(json="{}")), EC)
    assert (params.n, params.max_tokens, params.min_tokens, params.ignore_eos) == (1, 1, 0, True)
    assert (params.stop, params.stop_token_ids, params.structured_outputs) == ([], [], None)
    assert params.extra_args == {"mine": 1, "kv_transfer_params": REMOTE_DECODE, "ec_transfer_params": EC}


def test_prefill_makes_no_logprobs_of_the_answer() -> None:
    params = prefill_params(client_params(logprobs=2, logprob_token_ids=[5, 6]), None)
    assert (params.logprobs, params.logprob_token_ids, params.num_logprobs) == (None, None, None)


@pytest.mark.parametrize("wanted", [None, 0, 3])
def test_prefill_makes_no_text(wanted: int | None) -> None:
    """Logprobs of the prompt get theirs at the ingress."""
    params = prefill_params(client_params(prompt_logprobs=wanted), None)
    assert (params.prompt_logprobs, params.detokenize) == (wanted, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


def test_decode_is_the_clients_request_for_one_choice() -> None:
    """But for its text, which is made at the ingress: its stop strings are looked for there too."""
    choice = client_params(n=1, seed=12)
    params = decode_params(choice, KV, EC)
    assert (params.n, params.seed) == (1, 12)
    assert (params.max_tokens, params.min_tokens, params.stop_token_ids, params.logprobs) == (40, 3, [5], 2)
    assert (params.detokenize, params.output_kind) == (False, RequestOutputKind.FINAL_ONLY)
    assert params.extra_args == {"mine": 1, "kv_transfer_params": KV, "ec_transfer_params": EC}
    assert (choice.detokenize, choice.output_kind) == (True, RequestOutputKind.DELTA), "as the client has it"


def test_logprobs_of_the_prompt_come_from_the_engine_that_ran_it() -> None:
    assert decode_params(client_params(prompt_logprobs=1), KV, None).prompt_logprobs is None
    assert decode_params(client_params(prompt_logprobs=1), None, EC).prompt_logprobs == 1


def test_no_transfer_leaves_no_trace_in_extra_args() -> None:
    assert decode_params(client_params(extra_args=None), None, None).extra_args is None
    assert decode_params(client_params(), None, None).extra_args == {"mine": 1}
    assert "ec_transfer_params" not in prefill_params(client_params(), None).extra_args


@pytest.mark.parametrize("skip_clone", [False, True])
def test_nothing_is_shared_between_choices_or_with_the_client(skip_clone: bool) -> None:
    params = client_params(skip_clone=skip_clone)
    before = copy.deepcopy(params)
    remote = copy.deepcopy(REMOTE_DECODE)
    kv, ec = copy.deepcopy(KV), copy.deepcopy(EC)
    first, second = prefill_params(params, ec), prefill_params(params, ec)
    third, fourth = decode_params(params, kv, ec), decode_params(params, kv, ec)
    for shaped in (first, third):
        for key in ("kv_transfer_params", "ec_transfer_params"):
            shaped.extra_args[key]["used"] = True
        shaped.extra_args["new"] = True
    assert params == before
    assert (REMOTE_DECODE, kv, ec) == (remote, KV, EC)
    for untouched in (second, fourth):
        assert "new" not in untouched.extra_args
        assert not any("used" in untouched.extra_args[key] for key in ("kv_transfer_params", "ec_transfer_params"))


@pytest.mark.parametrize(
    "crossing",
    [
        StageRequest("r", PROMPT, client_params(), {"priority": 1}),
        StageRequest("r", Prompt([1]), prefill_params(client_params(), EC)),
        StageRequest("r", Prompt([1]), decode_params(client_params(), KV, EC)),
        reply("A"),
        PrefillReply(KV, None, 4, "p"),
        DecodeReply("d", 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_crosses_a_handle_survives_it(crossing: Any) -> None:
    assert cloudpickle.loads(cloudpickle.dumps(crossing)) == crossing


def test_logprobs_of_a_prompt_cross_a_handle() -> None:
    logprobs = LogprobsTensors(torch.tensor([[64, 65]]), torch.tensor([[-0.5, -1.0]]), torch.tensor([1]))
    there = cloudpickle.loads(cloudpickle.dumps(PrefillReply(KV, logprobs, 4, "p"))).prompt_logprobs
    assert isinstance(there, LogprobsTensors)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(logprobs[:3], there[:3], strict=True))


def test_mask_and_tensors_cross_a_handle() -> None:
    prompt = Prompt([1, 2], (qwen("A", 0, is_embed=torch.tensor([True, False])),))
    (there,) = cloudpickle.loads(cloudpickle.dumps(prompt)).items
    assert there.is_embed.tolist() == [True, False]
    assert there.data["image_grid_thw"].data.tolist() == [1, 4, 4]
    assert there.data["image_grid_thw"].field.keep_on_cpu is True


@pytest.mark.parametrize(
    "value", [PROMPT, PROMPT.items[0], reply("A"), DecodeReply("d", 0)], ids=lambda v: type(v).__name__
)
def test_what_crosses_a_handle_cannot_be_changed(value: Any) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        setattr(value, value.__struct_fields__[0], None)


@pytest.mark.parametrize(
    ("more", "goes_on"),
    [
        ({}, True),
        ({"temperature": 0, "seed": 7, "repetition_penalty": 1.1, "stop_token_ids": [1], "ignore_eos": True}, True),
        ({"logit_bias": {1: 2.0}, "allowed_token_ids": [1], "prompt_logprobs": 1, "top_k": 3}, True),
        ({"stop": ["end"], "include_stop_str_in_output": True, "min_tokens": 3}, True),  # looked for at the ingress
        ({"logprobs": 0}, True),
        ({"seed": 7}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"bad_words": ["bad"]}, False),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, False),
        ({"extra_args": {"of": "a processor of the user's"}}, False),
        ({"thinking_token_budget": 0}, False),
        ({"trace_decode_token_ids": [1]}, False),
    ],
)
def test_answer_goes_on_where_only_the_tokens_before_it_count(more: dict[str, Any], goes_on: bool) -> None:
    assert can_resume(SamplingParams(**more)) is goes_on


def test_rest_of_an_answer_has_what_was_said_at_the_end_of_its_prompt() -> None:
    params = SamplingParams(max_tokens=10, min_tokens=2, prompt_logprobs=1)
    request = StageRequest("r", Prompt([1, 2], cache_salt="s"), params, {"priority": 1})
    assert resumed(request, []) is request
    rest = resumed(request, [3, 4, 5])
    assert rest.prompt == Prompt([1, 2, 3, 4, 5], cache_salt="s")
    assert (rest.params.max_tokens, rest.params.min_tokens, rest.params.prompt_logprobs) == (7, 0, None)
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs) == (10, 2, 1)
    assert request.prompt.token_ids == [1, 2]
    assert (rest.request_id, rest.options) == ("r", {"priority": 1})
    assert resumed(StageRequest("r", Prompt([1]), SamplingParams(max_tokens=None)), [3]).params.max_tokens is None
