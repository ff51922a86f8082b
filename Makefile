# make run   sets everything up and serves the small default model: two ranks, one answer, a clean stop
# make test  sets everything up and passes lint, unit and integration tests
# make e2e   passes the end-to-end tests, as root, on a cluster of this machine
.PHONY: run test lint unit integration e2e test-gpu soak bench scale default-model lock manifests clean cluster-up cluster-down

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
BUILD_INPUTS := pyproject.toml hatch_build.py $(wildcard requirements/*.txt) $(wildcard protos/tpmodel/v1/*.proto) \
	worker/tpmodel_worker/comm/shared_memory.c scripts/setup

run: .venv/.ready
	@$(PYTHON) examples/run.py

test: lint unit integration

.venv/.ready: $(BUILD_INPUTS)
	@bash scripts/setup

lint: .venv/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	@test ! -e operator/__init__.py || \
		{ echo "operator/__init__.py would shadow the standard library's operator module: remove it"; exit 1; }

unit: .venv/.ready
	OMP_NUM_THREADS=1 $(PYTEST) tests/unit -n 2 -m "not gpu"

integration: .venv/.ready
	$(PYTEST) tests/integration -m "not gpu"

# As root, on a cluster of this machine (tests/cluster/README.md), which is brought up before and removed after.
e2e: .venv/.ready
	$(PYTHON) -m tests.cluster up
	TPMODEL_KEEP_CLUSTER=1 $(PYTEST) tests/e2e --durations=0 --durations-min=1; \
		result=$$?; $(PYTHON) -m tests.cluster down && exit $$result

# On a machine with GPUs: everything marked gpu, nothing skipped.
test-gpu: .venv/.ready
	$(PYTEST) tests -m gpu

# The full number of requests; tests/integration runs a slice of it.
soak: .venv/.ready
	TPMODEL_TEST_SCALE=full $(PYTEST) tests/integration/test_soak.py -s

bench: .venv/.ready
	$(PYTHON) -m benchmarks

# 1,000 TPModels on simulated nodes; tests/e2e runs a slice of it.
scale: .venv/.ready
	$(PYTHON) -m benchmarks.scale

default-model: .venv/.ready
	$(PYTHON) examples/train_default_model.py --output examples/default_model

# The chart's CRD, docs/reference.md and deploy/tpmodel.yaml, from the operator's code and the chart.
manifests: .venv/.ready
	$(PYTHON) -m scripts.manifests

lock: .venv/.ready
	bash scripts/lock

# A real Kubernetes cluster on this machine, as root; see tests/cluster/README.md.
cluster-up: .venv/.ready
	$(PYTHON) -m tests.cluster up

cluster-down: .venv/.ready
	$(PYTHON) -m tests.cluster down

clean:
	rm -rf .venv build dist client/tpmodel/v1 worker/tpmodel_worker/comm/_*.so
