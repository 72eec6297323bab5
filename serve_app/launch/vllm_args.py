"""The names of vLLM's arguments, read from its source: to check a config, nobody waits until vLLM is loaded."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.engine_args import is_guess
from serve_app.stage import Stage

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
        if key == "enable_tower_connector_lora":
            raise ConfigError(
                f"`{where}.{key}`: encoders take no LoRA adapters; serve a model with the tower's merged in"
            )
        if key not in names(*ENGINE_ARGS):
            raise ConfigError(
                f"`{where}.{key}` is not an engine argument of this vLLM (`vllm serve --help` lists them)"
            )


def check_speculation(config: EPDConfig) -> None:
    """Refuse a draft model that decode would run without the KV blocks of the prompt. Raises ``ConfigError``."""
    if config.prefill is None:
        return
    of = {
        stage: (config.engine_args | config.stages[stage].engine_args).get("speculative_config")
        for stage in (Stage.PREFILL, Stage.DECODE)
    }
    draft = of[Stage.DECODE]
    if draft and not is_guess(draft) and of[Stage.PREFILL] != draft:
        raise ConfigError(
            "`decode.engine_args.speculative_config`: its draft model needs KV blocks of the prompt, which prefill makes: "
            "put it under the top-level `engine_args:`"
        )


def check_api_args(api: dict[str, Any], takes_adapters: bool = False) -> None:
    """Refuse names under ``api:`` that vLLM's server does not know. Raises ``ConfigError``."""
    for key in api:
        if key in SERVER_ARGS:
            raise ConfigError(f"`api.{key}` is Ray Serve's here: set `http_options:` in the Serve config")
        if key == "lora_modules" and not takes_adapters:
            raise ConfigError("`api.lora_modules` needs `engine_args: {enable_lora: true}`")
        if key not in names(*API_ARGS):
            raise ConfigError(
                f"`api.{key}` is not an argument of this vLLM's API server (`vllm serve --help` lists them)"
            )
