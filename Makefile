# Each target sets up what it needs: a virtual environment in .venv, made once.
# The tests and demos are sized for two CPU cores; a GPU is used where there is one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed

.PHONY: demo test test-clusters test-full campaign fuzz lint bench real finding docs clean help

help:
	@echo "make demo   search UGRL's hyperparameters on generated images (minutes on two cores)"
	@echo "make test   the tests"
	@echo "make test-clusters  long stories on clusters: nodes and drivers that die, jobs, buckets"
	@echo "make test-full  all of them, and longer forms"
	@echo "make campaign  runs and searches that are killed at random moments (SEED=1 KILLS=100)"
	@echo "make fuzz   mutated files for every reader, for long (EXAMPLES=2000 of each)"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measured comparisons, as ratios"
	@echo "make real   settings on real photographs, one table (VOC=DEVKIT SEEDS=3 SETTINGS=\"Base I II III IV Full\")"
	@echo "make finding  the arms of docs/finding.md, with intervals (VOC=DEVKIT FINDING_SEEDS=5 ARMS=\"Base IV IV-all\" PART=transfer)"
	@echo "make docs   the documentation as a site, in build/site"

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/ugrl-tune --space tuning/shapes.yaml --out runs/demo --resume

# One OpenMP thread a process. Tests side by side, but for those that start clusters: these have the machine to
# themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test: $(STAMP)
	$(PYTEST) -m "not ray and not long and not full" -n 2 --dist loadfile
	$(PYTEST) -m "ray and not long and not full"

test-clusters: $(STAMP)
	$(PYTEST) -m "long and not full"

# The longer forms as well: more kills, larger streams.
test-full: test test-clusters
	$(PYTEST) -m full

# Started again, it goes on with the stories that are missing.
SEED ?= 1
KILLS ?= 100
campaign: $(STAMP)
	$(BIN)/python -m tests.campaign --seed $(SEED) --kills $(KILLS) $(CAMPAIGN_ARGS)

EXAMPLES ?= 2000
fuzz: $(STAMP)
	UGRL_FUZZ=$(EXAMPLES) $(PYTEST) --timeout=0 tests/test_fuzz_*.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m bench $(BENCH_ARGS)

# Any VOC devkit. Started again, it goes on where it was.
VOC ?= ../shared/data/voc676/VOCdevkit
SEEDS ?= 1
SETTINGS ?= Base IV Full
real: $(STAMP)
	$(BIN)/python -m bench.real --voc "$(VOC)" --seeds $(SEEDS) --settings $(SETTINGS) $(REAL_ARGS)

# The arms of docs/finding.md, or those of a smaller experiment of it: they go on where they were, and the tables are made
# of all that is measured.
FINDING_SEEDS ?= 5
PART ?= finding
ARMS ?=
finding: $(STAMP)
	$(BIN)/python -m bench.real --voc "$(VOC)" --arms bench/$(PART).yaml --seeds $(FINDING_SEEDS) \
		$(if $(ARMS),--settings $(ARMS)) $(if $(filter over_time,$(PART)),--checkpoints) --out runs/$(PART) $(REAL_ARGS)
	$(BIN)/python -m bench.finding --results runs/finding/results --out runs/finding/finding.md

# Installed apart from the rest: the tests do without it.
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(DOCS)
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site
	@echo "open build/site/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
