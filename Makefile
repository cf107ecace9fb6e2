# make demo    answer a prompt with a real model; the first run installs and fetches it
# make test    all tests that need no other framework
# make lint    ruff and pyright
# make bench   forerun beside its peers (installs them; compiling llama.cpp takes long)
# make oracle  compare with transformers and optimum, and test training, in an environment with torch
#
# Each target makes the environment it needs; only python3 (3.11 or newer) with venv and pip is
# needed. PYTHON=python3.12 chooses another Python, FORERUN_HOME=DIR another place for models.

PYTHON ?= python3
VENV := .venv
ORACLE_VENV := .venv-oracle
BENCH_VENV := .venv-bench
MODEL := smollm2-135m
PROMPT := How do I make friends?
BENCH_JSON := bench-text.json
DRAFT_JSON := bench-draft.json
SWIFTSHADER := build/swiftshader/libvulkan.so.1
# A second pip's notice and its progress bars would drown what the targets print.
PIP := -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:
.PHONY: demo test lint bench oracle models clean

demo: $(VENV)/run.stamp
	$(VENV)/bin/forerun pull $(MODEL):int4-exact
	$(VENV)/bin/forerun generate "$(PROMPT)" --model $(MODEL):int4-exact --max-tokens 120 --stats

# Without a GPU, WebGPU runs in software; where that cannot be had, its tests are left out.
test: $(VENV)/dev.stamp models
	-test -e $(SWIFTSHADER) || bash tests/swiftshader.sh $(dir $(SWIFTSHADER))
	$(VENV)/bin/python -m pytest -m "not oracle"

# Type checkers do not see through an editable install whose package is the repository itself, so
# they get a folder (extraPaths in pyproject.toml) with a link of the package's name.
lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/typing
	ln -sfn "$(CURDIR)" build/typing/forerun
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(BENCH_VENV)/stamp
	$(BENCH_VENV)/bin/forerun pull $(MODEL)
	$(BENCH_VENV)/bin/forerun pull $(MODEL):int4-exact
	$(BENCH_VENV)/bin/forerun bench text --peers --json $(BENCH_JSON)
	$(BENCH_VENV)/bin/forerun bench draft --model $(MODEL):int4-exact --peers --limit 4 --json $(DRAFT_JSON)

oracle: $(ORACLE_VENV)/stamp
	$(ORACLE_VENV)/bin/forerun pull $(MODEL) --variant fp32
	$(ORACLE_VENV)/bin/python -m pytest -m oracle tests/oracle
	$(ORACLE_VENV)/bin/python -m pytest -m "not oracle" tests/export/training

models: $(VENV)/run.stamp
	$(VENV)/bin/forerun pull $(MODEL) --variant fp32
	$(VENV)/bin/forerun pull $(MODEL)
	$(VENV)/bin/forerun pull $(MODEL):int4-exact

clean:
	rm -rf $(VENV) $(ORACLE_VENV) $(BENCH_VENV) build *.egg-info

# A stamp is written last, so an environment that was interrupted is made again.
$(VENV)/run.stamp: pyproject.toml
	$(call make_venv,$(VENV))
	$(VENV)/bin/python $(PIP) -e .
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/run.stamp
	$(VENV)/bin/python $(PIP) -e ".[dev,webgpu,qnn]" || $(VENV)/bin/python $(PIP) -e ".[dev]"
	touch $@

$(ORACLE_VENV)/stamp: pyproject.toml tests/oracle/requirements.txt
	$(call make_venv,$(ORACLE_VENV))
	$(ORACLE_VENV)/bin/python $(PIP) -e . -r tests/oracle/requirements.txt
	touch $@

$(BENCH_VENV)/stamp: pyproject.toml
	$(call make_venv,$(BENCH_VENV))
	$(BENCH_VENV)/bin/python $(PIP) -e ".[peers]"
	touch $@

define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is missing or older than 3.11; run make PYTHON=python3.x $(MAKECMDGOALS)" >&2; exit 2; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
@echo "installing into $(1)"
$(PYTHON) -m venv $(1)
endef
