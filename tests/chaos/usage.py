"""What the processes of a server use: files, threads, memory."""

import contextlib
import re
from dataclasses import dataclass

import psutil

from tools.harness.servers import Server

MORE_FILES, MORE_THREADS, MORE_BYTES = 16, 8, 64 << 20
"""As much more a process may use after the faults: connections that come and go, pools that fill, caches that warm up."""


@dataclass(frozen=True)
class Usage:
    name: str
    files: int
    threads: int
    memory_bytes: int
    """That it shares with no other process."""


def usage(server: Server) -> dict[psutil.Process, Usage]:
    """Of our replicas, their engines and Serve's proxies."""
    found = {}
    for process in server.processes():
        with contextlib.suppress(psutil.Error), process.oneshot():
            if match := re.search(r"ServeReplica:epd:\w+|VLLM::\w+|ProxyActor", " ".join(process.cmdline())):
                memory = process.memory_full_info().uss
                found[process] = Usage(match[0], process.num_fds(), process.num_threads(), memory)
    return found


def grown(before: dict[psutil.Process, Usage], after: dict[psutil.Process, Usage]) -> list[str]:
    """Processes that use more than they did, beyond the bounds; those that died are not compared."""
    return [
        f"{then} became {now}"
        for process, then in before.items()
        if (now := after.get(process)) is not None
        and (
            now.files > then.files + MORE_FILES
            or now.threads > then.threads + MORE_THREADS
            or now.memory_bytes > then.memory_bytes + MORE_BYTES
        )
    ]
