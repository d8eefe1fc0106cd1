# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process of the tests would compile the package anew: 0.5 s of each, and 6 s of each worker.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: run demo help test test-all check format docs dist clean tables notebooks gallery

run: $(VENV)/installed  ## Install, and evaluate the bundled model (the default)
	$(BIN)/python -m mtr_lab

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/installed-test  ## The tests but for the slow ones, in a few minutes
	$(PYTEST) -m "not slow" tests

test-all: $(VENV)/installed-test  ## All tests, and the notebooks
	$(PYTEST) --nbmake notebooks tests

check: $(VENV)/installed-test  ## Linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-test  ## Format the code, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs  ## The manual, in build/docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict -f docs/mkdocs.yml
	@echo build/docs/index.html

tables: $(VENV)/installed  ## The README's table of models, from the registered models
	$(BIN)/python docs/tables.py

notebooks: $(VENV)/installed-test  ## Run the notebooks and store their outputs
	$(BIN)/python notebooks/run.py

gallery: $(VENV)/installed-test  ## The pictures of the manual's gallery
	$(BIN)/python docs/gallery.py

# The bare environment, PyTorch included, takes several GB below build/ until the tests have run.
dist: $(VENV)/installed-test  ## Sdist and wheel of the last commit, in dist/, tried in a bare environment
	@test -z "$$(git status --porcelain)" || { git status --short; echo "commit these files, or remove them, first"; exit 1; }
	rm -rf dist build/dist
	mkdir -p build
	$(BIN)/python -m build --no-isolation --outdir dist
	PYTHONDONTWRITEBYTECODE=1 MTR_LAB_DIST=dist $(BIN)/python -m pytest -p no:cacheprovider --basetemp=build/dist \
		--timeout=3600 tests/test_package.py
	rm -rf build/dist
	@ls -lh dist

# ONNX Runtime for browsers comes from npm.
demo: $(VENV)/installed-demo  ## One HTML file that runs the bundled model in a browser, build/demo/demo.html
	mkdir -p build/demo
	npm install --silent --no-audit --no-fund --prefix build/demo onnxruntime-web@1
	$(BIN)/python -m mtr_lab.demo --page build/demo/demo.html --runtime build/demo/node_modules/onnxruntime-web

clean:  ## Remove the virtual environment and what was built
	rm -rf $(VENV) build dist

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mtr_lab needs Python 3.11 or newer: make PYTHON=python3.x')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(VENV)/installed-demo: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@
