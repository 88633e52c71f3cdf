# Each target does its own set-up on a machine that has only Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
export PIP_CONSTRAINT := $(CURDIR)/.build-constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What a user does with masks of their own: start from the bundled model, train, evaluate each epoch, compare.
DEMO := --dataset shapes --init_from voc --run_name demo --total_itrs 200 --crop_size 128 \
	--lr 0.05 --backbone_lr_factor 1 --lr_policy poly --warmup_itrs 20

.PHONY: demo test
demo: $(VENV)/ready
	$(VENV)/bin/python visualize.py predict --input docs/images/cat.jpg --out runs/demo/photograph
	$(VENV)/bin/python main.py $(DEMO) --continue_training
	$(VENV)/bin/python visualize.py compare --dataset shapes --split val --ckpt runs/demo/best.pth --out runs/demo/compare.png
	@echo "In runs/demo: photograph/overlays/cat.jpg  history.csv  curves.png  compare.png"

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
