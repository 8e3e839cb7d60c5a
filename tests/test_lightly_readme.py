"""The code of every page runs, page by page from top to bottom, and does what the page says."""

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
PAGES = sorted(
    path
    for folder in (".", ".github", "climb_plugin", "examples", "tests/benchmarks")
    for path in (ROOT / folder).glob("*.md")
)


def blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def executed(page: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return executed(ROOT / "README.md")


def test_the_lightning_module_trains() -> None:
    from pytorch_lightning import Trainer
    from torch.utils.data import DataLoader

    names = executed(ROOT / "examples" / "LIGHTLY.md")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=names["callbacks"],
    )
    trainer.fit(names["SimCLR"](), DataLoader(torch.randn(3, 2, 8, 32), batch_size=None))
    assert trainer.callback_metrics["climb_rate"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path) -> None:
    executed(page)


def test_there_are_blocks() -> None:
    found = {str(page.relative_to(ROOT)): len(blocks(page)) for page in PAGES if blocks(page)}
    assert found == {"README.md": 2, "examples/README.md": 2, "examples/LIGHTLY.md": 1}


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
    guide = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    parameters = inspect.signature(wrap).parameters
    for name in set(parameters) - {"loss", "student", "teacher"}:
        default = parameters[name].default
        shown = "required" if default is inspect.Parameter.empty else f"`{json.dumps(default)}`"
        assert f"| `{name}` | {shown} |" in guide
