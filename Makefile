# Two commands for a fresh machine with Python 3.11 and make:
#   make demo   set up .venv, run the main job on the embedded models, leave pictures and a report in out/
#   make test   set up .venv, run the test suite
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= out

# Two cores: one OpenMP thread per process wins, and passive waiting keeps a busy machine usable.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format bench bench-kernels clean

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "needs $(PYTHON); set PYTHON=... to another interpreter >= 3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mmattn compare --out $(OUT)
	@echo "Look at $(OUT)/report.html"

# Two processes of one thread finish sooner than one of two; files stay together for their fixtures.
WORKERS ?= 2
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/mmattn bench --json

# Spinning threads, as torch has them by default: a benchmark is run on an idle machine.
bench-kernels: export OMP_WAIT_POLICY = ACTIVE
bench-kernels: $(STAMP)
	$(BIN)/python kernels/bench

clean:
	rm -rf $(VENV) $(OUT) dist build .mypy_cache .ruff_cache .pytest_cache
