"""vLLM's engine arguments that are no one's choice: who owns which, and which have to be equal on all stages."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

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

EngineArgs = Annotated[
    dict[str, Any], Field(description="vLLM engine arguments by name, as in `vllm serve --help`, with underscores.")
]


def captures_encoder(args: Mapping[str, Any]) -> bool:
    """Whether the encoder's CUDA graphs are asked for; there are none in an eager engine, as ours are by default."""
    compilation = args.get("compilation_config")
    return isinstance(compilation, Mapping) and bool(compilation.get("cudagraph_mm_encoder"))


def check_shared(args: dict[str, Any]) -> dict[str, Any]:
    """Refuse what may not stand under the top-level ``engine_args:``."""
    for key in args:
        if key in OWN_KEYS:
            raise ValueError(f"`{key}` is set by {OWN_KEYS[key]}")
        if key in PARALLEL_SIZES:
            raise ValueError(f"`{key}` is each stage's own: put it under `engine_args:` of the stages that need it")
    return args


def check_own(args: dict[str, Any]) -> dict[str, Any]:
    """Refuse what may not stand under one stage."""
    for key in args:
        if key in OWN_KEYS:
            raise ValueError(f"`{key}` is set by {OWN_KEYS[key]}")
        if key in SHARED_ARGS:
            raise ValueError(
                f"`{key}` must be equal on all stages: put it under the top-level `engine_args:`, not under one stage"
            )
    return args
