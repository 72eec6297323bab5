"""How a request is shaped for each stage.

Fields typed ``Any`` hold vLLM's own objects, which this module passes on without importing vLLM.

Sources: ``vllm/distributed/ec_transfer/ec_connector/utils.py`` (what a consumer must know of an item),
``vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py`` (the keys of ``kv_transfer_params``).
"""

import copy
import hashlib
import itertools
import uuid
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import msgspec

from serve_app.handoff.types import REMOTE_DECODE, EncodeReply, Item, MediaRequest, Prompt, StageRequest

Call = TypeVar("Call", bound=StageRequest | MediaRequest)


def traced(call: Call, headers: dict[str, str] | None) -> Call:
    """The call with trace headers, so its engine continues the trace that they name."""
    if headers is None:
        return call
    return msgspec.structs.replace(call, options=call.options | {"trace_headers": headers})


def salted(prompt: Prompt, salt: str | None) -> Prompt:
    """The prompt with item hashes that cover the tenant's salt too.

    The hash names the item on every stage (encoder caches, EC connector, prefix caches), so tenants share no item and
    cannot probe for one. The hash is keyed: it tells neither the salt nor the content.
    """
    if not salt:
        return prompt
    secret = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=32).digest()

    def own(item: Item) -> Item:
        if item.source is not None:  # the encoder has salted its hash
            return item
        digest = hashlib.blake2b(item.hash.encode(errors="surrogatepass"), key=secret, digest_size=32).hexdigest()
        return msgspec.structs.replace(item, hash=digest)

    return msgspec.structs.replace(prompt, items=tuple(own(item) for item in prompt.items))


def unique_id(request_id: str) -> str:
    """Id of a call of prefill or decode, ``<id>-<short>`` as vLLM makes them: an engine may get two calls of a request."""
    return f"{request_id}-{uuid.uuid4().hex[:8]}"


def child_id(request_id: str, index: int) -> str:
    """Id of the encode call of item ``index``: ``<id>:<item>:<short>``, as in the reference."""
    return f"{request_id}:{index}:{uuid.uuid4().hex[:6]}"


def for_encoder(prompt: Prompt, index: int) -> Prompt:
    """The prompt of one encode call: item ``index`` alone, all text removed.

    No cache salt: embeddings do not depend on the prompt, and the encoder has no prefix cache.
    """
    item = prompt.items[index]
    return Prompt(
        token_ids=prompt.token_ids[item.offset : item.offset + item.length],
        items=(msgspec.structs.replace(item, offset=0, source=None),),
    )


def distinct(items: tuple[Item, ...]) -> dict[str, int]:
    """``{hash: index of its first item}``: an item that stands twice in a prompt is encoded once."""
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        first.setdefault(item.hash, index)
    return first


def interleaved(items: tuple[Item, ...]) -> set[int]:
    """The items, by index, whose tokens stand among those of another: a video and its sound (`use_audio_in_video`), of which
    no engine can take one without the other."""
    pairs = itertools.pairwise(range(len(items)))
    return {each for a, b in pairs if items[b].offset < items[a].offset + items[a].length for each in (a, b)}


def without_pixels(prompt: Prompt, declared: Callable[[str], Collection[str]], encoded: Collection[str]) -> Prompt:
    """The prompt for an engine that gets the embeddings of the items ``encoded`` (hashes) through the EC connector.

    An item that may still have to be encoded keeps its pixels. ``declared``: see ``metadata_only``, by modality.
    """
    items = tuple(
        metadata_only(item, declared(item.modality)) if item.hash in encoded else item for item in prompt.items
    )
    return msgspec.structs.replace(prompt, items=items)


def without_sources(prompt: Prompt) -> Prompt:
    """The prompt as an engine gets it: the sources of items stay at the ingress."""
    items = tuple(msgspec.structs.replace(item, source=None) if item.source else item for item in prompt.items)
    return msgspec.structs.replace(prompt, items=items)


def has_pixels(item: Item, declared: Collection[str]) -> bool:
    """Whether an engine could encode the item: it has more than the fields that token positions depend on."""
    return item.data is not None and len(_metadata(item.data, declared)) < len(item.data)


def metadata_only(item: Item, declared: Collection[str]) -> Item:
    """The item without pixels, for an engine that gets its embedding.

    It keeps the fields that token positions depend on: those marked ``keep_on_cpu`` (M-RoPE grids) and those that the model
    declares as placeholder metadata. An item of a model with neither keeps all, for its engine may need it.
    """
    if item.data is None or not ((kept := _metadata(item.data, declared)) or declared):
        return item
    return msgspec.structs.replace(item, data=type(item.data)(kept))


def _metadata(data: Any, declared: Collection[str]) -> dict[str, Any]:
    return {key: field for key, field in data.items() if key in declared or field.field.keep_on_cpu}


