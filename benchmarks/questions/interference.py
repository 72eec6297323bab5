"""Texts stream all the time; pictures come, then a video and a prompt of 20,000 tokens. How long do tokens wait?"""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.questions import clients
from benchmarks.questions.model import SIDE
from benchmarks.questions.question import Document, Question, Run, Target, failure, order, ratio, runs_of, spread
from benchmarks.questions.systems import E_P_D, E_PD, ONE, TWO, System, arguments, engines, stages
from benchmarks.report import table, text
from benchmarks.streams import WORDS

TEXT = "text"
SECONDS, QUICK_S = 70.0, 50.0
TEXTS_PER_S, TEXT_TOKENS = 1.5, 256
PICTURES_EVERY_S, PICTURES, PICTURE_ANSWER = 2.0, 2, 32
PICTURES_FROM_S = 5.0
VIDEOS_AT, FRAMES = (0.45, 0.6), 16
LONG_AT, LONG_WORDS = 0.7, 19_500
"""Shares of the time that texts come."""
MAKER = "benchmarks.questions.interference:asks"
FINE = "one engine, fine steps"
STEP_TOKENS = {ONE: 512, FINE: 256, TWO: 512, E_PD: 256, E_P_D: 512}
"""In a step at most. In E+P+D the size does not matter to texts, so it is the larger."""
SHORT_AT_DECODE = {"kv": {"min_prompt_tokens": 256}}
"""The texts' prompts are short: decode prefills them, and they do not wait behind the long one."""
EACH_TOKEN = {"answers": {"chunk_interval_s": 0.0}}
"""As one engine sends them: what is asked is how evenly they come."""


def ours(name: str, **advanced: Any) -> System:
    return lambda folder: stages(folder, arguments(STEP_TOKENS[name]) | {"advanced": EACH_TOKEN | advanced}, name)


def plain(name: str, count: int = 1) -> System:
    return lambda folder: engines(folder, arguments(STEP_TOKENS[name]), count)


SYSTEMS: dict[str, System] = {
    ONE: plain(ONE),
    FINE: plain(FINE),
    TWO: plain(TWO, 2),
    E_PD: ours(E_PD),
    E_P_D: ours(E_P_D, **SHORT_AT_DECODE),
}


def asks(seed: int, seconds: float = SECONDS, large: bool = True) -> list[clients.Ask]:
    """The run's requests; ``seconds``: that texts come; ``large``: with videos and the long prompt. No two have a beginning
    in common."""
    from tools.harness.media import video_url

    said = random.Random(seed)

    def words(count: int) -> dict[str, Any]:
        return {"type": "text", "text": " ".join([str(said.random()), *said.choices(WORDS, k=count)])}

    def picture() -> dict[str, Any]:
        return clients.picture(said.getrandbits(40), SIDE)

    found = []
    at = 0.0
    while at < seconds:
        found.append(clients.Ask(at, TEXT, clients.chat([words(40)], TEXT_TOKENS)))
        at += said.expovariate(TEXTS_PER_S)
    at = PICTURES_FROM_S
    while at < seconds:
        content = [*(picture() for _ in range(PICTURES)), words(20)]
        found.append(clients.Ask(at, "pictures", clients.chat(content, PICTURE_ANSWER)))
        at += PICTURES_EVERY_S
    for share in VIDEOS_AT if large else ():
        url = video_url(said.getrandbits(20), FRAMES, (SIDE, SIDE))
        content = [{"type": "video_url", "video_url": {"url": url}}, words(20)]
        found.append(clients.Ask(share * seconds, "video", clients.chat(content, PICTURE_ANSWER)))
    if large:
        long = clients.chat([words(LONG_WORDS)], PICTURE_ANSWER)
        found.append(clients.Ask(LONG_AT * seconds, "long prompt", long))
    return sorted(found, key=lambda each: each.at)


def visit(name: str, round_: int, load: dict[str, Any]) -> Run:
    found: Run = {"system": name, "round": round_}
    try:
        with tempfile.TemporaryDirectory(prefix="texts-") as folder, SYSTEMS[name](Path(folder)) as server:
            warm_up = {"seed": 10_000 + round_, "seconds": 8.0, "large": False}
            _, run = clients.drive(server.url, server.mark, MAKER, [warm_up, load], Path(folder) / "clients.log")
            return found | compact(run)
    except Exception as error:  # one system's failure is a result, not the end of the others'
        return found | failure(error)


