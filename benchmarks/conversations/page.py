"""The page: a table per load, the targets, and what did not run."""

from benchmarks.conversations.figures import (
    PREFIX,
    RATE,
    TTFT,
    TWO_CHOICES,
    Document,
    Figure,
    against,
    cached,
    cached_share,
    cells,
    cores,
    cpu_s,
    most_work,
    of,
    own,
    rate_by_speed,
    ratio,
    runs,
    spread,
    ttft_by_speed,
)
from benchmarks.report import table, text

COLUMNS: list[tuple[str, Figure, int]] = [
    ("cached of the prompt", cached_share, 2),
    ("cached tokens per request", cached, 0),
    ("TTFT p50 ms", TTFT, 0),
    ("p90", of("ttft_p90_ms"), 0),
    ("p99", of("ttft_p99_ms"), 0),
    ("requests/s", RATE, 2),
    ("most work of a prefill by the mean", most_work, 2),
    ("CPU-s per request", cpu_s, 2),
    ("cores", cores, 2),
    ("clients, cores", lambda run: float(run["client_cpu_s"]) / float(run["took_s"]), 2),
    ("other programs, cores", of("other_cores"), 2),
    ("speed ms", of("speed_ms"), 2),
    ("TTFT p50 by speed", ttft_by_speed, 0),
    ("requests by speed", rate_by_speed, 1),
]
SMALL = "small caches"
TARGETS = [
    against("cached tokens", 2.5, True, ("conversations", SMALL), cached),
    against("TTFT p50 by speed", 0.6, False, ("conversations", SMALL), ttft_by_speed),
    own("most work of a prefill by the mean", 1.5, ("conversations", SMALL), most_work),
    against("cached tokens", 2.5, True, ("more conversations", SMALL), cached),
    against("TTFT p50 by speed", 0.6, False, ("more conversations", SMALL), ttft_by_speed),
    own("most work of a prefill by the mean", 1.5, ("more conversations", SMALL), most_work),
    against("TTFT p50 by speed", 1.03, False, ("no reuse", SMALL), ttft_by_speed),
    against("requests by speed", 0.97, True, ("no reuse", SMALL), rate_by_speed),
    against("TTFT p50 by speed", 1.03, False, ("no reuse, calm", SMALL), ttft_by_speed),
    own("most work of a prefill by the mean", 1.5, ("hot prefix", SMALL), most_work),
    against("TTFT p50 by speed", 1.03, False, ("hot prefix", SMALL), ttft_by_speed),
]


def page(document: Document) -> str:
    lines = []
    for cell in cells(document):
        for arm in (TWO_CHOICES, PREFIX):
            if found := runs(document, arm, cell):
                figures = [text(spread(document, arm, cell, figure), digits) for _, figure, digits in COLUMNS]
                failed = sum(run["failed"] for run in found.values())
                lines.append([", ".join(cell), arm, *figures, str(failed)])
        if ratio(document, cell, TTFT):
            lines.append([", ".join(cell), "ratio", *(text(ratio(document, cell, f)) for _, f, _ in COLUMNS), ""])
    parts = [table(["load", "router", *(title for title, _, _ in COLUMNS), "failed"], lines)]
    if targets := [line for target in TARGETS if (line := target.line(document))]:
        parts.append("## Targets\n\n" + table(["", "target", "found", ""], targets))
    failed = [run for run in document["runs"] if "error" in run]
    if errors := [f"- {run['arm']}, {run['caches']}, round {run['round'] + 1}: {run['error']}" for run in failed]:
        parts.append("## Failed to run\n\n" + "\n".join(errors) + "\n")
    return "\n".join(parts)
