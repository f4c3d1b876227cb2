# make test    lint, types and all tests on the installed package (own virtual environment)
# make demo    train experts, answer a mixed batch in two passes; MODEL=path serves another model,
#              EXPERT="a.safetensors b.safetensors" under these experts
# make evidence  the method's claims on the small model: many training runs, resumable (an hour of two
#              cores; STORIES=folder adds a model that tells stories, SEEDS=5)
# make claims  what the paper says, tried over seeds: docs/claims.md (an hour of two cores;
#              STORIES, SEEDS, DATA=folder of data sets; EVIDENCE=file made by make evidence answers
#              the claims about training; with UNITS="dispatch ..." to out/claims only)
# make gpu     where a GPU is: build, test and benchmark with the Python that is there, no network
# make build   compile the native module into the source tree, for work on it
# make clean   remove everything the above have made
#
#   PYTHON=python3.12     the interpreter to start from
#   PHASE=build,bench     phases of make gpu (make gpu PHASE=list); DRY_RUN=1 rehearses on a CPU
#   OUT=folder            where make gpu and make demo leave their results (default out)
#   TESTS="tests/ops -k slot"   what make test gives to pytest

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
PHASE ?= all
DRY_RUN ?= 0
MODEL ?=
EXPERT ?=
STORIES ?=
SEEDS ?= 5
DATA ?=
UNITS ?=
EVIDENCE ?= $(wildcard $(OUT)/evidence/evidence.json)
TESTS ?= tests
WORKERS ?= 2

BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
# The build environment that pip makes for itself obeys these (new pip, old pip).
PIP := PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) PIP_CONSTRAINT=$(CONSTRAINTS) \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

.PHONY: help test lint demo evidence claims gpu build clean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Not editable: the tests must see what a user gets. Building again is incremental (build/).
.PHONY: install-test install-demo
install-test: $(BIN)/python
	@echo "installing: compiles and downloads, takes minutes"
	$(PIP) install -q "triton; sys_platform == 'linux'" ".[test]"
install-demo: $(BIN)/python
	@echo "installing: compiles and downloads, takes minutes"
	$(PIP) install -q ".[hf,plot]"

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# By file: modules that build a library do so in one worker. (loadgroup of pytest-xdist 3.8 groups
# nothing with pytest 9.2.) Spinning threads of two workers would fight for the cores.
test: lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q --doctest-modules --pyargs t2kernels t2runtime
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(WORKERS) --dist loadfile $(TESTS)

# Through the console script: `python -m` would put the source tree before the installed package.
demo: install-demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/t2 demo --out $(OUT)/demo $(if $(MODEL),--model "$(MODEL)") \
		$(foreach file,$(EXPERT),--expert "$(file)")

evidence: install-demo
	$(PIP) install -q ".[hf,peft,plot]"
	mkdir -p $(OUT)/evidence
	cd $(OUT)/evidence && $(abspath $(BIN))/python -m t2runtime.evidence --out . --seeds $(SEEDS) \
		$(if $(STORIES),--stories "$(abspath $(STORIES))")

claims: install-demo
	$(PIP) install -q ".[hf,plot,search,vision,peft]"
	mkdir -p $(OUT)/claims
	cd $(OUT)/claims && $(abspath $(BIN))/python -m t2runtime.claims --out . --seeds $(SEEDS) \
		$(if $(UNITS),--units $(UNITS)) $(if $(STORIES),--stories "$(abspath $(STORIES))") \
		$(if $(DATA),--data "$(abspath $(DATA))") $(if $(EVIDENCE),--evidence "$(abspath $(EVIDENCE))")
	$(if $(UNITS),,cp $(OUT)/claims/claims.md $(OUT)/claims/claims*.png docs && \
		cp $(OUT)/claims/claims.json benchmarks/results)

gpu:
	$(PYTHON) benchmarks/gpu.py --phase "$(PHASE)" --out "$(OUT)" $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

build:
	$(PYTHON) setup.py -q build_ext --inplace

clean:
	rm -rf build dist out .gpu .venv *.egg-info t2kernels/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
