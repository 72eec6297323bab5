"""What vLLM would take from a client and nothing behind it should get: refused as the client's mistake, before any stage
is called. Media from URLs have a guard of their own in ``media.py``.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from serve_app.handoff.errors import BadRequest
from serve_app.ingress.media_names import salt
from serve_app.ingress.request import current

TRANSFER_KEYS = ("kv_transfer_params", "ec_transfer_params")
MAX_LENGTH_PENALTY = 10.0
"""The score of a beam divides by its length to this power, which must be a float for the longest context."""


class GuardedInputProcessor(InputProcessor):
    """vLLM's checks, and one of beam searches: they come here only to have their watermark resolved, first of all."""

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
        resolved: bool = super().resolve_watermarking(params)
        return resolved


def check_params(params: SamplingParams) -> None:
    """Raise ``BadRequest`` for what no stage could take, and for what the stages say to each other."""
    for key in TRANSFER_KEYS:
        if params.extra_args and key in params.extra_args:
            raise BadRequest(f"`{key}` is passed between the stages of this server and cannot be set by a client.")
    if params.prompt_logprob_token_ids is not None:
        raise BadRequest("`prompt_logprob_token_ids` is not passed on between stages: ask for `prompt_logprobs`.")
    try:
        msgspec.msgpack.encode(params)  # as it goes to an engine
    except OverflowError:
        raise BadRequest("A number in the request has more than 64 bits.") from None


def guard_renderer(renderer: Any) -> None:
    """Let no client name an item behind the door, tell whose names it may use there, and say what is wrong where a prompt
    cannot be processed."""
    process_uuids, process = renderer._process_mm_uuids, renderer._process_multimodal_async
    render_chat = renderer.render_chat_async

    def checked(mm_data: Any, mm_data_items: Any, mm_uuid_items: Mapping[str, Any], mm_req_id: str) -> Any:
        """vLLM takes a `uuid` for the item's hash, and that is the key of an encoder cache that all clients share: a client
        could put its own picture in the place of another's. What comes through a chat has none left (`media_names`)."""
        if any(uuid is not None for names in mm_uuid_items.values() for uuid in names or ()):
            raise VLLMValidationError("`uuid` of a media item is taken in the messages of a chat only.")
        return process_uuids(mm_data, mm_data_items, mm_uuid_items, mm_req_id)

    async def processed(*args: Any, **kwargs: Any) -> Any:
        """Only the prompt and its items go in."""
        try:
            return await process(*args, **kwargs)
        except (AssertionError, ValueError) as error:
            raise VLLMValidationError(why_not_processed(error)) from error

    async def rendered(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        token = salt.set((prompt_extras or {}).get("cache_salt") or "")
        try:
            return await render_chat(*args, prompt_extras=prompt_extras, **kwargs)
        finally:
            salt.reset(token)

    renderer._process_mm_uuids = checked
    renderer._process_multimodal_async = processed
    renderer.render_chat_async = rendered


def why_not_processed(error: Exception) -> str:
    """What is wrong with a prompt or item that vLLM cannot process, for the client.

    vLLM asserts that a prompt and its items fit together, which they do not where the prompt was truncated. Of a failure in
    the model's processor, its message lists the data, and the cause says what it was.
    """
    return f"The prompt and its media cannot be processed: {error.__cause__ or error}"
