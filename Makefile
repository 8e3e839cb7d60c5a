PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: test bench gpu demo notebooks docs matrix dist clean

# Installed, not in place: the tests and mypy see what a user of the wheel sees. mypy runs in
# tests, because in the root it would find the core there, without adapters. Adapters whose host
# is missing have no doctests; a host that CLIMB_TEST_HOSTS names must be there. One thread for
# each of the workers, which then do not wait for one another's; make test WORKERS=0: in one process.
test: .venv/test
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p climb_plugin -p hydra_plugins.climb_plugin
	CLIMB_TEST_HOSTS=$${CLIMB_TEST_HOSTS-lightly,onnx} OMP_NUM_THREADS=$${OMP_NUM_THREADS-1} \
		$(BIN)/pytest -n $(WORKERS) --dist worksteal --doctest-modules --doctest-ignore-import-errors tests --pyargs climb_plugin

# Ratios, measured side by side; what needs a GPU says that it did not run where there is none.
bench: .venv/bench
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/pytest --quiet --show-capture=no tests/benchmarks

# The stages of examples/GPU.md. With --wheels in ARGS there is no network: the Python at hand is
# taken as it is, and the wheels lie where the stages find them.
ifeq (,$(findstring --wheels,$(ARGS)))
gpu: .venv/gpu
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/python examples/gpu_queue.py $(ARGS)
else
gpu:
	$(PYTHON) examples/gpu_queue.py $(ARGS)
endif

demo: .venv/demo
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/python examples/quickstart.py

notebooks: .venv/notebooks
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/python tests/examples/notebooks.py

# The API reference, of what is installed; a docstring that refers to nothing fails.
docs: .venv/docs
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/python tests/reference.py build/docs

# All environments of tox in pyproject.toml, or those that ENV names: make matrix ENV=oldest,core
matrix: .venv/matrix
	$(BIN)/tox run $(if $(ENV),-e $(ENV))

# Wheel and sdist, each of which must do in an environment that has nothing else.
dist: .venv/dist
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	for built in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear .venv/clean && .venv/clean/bin/pip install --quiet $$built && \
		.venv/clean/bin/python -I -c "import climb_plugin.adapters as a; print(a.__file__)" || exit 1; \
	done
	rm -rf .venv/clean

.venv/test: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[test,lightly,examples]'
	touch $@

.venv/bench: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[bench]'
	touch $@

.venv/gpu: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[gpu]'
	touch $@

.venv/demo: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[examples]'
	touch $@

.venv/notebooks: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[notebooks]'
	touch $@

.venv/docs: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[docs]'
	touch $@

.venv/matrix:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'tox>=4.21' 'tox-uv>=1.17'
	touch $@

.venv/dist:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet build twine
	touch $@

clean:
	rm -rf .venv .tox build dist *.egg-info
