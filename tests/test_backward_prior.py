"""The conditional prior: against torch.distributions, finite differences and known information."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin.gaussian import Posterior, bound_logvar
from climb_plugin.prior import BackwardPrior, ViewPrior

ROWS, WIDTH = 3, 5


def square(*views: Tensor) -> Tensor:
    return torch.stack(views).square().mean()


def scattered(**options: object) -> BackwardPrior:
    prior = BackwardPrior(WIDTH, **options).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, generator=generator)
    return prior


def posteriors(count: int, *, width: int = WIDTH, rows: int = ROWS) -> list[Posterior]:
    parts = torch.randn(
        count, 2, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return [Posterior(mean, logvar) for mean, logvar in parts]


def over_pairs(prior: BackwardPrior, views: Sequence[Posterior], targets: int) -> Tensor:
    """The definition, pair by pair."""
    std = (bound_logvar(prior.raw_logvar) / 2).exp()
    rates = []
    for i, view in enumerate(views):
        own = Independent(Normal(view.mean, (view.logvar / 2).exp()), 1)
        others = [
            Independent(Normal(prior.gain * other.mean, std.expand_as(other.mean)), 1)
            for j, other in enumerate(views[:targets])
            if j != i
        ]
        rates.append(torch.stack([kl_divergence(own, other) for other in others]).mean(dim=0))
    return torch.cat(rates)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("targets", [None, 2])
def test_equals_the_mean_over_pairs(count: int, targets: int | None) -> None:
    prior, views = scattered(targets=targets), posteriors(count)
    expected = over_pairs(prior, views, count if targets is None else targets)
    torch.testing.assert_close(prior(views), expected)


def test_many_views_that_agree_do_not_cancel() -> None:
    """In float32: the spread of targets far from the origin is small against their squares."""
    prior = BackwardPrior(2)
    rows = 1e3 + 1e-2 * torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    views = [Posterior(mean, torch.zeros(4, 2)) for mean in rows]
    wide = [Posterior(*(part.double() for part in view)) for view in views]
    expected = over_pairs(BackwardPrior(2).double(), wide, 8)
    torch.testing.assert_close(prior(views).double(), expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients(detach: bool) -> None:
    prior = scattered(detach=detach)
    first, second = posteriors(2)

    def rates(mean: Tensor, logvar: Tensor, gain: Tensor, raw: Tensor) -> Tensor:
        with torch.no_grad():
            prior.gain.copy_(gain)
        views = [Posterior(mean, logvar), second]
        own = {"gain": gain, "raw_logvar": raw}
        return torch.func.functional_call(prior, own, (views,))[:ROWS]  # of the first view

    inputs = [first.mean, first.logvar, prior.gain.detach(), prior.raw_logvar.detach()]
    assert torch.autograd.gradcheck(rates, [one.clone().requires_grad_() for one in inputs])
    mean = second.mean.clone().requires_grad_()
    prior([first, Posterior(mean, second.logvar)])[:ROWS].sum().backward()
    assert (mean.grad is None or not mean.grad.any()) == detach


@pytest.mark.parametrize(("rho", "loose"), [(1.0, 0.0), (0.9, 0.4), (0.0, 4.0)])
def test_is_tight_in_the_linear_gaussian_case(rho: float, loose: float) -> None:
    """I(z; v1 | v2) = 1/2 log(1 + (1 - rho^2) g^2 / s^2), with g = 1 and s = 1/2."""
    torch.manual_seed(0)
    prior, rows = BackwardPrior(1), 8192
    logvar = torch.full((rows, 1), 2 * math.log(0.5))
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.05)

    def views() -> list[Posterior]:
        one, noise = torch.randn(2, rows, 1)
        return [Posterior(one, logvar), Posterior(rho * one + (1 - rho**2) ** 0.5 * noise, logvar)]

    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        prior(views()).mean().backward()
        optimizer.step()
    information = math.log1p((1 - rho**2) / 0.25) / 2
    found = torch.stack([prior(views()).mean() for _ in range(20)]).mean().item()
    assert found == pytest.approx(information, rel=0.02, abs=2e-3)
    assert ViewPrior()(views()).mean().item() == pytest.approx(loose, rel=0.05, abs=1e-6)


def test_one_head_in_a_training() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    criterion = wrap(
        lambda *views: torch.stack(views).square().mean(),
        student=student,
        beta=0.1,
        prior="backward",
    )
    optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    before = [p.clone() for p in criterion.parameters()]
    rates = []
    for _ in range(30):
        optimizer.zero_grad()
        row = torch.randn(16, 8)
        criterion(*(student(row + 0.1 * torch.randn(16, 8)) for _ in range(4))).backward()
        optimizer.step()
        rates.append(criterion.terms.rate.item())
    assert rates[-1] < rates[0]
    assert not any(map(torch.equal, before, criterion.parameters()))


def test_batches_that_hold_views() -> None:
    prior, whole = scattered(), scattered(views=2)
    views = posteriors(4)
    pairs = [
        Posterior(*(torch.cat(parts) for parts in zip(*views[i : i + 2], strict=True)))
        for i in (0, 2)
    ]
    torch.testing.assert_close(whole(pairs), prior(views))
    loss = ClimbLoss(torch.sum, heads=GaussianHead(4), beta=0.1, prior="backward", views=2)
    loss(loss.heads[0](torch.randn(6, 4))).backward()
    assert loss.terms.rate > 0


class TestWrongInput:
    def test_views_that_do_not_pair_up(self) -> None:
        with pytest.raises(ValueError, match=r"prior='backward' compares the views .* one forward"):
            scattered()(posteriors(1))
        views = [*posteriors(1), *posteriors(1, rows=4)]
        with pytest.raises(ValueError, match="prior='backward' needs the same images"):
            scattered()(views)

    def test_fewer_views_than_targets(self) -> None:
        with pytest.raises(ValueError, match="targets=3, but this loss saw 2 views"):
            scattered(targets=3)(posteriors(2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"targets": 1}, "targets must be at least 2, .* got 1"),
            ({"targets": 0}, "targets must be a positive integer, got 0"),
            ({"var": 0.0}, r"var must lie between 2\.1e-09 and 2\.2e\+04, got 0\.0"),
            ({"var": -1.0}, "var must be finite and not negative, got -1"),
            ({"var": 1e9}, "var must lie between .*, got 1000000000"),
            ({"views": 0}, "views must be a positive int"),
        ],
    )
    def test_arguments(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BackwardPrior(4, **options)  # type: ignore[arg-type]
