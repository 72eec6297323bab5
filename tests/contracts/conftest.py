"""Contracts are looked at through the ingress that unit tests build."""

import pytest

from tests.unit.conftest import (  # noqa: F401
    demo_folder,
    demo_vllm_config,
    environment_is_read_again,
    made_once,
    make_client,
    make_parts,
)


@pytest.fixture
def cpu_torch() -> None:
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("needs a CPU build of PyTorch")
