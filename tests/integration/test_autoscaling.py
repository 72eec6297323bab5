"""Each stage is scaled by its own work, by real engines and Ray Serve's controller; no request is lost on the way."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from benchmarks.autoscale import Driver, Phase, changes, decisions, deployments, look, request, run
from serve_app.stage import Stage
from tools.harness.cases import chat, text
from tools.harness.servers import Server, serve_run

UNSEEN = 10**6
"""The seed of an image that no phase asks about."""

PHASES = [
    Phase("image", 180, until=lambda sample: sample.replicas[Stage.ENCODER] == 2),
    Phase("text", 180, until=lambda sample: sample.replicas[Stage.ENCODER] == 0),
]


def test_images_wake_an_encoder_and_double_it_alone_and_text_brings_it_back(tmp_path: Path) -> None:
    def rungs(seed: int) -> set[str]:
        answer = server.post(*request("image", seed))
        assert answer.status_code == 200, answer.text
        rungs = answer.headers.get("x-epd-rungs", "")
        return {rung.partition("*")[0] for rung in rungs.split(",") if rung}

    with serve_run(tmp_path, {}, deployments(encoders_at_rest=0)) as server:
        assert replicas(server, Stage.ENCODER) == 0
        assert rungs(0) == {"encode-at-prefill(no encoder)"}
        server.wait_until(lambda: replicas(server, Stage.ENCODER) == 1, "an encoder for the image", 90)
        server.wait_until(lambda: rungs(1) == set(), "an image that an encoder encodes", 10)
        samples, failures = run(server, PHASES)
        wanted = decisions(server)
        assert rungs(UNSEEN) == {"encode-at-prefill(no encoder)"}
    queues = [(s.phase, s.queue_s) for s in samples[::5]]
    assert failures == []
    assert samples[-1].completed > 100
    assert wanted == [("Encoder", 0, 1), ("Encoder", 1, 2), ("Encoder", 2, 1), ("Encoder", 1, 0)], queues
    counts = {stage: [count for _, count in changes(samples, stage)] for stage in Stage}
    assert counts == {Stage.ENCODER: [1, 2, 1, 0], Stage.PREFILL: [1], Stage.DECODE: [1]}, queues


def test_stages_together_take_no_more_cards_than_there_are(tmp_path: Path) -> None:
    """Real controller and replicas, engines that do nothing, cards in Ray's books only. Decode wishes for six of four."""
    options = deployments()
    scaling = options["Decode"]["autoscaling_config"]
    scaling |= {"max_replicas": 6, "downscale_delay_s": 5.0}
    scaling["policy"]["policy_kwargs"] = {"target_running": 2}
    args = {"accelerator": "cpu", "null_step_s": 0.01} | {stage.value: {"gpus_per_replica": 1} for stage in Stage}
    env = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 4, "CPU": 16})}
    shared = {"autoscaling_policy": {"policy_function": "serve_app.autoscaling:SharedGPUs"}}
    path, body = chat(text("Hello"), max_tokens=300, ignore_eos=True)  # 3 s
    ended = threading.Event()

    def ask() -> list[int]:
        codes = []
        while not ended.is_set():
            codes.append(requests.post(server.url + path, json=body, timeout=60).status_code)
        return codes

    with serve_run(tmp_path, args, options, env, "benchmarks.null_engine:build_app", shared) as server:
        with ThreadPoolExecutor(12) as pool:
            asking = [pool.submit(ask) for _ in range(12)]
            try:
                server.wait_until(lambda: replicas(server, Stage.DECODE) == 2, "a second replica of decode", 90)
            finally:
                ended.set()
        server.wait_until(lambda: replicas(server, Stage.DECODE) == 1, "decode to give its card back", 90)
        assert decisions(server) == [("Decode", 1, 2), ("Decode", 2, 1)]
    assert {code for each in asking for code in each.result()} == {200}


def replicas(server: Server, stage: Stage) -> int:
    return look(Driver(server), 0.0).replicas[stage]
