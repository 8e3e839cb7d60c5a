"""What climb_plugin/ARCHITECTURE.md names is there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "climb_plugin" / "ARCHITECTURE.md").read_text()


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(r"`((?:_graph/|_run/|prior/|schedule/|tests/)?[a-z_]+\.py)`", PAGE))
    assert {"tests/test_steps.py", "head.py", "_graph/sample.py"} <= named
    core = ROOT / "climb_plugin"
    places = [ROOT, core, core / "_graph", core / "_run", core / "prior", core / "schedule"]
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert not missing


def test_every_rule_has_a_test() -> None:
    rows = re.findall(r"^\| (\d) \| .* \| (`tests/.*`) \|$", PAGE, flags=re.MULTILINE)
    assert [number for number, _ in rows] == list("123456789")


def test_every_file_of_the_core_is_named() -> None:
    files = {path.name for path in (ROOT / "climb_plugin").rglob("*.py")} - {"__init__.py"}
    assert {name for name in files if name not in PAGE} == set()


def test_functions_that_it_names_exist() -> None:
    for module, name in [("loss", "_samples"), ("loss", "bottleneck"), ("attach", "_Hung")]:
        assert f"`{module}.{name}`" in PAGE
        assert hasattr(import_module(f"climb_plugin.{module}"), name)
