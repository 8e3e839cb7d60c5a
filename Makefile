PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo clean

# Installed, not in place: the tests and mypy see what a user of the wheel sees.
test: .venv/test
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p climb_plugin
	CLIMB_TEST_HOSTS=$${CLIMB_TEST_HOSTS-lightly} $(BIN)/pytest --doctest-modules tests --pyargs climb_plugin

demo: .venv/demo
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	$(BIN)/python examples/quickstart.py

.venv/test: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[test,lightly,examples]'
	touch $@

.venv/demo: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '.[examples]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
