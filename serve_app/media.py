"""Media from URLs: vLLM's own connector, with every failure as an error of the client's that says what to do.

Registered with vLLM under the name ``epd`` and chosen through ``VLLM_MEDIA_CONNECTOR``. vLLM already refuses domains and
folders that are not allowed, but answers 500 for most of what can go wrong with a URL.
"""

import asyncio
from typing import Any

import aiohttp
from PIL import UnidentifiedImageError
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

CONNECTOR = "epd"


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class EPDMediaConnector(MediaConnector):
    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """The media behind a URL.

        Raises ``VLLMValidationError`` (400) for what may not or cannot be read, ``VLLMUnprocessableEntityError`` (422) for
        what could not be fetched.
        """
        try:
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        except VLLMError:
            raise
        except Exception as error:
            raise to_client_error(url, error) from error


def to_client_error(url: str, error: Exception) -> VLLMError:
    short = url if len(url) <= 80 else url[:77] + "…"
    match error:
        case aiohttp.ClientResponseError():
            return VLLMUnprocessableEntityError(f"Could not fetch {short}: the server answered {error.status}.")
        case TimeoutError() | asyncio.TimeoutError():
            return VLLMUnprocessableEntityError(f"Could not fetch {short}: it took too long.")
        case aiohttp.ClientError():
            return VLLMUnprocessableEntityError(f"Could not fetch {short}: {type(error).__name__}.")
        case RuntimeError() if "allowed-local-media-path" in str(error):
            return VLLMValidationError(
                "This server reads no local files: set `media.allowed_local_path` to allow a folder."
            )
        case FileNotFoundError() | IsADirectoryError() | PermissionError():
            return VLLMValidationError(f"Cannot read {short}: no such file in the allowed folder.")
        case UnidentifiedImageError():
            return VLLMValidationError("Cannot read the image: it is in no known format, or broken.")
        case ValueError() if "allowed-local-media-path" in str(error):
            return VLLMValidationError(f"{short} is not in the folder that this server may read.")
        case ValueError() | NotImplementedError():
            return VLLMValidationError(str(error))
        case _:
            return VLLMValidationError(f"Cannot read the media: {error}" if str(error) else "Cannot read the media.")
