"""``advanced:``: what few need, by its subject. docs/configuration.md has a line on each key."""

from typing import Any, Literal

from pydantic import Field

from serve_app.config.base import Strict


class EncodeConfig(Strict):
    """Which items go to an encoder, in which form, and how often."""

    from_media: bool = Field(
        True,
        description="Send encoders the media itself where the model allows. False: always processed tensors, which are "
        "made at the ingress and far larger.",
    )
    min_embeds: int = Field(
        0, ge=0, description="Smaller items (visual or audio tokens) are encoded by prefill itself."
    )
    max_outstanding_embeds: int = Field(
        131072,
        ge=0,
        description="With more embeddings asked of encoders and not answered, prefill encodes. 0: no limit.",
    )
    attempts: int = Field(2, ge=1, description="Encoder replicas tried for an item before prefill encodes it.")
    retry_encoders_after_s: float = Field(
        5.0, ge=0, description="Time for which prefill encodes everything once all attempts for an item failed."
    )
    remember_s: float = Field(
        300.0, ge=0, description="Time for which an item that is encoded is not sent again (folder connectors)."
    )
    remember_items: int = Field(4096, ge=0, description="As many items are remembered by an ingress replica.")
    affinity_headroom: float = Field(
        1.25, ge=1, description="A repeated item goes to the same replica while that has at most this × the mean work."
    )


class RetryConfig(Strict):
    """How often a request is tried again before its first token."""

    attempts: int = Field(3, ge=1, description="Times that a choice is prefilled and decoded at most. 1: no retry.")
    ratio: float = Field(0.2, ge=0, description="Retries per request that all requests of an ingress replica may use.")
    floor_per_s: float = Field(3.0, ge=0, description="Retries per second that are always there.")
    backoff_s: float = Field(0.05, ge=0, description="Longest wait before the first retry; doubles, with jitter.")


class AdvancedEC(Strict):
    """Embeddings between engines, beyond ``ec:``."""

    max_age_s: float = Field(
        86_400.0, gt=0, description="Seconds after its last use when SharedFolderECConnector removes an embedding."
    )
    lease_s: float = Field(
        60.0,
        ge=0,
        description="Seconds after its last use in which an embedding is never removed: its request is on its way from "
        "the encoder to prefill, and nobody there has pinned it yet.",
    )
    module_path: str | None = Field(None, description="Python module of a connector that vLLM does not know.")
    extra_config: dict[str, Any] = Field({}, description="`ec_connector_extra_config`, passed on as it is.")


class AdvancedKV(Strict):
    """KV blocks between engines, beyond ``kv:``."""

    buffer_device: Literal["cuda", "cpu", "xpu"] | None = Field(None, description="None: the accelerator's own memory.")
    lease_s: int = Field(30, ge=6, description="Seconds that prefill keeps blocks which nobody pulls.")
    min_prompt_tokens: int = Field(
        0, ge=0, description="A shorter prompt is prefilled by decode: its hand-off would cost more than its prefill."
    )
    module_path: str | None = Field(None, description="Python module of a connector that vLLM does not know.")
    extra_config: dict[str, Any] = Field({}, description="`kv_connector_extra_config`, passed on as it is.")


class MediaLimits(Strict):
    """How much one item may be, whatever its URL."""

    max_bytes: int = Field(128 * 1024 * 1024, ge=1024, description="Bytes of one item, as the URL gives them.")
    max_pixels: int = Field(
        89_478_485,  # where Pillow begins to warn of a decompression bomb: 256 MiB as RGB
        ge=1,
        description="Pixels of an image, or of one frame of a video.",
    )
    max_video_pixels: int = Field(
        1_600_000_000,  # 768 frames, the most that Qwen-VL takes, at 1920×1080: 4.8 GB as RGB
        ge=1,
        description="Pixels of all frames together that are taken from one video.",
    )
    max_frames: int = Field(36_000, ge=1, description="Frames in a video's file, or in an animated image.")
    max_seconds: float = Field(600.0, gt=0, description="Length of a video or a sound.")
    max_redirects: int = Field(5, ge=0, description="Redirects that are followed for one item.")
    remember_uuid_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="Bytes of media that an ingress replica remembers under the `uuid` a client gave it. 0: none.",
    )


class AnswersConfig(Strict):
    """How answers go to clients, and which are kept."""

    chunk_interval_s: float = Field(
        0.02,
        ge=0,
        description="Tokens of an answer that come within this time go on together; the first and the last at once.",
    )
    response_store_bytes: int | None = Field(
        None,
        ge=0,
        description="Bytes of responses that one ingress replica keeps, for `store`, `background` and "
        "`previous_response_id` of `/v1/responses`; least recently used go first. 0: none are kept. None: 256 MiB where "
        "`VLLM_ENABLE_RESPONSES_API_STORE=1` is in its environment, else none.",
    )


class QueueConfig(Strict):
    """Calls of the replicas of one stage."""

    max_ongoing_requests: int = Field(256, ge=1, description="Calls that one replica takes at a time; more wait.")
    max_queued_requests: int = Field(
        1024, ge=-1, description="Calls that wait for a replica, per ingress replica; more are refused. -1: no limit."
    )


class AdvancedConfig(Strict):
    encode: EncodeConfig = EncodeConfig()
    retry: RetryConfig = RetryConfig()
    ec: AdvancedEC = AdvancedEC()
    kv: AdvancedKV = AdvancedKV()
    media: MediaLimits = MediaLimits()
    answers: AnswersConfig = AnswersConfig()
    encoder: QueueConfig = QueueConfig()
    prefill: QueueConfig = QueueConfig()
    decode: QueueConfig = QueueConfig()
