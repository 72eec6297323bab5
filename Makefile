.DEFAULT_GOAL := help
BIN := .venv/bin
CONFIG ?= serve_config.yaml
ARGS ?=

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Make .venv, or bring it up to date (EPD_EXTRA=cpu|gpu overrides the choice by GPU)
	@bash scripts/setup.sh

# The environment's bin comes first in PATH: engines call tools that live there, such as ninja.
.PHONY: serve
serve: setup ## Serve (CONFIG=serve_config.yaml)
	@export PATH="$(CURDIR)/$(BIN):$$PATH" VLLM_LOGGING_LEVEL="$${VLLM_LOGGING_LEVEL:-WARNING}" \
		RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.proxy:middlewares \
		RAY_SERVE_PROXY_USE_GRPC=1 RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=1073741824; \
	exec python -m serve_app serve $(CONFIG)

.PHONY: test
test: setup ## Run the tests (ARGS="-k name -x")
	@bash scripts/chromium.sh
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest $(ARGS)

.PHONY: test-models
test-models: setup ## Test other families of models, tiny and random, ten minutes (ARGS="-k Gemma"; docs/models.md)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -m models tests/models $(ARGS)

.PHONY: chaos
chaos: setup ## Break things under load, 3 rounds (EPD_CHAOS_ROUNDS=n), and print what became of the requests
	@PATH="$(CURDIR)/$(BIN):$$PATH" EPD_CHAOS_ROUNDS="$${EPD_CHAOS_ROUNDS:-3}" python -m pytest -s tests/chaos $(ARGS)

.PHONY: bench
bench: setup ## Measure what stages are worth, an hour (ARGS=--quick: seven minutes; benchmarks/RESULTS.md)
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/pip install -q -e ".[bench]"
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m benchmarks.bench $(ARGS)

.PHONY: gpu
gpu: setup ## Measure on one card in under ten minutes (ARGS=--check: only say what is missing; benchmarks/gpu/RESULTS.md)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m benchmarks.gpu $(ARGS)

.PHONY: autoscale
autoscale: setup ## Drive text, images and quiet, and draw who is scaled when (benchmarks/results/autoscale.png)
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/pip install -q -e ".[bench]"
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m benchmarks.autoscale $(ARGS)

.PHONY: measure
measure: setup ## Measure service times here, and the error of the simulation (benchmarks/results/service_times.json)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m benchmarks.measure_service $(ARGS)

.PHONY: simulate
simulate: setup ## Simulate 1 to 1,000 replicas per stage, a burst and a day (ARGS=--quick), or plan (ARGS="plan traffic.yaml")
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/pip install -q -e ".[bench]"
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m tools.sim $(ARGS)

.PHONY: check
check: setup ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: check-gpu
check-gpu: ## Check what vLLM's GPU build makes of us, without a card (.venv-gpu: 10 GB, a quarter of an hour)
	@bash scripts/check_gpu.sh $(ARGS)

.PHONY: format
format: setup ## Format, and fix what lint can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove .venv, caches and build files
	rm -rf .venv .venv-gpu .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
