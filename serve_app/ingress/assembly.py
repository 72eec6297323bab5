"""The parts of an ingress replica, put together: vLLM's renderer, encoders, pipeline, client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.renderers import renderer_from_config
from vllm.v1.engine.output_processor import OutputProcessor

from serve_app.config import EPDConfig
from serve_app.handoff.types import ANY, Version
from serve_app.ingress.adapters import Adapters
from serve_app.ingress.admission import Admission
from serve_app.ingress.client import EPDClient
from serve_app.ingress.encoding import EncodeStage
from serve_app.ingress.peers import Peers
from serve_app.ingress.pipeline import Pipeline
from serve_app.ingress.rendering import FromMedia
from serve_app.ingress.seams import install_renderer_guard, install_rendering
from serve_app.media.items import ItemProcessor, declared_fields
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.routing.affinity import Affinity
from serve_app.routing.handles import StageHandle
from serve_app.stage import Stage


@dataclass(frozen=True)
class Parts:
    """What one ingress replica is made of. Any request can be served by any."""

    client: EPDClient
    """What vLLM's app takes for its engine."""
    metrics: IngressMetrics
    from_media: frozenset[str]
    """Modalities whose items go to encoders as media."""


def assemble(
    config: EPDConfig,
    vllm_config: VllmConfig,
    stages: Mapping[Stage, StageHandle],
    version: Version = ANY,
    peers: Peers | None = None,
) -> Parts:
    """``version``: of this ingress replica."""
    place_by_prefix(config, vllm_config, stages)
    renderer = renderer_from_config(vllm_config)
    install_renderer_guard(renderer)
    metrics = IngressMetrics()
    model = vllm_config.model_config
    embed_bytes = int(model.get_inputs_embeds_size() * model.dtype.itemsize)
    admission = Admission(config.admission, embed_bytes, metrics.outstanding)
    encoders = encode_stage(config, stages, renderer, version)
    processor = OutputProcessor(
        renderer.tokenizer, log_stats=False, stream_interval=vllm_config.scheduler_config.stream_interval
    )
    pipeline = Pipeline(config, stages, encoders, admission, processor, engines_resume(config, vllm_config))
    from_media: frozenset[str] = frozenset()
    if encoders is not None and config.advanced.encode.from_media:
        items = ItemProcessor(renderer, config.advanced.media)
        encoders.features, from_media = items.features, items.modalities
        install_rendering(renderer, FromMedia(items, pipeline.encode_media, config.ec.salt_by_tenant).render)
    adapters = Adapters(stages, peers or Peers())
    return Parts(EPDClient(config, vllm_config, renderer, pipeline, version, adapters), metrics, from_media)


def encode_stage(
    config: EPDConfig, stages: Mapping[Stage, StageHandle], renderer: Any, version: Version
) -> EncodeStage | None:
    """The encoders, where the topology has any. Answers are only remembered where a folder keeps the embeddings."""
    if Stage.ENCODER not in stages:
        return None
    encode, timeout_s = config.advanced.encode, config.timeouts.encode_s
    if not config.ec.uses_folder:
        encode = encode.model_copy(update={"remember_s": 0})
    declared = declared_fields(renderer)
    stage = EncodeStage(stages[Stage.ENCODER], encode, timeout_s, config.ec.shareable, declared, version=version)
    prefilling = stages.get(config.prefilling)
    stage.leaves_cached = prefilling is not None and prefilling.affinity is not None and config.ec.fails_without
    return stage


SEQUENCE_TOKENS = 256.0
"""What a sequence that decode has prefilled counts for to prompts that come after it, in tokens to prefill."""


def place_by_prefix(config: EPDConfig, vllm_config: VllmConfig, stages: Mapping[Stage, StageHandle]) -> None:
    """Have prompts go to the replica that has their prefix in its cache, if it has one."""
    stage, model = stages.get(config.prefilling), vllm_config.model_config
    if stage is None or not (config.routing.prefix and config.caches_prefixes and model.is_prefix_caching_supported):
        return
    sequence_tokens = SEQUENCE_TOKENS if stage.stage is Stage.DECODE else 0.0
    stage.place_by(Affinity(config.advanced.routing.prefix_blocks, sequence_tokens))


def engines_resume(config: EPDConfig, vllm_config: VllmConfig) -> bool:
    """Whether an engine makes the rest of an answer from its prompt and output tokens alone. Watermarks and the logits
    processors of users may look at the answer by itself, and what pools has no rest."""
    processors = vllm_config.model_config.logits_processors or config.decode.engine_args.get("logits_processors")
    return not (config.pools or vllm_config.watermark_config is not None or processors)
