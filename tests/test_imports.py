"""What importing the core brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOSTS = ("lightly", "solo", "lightning", "pytorch_lightning", "hydra")


def loaded_hosts(statement: str) -> str:
    code = f"{statement}\nimport sys\nprint([m for m in {HOSTS!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_the_core_imports_no_host() -> None:
    statement = (
        "import climb_plugin, climb_plugin.attach, climb_plugin.gaussian, climb_plugin.head, "
        "climb_plugin.loss, climb_plugin.monitor, climb_plugin.schedule, climb_plugin.adapters"
    )
    assert loaded_hosts(statement) == "[]"


@pytest.mark.parametrize("host", ["hydra", "lightly"])
def test_the_check_can_fail(host: str) -> None:
    stand_in = f"import sys, types; sys.modules[{host!r}] = types.ModuleType({host!r})"
    assert loaded_hosts(f"import climb_plugin; {stand_in}") == f"[{host!r}]"


def test_the_core_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys\n"
        "import torch, numpy\n"
        "known = set(sys.modules)\n"
        "import climb_plugin, climb_plugin.attach, climb_plugin.monitor\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - known} - set(sys.stdlib_module_names)\n"
        "print(sorted(new - {'torch', 'numpy'}))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['climb_plugin']"
