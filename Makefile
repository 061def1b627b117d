# Two commands on a fresh Debian machine with Python 3.10 or later and make:
#   make demo   sets up, fetches the demo world, trains on it, and says where the report is
#   make test   sets up, and passes the tests
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: install demo test benchmarks clean

install: .venv/installed

.venv/installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[offline,paper,dev]"
	touch $@

demo: install
	$(BIN)/namedmask demo --out runs/demo

# Notebooks are checked to be clean and in step with the package (tests/test_notebooks.py), run as tests, and then pytest runs.
test: install
	$(BIN)/python -c "from namedmask.demo import load_world; load_world()"
	$(BIN)/python -m pytest -q tests/test_notebooks.py
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/test_notebooks.py

benchmarks: install
	for b in benchmarks/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:
	rm -rf .venv runs
