"""The names of vLLM's arguments, read from its source: to check a config, nobody waits until vLLM is loaded."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve_app.handoff.errors import ConfigError

ENGINE_ARGS = "engine/arg_utils.py", "AsyncEngineArgs"
API_ARGS = "entrypoints/launchers/cli_args.py", "FrontendArgs"
"""vLLM's file, and the dataclass in it whose fields are the arguments."""

SERVER_ARGS = frozenset(
    {"host", "port", "uds", "grpc_port", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"}
)
"""Arguments of vLLM's server that Ray Serve's ``http_options:`` replace."""


@cache
def names(file: str, dataclass: str) -> frozenset[str]:
    """The fields of a dataclass in one of vLLM's files, with those of its bases in that file."""
    vllm = find_spec("vllm")  # finds it without loading it
    assert vllm is not None and vllm.origin is not None
    module = ast.parse((Path(vllm.origin).parent / file).read_bytes())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> set[str]:
        found = {
            line.target.id
            for line in classes[name].body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes]
        return found.union(*map(fields, bases))

    return frozenset(fields(dataclass))


def check_engine_args(args: dict[str, Any], where: str) -> None:
    """Refuse names that vLLM does not know, before anything is started. Raises ``ConfigError``."""
    for key in args:
        if key not in names(*ENGINE_ARGS):
            raise ConfigError(
                f"`{where}.{key}` is not an engine argument of this vLLM (`vllm serve --help` lists them)"
            )


def check_api_args(api: dict[str, Any]) -> None:
    """Refuse names under ``api:`` that vLLM's server does not know. Raises ``ConfigError``."""
    for key in api:
        if key in SERVER_ARGS:
            raise ConfigError(f"`api.{key}` is Ray Serve's here: set `http_options:` in the Serve config")
        if key == "lora_modules":
            raise ConfigError("`api.lora_modules`: LoRA adapters are not passed on to the stages; serve a merged model")
        if key not in names(*API_ARGS):
            raise ConfigError(
                f"`api.{key}` is not an argument of this vLLM's API server (`vllm serve --help` lists them)"
            )
