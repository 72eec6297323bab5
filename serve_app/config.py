"""The configuration of one application: what stands under ``args:`` in ``serve_config.yaml``.

Replica counts and ``autoscaling_config`` are Ray Serve's own and stand under ``deployments:``. Everything here is checked
when the application is built, so a mistake is a sentence at start-up and not a failing replica ten minutes later.
"""

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yarl import URL

from serve_app.stage import Stage

DEMO_MODEL = "demo"
BUILT_IN_MODELS = (DEMO_MODEL, "demo-random")
"""Tiny models that need no download (see ``serve_app.demo``): one that sees, one of random weights for tests and load."""

GPU_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
"""Model when none is named and the cluster has GPUs: the reference's default."""


class Accelerator(StrEnum):
    AUTO = "auto"
    CUDA = "cuda"
    XPU = "xpu"
    CPU = "cpu"


class Http(StrEnum):
    REPLICAS = "replicas"
    PROXY = "proxy"


ROLE_ARGS = frozenset({"ec_transfer_config", "kv_transfer_config", "mm_encoder_only", "mm_processor_cache_gb"})
"""Engine arguments that the topology decides."""

SHARED_ARGS = frozenset(
    {
        "model",
        "served_model_name",
        "tokenizer",
        "revision",
        "tokenizer_revision",
        "trust_remote_code",
        "dtype",
        "max_model_len",
        "hf_overrides",
        "block_size",
        "kv_cache_dtype",
        "limit_mm_per_prompt",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "generation_config",
        "override_generation_config",
        "enable_lora",
    }
)
"""Engine arguments that change token ids, item hashes or KV layout, and so must be equal on all stages."""

PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""Their product is the cards of one engine: what its replica claims."""

OWN_KEYS = {
    "model": "`model:`",
    "served_model_name": "`served_model_name:`",
    "ec_transfer_config": "`ec:`",
    "kv_transfer_config": "`kv:`",
    "limit_mm_per_prompt": "`media.limits:`",
    "mm_processor_kwargs": "`media.processor_kwargs:`",
    "media_io_kwargs": "`media.io_kwargs:`",
    "allowed_local_media_path": "`media.allowed_local_path:`",
    "allowed_media_domains": "`media.allowed_domains:`",
    "otlp_traces_endpoint": "`tracing.endpoint:`",
    "mm_encoder_only": "the topology: a stage under `encoder:` is encoder-only",
    "mm_processor_cache_gb": "the stages, which do not share a processor cache (it is off)",
}
"""Engine arguments that have a key, or an owner, of their own here."""

SIDE_CHANNEL_ENV = frozenset(f"VLLM_{kind}_SIDE_CHANNEL_{part}" for kind in ("NIXL", "EC") for part in ("HOST", "PORT"))
"""A replica's own addresses, which it sets itself (see ``transfer.side_channel_env``)."""

EC_EXTRA_KEYS = {
    "SharedFolderECConnector": frozenset({"shared_storage_path", "max_bytes", "max_age_s", "lease_s"}),
    "ECExampleConnector": frozenset({"shared_storage_path"}),
    "ECCPUConnector": frozenset({"consumer_ack_timeout_s"}),
}
"""The connectors that can be named without a module, and what each reads from its extra config."""

EC_OWN_KEYS = {
    "ec_cpu_bytes": "set by `ec.max_bytes`",
    "ec_enable_nixl": "always on: without NIXL no embedding would leave its encoder",
}
"""What of ``ECCPUConnector``'s extra config has an owner here."""

