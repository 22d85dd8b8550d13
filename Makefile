# make demo        trains a small cascade, makes pictures from prompts and measures them
# make demo-fast   teaches the demo's base to draw in 4 evaluations instead of 50
# make test        runs what has to pass: lint and tests, side by side
# make test-slow   runs the storms of faults and the benchmarks, small ones
# make test-hosts  trains on two and three machines in Linux namespaces (root, iproute2)
# make lint        style, types, import directions, spelling
# All create the environment in .venv first; nothing else is touched.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PROMPTS := "red heart" "sun" "strawberry" "pizza" "rocket" "rainbow" "grinning cat" "snowman"

# Of pytest, on two cores: some tests wait for processes rather than compute.
WORKERS := 3

.PHONY: demo demo-fast test test-slow test-hosts lint pytest check-machine clean

demo: $(VENV)/.demo
	. $(BIN)/activate && deepspeed --num_accelerators 1 launch/train.py --config configs/emoji_demo.json
	$(BIN)/imagen-scale sample $(PROMPTS) --run runs/emoji_demo --steps 25 --cond-scale 2
	$(BIN)/imagen-scale evaluate --run runs/emoji_demo --steps 25 --cond-scale 2

demo-fast: $(VENV)/.demo
	@test -f runs/emoji_demo/unet2/inference.safetensors || $(MAKE) --no-print-directory demo
	$(BIN)/imagen-scale distill runs/emoji_demo --steps 4,keep --cond-scale 2 --train-steps 300 --set training.lr=0.001
	$(BIN)/imagen-scale sample $(PROMPTS) --run runs/emoji_demo_steps4-keep --steps 4,2
	$(BIN)/imagen-scale evaluate --run runs/emoji_demo_steps4-keep --steps-table --num 48

test: $(VENV)/.test
	@$(MAKE) --no-print-directory -j2 lint pytest

pytest: $(VENV)/.test
	. $(BIN)/activate && python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test
	. $(BIN)/activate && python -m pytest -m slow

test-hosts: $(VENV)/.test
	. $(BIN)/activate && python -m pytest -m hosts

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell imagen_scale export launch configs docs README.md CONTRIBUTING.md

$(VENV)/.demo: pyproject.toml constraints.txt | check-machine
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,emoji]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

check-machine:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found. \
	Install one, e.g. apt install python3.11 python3.11-venv, or name it: make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: this Python cannot make \
	environments. Install the venv package of your Python, e.g. apt install python3-venv"; exit 2; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
	2>/dev/null || { echo "error: Python's headers are missing. Install them, e.g. apt install python3-dev"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "error: DeepSpeed compiles its operators and no C++ \
	compiler was found. Install one, e.g. apt install g++"; exit 2; }

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
