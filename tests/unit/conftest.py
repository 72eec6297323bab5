"""What several unit tests build once: the configuration of the demo model as an ingress has it. No engine is started."""

import asyncio
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EPDConfig, MediaConfig
from serve_app.handoff.types import EncodeReply, MediaRequest
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage
from tests.fakes import FakeStage, fake_status


@pytest.fixture(autouse=True)
def environment_is_read_again() -> Iterator[None]:
    """A ``StageEngine`` has vLLM remember its environment, for good."""
    yield
    if envs := sys.modules.get("vllm.envs"):
        envs.disable_envs_cache()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from serve_app.demo import ensure_demo_model

    return ensure_demo_model(tmp_path_factory.mktemp("models"), "demo-random")


@pytest.fixture(scope="session")
def demo_vllm_config(demo_folder: Path) -> Any:
    """vLLM's configuration of an ingress in front of the demo model."""
    from serve_app.ingress.server import ingress_vllm_config
    from serve_app.launch.engine_args import ingress_args

    return ingress_vllm_config(ingress_args(resolve(EPDConfig(), Cluster(0, 2)).config, str(demo_folder)))


@pytest.fixture(scope="session")
def decode_vllm_config(demo_vllm_config: Any) -> Any:
    """vLLM's configuration of a decode engine, as far as its metrics need it."""
    from vllm.config import ECTransferConfig, KVTransferConfig

    from serve_app.launch.connectors import ec_transfer_config, kv_transfer_config

    epd = EPDConfig(accelerator="cpu")
    config = copy.copy(demo_vllm_config)
    config.ec_transfer_config = ECTransferConfig(**ec_transfer_config(epd, Stage.DECODE))
    config.kv_transfer_config = KVTransferConfig(**kv_transfer_config(epd, Stage.DECODE))
    return config


@pytest.fixture
def make_client(demo_vllm_config: Any) -> Callable[..., Any]:
    """Make an ``EPDClient`` in front of the stages that are passed."""
    from serve_app.ingress.client import EPDClient

    def make(stages: Mapping[Stage, Any], **config: Any) -> EPDClient:
        client = EPDClient(resolve(EPDConfig(**config), Cluster(0, 2)).config, demo_vllm_config, stages)
        if Stage.DECODE in stages and (decodes := stages[Stage.DECODE].decodes) is not None:
            decodes.answers = client.answers
        return client

    return make


@pytest.fixture
def make_encoder(demo_vllm_config: Any) -> Callable[..., Any]:
    """Make an encoder stage that decodes and transforms items for real, by the media rules that are passed."""
    from vllm.renderers import renderer_from_config

    from serve_app.ingress.rendering import ItemProcessor

    def make(**rules: Any) -> FakeStage:
        items = ItemProcessor(renderer_from_config(demo_vllm_config), MediaConfig(**rules))

        async def encode_media(request: MediaRequest) -> EncodeReply:
            features = await items.features(request.media)
            params = {features.item.hash: {"item_indices": [0], "metadata": features.metadata}}
            return EncodeReply(params, "encoder-0", items.without_pixels(features))

        return FakeStage(Stage.ENCODER, encode_media=encode_media)

    return make


@pytest.fixture
def make_api(make_client: Callable[..., Any], demo_folder: Path) -> Iterator[Callable[..., Any]]:
    """Make vLLM's app as an ingress has it, in front of the stages that are passed, and a client of it."""
    from fastapi.testclient import TestClient

    from serve_app.ingress.server import make_app, server_args
    from serve_app.launch.engine_args import ingress_args

    with ExitStack() as stack:

        def make(stages: Mapping[Stage, Any], **config: Any) -> TestClient:
            resolved = resolve(EPDConfig(**config), Cluster(0, 2)).config
            args = server_args(resolved, ingress_args(resolved, str(demo_folder)))
            app = asyncio.run(make_app(resolved, args, make_client(stages, **config), fake_status(stages)))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make
