"""Decodes an item to an image, frames or samples: vLLM's decoders, behind the checks of ``check``."""

import asyncio
import re
from typing import Any

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MediaIO
from vllm.multimodal.media.connector import global_thread_pool

from serve_app.config import MediaLimits
from serve_app.media.check import check


def decode(data: bytes, media_io: MediaIO[Any], limits: MediaLimits) -> Any:
    """The image, frames or samples. Raises ``VLLMValidationError`` for media that is broken or over a limit."""
    try:
        return check(data, media_io, limits).load_bytes(data)
    except Exception as error:
        raise to_client_error(error) from error


async def in_thread(function: Any, *args: Any) -> Any:
    """Call a function in vLLM's thread pool for media (``VLLM_MEDIA_LOADING_THREAD_COUNT``)."""
    return await asyncio.get_running_loop().run_in_executor(global_thread_pool, function, *args)


VLLM_LIMITS = {
    "VLLM_MAX_IMAGE_PIXELS": "`advanced.media.max_pixels`",
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": "`advanced.media.max_seconds`",
}
"""vLLM's names of limits, and our keys for them."""


def to_client_error(error: Exception) -> VLLMError:
    """The error for the client: only its bytes went into decoding, so every failure is about them."""
    if isinstance(error, VLLMError):
        return error
    # vLLM's ValueErrors are sentences; other libraries' texts may be about this process.
    text = re.sub(r" ?<[^<>]* object at 0x[0-9a-f]+>", "", str(error)) if isinstance(error, ValueError) else ""
    for theirs, ours in VLLM_LIMITS.items():
        text = text.replace(theirs, ours)
    return VLLMValidationError(text or "Cannot read the media: it is in no known format, or broken.")
