"""Lets torchvision, torchaudio and torchcodec be imported, or be skipped, beside a CPU-only PyTorch.

On Linux, PyPI has only CUDA builds of the three. Beside a CPU build of PyTorch their compiled extensions cannot load, and
each raises when it is imported: torchvision because it registers fake kernels for its operators `nms` and `qnms`,
torchaudio and torchcodec because they take an extension that does not load for a broken installation. vLLM and
transformers import all three when they are installed, and need pure-Python parts of two: image transforms, resampling.

So: two declarations without a kernel for torchvision; for torchaudio a module that says what its own would say in an
installation without the extension; and torchcodec counts as not installed (vLLM then decodes audio with soundfile and
video with OpenCV). Calling what is compiled still fails.

PyTorch calls `register` at the end of every `import torch`, in spawned processes too: it is the entry point
`epd_torchvision` in group `torch.backends`. So this module must be cheap and must never raise. It can go once PyPI
carries CPU builds.
"""

import ctypes
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def register() -> None:
    """Stand in for compiled extensions that cannot load. Failures are logged: raising here would break `import torch` for
    every program in the environment."""
    try:
        import torch

        # A PyTorch that has CUDA or ROCm: its companions either fit it or are a mistake that the user should see.
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
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)


def _replace_torchaudio_extension() -> None:
    package = _folder("torchaudio")
    if package is None or "torchaudio" in sys.modules or _any_loads(package / "lib", "_torchaudio"):
        return

    def fail_if_no_align(function: object) -> object:
        return function

    stub = ModuleType("torchaudio._extension")
    stub.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=fail_if_no_align
    )
    sys.modules[stub.__name__] = stub


def _hide_torchcodec() -> None:
    package = _folder("torchcodec")
    if package is not None and "torchcodec" not in sys.modules and not _any_loads(package, "libtorchcodec_image"):
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # what Python knows as "not installed"


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # finds it without running it
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _any_loads(folder: Path, extension: str) -> bool:
    """Ask the loader itself: it knows about missing libraries and foreign symbols alike, in 1 to 5 ms when
    it fails. Where it succeeds (a CPU build) it only does early what the import does anyway."""
    for library in (*folder.glob(f"{extension}*.so"), *folder.glob(f"{extension}*.pyd")):
        try:
            ctypes.CDLL(str(library))
        except OSError:
            continue
        return True
    return False
