"""Plots of ``tools/sim/results/simulation.json``. Every one says where its service times are from."""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from serve_app.stage import Stage

Rows = list[dict[str, Any]]
MEASURES = {
    "good": "share of requests within the SLO",
    "ttft_p50_s": "TTFT p50 (s)",
    "ttft_p99_s": "TTFT p99 (s)",
    "gpu_s_per_good": "GPU-seconds per request within the SLO",
}


def draw(document: dict[str, Any], folder: Path) -> None:
    rows, note = document["rows"], "service times " + document["service_times"]["note"]
    plots = {"routing": lines, "scale": lines, "burst": over_time, "day": over_time, "prefix": by_traffic}
    for experiment, plot in plots.items():
        plot([row for row in rows if row["experiment"] == experiment], experiment, note, folder / f"{experiment}.png")


def by_strategy(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["strategy"], []).append(row)
    return found


def lines(rows: Rows, title: str, note: str, path: Path) -> None:
    """Each measure over the size: the mean of the seeds, and a bar from the least to the most of them."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (measure, label) in zip(axes.flat, MEASURES.items(), strict=True):
        for strategy, of_it in by_strategy(rows).items():
            sizes = sorted({row["size"] for row in of_it})
            spread(axis, of_it, measure, sizes, lambda row: row["size"], strategy)
        axis.set_xscale("log")
        axis.set_xlabel("replicas per stage")
        axis.set_ylabel(label)
        if measure != "good":
            axis.set_yscale("log")
    axes.flat[0].legend(fontsize=8)
    finish(figure, title, note, path)


def spread(
    axis: Any, rows: Rows, measure: str, keys: list[int], key: Callable[[dict[str, Any]], int], label: str
) -> None:
    values = [[row[measure] for row in rows if key(row) == each] for each in keys]
    means = [sum(each) / len(each) for each in values]
    low = [mean - min(each) for mean, each in zip(means, values, strict=True)]
    high = [max(each) - mean for mean, each in zip(means, values, strict=True)]
    axis.errorbar(keys, means, yerr=[low, high], label=label, marker="o", markersize=4, capsize=3)


def over_time(rows: Rows, title: str, note: str, path: Path) -> None:
    """Load, and the replicas of those whose timeline was kept; what it came to, of all seeds."""
    scaled = [row for row in rows if "timeline" in row]
    figure = pyplot.figure(figsize=(12, 8), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(3, 2))
    load = figure.add_subplot(grid[0, 0])
    load.plot(scaled[0]["timeline"]["at_s"], scaled[0]["timeline"]["per_s"], color="black")
    load.set_ylabel("requests per second")
    for place, row in enumerate(scaled, 1):
        axis = figure.add_subplot(grid[place, 0], sharex=load)
        for stage in Stage:
            axis.step(row["timeline"]["at_s"], row["timeline"][stage], where="post", label=stage)
        axis.set_ylabel("replicas")
        axis.set_title(row["strategy"], fontsize=9)
        axis.legend(fontsize=8)
        axis.set_xlabel("seconds")
    for place, measure in enumerate(("good", "ttft_p99_s", "gpu_s_per_good")):
        axis = figure.add_subplot(grid[place, 1])
        for strategy, of_it in by_strategy(rows).items():
            values = [row[measure] for row in of_it]
            mean = sum(values) / len(values)
            error = [[mean - min(values)], [max(values) - mean]]
            axis.barh(fill(strategy, 20), mean, xerr=error, capsize=3)
        axis.set_xlabel(MEASURES[measure])
        axis.tick_params(axis="y", labelsize=8)
        axis.invert_yaxis()
    finish(figure, title, note, path)


def by_traffic(rows: Rows, title: str, note: str, path: Path) -> None:
    """A row of plots for each traffic, in each both rules over the number of replicas and of ingress replicas."""
    measures = {
        "cached": "share of tokens cached",
        "ttft_p50_s": MEASURES["ttft_p50_s"],
        "ttft_p99_s": MEASURES["ttft_p99_s"],
        "most_work": "most work / mean work",
    }
    traffics = list(dict.fromkeys(row["traffic"] for row in rows))
    figure, axes = pyplot.subplots(len(traffics), len(measures), figsize=(14, 3 * len(traffics)), layout="constrained")
    for line, traffic in zip(axes, traffics, strict=True):
        of_it = [row for row in rows if row["traffic"] == traffic]
        keys = sorted({(row["size"], ingresses(row)) for row in of_it})
        places = {key: place for place, key in enumerate(keys)}
        for axis, (measure, label) in zip(line, measures.items(), strict=True):
            for rule in ("by prefix", "two choices"):
                ruled = [row for row in of_it if row["strategy"].startswith(rule)]
                spread(axis, placed(ruled, places), measure, [*places.values()], lambda row: row["place"], rule)
            axis.set_xticks(range(len(keys)), [f"{size}\n{of}" for size, of in keys], fontsize=8)
            axis.set_ylabel(label, fontsize=8)
            axis.set_ylim(bottom=0)
        line[0].set_title(traffic, fontsize=9)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("replicas, below: ingress replicas", fontsize=9)
    finish(figure, title, note, path)


def placed(rows: Rows, places: dict[tuple[int, int], int]) -> Rows:
    return [row | {"place": places[row["size"], ingresses(row)]} for row in rows]


def ingresses(row: dict[str, Any]) -> int:
    return int(row["strategy"].split()[2])


def finish(figure: Any, title: str, note: str, path: Path) -> None:
    figure.suptitle(f"{title}: simulated, {note}", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
