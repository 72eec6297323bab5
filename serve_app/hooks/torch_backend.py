"""Lets torchvision, torchaudio and torchcodec be imported, or skipped, beside a CPU-only PyTorch.

On Linux, PyPI has only CUDA builds of the three. Their compiled extensions cannot load beside a CPU build of PyTorch, and
each raises at its import: torchvision because it registers fake kernels for its operators `nms` and `qnms`, the others
because they take the extension for a broken installation. vLLM and transformers import all three when they are installed,
and need pure-Python parts of two: image transforms, resampling.

So torchvision's operators are declared without a kernel, torchaudio's extension is replaced by the module of an installation
without one, and torchcodec counts as not installed (vLLM then decodes audio with soundfile and video with OpenCV). Calls of
compiled code still fail.

PyTorch calls `register` at the end of every `import torch`, in spawned processes too, by the entry point `epd_torchvision`
of group `torch.backends`. So this module must be cheap and must never raise. It can go once PyPI has CPU builds.
"""

import ctypes
import importlib.util
import logging
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Replace compiled extensions that cannot load. Failures are logged: raising would break every `import torch`."""
    try:
        import torch

        # With CUDA or ROCm, companions that do not fit are a mistake that the user should see.
        if torch.version.cuda is None and torch.version.hip is None:
            _declare_torchvision_operators()
            _replace_torchaudio_extension()
            _hide_torchcodec()
    except Exception:
        logger.warning("could not prepare torchvision and torchaudio for a CPU-only PyTorch", exc_info=True)


def _declare_torchvision_operators() -> None:
    import torch

    package = _folder("torchvision")
    if package is None or _any_loads(package, "_C"):
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def _replace_torchaudio_extension() -> None:
    package = _folder("torchaudio")
    if package is None or "torchaudio" in sys.modules or _any_loads(package / "lib", "_torchaudio"):
        return
    stub: Any = ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False
    stub.fail_if_no_align = lambda function: function
    sys.modules[stub.__name__] = stub


def _hide_torchcodec() -> None:
    package = _folder("torchcodec")
    if package is not None and "torchcodec" not in sys.modules and not _any_loads(package, "libtorchcodec_image"):
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # what Python knows as "not installed"


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # finds it without running it
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _any_loads(folder: Path, extension: str) -> bool:
    """Whether the loader takes a library. It finds missing libraries and foreign symbols, and takes 1 to 5 ms to fail."""
    for library in (*folder.glob(f"{extension}*.so"), *folder.glob(f"{extension}*.pyd")):
        with suppress(OSError):
            ctypes.CDLL(str(library))
            return True
    return False
