"""What several kinds of tests share: the answers of one plain engine, and the demo model's configuration and client as an
ingress has them, for which no engine is started.
"""

import asyncio
import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EPDConfig, MediaLimits
from serve_app.handoff.types import EncodeReply, MediaRequest
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage
from tests.fakes import FakeStage, fake_status
from tools.harness.answers import events, gather, reduce
from tools.harness.cases import CASES, LIKE, MANY, STREAMED, one_of_many
from tools.harness.servers import REPOSITORY, Server, vllm_server

if not Path("/dev/nvidiactl").exists() and os.environ.get("EPD_FAKED_CARDS") != "1":
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # without a card vLLM's GPU build has no device at all

MEDIA_RULES = {"allowed_local_path": str(REPOSITORY / "examples"), "limits": {"image": 6, "video": 2}}


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of one engine by case name; ``<name>/stream`` for streams and ``many/<i>`` for one of many."""
    answers: dict[str, Any] = {}
    with vllm_server(tmp_path_factory.mktemp("baseline"), {"media": MEDIA_RULES}) as server:
        for name, (path, body) in (CASES | {name: like for name, (_, like) in LIKE.items()}).items():
            response = server.post(path, body)
            assert response.status_code == 200, f"{name}: {response.text}"
            answers[name] = reduce(response.json())
        for name in STREAMED:
            answers[f"{name}/stream"] = stream(server, name)
        for index in range(MANY):
            answers[f"many/{index}"] = reduce(server.post(*one_of_many(index)).json())
    return answers


def stream(server: Server, name: str) -> dict[str, Any]:
    path, body = CASES[name]
    response = server.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    return gather(events(response))


# ---- without an engine


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
def make_parts(demo_vllm_config: Any) -> Callable[..., Any]:
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

    from serve_app.ingress.server import make_app, server_args
    from serve_app.launch.engine_args import ingress_args

    with ExitStack() as stack:

        def make(stages: Mapping[Stage, Any], **config: Any) -> TestClient:
            resolved = resolve(EPDConfig(**config), Cluster(0, 2)).config
            args = server_args(resolved, ingress_args(resolved, str(demo_folder)))
            app = asyncio.run(make_app(resolved, args, make_parts(stages, **config), fake_status(stages)))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make
