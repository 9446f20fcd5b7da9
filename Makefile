# make setup | make pretrain | make test | make test-peers | make gpu-proof | make gpu-pack; each sets
# itself up on a fresh machine.
#
#   make pretrain                      7B-style model on text found on this machine
#   make pretrain MODEL=classic        classic blocks, both cells, at [3:1]
#   make pretrain DATA='my/*.jsonl.gz' STEPS=500
#   make pretrain DATA=my.parquet TEXT_FIELD=content VOCAB=4096
#   make pretrain WORK=/scratch/demo   where corpus, shards and runs go
#   make test TESTS='tests/kernels -k boundaries'
#   make test JOBS=8                   files of tests side by side

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= large
STEPS  ?= 200
DATA   ?=
TEXT_FIELD ?= text
VOCAB  ?= 8192
WORK   ?= runs/demo
NPROC  ?=
TESTS  ?= tests
JOBS   ?= 2

# The tested stack for the interpreter at hand. Another one: make setup CONSTRAINTS=constraints/...
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("constraints/" + ("py312-mcore019.txt" if sys.version_info >= (3, 12) else "py311-mcore016.txt"))')
INSTALLED   := $(VENV)/.installed

# Python compiles what is imported; compiling every file of every package takes a minute.
INSTALL     := -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS)

PROOF ?= build/gpu-proof

.PHONY: setup setup-peers pretrain test test-peers gpu-proof gpu-pack lint
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version`. Use: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@echo "installing into $(VENV) (about 3 GB; once)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -e '.[dev]'
	@touch $@

pretrain: $(INSTALLED)
	@exec $(VENV)/bin/python -m pretrain demo --model $(MODEL) --steps $(STEPS) --work '$(WORK)' $(if $(NPROC),--nproc $(NPROC)) --text-field '$(TEXT_FIELD)' --vocab-size $(VOCAB) $(if $(DATA),--data '$(DATA)')

# Test processes that work side by side have one core each: threads that spin while they wait for one
# another double the time of small operations.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

# Against pip xlstm and mlstm-kernels, whose licence is not Apache-2.0 (see tests/peers.txt), and under
# lm-evaluation-harness, which brings forty packages.
test-peers: setup-peers
	.venv-peers/bin/python -m pytest tests/xlstm_mcore/test_peers.py tests/pretrain/evaluation/test_harness.py

setup-peers: .venv-peers/.installed

.venv-peers/.installed: pyproject.toml $(CONSTRAINTS) tests/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(INSTALL) -e '.[dev,eval]' -r tests/peers.txt
	@touch $@

# On a machine with a GPU: is it right, how fast is it, where does the time go. At most seven minutes.
gpu-proof: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu_proof --out $(PROOF)

# For such a machine without a network: the source, wheels and compiled kernels in one archive.
gpu-pack: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu_proof.pack --out build/gpu-pack

lint: $(INSTALLED)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
