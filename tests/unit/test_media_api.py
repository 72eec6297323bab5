"""The guard where clients meet it: vLLM's app as an ingress has it, with no stage behind; none is reached."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from serve_app.config import EPDConfig, Stage
from serve_app.from_media import ItemProcessor
from serve_app.media_fetch import Fetcher
from serve_app.openai_app import make_app, server_args
from serve_app.placement import Cluster, resolve
from serve_app.roles import ingress_args
from tests.fakes import FakeStage
from tests.integration.media import data_url, video_url
from tests.unit.test_media import SDP, process, red  # noqa: F401  (fixtures)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Fetcher]:
    """Fetchers that have been closed."""
    seen: list[Fetcher] = []

    async def close(self: Fetcher) -> None:
        seen.append(self)

    monkeypatch.setattr(Fetcher, "close", close)
    return seen


@pytest.fixture
def api(
    make_client: Callable[..., Any], demo_folder: Path, tmp_path: Path, closed: list[Fetcher]
) -> Iterator[TestClient]:
    rules = {"allowed_local_path": str(tmp_path), "max_pixels": 10_000, "max_seconds": 1.0, "max_bytes": 100_000}
    config = resolve(EPDConfig(media=rules), Cluster(0, 2)).config
    encoder = FakeStage(Stage.ENCODER, encode_media=lambda request: items.features(request.media))
    client = make_client({stage: FakeStage(stage) for stage in Stage} | {Stage.ENCODER: encoder}, media=rules)
    items = ItemProcessor(client.renderer, config.media)  # what an encoder does first

    async def probe() -> dict[str, str]:
        return {}

    app = asyncio.run(make_app(config, server_args(config, ingress_args(config, str(demo_folder))), client, probe))
    with TestClient(app, raise_server_exceptions=False) as http:
        yield http
    assert len(closed) == 1
    assert MEDIA_CONNECTOR_REGISTRY.name2class[envs.VLLM_MEDIA_CONNECTOR].args[1] is closed[0]


def test_whatever_is_wrong_with_media_is_a_400_with_openais_error(api: TestClient, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save(tmp_path / "large.png")
    (tmp_path / "out.png").symlink_to("/etc/passwd")
    image = {
        "http://127.0.0.1:1/a.png": "open to this server",
        "http://169.254.169.254/latest/meta-data/": "open to this server",
        "http://[::ffff:10.0.0.1]/a.png": "open to this server",
        "http://0x7f.1/a.png": "open to this server",
        "http://user:secret@8.8.8.8/a.png": "user name or password",
        "http://example.org:99999/": "no valid URL",
        "gopher://127.0.0.1/x": "must begin with",
        "file:///etc/passwd": "not in the folder",
        f"file://{tmp_path}/out.png": "not in the folder",
        f"file://{tmp_path}/gone.png": "no such file",
        f"file://{tmp_path}/large.png": "too many pixels",
        "data:image/png;base64,@@@@": "base64",
        "data:image/png;base64,AAAA": "no known format",
        "data:image/png;base64," + "A" * 200_000: "larger than the 100000 bytes",
    }
    video = {video_url(1): "2.0 s", data_url("video/mp4", SDP): "playlist", "data:video/mp4;base64,AAAA": ""}
    for kind, cases in (("image_url", image), ("video_url", video)):
        for url, words in cases.items():
            content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "?"}]
            answer = api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, 400), (url[:80], error)
            assert words in error["message"], (url[:80], error)
            assert "secret" not in error["message"]
