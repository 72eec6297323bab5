"""Keys that once stood elsewhere. Each is refused with its new name."""

from collections.abc import Iterator, Mapping
from typing import Any


def _advanced(group: str, keys: str) -> dict[str, str]:
    return {f"{group}.{key}": f"advanced.{group}.{key}" for key in keys.split()}


MOVED: dict[str, str] = {
    "request_timeout_s": "timeouts.request_s",
    "encode.timeout_s": "timeouts.encode_s",
    "media.fetch_timeout_s": "timeouts.media_fetch_s",
    "startup_timeout_s": "timeouts.startup_s",
    "hang_timeout_s": "timeouts.hang_s",
    "drain_timeout_s": "timeouts.drain_s",
    "drain_notice_s": "timeouts.drain_notice_s",
    "chunk_interval_s": "advanced.answers.chunk_interval_s",
    "response_store_bytes": "advanced.answers.response_store_bytes",
    **_advanced(
        "encode",
        "from_media min_embeds max_outstanding_embeds attempts retry_encoders_after_s remember_s remember_items "
        "affinity_headroom",
    ),
    **_advanced("retry", "attempts ratio floor_per_s backoff_s"),
    **_advanced("ec", "max_age_s lease_s module_path extra_config"),
    **_advanced("kv", "buffer_device lease_s min_prompt_tokens module_path extra_config"),
    **_advanced(
        "media", "max_bytes max_pixels max_video_pixels max_frames max_seconds max_redirects remember_uuid_bytes"
    ),
    **_advanced("encoder", "max_ongoing_requests max_queued_requests"),
    **_advanced("prefill", "max_ongoing_requests max_queued_requests"),
    **_advanced("decode", "max_ongoing_requests max_queued_requests"),
}


def moved_keys(args: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for each key of ``args`` that stands elsewhere now."""
    for old, new in MOVED.items():
        group, _, key = old.rpartition(".")
        found = args.get(group) if group else args
        if isinstance(found, Mapping) and key in found:
            yield f"`{old}` is now `{new}`"