EngineArgs = Annotated[
    dict[str, Any], Field(description="vLLM engine arguments by name, as in `vllm serve --help`, with underscores.")
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageConfig(Strict):
    """One engine stage. Its replicas and autoscaling stand under ``deployments:``."""

    engine_args: EngineArgs = {}
    gpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="GPUs that one replica claims from Ray; below 1 to share a card. None: see placement.py.",
    )
    cpus_per_replica: float | None = Field(
        None, ge=0, description="CPUs that one replica claims from Ray. None: 1, less on a small machine."
    )
    resources: dict[str, float] = Field(
        {}, description="Custom Ray resources that one replica claims, to place a stage."
    )
    label_selector: dict[str, str] = Field(
        {},
        description="Labels of the Ray nodes that replicas run on, to place a stage: `in(a, b)`, `!a` and plain values.",
    )
    devices: str | None = Field(
        None,
        description='Cards by index, as in CUDA_VISIBLE_DEVICES ("0" or "0,1"), in place of the ones Ray would pick.',
    )
    env: dict[str, str] = Field(
        {}, description="Environment variables of the replica and its engine, UCX_* for instance."
    )
    max_ongoing_requests: int = Field(256, ge=1, description="Calls that one replica takes at a time; more wait.")
    max_queued_requests: int = Field(
        1024, ge=-1, description="Calls that wait for a replica, per ingress replica; more are refused. -1: no limit."
    )

    @property
    def world_size(self) -> int:
        """Cards of one engine."""
        return math.prod(int(self.engine_args.get(size, 1)) for size in PARALLEL_SIZES)

    @field_validator("engine_args")
    @classmethod
    def _no_shared_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key in args:
            if key in OWN_KEYS:
                raise ValueError(f"`{key}` is set by {OWN_KEYS[key]}")
            if key in SHARED_ARGS:
                raise ValueError(
                    f"`{key}` must be equal on all stages: put it under the top-level `engine_args:`, not under one stage"
                )
        return args

    @field_validator("env")
    @classmethod
    def _no_addresses(cls, env: dict[str, str]) -> dict[str, str]:
        for key in SIDE_CHANNEL_ENV & env.keys():
            raise ValueError(f"`{key}` is set by each replica: its node's address and a port that is free there")
        return env

    @field_validator("label_selector")
    @classmethod
    def _rays_labels(cls, selector: dict[str, str]) -> dict[str, str]:
        from ray.serve.schema import RayActorOptionsSchema

        try:
            RayActorOptionsSchema(label_selector=selector)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return selector

    @model_validator(mode="after")
    def _whole_cards_for_many(self) -> Self:
        gpus = self.gpus_per_replica
        if gpus is None:
            return self
        if 1 < gpus != int(gpus):
            raise ValueError(f"`gpus_per_replica: {gpus}`: above one card only whole cards can be claimed")
        if self.world_size > 1 and 0 < gpus != self.world_size:
            raise ValueError(
                f"`gpus_per_replica: {gpus}` does not fit {' × '.join(PARALLEL_SIZES)} = {self.world_size}: leave it out or "
                "make them equal"
            )
        if self.devices is not None and len(self.devices.split(",")) < max(self.world_size, gpus):
            raise ValueError(f"`devices: {self.devices!r}` names fewer cards than one replica uses")
        return self


