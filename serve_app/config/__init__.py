"""The configuration of one application: what stands under ``args:`` in ``serve_config.yaml``.

Replica counts and ``autoscaling_config`` are Ray Serve's own and stand under ``deployments:``. Everything here is checked
when the application is built, so a mistake is a sentence at start-up and not a failing replica ten minutes later.

``app.py`` is the whole of it; the parts that many set are in ``stages.py``, ``handoff.py`` and ``media.py``, time limits in
``timeouts.py``, and what few need in ``advanced.py``.
"""

from serve_app.config.advanced import (
    AdvancedConfig,
    AdvancedEC,
    AdvancedKV,
    AnswersConfig,
    EncodeConfig,
    MediaLimits,
    QueueConfig,
    RetryConfig,
)
from serve_app.config.app import (
    BUILT_IN_MODELS,
    DEMO_MODEL,
    GPU_MODEL,
    Accelerator,
    AdmissionConfig,
    EPDConfig,
    Http,
    MetricsConfig,
    TracingConfig,
)
from serve_app.config.engine_args import OWN_KEYS, PARALLEL_SIZES, ROLE_ARGS, SHARED_ARGS, captures_encoder
from serve_app.config.handoff import EC_EXTRA_KEYS, EC_OWN_KEYS, ECConfig, KVConfig
from serve_app.config.media import ItemLimit, MediaConfig
from serve_app.config.moved import MOVED
from serve_app.config.stages import SIDE_CHANNEL_ENV, StageConfig
from serve_app.config.timeouts import Timeouts

__all__ = [
    "BUILT_IN_MODELS",
    "DEMO_MODEL",
    "EC_EXTRA_KEYS",
    "EC_OWN_KEYS",
    "GPU_MODEL",
    "MOVED",
    "OWN_KEYS",
    "PARALLEL_SIZES",
    "ROLE_ARGS",
    "SHARED_ARGS",
    "SIDE_CHANNEL_ENV",
    "Accelerator",
    "AdmissionConfig",
    "AdvancedConfig",
    "AdvancedEC",
    "AdvancedKV",
    "AnswersConfig",
    "ECConfig",
    "EPDConfig",
    "EncodeConfig",
    "Http",
    "ItemLimit",
    "KVConfig",
    "MediaConfig",
    "MediaLimits",
    "MetricsConfig",
    "QueueConfig",
    "RetryConfig",
    "StageConfig",
    "Timeouts",
    "TracingConfig",
    "captures_encoder",
]
