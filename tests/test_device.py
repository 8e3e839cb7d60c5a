"""On a GPU, as far as a machine without one can tell: see ``pretended``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended import CUDA, Device, Pretended, moved
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import mlp, rows, square

from climb_plugin import ClimbLoss, GaussianHead, Ramp, TargetRate, wrap
from climb_plugin.prior import LearnedPrior


class Dino(nn.Module):
    """As DINO's head, with a weight that a hook or a parametrisation computes."""

    def __init__(self, computed: Callable[..., Any] = lambda layer: layer) -> None:
        super().__init__()
        self.layers = mlp(6, 8, 4)
        self.last = computed(nn.Linear(4, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(nn.functional.normalize(self.layers(x), dim=-1))
        return scores


COMPUTED: dict[str, Callable[..., Any]] = {
    "a parameter": lambda layer: layer,
    "weight_norm, the old one": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, the old one": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("computed", COMPUTED.values(), ids=COMPUTED)
def test_a_head_that_was_moved_and_not_yet_called(
    computed: Callable[..., Any], pretended: Device
) -> None:
    """The plain tensor that weight_norm leaves is on the old device until the next forward."""
    head = moved(Dino(computed))
    criterion = wrap(square, student=head, beta=1e-3)
    assert criterion.climb.attached[0].head.logvar.bias.device == CUDA
    criterion(head(Pretended(rows()))).backward()
    assert criterion.terms.rate.device == CUDA


@pytest.mark.parametrize("computed", COMPUTED.values(), ids=COMPUTED)
def test_a_head_whose_precision_was_changed_and_not_yet_called(
    computed: Callable[..., Any],
) -> None:
    head = Dino(computed).double()
    criterion = wrap(square, student=head, beta=1e-3)
    criterion(head(rows().double())).backward()
    assert criterion.terms.rate > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"beta": 1e-2},
    "learned": {"beta": 1e-2, "prior": "learned"},
    "view": {"beta": 1e-2, "prior": "view"},
    "backward": {"beta": 1e-2, "prior": "backward"},
    "at the features": {"beta": 1e-2, "at": "features"},
    "entropy and free nats": {"beta": 1e-2, "alpha": 0.1, "free_nats": 1.0},
    "shared log-variance": {"beta": 1e-2, "logvar": "shared"},
    "ramp": {"beta": Ramp(1e-2, 3)},
    "target rate": {"beta": TargetRate(5.0)},
    "off": {"beta": 0.0},
}


def trained(options: dict[str, Any], *, steps: int, device: Device | None) -> tuple[Any, list[int]]:
    """Parameters after some steps, and how often each step waited for the device."""
    torch.manual_seed(0)
    backbone, head = nn.Linear(6, 6), mlp(6, 8, 4)
    if device:
        backbone, head = moved(backbone), moved(head)
    criterion = wrap(square, student=head, **copy.deepcopy(options))
    modules = nn.ModuleList([backbone, head, criterion])
    optimizer = torch.optim.SGD(modules.parameters(), 0.1)
    waits = []
    for step in range(steps):
        before = device.waits if device else 0
        views = [rows(seed=2 * step + view) for view in range(2)]
        if device:
            views = [Pretended(view) for view in views]
        loss = criterion(*(head(backbone(view)) for view in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        waits.append(device.waits - before if device else 0)
    found = [getattr(p, "held", p).detach() for p in modules.parameters()]
    return found, waits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_training_is_that_of_the_cpu_and_waits_for_nothing(
    options: dict[str, Any], pretended: Device
) -> None:
    found, waits = trained(options, steps=5, device=pretended)
    assert sum(waits[2:]) == 0
    expected, _ = trained(options, steps=5, device=None)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_priors_are_where_the_heads_are(pretended: Device) -> None:
    head = moved(GaussianHead(4))
    for prior in ("learned", "backward", LearnedPrior):
        criterion = ClimbLoss(square, heads=head, beta=1e-3, prior=prior)
        assert {p.device for p in criterion.parameters()} == {CUDA}


def test_a_head_that_has_no_data_yet_has_a_prior_of_its_own() -> None:
    with torch.device("meta"):
        head = GaussianHead(4)
    criterion = ClimbLoss(square, heads=head, beta=1e-3, prior="learned")
    assert {p.device.type for p in criterion.parameters()} == {"cpu"}


def test_devices_that_are_mixed_are_noticed(pretended: Device) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        moved(nn.Linear(6, 4))(rows())
    before = pretended.waits
    assert float(Pretended(rows()).sum()) == float(rows().sum())
    assert pretended.waits == before + 1
