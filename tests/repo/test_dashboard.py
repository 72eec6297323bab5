"""dashboards/grafana.json: imports cleanly, and asks for metrics and labels that are exported."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
from prometheus_client import REGISTRY
from pydantic import BaseModel, ConfigDict, Field

from serve_app.observe.engine_metrics import PageLogger
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.metrics import PREFIXES
from serve_app.stage import Stage
from tests.unit.metrics_of import names_of

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "dashboards" / "grafana.json").read_text())

RAYS_OWN = {
    "ray_serve_autoscaling_target_replicas": {"application", "deployment"},
    "ray_serve_deployment_replica_healthy": {"application", "deployment"},
    "ray_serve_deployment_queued_queries": {"application", "deployment", "handle"},
    "ray_serve_num_ongoing_requests_at_replicas": {"application", "deployment", "handle"},
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_gram_used": {"GpuIndex"},
}
"""What Ray counts by itself, with the labels that are used."""

SERVES = {"application", "deployment", "replica"}
"""Labels that Serve adds to the metrics of a replica."""

FUNCTIONS = {"sum", "max", "rate", "histogram_quantile"}


# ---- what Grafana needs to import it


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Datasource(BaseModel):
    type: Literal["prometheus"]
    uid: Literal["${DS_PROMETHEUS}"]


class GridPos(BaseModel):
    h: int = Field(ge=1)
    w: int = Field(ge=1, le=24)
    x: int = Field(ge=0)
    y: int = Field(ge=0)


class Target(Open):
    refId: str
    expr: str
    legendFormat: str
    datasource: Datasource


class Row(Open):
    type: Literal["row"]
    id: int
    title: str
    gridPos: GridPos
    collapsed: Literal[False]
    panels: list[Any] = Field(max_length=0)


class TimeSeries(Open):
    type: Literal["timeseries"]
    id: int
    title: str
    gridPos: GridPos
    datasource: Datasource
    fieldConfig: dict[Literal["defaults", "overrides"], Any]
    options: dict[str, Any]
    targets: list[Target] = Field(min_length=1)


class QueryVariable(Open):
    type: Literal["query"]
    name: str
    datasource: Datasource
    query: dict[Literal["query", "refId"], str]
    refresh: Literal[1, 2]


class CustomVariable(Open):
    type: Literal["custom"]
    name: str
    query: str
    options: list[dict[str, Any]]


class Input(Open):
    name: Literal["DS_PROMETHEUS"]
    label: str
    type: Literal["datasource"]
    pluginId: Literal["prometheus"]


class Templating(BaseModel):
    list: list[QueryVariable | CustomVariable]


class Dashboard(Open):
    inputs: list[Input] = Field(alias="__inputs", min_length=1, max_length=1)
    requires: list[dict[str, str]] = Field(alias="__requires")
    id: None
    uid: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,40}$")
    title: str = Field(min_length=1)
    schemaVersion: int = Field(ge=36)
    version: int
    time: dict[Literal["from", "to"], str]
    templating: Templating
    annotations: dict[str, Any]
    panels: list[Row | TimeSeries]


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    return Dashboard.model_validate(DASHBOARD)


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: Dashboard) -> None:
    assert len({panel.id for panel in dashboard.panels}) == len(dashboard.panels)
    for a, b in combinations([panel.gridPos for panel in dashboard.panels], 2):
        assert a.x + a.w <= 24
        assert a.x + a.w <= b.x or b.x + b.w <= a.x or a.y + a.h <= b.y or b.y + b.h <= a.y, (a, b)


def test_queries_of_a_panel_have_ids_of_their_own(dashboard: Dashboard) -> None:
    for panel in dashboard.panels:
        if isinstance(panel, TimeSeries):
            assert len({target.refId for target in panel.targets}) == len(panel.targets), panel.title


def test_variables_that_are_used_are_declared(dashboard: Dashboard) -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    declared = {variable.name for variable in dashboard.templating.list}
    assert used == declared | {"DS_PROMETHEUS", "__rate_interval", "__all"}


def test_stages_to_choose_from_are_those_there_are(dashboard: Dashboard) -> None:
    (stage,) = [v for v in dashboard.templating.list if isinstance(v, CustomVariable)]
    assert stage.query.split(",") == list(Stage)


# ---- what it asks for


def queries() -> list[str]:
    variables = [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    selectors = [re.fullmatch(r"label_values\((.*), \w+\)", definition)[1] for definition in variables]  # type: ignore[index]
    return selectors + [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Metrics of a query, each with the labels that it is selected and grouped by."""
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing), query
    groups = re.findall(r"\b(?:by|on|without) \(([^)]*)\)", query)
    grouped = {label.strip() for group in groups for label in group.split(",")} - {"le", "instance"}
    plain = re.sub(r"\b(?:by|on|without) \([^)]*\)", "", query)
    assert set(re.findall(r"\b([a-z_]+)\s*\(", plain)) <= FUNCTIONS, query
    found = re.findall(
        r"\b([a-zA-Z_:][\w:]*)(?:\{((?:[^\"{}]|\"[^\"]*\")*)\})?(?!\s*\(|\w)", re.sub(r"\[.*?\]", "", plain)
    )
    return [
        (name, grouped | set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r"\"[^\"]*\"", "", matchers))))
        for name, matchers in found
        if name not in FUNCTIONS
    ]


@pytest.fixture(scope="module")
def exported(decode_vllm_config: Any) -> dict[str, set[str]]:
    """Every metric on Ray's port that we know of, with its labels."""
    before = set(REGISTRY._collector_to_names)
    PageLogger(decode_vllm_config, [0])
    engines = names_of(REGISTRY, *SERVES)
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
    told = tuple("ray_" + prefix.replace(":", "_") for prefix in PREFIXES)
    engines = {name: labels for name, labels in engines.items() if name.startswith(told)}
    return names_of(IngressMetrics().registry, *SERVES) | engines | RAYS_OWN


@pytest.mark.parametrize("query", queries())
def test_metrics_and_labels_of_each_query_are_exported(query: str, exported: dict[str, set[str]]) -> None:
    asked = selectors(query)
    assert asked, query
    for name, labels in asked:
        assert name in exported, f"{name} in {query}"
        assert labels <= exported[name], f"labels of {name} in {query}"


def test_all_that_an_ingress_tells_is_shown(exported: dict[str, set[str]]) -> None:
    asked = {name for query in queries() for name, _ in selectors(query)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("ray_epd_")}
    assert ours <= shown


def test_a_mistyped_name_or_label_would_be_found(exported: dict[str, set[str]]) -> None:
    (metric, labels), other = selectors('sum by (stgae) (rate(ray_epd_rungs_totl{a="x{y}"}[5m])) / ray_vllm_x')
    assert (metric, labels) == ("ray_epd_rungs_totl", {"stgae", "a"})
    assert other == ("ray_vllm_x", {"stgae"})


@pytest.mark.parametrize("name", RAYS_OWN)
def test_ray_counts_what_we_take_from_it(name: str) -> None:
    root = Path(ray.__file__).parent
    folder = (
        root / "dashboard" / "modules" / "reporter" if name.startswith("ray_node_") else root / "serve" / "_private"
    )
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    assert f'"{name.removeprefix("ray_")}"' in text, f"dashboards/grafana.json, docs/operations.md: {name}"
