"""What a running system tells of its engines' memory on the card and of what moved between them."""

import re
from collections.abc import Callable

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.cpu import REPLICA
from tools.harness.servers import Server

SLACK = 0.05
"""Of its share, which an engine may take besides: its CUDA context, mostly."""

UCX_ROW = re.compile(r"\|\s*\d+(?:\.\.\w+)?\s*\|\s*([^|]+?)\s*\|\s*([^|]+?)\s*\|")
"""A range of sizes, how they are moved, and by which transport."""


def samples(page: str, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each sample of a metric whose labels include ``labels``."""
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def total(page: str, name: str, **labels: str) -> float:
    return sum(value for _, value in samples(page, name, **labels))


def kv_moved(page: str) -> dict[str, float] | None:
    """Hand-offs that decode has pulled: how many, and bytes and seconds of all. None where no KV moves."""
    moved = {
        "count": total(page, "vllm:nixl_xfer_time_seconds_count", stage="decode"),
        "seconds": total(page, "vllm:nixl_xfer_time_seconds_sum", stage="decode"),
        "bytes": total(page, "vllm:nixl_bytes_transferred_sum", stage="decode"),
        "failed": total(page, "vllm:nixl_num_failed_transfers_total"),
    }
    return moved if moved["count"] or moved["failed"] else None


def embeddings_moved(page: str) -> dict[str, dict[str, float]]:
    """By stage: items by what the stage did for them, bytes by direction, and the seconds of all reads."""
    found: dict[str, dict[str, float]] = {}
    for name, label, ending in (
        ("epd:ec_items_total", "event", ""),
        ("epd:ec_bytes_total", "direction", " bytes"),
        ("epd:ec_load_seconds_sum", "", "load seconds"),
    ):
        for labels, value in samples(page, name):
            stage = found.setdefault(labels["stage"], {})
            key = labels.get(label, "") + ending
            stage[key] = stage.get(key, 0.0) + value
    return found


def transports(log: str) -> list[str]:
    """How UCX reads another process's memory, by its own tables in the log: transports, and in which way each is used."""
    found: dict[str, None] = {}
    reads = False
    for line in log.splitlines():
        if "by ucp_" in line:
            reads = "by ucp_get" in line
        elif reads and (row := UCX_ROW.search(line)):
            found[f"{row[2]} ({row[1]})"] = None
    return list(found)


def stage_of(pid: int) -> str | None:
    """The stage whose engine a process is of, by its own name or the nearest of its parents'. None: it is gone."""
    try:
        process = psutil.Process(pid)
        for each in [process, *process.parents()]:
            if replica := REPLICA.search(" ".join(each.cmdline()) or each.name()):
                return replica[1].lower()
    except psutil.Error:
        return None
    return "decode"  # vLLM's own server


def memory(
    server: Server, programs: dict[int, int | None], stage: Callable[[int], str | None] = stage_of
) -> dict[str, int]:
    """MiB of the card by stage, of this server's processes that the driver names."""
    own = {process.pid for process in server.processes()}
    found: dict[str, int] = {}
    for pid, used in programs.items():
        if pid in own and used is not None and (name := stage(pid)) is not None:
            found[name] = found.get(name, 0) + used
    return found


def shares(server: Server) -> dict[str, float]:
    """Part of the card that each stage claims. vLLM's own server has no such page: its engine has the whole card."""
    page = server.get("/status")
    if page.status_code != 200:
        return {"decode": 1.0}
    claims = {told["stage"]: sum(load.get("gpus", 0.0) for load in told["loads"]) for told in page.json()}
    return {stage: share for stage, share in claims.items() if share}
