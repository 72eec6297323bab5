"""Failures of engines, as vLLM, PyTorch and the hub word them, as one sentence."""

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from serve_app.hooks.start_failure import causes
from serve_app.launch.start_reason import KNOWN, SHARE, reason, sentence

CORE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "

TEXTS = [
    (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 12.60 GiB. GPU 0 has a total capacity of 22.03 GiB of "
        "which 1.20 GiB is free. Process 1 has 1 GiB memory in use.",
        "the card's memory is not enough: 12.60 GiB more were asked for",
    ),
    ("RuntimeError: HIP out of memory", "the card's memory is not enough. Lower"),
    (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing",
        "set `media.limits: {video: 0}` where no videos come",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (128000), (4.39 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (1.2 GiB). Based on the available memory, the estimated "
        "maximum model length is 34000. Try increasing `gpu_memory_utilization`",
        "a request of `max_model_len: 128000` needs 4.39 GiB of KV cache and 1.2 GiB are left. Set `max_model_len` to 34000",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (128000), (4.39 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.1 GiB). Try increasing `gpu_memory_utilization`",
        "Set `max_model_len` to a smaller number or less",
    ),
    (
        "ValueError: Free memory on device cuda:0 (7.1/22.03 GiB) on startup is less than desired GPU memory utilization "
        "(0.92, 20.27 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "`gpu_memory_utilization: 0.92` means 20.27 GiB of the card, and 7.1 GiB are free",
    ),
    ("OSError: You are trying to access a gated repo.\nMake sure to have access", "`model: a/b` asks for a login"),
    (
        "LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision on the local "
        "disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass",
        "`model: a/b` is not on this node, and HF_HUB_OFFLINE",
    ),
    ("OSError: We couldn't connect to 'https://hub' to load the files", "`model: a/b` is not on this node, and where"),
    (
        "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/nowhere/at/all'. Use",
        "`model: a/b` is neither a folder with a model",
    ),
    (
        "TypeError: '<' not supported between instances of 'int' and 'str'",
        "a value in its `engine_args` is of the wrong type: '<' not supported",
    ),
    (CORE + "{'EngineCore_DP0': -9}", "its engine's process was killed"),
    (CORE + "{}", "its engine's process ended, for a reason that is in vLLM's log"),
]


@pytest.mark.parametrize(("text", "words"), TEXTS)
def test_known_failure_says_what_to_do(text: str, words: str) -> None:
    said = reason([text], "a/b")
    assert words in said and not said.endswith(".")
    assert "\n" not in said and "{share}" not in said


def test_every_known_failure_is_one_of_these() -> None:
    said = [reason([text], "a/b") for text, _ in TEXTS]
    assert len(set(said)) == len(TEXTS) >= len(KNOWN)
    assert any(SHARE in each for each in said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ValueError: Head size 7 is not supported. Try another model.\nSupported: 8", "Head size 7 is not supported"),
        ("KeyError: 'model.layers.0'", "KeyError: 'model.layers.0'"),
        ("AssertionError: ", "AssertionError"),
    ],
)
def test_unknown_failure_is_its_first_sentence_and_its_type_where_that_says_more(error: str, said: str) -> None:
    assert reason([error], "m") == said


def test_cause_that_is_known_counts_and_else_what_was_raised_last() -> None:
    assert reason(["RuntimeError: no", "OutOfMemoryError: CUDA out of memory"], "m").startswith("the card's memory")
    assert reason(["ValueError: outer", "KeyError: inner"], "m") == "outer"


class Config(BaseModel):
    dtype: int | float = 0

    @model_validator(mode="after")
    def _small(self) -> "Config":
        if self.dtype > 9:
            raise ValueError(f"{self.dtype} is too large. To allow it, set a variable.")
        return self


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("floof", "`dtype: floof`: input should be a valid integer, unable to parse string as an integer"),
        (10, "10 is too large"),
    ],
)
def test_mistake_in_a_configuration_of_vllm_names_the_key_and_the_value(value: object, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"dtype": value})
    assert reason(causes(caught.value), "m") == said


def status(error: str) -> str:
    """What Ray Serve's status has of a replica that raised."""
    inner = f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    raise\n{error}\n'
    return f"The deployment failed to start 1 times in a row. Error:\nray::f() (pid=1)\nRuntimeError: {inner}"


def test_sentence_is_found_in_what_ray_serve_says() -> None:
    assert (
        sentence(status("serve_app.handoff.errors.CannotStart: decode cannot start: no.")) == "decode cannot start: no."
    )
    mistakes = "The configuration under `args:` cannot be used.\n  a: b\n  c: d"
    assert sentence(status(f"serve_app.handoff.errors.ConfigError: {mistakes}")) == mistakes
    assert sentence(status("KeyError: 1")) is None
    assert sentence("") is None
