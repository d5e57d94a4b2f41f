# Every target works in a fresh clone. PYTHON chooses the interpreter that makes .venv, JOBS the test processes,
# EXPERIMENT the size of the ablation, WEIGHTS the folder whose <bundle>/models are released, URL where they will be served,
# WHEELS a folder of wheels to install from without a network, GPU cuda or cpu, MINUTES the most that one call may take.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
JOBS ?= 2
EXPERIMENT ?= small
WEIGHTS ?= bundles
GPU ?= cuda
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := results/demo
TASKS := chest_xray_classification chest_ct_classification chest_xray_segmentation chest_xray_detection abdomen_ct_segmentation
ECOSYSTEM := .venv-ecosystem
ECOSYSTEM_PYTHON := $(ECOSYSTEM)/bin/python
ECOSYSTEM_STAMP := $(ECOSYSTEM)/.installed

.PHONY: help venv pretrain table1 table2 table3 table4 table5 table6 table7 table8 table9 experiment publish demo gpu bundles test test-ecosystem lint format clean

help: ## list the targets
	@grep -hE '^[a-z0-9 -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9 -]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(STAMP) ## make .venv with all that the default run and the tests need

# The stamp is written last: an install that was interrupted is taken up again by the next call.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: constraints.txt needs Python 3.11 or newer; name one with 'make venv PYTHON=/path/to/python3.11'" >&2; exit 2; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(VENV_PYTHON) -m pip install $(if $(WHEELS),--no-index --find-links '$(WHEELS)') --constraint constraints.txt --editable '.[dev]'
	@touch $@

pretrain: venv ## pre-train the embedded default of bundles/pretrain
	$(VENV_PYTHON) -m monai.bundle run --config_file bundles/pretrain/configs/train.json

table1 table2 table3 table4 table5 table6 table8 table9: venv ## the paper's tables on phantoms, or on UNIMEDI_DATA, to results/
	$(VENV_PYTHON) -m benchmarks.tables --table $(@:table%=%) --out results/$@

experiment: venv ## all variants, three seeds, and the page; EXPERIMENT=small (90 minutes on two cores) or full (hours)
	$(VENV_PYTHON) -m benchmarks.experiment run --size $(EXPERIMENT) $(if $(EPOCHS),--epochs $(EPOCHS))

table7: venv ## the rows of the paper's ablation alone, cells of the experiment, to results/table7.csv and .md
	$(VENV_PYTHON) -m benchmarks.experiment run --size $(EXPERIMENT) --variants vl,vl_sd,ours --page False \
	  --table results/table7 $(if $(EPOCHS),--epochs $(EPOCHS))

publish: venv ## copy the numbers of experiment and tables to results/published, and quote them in README and cards
	$(VENV_PYTHON) -m benchmarks.experiment publish --size $(EXPERIMENT)
	$(VENV_PYTHON) -m benchmarks.published

demo: $(TASKS:%=$(DEMO)/%.done) $(DEMO)/report_retrieval.done ## pretrain, every bundle and the page of results; goes on where it was stopped
	$(VENV_PYTHON) -m unimedi_components report bundles/pretrain $(TASKS:%=bundles/%) bundles/report_retrieval --out $(DEMO)/page

# A part that is finished has a file of its name; one that was stopped resumes from the last epoch that it saved.
$(DEMO)/%.done: | $(STAMP)
	$(VENV_PYTHON) -m monai.bundle run --config_file bundles/$*/configs/$(if $(filter report_retrieval,$*),evaluate,train).json \
	  $(if $(wildcard bundles/$*/models/last.*),--resume True)
	@mkdir -p $(DEMO) && touch $@

$(TASKS:%=$(DEMO)/%.done) $(DEMO)/report_retrieval.done: | $(DEMO)/pretrain.done

gpu: venv ## on a machine with a GPU: tests, benchmarks, a training, to results/gpu; call until it ends with 0 (WHEELS, MINUTES, GPU=cpu)
	$(VENV_PYTHON) -m benchmarks.gpu --device $(GPU) $(if $(MINUTES),--minutes $(MINUTES))

bundles: venv ## to dist/: the wheel, a zip of every bundle with its trained weights (WEIGHTS, URL), and SHA256SUMS
	$(VENV_PYTHON) -m pip wheel --no-deps --wheel-dir dist .
	$(VENV_PYTHON) -m benchmarks.release --weights $(WEIGHTS) --out dist $(if $(URL),--url $(URL))

test: lint ## lint, type checks and tests
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(JOBS)

# A second environment that sees the first one's packages behind its own: MONAI Label's other requirements do not fit them.
$(ECOSYSTEM_STAMP): $(STAMP) tests/ecosystem/requirements.txt
	rm -rf $(ECOSYSTEM) && $(VENV_PYTHON) -m venv $(ECOSYSTEM)
	$(VENV_PYTHON) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(ECOSYSTEM_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(ECOSYSTEM_PYTHON) -m pip install --no-deps --requirement tests/ecosystem/requirements.txt
	@touch $@

test-ecosystem: $(ECOSYSTEM_STAMP) ## MONAI Label's server and tasks (and Orthanc, if there), real pre-trained towers
	OMP_NUM_THREADS=1 $(ECOSYSTEM_PYTHON) -m pytest -rs tests/ecosystem

lint: venv ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: venv ## rewrite the sources in the project's format
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

clean: ## remove caches and builds; .venv, data and trained models stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find unimedi_components tests bundles -name __pycache__ -type d -prune -exec rm -rf {} +
