"""What one encoder replica can prepare: ``python -m benchmarks.prepare [--images N]``.

The way of an image to an encoder's engine, without the engine: JPEG → pixels (threads), pixels → tensors (one thread, see
``ItemProcessor.in_turn``), tensors → message. Qwen2.5-VL-3B's real sizes, no weights and no card. Costs are CPU time, which
other programs on the machine disturb less than the clock; rates are by the clock, for a machine that is else idle.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm.multimodal.media import ImageMediaIO
from vllm.renderers import renderer_from_config
from vllm.v1.serial_utils import MsgpackEncoder

from benchmarks.gpu.model import write_qwen_3b
from serve_app.config import EPDConfig
from serve_app.handoff.types import Media, digest_of, keyed
from serve_app.ingress import server
from serve_app.launch.engine_args import ingress_args
from serve_app.launch.placement import Cluster, resolve
from serve_app.media.items import ItemProcessor
from tools.harness import record

RESULT = Path(__file__).parent / "results" / "prepare.json"
SIZE = (1920, 1080)
SEED = 0
THREADS = (1, 2, 4)


@dataclass(frozen=True)
class Cost:
    """Of one image, in ms of CPU; ``message_bytes``: what goes to the engine."""

    decode: float
    process: float
    message: float
    jpeg_bytes: int
    message_bytes: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"CPU ms of an image: decode {self.decode:.1f}, process {self.process:.1f}, message {self.message:.2f}; "
            f"images/s of a replica {self.per_replica:.0f}, of a core {self.per_core:.0f}"
        )

    @property
    def per_replica(self) -> float:
        """Images/s of a replica whose decoding has cores enough: the one thread that processes is what it ends at."""
        return 1e3 / self.process

    @property
    def per_core(self) -> float:
        return 1e3 / (self.decode + self.process + self.message)


def photo(size: tuple[int, int] = SIZE) -> bytes:
    """A JPEG of noise without edges: about as large as a photograph."""
    noise = np.random.default_rng(SEED).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=88)
    return file.getvalue()


def media_of(data: bytes) -> Media:
    return keyed(Media("image", data, ImageMediaIO(), len(data), digest_of(data)))


def processor(folder: Path) -> ItemProcessor:
    """An encoder's, of the model in ``folder``."""
    asked = {"accelerator": "cpu", "model": str(folder), "engine_args": {"max_model_len": 32768}}
    config = resolve(EPDConfig.model_validate(asked), Cluster(0, 8)).config
    renderer = renderer_from_config(server.ingress_vllm_config(ingress_args(config, str(folder))))
    return ItemProcessor(renderer, config.advanced.media)


def decoded(of: ItemProcessor, media: Media) -> Any:
    return asyncio.run(of.decoded(media))


def cpu_ms(images: int, call: Callable[[], Any]) -> float:
    """The median of what a call takes of this process' CPU time, its other threads included."""
    spent = []
    for _ in range(images):
        before = time.process_time()
        call()
        spent.append((time.process_time() - before) * 1e3)
    return round(statistics.median(spent), 3)


def costs(of: ItemProcessor, media: Media, images: int) -> Cost:
    picture = decoded(of, media)
    features = of._process(media, picture)
    buffers = MsgpackEncoder().encode(features.item.data)
    return Cost(
        decode=cpu_ms(images, lambda: decoded(of, media)),
        process=cpu_ms(images, lambda: of._process(media, picture)),
        message=cpu_ms(images, lambda: MsgpackEncoder().encode(features.item.data)),
        jpeg_bytes=len(media.data),
        message_bytes=sum(memoryview(buffer).nbytes for buffer in buffers),
        tokens=features.item.num_embeds,
    )


async def rate(of: ItemProcessor, media: Media, images: int) -> float:
    """Images/s of the replica's own way, with as many calls under way as decode at a time."""
    calls = asyncio.Semaphore(8)

    async def one() -> None:
        async with calls:
            await of.features(media)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(images):
            group.create_task(one())
    return images / (time.perf_counter() - began)


def parallel(of: list[ItemProcessor], media: Media, images: int) -> dict[str, float]:
    """Several processors that only process, each in a thread of its own: what more threads in a replica would give."""
    picture = decoded(of[0], media)

    def work(one: ItemProcessor) -> None:
        for _ in range(images):
            one._process(media, picture)

    with ThreadPoolExecutor(len(of)) as pool:
        began, before = time.perf_counter(), time.process_time()
        list(pool.map(work, of))
        took, spent = time.perf_counter() - began, time.process_time() - before
    count = images * len(of)
    return {
        "images_per_s": round(count / took, 1),
        "process": round(spent * 1e3 / count, 2),
        "cores": round(spent / took, 2),
    }


def measure(folder: Path, images: int) -> dict[str, Any]:
    threads = [count for count in THREADS if count <= (os.cpu_count() or 1)]
    media = media_of(photo())
    processors = [processor(folder) for _ in threads]
    found: dict[str, Any] = {}
    for count in threads:
        os.environ["OMP_NUM_THREADS"] = str(count)  # vLLM reads it at each call; Ray sets it to a replica's CPUs
        cost = costs(processors[0], media, images)
        per_s = asyncio.run(rate(processors[0], media, images))
        found[f"torch_threads_{count}"] = asdict(cost) | {"images_per_s": round(per_s, 1)}
        print(f"torch threads: {count}. {cost}; images/s by the clock: {per_s:.0f}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    for count in range(1, len(threads) + 1):
        found[f"processors_{count}"] = told = parallel(processors[:count], media, images)
        print(f"processors, a thread each: {count}. {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    images = parser.parse_args().images
    about: dict[str, Any] = {
        "command": "python -m benchmarks.prepare",
        "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        "cores": os.cpu_count(),
        "workload": {"images": images, "size": SIZE, "seed": SEED},
    }
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        write_qwen_3b(Path(name))
        found = measure(Path(name), images)
    record.write(about | found, RESULT)


if __name__ == "__main__":
    main()
