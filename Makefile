# Targets: pretrain (demo), test, test-slow, style, bench. All of them make .venv first if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process on this machine; the flags spare a new user accelerate's questions.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: pretrain test test-slow style bench

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

data/demo/demo.json: | $(VENV)/installed
	$(BIN)/python -m vicmae_hf.data.demo --output data/demo

pretrain: $(VENV)/installed data/demo/demo.json
	$(LAUNCH) examples/pytorch/run_pretraining.py examples/pytorch/configs/demo.yaml
	$(BIN)/python examples/pytorch/run_linear_probe.py --model_name_or_path outputs/demo \
		--train_data data/demo/appearance/train --eval_data data/demo/appearance/eval --output_dir outputs/demo/probe

test: $(VENV)/installed
	$(BIN)/pytest

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed data/demo/demo.json
	$(BIN)/python benchmarks/decoding.py --videos data/demo/appearance
