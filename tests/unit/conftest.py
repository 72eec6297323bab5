"""What several unit tests build once: the configuration of the demo model as an ingress has it. No engine is started."""

import asyncio
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config import EPDConfig, MediaLimits
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


@pytest.fixture(scope="session")
def made_once(demo_vllm_config: Any) -> Iterator[None]:
    """What each server derives anew from the same model: tokenizer and processor, hash, test of the chat template."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.renderers import hf

    fingerprint = demo_vllm_config.compute_hash()
    detect = functools.cache(AnthropicServingMessages._detect_merge_inline_system)
    with pytest.MonkeyPatch.context() as patch:
        own = functools.cache(lambda tokenizer: hf.maybe_make_thread_pool(copy.copy(tokenizer), 2))
        patch.setattr(hf, "copy", SimpleNamespace(copy=own))
        patch.setattr(AnthropicServingMessages, "_detect_merge_inline_system", staticmethod(detect))
        patch.setattr(demo_vllm_config, "compute_hash", lambda: fingerprint)
        yield


@pytest.fixture
def make_parts(demo_vllm_config: Any, made_once: None) -> Callable[..., Any]:
    """Make the parts of an ingress in front of the stages that are passed."""
    from serve_app.ingress.assembly import Parts, assemble

    def make(stages: Mapping[Stage, Any], **config: Any) -> Parts:
        parts = assemble(resolve(EPDConfig(**config), Cluster(0, 2)).config, demo_vllm_config, stages)
        if Stage.DECODE in stages and (decodes := stages[Stage.DECODE].decodes) is not None:
            decodes.answers = parts.client.pipeline.answers
        return parts

    return make


@pytest.fixture
def make_client(make_parts: Callable[..., Any]) -> Callable[..., Any]:
    """Make an ``EPDClient`` in front of the stages that are passed."""
    return lambda stages, **config: make_parts(stages, **config).client


@pytest.fixture
def make_encoder(demo_vllm_config: Any) -> Callable[..., Any]:
    """Make an encoder stage that decodes and transforms items for real, by the limits that are passed."""
    from vllm.renderers import renderer_from_config

    from serve_app.media.items import ItemProcessor

    def make(**limits: Any) -> FakeStage:
        items = ItemProcessor(renderer_from_config(demo_vllm_config), MediaLimits(**limits))

        async def encode_media(request: MediaRequest) -> EncodeReply:
            features = await items.features(request.media)
            params = {features.item.hash: {"item_indices": [0], "metadata": features.metadata}}
            return EncodeReply(params, "encoder-0", items.without_pixels(features))

        return FakeStage(Stage.ENCODER, encode_media=encode_media)

    return make


@pytest.fixture
def make_api(make_parts: Callable[..., Any], demo_folder: Path) -> Iterator[Callable[..., Any]]:
    """Make vLLM's app as an ingress has it, in front of the stages that are passed, and a client of it."""
    from fastapi.testclient import TestClient

    from serve_app.ingress.peers import Peers
    from serve_app.ingress.server import make_app, server_args
    from serve_app.launch.engine_args import ingress_args

    with ExitStack() as stack:

        def make(stages: Mapping[Stage, Any], **config: Any) -> TestClient:
            resolved = resolve(EPDConfig(**config), Cluster(0, 2)).config
            args = server_args(resolved, ingress_args(resolved, str(demo_folder)))
            app = asyncio.run(make_app(resolved, args, make_parts(stages, **config), fake_status(stages), Peers()))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make
