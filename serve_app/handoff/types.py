"""The types that cross a handle between stages.

They are small and frozen, and hold tensors only where a stage has to see pixels. Fields typed ``Any`` hold vLLM's own
objects, without an import of vLLM.
"""

import hashlib
from typing import Any, NamedTuple

import msgspec

REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""``kv_transfer_params`` of a prefill request: hold the blocks until a decode engine has pulled them."""

READ_S = "read_s"
"""Key in the ``ec_transfer_params`` of a consumer engine's answer: seconds to read the embeddings of the request."""

VERSION_KEY = "epd_version"
"""Key in the extra config of a connector of ours: the version of its engine, as text."""


class Version(NamedTuple):
    """Digests of what an engine or an ingress was started from (``launch.fingerprint``), or of what a call asks for.

    An empty field is not known, or not asked for.
    """

    front: str = ""
    """Configuration, tokenizer, preprocessor, arguments, protocol: an ingress has it too."""
    template: str = ""
    """The chat template that the config names."""
    weights: str = ""
    layout: str = ""
    """Layout of KV blocks: what vLLM's connector compares."""

    def other_than(self, asked: "Version") -> list[str]:
        """Names of the fields that differ from what is asked for."""
        pairs = zip(self._fields, self, asked, strict=True)
        return [name for name, ours, theirs in pairs if ours and theirs and ours != theirs]

    def fits(self, asked: "Version") -> bool:
        return not self.other_than(asked)

    def after(self, engine: "Version") -> "Version":
        """The version that a call asks for when it continues the work of ``engine``."""
        return self._replace(weights=engine.weights or self.weights, layout=engine.layout)


ANY = Version()


class Media(msgspec.Struct, frozen=True):
    """One image, video or audio as the client sent it; an encoder decodes, transforms and encodes it."""

    modality: str
    data: bytes
    """The file's bytes, fetched and without base64."""
    io: Any
    """vLLM's MediaIO that decodes them."""
    units: int
    """Pixels of an image, else bytes: the cost is estimated from them until an encoder has answered."""
    digest: str
    processor_kwargs: dict[str, Any] = {}
    io_kwargs: dict[str, Any] = {}
    """Arguments of the request, which the item's hash covers."""
    salt: str | None = None
    """The tenant's, where embeddings of tenants are kept apart."""
    key: str = ""
    """Equal for equal media of equal requests, and known before decoding (``keyed``)."""


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def keyed(media: Media) -> Media:
    """The media with its ``key``."""
    named = repr((media.digest, media.modality, media.processor_kwargs, media.io_kwargs, media.salt))
    return msgspec.structs.replace(media, key=digest_of(named.encode(errors="surrogatepass")))


class Source(msgspec.Struct, frozen=True):
    """The origin of an item that was not processed at the ingress. It never leaves the ingress."""

    media: Media
    reply: "EncodeReply | None"
    """The encoder's answer while the prompt was rendered. With it the item's data has no pixels; without, it has."""


class Item(msgspec.Struct, frozen=True):
    """One image, video or audio of a prompt."""

    modality: str
    hash: str
    """vLLM's content hash, the key of the encoder cache; also covers model, processor and media arguments."""
    offset: int
    """Index of its first placeholder token in the prompt."""
    length: int
    """Placeholder tokens."""
    is_embed: Any | None
    """Bool tensor of shape ``(length,)``: the placeholder tokens that take an embedding. None: all."""
    data: Any | None
    """vLLM's MultiModalKwargsItem: processed tensors, pixels included, or only the fields that positions need."""
    source: Source | None = None
    """Set for items that came from media."""

    @property
    def bare(self) -> bool:
        """Whether it has no pixels: an engine may get it only where its embedding is."""
        return self.source is not None and self.source.reply is not None

    @property
    def num_embeds(self) -> int:
        return self.length if self.is_embed is None else int(self.is_embed.sum())

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors and of the media it came from."""
        tensors = 0 if self.data is None else sum(int(getattr(each.data, "nbytes", 0)) for each in self.data.values())
        return tensors + (len(self.source.media.data) if self.source is not None else 0)


class Prompt(msgspec.Struct, frozen=True):
    """A rendered prompt: token ids with placeholders, and the items that fill them, in prompt order."""

    token_ids: list[int]
    items: tuple[Item, ...] = ()
    cache_salt: str | None = None


class StageRequest(msgspec.Struct, frozen=True):
    """One call of a stage."""

    request_id: str
    """Unique to this call; engines know the request by it."""
    prompt: Prompt
    params: Any
    """vLLM's SamplingParams, as its InputProcessor completed them; transfer parameters are in its ``extra_args``."""
    options: dict[str, Any] = {}
    """Fields of vLLM's EngineCoreRequest: lora_request, priority, trace_headers, …"""
    version: Version = ANY
    """The version of the ingress and the engines whose work this call continues. An engine of another one refuses it."""


class MediaRequest(msgspec.Struct, frozen=True):
    """One call of an encoder with an item as media."""

    request_id: str
    media: Media
    cost: int
    """Embeddings that the ingress expects it to have."""
    options: dict[str, Any] = {}
    version: Version = ANY


class Features(msgspec.Struct, frozen=True):
    """One processed item, alone in a prompt, with what vLLM needs to render another prompt around it."""

    prompt: Prompt
    metadata: dict[str, Any]
    """Fields that size its placeholder range, as lists: ``{"image_grid_thw": [1, 6, 6]}``."""

    @property
    def item(self) -> Item:
        return self.prompt.items[0]


class EncodeReply(msgspec.Struct, frozen=True):
    ec_transfer_params: dict[str, Any]
    """``{hash: {"item_indices", "metadata", …}}`` as the EC connector of the encoder gave it; passed on verbatim."""
    replica: str
    features: Features | None = None
    """The features of an item that went as media, without pixels."""
    ran_s: float = 0.0
    """Seconds in the replica without those in its engine's queue: the rest of the call is queueing and transfer."""
    version: Version = ANY


class PrefillReply(msgspec.Struct, frozen=True):
    kv_transfer_params: dict[str, Any]
    """Good for one decode request."""
    prompt_logprobs: Any | None
    """vLLM's LogprobsTensors, which the ingress gives to its OutputProcessor."""
    num_cached_tokens: int | None
    replica: str
    ran_s: float = 0.0
    ec_s: float = 0.0
    """Seconds of ``ran_s`` that reading embeddings took; 0 where none was read, or the connector does not tell."""
    node: str = ""
    """Ray's id of the node that holds the blocks."""
    version: Version = ANY


class DecodeReply(msgspec.Struct, frozen=True):
    """The end of a decode call, whose tokens went over the channel."""

    replica: str
    tokens: int
    """Number of tokens sent."""
    version: Version = ANY
