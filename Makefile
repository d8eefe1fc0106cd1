# make run: install and evaluate the bundled model.  make test: install the test extra, run the tests and notebooks.
# make check: linters and types.  make docs: the manual, in build/docs.
# make dist: sdist and wheel of the last commit, in dist/, after the wheel was installed in a bare environment and tried.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test check docs dist clean

run: $(VENV)/installed
	$(BIN)/python -m mtr_lab

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --nbmake tests notebooks

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict -f docs/mkdocs.yml
	@echo build/docs/index.html

# The bare environment, PyTorch included, takes several GB below build/ until the tests have run.
dist: $(VENV)/installed-test
	@test -z "$$(git status --porcelain)" || { git status --short; echo "commit these files, or remove them, first"; exit 1; }
	rm -rf dist build/dist
	mkdir -p build
	$(BIN)/python -m build --no-isolation --outdir dist
	PYTHONDONTWRITEBYTECODE=1 MTR_LAB_DIST=dist $(BIN)/python -m pytest -p no:cacheprovider --basetemp=build/dist \
		--timeout=3600 tests/test_package.py
	rm -rf build/dist
	@ls -lh dist

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

clean:
	rm -rf $(VENV) build dist
