"""The house of `serve_app/` and `deployments/`: imports run down only, and few rooms know vLLM or Ray.

All imports count: those inside functions, those for types alone, and ``import_module`` of a name that is written out.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROOMS = [
    ("stage",),
    ("config", "demo", "hooks", "page"),
    ("handoff",),
    ("channel", "media", "transfer"),
    ("routing",),
    ("observe",),
    ("launch",),
    ("scaling",),
    ("ingress", "stages"),
    ("deployments",),
    ("app", "autoscaling", "proxy"),
    ("cli",),
    ("__main__",),
]
"""From the ground up. A room imports itself and what lies below its floor; rooms of one floor do not know each other."""

LIBRARIES = {
    "vllm": {
        "handoff.engine_input": "a request as vLLM's engines have it",
        "media": "fetches and decodes as vLLM does",
        "transfer": "vLLM's connectors, in the engine's processes",
        "observe": "vLLM's metrics and spans",
        "ingress": "vLLM's front end",
        "stages": "vLLM's engine",
        "hooks.vllm_plugin": "vLLM loads it; it patches what vLLM has no setting for",
        "launch.fingerprint": "vLLM's version, and where its caches have a model: all engines and ingresses ask",
        "deployments.prefill": "the type of what an engine puts out",
        "deployments.decode": "the type of what an engine puts out",
    },
    "ray": {
        "routing.handles": "calls over Serve's handles",
        "routing.routers": "Serve's request routers",
        "observe.ray_metrics": "Ray's metrics",
        "launch.placement": "whether the cluster can grow",
        "launch.card_memory": "NVML, which comes with Ray",
        "scaling.policies": "Serve's autoscaling policies",
        "stages.replica": "what a replica has of Serve",
        "deployments": "Serve's deployments",
        "app": "the application",
        "cli.run": "`serve run`",
    },
}
"""Who may import a library, and for what: whole rooms, or modules of one."""

PURE = [
    "stage",
    "handoff.types",
    "handoff.errors",
    "handoff.shaping",
    "handoff.waits",
    "routing.rules",
    "scaling.rules",
    "ingress.decisions",
    "ingress.encode_rule",
    "ingress.retry",
]
"""Rules and types that run without vLLM and without Ray: nothing that they load loads either."""


@dataclass(frozen=True)
class Import:
    by: str
    """The module, without ``serve_app.``"""
    of: str
    """Of ours like that; of others as it is imported."""
    early: bool = True
    """It runs when the module is imported: in no function, and not for types alone."""


def short(name: str) -> str:
    return name.removeprefix("serve_app.")


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int | None:
    return next((height for height, rooms in enumerate(ROOMS) if room(module) in rooms), None)


@cache
def sources() -> dict[str, Path]:
    """Files by module, without ``serve_app.``; the package itself, which holds nothing, is left out."""
    files = [*ROOT.glob("serve_app/**/*.py"), *ROOT.glob("deployments/**/*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {short(name): file for name, file in names.items() if name != "serve_app"}


def names_of(node: ast.AST) -> list[str]:
    """What a node imports. Of ``from a import b`` that is ``a.b``: a module, or something in one."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0, names=names):
            return [f"{module}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(str(name))]
        ):
            return [name]
        case ast.ImportFrom():
            raise AssertionError(f"line {node.lineno}: imports of ours begin with `serve_app` or `deployments`")
    return []


def found_in(tree: ast.AST, early: bool = True) -> Iterator[tuple[str, bool]]:
    """Names that a source imports, and whether with it."""
    for node in ast.iter_child_nodes(tree):
        now = early and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        now = now and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        yield from ((name, now) for name in names_of(node))
        yield from found_in(node, now)


def module_of(name: str, modules: Iterable[str]) -> str:
    """The module of ours that a name is of; a library's as it is."""
    if room(name) not in ("serve_app", "deployments"):
        return name
    parts = short(name).split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((each for each in candidates if each in modules), short(name))


@cache
def imports() -> list[Import]:
    return [
        Import(module, module_of(name, sources()), early)
        for module, file in sources().items()
        for name, early in found_in(ast.parse(file.read_text()))
    ]


def of_ours() -> list[Import]:
    return [each for each in imports() if each.of in sources() and each.of != each.by]


def sentence(each: Import, why: str) -> str:
    return f"{sources()[each.by].relative_to(ROOT)} imports {each.of}: {why}"


def is_among(module: str, allowed: Iterable[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in allowed)


def test_every_module_has_a_room() -> None:
    homeless = [str(file.relative_to(ROOT)) for module, file in sources().items() if floor(module) is None]
    assert not homeless, f"ROOMS names no room for {', '.join(homeless)}"


def test_imports_run_down() -> None:
    wrong = []
    for each in of_ours():
        here, there = floor(each.by), floor(each.of)
        assert here is not None and there is not None
        if room(each.by) != room(each.of) and there >= here:
            direction = "above it" if there > here else "on its floor"
            wrong.append(sentence(each, f"`{room(each.of)}` lies {direction}, see ROOMS"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_some_know_a_library(library: str) -> None:
    allowed = LIBRARIES[library]
    wrong = [
        sentence(each, f"LIBRARIES lets only {', '.join(allowed)} import {library}")
        for each in imports()
        if room(each.of) == library and not is_among(each.by, allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_is_excused_for_what_is_not_done() -> None:
    for library, allowed in LIBRARIES.items():
        by = {each.by for each in imports() if room(each.of) == library}
        idle = [name for name in allowed if not any(is_among(module, [name]) for module in by)]
        assert not idle, f"LIBRARIES: {', '.join(idle)} import {library} no more"


@pytest.mark.parametrize("module", PURE)
def test_rules_load_neither_vllm_nor_ray(module: str) -> None:
    assert module in sources(), f"PURE: there is no {module}"
    loaded, ahead = set[str](), [module]
    while ahead:
        loaded.add(by := ahead.pop())
        for each in imports():
            if each.by == by and each.early:
                assert room(each.of) not in LIBRARIES, sentence(each, f"{module} loads it, see PURE")
                if each.of in sources() and each.of not in loaded:
                    ahead.append(each.of)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for each in of_ours():
        graph.setdefault(each.by, set()).add(each.of)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules that import each other in a circle: {' <- '.join(error.args[1])}")


def test_nothing_of_ours_imports_tools_benchmarks_or_tests() -> None:
    wrong = [
        sentence(each, "it is not in the wheel")
        for each in imports()
        if room(each.of) in ("tools", "benchmarks", "tests")
    ]
    assert not wrong, "\n".join(wrong)


SAMPLE = """
import a.b
from serve_app.stages import engine
from serve_app.handoff.types import Item
if TYPE_CHECKING:
    from c import d
def later():
    import e
    importlib.import_module("f.g")
"""


def test_imports_are_seen_wherever_they_stand() -> None:
    found = list(found_in(ast.parse(SAMPLE)))
    early = ["a.b", "serve_app.stages.engine", "serve_app.handoff.types.Item"]
    assert found == [(name, True) for name in early] + [(name, False) for name in ("c.d", "e", "f.g")]
    modules = {"stages", "stages.engine", "handoff.types"}
    assert [module_of(name, modules) for name in early] == ["a.b", "stages.engine", "handoff.types"]
