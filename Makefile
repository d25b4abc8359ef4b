# make demo: set up and generate text with the embedded default model.
# make test: set up and run every check.   make quick: run those that matter while working.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= The capital of France is

demo: $(VENV)/.installed
	$(BIN)/gemma-wgpu generate "$(PROMPT)" --max-new-tokens 64

test: lint
	$(BIN)/python -m pytest

quick: lint
	$(BIN)/python -m pytest -m "not slow" --ignore tests/browser --ignore tests/reference

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site with its notebooks, in site/_output. MODEL is a model to go with it, or none; ONLINE=1 leaves Pyodide at its
# official address.
MODEL ?= demo
site: $(VENV)/.installed-site
	$(BIN)/python site/build.py --model "$(MODEL)" $(if $(ONLINE),--pyodide official)

serve:
	@test -d site/_output || $(MAKE) site
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory site/_output

$(VENV)/.installed: pyproject.toml
	tools/install_vulkan.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	tools/install_chromium.sh
	$(BIN)/python -m pip install --quiet --editable ".[demo,hub,chat,server,notebook,structured,ray]" --group test --group site --group browser
	touch $@

$(VENV)/.installed-site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group site
	touch $@

clean:
	rm -rf $(VENV) build site/_output

.PHONY: demo test quick lint site serve clean
