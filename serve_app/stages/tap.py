"""Takes the outputs of an engine's core, step by step, on their way into vLLM's ``OutputProcessor``. That keeps statistics,
spans and the end of each request, but here it neither detokenizes nor makes an output per token.

It relies on ``AsyncLLM``'s handler, which calls the instance's ``process_outputs`` with the outputs of each step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
from vllm.v1.serial_utils import MsgpackEncoder

from serve_app.channel.outlet import Codec

Hear = Callable[[EngineCoreOutput], None]

UNHEARD = (FinishReason.ERROR, FinishReason.ABORT)
"""Outputs with these reasons are not passed on: the call of their request ends, which tells it."""


class Tap:
    """A tap on the ``OutputProcessor`` of one engine. ``stepped`` is called after each step with outputs that are heard."""

    def __init__(self, process: Callable[..., OutputProcessorOutput]) -> None:
        self._process = process
        self._hear: dict[str, Hear] = {}
        self.stepped: Callable[[], None] = lambda: None

    @contextmanager
    def hears(self, request_id: str, hear: Hear) -> Iterator[None]:
        """Have ``hear`` get each output of a request, which it may keep."""
        self._hear[request_id] = hear
        try:
            yield
        finally:
            del self._hear[request_id]

    def process_outputs(self, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> OutputProcessorOutput:
        heard = [(hear, output) for output in outputs if (hear := self._hear.get(output.request_id)) is not None]
        # The ingress works on logprobs; nobody here reads what vLLM would make of them.
        kept = [(output.new_logprobs, output.new_prompt_logprobs_tensors) for _, output in heard]
        for _, output in heard:
            output.new_logprobs = output.new_prompt_logprobs_tensors = None
            if output.finish_reason is FinishReason.ERROR and output.pooling_output is None:
                # Of the ends of pooling requests without a result, vLLM's processor knows this one alone.
                output.mm_cache_miss_hashes = output.mm_cache_miss_hashes or [""]
        processed = self._process(outputs, *args, **kwargs)
        for (hear, output), (logprobs, prompt_logprobs) in zip(heard, kept, strict=True):
            output.new_logprobs, output.new_prompt_logprobs_tensors = logprobs, prompt_logprobs
            if output.finish_reason not in UNHEARD:
                hear(output)
        if heard:
            self.stepped()
        return processed


def install_tap(processor: OutputProcessor) -> Tap:
    tap = Tap(processor.process_outputs)
    processor.process_outputs = tap.process_outputs
    return tap


def queued_s(output: EngineCoreOutput | RequestOutput) -> float:
    """Seconds that a request waited in its engine's queue. Of the core's outputs, only the first has them."""
    if isinstance(output, EngineCoreOutput):
        at = {event.type: event.timestamp for event in reversed(output.events or ())}  # the first of each kind
        queued, scheduled = (at.get(each, 0.0) for each in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED))
    else:
        stats = output.metrics
        queued, scheduled = (stats.queued_ts, stats.scheduled_ts) if stats is not None else (0.0, 0.0)
    return float(max(scheduled - queued, 0.0)) if queued and scheduled else 0.0


ARRAYS = (
    "new_logprobs",
    "pooling_output",
    "new_prompt_logprobs_tensors",
    "routed_experts",
    "new_sampling_mask",
    "prompt_token_id_logprobs",
)
"""Fields with arrays, most for each token of an output, or of its prompt."""

AT_STAGE = ("events", "trace_headers", "kv_transfer_params", "ec_transfer_params")
"""Fields that mean nothing to the ingress."""


def add(waiting: list[EngineCoreOutput], output: EngineCoreOutput) -> int:
    """Add an output to the waiting ones of its request (``Codec.add``)."""
    for name in AT_STAGE:
        setattr(output, name, None)
    size = _size_bytes(output)
    if not waiting or size or _size_bytes(waiting[-1]):
        waiting.append(output)
        return size
    last = waiting[-1]
    last.new_token_ids = last.new_token_ids + output.new_token_ids
    last.finish_reason, last.stop_reason = output.finish_reason, output.stop_reason
    last.spec_decode_metrics = output.spec_decode_metrics
    return 0


def _size_bytes(output: EngineCoreOutput) -> int:
    """The size of an output's arrays."""
    size = 0
    for name in ARRAYS:
        if (value := getattr(output, name)) is not None:
            arrays = value if isinstance(value, tuple) else (value,)
            size += sum(int(getattr(array, "nbytes", 0)) for array in arrays)
    return size


def codec() -> Codec[EngineCoreOutput]:
    """The codec of decode replicas; ``ingress.answers`` decodes."""
    return Codec(MsgpackEncoder().encode, add)
