# make demo    install into .venv, then run the whole workflow on a simulated set with known answers
# make test    install, then run all tests        (PYTEST_ARGS='-m "not heavy"' leaves out the long ones)
# make test-cluster  the tests on a real Slurm, which they start: as root, on Debian or Ubuntu (20 minutes)
# make lint    formatting, typing and the workflow's own checks
# make bench   score ours and cryoDRGN on sets with known answers (hours; BENCH_ARGS='--sets hinge32 --seeds 0')
# make config  renew the schema, the template and the table of keys from the models
# make clean   remove .venv, caches and the demo

CORES ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?= --peer-epochs 100
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
INSTALLED := .venv/installed
LINT_CONFIG := 'datasets={lint: {particles: particles.star}}'

.DELETE_ON_ERROR:
.PHONY: demo install test test-cluster lint bench config clean

demo: $(INSTALLED)
	$(BIN)/cryodrgn-pipeline demo -o demo --cores $(CORES)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; none was found." \
		"On Debian or Ubuntu: apt install python3 python3-venv. Or: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual" \
		"environment. On Debian or Ubuntu: apt install python3-venv" \
		"(or $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))" >&2; exit 1; }
	@echo "installing into .venv (once; some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m slurm $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check --compact-diff Snakefile workflows/Snakefile rules
	$(BIN)/snakemake --lint --snakefile workflows/Snakefile --config $(LINT_CONFIG)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

config: $(INSTALLED)
	$(BIN)/python -m cryodrgn_pipeline.config

clean:
	rm -rf .venv demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .snakemake
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
