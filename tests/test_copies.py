"""Everything public goes through copy.deepcopy, pickle and torch.save with the same values."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import mlp, rows, square

import climb_plugin
from climb_plugin import ClimbLoss, ClimbTerms, GaussianHead, wrap
from climb_plugin.gaussian import Posterior
from climb_plugin.monitor import Measurements, measure
from climb_plugin.prior import BackwardPrior, LearnedPrior, StandardPrior, ViewPrior
from climb_plugin.schedule import Constant, Ramp, TargetRate


def trained(beta: Any = 0.1) -> ClimbLoss:
    """After two steps, in whose middle a schedule is."""
    head = GaussianHead(6)
    loss = ClimbLoss(square, heads=head, beta=beta, prior="learned")
    for seed in range(2):
        loss(head(rows(seed=seed))).backward()
    return loss


def adapted() -> TargetRate:
    schedule = trained(TargetRate(4.0)).schedule
    assert isinstance(schedule, TargetRate)
    return schedule


def learned() -> LearnedPrior:
    prior = LearnedPrior(6)
    nn.init.normal_(prior.mean, generator=torch.Generator().manual_seed(0))
    return prior


def posterior() -> Posterior:
    return Posterior(rows(), rows(seed=1))


def head() -> GaussianHead:
    made = trained().heads[0]
    assert isinstance(made, GaussianHead)
    return made


VALUES: dict[type, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    ClimbTerms: (lambda: trained().terms, tuple),
    Posterior: (posterior, tuple),
    Measurements: (lambda: measure(*posterior()), tuple),
    Constant: (lambda: Constant(0.1), lambda schedule: schedule(3)),
    Ramp: (
        lambda: Ramp(0.1, warmup=0.5, shape="cosine").over(10),
        lambda schedule: (schedule(3), schedule.needs_length),
    ),
    TargetRate: (adapted, lambda schedule: (schedule(3), schedule.state(), repr(schedule))),
}
MODULES: dict[type, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    GaussianHead: (head, lambda head: head.posterior(rows())),
    ClimbLoss: (
        lambda: trained(TargetRate(4.0)),
        lambda loss: (loss.base(loss.heads[0].embed(rows())), loss.terms, loss.step, loss.beta),
    ),
    StandardPrior: (StandardPrior, lambda prior: prior([posterior()])),
    LearnedPrior: (learned, lambda prior: prior([posterior()])),
    BackwardPrior: (
        lambda: BackwardPrior(6, targets=2),
        lambda prior: prior([posterior(), posterior()]),
    ),
    ViewPrior: (lambda: ViewPrior(2), lambda prior: prior([posterior()])),
}
EVERYTHING = {**VALUES, **MODULES}

# Working parts, some of which restart in a copy; their tests say which.
PARTS = {
    "Affine",
    "Attached",
    "Bottleneck",
    "Climb",
    "Door",
    "Logvar",
    "Mean",
    "Prior",  # abstract
    "Schedule",  # abstract
    "Settings",
    "StepRates",
    "SharedLogvar",
    "Short",
}


def test_nothing_public_is_forgotten() -> None:
    found = set()
    for module in pkgutil.walk_packages(climb_plugin.__path__, "climb_plugin."):
        if "._" in module.name or ".adapters" in module.name:
            continue
        for name, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if item.__module__ == module.name and not name.startswith("_"):
                found.add(name)
    assert found == PARTS | {item.__name__ for item in EVERYTHING}


def through_file(item: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(item, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, (tuple, list)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda item: pickle.loads(pickle.dumps(item)),
    "torch": lambda item: through_file(item, weights_only=False),
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_copy_goes_on_as_the_original(kind: type, how: Callable[[Any], Any]) -> None:
    make, use = EVERYTHING[kind]
    item = make()
    twin = how(item)
    assert type(item) is type(twin) is kind
    assert twin is not item or not isinstance(item, nn.Module)
    assert_same(use(item), use(twin))


@pytest.mark.parametrize("kind", VALUES)
def test_values_load_with_weights_only(kind: type) -> None:
    """So that they can lie in a checkpoint, as hyper-parameters do."""
    make, use = VALUES[kind]
    item = make()
    twin = through_file({"in a checkpoint": item}, weights_only=True)["in a checkpoint"]
    assert type(twin) is kind
    assert_same(use(item), use(twin))


@pytest.mark.parametrize("kind", MODULES)
def test_states_of_modules_load_with_weights_only(kind: type) -> None:
    """Whole modules do not, like torch's own."""
    make, use = MODULES[kind]
    item, twin = make(), make()
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(through_file(item.state_dict(), weights_only=True))
    assert_same(use(item), use(twin))


class Pair:
    """A wrapped projection head, its teacher, and what trains them."""

    def __init__(self, at: str) -> None:
        student = mlp(6, 8, 4)
        teacher = copy.deepcopy(student).requires_grad_(False)
        self.loss = wrap(nn.MSELoss(), student=student, teacher=teacher, beta=1e-3, at=at)
        self.model = nn.ModuleList([student, teacher])

    def train(self, steps: int) -> list[Tensor]:
        student, teacher = self.model
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        losses = []
        for seed in range(steps):
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.1)
            losses.append(self.loss(student(rows(seed=seed)), teacher(rows(seed=seed + 1))))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses


@pytest.mark.parametrize("at", ["projection", "features"])
@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_copy_of_a_wrapped_model_trains_like_the_original_and_apart_from_it(
    how: Callable[[Any], Any], trained: int, at: str
) -> None:
    pair = Pair(at)
    pair.train(trained)
    twin = how(pair)
    before, state = copy.deepcopy(twin.model.state_dict()), twin.loss.climb_state()
    losses = pair.train(3)
    assert all(map(torch.equal, before.values(), twin.model.state_dict().values()))
    twin.loss.load_climb_state(state)  # no two calls of a process share noise but so
    assert twin.train(3) == losses
    assert all(map(torch.equal, *(p.model.state_dict().values() for p in (pair, twin))))
    assert twin.loss.heads[0] in set(twin.model[0].modules())
    with pytest.raises(RuntimeError, match="copy both together"):
        pair.loss(twin.model[0](rows()), rows(width=4))
