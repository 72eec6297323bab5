"""Engine arguments and environment of each stage, as pure functions of the config.

Order of precedence: the topology, the stage's own ``engine_args:``, the shared ``engine_args:``, defaults of the role,
defaults of the device.
"""

from collections.abc import Mapping
from typing import Any

from serve_app.config import BUILT_IN_MODELS, Accelerator, EPDConfig, captures_encoder
from serve_app.hooks.vllm_plugin import STILL_NIXL_ENV
from serve_app.launch import card_memory
from serve_app.launch.card_memory import share_of
from serve_app.launch.connectors import ec_transfer_config, kv_transfer_config
from serve_app.stage import Stage

ENCODER_DEFAULTS: dict[str, Any] = {
    # vLLM's encoder-only engine asks for these two (reference).
    "enforce_eager": True,
    "enable_prefix_caching": False,
    # Size of a vision batch, the encoder cache and a buffer. vLLM raises the first two to the largest item, and chunks
    # longer prompts. The reference's 114688 take 12.6 GiB of activations with Qwen2.5-VL.
    "max_num_batched_tokens": 16384,
}

CPU_DEFAULTS: dict[str, Any] = {
    # torch.compile takes minutes and gains nothing for models of a CPU's size.
    "enforce_eager": True,
    # The worker runs in the engine's process, which saves 1 GB, 10 s of start and a hop per step. vLLM replaces a plain
    # "uni" on the CPU, because it could not set the threads' environment; CPU_ENV has set it here.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}

DEMO_DEFAULTS: dict[str, Any] = {
    # vLLM would use half precision, where batches of other sizes round to other tokens.
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 32,
    "block_size": 32,
    "kv_cache_memory_bytes": 128 * 1024 * 1024,  # 65,536 tokens
}

CPU_ENV = {
    # vLLM would pin every engine's threads to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

ENGINE_ONLY_ARGS = frozenset({"ec_transfer_config", "kv_transfer_config", "profiler_config", "otlp_traces_endpoint"})
"""Arguments for engine processes, of which the ingress has none."""

POOLING_ARGS = frozenset({"runner", "convert", "pooler_config"})

COMMON_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    # A replica has threads before it starts its engine: forking it could copy a held lock.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # vLLM sets it unless NIXL was imported before, as our plugin does on the CPU.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}

CUDA_ENV = {
    # Without NVLink and this, UCX reads no other card's memory and NIXL falls back to TCP, 0.5 GB/s (vllm#52607). Can go
    # with a NIXL that has its PR #2208 (1.5.1 has not). Without a card UCX ignores it.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # UCX prints its transport for KV blocks, one table per peer: `zero-copy | cuda_ipc/cuda`, `software emulation | tcp/…`.
    "UCX_PROTO_INFO": "*remote memory*(multi)*",
}

INGRESS_ENV = {
    # The ingress has no device, and without a card vLLM's GPU build makes no config.
    "VLLM_TARGET_DEVICE": "cpu",
    # Most choices of a request (vLLM: 16384): each is a call of prefill and one of decode, and this many fit their queues.
    "VLLM_MAX_N_SEQUENCES": "1024",
}


def engine_args(config: EPDConfig, stage: Stage, model_path: str, card_gib: float | None = None) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs`` for a stage of a resolved config (accelerator and model known).

    ``card_gib``: memory of the replica's card, for engines on a share of one; None: unknown.
    """
    args: dict[str, Any] = {}
    if config.accelerator is Accelerator.CPU:
        args |= CPU_DEFAULTS
    if config.model in BUILT_IN_MODELS:
        args |= DEMO_DEFAULTS
    if stage is Stage.ENCODER:
        args |= ENCODER_DEFAULTS
    args |= shared_args(config, model_path)
    args |= config.stages[stage].engine_args
    args = {key: value for key, value in args.items() if has_use_for(stage, key, value)}
    if stage is Stage.ENCODER and config.pools and isinstance(overrides := args.get("hf_overrides"), Mapping):
        # A model that scores is named by its head, which an encoder has not.
        args["hf_overrides"] = {key: value for key, value in overrides.items() if key != "architectures"}
    if captures_encoder(args):
        args["enforce_eager"] = False
    if config.stages[stage].world_size > 1 and config.accelerator is Accelerator.CPU:
        args["distributed_executor_backend"] = "mp"
    if (claimed := config.stages[stage].card_share) is not None:
        args.setdefault("gpu_memory_utilization", share_of(stage, claimed, card_gib).utilization)
    # The ingress sends each engine every item of a request once. vLLM's protocol of this cache would send None for an item
    # that it believes cached.
    args["mm_processor_cache_gb"] = 0
    if (ec := ec_transfer_config(config, stage)) is not None:
        args["ec_transfer_config"] = ec
    if (kv := kv_transfer_config(config, stage)) is not None:
        args["kv_transfer_config"] = kv
    if config.tracing.endpoint is not None:
        args["otlp_traces_endpoint"] = config.tracing.endpoint
    return args


def has_use_for(stage: Stage, key: str, value: Any) -> bool:
    """Whether a stage takes an engine argument of all stages. An encoder has no part that adapters change, pools and
    decodes nothing; prefill keeps a draft model, whose KV blocks of the prompt decode takes, but guesses nothing itself."""
    if key == "speculative_config":
        return stage is Stage.DECODE or (stage is Stage.PREFILL and not is_guess(value))
    return stage is not Stage.ENCODER or not ("lora" in key or key in POOLING_ARGS)


def is_guess(speculative_config: Mapping[str, Any]) -> bool:
    """Whether tokens are proposed from the sequence alone, without a model."""
    return str(speculative_config.get("method", "")).strip("[]") in ("ngram", "ngram_gpu", "suffix")


def ingress_args(config: EPDConfig, model_path: str) -> dict[str, Any]:
    """The decode engine's arguments that rendering and validation at the ingress need."""
    args = engine_args(config, Stage.DECODE, model_path)
    return {key: value for key, value in args.items() if key not in ENGINE_ONLY_ARGS}


def shared_args(config: EPDConfig, model_path: str) -> dict[str, Any]:
    media = config.media
    args: dict[str, Any] = {"model": model_path, "served_model_name": config.model_names} | config.engine_args
    if media.limits:
        args["limit_mm_per_prompt"] = {
            modality: limit.count if limit.model_fields_set == {"count"} else limit.model_dump(exclude_none=True)
            for modality, limit in media.limits.items()
        }
    if media.processor_kwargs:
        args["mm_processor_kwargs"] = media.processor_kwargs
    if media.io_kwargs:
        args["media_io_kwargs"] = media.io_kwargs
    if media.allowed_local_path is not None:
        args["allowed_local_media_path"] = str(media.allowed_local_path)
    if media.allowed_domains:
        args["allowed_media_domains"] = media.allowed_domains
    return args


def replica_env(config: EPDConfig, stage: Stage | None, card_gib: float | None = None) -> dict[str, str]:
    """Defaults of a replica's environment; variables that are already set win. ``stage``: None for the ingress."""
    env = COMMON_ENV | (INGRESS_ENV if stage is None else {})
    if config.accelerator is Accelerator.CPU:
        env |= CPU_ENV
        args = engine_args(config, stage, "") if stage is not None else None
        if args is None or args["enforce_eager"]:
            # vLLM compiles small helpers even with enforce_eager: the first request for logprobs would wait 16 s.
            env["TORCHDYNAMO_DISABLE"] = "1"
        if args is not None and "kv_transfer_config" in args:
            env[STILL_NIXL_ENV] = "1"
        if args is not None and "kv_cache_memory_bytes" not in args:
            env["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; the default is most of the machine's memory
    if stage is not None and config.accelerator is Accelerator.CUDA:
        env |= CUDA_ENV
        if (claimed := config.stages[stage].card_share) is not None:
            utilization = engine_args(config, stage, "", card_gib)["gpu_memory_utilization"]
            cap = max(share_of(stage, claimed, card_gib).cap, utilization)
            env[card_memory.ENV] = f"per_process_memory_fraction:{cap}"
    if stage is not None and config.encoder is not None and config.ec.uses_nixl:
        # ECCPUConnector refuses vLLM's first model runner. With this, an engine that cannot have the second one says why.
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if config.model in BUILT_IN_MODELS:
        env["HF_HUB_OFFLINE"] = "1"
    if config.tracing.endpoint is not None:
        env["OTEL_SERVICE_NAME"] = f"epd-{stage or 'ingress'}"
    return env


def model_path(config: EPDConfig) -> str:
    """Folder or name of the model. Makes the folder of a built-in model if it is missing."""
    assert config.model is not None  # resolved
    if config.model in BUILT_IN_MODELS:
        from serve_app.demo import ensure_demo_model

        return str(ensure_demo_model(name=config.model))
    return config.model
