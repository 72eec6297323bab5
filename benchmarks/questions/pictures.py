"""Pictures as people send them: large, as JPEG or PNG, in the request or by an address; each is another.

One picture, 50 words, 8 tokens of answer, 4 requests at a time, on the built-in model of random weights, which makes any
picture 256 tokens: what it takes to fetch, decode and shrink a picture outweighs all else.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from benchmarks.baselines.ray_llm import ray_llm
from benchmarks.questions import photos
from benchmarks.questions.clients import Ask, chat, drive
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, ratio, runs_of, spread
from benchmarks.questions.systems import E_P_D, E_PD, ONE, REFERENCE, System
from benchmarks.report import table, text
from benchmarks.streams import share
from benchmarks.systems import ours, reference
from serve_app.launch.connectors import free_ports
from serve_app.routing.handles import LIGHT_BYTES
from tools.harness.servers import Server, start, vllm_server

PEER = "Ray Serve LLM"
"""Its prefill and decode, where what they need is installed (`benchmarks/baselines/ray_llm.py`)."""
FETCHES = {"media": {"allow_private_addresses": True}}
"""The pictures' server is on loopback."""
SYSTEMS: dict[str, System] = {
    REFERENCE: reference,
    ONE: lambda folder: vllm_server(folder, {}),
    E_PD: lambda folder: ours(folder, FETCHES | {"prefill": None}),
    E_P_D: lambda folder: ours(folder, FETCHES),
    PEER: ray_llm,
}
TOKENS = 8
AT_A_TIME = 4
WARM_UP = 8
"""Requests that are not measured."""
WORDS = " ".join(["what", "is", "in", "this", "picture", "and", "where", "was", "it", "taken"] * 5)


@dataclass(frozen=True)
class Load:
    picture: str
    requests: int
    address: str = ""
    """Of the pictures' server; empty: pictures come in the request."""
    first: int = 0
    """The first picture's number."""
    at_a_time: int = AT_A_TIME

    @property
    def by(self) -> str:
        return "http" if self.address else "data URL"


COUNTS = {"1080p JPEG": 80, "1080p PNG": 24, "12 MP JPEG": 24, "12 MP PNG": 12}
"""Requests of a run: ten seconds or so."""
HEADLINE = {"picture": "1080p JPEG", "by": "data URL"}
CELLS = [*((kind, "data URL") for kind in COUNTS), ("1080p JPEG", "http"), ("12 MP JPEG", "http")]