def compact(run: Run) -> Run:
    """Without the single requests: what of each kind failed, and its TTFT."""
    requests = run.pop("requests")
    kinds = dict.fromkeys(each["kind"] for each in requests)
    of = {kind: [each for each in requests if each["kind"] == kind] for kind in kinds}
    return run | {
        "asked": {kind: len(each) for kind, each in of.items()},
        "failed": {kind: sum("failed" in one for one in each) for kind, each in of.items()},
        "errors": sorted({one["failed"] for each in of.values() for one in each if "failed" in one})[:3],
        "ttft_s": {kind: sorted(one["ttft"] for one in each if "failed" not in one) for kind, each in of.items()},
    }


def measure(round_: int, quick: bool) -> Iterator[Run]:
    for name in order([ONE, E_P_D] if quick else list(SYSTEMS), round_):
        yield visit(name, round_, {"seed": round_, "seconds": QUICK_S if quick else SECONDS})


# ---- the answer


def gap(name: str) -> Callable[[Run], float]:
    """Of all times between tokens of the texts, in ms."""
    return lambda run: float(run["gaps_ms"][TEXT][name])


def ttft_s(run: Run) -> float:
    return float(run["ttft_s"][TEXT][-1])


def long_s(run: Run) -> float:
    return float(run["ttft_s"]["long prompt"][-1])


COLUMNS = ("p50", "p99", "p999", "worst")


def answer(document: Document) -> str:
    systems = [name for name in SYSTEMS if runs_of(document, name)]
    rows = [
        [
            name,
            *(text(spread(document, name, gap(each)), 0) for each in COLUMNS),
            text(spread(document, name, ttft_s), 1),
            failed(document, name),
        ]
        for name in systems
    ]
    shares = {name: ratio(document, name, ONE, gap("p999")) for name in systems if name not in (ONE, FINE)}
    told = ", ".join(f"{text(found)} × in {name}" for name, found in shares.items())
    return (
        f"The slowest of a thousand tokens of the texts waits, of what it waits in one engine, {told}. An engine by "
        "itself stops for every picture that it encodes and every piece of a long prompt, a second one beside it changes "
        "how often, not how long; E+PD stops for prefill; in E+P+D decode stops for nothing, and short prompts, which "
        "decode prefills by itself (`min_prompt_tokens`), do not stand behind the long one. That one pays: its first "
        f"token comes after {text(spread(document, E_P_D, long_s), 0)} s, not {text(spread(document, ONE, long_s), 0)}, as "
        "encoder and prefill share a core here.\n\n"
        + table(["time between tokens, ms", "p50", "p99", "p99.9", "worst", "worst TTFT of a text, s", "failed"], rows)
    )


def failed(document: Document, name: str) -> str:
    runs = runs_of(document, name)
    return f"{sum(sum(run['failed'].values()) for run in runs)} of {sum(sum(run['asked'].values()) for run in runs)}"


def plot(document: Document, figure: Any) -> None:
    axis = figure.subplots()
    systems = [name for name in SYSTEMS if runs_of(document, name)]
    for place, column in enumerate(COLUMNS):
        for index, name in enumerate(systems):
            found = spread(document, name, gap(column))
            assert found
            error = [[found.median - found.least], [found.most - found.median]]
            shown = max(found.median, 1.0)
            bar = axis.bar(
                place + 0.2 * index - 0.3, shown, 0.19, yerr=error, color=f"C{index}", label=name if not place else None
            )
            axis.bar_label(bar, [f"{found.median:.0f}"], fontsize=7)
    axis.set_xticks(range(len(COLUMNS)), ["p50", "p99", "p99.9", "worst"])
    axis.set(yscale="log", ylabel="time between tokens of texts, ms")
    axis.legend(ncols=4, fontsize=8)


QUESTION = Question(
    name="interference",
    title="What do pictures, videos and long prompts do to others' answers?",
    measure=measure,
    answer=answer,
    plot=plot,
    targets=(
        Target(
            f"p99.9 of texts' time between tokens, E+P+D against one engine with steps of {STEP_TOKENS[ONE]}",
            0.2,
            False,
            lambda document: ratio(document, E_P_D, ONE, gap("p999")),
        ),
        Target(
            f"the same against one engine with steps of {STEP_TOKENS[FINE]} tokens",
            0.2,
            False,
            lambda document: ratio(document, E_P_D, FINE, gap("p999")),
        ),
    ),
    setting=(
        f"Texts of {TEXT_TOKENS} tokens begin {TEXTS_PER_S:g} times a second for {SECONDS:g} s; beside them come two "
        f"pictures every {PICTURES_EVERY_S:g} s, two videos of {FRAMES} frames, and a prompt of 20,000 tokens."
    ),
)
