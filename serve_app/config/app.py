"""The whole of ``args:``, and the checks that take more than one part of it."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from serve_app.config.advanced import AdvancedConfig, QueueConfig
from serve_app.config.base import Strict
from serve_app.config.engine_args import EngineArgs, check_shared
from serve_app.config.handoff import ECConfig, KVConfig, check_ec
from serve_app.config.media import MediaConfig
from serve_app.config.moved import moved_keys
from serve_app.config.stages import StageConfig, check_engine
from serve_app.config.timeouts import Timeouts
from serve_app.stage import Stage

DEMO_MODEL = "demo"
BUILT_IN_MODELS = (DEMO_MODEL, "demo-random")
"""Tiny models that need no download (see ``serve_app.demo``): one that sees, one of random weights for tests and load."""

GPU_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
"""Model when none is named and the cluster has GPUs: the reference's default."""

KEYS_OF = {
    Stage.ENCODER: ("ec", "advanced.ec", "advanced.encode", "advanced.encoder", "timeouts.encode_s"),
    Stage.PREFILL: ("kv", "advanced.kv", "advanced.prefill"),
}
"""Keys that have no effect without a stage."""


class Accelerator(StrEnum):
    AUTO = "auto"
    CUDA = "cuda"
    XPU = "xpu"
    CPU = "cpu"


class Http(StrEnum):
    REPLICAS = "replicas"
    PROXY = "proxy"


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


class MetricsConfig(Strict):
    """What is counted besides the page `/metrics`."""

    engines_in_ray: bool = Field(
        True, description="Report vLLM's metrics of every engine through Ray's metrics port too."
    )


class TracingConfig(Strict):
    """Spans of requests, with OpenTelemetry. All that is not here is set by its own environment variables."""

    endpoint: str | None = Field(None, description="OTLP endpoint that spans are sent to. None: no tracing.")


class EPDConfig(Strict):
    """One application: encode → prefill → decode around one model."""

    model: str | None = Field(
        None, description="Model name or folder, or `demo` or `demo-random`. None: chosen by accelerator."
    )
    served_model_name: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Name in the API, or several, of which answers and metrics have the first. None: the model's."
    )
    accelerator: Accelerator = Accelerator.AUTO
    engine_args: EngineArgs = Field({})
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
    kv: KVConfig = KVConfig()
    admission: AdmissionConfig = AdmissionConfig()
    media: MediaConfig = MediaConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    api: dict[str, Any] = Field(
        {}, description="Arguments of vLLM's API server by name: chat_template, tool_call_parser, api_key and so on."
    )
    page: bool = Field(True, description="Serve a page at `/` to try the model on and to watch the stages.")
    timeouts: Timeouts = Timeouts()
    advanced: AdvancedConfig = AdvancedConfig()

    @property
    def stages(self) -> dict[Stage, StageConfig]:
        """The stages of this topology, in the order of the data."""
        every = {Stage.ENCODER: self.encoder, Stage.PREFILL: self.prefill, Stage.DECODE: self.decode}
        return {stage: config for stage, config in every.items() if config is not None}

    @property
    def queues(self) -> dict[Stage, QueueConfig]:
        """Of every stage, whether this topology has it or not."""
        return {
            Stage.ENCODER: self.advanced.encoder,
            Stage.PREFILL: self.advanced.prefill,
            Stage.DECODE: self.advanced.decode,
        }

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

    @property
    def kv_has_leases(self) -> bool:
        """Whether the KV connector is one of ours, see ``kv_lease.py``."""
        return self.kv.connector.startswith("Nixl") and self.advanced.kv.module_path is None

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, args: Any) -> Any:
        if isinstance(args, dict) and (moved := list(moved_keys(args))):
            raise ValueError("; ".join(moved))
        return args

    @field_validator("decode", mode="before")
    @classmethod
    def _decode_is_there(cls, decode: Any) -> Any:
        if decode is None:
            raise ValueError("every topology has a decode stage: leave out `prefill:` to let it prefill too")
        return decode

    @field_validator("engine_args")
    @classmethod
    def _no_own_keys(cls, args: dict[str, Any]) -> dict[str, Any]:
        return check_shared(args)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for stage, keys in KEYS_OF.items():
            if stage not in self.stages and (given := self._given(keys)):
                raise ValueError(
                    f"`{given[0]}` has no effect without the stage `{stage}`: leave it out, or do not set `{stage}: null`"
                )
        check_ec(self.ec, self.advanced.ec)
        for stage, config in self.stages.items():
            check_engine(stage, config, self.engine_args, self.tracing.endpoint is not None)
        if self.encoder is not None and self.ec.uses_nixl:
            self._nixl_embeddings_fit()
        return self

    def _given(self, keys: tuple[str, ...]) -> list[str]:
        """Those of the keys that are set."""
        parts = [(key, *key.rpartition(".")) for key in keys]
        return [
            key for key, group, _, name in parts if name in (getattr(self, group) if group else self).model_fields_set
        ]

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
