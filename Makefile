# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
export PYTHON
BIN := .venv/bin

.PHONY: demo test test-gpu lint format parity bench clean

.venv/.demo: pyproject.toml scripts/setup.sh
	scripts/setup.sh sim,client
	@touch $@

.venv/.dev: pyproject.toml scripts/setup.sh
	scripts/setup.sh dev
	@touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov=turbopi --cov-report=term:skip-covered
	$(BIN)/python -m coverage report --include="turbopi/model/*,turbopi/transforms/*,turbopi/checkpoint/*" --fail-under=95 --format=total

# Every test that needs a CUDA GPU. Fails at once where there is none, instead of skipping all of them.
test-gpu: .venv/.dev
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("make test-gpu: torch finds no CUDA GPU here")'
	$(BIN)/python -m pytest -m gpu

lint: .venv/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: .venv/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Tap by tap against openpi, lerobot and JAX. FULL=path/to/full adds the 3.3-billion-parameter records.
parity: .venv/.dev
	$(BIN)/python scripts/parity.py tests/data/tiny tests/data/long $(FULL) --out benchmarks/results/parity.json

bench: .venv/.dev
	$(BIN)/python benchmarks/dropped_vs_masked.py

clean:
	rm -rf .venv build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
