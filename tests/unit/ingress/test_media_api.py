"""The guard where clients meet it: vLLM's app as an ingress has it, with no stage behind; none is reached."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from serve_app.media.fetch import Fetcher
from serve_app.stage import Stage
from tests.fakes import FakeStage
from tests.unit.ingress.test_media import SDP, process, red  # noqa: F401  (fixtures)
from tools.harness.media import data_url, video_url


@pytest.fixture
def api(make_api: Callable[..., TestClient], make_encoder: Callable[..., Any], tmp_path: Path) -> TestClient:
    limits = {"max_pixels": 10_000, "max_seconds": 1.0, "max_bytes": 100_000}
    stages = {stage: FakeStage(stage) for stage in Stage} | {Stage.ENCODER: make_encoder(**limits)}
    return make_api(stages, media={"allowed_local_path": str(tmp_path)}, advanced={"media": limits})


def test_fetcher_of_the_connector_is_closed_with_the_app(
    make_api: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Fetcher] = []

    async def close(self: Fetcher) -> None:
        closed.append(self)

    monkeypatch.setattr(Fetcher, "close", close)
    make_api({}).__exit__()
    assert MEDIA_CONNECTOR_REGISTRY.name2class[envs.VLLM_MEDIA_CONNECTOR].args[2] is closed[0]


def test_media_is_fetched_only_as_far_as_there_is_room_and_leaves_it_behind(
    make_api: Callable[..., TestClient], make_encoder: Callable[..., Any], tmp_path: Path
) -> None:
    """Not counted when it is all in memory: a small request can name a large file a thousand times."""
    rules = {"allowed_local_path": str(tmp_path)}
    stages = {stage: FakeStage(stage) for stage in Stage} | {Stage.ENCODER: make_encoder()}
    api = make_api(stages, media=rules, admission={"max_media_bytes": 100_000})
    padded = tmp_path / "padded.png"
    Image.new("RGB", (56, 56)).save(padded)
    with padded.open("ab") as file:
        file.write(bytes(40_000))

    def ask(count: int) -> tuple[int, str]:
        part = {"type": "image_url", "image_url": {"url": f"file://{padded}"}}
        answer = api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part] * count}]})
        return answer.status_code, answer.text

    for _ in range(3):
        status, message = ask(20)
        assert (status, "bytes of media or more, and this server takes 100000" in message) == (400, True), message
        assert "bytes of media" not in ask(2)[1]


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


def ask(api: TestClient, part: dict[str, Any]) -> tuple[int, str]:
    content = [{"type": "text", "text": "?"}, part]
    answer = api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    return answer.status_code, answer.json()["error"]["message"]


@pytest.mark.parametrize("typed", [{"type": "image_pil"}, {}], ids=["with its type", "without a type"])
@pytest.mark.parametrize("nested", [False, True])
def test_no_text_reaches_the_models_processor_as_an_image(
    api: TestClient, tmp_path: Path, typed: dict[str, str], nested: bool
) -> None:
    """transformers would fetch it, or open it as a file, past every guard."""
    Image.new("RGB", (84, 84)).save(tmp_path / "x.png")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        for url in (f"http://127.0.0.1:{server.getsockname()[1]}/a.png", str(tmp_path / "x.png")):
            status, message = ask(api, typed | {"image_pil": [url] if nested else url})
            assert (status, message.partition(" cannot")[0]) == (400, "`image_pil`")
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


@pytest.mark.parametrize("url", [7, ["data:image/png;base64,AAAA"], True])
def test_url_that_is_no_text_is_the_clients_mistake(api: TestClient, url: Any) -> None:
    assert ask(api, {"image_url": url}) == (400, "A media URL must be a text.")
