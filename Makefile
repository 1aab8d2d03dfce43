# make demo: watch a frozen vision tower learn (no network beyond the installation). make test: every check that CI runs. make docs: the site.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs install clean

demo: install # one thread: for so small a model a second one only waits
	OMP_NUM_THREADS=1 $(BIN)/python train.py compare --config configs/demo.yaml --adapters head_only,examples/digits_tower/full_fine_tuning.yaml,config --seeds 3

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/python -m pytest -n 2 --dist worksteal tests examples/callback_plugin

docs: install
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

install: .venv/installed

.venv/installed: pyproject.toml examples/callback_plugin/pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; this is ' + sys.version)"
	@echo "Installing into .venv (PyTorch and its CUDA libraries: a few GB, some minutes) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --editable examples/callback_plugin
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
