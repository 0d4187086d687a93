# make setup | demo | test | test-long | bench-gpu | docs | lint: each sets up .venv automatically, once.
PYTHON ?= python3
# Number of test processes: one more than cores, as many tests wait for runs they started; and the tests to run.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
TESTS ?= tests
# Threads per process: one is fastest for small networks, and more threads than free cores spoil timings.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-long test-slurm bench-gpu docs lint

help:
	@echo "make setup      set up .venv (once: about 6 GB, one to five minutes)"
	@echo "make demo       train a small DAT++ on handwritten digits (about 70 s of CPU time)"
	@echo "make test       run all tests but the long ones, on all cores; TESTS=tests/data runs a part"
	@echo "make test-long  the tests that kill and resume runs at many moments, and other long tests"
	@echo "make test-slurm train_slurm.sh on a SLURM of two nodes on this machine (Debian's slurm-wlm and munge, root)"
	@echo "make bench-gpu  on a GPU: check the kernels on it, measure networks, write benchmarks/gpu.md"
	@echo "make docs       build the documentation, build/docs/index.html"
	@echo "make lint       ruff"

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@echo "demo: training configs/digits.yaml on 1,437 real handwritten digits; about 70 s of CPU time"
	@.venv/bin/python main.py --cfg configs/digits.yaml --output output/demo --opts TRAIN.AUTO_RESUME False

test: setup
	@echo "test: $(TESTS), on all cores"
	@.venv/bin/python -m pytest -rs -n $(WORKERS) -m "not slow" $(TESTS)

test-long: setup
	@echo "test-long: the long tests"
	@.venv/bin/python -m pytest -m slow

test-slurm: setup
	@echo "test-slurm: train_slurm.sh on a SLURM of two nodes on this machine, two minutes; skipped without SLURM"
	@.venv/bin/python -m pytest -m slow -rs tests/test_slurm.py

bench-gpu: setup
	@.venv/bin/python -m benchmarks.gpu --check
	@echo "bench-gpu: the kernels against the plain operations, then images a second of networks"
	@.venv/bin/python -m pytest tests/models/ops/gpu
	@.venv/bin/python -m benchmarks.gpu

docs: setup
	@.venv/bin/python -m sphinx -W --keep-going -q docs build/docs
	@echo "docs: build/docs/index.html"

lint: setup
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
