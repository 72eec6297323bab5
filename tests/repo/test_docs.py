"""README.md and docs/*.md are true of the code: keys, names, commands, files and links exist, and nothing is left out."""

import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from serve_app.cli.ready import READY
from serve_app.config import MOVED, EPDConfig, QueueConfig, StageConfig
from serve_app.launch.placement import Cluster, resolve
from serve_app.observe.trace import Trace
from serve_app.scaling.rules import DecodeTargets, Targets
from serve_app.stage import Stage
from tools.harness.servers import RAY_ENV

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
SOURCE = "\n".join(
    path.read_text() for folder in ("serve_app", "deployments") for path in ROOT.glob(f"{folder}/**/*.py")
)

README_LINES = 200
RESULTS_LINES = 150

_VARIABLES = """
    MODEL LOG_PATH ENCODE_PORT PREFILL_PORT DECODE_PORT PREFILL_DECODE_PORT PROXY_PORT ENDPOINT_PORT
    GPU_E GPU_P GPU_D GPU_PD DEVICE_PLATFORM DEVICE_AFFINITY_ENV CUDA_VISIBLE_DEVICES ZE_AFFINITY_MASK
    EC_SHARED_STORAGE_PATH TIMEOUT_SECONDS NUM_PROMPTS
    GPU_MEMORY_UTILIZATION_E GPU_MEMORY_UTILIZATION_P GPU_MEMORY_UTILIZATION_D GPU_MEMORY_UTILIZATION_PD
    MAX_NUM_SEQS MAX_MODEL_LEN UCX_TLS UCX_NET_DEVICES VLLM_NIXL_SIDE_CHANNEL_PORT MEDIA_PATH OPENAI_API_KEY
"""
"""Environment variables that the reference's scripts, proxy and pages name."""

_FLAGS = """
    --encode-servers-urls --prefill-servers-urls --decode-servers-urls --host --port
    --enforce-eager --no-enable-prefix-caching --max-num-batched-tokens --mm-encoder-only --enable-request-id-headers
    --allowed-local-media-path --ec-transfer-config --kv-transfer-config
"""

NOT_HERE = {"examples/online_serving/disaggregated_encoder", "benchmarks/gpu/RESULTS.md"}
"""Names that look like files of this project: the reference's, and what `make gpu` writes."""


def page(name: str) -> str:
    return PAGES[f"docs/{name}.md"]


def section(title: str, of: str = README) -> str:
    """The text under a heading, up to the next one of the same level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", of, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {title!r}"
    return found[1]


def code_blocks(language: str) -> list[str]:
    """Of all pages."""
    found = (re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in PAGES.values())
    return [block for blocks in found for block in blocks]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


INLINE_CODE = [code for text in PAGES.values() for code in inline_code(text)]


# ---- the door and the manual


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= README_LINES


def test_results_are_short_and_have_a_plot_per_question() -> None:
    folder = ROOT / "benchmarks"
    results = (folder / "RESULTS.md").read_text()
    assert len(results.splitlines()) <= RESULTS_LINES
    plots = re.findall(r"\]\((results/\w+\.png)\)", results)
    assert len(plots) == results.count("\n## ") and all((folder / plot).is_file() for plot in plots)


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README))

    assert PAGES.keys() - linked == {"README.md"}


# ---- configuration


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``KVConfig`` or ``StageConfig | None``."""
    candidates = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def default_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    return json.dumps(value).strip('"')


