"""``media:``: what a client may send, and from where it is fetched."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from yarl import URL

from serve_app.config.base import Strict


class ItemLimit(Strict):
    """vLLM's dict form of ``limit_mm_per_prompt``. All but ``count`` only size the item that an engine is profiled with:
    larger ones are still served, from memory that nobody has reserved."""

    count: int = Field(999, ge=0, description="Items per request.")
    num_frames: int | None = Field(None, ge=1, description="Frames of a video.")
    width: int | None = Field(None, ge=1, description="Pixels of an image or a frame.")
    height: int | None = Field(None, ge=1, description="Pixels of an image or a frame.")
    length: int | None = Field(None, ge=1, description="Samples of a sound.")

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, limit: Any) -> Any:
        return {"count": limit} if isinstance(limit, int) else limit


class MediaConfig(Strict):
    """What a client may send, and from where the ingress fetches it. How large an item may be: ``MediaLimits``."""

    allowed_local_path: Path | None = Field(
        None, description="Folder from which `file://` URLs are served. None: none."
    )
    allowed_domains: list[str] = Field(
        [],
        description="Hosts from which media is fetched, redirects included: `example.org` is that host alone, "
        "`.example.org` its subdomains too. Empty: any.",
    )
    allow_private_addresses: bool = Field(
        False,
        description="Fetch from private and loopback addresses too, an object store in the cluster for instance. Never "
        "from link-local ones and the clouds' metadata services.",
    )
    limits: dict[str, ItemLimit] = Field(
        {},
        description="Items per request and modality, or `{count: 1, num_frames: 32}`: also the size of the items that "
        "vLLM reserves memory for. Empty: vLLM's own limits.",
    )
    processor_kwargs: dict[str, Any] = Field({}, description="`mm_processor_kwargs`, min_pixels for instance.")
    io_kwargs: dict[str, dict[str, Any]] = Field({}, description="`media_io_kwargs`, video.num_frames for instance.")
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="A larger request body is answered 413.")

    @field_validator("allowed_local_path")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @field_validator("allowed_domains")
    @classmethod
    def _canonical(cls, domains: list[str]) -> list[str]:
        return [canonical_domain(domain) for domain in domains]


def canonical_domain(domain: str) -> str:
    """A host as the HTTP client names it: lower case, IDN in ASCII, no final dot; a leading dot stays."""
    name = domain.removeprefix(".").removesuffix(".")
    try:
        url = URL(f"http://[{name}]/" if ":" in name else f"http://{name}/")
        if not re.fullmatch(r"[^\s/?#@*]+", name) or url.raw_authority != url.host_subcomponent:
            raise ValueError(name)
    except ValueError:
        raise ValueError(
            f"`media.allowed_domains: {domain}` is no host: write `example.org`, or `.example.org` for its subdomains too"
        ) from None
    return ("." if domain.startswith(".") else "") + str(url.raw_host)
