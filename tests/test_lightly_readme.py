"""The README's code runs, in one namespace from top to bottom, and does what it says."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from climb_plugin.adapters.lightly import wrap

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3


def test_the_lightly_step_trains_the_head(names: dict[str, Any]) -> None:
    terms = names["criterion"].terms
    assert torch.isfinite(terms.total)
    assert terms.rate > 0
    torch.testing.assert_close(terms.total, terms.base + 1e-3 * terms.rate)
    (head,) = names["criterion"].heads
    assert head in list(names["student_head"].modules())
    assert head.logvar.weight.abs().sum() > 0


def test_the_head_of_ones_own(names: dict[str, Any]) -> None:
    assert names["loss"].requires_grad
    assert names["loss_function"].terms.rate > 0


def test_the_diff_is_one_line_of_a_lightly_script() -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    old, new = diff.splitlines()
    plain = old.removeprefix("-criterion = ")
    assert new.startswith(f"+criterion = wrap({plain}, student=")


def test_every_option_of_wrap_is_in_the_table() -> None:
    parameters = inspect.signature(wrap).parameters
    for name in set(parameters) - {"loss", "student", "teacher"}:
        default = parameters[name].default
        shown = "required" if default is inspect.Parameter.empty else f"`{json.dumps(default)}`"
        assert f"| `{name}` | {shown} |" in TEXT


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
