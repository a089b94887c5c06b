# `make demo` and `make test` are all a fresh machine needs: each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test clients oldest check docs wheel clean

demo: $(VENV)/.ready
	$(BIN)/knnlm demo $(ARGS)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

# transformers' own model tests, from its source distribution, and quantised weights.
clients: $(VENV)/.ready
	rm -rf build/clients
	$(BIN)/pip download -q --no-deps --no-binary transformers --require-hashes \
	    -r tests/clients.txt -d build/clients
	tar xzf build/clients/transformers-*.tar.gz -C build/clients --strip-components=1 \
	    --wildcards '*/tests/test_*'
	$(BIN)/pip install -q --no-deps --target build/clients/site -r tests/quantised.txt
	OMP_NUM_THREADS=1 TRANSFORMERS_TESTS=build/clients $(BIN)/python -m pytest -q \
	    -o addopts="--import-mode=importlib" -n 2 tests/test_upstream.py
	OMP_NUM_THREADS=1 PYTHONPATH=build/clients/site $(BIN)/python -m pytest -q \
	    tests/test_quantised.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

# Source distribution and wheel; the wheel is then used in an environment of its own.
wheel: $(VENV)/.ready
	rm -rf dist build/empty
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/check_wheel.py dist/*.whl
	$(BIN)/pip install -q --dry-run -c constraints-dev.txt "$$(ls dist/*.whl)[cpu,study,test,docs,dev]"
	$(PYTHON) -m venv build/empty
	build/empty/bin/pip install -q -c constraints-dev.txt "$(TORCH)"
	build/empty/bin/pip install -q -c constraints-dev.txt dist/*.whl
	build/empty/bin/python -I tests/check_install.py
	rm -rf build/empty

# The core tests on the oldest versions that pyproject.toml declares.
oldest: $(VENV)/.ready
	$(BIN)/nox -s oldest --envdir build/nox

# torch first and by version: unpinned, it brings gigabytes of CUDA libraries to a machine without.
$(VENV)/.ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints-dev.txt "$(TORCH)"
	$(BIN)/pip install -q -c constraints-dev.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site .demo .pytest_cache .mypy_cache .ruff_cache