def merge_ec_params(replies: dict[int, EncodeReply], prompt: Prompt) -> dict[str, Any]:
    """``ec_transfer_params`` of a prompt from the encoders' replies by item index.

    ``item_indices`` become the places of the item in this prompt: each encoder saw its item alone, at 0. Raises
    ``ValueError`` when a reply does not name its item.
    """
    merged: dict[str, Any] = {}
    for index, reply in replies.items():
        item_hash = prompt.items[index].hash
        if set(reply.ec_transfer_params) != {item_hash}:
            raise ValueError(f"asked for item {item_hash}, the encoder answered for {sorted(reply.ec_transfer_params)}")
        places = [i for i, item in enumerate(prompt.items) if item.hash == item_hash]
        merged[item_hash] = {**reply.ec_transfer_params[item_hash], "item_indices": places}
    return merged


def generates(params: Any) -> bool:
    """Whether these are sampling parameters; else they are pooling parameters, and the answer has no tokens."""
    return hasattr(params, "max_tokens")


PROMPT_PARAMS = ("prompt_logprobs", "flat_logprobs", "skip_reading_prefix_cache", "skip_clone")
"""Sampling parameters that prefill needs."""


def prefill_params(params: Any, ec_transfer_params: dict[str, Any] | None) -> Any:
    """Sampling parameters of the prefill call: it makes one token that nobody reads, and holds the blocks for decode.

    No stop rule may end the request: NIXL holds blocks only of requests that ended by length. Decode samples the first
    token again from the last prompt position, with the client's own parameters.
    """
    return type(params)(
        max_tokens=1,
        temperature=0.0,
        watermarking=False,
        ignore_eos=True,
        detokenize=False,
        output_kind=type(params.output_kind).FINAL_ONLY,
        extra_args=_extra(params, kv_transfer_params=REMOTE_DECODE, ec_transfer_params=ec_transfer_params),
        **{name: getattr(params, name) for name in PROMPT_PARAMS},
    )


def decode_params(
    params: Any, kv_transfer_params: dict[str, Any] | None, ec_transfer_params: dict[str, Any] | None
) -> Any:
    """Sampling parameters of the decode call of a choice with these ``params``: the ingress makes its text.

    Where prefill ran elsewhere, only prefill has the logits of the prompt. Pooling parameters stay as they are: of what is
    transferred vLLM passes nothing on in them, and embeddings are found by their hashes.
    """
    if not generates(params):
        return params
    decode = copy.copy(params)
    decode.output_kind = type(params.output_kind).FINAL_ONLY
    decode.detokenize, decode.stop = False, []
    if kv_transfer_params is not None:
        decode.prompt_logprobs = None
    decode.extra_args = _extra(params, kv_transfer_params=kv_transfer_params, ec_transfer_params=ec_transfer_params)
    return decode


NOT_RESUMABLE = (
    "bad_words",
    "extra_args",
    "frequency_penalty",
    "presence_penalty",
    "repetition_detection",
    "structured_outputs",
    "trace_decode_token_ids",
)
"""Sampling parameters that treat output tokens unlike prompt tokens, or have a state of their own in the engine."""


def can_resume(params: Any) -> bool:
    """Whether an answer that broke off can resume with its output tokens as the end of the prompt."""
    if params.thinking_token_budget is not None or (params.seed is not None and params.temperature > 0):
        return False
    return not any(getattr(params, name) for name in NOT_RESUMABLE)


def resumed(request: StageRequest, tokens: list[int]) -> StageRequest:
    """The request for the rest of the answer, after its output ``tokens`` so far."""
    if not tokens:
        return request
    rest = copy.copy(request.params)
    rest.prompt_logprobs = None
    rest.min_tokens = max(rest.min_tokens - len(tokens), 0)
    if rest.max_tokens is not None:
        rest.max_tokens -= len(tokens)
    prompt = msgspec.structs.replace(request.prompt, token_ids=request.prompt.token_ids + tokens)
    return msgspec.structs.replace(request, prompt=prompt, params=rest)


def pulled_blocks(params: Any) -> dict[str, Any] | None:
    """``kv_transfer_params`` of a decode request that waits for the KV blocks of a prefill."""
    return (params.extra_args or {}).get("kv_transfer_params") if generates(params) else None


def hand_off_id(kv_transfer_params: dict[str, Any] | None) -> str | None:
    """Prefill's id of the request whose KV blocks these name; None with a connector that has no leases."""
    return (kv_transfer_params or {}).get("remote_request_id")


def _extra(params: Any, **transfer: dict[str, Any] | None) -> dict[str, Any] | None:
    given = {key: dict(value) for key, value in transfer.items() if value is not None}
    return (params.extra_args or {}) | given or None
