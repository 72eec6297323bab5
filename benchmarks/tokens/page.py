"""The page: a table per row, the targets, and what did not run."""

from benchmarks import cpu
from benchmarks.report import table, text
from benchmarks.streams import Wave
from benchmarks.tokens.figures import (
    DECODE,
    INGRESS,
    RATE,
    REQUESTS,
    SPEED,
    TARGETS,
    TTFT,
    Document,
    Figure,
    Run,
    cpu_ms,
    cpu_us,
    of,
    of_made,
    spread,
)
from benchmarks.tokens.rows import ROWS, Row

Column = tuple[str, Figure, int]
"""Its title, what it says of a run, and with how many digits."""
KINDS = (
    INGRESS, "HTTP proxy", DECODE, "Prefill replica", "Encoder replica", cpu.ENGINES, "API servers", cpu.OTHERS
)  # fmt: skip
SEEN: list[Column] = [
    ("speed ms", SPEED, 2),
    ("tokens/s", RATE, 0),
    ("requests/s", REQUESTS, 1),
    ("TTFT p50 ms", TTFT, 0),
]
STREAMED: list[Column] = [
    ("TPOT p50 ms", of("tpot_p50_ms"), 1),
    ("p99", of("tpot_p99_ms"), 1),
    ("pause p99 ms", of("gap_p99_ms"), 0),
    ("chunks per token", of("chunks_per_token"), 2),
]
AROUND: list[Column] = [
    ("clients, cores", lambda run: float(run["client_cpu_s"]) / float(run["took_s"]), 2),
    ("other programs, cores", of("other_cores"), 2),
]


def cost(row: Row, runs: list[Run]) -> list[Column]:
    """CPU time: of all processes, and by those kinds that spent any."""
    kinds = [kind for kind in KINDS if any(run["cpu_s"].get(kind, 0.0) > 0 for run in runs)]
    spent, unit, digits = (cpu_us, "µs per token", 0) if row.per == "token" else (cpu_ms, "ms per request", 1)
    by_kind = [(kind.removesuffix(" replica"), spent(kind), digits) for kind in kinds]
    return [(f"CPU {unit}", spent(), digits), *by_kind]


def columns(row: Row, runs: list[Run]) -> list[Column]:
    streamed = STREAMED if any(wave.tokens > 1 for wave in row.waves) else []
    made: list[Column] = [("of those made", of_made, 2)] if row.title == ROWS["a"].title else []
    return [*SEEN, *streamed, *made, *cost(row, runs), *AROUND]


def row_table(document: Document, row: Row) -> str:
    runs = [run for run in document["runs"] if run["system"] in row.systems and "error" not in run]
    shown = columns(row, runs)
    lines = []
    for wave in row.waves:
        for system in row.systems:
            failed = [run["failed"] for run in runs if run["system"] == system and Wave(**run["wave"]) == wave]
            if failed:
                figures = [text(spread(document, system, wave, figure), digits) for _, figure, digits in shown]
                lines.append([system, wave.name, *figures, f"{sum(failed)} of {len(failed) * wave.requests}"])
    return table(["system", "streams × tokens", *(title for title, _, _ in shown), "failed"], lines)


def page(document: Document, rows: dict[str, Row]) -> str:
    parts = [
        f"## {name}. {row.title}\n\n{row_table(document, row)}"
        for name, row in rows.items()
        if any(run["system"] in row.systems for run in document["runs"])
    ]
    if lines := [line for target in TARGETS if target.row in rows and (line := target.line(document))]:
        parts.append("## Targets\n\n" + table(["", "target", "found", ""], lines))
    failed = [run for run in document["runs"] if "error" in run]
    if errors := [f"- {run['system']}, round {run['round'] + 1}: {run['error']}" for run in failed]:
        parts.append("## Failed to run\n\n" + "\n".join(errors) + "\n")
    return "\n".join(parts)
