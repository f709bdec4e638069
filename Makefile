# make demo       a talking portrait on this machine: output/demo.mp4 and output/demo.png
# make test       the whole suite in the full environment
# make test-lite  the quick suite in the demo's environment
# make lint       ruff and mypy
PYTHON ?= python3
LITE := .venv
FULL := .venv-full
CHECK_PYTHON = $(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info < (3, 13), 'Python 3.10 to 3.12 is needed: make PYTHON=python3.11'"
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-lite lint install install-full clean

demo: $(LITE)/installed
	$(LITE)/bin/python -m musetalk.tools.demo

test: $(FULL)/installed
	$(FULL)/bin/python -m pytest -n 2 --dist loadfile

test-lite: $(LITE)/installed-dev
	$(LITE)/bin/python -m pytest -n 2 --dist loadfile

lint: $(FULL)/installed
	$(FULL)/bin/python -m ruff check .
	$(FULL)/bin/python -m ruff format --check .
	$(FULL)/bin/python -m mypy

install: $(LITE)/installed

install-full: $(FULL)/installed

$(LITE)/installed: requirements-lite.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(LITE)
	@echo "installing packages, 0.7 GB: a few minutes 正在安装依赖"
	$(LITE)/bin/python $(PIP) -r requirements-lite.txt
	$(LITE)/bin/python $(PIP) --no-deps mediapipe==0.10.21
	touch $@

$(LITE)/installed-dev: $(LITE)/installed requirements-dev.txt
	$(LITE)/bin/python $(PIP) -r requirements-dev.txt
	touch $@

$(FULL)/installed: $(wildcard requirements*.txt)
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(FULL)
	@echo "installing packages, 3 GB: several minutes 正在安装依赖"
	$(FULL)/bin/python $(PIP) -r requirements.txt
	$(FULL)/bin/python $(PIP) --no-deps -r requirements-no-deps.txt
	touch $@

clean:
	rm -rf $(LITE) $(FULL) output .mypy_cache .ruff_cache .pytest_cache