class ECConfig(Strict):
    """How embeddings move from encoders to prefill and decode."""

    connector: str = Field(
        "SharedFolderECConnector",
        description="SharedFolderECConnector (ours, any engine), ECExampleConnector, ECCPUConnector (GPUs, NIXL), or a "
        "class of your own with `module_path`.",
    )
    storage_path: Path | None = Field(
        None,
        description="Folder that all engines share, for folder connectors. None: epd-ec-cache-<uid>, for "
        "SharedFolderECConnector in /dev/shm where there is room, else in the temp folder.",
    )
    max_bytes: int | None = Field(
        None,
        ge=1024**2,
        description="Bytes of embeddings that are kept; least recently used goes first. In the folder of "
        "SharedFolderECConnector (None: 8 GiB), or in the shared memory of each engine with ECCPUConnector (None: 1 GiB).",
    )
    max_age_s: float = Field(
        86_400.0, gt=0, description="Seconds after its last use when SharedFolderECConnector removes an embedding."
    )
    lease_s: float = Field(
        60.0,
        ge=0,
        description="Seconds after its last use in which an embedding is never removed: its request is on its way from "
        "the encoder to prefill, and nobody there has pinned it yet.",
    )
    salt_by_tenant: bool = Field(
        False,
        description="Keep the embeddings of requests with another `cache_salt` apart: no tenant can use, or probe for, "
        "what another has sent.",
    )
    module_path: str | None = Field(None, description="Python module of a connector that vLLM does not know.")
    extra_config: dict[str, Any] = Field({}, description="`ec_connector_extra_config`, passed on as it is.")

    @property
    def bounds(self) -> dict[str, float]:
        """Of the folder of ``SharedFolderECConnector``."""
        return {"max_bytes": self.max_bytes or 8 << 30, "max_age_s": self.max_age_s, "lease_s": self.lease_s}

    @property
    def buffer_bytes(self) -> int:
        """Of each engine with ``ECCPUConnector``. Small: every block of it is named in every answer to a consumer."""
        return self.max_bytes or 1 << 30

    @property
    def uses_folder(self) -> bool:
        return self.connector in ("SharedFolderECConnector", "ECExampleConnector")

    @property
    def uses_nixl(self) -> bool:
        return self.connector == "ECCPUConnector"

    @property
    def shareable(self) -> bool:
        """Whether an encoder's answer serves every request that waits for it: an embedding can be read more than once.

        Only a folder keeps it for later requests: ``lease_s``. An encoder's own buffer makes room when it has to.
        """
        return self.uses_folder or self.uses_nixl

    @field_validator("storage_path")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        name = f"`ec.connector: {self.connector}`"
        if self.connector == "ECMooncakeConnector":
            raise ValueError(
                f"{name} cannot be used: its encoder sends an embedding to the consumer that the encode call names, and "
                "here items are encoded before a prefill replica is chosen. ECCPUConnector moves embeddings between nodes"
            )
        if self.connector not in EC_EXTRA_KEYS:
            if self.module_path is None:
                raise ValueError(f"{name} is none of {', '.join(EC_EXTRA_KEYS)}: name its `ec.module_path`")
            return self
        if self.module_path is not None:
            raise ValueError(f"`ec.module_path` has no effect with {name}, which is known without it")
        if self.storage_path is not None and not self.uses_folder:
            raise ValueError(f"`ec.storage_path` has no effect with {name}")
        used = {"ECCPUConnector": {"max_bytes"}, "ECExampleConnector": set()}.get(self.connector, self.bounds.keys())
        for key in self.bounds:
            if key in self.model_fields_set and key not in used:
                raise ValueError(f"`ec.{key}` has no effect with {name}")
        for key in self.extra_config:
            if self.uses_nixl and key in EC_OWN_KEYS:
                raise ValueError(f"`ec.extra_config.{key}` is {EC_OWN_KEYS[key]}")
            if key not in EC_EXTRA_KEYS[self.connector]:
                known = ", ".join(sorted(EC_EXTRA_KEYS[self.connector]))
                raise ValueError(f"`ec.extra_config.{key}` is not known to {name}, which knows {known}")
        if self.lease_s > self.max_age_s:
            raise ValueError(f"`ec.lease_s: {self.lease_s:g}` is longer than `ec.max_age_s: {self.max_age_s:g}`")
        return self


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
    timeout_s: float = Field(30.0, gt=0, description="Time for one attempt.")
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


class AdmissionConfig(Strict):
    """What one ingress replica has under way at most; above that it answers 503 with Retry-After at once."""

    max_requests: int = Field(1024, ge=1, description="Requests under way; a choice more does not count.")
    max_items: int = Field(2048, ge=1, description="Media items of requests under way.")
    max_media_bytes: int = Field(
        4 << 30,
        ge=1,
        description="Bytes of their media, and of its tensors where those are made at the ingress. Media that is being "
        "fetched counts by itself, up to as much.",
    )
    max_embed_bytes: int = Field(4 << 30, ge=1, description="Bytes of the embeddings of requests under way.")


class RetryConfig(Strict):
    """How often a request is tried again before its first token."""

    attempts: int = Field(3, ge=1, description="Times that a choice is prefilled and decoded at most. 1: no retry.")
    ratio: float = Field(0.2, ge=0, description="Retries per request that all requests of an ingress replica may use.")
    floor_per_s: float = Field(3.0, ge=0, description="Retries per second that are always there.")
    backoff_s: float = Field(0.05, ge=0, description="Longest wait before the first retry; doubles, with jitter.")


class KVConfig(Strict):
    """How KV blocks move from prefill to decode."""

    connector: str = Field(
        "NixlConnector", description="NixlConnector (pull), NixlPushConnector, or another of vLLM's."
    )
    buffer_device: Literal["cuda", "cpu", "xpu"] | None = Field(None, description="None: the accelerator's own memory.")
    lease_s: int = Field(30, ge=6, description="Seconds that prefill keeps blocks which nobody pulls.")
    min_prompt_tokens: int = Field(
        0, ge=0, description="A shorter prompt is prefilled by decode: its hand-off would cost more than its prefill."
    )
    module_path: str | None = Field(None, description="Python module of a connector that vLLM does not know.")
    extra_config: dict[str, Any] = Field({}, description="`kv_connector_extra_config`, passed on as it is.")

    @property
    def has_leases(self) -> bool:
        """Whether the connector is one of ours, see ``kv_lease.py``."""
        return self.connector.startswith("Nixl") and self.module_path is None


