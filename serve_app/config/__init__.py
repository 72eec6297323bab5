"""The configuration of one application, which stands under ``args:`` in ``serve_config.yaml``.

Replica counts and ``autoscaling_config`` are Ray Serve's own and stand under ``deployments:``. All keys are checked when the
application is built, so a mistake is a sentence at start-up. docs/configuration.md says what each key means.
"""

from serve_app.config.advanced import AdvancedConfig, EncodeConfig, MediaLimits, QueueConfig, RetryConfig
from serve_app.config.app import BUILT_IN_MODELS, DEMO_MODEL, GPU_MODEL, Accelerator, EPDConfig, Http
from serve_app.config.handoff import EC_EXTRA_KEYS, EC_OWN_KEYS, ECConfig, KVConfig
from serve_app.config.moved import MOVED
from serve_app.config.parts import AdmissionConfig, MediaConfig, Timeouts, TracingConfig
from serve_app.config.stages import (
    OWN_KEYS,
    PARALLEL_SIZES,
    ROLE_ARGS,
    SHARED_ARGS,
    SIDE_CHANNEL_ENV,
    StageConfig,
    captures_encoder,
)
