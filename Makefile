# Two commands: make demo, make test (make test-all: the slow tests too). Every target sets up .venv by itself, once.

PYTHON ?= python3
BIN := .venv/bin
CODE := src tests examples $(wildcard benchmarks)

# The demo: the same size per token, but MoE-Mamba chooses among 32 experts. make demo STEPS=20 SEEDS=1 is a quick look.
STEPS ?= 1200
SEEDS ?= 2
OUT ?= runs/demo
JOBS ?= 2
MAMBA := mamba=mamba-tiny,d_model=32
MOE_MAMBA := moe-mamba=moe-mamba-tiny,d_model=32,expand=3.0,n_experts=32,top_k=2,d_expert=16
BUDGET := --batch-size 8 --context 256 --learning-rate 0.02 --eval-every 200 --eval-tokens 131072

.PHONY: demo test test-all check format test-gpu bench clean

demo: .venv/installed  ## train Mamba and MoE-Mamba of equal active size on Python's standard library, compare, sample
	$(BIN)/moemamba compare $(MAMBA) $(MOE_MAMBA) --steps $(STEPS) --seeds $(SEEDS) --jobs 2 $(BUDGET) --out $(OUT)
	@echo
	$(BIN)/moemamba generate $(OUT)/moe-mamba/seed-0 --prompt 'def ' --max-new-tokens 400 --temperature 0.8 --seed 0

test: .venv/developing  ## the tests that need no GPU, without the slow ones, in two processes; make test JOBS=8
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow"

test-all: test  ## and the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not gpu"

test-gpu: .venv/developing
	$(BIN)/python -m pytest -m gpu

check: .venv/developing  ## format, lint and types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: .venv/developing
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: .venv/developing  ## each benchmark ends in one line of JSON, which says so where it needs more than there is
	for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moemamba needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/developing: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# CUDA builds of torch bring their Triton; elsewhere on Linux its interpreter tests the kernels, in this version.
	[ "$$(uname)" != Linux ] || $(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/pip install --quiet --disable-pip-version-check triton==3.6.0
	@touch $@
