"""The stages of a request. A leaf: everything may import it."""

from enum import StrEnum


class Stage(StrEnum):
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
