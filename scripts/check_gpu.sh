#!/usr/bin/env bash
# vLLM's GPU build on a machine without a card, in an environment of its own: every config of this repository by vLLM's own
# code on a faked platform, then units and contracts. Leaves in tests/gpu/build/passed what it has covered.
#
#   --if-changed   does nothing where that file names everything it covers as it is now. CI asks so: the packages are 5 GB,
#                  and the whole takes a third of the time of all other tests
#   EPD_GPU_VENV   the environment (default .venv-gpu), where it is kept from run to run
set -euo pipefail
cd "$(dirname "$0")/.."

covers=(serve_app deployments benchmarks examples k8s serve_config.yaml pyproject.toml scripts tests/conftest.py tests/fakes.py
    tools tests/unit tests/contracts tests/repo/test_examples.py tests/repo/test_dashboard.py tests/gpu/build)
passed=tests/gpu/build/passed
digest=$(git ls-files -z --cached --others --exclude-standard -- "${covers[@]}" ":!$passed" ":!*/results/*" ":!*.md" |
    sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)

if [[ ${1:-} == --if-changed && -f $passed && $(head -n 1 "$passed") == "$digest" ]]; then
    echo "[check-gpu] passed before with these files ($(tail -n 1 "$passed"))"
    exit 0
fi

export EPD_VENV=${EPD_GPU_VENV:-.venv-gpu}
EPD_EXTRA=gpu bash scripts/setup.sh
PATH=$(cd "$EPD_VENV/bin" && pwd):$PATH
export PATH
EPD_FAKED_CARDS=1 python -m pytest -q tests/gpu/build
VLLM_TARGET_DEVICE=cpu python -m pytest -q tests/unit tests/contracts tests/repo/test_{examples,dashboard}.py
{
    echo "$digest"
    python -c 'import sys, torch, vllm; print(f"Python {sys.version.split()[0]}, vLLM {vllm.__version__}, PyTorch {torch.__version__}")'
} >"$passed"
