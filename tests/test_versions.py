"""What is supported is said alike wherever it is said, and the workflows call what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ENVIRONMENTS = set(re.findall(r"^\[tool\.tox\.env\.(\w+)\]", PYPROJECT, re.M))


def lower_bounds() -> dict[str, str]:
    """Of the installed package: Python's, the dependencies', and the extra lightly's."""
    installed = metadata("climb-plugin")
    requires = [line for line in installed.get_all("Requires-Dist") or [] if ">=" in line]
    core = [line for line in requires if "extra ==" not in line or 'extra == "lightly"' in line]
    found = dict(line.split(";")[0].strip().split(">=") for line in core)
    return {"Python": installed["Requires-Python"].removeprefix(">="), **found}


def number(line: str) -> str:
    """The first version in a line."""
    found = re.search(r"\d+(\.\d+)+", line)
    assert found, line
    return found.group()


def test_the_readme_states_the_lower_bounds() -> None:
    section = (ROOT / "README.md").read_text().split("## Supported versions")[1]
    stated = dict(re.findall(r"(\w+) ([\d.]+) or newer", section))
    assert stated == lower_bounds()


def test_the_oldest_environment_has_the_lower_bounds() -> None:
    oldest = PYPROJECT.split("[tool.tox.env.oldest]")[1].split("\n[")[0]
    pinned = dict(re.findall(r'"(\w+)==([\d.]+)"', oldest))
    bounds = {name: bound for name, bound in lower_bounds().items() if name != "Python"}
    assert pinned.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert pinned[name].removesuffix(".0") == bound.removesuffix(".0")


def test_tools_and_workflows_know_the_oldest_python() -> None:
    oldest = lower_bounds()["Python"]
    (mypy,) = re.findall(r'^python_version = "(.*)"', PYPROJECT, re.M)
    (ruff,) = re.findall(r'^target-version = "py3(\d+)"', PYPROJECT, re.M)
    assert [mypy, f"3.{ruff}"] == [oldest, oldest]
    (pythons,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text())
    assert number(pythons) == oldest


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_there_is(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = workflow.read_text()
    called = set(re.findall(r"\bmake (\S+)", text))
    assert called
    assert called <= targets
    named = set(re.findall(r"\bENV=(\w+)|\benv: (\w+)", text))
    assert {one or other for one, other in named} <= ENVIRONMENTS


def test_all_environments_run() -> None:
    (listed,) = re.findall(r"^env_list = \[(.*)\]", PYPROJECT, re.M)
    assert set(re.findall(r"\w+", listed)) == ENVIRONMENTS
    matrix = (ROOT / ".github/workflows/matrix.yml").read_text()
    assert set(re.findall(r"\benv: (\w+)", matrix)) == ENVIRONMENTS


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CLIMB_TEST_WITHOUT", "solo_learn", "which can be imported"),
        ("CLIMB_TEST_HOSTS", "solo_learn", None),
        ("CLIMB_TEST_WITHOUT", "sololearn", "names"),
    ],
)
def test_hosts_asked_for_and_excluded(
    variable: str, value: str, message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "solo.py").touch()
    others = {"CLIMB_TEST_WITHOUT": "", "CLIMB_TEST_HOSTS": "", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "test_versions.py"],
        cwd=ROOT / "tests",  # not the root, whose climb_plugin has no adapters
        env={**os.environ, **others, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == (0 if message is None else pytest.ExitCode.USAGE_ERROR)
    assert message is None or message in run.stderr
