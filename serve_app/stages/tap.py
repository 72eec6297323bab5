"""What an engine's core puts out, step by step, beside vLLM's own ``OutputProcessor``: that keeps statistics, spans and the
end of each request, and neither detokenizes nor makes an output per token here.

Leans on ``AsyncLLM``'s handler, which calls ``process_outputs`` of the instance with the outputs of each step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from serve_app.channel.outlet import Codec
from serve_app.channel.wire import Frame

Hear = Callable[[EngineCoreOutput], None]

UNHEARD = (FinishReason.ERROR, FinishReason.ABORT)
"""The call of such a request ends with it."""


class Tap:
    """On the ``OutputProcessor`` of one engine. ``stepped`` is called after each step in which somebody heard something."""

    def __init__(self, process: Callable[..., OutputProcessorOutput]) -> None:
        self._process = process
        self._hear: dict[str, Hear] = {}
        self.stepped: Callable[[], None] = lambda: None

    @contextmanager
    def hears(self, request_id: str, hear: Hear) -> Iterator[None]:
        """While it is under way, ``hear`` gets each output of a request, and may keep it."""
        self._hear[request_id] = hear
        try:
            yield
        finally:
            del self._hear[request_id]

    def process_outputs(self, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> OutputProcessorOutput:
        heard = [(hear, output) for output in outputs if (hear := self._hear.get(output.request_id)) is not None]
        # Who hears them makes something of logprobs; here nobody reads what vLLM would make of them.
        kept = [(output.new_logprobs, output.new_prompt_logprobs_tensors) for _, output in heard]
        for _, output in heard:
            output.new_logprobs = output.new_prompt_logprobs_tensors = None
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


def queue_s(output: EngineCoreOutput | RequestOutput) -> float:
    """Seconds that a request waited in its engine's queue. Of the core's outputs its first one tells."""
    if isinstance(output, EngineCoreOutput):
        at = {event.type: event.timestamp for event in reversed(output.events or ())}  # the first of each kind
        queued, scheduled = (at.get(each, 0.0) for each in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED))
    else:
        stats = output.metrics
        queued, scheduled = (stats.queued_ts, stats.scheduled_ts) if stats is not None else (0.0, 0.0)
    return float(max(scheduled - queued, 0.0)) if queued and scheduled else 0.0


ARRAYS = (
    "new_logprobs",
    "new_prompt_logprobs_tensors",
    "routed_experts",
    "new_sampling_mask",
    "prompt_token_id_logprobs",
)
"""Fields of an output for each of its tokens, or of its prompt."""

AT_STAGE = ("events", "trace_headers", "kv_transfer_params", "ec_transfer_params")
"""Fields that mean nothing to the ingress."""


def add(waiting: list[EngineCoreOutput], output: EngineCoreOutput) -> int:
    """Adds an output to those of its request that wait (``Codec.add``)."""
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
    """Of its arrays."""
    size = 0
    for name in ARRAYS:
        if (value := getattr(output, name)) is not None:
            arrays = value if isinstance(value, tuple) else (value,)
            size += sum(int(getattr(array, "nbytes", 0)) for array in arrays)
    return size


def codec() -> Codec[EngineCoreOutput]:
    """Of what decode replicas send; ``ingress.answers`` has the other half."""
    from vllm.v1.serial_utils import MsgpackEncoder

    encoder = MsgpackEncoder()

    def encode(frame: Frame[EngineCoreOutput]) -> Any:
        return encoder.encode(frame)

    return Codec(encode, add)
