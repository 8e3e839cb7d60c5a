"""What climb_plugin/ARCHITECTURE.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "climb_plugin" / "ARCHITECTURE.md").read_text()


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(r"`((?:_graph/|_run/|tests/)?[a-z_]+\.py)`", PAGE))
    assert {"tests/test_steps.py", "head.py", "_graph/sample.py"} <= named
    places = [ROOT, ROOT / "climb_plugin", ROOT / "climb_plugin" / "_graph"]
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert not missing


def test_every_rule_has_a_test() -> None:
    rows = re.findall(r"^\| (\d) \| .* \| (`tests/.*`) \|$", PAGE, flags=re.MULTILINE)
    assert [number for number, _ in rows] == list("123456789")


def test_every_file_of_the_core_is_named() -> None:
    files = {path.stem for path in (ROOT / "climb_plugin").rglob("*.py")} - {"__init__"}
    rooms = {path.stem for path in (ROOT / "climb_plugin" / "_run").glob("*.py")} | {"deferred"}
    assert {name for name in files - rooms if name not in PAGE} == set()
