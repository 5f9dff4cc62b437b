# The two commands that matter: make demo, make test. Everything happens in VENV; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= .demo
BIN = $(VENV)/bin
# PIP_ARGS: for an index with CPU builds of torch, say; the default index may bring a CUDA build of several GB.
PIP_ARGS ?=
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: setup demo test fuzz test-gpu test-peers sanitize lint type wheel check clean docs

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "atomq needs Python 3.11 to 3.13; set PYTHON=python3.11 or the like"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch numpy
	$(INSTALL) -e .
	touch $@

# Linters, pytest, and the CUDA compiler: the tests compile every kernel, which needs no GPU.
$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	touch $@

setup: $(VENV)/installed-dev

# SmolLM2-135M-Instruct (Apache 2.0), quantized to W4A4KV4 and measured, on two CPU cores.
demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --folder $(DEMO)

test: setup
	$(BIN)/python -m pytest -m "not gpu"

# Spoilt files of every kind, each refused by a typed error or loaded as what it says.
N ?= 10000
fuzz: setup
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz.py $(N)

# Needs a CUDA device, CuPy, and whatever Python they are installed in. Most of the time goes into compiling
# kernels: with pytest-xdist, PYTEST_ARGS="-n 12" shares it among processes.
PYTEST_ARGS ?=
test-gpu:
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

# The tools that exports are for, and lm-eval: heavy, and not needed to use atomq. gptqmodel asks for a newer torch than
# the constraints have, and runs with theirs.
$(VENV)/installed-peers: $(VENV)/installed-dev
	$(INSTALL) -e '.[eval]' accelerate defuser device-smi dill logbar packaging pillow protobuf pypcre threadpoolctl \
		tokenicer torchao
	$(INSTALL) --no-deps gptqmodel
	touch $@

test-peers: $(VENV)/installed-peers
	$(BIN)/python -m pytest tests/export tests/eval/test_tasks.py

# Every kernel on small shapes under NVIDIA's compute-sanitizer (of the CUDA toolkit): memcheck and racecheck.
sanitize:
	$(PYTHON) -m benchmarks.sanitize

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: setup
	$(BIN)/mypy

# The documentation as a site in build/site; a broken link or a page that the menu forgets fails.
docs: setup
	$(BIN)/mkdocs build --strict --quiet

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

check: lint type docs test

clean:
	rm -rf $(VENV) $(DEMO) dist
