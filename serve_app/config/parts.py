"""The groups of keys that need no check against each other. docs/configuration.md says what each key means."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from yarl import URL

Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdmissionConfig(Strict):
    """Bounds of what one ingress replica has under way; above them it answers 503 with Retry-After at once."""

    max_requests: int = Field(1024, ge=1)
    max_items: int = Field(2048, ge=1)
    max_media_bytes: int = Field(4 << 30, ge=1)
    max_embed_bytes: int = Field(4 << 30, ge=1)


class RoutingConfig(Strict):
    """Which replica gets a prompt."""

    prefix: bool = True


class MetricsConfig(Strict):
    engines_in_ray: bool = True


class TracingConfig(Strict):
    """Spans of requests, with OpenTelemetry. All other settings are its own environment variables."""

    endpoint: str | None = None


class Timeouts(Strict):
    """How long anything may take, in seconds."""

    request_s: float = Field(600.0, gt=0)
    encode_s: float = Field(30.0, gt=0)
    media_fetch_s: float = Field(30.0, gt=0)
    startup_s: float = Field(3600.0, gt=0)
    hang_s: float = Field(600.0, gt=0)
    drain_s: float = Field(300.0, gt=0)
    drain_notice_s: float = Field(0.0, ge=0)


class ItemLimit(Strict):
    """vLLM's dict form of ``limit_mm_per_prompt``. All but ``count`` only size the item that an engine is profiled with:
    larger ones are still served, from memory that nobody has reserved."""

    count: int = Field(999, ge=0)
    num_frames: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    length: int | None = Field(None, ge=1)
    """Samples of a sound."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, limit: Any) -> Any:
        return {"count": limit} if isinstance(limit, int) else limit


class MediaConfig(Strict):
    """Rules for the media of clients and their hosts. ``MediaLimits`` bounds the size of an item."""

    allowed_local_path: Folder | None = None
    allowed_domains: list[str] = Field([])
    allow_private_addresses: bool = False
    limits: dict[str, ItemLimit] = Field({})
    processor_kwargs: dict[str, Any] = Field({})
    io_kwargs: dict[str, dict[str, Any]] = Field({})
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024)

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
