"""Hosts and devices are asked for by name: one that is missing then is an error, not a skip.

Of hosts by CLIMB_TEST_HOSTS=lightly,lightning,solo_learn,onnx, of devices by
CLIMB_TEST_DEVICES=cuda. A host that CLIMB_TEST_WITHOUT names must not be importable. What needs a
GPU is marked: pytest -m cuda.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Name in CLIMB_TEST_HOSTS -> (modules, of which one suffices, beginning of its test files' names).
HOSTS = {
    "lightly": (("lightly",), "test_lightly"),
    "lightning": (("lightning", "pytorch_lightning"), "test_lightning"),
    "solo_learn": (("solo",), "test_solo"),
    "onnx": (("onnxruntime",), "test_onnx"),  # runs exported models; torch's exporter needs more
}

DEVICES = ["cpu", "cuda"]

sys.path.append(str(Path(__file__).parent))  # for what several tests share

collect_ignore = ["benchmarks"]  # with doctests, pytest would import them

# Shared machines are slow at times; what is slow is measured in benchmarks, not here.
hypothesis.settings.register_profile("climb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("climb")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU; left out, with a reason, without one")
    missing = [name for name in asked("CLIMB_TEST_HOSTS", list(HOSTS)) if not importable(name)]
    if missing:
        raise pytest.UsageError(f"CLIMB_TEST_HOSTS asks for {missing}, which cannot be imported.")
    missing = [name for name in asked("CLIMB_TEST_DEVICES", DEVICES) if not available(name)]
    if missing:
        raise pytest.UsageError(f"CLIMB_TEST_DEVICES asks for {missing}, which torch cannot find.")
    present = [name for name in asked("CLIMB_TEST_WITHOUT", list(HOSTS)) if importable(name)]
    if present:
        raise pytest.UsageError(f"CLIMB_TEST_WITHOUT excludes {present}, which can be imported.")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not available("cuda"):
        pytest.skip(f"CUDA is not available for {item.name}")


def pytest_report_header() -> list[str]:
    hosts = (
        f"{name} {'tested' if importable(name) else 'NOT importable, its tests do not run'}"
        for name in HOSTS
    )
    devices = (
        f"{name} {'tested' if available(name) else 'NOT there, its tests do not run'}"
        for name in DEVICES
    )
    return [f"hosts: {', '.join(hosts)}", f"devices: {', '.join(devices)}"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    for name, (_, files) in HOSTS.items():
        if collection_path.name.startswith(files) and not importable(name):
            return True
    return None


def importable(host: str) -> bool:
    modules, _ = HOSTS[host]
    return any(find_spec(module) is not None for module in modules)


def asked(variable: str, known: Sequence[str]) -> list[str]:
    """The names in an environment variable."""
    names = [name for name in os.environ.get(variable, "").split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise pytest.UsageError(f"{variable} names {unknown}; there are {known}.")
    return names


def available(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def marked(device: str) -> object:
    return pytest.param(device, marks=[pytest.mark.cuda] if device == "cuda" else [])


@pytest.fixture(params=[marked(name) for name in DEVICES if available(name)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine."""
    return torch.device(request.param)


@pytest.fixture
def pretended() -> Iterator[Any]:
    """A pretended GPU; with a real one, ``pytest -m cuda`` tests the same and more."""
    if available("cuda"):
        pytest.skip("a GPU is here: pytest -m cuda")
    from pretended import pretended_cuda

    with pretended_cuda() as device:
        yield device
