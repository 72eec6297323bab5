"""A faked CUDA platform for vLLM's GPU build on a machine without a card: vLLM's own class, told of cards.

``install()`` goes before whatever imports ``vllm.platforms``. vLLM's extensions need a ``libcuda.so.1``, which comes with
the driver, so one is made here whose every function says "no device".
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FUNCTIONS = (
    *("cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount"),
    *("cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuGetErrorString", "cuGetProcAddress", "cuGetProcAddress_v2"),
    *("cuInit", "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate", "cuMemGetAllocationGranularity", "cuMemMap"),
    *("cuMemRelease", "cuMemSetAccess", "cuMemUnmap", "cuPointerGetAttribute", "cuTensorMapEncodeTiled"),
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Card:
    name: str
    gib: float
    """As CUDA gives them."""
    capability: tuple[int, int]


L4 = Card("NVIDIA L4", 22.0, (8, 9))
A100_40 = Card("NVIDIA A100-SXM4-40GB", 39.4, (8, 0))
H100 = Card("NVIDIA H100 80GB HBM3", 79.2, (9, 0))
B200 = Card("NVIDIA B200", 178.4, (10, 0))
T4 = Card("Tesla T4", 14.6, (7, 5))

NOW = [H100]


def stub_driver() -> None:
    """Load a ``libcuda.so.1`` without a device into this process, unless there is a real one."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return
    except OSError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
        source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in FUNCTIONS))
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True
        )
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def install() -> None:
    """Make vLLM of this process believe in cards: those of ``NOW``."""
    stub_driver()
    import triton.backends

    for name, backend in triton.backends.backends.items():
        backend.driver.is_active = staticmethod(lambda name=name: name == "nvidia")
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class FakedCuda(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*NOW[0].capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return NOW[0].name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return int(NOW[0].gib * 2**30)

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def is_integrated_gpu(cls, device_id: int = 0) -> bool:
            return False

        @classmethod
        def device_count(cls) -> int:
            return 8

        @classmethod
        def log_warnings(cls) -> None:
            pass

    vllm.platforms._current_platform = FakedCuda()


@contextmanager
def card(which: Card) -> Iterator[None]:
    """vLLM asks about this card meanwhile, and forgets what it has found of another."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()
    NOW[0] = which
    try:
        yield
    finally:
        NOW[0] = H100
