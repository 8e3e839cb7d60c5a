"""Hosts are asked for by name: one that is asked for and missing is an error, not a skip.

So is one that CLIMB_TEST_WITHOUT names and that can be imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

# Name in CLIMB_TEST_HOSTS -> (modules, of which one suffices, beginning of its test files' names).
HOSTS = {
    "lightly": (("lightly",), "test_lightly"),
    "lightning": (("lightning", "pytorch_lightning"), "test_lightning"),
    "solo_learn": (("solo",), "test_solo"),
}

# Shared machines are slow at times; what is slow is measured in benchmarks, not here.
hypothesis.settings.register_profile("climb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("climb")


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in hosts_in("CLIMB_TEST_HOSTS") if not importable(name)]
    if missing:
        raise pytest.UsageError(f"CLIMB_TEST_HOSTS asks for {missing}, which cannot be imported.")
    present = [name for name in hosts_in("CLIMB_TEST_WITHOUT") if importable(name)]
    if present:
        raise pytest.UsageError(f"CLIMB_TEST_WITHOUT excludes {present}, which can be imported.")


def pytest_report_header() -> str:
    return "hosts: " + ", ".join(
        f"{name} {'tested' if importable(name) else 'NOT importable, its tests do not run'}"
        for name in HOSTS
    )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    for name, (_, files) in HOSTS.items():
        if collection_path.name.startswith(files) and not importable(name):
            return True
    return None


def hosts_in(variable: str) -> list[str]:
    names = [name for name in os.environ.get(variable, "").split(",") if name]
    unknown = [name for name in names if name not in HOSTS]
    if unknown:
        raise pytest.UsageError(f"{variable} names {unknown}; there are {list(HOSTS)}.")
    return names


def importable(host: str) -> bool:
    modules, _ = HOSTS[host]
    return any(find_spec(module) is not None for module in modules)
