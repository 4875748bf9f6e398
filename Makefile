# Everything runs in .venv, which the first target that needs it makes. Packages are installed
# once; again only when pyproject.toml, constraints.txt or the choice of CUDA changed.

PYTHON ?= python3
ARGS ?=
CUDA ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# The last torch whose PyPI wheel is built for CUDA 12. A driver for CUDA 12 cannot run the one
# that constraints.txt names. It insists on its own NVRTC, so the version named there goes, too.
TORCH_CUDA12 := 2.10.0

# Which CuPy: CUDA from this call, else from an earlier one (kept in .venv/cuda-asked), else the
# newest CUDA that the driver runs. Looked up once, and only by targets that install.
asked = $(or $(CUDA),$(shell cat $(VENV)/cuda-asked 2>/dev/null),auto)
cuda = $(eval cuda := $(if $(filter auto,$(asked)),$(detect),$(asked)))$(cuda)
detect = $(shell \
	v=$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]* Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1); \
	if [ "$${v:-0}" -ge 13 ]; then echo 13x; elif [ "$${v:-0}" -eq 12 ]; then echo 12x; else echo none; fi)
found = $(if $(filter none,$(cuda)),since nvidia-smi names no driver for CUDA 12 or newer,as nvidia-smi says)

ifneq ($(CUDA),$(firstword $(filter auto 12x 13x none,$(CUDA))))
$(error CUDA must be 12x, 13x, none or auto, got $(CUDA))
endif

.PHONY: help setup train study test soak lint format doctor scale bench bench-compare bench-baseline bench-quick bench-gpu kernels gpu-check mutants FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo 'ARGS="..."          passed on to the script (train) or to pytest (test)'
	@echo 'CUDA=12x|13x|none   which CuPy to install, kept for later calls; auto asks nvidia-smi again'
	@echo 'PYTHON=python3.12   the interpreter to make .venv with (3.10 or newer)'

setup: $(VENV)/train.installed $(VENV)/test.installed $(VENV)/lint.installed ## make .venv with all that the other targets need

train: $(VENV)/train.installed ## train on MovieLens-100K; ARGS=--resume goes on, ARGS=--help lists the rest
	$(PY) examples/train_movielens.py $(ARGS)

study: $(VENV)/train.installed ## the convergence study, into docs/study.md; takes an hour or so, after Ctrl-C it goes on
	$(PY) examples/study.py $(ARGS)

# Side by side in as many processes as there are cores, but few: each may take some GB.
# ARGS=-n0 runs them one after another.
test: $(VENV)/test.installed ## run all tests; ends with what was skipped
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal $(ARGS)

soak: $(VENV)/test.installed ## the campaigns of docs/reliability.md in full, of which test runs a tenth
	SOAK=1 $(PY) -m pytest -s tests/test_soak_checkpoints.py tests/test_programs.py \
		tests/test_allocation.py tests/test_interruptions.py tests/test_checkpoint_operations.py \
		tests/test_threads.py tests/test_forks.py $(ARGS)

lint: $(VENV)/lint.installed ## ruff, mypy and clang-format; changes nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(if $(cuda_files),$(VENV)/bin/clang-format --dry-run --Werror $(cuda_files))

format: $(VENV)/lint.installed ## rewrite the code as lint wants it, as far as tools can
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format
	$(if $(cuda_files),$(VENV)/bin/clang-format -i $(cuda_files))

doctor: $(VENV)/train.installed ## what is installed, does each engine work here, how fast is it
	$(PY) -m cupy_sparse_adamw

bench: $(VENV)/bench.installed ## time steps beside all rivals: table and plots; 8 minutes or more, with nothing else running
	@mkdir -p $(RESULTS)
	@rm -f $(RESULTS)/all.json
	$(PY) -m pytest benchmarks -q --benchmark-quiet --benchmark-json=$(RESULTS)/all.json $(ARGS)
	@$(PY) benchmarks/report.py $(RESULTS)/all.json --plots

scale: $(VENV)/train.installed ## does a HashTable hold at 50 million rows? Needs 10 GB and some minutes
	PYTHONPATH="$(CURDIR)" $(PY) benchmarks/scale.py $(ARGS)

