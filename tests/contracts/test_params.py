"""What serve_app knows of vLLM's sampling parameters: what prefill needs of them, and which answers may resume."""

import asyncio
import copy
import pickle
from typing import Any

import pytest


def test_sampling_params_have_the_fields_that_we_set() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    set_by_us = {"n", "seed", "temperature", "max_tokens", "min_tokens", "ignore_eos", "watermarking"}
    set_by_us |= {"prompt_logprobs", "detokenize", "extra_args", "output_kind"}
    missing = set_by_us - set(SamplingParams.__struct_fields__)
    assert not missing, f"serve_app/handoff/shaping.py prefill_params, decode_params: SamplingParams lacks {missing}"
    assert {kind.name for kind in RequestOutputKind} == {"CUMULATIVE", "DELTA", "FINAL_ONLY"}, (
        "serve_app/ingress/choice.py streamed: output kinds"
    )


def test_prefill_gets_of_the_sampling_params_what_the_prompt_needs_and_nothing_else() -> None:
    """Each field is kept or dropped. What the client asks of the answer costs prefill's engine nothing, and cannot end its
    request before the blocks are held."""
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

    from serve_app.handoff.shaping import prefill_params

    kept = {
        "prompt_logprobs": 1,
        "flat_logprobs": True,
        "skip_reading_prefix_cache": True,
        "extra_args": {"mine": 1},  # of a connector, perhaps
        "skip_clone": True,
    }
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "watermarking": True}
    drawn |= {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {1: 2.0}}
    drawn |= {"allowed_token_ids": [1], "bad_words": ["a"], "_bad_words_token_ids": [[1]], "thinking_token_budget": 5}
    drawn |= {"structured_outputs": StructuredOutputsParams(regex="a"), "trace_decode_token_ids": [1, 2]}
    ends = {"n": 2, "max_tokens": 9, "min_tokens": 3, "ignore_eos": True, "stop": ["a"], "stop_token_ids": [1]}
    ends |= {"repetition_detection": RepetitionDetectionParams(2, 1, 3), "_eos_token_id": 2, "_all_stop_token_ids": {2}}
    told = {"logprobs": 2, "logprob_token_ids": [1, 2], "output_kind": RequestOutputKind.DELTA, "stream_interval": 4}
    told |= {"skip_special_tokens": False, "spaces_between_special_tokens": False, "include_stop_str_in_output": True}
    told |= {"output_text_buffer_length": 3}
    # Refused at the ingress (guard.py); the experts that a prompt was routed to are not handed on.
    nowhere = {"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 1, "routed_experts_prompt_start": 1}
    nowhere |= {"_watermarking_skipped": True}
    dropped = drawn | ends | told | nowhere
    assert set(SamplingParams.__struct_fields__) == kept.keys() | dropped.keys() | {"detokenize"}, (
        "serve_app/handoff/shaping.py prefill_params: does prefill need it?"
    )
    client = SamplingParams()
    for name, value in (kept | dropped).items():
        assert getattr(client, name) != value, name
        setattr(client, name, value)
    ours, usual = prefill_params(client, None), prefill_params(SamplingParams(), None)
    changed = {name for name in client.__struct_fields__ if getattr(ours, name) != getattr(usual, name)}
    assert changed == kept.keys(), "serve_app/handoff/shaping.py prefill_params"
    assert ours.detokenize is False, "serve_app/handoff/shaping.py prefill_params: text is made at the ingress"


def test_sampling_params_are_those_that_we_know_to_go_on_or_not() -> None:
    from vllm.sampling_params import SamplingParams

    from serve_app.handoff.shaping import NOT_RESUMABLE

    alike = (
        "temperature top_p top_k min_p repetition_penalty logit_bias allowed_token_ids min_tokens max_tokens ignore_eos"
    )
    alike += " stop_token_ids _eos_token_id _all_stop_token_ids"
    shape = "n output_kind stream_interval detokenize skip_special_tokens spaces_between_special_tokens skip_clone"
    shape += (
        " include_stop_str_in_output output_text_buffer_length skip_reading_prefix_cache routed_experts_prompt_start"
    )
    prompt = "prompt_logprobs prompt_logprob_token_ids prompt_logprob_start"
    asked = "seed logprobs logprob_token_ids flat_logprobs thinking_token_budget _bad_words_token_ids"
    engines = "watermarking _watermarking_skipped"
    ingress = "stop"
    known = set(f"{alike} {shape} {prompt} {asked} {engines} {ingress}".split()) | set(NOT_RESUMABLE)
    assert set(SamplingParams.__struct_fields__) == known, (
        "serve_app/handoff/shaping.py can_resume: may an answer go on with it?"
    )


@pytest.mark.parametrize(
    "copied", [lambda params: pickle.loads(pickle.dumps(params)), copy.copy], ids=["sent", "copied"]
)
def test_sampling_params_keep_what_the_ingress_has_completed(make_client: Any, copied: Any) -> None:
    """The stop tokens of the model and of the client, and the tokens of bad words: engines do not ask again."""
    from tests.unit.running import params, render

    async def main() -> Any:
        client = make_client({})
        asked = params(stop_token_ids=[5], bad_words=["bad"])
        core = client.input_processor.process_inputs("r", await render(client), asked, supported_tasks=("generate",))
        return core.params

    completed = asyncio.run(main())
    where = "serve_app/ingress/client.py _admit"
    assert completed._eos_token_id is not None and completed._all_stop_token_ids >= {5}, where
    assert completed._bad_words_token_ids, where
    there = copied(completed)
    for name in completed.__struct_fields__:
        assert getattr(there, name) == getattr(completed, name), f"{where}: {name}"
