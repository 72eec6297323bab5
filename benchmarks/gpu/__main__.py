"""One engine, E+PD and E+P+D on one card, one after the other, in under ten minutes and without a download.

``python -m benchmarks.gpu`` first says what is missing, if anything. Then it serves Qwen2.5-VL-3B with random weights and
tells of each system: start-up, whether its tokens are one engine's, time to first token, requests/s, the memory of each
engine against its share of the card, and how embeddings and KV blocks moved. It writes ``benchmarks/results/gpu.json`` and
``benchmarks/gpu/RESULTS.md``, whatever fails.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.gpu import card as cards
from benchmarks.gpu import systems
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.page import page, summary
from benchmarks.gpu.prerequisites import Machine, lacks_of_card, lacks_of_machine, what_fits
from benchmarks.gpu.visit import Visit
from tools.harness import record

RESULT = Path(__file__).parents[1] / "results" / "gpu.json"
PAGE = Path(__file__).parent / "RESULTS.md"


def checked() -> cards.Card:
    """The card to use. Ends the program where something is missing, with a sentence for each thing."""
    try:
        card = cards.chosen(cards.cards())
    except cards.NoCard as lack:
        sys.exit(f"Nothing was measured. {lack}")
    os.environ.update(cards.environment(card))
    # Engines call tools of this environment, such as ninja.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(f"card {card.index}: {card.name}, {card.total_mib} MiB, driver {card.driver}; looks at the rest", flush=True)
    if lacks := lacks_of_card(card) + lacks_of_machine(Machine.look()):
        sys.exit("\n".join(["Nothing was measured.", *(f"- {lack}" for lack in lacks)]))
    return card


def document_of(platform: systems.Platform, card: cards.Card | None, minutes: float) -> dict[str, Any]:
    hardware = f"with one {card.name}" if card else "without a card"
    fits = what_fits(card) if card else None
    return (
        record.about("benchmarks.gpu", hardware, platform.model)
        | load.loads(load.QUICK)
        | {
            "card": asdict(card) if card else None,
            "engine_args": platform.engine_args,
            "notes": [fits] if fits else [],
            "budget": minutes,
            "minutes": 0.0,
            "systems": [],
        }
    )


def write(document: dict[str, Any], result: Path, told: Path) -> None:
    record.write(document, result)
    told.write_text(page(document))


def run(
    document: dict[str, Any],
    some: dict[str, systems.System],
    visit: Callable[[str], Visit],
    budget: Budget,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Every system, as far as the time goes. What there is is kept after each, and when this program is ended in one."""
    for to_come, (name, system) in zip(reversed(range(len(some))), some.items(), strict=True):
        going = visit(name)
        document["systems"].append(going.found)
        try:
            going.run(system, budget, to_come)
        finally:
            document["minutes"] = budget.spent / 60
            keep(document)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all; rounds are left out to keep to it")
    parser.add_argument("--rounds", type=int, default=3, help="times that each load is put to each system, at most")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and RESULTS.md, in place of the repository's")
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    # The same program in small where there is no card: that it runs to its end, no figures.
    parser.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.cpu and options.out is None:
        sys.exit("--cpu measures nothing worth keeping: name a folder with --out.")
    platform, card = (systems.CPU, None) if options.cpu else (systems.CUDA, checked())
    if options.check:
        print("\n".join(["Nothing is missing.", *filter(None, [card and what_fits(card)])]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    result, told = (options.out / "gpu.json", options.out / "RESULTS.md") if options.out else (RESULT, PAGE)
    result.parent.mkdir(parents=True, exist_ok=True)
    budget, document = Budget(60 * options.minutes), document_of(platform, card, options.minutes)

    def say(line: str) -> None:
        print(f"[{budget.spent:4.0f} s] {line}", flush=True)

    with tempfile.TemporaryDirectory(prefix="qwen-") as folder:
        model = Path(folder)
        platform.write_model(model)
        some = systems.systems(platform, model, card)
        run(
            document,
            some,
            lambda name: Visit(name, card, str(model), options.rounds, say),
            budget,
            lambda document: write(document, result, told),
        )
    print(f"\n{summary(document)}\n{told} and {result} say more.")
    sys.exit(any("error" in found for found in document["systems"]))


if __name__ == "__main__":
    main()
