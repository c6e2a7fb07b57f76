# `make demo` and `make test` install what they need into .venv and run; nothing has to be done by hand before them.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo story lab lab-rates lab-two-hop lab-real test test-all test-vllm test-cpu test-web quality screenshot chromium benchmark benchmark-trl clean

install: .venv/.installed

.venv/.installed: setup.py pyproject.toml constraints.txt solopo_plugin.pth
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is %s; run: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@echo "Installing the pinned working set (7 GB on disk; minutes on a first run) ..."
	$(PIP) -e .
	@touch $@

.venv/.test: .venv/.installed
	$(PIP) setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e ".[test]"
	@touch $@

# One thread: a model this small gains nothing from a second, and two fight over the cores with whatever else runs
demo: export OMP_NUM_THREADS = 1
demo: export CUDA_VISIBLE_DEVICES =
demo: .venv/.installed
	$(BIN)/python scripts/lab/make_rows.py saves/demo/data
	$(BIN)/llamafactory-cli train examples/yaml/demo_solo_orpo.yaml
	@$(BIN)/python scripts/show_run.py saves/demo/solo_orpo
	@$(BIN)/python scripts/lab/show_accuracy.py saves/demo/solo_orpo

# The whole project in one script: rows, training, the same questions before and after, report
story: .venv/.installed
	@bash scripts/story.sh

# docs/lab.md: every arm, five seeds; the sweep of learning rates; the second task. Each continues where it was killed.
# ARGS="--arms solo_orpo dpo_long --seeds 0"; ARGS=--beyond: arms beyond the paper's comparison
LAB = CUDA_VISIBLE_DEVICES= $(BIN)/python scripts/lab/run.py
REPORT = $(BIN)/python scripts/lab/report.py
lab: .venv/.installed
	@$(LAB) $(ARGS); status=$$?; $(REPORT); exit $$status

lab-rates: .venv/.installed
	@$(LAB) --sweep $(ARGS); status=$$?; $(REPORT); exit $$status

lab-two-hop: .venv/.installed
	@$(LAB) --task two_hop $(ARGS); status=$$?; $(REPORT); exit $$status

# The third task, a real model on real questions: one GPU, an hour. DATA=FOLDER: of questions; without it the hub's SQuAD and NQ.
# ARGS=--small: two CPU cores, a night; --brief: two or three hours; --quick: one GPU, nine minutes. Without a network:
# scripts/gpu/real.sh
lab-real: .venv/.installed
	@$(BIN)/python scripts/lab/run.py --task real $(if $(DATA),--data $(DATA)) $(ARGS); status=$$?; \
	$(BIN)/python scripts/lab/report_real.py; exit $$status

# The core, some ten minutes on two cores: what is not marked `slow`. TESTS=tests/test_losses.py: one file
PYTEST = OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/web
test: .venv/.test
	$(PYTEST) -m "not slow" $(TESTS)

test-all: .venv/.test
	$(PYTEST) --durations=20 $(TESTS)

# Parity with the host and the packed row once more, as a processor without vector instructions rounds
test-cpu: .venv/.test
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/test_parity_host.py tests/test_packing.py

# vLLM for CPUs, of a release for the host's torch, over .venv's packages: 0.9 GB on disk
.venv-vllm/.installed: tests/serving/requirements.txt .venv/.test
	rm -rf .venv-vllm
	$(BIN)/pip --disable-pip-version-check download --quiet --no-deps -d .venv-vllm/wheels -r tests/serving/requirements.txt
	bash scripts/gpu/install.sh .venv-vllm .venv-vllm/wheels
	rm -r .venv-vllm/wheels
	@touch $@

# A real vLLM, its engine and its server. VLLM_SERVER=PYTHON: the server of another environment
VLLM_SERVER = .venv-vllm/bin/python3
test-vllm: .venv-vllm/.installed
	VLLM_ENGINE=.venv-vllm/bin/python3 VLLM_SERVER=$(VLLM_SERVER) OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
	$(BIN)/python -m pytest -q --durations=8 tests/serving

.venv/.quality: .venv/.installed
	$(PIP) -e ".[quality]"
	@touch $@

# Whether every file is in form, all types agree, and an index would take the package
quality: .venv/.quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	rm -rf build/quality && mkdir -p build
	$(BIN)/python -m build --outdir build/quality . >build/quality.log 2>&1 || { cat build/quality.log; exit 1; }
	$(BIN)/twine check --strict build/quality/*

.venv/.test-web: .venv/.test
	$(PIP) -e ".[test-web]"
	@touch $@

chromium:
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	else echo "The browser tests need Chromium: sudo apt-get install chromium"; exit 1; fi

test-web: .venv/.test-web chromium
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --reruns 1 tests/web

screenshot: .venv/.test-web chromium
	SOLOPO_SCREENSHOT=docs/board.png CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/web/test_web.py -k filled
	SOLOPO_SCREENSHOT=docs/evaluation_report.png $(BIN)/python -m pytest tests/web/test_report_page.py -k picture

# ARGS="--preset qwen2.5-7b" for one GPU; see docs/benchmarks
benchmark: .venv/.installed
	$(BIN)/python scripts/benchmark_step.py $(ARGS)

# With TRL's DPO beside them, from an environment of its own over this one's packages
.venv-trl/.installed: .venv/.installed
	rm -rf .venv-trl
	$(BIN)/pip --disable-pip-version-check download --quiet --no-deps -d .venv-trl/wheels \
	trl==1.16.0 datasets==4.8.0 dill==0.4.1 multiprocess==0.70.19 fsspec==2026.2.0
	bash scripts/gpu/install.sh .venv-trl .venv-trl/wheels
	@touch $@

benchmark-trl: .venv-trl/.installed
	TRL_PYTHON=.venv-trl/bin/python3 $(BIN)/python scripts/benchmark_step.py $(ARGS)

clean:
	rm -rf .venv .venv-trl .venv-vllm build dist *.egg-info saves .pytest_cache .hypothesis
