# make run   sets everything up and serves the small default model: two ranks, one answer, a clean stop
# make test  sets everything up and passes lint, unit, integration and end-to-end tests; these need root and a cluster,
#            which is made on this machine (tests/cluster/README.md) and removed after
.PHONY: run test e2e-needs lint unit integration e2e test-gpu soak chaos bench scale default-model lock manifests clean cluster-up cluster-down

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
BUILD_INPUTS := pyproject.toml hatch_build.py $(wildcard requirements/*.txt) $(wildcard protos/tpmodel/v1/*.proto) \
	worker/tpmodel_worker/comm/shared_memory.c scripts/setup

run: .venv/.ready
	@$(PYTHON) examples/run.py

# Each says what time and disk it took. What tests/e2e shows in the cluster is not shown twice here.
test: WITHOUT := and not in_cluster_too
test: e2e-needs
	@for stage in lint unit integration e2e; do \
		scripts/stage $$stage $(MAKE) --no-print-directory $$stage WITHOUT="$(WITHOUT)" || exit; \
	done

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
	$(PYTEST) tests/integration -m "not gpu $(WITHOUT)" --durations=0 --durations-min=10

# Before the other tests take their time.
e2e-needs: .venv/.ready
	@$(PYTHON) -m tests.cluster check

# As root. The cluster is a new one, whatever an interrupted run has left, and goes when the tests end.
e2e: .venv/.ready
	$(PYTHON) -m tests.cluster down
	$(PYTHON) -m tests.cluster build
	$(PYTEST) tests/e2e --durations=0 --durations-min=1

# On a machine with GPUs: everything marked gpu, nothing skipped.
test-gpu: .venv/.ready
	$(PYTEST) tests -m gpu

# The full number of requests; tests/integration runs a slice of it.
soak: .venv/.ready
	TPMODEL_TEST_SCALE=full $(PYTEST) tests/integration/test_soak.py -s

# 200 faults under load, and cut links; tests/integration runs a slice of it. As root: links need network namespaces.
chaos: .venv/.ready
	TPMODEL_TEST_SCALE=full $(PYTEST) tests/integration/test_chaos.py tests/integration/test_chaos_links.py -s

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
