"""Ray Serve LLM's own prefill and decode (``build_pd_openai_app``), on the CPU, with the engine arguments of ours.

It needs packages that nothing else here imports: ``pip install --target DIR --no-deps pyarrow jsonref pandas python-dateutil
pytz tzdata six fsspec``, and ``PYTHONPATH=DIR``. Its placement groups ask for CPUs where ``accelerator_config`` says so. It
has no encode stage: prefill encodes, then decode answers. Both servers render the prompt, so both decode its pictures.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_app.launch.connectors import free_ports
from serve_app.launch.engine_args import engine_args, model_path, replica_env
from serve_app.stage import Stage
from tools.harness.servers import Server, cpu_config, kill_all, start

READY = "/v1/models/demo?"
"""It has no route for health: this one answers when all replicas run. Their engines may still be loading then."""
FIRST = {"model": "demo", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
LOADS_S = 240.0
CPUS = 8
"""That Ray is told of: two engines, two replicas and the ingress claim one each."""


@contextmanager
def ray_llm(folder: Path) -> Iterator[Server]:
    log, (port,) = folder / "ray_llm.log", free_ports(1)
    command = [sys.executable, "-m", "benchmarks.baselines.ray_llm", "--port", str(port)]
    try:
        with start(command, port, log, {"TMPDIR": str(folder)}, READY) as server:
            server.url = server.url.removesuffix(READY)
            server.post("/v1/chat/completions", FIRST, timeout=LOADS_S).raise_for_status()
            yield server
    finally:
        kill_all(str(log))


def server_config(stage: Stage) -> Any:
    from ray.serve.llm import LLMConfig

    config = cpu_config({"encoder": None})
    args = engine_args(config, stage, model_path(config))
    model = {"model_id": "demo", "model_source": args.pop("model")}
    del args["served_model_name"]
    args["kv_transfer_config"] = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return LLMConfig(
        model_loading_config=model,
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"num_replicas": 1, "autoscaling_config": None},
        engine_kwargs=args,
        runtime_env={"env_vars": replica_env(config, stage)},
        log_engine_metrics=False,
    )


def main() -> None:
    import ray
    from ray import serve
    from ray.serve.llm import build_pd_openai_app

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    ray.init(num_cpus=CPUS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    parts = {
        "prefill_config": server_config(Stage.PREFILL),
        "decode_config": server_config(Stage.DECODE),
        "ingress_deployment_config": {"num_replicas": 1, "autoscaling_config": None},
    }
    serve.run(build_pd_openai_app(parts), name="peer")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
