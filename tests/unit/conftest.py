"""What several unit tests build once: the configuration of the demo model as an ingress has it. No engine is started."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EPDConfig, Stage
from serve_app.placement import Cluster, resolve


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve_app.demo import ensure_demo_model

    return ensure_demo_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def demo_vllm_config(demo_folder: Path) -> Any:
    """vLLM's configuration of an ingress in front of the demo model."""
    from serve_app.openai_app import ingress_vllm_config
    from serve_app.roles import ingress_args

    return ingress_vllm_config(ingress_args(resolve(EPDConfig(), Cluster(0, 2)).config, str(demo_folder)))


@pytest.fixture(scope="session")
def decode_vllm_config(demo_vllm_config: Any) -> Any:
    """vLLM's configuration of a decode engine, as far as its metrics need it."""
    from vllm.config import ECTransferConfig, KVTransferConfig

    from serve_app.transfer import ec_transfer_config, kv_transfer_config

    epd = EPDConfig(accelerator="cpu")
    config = copy.copy(demo_vllm_config)
    config.ec_transfer_config = ECTransferConfig(**ec_transfer_config(epd, Stage.DECODE))
    config.kv_transfer_config = KVTransferConfig(**kv_transfer_config(epd, Stage.DECODE))
    return config


@pytest.fixture
def make_client(demo_vllm_config: Any) -> Callable[..., Any]:
    """Make an ``EPDClient`` in front of the stages that are passed."""
    from serve_app.client import EPDClient

    def make(stages: Mapping[Stage, Any], **config: Any) -> EPDClient:
        return EPDClient(resolve(EPDConfig(**config), Cluster(0, 2)).config, demo_vllm_config, stages)

    return make
