# Targets: pretrain (demo), downstream (finetuning and evaluation of the demo's model), study (of the baselines), test,
# test-slow, test-faults (kills, damaged files, memory), style, docs (the site, in site/), bench (speed), bench-ffcv
# (builds ffcv for bench). All of them make .venv first if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FFCV := .venv-ffcv
# One process on this machine; the flags spare a new user accelerate's questions, and its traceback after an error.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: pretrain downstream study test test-slow test-faults style docs bench bench-ffcv

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt tests/link_ffmpeg.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,docs]"
	$(BIN)/python tests/link_ffmpeg.py $(VENV)/ffmpeg
	touch $@

data/demo/demo.json: | $(VENV)/installed
	$(BIN)/python examples/demo_data/demo_data.py --output data/demo

pretrain: $(VENV)/installed data/demo/demo.json
	$(LAUNCH) examples/pytorch/run_pretraining.py examples/pytorch/configs/demo.yaml
	$(BIN)/python examples/pytorch/run_linear_probe.py --model_name_or_path outputs/demo \
		--train_data data/demo/appearance/train --eval_data data/demo/appearance/eval --output_dir outputs/demo/probe

data/demo_large/demo.json: | $(VENV)/installed
	$(BIN)/python examples/demo_data/demo_data.py --output data/demo_large \
		--appearance_videos 0 0 --motion_videos 100 40 --images 100 40

outputs/demo/model.safetensors:
	$(MAKE) pretrain

downstream: $(VENV)/installed data/demo_large/demo.json outputs/demo/model.safetensors
	$(BIN)/python examples/study/downstream.py --pretrained outputs/demo --output_dir outputs/downstream

data/study/demo.json: | $(VENV)/installed
	$(BIN)/python examples/demo_data/demo_data.py --output data/study \
		--appearance_videos 60 40 --motion_videos 25 1 --images 20 1

study: $(VENV)/installed data/study/demo.json
	for kind in appearance motion images; do \
		$(BIN)/python examples/pytorch/pack_frames.py --input data/study/$$kind/train --output data/study-store/$$kind \
			--frames_per_second 0 --short_side 0 --num_proc 2 || exit 1; \
	done
	$(BIN)/python examples/study/run_study.py --recipe examples/study/study.yaml \
		--train_data data/study-store/appearance data/study-store/motion data/study-store/images \
		--probe_train_data data/study/appearance/train --probe_eval_data data/study/appearance/eval \
		--output_dir outputs/study --report docs/study.md

# torchcodec takes FFmpeg's libraries from PyAV's wheel.
test: $(VENV)/installed
	LD_LIBRARY_PATH=$(CURDIR)/$(VENV)/ffmpeg $(BIN)/pytest

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# One after the other, and with the tables that they print.
test-faults: $(VENV)/installed
	$(BIN)/pytest tests/faults -m faults -n 1 -rP --show-capture=stdout

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A warning is an error. The variable spares the banner of mkdocs-material about MkDocs 2, which it does not use.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# VIDEOS: any folder of videos. ffcv is measured too where `make bench-ffcv` has built it.
VIDEOS ?= data/demo/appearance

bench: $(VENV)/installed data/demo/demo.json
	$(BIN)/python benchmarks/decoding.py --videos $(VIDEOS)
	LD_LIBRARY_PATH=$(CURDIR)/$(VENV)/ffmpeg $(BIN)/python benchmarks/loading.py --videos $(VIDEOS) --ffcv_python $(FFCV)/bin/python
	$(BIN)/python benchmarks/image_steps.py --videos $(VIDEOS)
	$(BIN)/python benchmarks/step.py

# Needs: apt-get install libturbojpeg0-dev libopencv-dev pkg-config. Borrows torch from $(VENV).
bench-ffcv: $(FFCV)/installed

$(FFCV)/installed: | $(VENV)/installed
	$(BIN)/python -m venv $(FFCV)
	$(FFCV)/bin/pip install --quiet assertpy fastargs numba opencv-python-headless packaging pandas pillow psutil \
		setuptools terminaltables tqdm typing_extensions wheel
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(FFCV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	$(FFCV)/bin/pip install --quiet --no-deps pytorch_pfn_extras
	$(FFCV)/bin/pip install --quiet --no-deps --no-build-isolation ffcv==1.0.2
	touch $@
