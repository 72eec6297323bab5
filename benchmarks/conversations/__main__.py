"""Two choices against the prefix router: what conversations gain, and what requests without a shared beginning lose.

``python -m benchmarks.conversations`` starts a server for each arm, in turn, with one encoder, four prefill replicas and one
decode replica, puts the same requests to both, and prints what it found; all runs stay in
``benchmarks/results/conversations.json``. ``--add`` adds rounds to what is there, ``--quick`` is one round of the
conversations that the targets are set for. A full run takes an hour and a half.
"""

import argparse
import json
import signal
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conversations import clients
from benchmarks.conversations.figures import PREFIX, TWO_CHOICES, Document
from benchmarks.conversations.loads import (
    CONVERSATIONS,
    HOT,
    LENGTHS,
    MORE,
    NO_REUSE,
    NO_REUSE_CALM,
    PIXELS,
    SLIDING,
    Load,
)
from benchmarks.conversations.page import SMALL, page
from benchmarks.questions.question import failure, order
from tools.harness import record
from tools.harness.servers import API, Server, serve_run

RESULT = Path(__file__).parents[1] / "results" / "conversations.json"
PREFILLS = 4
ARMS = {TWO_CHOICES: {"routing": {"prefix": False}}, PREFIX: {"routing": {"prefix": True}}}
CONTEXT = 8192
TOKEN_BYTES = 2048
"""Of the demo model's KV cache."""
LARGE = "large caches"
CACHES = {SMALL: 26_000, LARGE: 131_072}
"""Tokens in the KV cache of each prefill replica. The live conversations, one copy of each, are 0.68 of the small ones."""
LOADS = {SMALL: [CONVERSATIONS, MORE, SLIDING, NO_REUSE, NO_REUSE_CALM, HOT], LARGE: [CONVERSATIONS]}
QUICK = {SMALL: [CONVERSATIONS]}


def server(folder: Path, arm: str, caches: str) -> AbstractContextManager[Server]:
    args = {
        **ARMS[arm],
        "accelerator": "cpu",
        "api": API | {"enable_prompt_tokens_details": True},
        "engine_args": {"max_model_len": CONTEXT},
        "prefill": {"engine_args": {"kv_cache_memory_bytes": CACHES[caches] * TOKEN_BYTES}},
        "media": {"processor_kwargs": {"max_pixels": PIXELS}},
    }
    replicas = {"Ingress": 1, "Encoder": 1, "Prefill": PREFILLS, "Decode": 1}
    fixed = {name: {"num_replicas": count, "autoscaling_config": None} for name, count in replicas.items()}
    return serve_run(folder, args, fixed)


def all_run(one: Server) -> bool:
    return len(clients.work(clients.engines(one.get("/metrics").text))) == PREFILLS


def visit(arm: str, caches: str, loads: list[Load], round_: int, patience_s: float) -> list[dict[str, Any]]:
    """One server: started, measured, ended. Its failure is a result, not the end of the others'."""
    began, where = time.monotonic(), {"arm": arm, "caches": caches, "round": round_}
    try:
        with tempfile.TemporaryDirectory(prefix="conversations-") as folder, server(Path(folder), arm, caches) as one:
            one.wait_until(lambda: all_run(one), f"{PREFILLS} prefill replicas", 240, every_s=1.0)
            runs = clients.drive(one.url, one.mark, loads, round_, Path(folder) / "clients.log", patience_s)
    except Exception as error:
        return [where | failure(error)]
    print(f"round {round_ + 1}, {arm}, {caches}: {time.monotonic() - began:.0f} s", flush=True)
    return [where | run for run in runs]


def measure(plan: dict[str, list[Load]], options: argparse.Namespace) -> None:
    """Round by round; what there is is written after each visit."""
    begun = 0
    document: Document = record.about("benchmarks.conversations") | {
        "servers": {"prefill_replicas": PREFILLS, "cache_tokens_per_replica": CACHES, "picture_side": PIXELS**0.5},
        "loads": {load.name: asdict(load) for loads in plan.values() for load in loads},
        "runs": [],
    }
    if options.add and options.out.exists():
        last = json.loads(options.out.read_text())
        document |= {"command": f"{last['command']}; {document['command']}", "runs": last["runs"]}
        document["loads"] = last["loads"] | document["loads"]
        begun = 1 + max(run["round"] for run in last["runs"])
    for round_ in range(begun, begun + options.rounds):
        for caches, loads in plan.items():
            for arm in order(options.arms, round_):
                document["runs"] += visit(arm, caches, loads, round_, options.wait)
                record.write(document, options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = {load.name: load for load in [*LOADS[SMALL], *LENGTHS]}
    parser.add_argument("--quick", action="store_true", help="one round of the conversations, small caches")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), metavar="CACHES")
    parser.add_argument("--loads", nargs="+", choices=every, metavar="LOAD", help=f"of: {', '.join(every)}")
    parser.add_argument(
        "--wait", type=float, default=0.0, help="seconds, at most, before each load for a quiet machine"
    )
    parser.add_argument("--add", action="store_true", help="keep the rounds of the last run")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="print the tables of the last run again")
    options = parser.parse_args()
    options.plan = QUICK if options.quick else {caches: LOADS[caches] for caches in options.caches}
    if options.loads:
        options.plan = {caches: [every[name] for name in options.loads] for caches in options.plan}
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server that runs is ended
    if not options.report:
        measure(options.plan, options)
    print(page(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
