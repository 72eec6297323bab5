"""What a run on a card found: the page, and its first table for the console."""

from collections.abc import Iterable
from typing import Any

from benchmarks import report
from benchmarks.gpu import rounds as rounds_of
from benchmarks.gpu.answers import NEAR_TIE, Answer, Comparison, compare
from benchmarks.gpu.probe import SLACK
from benchmarks.load import TARGET, Cell

Document = dict[str, Any]
Found = dict[str, Any]

INTRODUCTION = """\
# One card

Written by `benchmarks/gpu/page.py` from `gpu.json` ({command}). {card}; {cpus} cores ({processor}); model: {model};
{versions}. It took {minutes:.1f} of {budget:g} minutes.

The systems ran one after the other, each with the card to itself, on the same requests: one engine is vLLM's own server.
Engine arguments of all: `{engine_args}`. Seeds: {seeds}. Images of {image_size}×{image_size}, {text_tokens} text tokens.
"""
ANSWERS = """\
## Answers

Greedy tokens, one request at a time, against one engine's. `near-tie`: at the first difference one engine itself had a
second token within {near_tie} nats, which the rounding of bfloat16 decides. Noise is the most that the log-probabilities of
equal tokens differ by.
"""
MEMORY = """\
## Memory of the card

An engine may have its share and {slack:.0%} of it besides. Where the driver names no processes, as in a container, there is
only what is in use of the card with all engines up.
"""


def by_rounds(document: Document) -> Document:
    """The document as ``benchmarks.report`` reads it: a visit for each round."""
    visits = [
        {"system": found["system"], "round": round_, "runs": runs}
        for found in document["systems"]
        for round_, runs in enumerate(found["rounds"])
    ]
    return {"visits": visits}


def comparisons(document: Document, found: Found) -> dict[str, Comparison]:
    """By prompt; empty for one engine, and where one of the two has no answers."""
    one = next((each.get("answers", {}) for each in document["systems"] if each["system"] == rounds_of.ONE), {})
    if found["system"] == rounds_of.ONE:
        return {}
    ours = found.get("answers", {})
    return {name: compare(Answer(**ours[name]), Answer(**one[name])) for name in one if name in ours}


def answered(found: Iterable[Comparison]) -> str:
    verdicts = [each.verdict for each in found]
    if not verdicts:
        return "–"
    counts = [(verdicts.count(kind), kind) for kind in ("near-tie", "**different**")]
    rest = "".join(f", {count} {kind}" for count, kind in counts if count)
    return f"{verdicts.count('equal')} of {len(verdicts)} equal{rest}"


def summary_rows(document: Document) -> list[list[str]]:
    rounds = by_rounds(document)
    rows = []
    for found in document["systems"]:
        name = found["system"]
        started = f"{found['start_s']:.0f}" if "start_s" in found else "–"
        runs = [run for each in found["rounds"] for run in each]
        failed = f"{sum(run['failed'] for run in runs)} of {sum(run['requests'] for run in runs)}" if runs else "–"
        figures = [
            report.text(
                report.Spread.of(list(rounds_of.values(rounds_of.runs(rounds, name, TARGET), metric).values())), digits
            )
            for metric, digits in (
                (rounds_of.RATE, 1),
                (rounds_of.TTFT[0], 0),
                (rounds_of.TTFT[2], 0),
                (rounds_of.TPOT, 1),
            )
        ]
        state = found.get("error", "").partition(":")[0] or ("measured" if found["rounds"] else "not measured")
        rows.append([name, state, started, answered(comparisons(document, found).values()), *figures, failed])
    return rows


def summary(document: Document) -> str:
    header = ["system", "", "ready after s", "answers", "requests/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT ms", "failed"]
    return report.table(header, summary_rows(document))


def answer_rows(document: Document) -> list[list[str]]:
    rows = []
    for found in document["systems"]:
        for prompt, each in comparisons(document, found).items():
            margin = "" if each.margin is None else f"{each.margin:.3f}"
            equal = f"{each.equal} of {each.tokens}"
            rows.append([found["system"], prompt, each.verdict, equal, margin, f"{each.noise:.4f}"])
    return rows


