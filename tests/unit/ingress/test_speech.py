"""Sounds that are to be written down: they come as files, past vLLM's media connectors."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.entrypoints.speech_to_text.base.serving import SpeechToTextBaseServing
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.config import AdmissionConfig
from serve_app.ingress import seams
from serve_app.ingress.admission import Admission
from serve_app.ingress.request import Request, current


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admission]:
    """Of an ingress that takes ten bytes of media at a time, and decodes nothing."""

    async def decode(serving: Any, request: Any, audio_data: bytes, request_id: str) -> bytes:
        return audio_data

    monkeypatch.setattr(seams, "_preprocess_speech", decode)
    monkeypatch.setattr(SpeechToTextBaseServing, "_preprocess_speech_to_text", None)
    admission = Admission(AdmissionConfig(max_media_bytes=10), embed_bytes=1)
    seams.install_speech(admission)
    token = current.set(None)
    yield admission
    current.reset(token)


def preprocess(sound: bytes, request: Request) -> Any:
    current.set(request)
    serving: Any = SpeechToTextBaseServing
    return asyncio.run(serving._preprocess_speech_to_text(None, None, sound, request.id))


def test_sounds_count_as_media_until_their_request_ends(admission: Admission) -> None:
    first, second = Request("first"), Request("second")
    assert preprocess(b"a sound.", first) == b"a sound." and admission.arrived_bytes == 8
    with pytest.raises(GracefulHTTPError, match="bytes of media under way"):
        preprocess(b"another.", second)

    first.holds.close()
    second.holds.close()

    assert admission.arrived_bytes == 0
    assert preprocess(b"another.", Request("third")) == b"another."


def test_playlists_are_refused_before_anything_reads_them(admission: Admission) -> None:
    with pytest.raises(VLLMValidationError, match="playlist"):
        preprocess(b"#EXTM3U\n", Request("r"))
