"""Refuses parameters that vLLM would take from a client and that no stage should get, before any stage is called."""

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from serve_app.handoff.errors import BadRequest
from serve_app.ingress.request import current

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
MAX_LENGTH_PENALTY = 10.0
"""The score of a beam is divided by its length to this power, which must be a float for the longest context."""


class GuardedInputProcessor(InputProcessor):
    """vLLM's checks, and one more for beam searches, which call only ``resolve_watermarking``, before all else."""

    def resolve_watermarking(self, params: SamplingParams | BeamSearchParams) -> bool:
        if isinstance(params, BeamSearchParams) and not abs(params.length_penalty) <= MAX_LENGTH_PENALTY:
            error = VLLMValidationError(
                f"length_penalty must be between -{MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}.",
                parameter="length_penalty",
                value=params.length_penalty,
            )
            if (request := current.get()) is not None:
                request.fail(error)
            raise error
        return bool(super().resolve_watermarking(params))


def check_params(params: SamplingParams) -> None:
    """Raise ``BadRequest`` for parameters that no stage can take, or that only stages may set."""
    for key in TRANSFER_KEYS:
        if params.extra_args and key in params.extra_args:
            raise BadRequest(f"`{key}` is passed between the stages of this server and cannot be set by a client.")
    if params.prompt_logprob_token_ids is not None:
        raise BadRequest("`prompt_logprob_token_ids` is not passed on between stages: ask for `prompt_logprobs`.")
    try:
        msgspec.msgpack.encode(params)  # as it goes to an engine
    except OverflowError:
        raise BadRequest("A number in the request has more than 64 bits.") from None
