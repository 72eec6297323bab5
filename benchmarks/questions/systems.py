"""What is compared, on two cores: each engine has a core, as if it were a card. All else goes before engines, where there is
room: with cards they would not wait for each other.

``one engine`` has one core, so the other is left to its server. ``two engines`` are vLLM's own data parallelism: its server
gives each request to the engine with the fewest. In ``E+PD`` encoder and decode have a core each; in ``E+P+D`` encoder and
prefill share one, and so they do in the reference.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.questions.model import TOKEN_BYTES, ensure_model
from benchmarks.systems import ours, reference
from tools.harness.servers import Server, cpu_config, engine_server

System = Callable[[Path], AbstractContextManager[Server]]
ONE, TWO, E_PD, E_P_D, REFERENCE = "one engine", "two engines", "E+PD", "E+P+D", "reference"
CONTEXT = 24_576
CACHE_TOKENS = 65_536
ENCODER, PREFILL, DECODE = "Encoder", "Prefill", "Decode"
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
ROLES = {"ec_producer": ENCODER, "kv_producer": PREFILL, "kv_consumer": DECODE}
"""Of the reference's servers, on their command lines."""
CORES = {E_PD: {ENCODER: 0, DECODE: 1}, E_P_D: {ENCODER: 0, PREFILL: 0, DECODE: 1}}


def arguments(step_tokens: int, **more: Any) -> dict[str, Any]:
    """Of every system: ``step_tokens`` at most in an engine's step, so that is how finely prompts are cut."""
    engine = {
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": CACHE_TOKENS * TOKEN_BYTES,
    }
    return {"model": str(ensure_model()), "served_model_name": "demo", "engine_args": engine | more}


@contextmanager
def engines(folder: Path, args: dict[str, Any], count: int) -> Iterator[Server]:
    """vLLM's own server, with one engine or several."""
    args = args | {"encoder": None, "prefill": None}
    more = {"data_parallel_size": count} if count > 1 else {}
    with engine_server(folder, cpu_config(args), more) as server:
        pin(server, {"EngineCore": 0, "EngineCore_DP0": 0, "EngineCore_DP1": 1})
        yield server


@contextmanager
def stages(folder: Path, args: dict[str, Any], name: str) -> Iterator[Server]:
    without: dict[str, Any] = {"prefill": None} if name == E_PD else {}
    with ours(folder, without | args) as server:
        pin(server, CORES[name])
        yield server


@contextmanager
def behind_reference(folder: Path, args: dict[str, Any]) -> Iterator[Server]:
    with reference(folder, args) as server:
        pin(server, CORES[E_P_D])
        yield server


@contextmanager
def one_queue_per_core() -> Iterator[bool]:
    """Without Linux' groups by session, which share a core among sessions whatever the priorities in them: what sleeps most
    of the time then waits for seconds beside two busy engines. Whether that is so: only root can have it."""
    try:
        before = AUTOGROUP.read_text()
        AUTOGROUP.write_text("0")
    except OSError:
        yield not AUTOGROUP.exists()
        return
    try:
        yield True
    finally:
        AUTOGROUP.write_text(before)


def engine_processes(server: Server) -> dict[str, list[psutil.Process]]:
    """By the replica that they belong to, the reference's role, or else their own name."""
    found: dict[str, list[psutil.Process]] = {}
    for process in server.processes():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if engine := re.search(r"VLLM::(EngineCore\w*)", title):
                owner = " ".join(process.parent().cmdline())
                replica = re.search(r"ServeReplica:epd:(\w+)", owner)
                stage = next((stage for role, stage in ROLES.items() if role in owner), engine[1])
                found.setdefault(replica[1] if replica else stage, []).append(process)
    return found


def pin(server: Server, cores: Mapping[str, int | tuple[int, ...]]) -> None:
    """Each engine process to the core of its name; of several of one name each to another of its cores. Raises
    ``RuntimeError`` where one is not found."""
    found = engine_processes(server)
    wrong = found.keys() - cores.keys()
    if wrong or not found:
        raise RuntimeError(f"engines of {sorted(found)}, and cores for {sorted(cores)}")
    for name, processes in found.items():
        of = cores[name]
        for place, process in enumerate(processes):
            core = (of if isinstance(of, int) else of[place % len(of)]) % (os.cpu_count() or 1)
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})
                    os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))
