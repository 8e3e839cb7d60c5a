"""A prior and a schedule of the user's own do all that the package's own do."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import mlp, square

from climb_plugin import ClimbLoss, GaussianHead, TargetRate, wrap
from climb_plugin.gaussian import Posterior, kl_between
from climb_plugin.prior import LearnedPrior, Prior, per_sample
from climb_plugin.schedule import Schedule


class Scaled(Prior):
    """N(0, scale^2), whose scale is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.ones(width))

    def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
        return per_sample(
            [
                kl_between(*one, torch.zeros_like(one.mean), self.logvar.expand_as(one.logvar))
                for one in posteriors
            ]
        )


class Follower(Schedule):
    """Rises over the first half of the training, faster where the rate is high."""

    def __init__(self, half: int | None = None) -> None:
        self.factor, self.half = 1.0, half

    def __call__(self, step: int) -> float:
        return 0.1 * self.factor * (1.0 if not self.half else min(1.0, (step + 1) / self.half))

    def over(self, total_steps: int | None) -> Follower:
        return Follower(None if total_steps is None else total_steps // 2)

    def observe(self, step: int, rate: Tensor) -> None:
        self.factor *= 1.02 if float(rate) > 5 else 0.99

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.factor = state["factor"]


class Run:
    """A plain loop that can be killed at any step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = mlp(6, 6, 4)
        self.loss = wrap(
            lambda one, two: (one - two).square().mean(),
            student=self.net,
            beta=Follower(half=4),
            prior=Scaled,
        )
        parameters = [*self.net.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=0.05)
        self.betas: list[float] = []
        self.rates: list[float] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss(self.net(torch.randn(8, 6)), self.net(torch.randn(8, 6))).backward()
            self.optimizer.step()
            self.betas.append(float(self.loss.terms.beta))
            self.rates.append(float(self.loss.terms.rate))

    @property
    def parts(self) -> list[Any]:
        return [self.net, self.loss, self.optimizer]

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        states = [copy.deepcopy(part.state_dict()) for part in self.parts]
        torch.save([*states, torch.get_rng_state()], file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        *states, random = torch.load(file, weights_only=True)
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(random)


def test_a_plain_loop_trains_and_observes_them() -> None:
    run = Run()
    (prior,) = run.loss.climb_priors
    assert isinstance(prior, Scaled)
    run.train(6)
    assert not torch.equal(prior.logvar, torch.ones(4))
    factor = 1.0
    for step, (beta, rate) in enumerate(zip(run.betas, run.rates, strict=True)):
        assert beta == pytest.approx(0.1 * factor * min(1.0, (step + 1) / 4))
        factor *= 1.02 if rate > 5 else 0.99
    posterior = run.net.get_submodule("1").gaussian.posterior(torch.randn(8, 4))
    assert prior([posterior]).shape == (8,)


def test_a_killed_run_goes_on_to_the_same_bits() -> None:
    whole = Run()
    whole.train(8)
    killed = Run()
    killed.train(3)
    file = killed.save()
    resumed = Run()
    resumed.load(file)
    resumed.train(5)
    assert killed.betas + resumed.betas == whole.betas
    for one, two in zip(whole.parts[0].parameters(), resumed.parts[0].parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(whole.loss.parameters(), resumed.loss.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_rate_is_that_of_the_own_prior() -> None:
    head = GaussianHead(4)
    loss = ClimbLoss(torch.sum, heads=head, beta=0.1, prior=Scaled(4))
    rows = torch.randn(8, 4)
    loss(head(rows))
    other = torch.distributions.Normal(torch.zeros(4), torch.ones(4).div(2).exp())
    mean, logvar = head.posterior(rows)
    own = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(own, other).sum(dim=-1).mean()
    torch.testing.assert_close(loss.terms.rate, expected.detach())
    assert loss.climb_state()["prior"] == "Scaled"


def test_a_function_makes_one_prior_for_each_head() -> None:
    heads = [GaussianHead(4), GaussianHead(3)]
    loss = ClimbLoss(lambda *z: sum(map(torch.sum, z)), heads=heads, beta=0.1, prior=Scaled)
    assert [prior.logvar.shape for prior in loss.climb_priors] == [(4,), (3,)]
    with pytest.raises(ValueError, match="one Scaled cannot serve 2 heads: pass a function"):
        ClimbLoss(torch.sum, heads=heads, beta=0.1, prior=Scaled(4))
    loss(*(head(torch.randn(5, head.in_features)) for head in heads)).backward()
    assert all(prior.logvar.grad is not None for prior in loss.climb_priors)


def test_a_schedule_says_by_its_methods_what_it_needs() -> None:
    class Bare(Schedule):
        def __call__(self, step: int) -> float:
            return 0.1

    assert (Bare().needs_rate, Bare().needs_length) == (False, False)
    assert (Follower().needs_rate, Follower().needs_length) == (True, True)
    with pytest.raises(NotImplementedError, match="Schedule must define __call__"):
        Schedule()(0)
    with pytest.raises(NotImplementedError, match="Prior must define forward"):
        Prior()([])


class Observer(Schedule):
    """Remembers what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def __call__(self, step: int) -> float:
        return 0.1

    def observe(self, step: int, rate: Tensor) -> None:
        self.seen.append((step, float(rate)))

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "last": np.float64(3.0)}


