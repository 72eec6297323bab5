"""Service times: how long a stage takes for its work, as straight lines. Measured here, or assumed for a GPU."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.stage import Stage

Topology = Literal["E+P+D", "E+PD"]


class ServiceTimes(BaseModel):
    """All in seconds, of one core or one card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = Field(description="Where the numbers are from. Stands on every plot.")
    around_s: float = Field(0.0, description="Proxy, and the client where it shares the cores: one request.")
    around_item_s: float = Field(0.0, description="The same for one item of it.")
    around_chunk_s: float = Field(0.0, description="The same for one token.")
    render_s: float = Field(description="Ingress: one request.")
    render_item_s: float = Field(description="Ingress: one item of a request.")
    chunk_s: float = Field(description="Ingress: one token on its way to the client.")
    hop_s: float = Field(description="A call of a stage on its way there and back. Nobody works meanwhile.")
    prepare_s: float = Field(0.0, description="Encoder, the replica beside its engine: one item.")
    prepare_embed_s: float = Field(0.0, description="The same for one embedding of it.")
    encode_step_s: float = Field(0.0, description="Encoder: one step of the engine.")
    encode_s: float = Field(description="Encoder: one item.")
    encode_embed_s: float = Field(description="Encoder: one embedding of it.")
    encode_beside_s: float = Field(0.0, description="The same, for each other embedding in its step.")
    prefill_call_s: float = Field(0.0, description="Prefill, the replica beside its engine: one call.")
    prefill_step_s: float = Field(description="Prefill: one step of the engine.")
    prefill_token_s: float = Field(description="Prefill: one token of it.")
    prefill_embed_s: float | None = Field(None, description="The same for one that is an embedding. Not set: as any.")
    decode_call_s: float = Field(0.0, description="Decode, the replica beside its engine: one call.")
    pull_s: float = Field(description="Decode: to take over one request with its KV blocks.")
    pull_token_s: float = Field(description="Decode: the blocks of one token.")
    pull_steps: int = Field(0, description="Ends of prefill's steps that a pull waits for, while prefill works.")
    decode_step_s: float = Field(description="Decode: one step of the engine, a token for each sequence.")
    decode_sequence_s: float = Field(description="Decode: one sequence of it.")
    decode_kv_token_s: float = Field(description="Decode: one token of their KV cache.")
    encode_embeds: int = Field(0, description="Embeddings of one step of the encoder at most; 0: an item a step.")
    batch_tokens: int = Field(description="Tokens of one step of prefill at most (max_num_batched_tokens).")
    slots: int = Field(description="Sequences that decode runs at a time (max_num_seqs).")
    kv_tokens: int = Field(description="Tokens that the KV cache of a decode replica holds.")
    cache_tokens: int = Field(0, description="Tokens that the prefix cache of a prefill replica holds.")
    start_up_cpu_s: float = Field(0.0, description="What of a start is work of one core, where cores are shared.")
    start_up_s: dict[Stage, float] = Field(
        description="From asking for a replica to its first call, without that work."
    )

    def prepare(self, embeds: int) -> float:
        return self.prepare_s + self.prepare_embed_s * embeds

    def encode(self, embeds: int) -> float:
        return self.encode_s + self.encode_embed_s * embeds

    def encode_step(self, items: list[int]) -> float:
        """A step of the engine with items of so many embeddings."""
        embeds = sum(items)
        beside_s = self.encode_beside_s * embeds * embeds
        return self.encode_step_s + sum(self.encode(each) for each in items) + beside_s

    def prefill(self, tokens: float, embeds: float = 0.0) -> float:
        """A step with so many tokens, of which ``embeds`` are embeddings."""
        embed_s = self.prefill_token_s if self.prefill_embed_s is None else self.prefill_embed_s
        return self.prefill_step_s + self.prefill_token_s * (tokens - embeds) + embed_s * embeds

    def pull(self, tokens: int) -> float:
        return self.pull_s + self.pull_token_s * tokens

    def decode(self, sequences: int, kv_tokens: float) -> float:
        return self.decode_step_s + self.decode_sequence_s * sequences + self.decode_kv_token_s * kv_tokens

    def alone(self, embeds: list[int], text_tokens: int, output_tokens: float) -> dict[Stage, float]:
        """Replica-seconds of one request on each stage where that is as busy as it can be: with full batches."""
        prompt = text_tokens + sum(embeds)
        held = prompt + output_tokens / 2
        together = max(min(self.slots, int(self.kv_tokens / held)), 1)
        step = self.decode(together, together * held)
        return {
            Stage.ENCODER: sum(self.encode(each) for each in embeds),
            Stage.PREFILL: self.prefill(prompt, sum(embeds)) - self.prefill_step_s * (1 - prompt / self.batch_tokens),
            Stage.DECODE: output_tokens * step / together,
        }


def load(path: Path) -> ServiceTimes:
    return ServiceTimes.model_validate_json(path.read_text())
