# The two that do everything on a fresh machine: `make demo` and `make test`.
# Both set up .venv first; PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := sb3_trpo_ext tests benchmarks docs examples

.PHONY: install demo test pytest coverage type lint check-codestyle format commit-checks benchmark-quick docs build clean

install: $(STAMP)

# torch first and alone, from the pinned version: whatever follows finds it there
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[tests]"
	touch $@

demo: install
	$(RUN) -m sb3_trpo_ext.zoo.demo --out demo

test: pytest

pytest: install
	$(RUN) -m pytest -n 2 --dist worksteal

coverage: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing

type: install
	$(RUN) -m mypy

lint: install
	$(RUN) -m ruff check $(SOURCES)

check-codestyle: install
	$(RUN) -m ruff format --check $(SOURCES)

format: install
	$(RUN) -m ruff check --fix --select I $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

commit-checks: format type lint

benchmark-quick: install
	for program in throughput update memory snapshots vine vine_learning learning screening family ladder checkpoints kill_and_resume; do $(RUN) benchmarks/$$program.py --quick --out build/benchmarks || exit 1; done

docs: install
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(RUN) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "site: build/docs/index.html"

build: install
	$(RUN) -m pip install --quiet build twine
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist demo
