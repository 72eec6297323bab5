"""An engine's failure to start as a sentence, with a remedy if one is known: pure functions of texts."""

import re
from collections.abc import Sequence

from serve_app.handoff.errors import CannotStart

SHARE = (
    "give the stage more memory (`gpus_per_replica`, `gpu_memory_utilization`, `kv_cache_memory_bytes` if it is set)"
)

KNOWN: list[tuple[str, str]] = [
    (
        r"out of memory\. Tried to allocate ([\d.]+ \w+)",
        "the card's memory is not enough: {1} more were asked for and not there. Lower `max_model_len` or "
        "`max_num_batched_tokens`, or {share}",
    ),
    (
        r"out of memory",
        "the card's memory is not enough. Lower `max_model_len` or `max_num_batched_tokens`, or {share}",
    ),
    (
        r"No available memory for the cache blocks",
        "weights and working memory leave nothing of its share for the KV cache. Lower `max_model_len`, set `media.limits: "
        "{{video: 0}}` where no videos come, or {share}",
    ),
    (
        r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.*?\(([\d.]+) GiB\)(?:.*?length is (\d+))?",
        "a request of `max_model_len: {1}` needs {2} GiB of KV cache and {3} GiB are left. Set `max_model_len` to {4} or "
        "less, or {share}",
    ),
    (
        r"Free memory on device \S+ \(([\d.]+)/[\d.]+ GiB\).*?\(([\d.]+), ([\d.]+) GiB\)",
        "`gpu_memory_utilization: {2}` means {3} GiB of the card, and {1} GiB are free. End what else uses the card, or "
        "lower it",
    ),
    (
        r"gated repo|GatedRepo|401 Client Error|403 Client Error",
        "`model: {model}` asks for a login. Accept its terms, and set HF_TOKEN where Ray starts",
    ),
    (
        r"outgoing traffic has been disabled|offline mode is enabled",
        "`model: {model}` is not on this node, and HF_HUB_OFFLINE forbids to fetch it",
    ),
    (
        r"couldn't connect to|MaxRetryError|ConnectionError|ConnectError",
        "`model: {model}` is not on this node, and where it would be fetched does not answer",
    ),
    (
        r"Invalid repository ID or local directory|Repo id must|is not a valid model identifier|Repository Not Found",
        "`model: {model}` is neither a folder with a model on this node nor the name of one that can be fetched",
    ),
    (
        r"TypeError: ('[<>]=?' not supported between [^\n]*)",
        "a value in its `engine_args` is of the wrong type: {1}",
    ),
    (
        r"Failed core proc\(s\): \{[^}]*: -9",
        "its engine's process was killed, as the kernel does where the machine's memory is not enough",
    ),
    (
        r"(?:Engine core|WorkerProc) initialization failed",
        "its engine's process ended, for a reason that is in vLLM's log above",
    ),
]
"""Patterns and their meanings; the first match counts. ``{1}``: the pattern's first group."""


def reason(errors: Sequence[str], model: str) -> str:
    """A sentence, and a second one with a remedy, without the full stop. ``errors``: those of ``causes``."""
    text = "\n".join(errors)
    for pattern, words in KNOWN:
        if (match := re.search(pattern, text, re.DOTALL)) is not None:
            groups = match.groups(default="a smaller number")
            return words.format(match[0], *groups, model=model, share=SHARE)
    kind, _, said = errors[0].partition(": ")
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n", said.strip(), maxsplit=1)[0].rstrip(".")
    return first if first and kind in ("ValueError", "ValidationError") else f"{kind}: {first}".removesuffix(": ")


def sentence(status: str) -> str | None:
    """Our sentence at the end of the traceback in Ray Serve's status of an application or a deployment."""
    errors = re.escape(CannotStart.__module__)
    found = re.findall(rf"^{errors}\.(?:CannotStart|ConfigError): (.*(?:\n  .*)*)", status, re.MULTILINE)
    return found[-1].rstrip() if found else None
