# Each target does its own set-up on a machine that has only Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
export PIP_CONSTRAINT := $(CURDIR)/.build-constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# From random weights on generated pictures: one learning rate for all layers, warmed up, down to zero at the end.
DEMO := --dataset shapes --backbone_weights none --run_name demo --total_itrs 400 --crop_size 128 \
	--lr 0.05 --backbone_lr_factor 1 --lr_policy poly --warmup_itrs 30

.PHONY: demo test
demo: $(VENV)/ready
	$(VENV)/bin/python main.py $(DEMO) --save_val_results --continue_training
	@echo "Scores: runs/demo/history.csv  curves: runs/demo/curves.png  predictions: runs/demo/results/overlays"

test: $(VENV)/ready-to-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

$(VENV)/ready: requirements.txt .build-constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/ready-to-test: requirements-dev.txt $(VENV)/ready
	$(VENV)/bin/python -m pip install -r requirements-dev.txt
	@touch $@