@pytest.mark.parametrize("closures", [False, True])
def test_a_step_of_several_calls_is_observed_once(closures: bool) -> None:
    """A loss per view, gradient accumulation, LBFGS: the mean, once the step is over."""
    observer, head, rates = Observer(), GaussianHead(4), []
    loss = ClimbLoss(square, heads=head, beta=observer)
    kind = torch.optim.LBFGS if closures else torch.optim.SGD
    optimizer = kind(head.parameters(), lr=0.1, **({"max_iter": 2} if closures else {}))

    def call(scale: float = 1.0) -> Tensor:
        optimizer.zero_grad()
        value = loss(head(scale * torch.randn(8, 4)))
        value.backward()
        rates.append(loss.terms.rate.item())
        return value

    for _ in range(3):
        if not closures:
            call(scale=2.0)
        optimizer.step(call)
    assert len(rates) == 6
    assert [step for step, _ in observer.seen] == [0, 1]
    means = [(one + two) / 2 for one, two in zip(rates[::2], rates[1::2], strict=True)]
    assert [rate for _, rate in observer.seen] == pytest.approx(means[:2])
    assert loss.climb_state()["rates"] == pytest.approx([2, *rates[4:]])


def test_a_state_is_a_copy_that_loads_with_weights_only() -> None:
    observer = Observer()
    loss = ClimbLoss(torch.sum, heads=GaussianHead(4), beta=observer)
    state = loss.climb_state()
    observer.seen.append((0, 1.0))
    assert state["schedule"]["Observer"] == {"seen": [], "last": 3.0}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda one: 3.0, "Wrong must return a vector with one rate per sample, got float"),
        (lambda one: one.mean.square(), r"one rate per sample, got shape \(8, 4\)"),
        (lambda one: one.mean.square().sum(), r"one rate per sample, got shape \(\)"),
        (lambda one: one.mean.square().sum(dim=-1).detach(), "have no gradient"),
    ],
    ids=["no tensor", "per dimension", "scalar", "detached"],
)
def test_what_is_no_vector_of_rates_is_refused(output: Any, message: str) -> None:
    class Wrong(Prior):
        def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
            return output(posteriors[0])

    head = GaussianHead(4)
    loss = ClimbLoss(torch.sum, heads=head, beta=0.1, prior=Wrong())
    with pytest.raises((TypeError, ValueError), match=message):
        loss(head(torch.randn(8, 4)))


def test_a_prior_runs_outside_autocast_in_full_precision() -> None:
    seen = []

    class Half(Prior):
        def forward(self, posteriors: Sequence[Posterior]) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return posteriors[0].mean.square().sum(dim=-1).half()

    head = GaussianHead(4)
    loss = ClimbLoss(torch.sum, heads=head, beta=0.1, prior=Half())
    with torch.autocast("cpu", torch.bfloat16):
        loss(head(torch.randn(8, 4, requires_grad=True)))
    assert seen == [False]
    assert loss.terms.rate.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": lambda width: nn.Identity()}, TypeError, "must return a Prior, got Identity"),
        ({"prior": 3}, TypeError, "prior must be a name, a Prior or a function of a wid.*got 3"),
        ({"prior": LearnedPrior(4), "views": 2}, ValueError, "'LearnedPrior' has no use for it"),
        ({"prior": LearnedPrior(3)}, ValueError, "LearnedPrior is 3 wide, .* the head are 4"),
        ({"prior": lambda width: LearnedPrior(1)}, ValueError, "LearnedPrior is 1 wide"),
        ({"prior": Prior()}, TypeError, r"Prior must define forward\(self, posteriors\)"),
        ({"beta": TargetRate}, TypeError, r"the class TargetRate: pass one of it, TargetRate\("),
        ({"beta": int}, TypeError, "the class int"),
        ({"beta": Schedule()}, TypeError, r"Schedule must define __call__\(self, step\)"),
    ],
)
def test_what_is_unfinished_or_does_not_fit_leaves_the_model_alone(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = mlp(6, 6, 4)
    before = repr(net)
    with pytest.raises(error, match=message):
        wrap(torch.sum, student=net, **{"beta": 0.1, **options})
    assert repr(net) == before


@pytest.mark.parametrize("beta", [torch.tensor([0.1, 0.2]), torch.empty(0)])
def test_a_beta_that_is_no_scalar_is_refused(beta: Tensor) -> None:
    head = GaussianHead(4)
    loss = ClimbLoss(torch.sum, heads=head, beta=lambda step: beta)
    with pytest.raises(ValueError, match=r"a number or a scalar tensor, got shape"):
        loss(head(torch.randn(8, 4)))


def test_a_beta_with_a_gradient_is_a_constant() -> None:
    beta, head = torch.tensor([0.1], requires_grad=True), GaussianHead(4)
    loss = ClimbLoss(torch.sum, heads=head, beta=lambda step: beta)
    value = loss(head(torch.randn(8, 4)))
    value.backward()
    assert value.shape == ()
    assert beta.grad is None
    assert not loss.terms.beta.requires_grad
