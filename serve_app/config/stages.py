"""One engine stage: its engine's arguments, what a replica of it claims, and where it runs."""

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from serve_app.config.parts import Strict
from serve_app.stage import Stage

SIDE_CHANNEL_ENV = frozenset(f"VLLM_{kind}_SIDE_CHANNEL_{part}" for kind in ("NIXL", "EC") for part in ("HOST", "PORT"))
"""A replica's own addresses, which it sets itself (see ``transfer.side_channel_env``)."""

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
        "runner",
        "convert",
        "pooler_config",
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


def _refuse(args: dict[str, Any], *, elsewhere: Collection[str], why: str) -> dict[str, Any]:
    for key in args:
        if key in OWN_KEYS:
            raise ValueError(f"`{key}` is set by {OWN_KEYS[key]}")
        if key in elsewhere:
            raise ValueError(f"`{key}` {why}")
    return args


_FOR_ALL = "must be equal on all stages: put it under the top-level `engine_args:`, not under one stage"
_FOR_ONE = "is each stage's own: put it under `engine_args:` of the stages that need it"
StageArgs = Annotated[dict[str, Any], AfterValidator(partial(_refuse, elsewhere=SHARED_ARGS, why=_FOR_ALL))]
SharedArgs = Annotated[dict[str, Any], AfterValidator(partial(_refuse, elsewhere=PARALLEL_SIZES, why=_FOR_ONE))]
"""Engine arguments that may stand under one stage, and those that may stand under the top-level ``engine_args:``."""


class StageConfig(Strict):
    """One engine stage. Its replicas and autoscaling stand under ``deployments:``."""

    engine_args: StageArgs = Field({})
    gpus_per_replica: float | None = Field(None, ge=0)
    cpus_per_replica: float | None = Field(None, ge=0)
    resources: dict[str, float] = Field({})
    label_selector: dict[str, str] = Field({})
    devices: str | None = None
    env: dict[str, str] = Field({})

    @property
    def world_size(self) -> int:
        """Cards of one engine."""
        return math.prod(int(self.engine_args.get(size, 1)) for size in PARALLEL_SIZES)

    @property
    def card_share(self) -> float | None:
        """The part of one card that a replica claims; None: it claims whole ones, or none."""
        claimed = self.gpus_per_replica or 0.0
        return claimed if 0 < claimed < 1 else None

    @field_validator("env")
    @classmethod
    def _no_addresses(cls, env: dict[str, str]) -> dict[str, str]:
        for key in SIDE_CHANNEL_ENV & env.keys():
            raise ValueError(f"`{key}` is set by each replica: its node's address and a port that is free there")
        return env

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


def check_engine(stage: Stage, config: StageConfig, shared: Mapping[str, Any], traced: bool) -> None:
    """Refuse engine arguments that do not fit each other, or the rest of the configuration."""
    args = {**shared, **config.engine_args}
    if args.get("enforce_eager") and captures_encoder(args):
        raise ValueError(
            f"`cudagraph_mm_encoder` has no effect in an engine of {stage} with `enforce_eager: true`: leave one out"
        )
    if traced and args.get("disable_log_stats"):
        raise ValueError(
            f"`disable_log_stats` in the engine arguments of {stage}: vLLM makes its spans (`tracing.endpoint`) of "
            "the statistics that it turns off"
        )
    wanted = args.get("gpu_memory_utilization")
    if wanted is not None and config.card_share is not None and wanted > config.card_share:
        key = f"{stage}.engine_args" if "gpu_memory_utilization" in config.engine_args else "engine_args"
        raise ValueError(
            f"`{key}.gpu_memory_utilization: {wanted}` is more than the share of the card that "
            f"`{stage}.gpus_per_replica: {config.card_share}` claims: the other stages on that card would not fit"
        )
    if stage is Stage.ENCODER:
        check_encoder(args)


def check_encoder(args: Mapping[str, Any]) -> None:
    """Refuse engine arguments that an encoder-only engine cannot have."""
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


def captures_encoder(args: Mapping[str, Any]) -> bool:
    """Whether the encoder's CUDA graphs are asked for; there are none in an eager engine, as ours are by default."""
    compilation = args.get("compilation_config")
    return isinstance(compilation, Mapping) and bool(compilation.get("cudagraph_mm_encoder"))
