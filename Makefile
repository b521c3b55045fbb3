PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# Built without isolation, so that the build tools are pinned too and a second build takes seconds.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
WERROR := $(if $(CI),ON,OFF)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INSTALL_SELF := $(INSTALL) --no-build-isolation -C cmake.define.GODWIT_WERROR=$(WERROR) -e
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt src/godwit/__init__.py $(wildcard csrc/*)

PYTHON_CODE := $(wildcard src tests recipes benchmarks)
CXX_CODE := $(wildcard csrc/*.h csrc/*.cpp)
ROOMS := $(sort $(wildcard src/godwit/*.py) $(wildcard src/godwit/*/)) csrc/ tests/ $(wildcard recipes/ benchmarks/)

.DEFAULT_GOAL := help
.PHONY: help chat test browser lint format loc clean

help: ## Show these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-14s%s\n' "$$name" "$$text"; done

chat: $(VENV)/.installed ## Talk with the built-in model; ARGS="..." goes to `godwit chat`
	@$(BIN)/godwit chat $(ARGS)

test: lint ## Check style, types and tests
	$(BIN)/python -m pytest $(ARGS)

browser: $(VENV)/.installed-browser ## Install what drives a browser in the tests of the chat page

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/clang-format --dry-run --Werror $(CXX_CODE)
	$(BIN)/mypy $(PYTHON_CODE)

format: $(VENV)/.installed-dev ## Mend the style of the code
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/clang-format -i $(CXX_CODE)

loc: ## Count lines of code room by room
	@for room in $(ROOMS); do \
	  printf '%6d  %s\n' \
	    "$$(find "$$room" -type f \( -name '*.py' -o -name '*.pyi' -o -name '*.cpp' -o -name '*.h' \) -exec cat {} + | wc -l)" \
	    "$$room"; done

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PYTHON_CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'Godwit needs Python 3.11 or newer; say which with make PYTHON=/path/to/python3.' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'This Python cannot make virtual environments; install its venv package (python3-venv on Debian).' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(BUILD_INPUTS)
	@for name in "$$CXX" c++ g++ clang++; do command -v "$$name" >/dev/null && exit 0; done; \
	  echo 'Godwit needs a C++ compiler; install one (g++ or clang++).' >&2; exit 1
	@echo 'Installing Godwit into $(VENV); the first time this downloads PyTorch and takes some minutes.'
	$(INSTALL) $(BUILD_TOOLS)
	$(INSTALL_SELF) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL_SELF) '.[test,dev]'
	@touch $@

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(INSTALL_SELF) '.[page]'
	@touch $@
