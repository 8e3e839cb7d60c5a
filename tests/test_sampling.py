"""Rule 1: a head samples where a gradient flows through it, and passes on its mean elsewhere."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from toys import mlp, rates

from climb_plugin import ClimbLoss, GaussianHead, wrap


def off_the_mean(model: nn.Module, mean: Tensor, rows: Tensor) -> float:
    return float((model(rows) - mean).detach().square().mean().sqrt())


def make() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(16, 32), GaussianHead(32))
    rows = torch.randn(64, 16)
    return model, rows, model[0](rows).detach()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    yield
    model.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


WITHOUT_GRADIENTS = {
    "no_grad": lambda model: torch.no_grad(),
    "inference_mode": lambda model: torch.inference_mode(),
    "frozen": frozen,
    "eval": evaluating,
}


@pytest.mark.parametrize("where", WITHOUT_GRADIENTS.values(), ids=WITHOUT_GRADIENTS)
@pytest.mark.parametrize(
    "copied",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        AveragedModel,
    ],
    ids=["itself", "deepcopy", "pickle", "AveragedModel"],
)
def test_the_mean_without_gradients(
    copied: Callable[[nn.Module], nn.Module], where: Callable[[nn.Module], object]
) -> None:
    model, rows, mean = make()
    twin = copied(model)
    with where(twin):  # type: ignore[attr-defined]
        assert off_the_mean(twin, mean, rows) == 0
    assert off_the_mean(twin, mean, rows) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("widths", "trained"),
    [
        *itertools.product([(16,), (16, 4)], ["embedding", "weight", "bias"]),
        ((16, 4), "mean"),
    ],
)
def test_one_gradient_is_enough(widths: tuple[int, ...], trained: str) -> None:
    head = GaussianHead(*widths)
    rows = torch.randn(256, 16)
    if trained != "embedding":
        head.requires_grad_(False)
    if trained == "embedding":
        rows.requires_grad_()
    elif trained == "mean":
        assert head.mean is not None
        head.mean.bias.requires_grad_()
    else:
        getattr(head.logvar, trained).requires_grad_()
    sample = head(rows)
    assert sample.requires_grad
    assert float((sample - head.embed(rows)).detach().std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("part", ["head", "encoder", "logvar"])
def test_the_rate_where_a_part_is_frozen(part: str) -> None:
    """Fine-tuning at a fixed std; on stored features; with a fixed variance alone."""
    encoder, head, after = nn.Linear(16, 32), GaussianHead(32), nn.Linear(32, 32)
    {"head": head, "encoder": encoder, "logvar": head.logvar}[part].requires_grad_(False)
    loss = ClimbLoss(F.mse_loss, heads=head, beta=1e-3)
    mean = encoder(torch.randn(64, 16))
    loss(after(head(mean)), torch.randn(64, 32)).backward()
    torch.testing.assert_close(loss.terms.rate, rates(mean).mean(), rtol=1e-4, atol=0.0)


def test_a_functional_call_asks_the_tensors_in_use() -> None:
    model, rows, mean = make()
    live = dict(model.named_parameters())
    average = {name: 0.9 * p.detach() for name, p in live.items()}
    teacher = functional_call(model, average, (rows,))
    expected = rows @ average["0.weight"].T + average["0.bias"]
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)
    student = functional_call(model, live, (rows,))
    assert float((student - mean).detach().std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("locked", [0, 1])
def test_of_two_towers_one_is_locked(locked: int) -> None:
    def clip(one: Tensor, two: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(one) @ F.normalize(two).T, torch.arange(len(one)))

    towers = [nn.Linear(16, 8), nn.Linear(16, 8)]
    heads = [GaussianHead(8), GaussianHead(8)]
    towers[locked].requires_grad_(False)
    heads[locked].requires_grad_(False)
    loss = ClimbLoss(clip, heads=heads, beta=1e-3)
    means = [tower(torch.randn(64, 16)) for tower in towers]
    samples = [head(mean) for head, mean in zip(heads, means, strict=True)]
    loss(*samples).backward()
    assert torch.equal(samples[locked], means[locked])
    rate = rates(means[1 - locked]).mean()
    torch.testing.assert_close(loss.terms.rate, rate, rtol=1e-4, atol=0.0)


def test_all_heads_frozen_is_said_once_and_is_the_base_loss() -> None:
    encoder, head, predictor = nn.Linear(16, 8), GaussianHead(8), nn.Linear(8, 8)
    encoder.requires_grad_(False)
    head.requires_grad_(False)
    loss = ClimbLoss(F.mse_loss, heads=head, beta=1e-3)
    rows, target = torch.randn(32, 16), torch.randn(32, 8)
    with pytest.warns(UserWarning, match="all heads of this loss are frozen") as said:
        total = loss(predictor(head(encoder(rows))), target)
    assert [warning.filename for warning in said] == [__file__]
    assert torch.equal(total, F.mse_loss(predictor(encoder(rows)), target))
    assert loss.terms.rate.isnan()
    loss(predictor(head(encoder(rows))), target).backward()


@pytest.mark.parametrize("towers", [1, 2])
def test_what_was_trained_may_be_frozen_later(towers: int) -> None:
    encoders = [nn.Linear(16, 8) for _ in range(towers)]
    heads = [GaussianHead(8) for _ in range(towers)]
    loss = ClimbLoss(lambda *z: torch.stack(z).square().mean(), heads=heads, beta=1e-3)
    scale, rows = torch.ones((), requires_grad=True), torch.randn(32, 16)

    def step() -> None:
        pairs = zip(encoders, heads, strict=True)
        loss(*(scale * head(encoder(rows)) for encoder, head in pairs)).backward()

    step()
    encoders[0].requires_grad_(False)
    heads[0].requires_grad_(False)
    if towers == 1:
        with pytest.warns(UserWarning, match="all heads of this loss are frozen") as said:
            step()
        assert len(said) == 1
    step()
    assert loss.terms.rate.isnan() == (towers == 1)


def test_update_bn_sees_means() -> None:
    encoder, norm = nn.Linear(16, 8), nn.BatchNorm1d(8)
    plain = copy.deepcopy(nn.Sequential(encoder, norm))
    model = nn.Sequential(encoder, GaussianHead(8, init_std=1.0), norm)
    loader = [torch.randn(256, 16) for _ in range(4)]
    update_bn(loader, model)
    update_bn(loader, plain)
    torch.testing.assert_close(norm.running_var, plain[1].running_var)


@pytest.mark.parametrize("when", ["before", "after", "again"])
@pytest.mark.parametrize("named", [False, True])
def test_a_teacher_by_deepcopy_passes_on_the_mean(named: bool, when: str) -> None:
    """MoCo's key encoder, DINO's teacher, SMoG's, which is copied anew every N steps."""
    student = mlp(16, 32, 8)
    plain = copy.deepcopy(student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss = wrap(F.mse_loss, student=student, teacher=teacher if named else None, beta=1e-3)
    if when != "before" and not named:
        teacher = copy.deepcopy(student).requires_grad_(False)
    if when == "again":
        loss(student(torch.randn(64, 16)), torch.zeros(64, 8)).backward()
        teacher = copy.deepcopy(student).requires_grad_(False)
    rows = torch.randn(64, 16)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(teacher(rows), plain(rows))
    loss(student(rows), teacher(rows)).backward()
    assert loss.terms.rate > 0


def test_momentum_pairs_all_parameters() -> None:
    student = mlp(16, 32, 8)
    teacher = copy.deepcopy(student).requires_grad_(False)
    wrap(F.mse_loss, student=student, teacher=teacher, beta=1e-3)
    layouts = [[(n, p.shape) for n, p in m.named_parameters()] for m in (student, teacher)]
    assert layouts[0] == layouts[1]
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_data_parallel_of_a_wrapped_module_passes_on_the_mean_in_eval() -> None:
    projection = mlp(16, 32, 8)
    rows = torch.randn(4, 16)
    mean = projection(rows).detach()
    wrap(F.mse_loss, student=projection, beta=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(nn.DataParallel(projection.eval())(rows), mean)