def make(picture: str, requests: int, address: str, first: int) -> list[Ask]:
    """The requests of a load. Runs in the clients' process."""

    def body(number: int) -> bytes:
        url = f"{address}/{picture}/{number}".replace(" ", "%20") if address else photos.url(picture, number)
        return chat([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": WORDS}], TOKENS)

    return [Ask(0.0, picture, body(number)) for number in range(first, first + requests)]


def loopback_bytes() -> int:
    """Bytes that have come through the loopback interface, headers included, of all programs of this machine."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_recv)


def stored_bytes(name: str, load: Load) -> int:
    """What goes from the ingress to an encoder in Ray's object store: each large picture, once. Known by its size."""
    size = len(photos.picture(load.picture, load.first))
    return load.requests * size if name in (E_PD, E_P_D) and size > LIGHT_BYTES else 0


def asked_bytes(load: Load) -> int:
    options = asdict(load)
    del options["at_a_time"]
    return sum(len(each.body) for each in make(**options))


def under(server: Server, load: Load, log: Path) -> Run:
    """A run, with the bytes that crossed between processes beside what the clients sent."""
    sent, before = asked_bytes(load), loopback_bytes()
    (run,) = drive(server.url, server.mark, f"{__name__}:make", [load], log, 240.0)
    return summary(run, load) | {"tcp_bytes": loopback_bytes() - before - sent}


def summary(run: Run, load: Load) -> Run:
    """Of a run, what a document keeps."""
    fine = [each for each in run["requests"] if "failed" not in each]
    ttfts = [each["ttft"] for each in fine] or [0.0]
    return {
        "picture": load.picture,
        "by": load.by,
        "asked": load.requests,
        "answered": len(fine),
        "failed": next((each["failed"] for each in run["requests"] if "failed" in each), ""),
        "seconds": max(each["at"] + each["took"] for each in run["requests"]),
        "ttft_p50": share(ttfts, 50),
        "ttft_p99": share(ttfts, 99),
        "picture_bytes": len(photos.picture(load.picture, load.first)),
        "texts": " ".join(sorted(each["text"][-4:] for each in fine)),
        **{key: run[key] for key in ("cpu_s", "client_cpu_s", "other_cores", "speed_ms")},
    }


def visit(name: str, round_: int, cells: list[tuple[str, str]]) -> Iterator[Run]:
    """A system in a round. Where it fails, that is a result, and not the end of the others'."""
    where: Run = {"system": name, "round": round_}
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.questions.photos", str(port)]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="pictures-") as folder,
            start(command, port, Path(folder) / "photos.log") as pictures,
            SYSTEMS[name](Path(folder)) as server,
        ):
            log, first = Path(folder) / "clients.log", 0
            for kind, by in cells:
                if name == PEER and (kind, by) != tuple(HEADLINE.values()):
                    continue
                address = pictures.url if by == "http" else ""
                warm = Load(kind, WARM_UP, address, first)
                drive(server.url, server.mark, f"{__name__}:make", [warm], log, 240.0)
                load = Load(kind, COUNTS[kind], address, first + WARM_UP)
                first += WARM_UP + COUNTS[kind]
                yield where | under(server, load, log) | {"stored_bytes": stored_bytes(name, load)}
    except Exception as error:
        yield where | failure(error)


def measure(round_: int, quick: bool) -> Iterator[Run]:
    installed = [name for name in SYSTEMS if name != PEER or find_spec("pyarrow")]
    names = [REFERENCE, E_PD] if quick else installed
    cells = [(HEADLINE["picture"], HEADLINE["by"])] if quick else CELLS
    for name in order(names, round_):
        yield from visit(name, round_, cells)


def rate(run: Run) -> float:
    return float(run["answered"] / run["seconds"])


def ttft_ms(percent: int) -> Callable[[Run], float]:
    return lambda run: float(1000 * run[f"ttft_p{percent}"])


def cpu_ms(run: Run) -> float:
    """Of all processes but the clients', per request."""
    return float(1000 * sum(run["cpu_s"].values()) / max(run["answered"], 1))


def cpu_ms_of(kind: str) -> Callable[[Run], float]:
    return lambda run: float(1000 * run["cpu_s"].get(kind, 0.0) / max(run["answered"], 1))


def times_sent(run: Run) -> float:
    """Bytes between processes, in sizes of the picture."""
    return float((run["tcp_bytes"] + run["stored_bytes"]) / run["asked"] / run["picture_bytes"])


def same_answers(document: Document, name: str) -> str:
    """How many answers are one engine's: all decode greedily."""
    same = told = 0
    for run in runs_of(document, name):
        for other in runs_of(document, ONE, round=run["round"], picture=run["picture"], by=run["by"]):
            same += (Counter(run["texts"].split()) & Counter(other["texts"].split())).total()
            told += other["answered"]
    return f"{same} of {told}"


def cells(document: Document) -> list[dict[str, str]]:
    told = [{"picture": kind, "by": by} for kind, by in CELLS]
    return [cell for cell in told if any(runs_of(document, name, **cell) for name in SYSTEMS)]


def answer(document: Document) -> str:
    def one(name: str, figure: Callable[[Run], float], digits: int) -> str:
        return text(spread(document, name, figure, **HEADLINE), digits)

    names = [name for name in SYSTEMS if runs_of(document, name)]
    runs = [run for name in names for run in runs_of(document, name)]
    failed = sum(run["asked"] - run["answered"] for run in runs)
    rates = ", ".join(f"{name} {one(name, rate, 1)}" for name in names)
    times = " and ".join(
        f"{name} {text(ratio(document, name, REFERENCE, rate, **HEADLINE))} times"
        for name in names
        if name in (E_PD, E_P_D) and REFERENCE in names
    )
    same = f", and of E+PD's answers {same_answers(document, E_PD)} are one engine's" if ONE in names else ""
    sentences = (
        f"With a JPEG of 1920×1080 in each request, requests/s are: {rates}{times and f'; against the reference {times}'}. "
        f"A request costs {one(E_PD, cpu_ms, 0)} ms of CPU in E+PD and {one(REFERENCE, cpu_ms, 0)} in the reference, which "
        f"decodes each picture three times; between processes the picture's bytes go {one(E_PD, times_sent, 1)} times in "
        f"E+PD and {one(REFERENCE, times_sent, 1)} times in the reference. "
        f"{failed or 'None'} of {sum(run['asked'] for run in runs)} requests failed{same}."
    )

    def figures(name: str, cell: dict[str, str]) -> str:
        found = [spread(document, name, figure, **cell) for figure in (rate, ttft_ms(50), ttft_ms(99))]
        medians = [each.median for each in found if each]
        return f"{medians[0]:.1f}; {medians[1]:.0f}, {medians[2]:.0f}" if medians else "–"

    rows = [[f"{cell['picture']}, {cell['by']}", *(figures(name, cell) for name in names)] for cell in cells(document)]
    return sentences + "\n\n" + table(["requests/s; TTFT p50, p99 (ms)", *names], rows)


def plot(document: Document, figure: Any) -> None:
    """Requests/s by kind of picture; CPU time of a request by kind of process."""
    names = [name for name in SYSTEMS if runs_of(document, name)]
    rates, costs = figure.subplots(1, 2, width_ratios=[3, 2])
    shown = [cell for cell in cells(document) if cell["by"] == HEADLINE["by"]]
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        found = [spread(document, name, rate, **cell) for cell in shown]
        at = [index + (place - (len(names) - 1) / 2) * width for index in range(len(shown))]
        medians = [each.median if each else 0.0 for each in found]
        bars = rates.bar(at, medians, width, label=name)
        rates.bar_label(bars, [f"{value:.1f}" for value in medians], fontsize=7)
    rates.set_xticks(range(len(shown)), [cell["picture"] for cell in shown])
    rates.set(ylabel="requests/s", title="4 at a time, one picture each")
    rates.margins(y=0.25)
    rates.legend(fontsize=8, ncols=2)
    base = [0.0] * len(names)
    for kind in kinds(document, names):
        part = [spread(document, name, cpu_ms_of(kind), **HEADLINE) for name in names]
        values = [each.median if each else 0.0 for each in part]
        costs.bar(range(len(names)), values, bottom=base, label=kind)
        base = [below + value for below, value in zip(base, values, strict=True)]
    costs.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    costs.set(ylabel="CPU-ms per request", title=HEADLINE["picture"])
    costs.set_ylim(top=1.4 * max(base, default=1.0) or 1.0)
    costs.legend(fontsize=7, ncols=2)


def kinds(document: Document, names: list[str]) -> list[str]:
    """Of processes, those first that spend most."""
    spent: dict[str, float] = {}
    for name in names:
        for run in runs_of(document, name, **HEADLINE):
            for kind, seconds in run["cpu_s"].items():
                spent[kind] = spent.get(kind, 0.0) + seconds
    return sorted(spent, key=lambda kind: -spent[kind])


QUESTION = Question(
    name="pictures",
    title="Pictures as people send them",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target(
            "1080p JPEGs: requests/s of E+PD against the reference's",
            1.5,
            True,
            lambda document: ratio(document, E_PD, REFERENCE, rate, **HEADLINE),
        ),
    ),
    setting=(
        "One picture that no other request has, 50 words, 8 tokens of answer, 4 requests at a time, on the built-in model "
        "of random weights; bytes between processes are what passes the loopback interface beside what clients send, and "
        "pictures above 1 MiB in Ray's object store, without the sockets between an engine and its own server."
    ),
)
