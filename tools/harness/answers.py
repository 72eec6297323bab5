"""Answers reduced to what must be equal: token ids, texts, reasons, usage, log-probabilities; no ids, no times."""

import json
from collections.abc import Iterator
from typing import Any

import requests

# Cached tokens depend on what an engine was asked before.
VOLATILE = {
    "cached_tokens",
    "input_tokens_details",
    "id",
    "created",
    "created_at",
    "completed_at",
    "system_fingerprint",
    "model",
    "metrics",
    "service_tier",
}
LOGPROB_TOLERANCE = 2e-3


def reduce(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reduce(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [reduce(item) for item in value]
    return value


def answered(response: requests.Response) -> Any:
    """The reduced answer of a request that must not fail."""
    assert response.status_code == 200, response.text
    return reduce(response.json())


def differences(ours: Any, baseline: Any, where: str = "") -> list[str]:
    """Where two reduced answers differ; log-probabilities only beyond float noise."""
    if isinstance(ours, dict) and isinstance(baseline, dict):
        keys = sorted(ours.keys() | baseline.keys())
        return [d for key in keys for d in differences(ours.get(key), baseline.get(key), f"{where}.{key}")]
    if isinstance(ours, list) and isinstance(baseline, list) and len(ours) == len(baseline):
        return [
            d for i, pair in enumerate(zip(ours, baseline, strict=True)) for d in differences(*pair, f"{where}[{i}]")
        ]
    if isinstance(ours, float) and isinstance(baseline, float) and abs(ours - baseline) <= LOGPROB_TOLERANCE:
        return []
    return [] if ours == baseline else [f"{where}: ours {ours!r}, baseline {baseline!r}"]


def arriving(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream, as they come."""
    for line in response.iter_lines():
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line[6:])


def events(response: requests.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream."""
    return list(arriving(response))


def gather(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stream of chat or completion chunks says in all: per choice the text, tokens, tool call, reason, logprobs."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in stream:
        assert "error" not in event, event
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            whole = choices.setdefault(
                choice["index"], {"text": "", "token_ids": [], "arguments": "", "logprobs": [], "finish_reason": None}
            )
            delta = choice.get("delta") or {}
            whole["text"] += delta.get("content") or choice.get("text") or ""
            for call in delta.get("tool_calls") or []:
                whole["arguments"] += call["function"].get("arguments") or ""
            whole["token_ids"] += choice.get("token_ids") or []
            logprobs = choice.get("logprobs") or {}
            whole["logprobs"] += logprobs.get("content") or []
            whole["finish_reason"] = choice.get("finish_reason") or whole["finish_reason"]
    return {"choices": choices, "usage": usage}
