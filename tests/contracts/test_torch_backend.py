"""`import torchvision` beside a CPU-only PyTorch, and hands off everywhere else."""

import _ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.hooks import torch_backend


def run_python(code: str, *path: Path) -> str:
    """Run `code` in a fresh process, with `path` ahead of everything installed."""
    setup = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    # -P keeps the working directory, which has serve_app, out of sys.path: only the install counts.
    result = subprocess.run([sys.executable, "-P", "-c", setup + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def fake_torchvision(folder: Path, extension: bytes | None) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('must not be run')\n")
    if extension is not None:
        (package / "_C.so").write_bytes(extension)
    return folder


@pytest.fixture
def loadable() -> bytes:
    """A shared library that loads here: an extension module of Python's own."""
    return Path(_ctypes.__file__).read_bytes()


DEFINED = "import torch; print(hasattr(torch.ops.torchvision, 'nms'), hasattr(torch.ops.torchvision, 'qnms'))"


def test_torchvision_imports() -> None:
    run_python("import torch, torchvision, torchvision.transforms.v2, torchvision.ops")


def test_torchvision_imports_in_spawned_processes() -> None:
    run_python(
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(\n"
        "        target=__import__, args=('torchvision.transforms.v2',))\n"
        "    child.start(); child.join(); sys.exit(child.exitcode)"
    )


def test_module_imports_nothing_heavy() -> None:
    code = "import serve_app.hooks.torch_backend; print({'torch', 'torchvision', 'vllm', 'ray'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


@pytest.mark.usefixtures("cpu_torch")
@pytest.mark.parametrize("extension", [None, b"not a library"], ids=["missing", "broken"])
def test_declares_operators_when_extension_cannot_load(tmp_path: Path, extension: bytes | None) -> None:
    assert run_python(DEFINED, fake_torchvision(tmp_path, extension)).strip() == "True True"


def test_declares_nothing_when_extension_loads(tmp_path: Path, loadable: bytes) -> None:
    assert run_python(DEFINED, fake_torchvision(tmp_path, loadable)).strip() == "False False"


def test_declares_nothing_beside_torch_with_a_gpu(tmp_path: Path) -> None:
    code = (
        "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'; import torch\n"
        "torch.version.cuda = '13.0'\n"
        "from serve_app.hooks import torch_backend; torch_backend.register()\n"
    )
    assert run_python(code + DEFINED, fake_torchvision(tmp_path, None)).strip() == "False False"


def test_declares_nothing_without_torchvision() -> None:
    hide = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchvision' else find(name, *a)\n"
    )
    assert run_python(hide + DEFINED).strip() == "False False"


def test_registering_again_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    torch_backend.register()
    torch_backend.register()
    assert not caplog.records


@pytest.mark.usefixtures("cpu_torch")
def test_failure_is_logged_and_torch_still_imports() -> None:
    broken = (
        "import importlib.util as u; find = u.find_spec\n"
        "def fail(name, *a):\n"
        "    if name == 'torchvision': raise ValueError('no spec today')\n"
        "    return find(name, *a)\n"
        "u.find_spec = fail\n"
    )
    output = run_python(broken + "import torch; torch.version.cuda or print('imported')")
    assert "imported" in output
    assert "no spec today" in output


@pytest.mark.usefixtures("cpu_torch")
def test_is_cheap() -> None:
    code = (
        "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'; import torch, time\n"
        "from serve_app.hooks import torch_backend; start = time.thread_time(); torch_backend.register()\n"
        "print(time.thread_time() - start)"
    )
    assert float(run_python(code)) < 0.05  # typically 0.002 s


def test_torchaudio_imports_and_resamples() -> None:
    code = (
        "import torch, torchaudio, transformers.audio_utils\n"
        "print(tuple(torchaudio.transforms.Resample(16000, 8000)(torch.zeros(1, 1600)).shape))"
    )
    assert run_python(code).strip() == "(1, 800)"


@pytest.mark.usefixtures("cpu_torch")
def test_torchcodec_counts_as_not_installed() -> None:
    code = (
        "import torch, importlib.util\n"
        "try:\n    import torchcodec\nexcept ImportError:\n    print('skipped')\n"
        "assert importlib.util.find_spec('torchcodec') is None\n"
        "import vllm.multimodal.media.audio"
    )
    assert "skipped" in run_python(code).splitlines()
