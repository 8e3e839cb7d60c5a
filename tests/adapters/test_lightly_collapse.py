"""The warnings in runs of lightly's losses that were made to collapse, and in healthy ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn

from climb_plugin.adapters.lightly import wrap
from climb_plugin.schedule import Linear, Schedule

CLASSES = 32  # prototypes of DINO


def network() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU()
    return nn.Sequential(*backbone, DINOProjectionHead(32, 32, 8, CLASSES, batch_norm=True))


def train(*, beta: float | Schedule = 1e-3, **options: Any) -> list[str]:
    """What a training of DINO on noisy views of clusters warns of."""
    model, teacher = network(), network()
    teacher.load_state_dict(model.state_dict())
    deactivate_requires_grad(teacher)
    loss = DINOLoss(CLASSES, **options)
    criterion = wrap(loss, student=model[-1], teacher=teacher[-1], beta=beta)
    generator = torch.Generator().manual_seed(5)
    clusters = torch.randn(20, 16, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1300):
            images = clusters[torch.randint(20, (32,), generator=generator)]
            views = images + 0.3 * torch.randn(2, 32, 16, generator=generator)
            update_momentum(model, teacher, 0.99)
            optimizer.zero_grad()
            criterion([teacher(v) for v in views], [model(v) for v in views]).backward()
            optimizer.step()
    return [str(w.message) for w in caught if "CLIMB" in str(w.message)]


def test_dino_with_a_teacher_that_is_too_hot() -> None:
    (message,) = train(teacher_temp=10.0)
    assert message.startswith("CLIMB: the base has collapsed")
    assert "pinned at ln K = 3.466 for K = 32" in message


def test_healthy_dino() -> None:
    assert train(beta=Linear(1e-2, warmup=300)) == []
