"""``advanced:``, the keys that few need. docs/configuration.md says what each key means."""

from typing import Any, Literal

from pydantic import Field

from serve_app.config.parts import Strict


class EncodeConfig(Strict):
    """Which items go to an encoder, in which form, and how often."""

    from_media: bool = True
    min_embeds: int = Field(0, ge=0)
    max_outstanding_embeds: int = Field(131072, ge=0)
    attempts: int = Field(2, ge=1)
    retry_encoders_after_s: float = Field(5.0, ge=0)
    remember_s: float = Field(300.0, ge=0)
    remember_items: int = Field(4096, ge=0)
    affinity_headroom: float = Field(1.0, ge=1)


class RetryConfig(Strict):
    """How often a request is tried again before its first token."""

    attempts: int = Field(3, ge=1)
    ratio: float = Field(0.2, ge=0)
    floor_per_s: float = Field(3.0, ge=0)
    backoff_s: float = Field(0.05, ge=0)


class AdvancedEC(Strict):
    max_age_s: float = Field(86_400.0, gt=0)
    lease_s: float = Field(60.0, ge=0)
    module_path: str | None = None
    extra_config: dict[str, Any] = Field({})


class AdvancedKV(Strict):
    buffer_device: Literal["cuda", "cpu", "xpu"] | None = None
    lease_s: int = Field(30, ge=6)
    min_prompt_tokens: int = Field(0, ge=0)
    module_path: str | None = None
    extra_config: dict[str, Any] = Field({})


class MediaLimits(Strict):
    """Bounds of one item, whatever its URL."""

    max_bytes: int = Field(128 * 1024 * 1024, ge=1024)
    max_pixels: int = Field(89_478_485, ge=1)  # where Pillow begins to warn of a decompression bomb: 256 MiB as RGB
    # 768 frames, the most that Qwen-VL takes, at 1920×1080: 4.8 GB as RGB.
    max_video_pixels: int = Field(1_600_000_000, ge=1)
    max_frames: int = Field(36_000, ge=1)
    max_seconds: float = Field(600.0, gt=0)
    max_redirects: int = Field(5, ge=0)
    remember_uuid_bytes: int = Field(256 * 1024 * 1024, ge=0)


class AnswersConfig(Strict):
    """How answers go to clients, and which are kept."""

    chunk_interval_s: float = Field(0.02, ge=0)
    response_store_bytes: int | None = Field(None, ge=0)


class QueueConfig(Strict):
    """Calls of the replicas of one stage."""

    max_ongoing_requests: int = Field(256, ge=1)
    max_queued_requests: int = Field(1024, ge=-1)


class AdvancedRouting(Strict):
    """What an ingress replica remembers of prefix caches."""

    prefix_blocks: int = Field(262_144, ge=1024)


class AdvancedConfig(Strict):
    encode: EncodeConfig = EncodeConfig()
    retry: RetryConfig = RetryConfig()
    routing: AdvancedRouting = AdvancedRouting()
    ec: AdvancedEC = AdvancedEC()
    kv: AdvancedKV = AdvancedKV()
    media: MediaLimits = MediaLimits()
    answers: AnswersConfig = AnswersConfig()
    encoder: QueueConfig = QueueConfig()
    prefill: QueueConfig = QueueConfig()
    decode: QueueConfig = QueueConfig()