class MetricsConfig(Strict):
    """What is counted besides the page `/metrics`."""

    engines_in_ray: bool = Field(
        True, description="Report vLLM's metrics of every engine through Ray's metrics port too."
    )


class TracingConfig(Strict):
    """Spans of requests, with OpenTelemetry. All that is not here is set by its own environment variables."""

    endpoint: str | None = Field(None, description="OTLP endpoint that spans are sent to. None: no tracing.")


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
    """What a client may send, and from where the ingress fetches it. Limits are per item, whatever its URL."""

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
    fetch_timeout_s: float = Field(30.0, gt=0, description="Time to fetch one item from a URL, redirects included.")
    remember_uuid_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="Bytes of media that an ingress replica remembers under the `uuid` a client gave it. 0: none.",
    )

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


class EPDConfig(Strict):
    """One application: encode → prefill → decode around one model."""

    model: str | None = Field(
        None, description="Model name or folder, or `demo` or `demo-random`. None: chosen by accelerator."
    )
    served_model_name: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Name in the API, or several, of which answers and metrics have the first. None: the model's."
    )
    accelerator: Accelerator = Accelerator.AUTO
    engine_args: EngineArgs = {}
    encoder: StageConfig | None = StageConfig()
    prefill: StageConfig | None = StageConfig()
    decode: StageConfig = StageConfig()
    http: Http = Field(
        Http.REPLICAS,
        description="Who listens where `http_options:` of the Serve config says: each ingress replica, with "
        "`proxy_location: Disabled`, or Ray Serve's `proxy`.",
    )
    ingress_cpus: float | None = Field(None, ge=0, description="CPUs that one ingress replica claims from Ray.")
    ec: ECConfig = ECConfig()
    encode: EncodeConfig = EncodeConfig()
    kv: KVConfig = KVConfig()
    retry: RetryConfig = RetryConfig()
    admission: AdmissionConfig = AdmissionConfig()
    media: MediaConfig = MediaConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    api: dict[str, Any] = Field(
        {}, description="Arguments of vLLM's API server by name: chat_template, tool_call_parser, api_key and so on."
    )
    response_store_bytes: int | None = Field(
        None,
        ge=0,
        description="Bytes of responses that one ingress replica keeps, for `store`, `background` and "
        "`previous_response_id` of `/v1/responses`; least recently used go first. 0: none are kept. None: 256 MiB where "
        "`VLLM_ENABLE_RESPONSES_API_STORE=1` is in its environment, else none.",
    )
    page: bool = Field(True, description="Serve a page at `/` to try the model on and to watch the stages.")
    request_timeout_s: float = Field(
        600.0, gt=0, description="A request without a first token by then is answered 504."
    )
    chunk_interval_s: float = Field(
        0.02,
        ge=0,
        description="Tokens of an answer that come within this time go on together; the first and the last at once.",
    )
    startup_timeout_s: float = Field(
        3600.0,
        gt=0,
        description="Time for all stages to load before the start-up fails, and for a replica to start in.",
    )
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="An engine without a sign of life for so long is taken to hang: its replica is replaced.",
    )
    drain_timeout_s: float = Field(
        300.0, gt=0, description="Time for a replica that goes away to finish what it holds; then it is killed."
    )
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        description="Time for which an ingress replica that goes away still takes requests, while `/-/healthz` already says "
        "503 to load balancers (`http: replicas`).",
    )

    @property
    def stages(self) -> dict[Stage, StageConfig]:
        """The stages of this topology, in the order of the data."""
        every = {Stage.ENCODER: self.encoder, Stage.PREFILL: self.prefill, Stage.DECODE: self.decode}
        return {stage: config for stage, config in every.items() if config is not None}

    @property
    def topology(self) -> str:
        """E+P+D, E+PD, P+D or PD, as in the literature; PD is one engine that does everything."""
        return ("E+" if self.encoder else "") + ("P+D" if self.prefill else "PD")

    @property
    def model_names(self) -> list[str]:
        """Names in the API."""
        names = self.served_model_name or self.model or DEMO_MODEL
        return [names] if isinstance(names, str) else names

    @property
    def model_name(self) -> str:
        """The name in the API that answers have."""
        return self.model_names[0]

    @field_validator("decode", mode="before")
    @classmethod
    def _decode_is_there(cls, decode: Any) -> Any:
        if decode is None:
            raise ValueError("every topology has a decode stage: leave out `prefill:` to let it prefill too")
        return decode

    @field_validator("engine_args")
    @classmethod
    def _no_own_keys(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key in args:
            if key in OWN_KEYS:
                raise ValueError(f"`{key}` is set by {OWN_KEYS[key]}")
            if key in PARALLEL_SIZES:
                raise ValueError(f"`{key}` is each stage's own: put it under `engine_args:` of the stages that need it")
        return args

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.encoder is None and "ec" in self.model_fields_set:
            raise ValueError(
                "`ec:` has no effect without an encoder stage: leave it out, or do not set `encoder: null`"
            )
        if self.encoder is None and "encode" in self.model_fields_set:
            raise ValueError("`encode:` has no effect without an encoder stage: leave it out")
        if self.prefill is None and "kv" in self.model_fields_set:
            raise ValueError("`kv:` has no effect without a prefill stage: leave it out, or do not set `prefill: null`")
        if self.encoder is not None:
            self._encoder_can_do(self.engine_args | self.encoder.engine_args)
        if self.encoder is not None and self.ec.uses_nixl:
            self._nixl_embeddings_fit()
        for stage, config in self.stages.items():
            args = self.engine_args | config.engine_args
            if args.get("enforce_eager") and (args.get("compilation_config") or {}).get("cudagraph_mm_encoder"):
                raise ValueError(
                    f"`cudagraph_mm_encoder` has no effect in an engine of {stage} with `enforce_eager: true`: leave one out"
                )
            statistics = not args.get("disable_log_stats")
            if self.tracing.endpoint is not None and not statistics:
                raise ValueError(
                    f"`disable_log_stats` in the engine arguments of {stage}: vLLM makes its spans (`tracing.endpoint`) of "
                    "the statistics that it turns off"
                )
            key = f"{stage}.engine_args" if "gpu_memory_utilization" in config.engine_args else "engine_args"
            share = args.get("gpu_memory_utilization")
            fraction = config.gpus_per_replica
            if share is not None and fraction is not None and 0 < fraction < 1 and share > fraction:
                raise ValueError(
                    f"`{key}.gpu_memory_utilization: {share}` is more than the share of the card that "
                    f"`{stage}.gpus_per_replica: {fraction}` claims: the other stages on that card would not fit"
                )
        return self

    def _encoder_can_do(self, args: Mapping[str, Any]) -> None:
        if args.get("data_parallel_size", 1) != 1:
            raise ValueError(
                "`data_parallel_size` of the encoder: all its ranks would listen on one port, and vLLM takes one rank only "
                "where the model has experts. Use more replicas, `num_replicas` of `Encoder`; for one engine on several "
                "cards `tensor_parallel_size`, with `mm_encoder_tp_mode: data`"
            )
        # vLLM would prepare items on the card. The fields that size their placeholders may then be tensors there, which an
        # ingress without a card cannot read, and the replica gets a CUDA context outside its engine's share. None of it
        # has run. It can go when ``ItemProcessor.without_pixels`` moves them to the CPU and a card has shown the gain.
        if args.get("mm_tensor_ipc") == "torch_shm" and args.get("mm_processor_device") != "cpu":
            raise ValueError(
                "`mm_tensor_ipc: torch_shm` has vLLM prepare an encoder's items on its card, and an ingress without one may "
                "not be able to read its answers: leave it out, or set `mm_processor_device: cpu` with it. More replicas "
                "prepare more: `gpus_per_replica: 0.5` puts two encoders on a card"
            )

    def _nixl_embeddings_fit(self) -> None:
        if self.accelerator is Accelerator.CPU:
            raise ValueError(
                "`ec.connector: ECCPUConnector` needs a GPU (Triton): use SharedFolderECConnector on the CPU"
            )
        for stage, config in self.stages.items():
            if config.env.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "1":
                raise ValueError(
                    f"`{stage}.env.VLLM_USE_V2_MODEL_RUNNER`: `ec.connector: ECCPUConnector` needs vLLM's second model "
                    "runner (1, which is set where you leave it out)"
                )
