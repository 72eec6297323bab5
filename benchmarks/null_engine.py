"""The real deployments around engine cores that do nothing (``null_core.py``): what is left is the orchestration.

``serve run benchmarks.null_engine:build_app`` takes the arguments of ``serve_app.app:build_app`` and ``null_step_s``:
seconds per step of the decode engines, so per token of each stream; and ``null_item_s``: seconds that an encoder has for an
item. Media are decoded and processed as ever; embeddings and KV blocks are not there.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from deployments.decode import Decode
from deployments.encoder import Encoder
from deployments.prefill import Prefill
from serve_app import app
from serve_app.config import EPDConfig
from serve_app.stage import Stage

APP = "benchmarks.null_engine:build_app"
STEP_S = 0.025
"""Of a card: 40 tokens per second and stream."""
SEQUENCES = 256
"""That an engine runs at a time, unless the configuration says."""


class _Null:
    """Before a replica's class. Its core is replaced when vLLM has been imported in the replica's environment."""

    stage: Stage
    step_s: float
    item_s: float

    def __init__(self, config: EPDConfig) -> None:
        self._replaced = False
        super().__init__(config)  # type: ignore[call-arg]
        if not self._replaced:
            raise RuntimeError(
                "a replica does not call `_check` before it makes its engine any more: see null_engine.py"
            )

    def _check(self, vllm_config: Any) -> None:
        from benchmarks.null_core import replace_cores

        super()._check(vllm_config)  # type: ignore[misc]
        replace_cores(self.stage, self.step_s, self.item_s)
        self._replaced = True


def null(deployment: Any, step_s: float, item_s: float) -> Any:
    real = deployment.func_or_class
    made = type(f"Null{deployment.name}", (_Null, real), {"step_s": step_s, "item_s": item_s})
    return serve.deployment(name=deployment.name)(made)


def build_app(args: dict[str, Any]) -> Application:
    args = dict(args)
    step_s, item_s = float(args.pop("null_step_s", STEP_S)), float(args.pop("null_item_s", 0.0))
    args["engine_args"] = {"max_num_seqs": SEQUENCES} | args.get("engine_args", {})
    stages = {Stage.ENCODER: Encoder, Stage.PREFILL: Prefill, Stage.DECODE: Decode}
    app.DEPLOYMENTS = {stage: null(deployment, step_s, item_s) for stage, deployment in stages.items()}
    return app.build_app(args)