def memory_rows(document: Document) -> list[list[str]]:
    card = document["card"]
    rows = []
    for found in document["systems"]:
        for stage, share in found.get("shares", {}).items():
            allowed, used = share * card["total_mib"], found["memory_mib"].get(stage)
            state = "not told" if used is None else "**over**" if used > allowed * (1 + SLACK) else "within"
            rows.append([found["system"], stage, "–" if used is None else str(used), f"{allowed:.0f}", state])
        if "card_mib" in found:
            used, allowed = (
                found["card_mib"] - found["card_before_mib"],
                sum(found["shares"].values()) * card["total_mib"],
            )
            rows.append([found["system"], "the card", str(used), f"{allowed:.0f}", ""])
    return rows


def transfer_lines(found: Found) -> list[str]:
    lines = []
    if kv := found.get("kv"):
        count, megabytes, seconds = kv["count"] or 1, kv["bytes"] / 1e6, kv["seconds"]
        speed = f"{megabytes / seconds:.0f} MB/s" if seconds else "no time measured"
        lines.append(
            f"KV: {kv['count']:.0f} hand-offs of {megabytes / count:.1f} MB in {1e3 * seconds / count:.1f} ms each, "
            f"{speed}, {kv['failed']:.0f} failed; transports by UCX: {', '.join(found['transports']) or 'not told'}. "
            "NIXL's clock stops with the engine's next step, so they took less."
        )
    for stage, moved in found.get("embeddings", {}).items():
        items = [
            f"{value:.0f} {name}"
            for name, value in moved.items()
            if value and "bytes" not in name and "seconds" not in name
        ]
        sizes = [
            f"{value / 1e6:.1f} MB {name.removesuffix(' bytes')}" for name, value in moved.items() if "bytes" in name
        ]
        read = f"{1e3 * moved['load seconds'] / moved['loaded']:.1f} ms per read" if moved.get("loaded") else ""
        lines.append(f"Embeddings, {stage}: {', '.join(filter(None, [*items, *sizes, read]))}.")
    return lines


def load_parts(document: Document) -> list[str]:
    rounds = by_rounds(document)
    systems = rounds_of.systems_of(rounds)
    header = ["system", *(metric.title for metric in rounds_of.METRICS), "failed", "answers as one engine's"]
    parts = []
    for cell in dict.fromkeys(Cell(**run["cell"]) for visit in rounds["visits"] for run in visit["runs"]):
        done = ", ".join(f"{name} {len(rounds_of.runs(rounds, name, cell))}" for name in systems)
        parts += [
            f"## {cell.name}\n\nRounds: {done}.\n",
            report.table(header, rounds_of.cell_rows(rounds, systems, cell)),
        ]
        if rows := rounds_of.ratio_rows(rounds, systems, cell):
            parts.append(report.table(["ratio", *(metric.title for metric in rounds_of.COMPARED)], rows))
    return parts


def page(document: Document) -> str:
    facts = document["machine"] | document["workload"] | document
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    card = document["card"]
    facts["card"] = f"{card['name']}, {card['total_mib']} MiB, driver {card['driver']}" if card else "no card"
    parts = [INTRODUCTION.format(**facts), *(f"{note}\n" for note in document["notes"]), summary(document)]
    starts = [
        f"- {found['system']}, {stage}: " + ", ".join(f"{name} {seconds:g} s" for name, seconds in times.items())
        for found in document["systems"]
        for stage, times in found.get("phases", {}).items()
    ]
    if starts:
        parts += ["## Start-up\n", "\n".join(starts) + "\n"]
    if rows := answer_rows(document):
        header = ["system", "prompt", "", "equal tokens", "margin there", "noise"]
        parts += [ANSWERS.format(near_tie=NEAR_TIE), report.table(header, rows)]
    if rows := memory_rows(document):
        parts += [MEMORY.format(slack=SLACK), report.table(["system", "engine", "MiB", "its share, MiB", ""], rows)]
    moved = [f"- {found['system']}. {line}" for found in document["systems"] for line in transfer_lines(found)]
    if moved:
        parts += ["## What moved\n", "\n".join(moved) + "\n"]
    parts += load_parts(document)
    for found in document["systems"]:
        if "ending" in found:
            parts.append(f"{found['system']} did not end as it should: {found['ending']}\n")
        if "error" in found:
            log = "\n".join(found.get("log", []))
            parts += [f"## What went wrong: {found['system']}\n\n{found['error']}\n", f"```\n{log}\n```\n"]
    return "\n".join(parts)
