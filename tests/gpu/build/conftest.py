"""These run on the GPU build of vLLM with a faked CUDA platform, in a process of their own: `make check-gpu`.

Elsewhere nothing here is collected. A process has one platform, and the other tests' is the CPU.
"""

import os
from pathlib import Path

import pytest

FAKED = os.environ.get("EPD_FAKED_CARDS") == "1"
if FAKED:
    from tests.gpu.build import platform

    platform.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models, without weights, by the names that configs have for them."""
    from tests.gpu.build.models import write_models

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
