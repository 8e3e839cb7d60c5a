"""lightly's heads on a GPU, as far as a machine without one can tell: see ``pretended``."""

from __future__ import annotations

from pathlib import Path

import lightly.loss
import pytest
import torch
from by_path import load
from pretended import CUDA, Device, Pretended, moved

from climb_plugin.adapters.lightly import wrap

coverage = load(Path(__file__).parent / "coverage_lightly.py")
CASES = [
    (name, at)
    for name, case in coverage.HEADS.items()
    if isinstance(case, coverage.HeadCase) and (case.build or name in coverage.discovered_heads())
    for at in case.places
]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_a_head_that_was_moved_and_not_yet_called(name: str, at: str, pretended: Device) -> None:
    """In the order of lightly's scripts: the model goes to the device, then the loss is made."""
    case = coverage.HEADS[name]
    student, teacher = (moved(coverage.small_head(name, case.build)) for _ in range(2))
    teacher.requires_grad_(False)
    criterion = wrap(lightly.loss.NTXentLoss(), student=student, teacher=teacher, beta=1e-3, at=at)
    optimizer = torch.optim.SGD([*student.parameters()], lr=0.1)
    for _ in range(2):
        views = [Pretended(torch.randn(8, 12)) for _ in range(2)]
        with torch.no_grad():
            teacher(views[0])
        loss = criterion(*(student(view).flatten(1) for view in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert criterion.terms.rate.device == CUDA
    assert float(criterion.terms.rate) > 0