def config_keys(model: type[BaseModel] = EPDConfig, prefix: str = "") -> dict[str, str]:
    """Dotted key → default, as the tables write them: a stage's keys once, under ``<stage>.``."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        default = default_text(field.get_default(call_default_factory=True))
        if inner is StageConfig:
            keys |= {prefix + name: default} | config_keys(inner, "<stage>.")
        elif inner is QueueConfig:
            keys |= config_keys(inner, f"{prefix}<stage>.")
        elif inner is not None:
            keys |= config_keys(inner, f"{prefix}{name}.")
        else:
            keys[prefix + name] = default
    return keys


ALL_KEYS = config_keys()
FEW_NEED = "timeouts.", "advanced."
MOST_SET = {key: default for key, default in ALL_KEYS.items() if not key.startswith(FEW_NEED)}

every_table = pytest.mark.parametrize(
    ("text", "keys"),
    [(section("Configuration"), MOST_SET), (page("configuration"), ALL_KEYS)],
    ids=["README.md", "docs/configuration.md"],
)


def documented_keys(text: str) -> list[tuple[str, str]]:
    """Key and default of each row; keys that share a row share the default."""
    rows = re.findall(r"^\| (`[^|]+`) \| `([^`]+)` \| \S", text, re.MULTILINE)
    return [(key, default) for keys, default in rows for key in re.findall("`([^`]+)`", keys)]


@every_table
def test_tables_have_every_key_with_its_default(text: str, keys: dict[str, str]) -> None:
    assert dict(documented_keys(text)) == keys


@every_table
def test_tables_have_each_key_once_in_the_order_of_the_code(text: str, keys: dict[str, str]) -> None:
    found = [key for key, _ in documented_keys(text)]

    assert len(found) == len(set(found))
    assert [key for key in found if "<stage>" not in key] == [key for key in keys if "<stage>" not in key]


def test_keys_named_in_the_text_exist() -> None:
    groups = {name for name, field in EPDConfig.model_fields.items() if model_of(field.annotation)} | {"engine_args"}
    known = {key + "." for key in ALL_KEYS}
    for key in (code.partition(": ")[0] for code in INLINE_CODE):
        assert key not in MOVED, key
        if key.partition(".")[0] not in groups or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key):
            continue  # a file, for instance
        name = ".".join("<stage>" if part in set(Stage) else part for part in key.split(".")) + "."
        assert any(name.startswith(each) or each.startswith(name) for each in known), key


@pytest.mark.parametrize("block", code_blocks("yaml"))
def test_yaml_in_the_text_is_a_config(block: str) -> None:
    EPDConfig.model_validate(yaml.safe_load(block))


def test_the_table_of_targets_has_every_key_with_its_default() -> None:
    table = re.search(r"^\| Key of `policy_kwargs`.*?\n\n", page("operations"), re.MULTILINE | re.DOTALL)
    assert table
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (`DecodePolicy` only)?", table[0], re.MULTILINE)

    assert {key: default for key, default, _ in rows} == config_keys(DecodeTargets) | config_keys(Targets)
    assert [key for key, _, only_decode in rows if not only_decode] == list(config_keys(Targets))


@pytest.mark.parametrize("name", ["Makefile", "k8s/Dockerfile", "docs/operations.md"])
def test_rays_variables_are_those_that_the_tests_run_with(name: str) -> None:
    text = (ROOT / name).read_text()
    assert [f"{key}={value}" for key, value in RAY_ENV.items() if f"{key}={value}" not in text] == []


# ---- from the reference


@pytest.mark.parametrize("name", _VARIABLES.split() + _FLAGS.split())
def test_what_the_reference_reads_has_an_answer(name: str) -> None:
    cells = re.findall(r"^\| (.*?) \| .*? \|$", page("migration"), re.MULTILINE)
    everywhere = page("migration") if name in ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK") else ""

    assert re.search(rf"`{re.escape(name)}[` ]", " ".join(cells) + everywhere)


# ---- names of the code


def test_architecture_names_every_package() -> None:
    packages = {f"serve_app/{path.parent.name}" for path in ROOT.glob("serve_app/*/__init__.py")}

    assert packages - set(inline_code(page("architecture"))) == set()


@pytest.mark.parametrize("code", inline_code(page("architecture")))
def test_names_of_classes_and_functions_exist(code: str) -> None:
    if re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)?|[a-z]\w*_\w+", code):
        for name in code.split("."):
            assert re.search(rf"\b{name}\b", SOURCE), code


def test_headers_exist() -> None:
    named = {code for code in INLINE_CODE if re.fullmatch(r"(x|server|retry)-[a-z-]+", code)}

    assert {"x-epd-rungs", "server-timing"} <= named
    of_vllm = {"x-session-id"}
    assert {name for name in named if f'"{name}"' not in SOURCE} <= of_vllm


def test_metrics_exist() -> None:
    def names(text: str) -> set[str]:
        return {name.replace(":", "_") for name in re.findall(r"\bepd[:_][a-z_]+", text.replace("ray_epd", "epd"))}

    made = names(SOURCE)
    for name in names("\n".join(PAGES.values())):
        assert name.removesuffix("_total") in made or any(each.startswith(name) for each in made), name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z]+-(?:again|at-[a-z]+\([^`]+\)))`", page("failures")))))
def test_names_of_fallbacks_exist(name: str) -> None:
    kind, _, reason = name.rstrip(")").partition("(")
    assert re.search(rf"\b{kind}\b" if reason else "-again", SOURCE), name
    assert re.search(rf'["(]{reason}[)"]', SOURCE), name


# ---- files, links, commands


def test_files_named_in_the_text_exist() -> None:
    top = {path.name for path in ROOT.iterdir()}
    for code in set(INLINE_CODE) - NOT_HERE:
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) and code.partition("/")[0] in top
        is_file = re.fullmatch(r"[\w-]+\.(py|yaml|toml|sh|md|patch)", code)
        if (is_path or is_file) and not code.startswith(".venv"):
            places = [ROOT / code, ROOT / f"{code}.py", ROOT / "k8s" / code]
            assert any(place.exists() for place in places), code


def test_files_in_commands_exist() -> None:
    blocks = "\n".join(code_blocks("bash")) + "\n".join(code_blocks("python"))
    for name in re.findall(r"(?<![\w/])(?:examples|tests|scripts|k8s)/[\w./-]+|\b[\w-]+\.yaml\b", blocks):
        assert any((ROOT / folder / name).exists() for folder in ("", "examples", "k8s")), name


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", prose(PAGES[name])):
        link = "".join(target)
        path, _, anchor = link.partition("#")
        if link.startswith("https:"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(INLINE_CODE + code_blocks("bash"))
    named = set(re.findall(r"\bmake ([a-z-]+)", code))

    assert named <= targets
    assert {"serve", "test", "check"} <= named


def test_every_example_is_mentioned() -> None:
    for path in ROOT.glob("examples/*"):
        assert f"(examples/{path.name})" in README, path.name


# ---- samples


def test_python_in_the_text_compiles() -> None:
    (block,) = code_blocks("python")
    compile(block, "README.md", "exec")


def test_the_log_line_is_the_one_that_is_written() -> None:
    steps = ("encode", "encoder queue", "ec_transfer", "prefill", "kv_transfer")
    record = Trace("an-id", rendered=1.0, longest=dict.fromkeys(steps, 1.0))
    for stage in Stage:
        record.saw(stage, "a-replica")
    record.token(1)
    (line,) = re.findall(r"^request=.*$", page("operations"), re.MULTILINE)

    def shape(text: str) -> list[str]:
        return [re.sub(r"=(-?[\d.]+)(ms)?$", r"=0\2", word) for word in text.split()]

    def names(text: str) -> list[tuple[str, bool]]:
        return [(word.partition("=")[0], word.endswith("ms")) for word in shape(text)]

    assert names(line) == names(record.line(200))
    record.unencoded_items = 1
    record.rung("a-rung")
    keys = re.findall(r"^\| (`.*?`) \|", section("Logs", page("operations")), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(keys))) <= {name for name, _ in names(record.line(200))}


def test_the_line_of_the_start_is_the_one_that_is_written() -> None:
    assert resolve(EPDConfig(), Cluster(gpus=0, cpus=2)).reason in README


def test_the_ready_line_is_the_one_that_is_written() -> None:
    url, stages = "http://127.0.0.1:8000", "encoder, prefill, decode"
    rest = dict.fromkeys(("picture", "page", "key", "python", "at", "route", "tokens", "ask"), "")
    written = READY.format(seconds=0, url=url, model="demo", stages=stages, **rest)
    (line,) = re.findall(r"^EPD is ready after .*$", README, re.MULTILINE)

    assert line.replace("NN", "0") in written.splitlines()


def test_the_table_of_gpus_has_the_shares() -> None:
    for gpus in (1, 2):
        stages = resolve(EPDConfig(), Cluster(gpus=gpus, cpus=16)).config.stages
        shares = {stage: config.gpus_per_replica for stage, config in stages.items() if config.gpus_per_replica != 1}
        (row,) = re.findall(
            rf"^\| {['one GPU', 'two GPUs'][gpus - 1]} \|.*$", section("Start", page("gpus")), re.MULTILINE
        )
        for stage, share in shares.items():
            assert f"{stage} {share:g}" in row
    of_40_gb = resolve(EPDConfig(), Cluster(1, 16, card_gib=39.4)).config.stages.values()
    assert "of 40 GB " + ", ".join(f"{config.gpus_per_replica:g}" for config in of_40_gb) in page("gpus")


def test_no_path_of_one_machine() -> None:
    assert not re.search(r"(?<![\w.~])/(home|root|work|Users)/", "\n".join(PAGES.values()))