bench-compare: | $(PY) ## compare the ratios of the last bench with benchmarks/baseline.json
	@$(PY) benchmarks/report.py $(RESULTS)/all.json --compare

bench-baseline: | $(PY) ## make the last bench the baseline of this CPU
	@$(PY) benchmarks/report.py $(RESULTS)/all.json --write-baseline

# Again if the comparison fails (1) or others used the memory (3), three times at most: a case must be
# worse in every run that can judge it. A benchmark that fails, or what cannot be read, ends it.
bench-quick: $(VENV)/test.installed ## a minute of bench, compared with the baseline: is a step much slower?
	@mkdir -p $(RESULTS)
	@rm -f $(RESULTS)/quick-[123].json
	@for run in 1 2 3; do \
		$(PY) -m pytest benchmarks -q --quick --benchmark-quiet \
			--benchmark-json=$(RESULTS)/quick-$$run.json $(ARGS) || exit; \
		$(PY) benchmarks/report.py $(RESULTS)/quick-[123].json --compare && exit; \
		status=$$?; \
		[ $$status = 1 ] || [ $$status = 3 ] || break; \
	done; \
	[ $$status = 3 ] || exit $$status; \
	echo 'make bench-quick: nothing is known to be slower, but others used the memory: see "not judged"'

# With the Python that is there and what it has: such machines often have no network.
gpu-check: ## all that only an NVIDIA GPU can tell, into gpu-check.json; installs nothing
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" benchmarks/gpu_check.py $(ARGS)

bench-gpu: ## time steps on an NVIDIA GPU beside everyone else, into benchmarks/results; installs nothing
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PYTHON)" benchmarks/gpu_bench.py $(ARGS)

kernels: $(VENV)/test.installed ## write docs/kernels.md: what the compiler makes of the CUDA kernels; needs no GPU
	$(PY) tests/nvrtc.py

mutants: $(VENV)/test.installed ## put small faults into the kernels: does a test catch each? an hour on two cores
	$(PY) tests/mutate.py $(ARGS)

RESULTS := bench-results

cuda_files = $(wildcard cuda_src/*.cu cuda_src/*.cuh)

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo 'make: there is no "$(PYTHON)" here. Install Python 3.10 or newer, or name one:' \
			'make PYTHON=/path/to/python3.12 ...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: Python 3.10 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
			'Name a newer one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'make: $(PYTHON) comes without its venv module. On Debian and Ubuntu:' \
			'sudo apt install python3-venv' >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Rewritten only when its content changes, so that nothing is installed again for no reason.
$(VENV)/cuda: FORCE | $(PY)
	@$(if $(CUDA),echo $(CUDA) > $(VENV)/cuda-asked)
	@if [ "$$(cat $@ 2>/dev/null)" != $(cuda) ]; then \
		echo "CUDA: $(cuda), $(if $(filter auto,$(asked)),$(found),as asked for)"; \
		if [ -f $@ ]; then $(PIP) uninstall -qqy cupy-cuda12x cupy-cuda13x || exit 1; fi; \
		echo $(cuda) > $@; \
	fi

# setuptools comes first because building without isolation needs it, and isolation would fetch a
# second, unpinned one. recbole is only a container of data: it is never imported, so what it
# lacks is nothing to warn about.
$(VENV)/%.installed: pyproject.toml constraints.txt $(VENV)/cuda | $(PY)
	@sed '$(if $(filter 12x,$(cuda)),s/^torch==.*/torch==$(TORCH_CUDA12)/; /^nvidia-cuda-/d)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -q -c $(VENV)/constraints.txt setuptools
	$(PIP) install --no-warn-conflicts --no-build-isolation -c $(VENV)/constraints.txt \
		-e '.[$*$(if $(filter-out none,$(cuda)),$(comma)cuda$(cuda))]'
	$(if $(filter lint,$*),,$(PIP) install -q --no-deps -c $(VENV)/constraints.txt recbole)
	@touch $@

comma := ,
