"""Hosts and devices are asked for by name: one that is then missing is an error, not a skip."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

# Name in CLIMB_TEST_HOSTS -> (modules, of which one suffices, beginning of its test files' names).
HOSTS = {
    "lightly": (("lightly",), "test_lightly"),
    "lightning": (("lightning", "pytorch_lightning"), "test_lightning"),
    "solo_learn": (("solo",), "test_solo"),
}

collect_ignore = ["benchmarks"]  # with doctests, pytest would import them

# Shared machines are slow at times; what is slow is measured in benchmarks, not here.
hypothesis.settings.register_profile("climb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("climb")


def pytest_configure(config: pytest.Config) -> None:
    asked = [name for name in os.environ.get("CLIMB_TEST_HOSTS", "").split(",") if name]
    unknown = [name for name in asked if name not in HOSTS]
    if unknown:
        raise pytest.UsageError(f"CLIMB_TEST_HOSTS names {unknown}; there are {list(HOSTS)}.")
    missing = [name for name in asked if not importable(name)]
    if missing:
        raise pytest.UsageError(f"CLIMB_TEST_HOSTS asks for {missing}, which cannot be imported.")
    devices = [name for name in os.environ.get("CLIMB_TEST_DEVICES", "").split(",") if name]
    unknown = [name for name in devices if name not in ("cpu", "cuda")]
    if unknown:
        raise pytest.UsageError(f"CLIMB_TEST_DEVICES names {unknown}; there are cpu and cuda.")
    if "cuda" in devices and not torch.cuda.is_available():
        raise pytest.UsageError("CLIMB_TEST_DEVICES asks for cuda, which is not available.")


def pytest_report_header() -> list[str]:
    hosts = ", ".join(
        f"{name} {'tested' if importable(name) else 'NOT importable, its tests do not run'}"
        for name in HOSTS
    )
    cuda = "tested" if torch.cuda.is_available() else "NOT available, its tests do not run"
    return [f"hosts: {hosts}", f"devices: cpu tested, cuda {cuda}"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    for name, (_, files) in HOSTS.items():
        if collection_path.name.startswith(files) and not importable(name):
            return True
    return None


def importable(host: str) -> bool:
    modules, _ = HOSTS[host]
    return any(find_spec(module) is not None for module in modules)
