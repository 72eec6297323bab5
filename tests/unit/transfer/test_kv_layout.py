"""Whether decode can take prefill's KV blocks."""

import copy
from typing import Any

import pytest

from serve_app.handoff.errors import CannotStart
from serve_app.transfer.kv_layout import KVLayout, check_layouts, layout_of

HOPPER = KVLayout("a", "FLASH_ATTN", "NVIDIA H100")
BLACKWELL = KVLayout("b", "FLASHINFER", "NVIDIA B200")


def test_engines_of_one_layout_hand_over() -> None:
    check_layouts([HOPPER, HOPPER], [HOPPER._replace(card="NVIDIA H200")])
    check_layouts([], [HOPPER])


def test_engines_of_two_layouts_are_refused_with_what_makes_them_one() -> None:
    with pytest.raises(CannotStart) as refused:
        check_layouts([HOPPER, BLACKWELL], [HOPPER])
    assert str(refused.value) == (
        "decode (NVIDIA H100, FLASH_ATTN) cannot take the KV blocks of prefill (NVIDIA B200, FLASHINFER): name one that "
        "both have, such as `engine_args: {attention_backend: FLASH_ATTN}`, or keep both stages on cards of one kind "
        "(`label_selector`)."
    )


def test_layout_is_the_one_that_vllms_connector_compares(decode_vllm_config: Any) -> None:
    layout = layout_of(decode_vllm_config)
    assert len(layout.digest) == 64 and layout.backend
    assert layout_of(decode_vllm_config) == layout
    other = copy.copy(decode_vllm_config)
    other.cache_config = copy.copy(other.cache_config)
    other.cache_config.cache_dtype = "fp8"
    assert layout_of(other).digest != layout.digest
