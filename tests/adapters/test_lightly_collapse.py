"""The warnings in runs of lightly's losses that were made to collapse, and in healthy ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from climb_plugin.adapters.lightly import wrap
from climb_plugin.schedule import Linear, Schedule

CLASSES = 32  # prototypes of DINO


def warnings_of(step: Callable[[list[Tensor]], Tensor], model: nn.Module, lr: float) -> list[str]:
    """What a training of 1,300 steps on noisy views of clusters warns of."""
    generator = torch.Generator().manual_seed(5)
    clusters = torch.randn(20, 16, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1300):
            images = clusters[torch.randint(20, (32,), generator=generator)]
            noise = torch.randn(2, 32, 16, generator=generator)
            optimizer.zero_grad()
            step(list(images + 0.3 * noise)).backward()
            optimizer.step()
    return [str(w.message) for w in caught if "CLIMB" in str(w.message)]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())


def run_two(loss: Callable[..., Tensor], head: nn.Module, *, beta: float, lr: float) -> list[str]:
    model = nn.Sequential(backbone(), head)
    criterion = wrap(loss, student=head, beta=beta)
    return warnings_of(lambda views: criterion(*[model(view) for view in views]), model, lr)


def run_dino(*, beta: float | Schedule = 1e-3, **options: Any) -> list[str]:
    model, teacher = (
        nn.Sequential(backbone(), DINOProjectionHead(32, 32, 8, CLASSES, batch_norm=True))
        for _ in range(2)
    )
    teacher.load_state_dict(copy.deepcopy(model.state_dict()))
    deactivate_requires_grad(teacher)
    loss = DINOLoss(CLASSES, **options)
    criterion = wrap(loss, student=model[1], teacher=teacher[1], beta=beta)

    def step(views: list[Tensor]) -> Tensor:
        update_momentum(model, teacher, 0.99)
        return criterion([teacher(view) for view in views], [model(view) for view in views])

    return warnings_of(step, model, 1e-3)


def test_simclr_at_too_high_a_beta() -> None:
    head = SimCLRProjectionHead(32, 32, 8)
    (message,) = run_two(NTXentLoss(), head, beta=10.0, lr=1e-2)
    assert message.startswith("CLIMB: the posterior has collapsed")
    assert "beta=10 is too high" in message


def test_healthy_simclr() -> None:
    assert run_two(NTXentLoss(), SimCLRProjectionHead(32, 32, 8), beta=1e-3, lr=1e-2) == []


def test_negative_cosine_without_stop_gradient() -> None:
    head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    (message,) = run_two(NegativeCosineSimilarity(), head, beta=1e-6, lr=0.03)
    assert message.startswith("CLIMB: the base has collapsed")
    assert "std of the normalised embedding" in message


def test_dino_with_a_teacher_that_is_too_hot() -> None:
    (message,) = run_dino(teacher_temp=10.0)
    assert message.startswith("CLIMB: the base has collapsed")
    assert "pinned at ln K = 3.466 for K = 32" in message


def test_healthy_dino() -> None:
    assert run_dino(beta=Linear(1e-2, warmup=300)) == []
