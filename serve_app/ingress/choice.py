"""One choice of a request in vLLM's ``OutputProcessor``, which makes its text, logprobs and outputs."""

import copy
from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest


class Choice:
    """A choice outlives a decode replica. The next one adds its output tokens."""

    def __init__(
        self,
        processor: OutputProcessor,
        core: EngineCoreRequest,
        text: str | None,
        parent: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        self.id = core.request_id
        self.index = index
        self.params: Any = core.params
        self.counts_cached = index == 0
        """Whether the prompt's tokens that were in a cache are still to be counted: once, of the first choice."""
        self._processor = processor
        self._args = core, text, parent, index, queue
        processor.add_request(*self._args)

    @property
    def streamed(self) -> bool:
        """Whether the client gets output tokens as they come."""
        return bool(self.params.output_kind.name != "FINAL_ONLY")

    @property
    def finished(self) -> bool:
        return self.id not in self._processor.request_states

    @property
    def output_tokens(self) -> list[int]:
        """The tokens so far. The choice must not have finished."""
        detokenizer = self._processor.request_states[self.id].detokenizer
        return list(detokenizer.output_token_ids) if detokenizer is not None else []

    def restart(self) -> None:
        """Drop the output tokens, of which the client has seen none."""
        self._processor._finish_request(self._processor.request_states[self.id])
        self._processor.add_request(*self._args)


def number_of(core: EngineCoreRequest) -> int:
    """Choices that a prompt is to have."""
    return int(core.sampling_params.n) if core.sampling_params is not None else 1


def choices_of(
    processor: OutputProcessor, core: EngineCoreRequest, text: str | None, queue: RequestOutputCollector
) -> list[Choice]:
    """The choices that vLLM's ``OutputProcessor`` gathers into the outputs of one request."""
    if number_of(core) == 1:
        return [Choice(processor, core, text, None, 0, queue)]
    parent = ParentRequest(core)
    choices = []
    for index in range(number_of(core)):
        child = copy.copy(core)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        choices.append(Choice(processor, child, text, parent, index, queue))
    return choices
