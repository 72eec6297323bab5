"""The dashboard is compared with the metrics of an engine that unit tests configure."""

from tests.unit.conftest import decode_vllm_config, demo_folder, demo_vllm_config  # noqa: F401
