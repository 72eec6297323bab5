"""The engine arguments that make a stage: DESIGN's table of engine roles as one pure function.

Order of precedence: what the topology decides, the stage's own ``engine_args:``, the shared ``engine_args:``, defaults of
the role, defaults of the device.
"""

from typing import Any

from serve_app.config import BUILT_IN_MODELS, Accelerator, EPDConfig, captures_encoder
from serve_app.hooks.vllm_plugin import STILL_NIXL_ENV
from serve_app.launch import card_memory
from serve_app.launch.card_memory import share_of
from serve_app.launch.connectors import ec_transfer_config, kv_transfer_config
from serve_app.stage import Stage

ENCODER_DEFAULTS: dict[str, Any] = {
    # The current EPD implementation of vLLM's encoder-only engine asks for these two (reference).
    "enforce_eager": True,
    "enable_prefix_caching": False,
    # The size of one vision batch, of the encoder cache and of a buffer. vLLM raises the first two to the largest item by
    # itself, and longer prompts are chunked; the reference's 114688 are 12.6 GiB of activations with Qwen2.5-VL.
    "max_num_batched_tokens": 16384,
}

CPU_DEFAULTS: dict[str, Any] = {
    # torch.compile takes minutes and there is nothing to gain for the sizes one serves on a CPU.
    "enforce_eager": True,
    # The worker in the engine's own process: 1 GB, 10 s of start-up and a hop per step less. vLLM would replace a plain
    # "uni" on the CPU, because it could not set the threads' environment there; here CPU_ENV has set it before.
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}

DEMO_DEFAULTS: dict[str, Any] = {
    # vLLM would make half precision of a float32 model; batches of other sizes would then round to other tokens.
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

CPU_EAGER_ENV = {
    # vLLM compiles small helpers even with enforce_eager: the first request for logprobs would wait 16 s.
    "TORCHDYNAMO_DISABLE": "1",
}

NIXL_EC_ENV = {
    # ECCPUConnector refuses vLLM's first model runner. Said here, an engine that cannot have the second one says why.
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

ENGINE_ONLY_ARGS = frozenset({"ec_transfer_config", "kv_transfer_config", "profiler_config", "otlp_traces_endpoint"})
"""Arguments that mean an engine process, which the ingress has not."""

COMMON_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    # A replica has threads before it starts its engine: forking it could copy a held lock.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # vLLM sets it itself unless NIXL was imported before, as our plugin does on the CPU.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}


CUDA_ENV = {
    # Where cards have no NVLink, UCX reads no other card's memory unless told to, and NIXL falls back to TCP: 0.5 GB/s
    # (vllm#52607). NIXL's PR #2208 says it too, and 1.5.1 is older. Without a card UCX ignores it.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # UCX prints what it takes for KV blocks, one table per peer: `zero-copy | cuda_ipc/cuda`, `software emulation | tcp/…`.
    "UCX_PROTO_INFO": "*remote memory*(multi)*",
}

INGRESS_ENV = {
    # The ingress has no device and needs none. Without a card, vLLM's GPU build would not even make a config.
    "VLLM_TARGET_DEVICE": "cpu",
    # Choices of one request (vLLM: 16384). Each is a call of prefill and one of decode; this many fit into their queues.
    "VLLM_MAX_N_SEQUENCES": "1024",
}


def engine_args(config: EPDConfig, stage: Stage, model_path: str, card_gib: float | None = None) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs`` for a stage of a resolved config (accelerator and model known).

    ``card_gib``: memory of the replica's card; None: unknown. It matters to engines on a share of one.
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
    if captures_encoder(args):
        args["enforce_eager"] = False
    if config.stages[stage].world_size > 1 and config.accelerator is Accelerator.CPU:
        args["distributed_executor_backend"] = "mp"
    if (claimed := config.stages[stage].card_share) is not None:
        args.setdefault("gpu_memory_utilization", share_of(stage, claimed, card_gib).utilization)
    # Each engine gets every item of a request once, from the ingress: a cache here would only wait for repeats that
    # vLLM's protocol between front end and engine does not know (it sends None for items it believes cached).
    args["mm_processor_cache_gb"] = 0
    if (ec := ec_transfer_config(config, stage)) is not None:
        args["ec_transfer_config"] = ec
    if (kv := kv_transfer_config(config, stage)) is not None:
        args["kv_transfer_config"] = kv
    if config.tracing.endpoint is not None:
        args["otlp_traces_endpoint"] = config.tracing.endpoint
    return args


def ingress_args(config: EPDConfig, model_path: str) -> dict[str, Any]:
    """Engine arguments of the ingress: what rendering and validation need of the decode engine's."""
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
    """Defaults of the environment of a replica; what is already set there wins. ``stage``: None for the ingress."""
    env = COMMON_ENV | (INGRESS_ENV if stage is None else {})
    if config.accelerator is Accelerator.CPU:
        env |= CPU_ENV
        args = engine_args(config, stage, "") if stage is not None else None
        if args is None or args["enforce_eager"]:
            env |= CPU_EAGER_ENV
        if args is not None and "kv_transfer_config" in args:
            env[STILL_NIXL_ENV] = "1"
        if args is not None and "kv_cache_memory_bytes" not in args:
            # GiB of KV cache; by itself each engine would take most of the machine's memory.
            env["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if stage is not None and config.accelerator is Accelerator.CUDA:
        env |= CUDA_ENV
        if (claimed := config.stages[stage].card_share) is not None:
            utilization = engine_args(config, stage, "", card_gib)["gpu_memory_utilization"]
            cap = max(share_of(stage, claimed, card_gib).cap, utilization)
            env[card_memory.ENV] = f"per_process_memory_fraction:{cap}"
    if stage is not None and config.encoder is not None and config.ec.uses_nixl:
        env |= NIXL_EC_ENV
    if config.model in BUILT_IN_MODELS:
        env["HF_HUB_OFFLINE"] = "1"
    if config.tracing.endpoint is not None:
        env["OTEL_SERVICE_NAME"] = f"epd-{stage or 'ingress'}"
    return env


def model_path(config: EPDConfig) -> str:
    """Folder or name of the model; makes a built-in one where it is asked for and not there yet."""
    assert config.model is not None  # resolved
    if config.model in BUILT_IN_MODELS:
        from serve_app.demo import ensure_demo_model

        return str(ensure_demo_model(name=config.model))
    return config.model
