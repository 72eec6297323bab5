"""Contracts are looked at through the ingress that unit tests build."""

from tests.unit.conftest import (  # noqa: F401
    demo_folder,
    demo_vllm_config,
    environment_is_read_again,
    made_once,
    make_client,
    make_parts,
)
