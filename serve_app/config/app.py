"""The whole of ``args:``, and the checks that take more than one part of it."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from serve_app.config.advanced import AdvancedConfig, QueueConfig
from serve_app.config.handoff import ECConfig, KVConfig, check_ec
from serve_app.config.moved import moved_keys
from serve_app.config.parts import (
    AdmissionConfig,
    MediaConfig,
    MetricsConfig,
    RoutingConfig,
    Strict,
    Timeouts,
    TracingConfig,
)
from serve_app.config.stages import SharedArgs, StageConfig, check_engine
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


class EPDConfig(Strict):
    """One application: encode → prefill → decode around one model."""

    model: str | None = None
    served_model_name: str | Annotated[list[str], Field(min_length=1)] | None = None
    accelerator: Accelerator = Accelerator.AUTO
    engine_args: SharedArgs = Field({})
    encoder: StageConfig | None = StageConfig()
    prefill: StageConfig | None = StageConfig()
    decode: StageConfig = StageConfig()
    http: Http = Http.REPLICAS
    ingress_cpus: float | None = Field(None, ge=0)
    ec: ECConfig = ECConfig()
    kv: KVConfig = KVConfig()
    routing: RoutingConfig = RoutingConfig()
    admission: AdmissionConfig = AdmissionConfig()
    media: MediaConfig = MediaConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    api: dict[str, Any] = Field({})
    page: bool = True
    timeouts: Timeouts = Timeouts()
    advanced: AdvancedConfig = AdvancedConfig()

    @property
    def stages(self) -> dict[Stage, StageConfig]:
        """The stages of this topology, in the order of the data."""
        return {stage: config for stage in Stage if (config := getattr(self, stage)) is not None}

    @property
    def queues(self) -> dict[Stage, QueueConfig]:
        """The queue of every stage, whether this topology has it or not."""
        return {stage: getattr(self.advanced, stage) for stage in Stage}

    @property
    def topology(self) -> str:
        """E+P+D, E+PD, P+D or PD, as in the literature; PD is one engine that does everything. Or E+pool or pool."""
        answers = "pool" if self.pools else "P+D" if self.prefill else "PD"
        return ("E+" if self.encoder else "") + answers

    @property
    def pools(self) -> bool:
        """Whether decode's engine answers with vectors or scores of prompts, and decodes nothing."""
        return self.engine_args.get("runner") == "pooling"

    @property
    def model_names(self) -> list[str]:
        """Names in the API."""
        names = self.served_model_name or self.model or DEMO_MODEL
        return [names] if isinstance(names, str) else names

    @property
    def model_name(self) -> str:
        """Name in the API that answers have."""
        return self.model_names[0]

    @property
    def prefilling(self) -> Stage:
        """The stage that prefills, unless another has to."""
        return Stage.DECODE if self.prefill is None else Stage.PREFILL

    @property
    def caches_prefixes(self) -> bool:
        """Whether the stage that prefills may cache prefixes. vLLM does so unless told otherwise, for most models."""
        own = self.stages[self.prefilling].engine_args
        return bool(own.get("enable_prefix_caching", self.engine_args.get("enable_prefix_caching", True)))

    @property
    def kv_has_leases(self) -> bool:
        """Whether the KV connector is one of ours, which have leases (``transfer.kv_lease``)."""
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

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for stage, keys in KEYS_OF.items():
            if stage not in self.stages and (given := self._given(keys)):
                raise ValueError(
                    f"`{given[0]}` has no effect without the stage `{stage}`: leave it out, or do not set `{stage}: null`"
                )
        if self.pools and self.prefill is not None:
            raise ValueError("`engine_args.runner: pooling` has no stage to prefill for: set `prefill: null`")
        if self.pools and self.engine_args.get("enable_lora"):
            raise ValueError(
                "`enable_lora` with `engine_args.runner: pooling`: vLLM 0.32.0 pools wrongly where requests of several "
                "adapters share a batch. Merge the adapter into the model"
            )
        if not self.caches_prefixes and self.routing.prefix and "prefix" in self.routing.model_fields_set:
            raise ValueError(
                f"`routing.prefix: true` has no effect while `{self.prefilling}` has `enable_prefix_caching: false`"
            )
        check_ec(self.ec, self.advanced.ec)
        for stage, config in self.stages.items():
            check_engine(stage, config, self.engine_args, self.tracing.endpoint is not None)
        if self.encoder is not None and self.ec.uses_nixl:
            self._nixl_embeddings_fit()
        return self

    def _given(self, keys: tuple[str, ...]) -> list[str]:
        """The keys that are set."""
        parts = [(key, *key.rpartition(".")) for key in keys]
        return [
            key for key, group, _, name in parts if name in (getattr(self, group) if group else self).model_fields_set
        ]

    def _nixl_embeddings_fit(self) -> None:
        if self.pools:
            raise ValueError(
                "`ec.connector: ECCPUConnector` (the default on GPUs of several nodes) cannot feed a pooling engine, whose "
                "requests vLLM gives no `ec_transfer_params`: use SharedFolderECConnector, with an `ec.storage_path` that "
                "all nodes share"
            )
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
