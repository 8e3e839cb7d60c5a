"""Each warning is seen to fire in a run made to collapse, and not in its healthy twin."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from climb_plugin import ClimbLoss, GaussianHead
from climb_plugin._run.collapse import BASE_CHECKS, EVERY, POSTERIOR_CHECKS, CollapseWatch
from climb_plugin.gaussian import kl_to_standard_normal
from climb_plugin.head import Posterior
from climb_plugin.schedule import Linear, Schedule

POSTERIOR_CALLS, BASE_CALLS = EVERY * POSTERIOR_CHECKS, EVERY * BASE_CHECKS
DIM = 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: Tensor, std: float) -> Posterior:
    return Posterior(mean, torch.full_like(mean, std).log() * 2)


HEALTHY = gaussian(normal(16, DIM), 0.1)
PRIOR = gaussian(0.01 * normal(16, DIM), 0.99)
POINT = gaussian(1 + 1e-3 * normal(16, DIM), 0.1)
POINTS_IN_NOISE = gaussian(normal(16, DIM), 30.0)


class Caught:
    """What a watch warns of, by call."""

    def __init__(self, watch: CollapseWatch | None = None) -> None:
        self.watch = watch or CollapseWatch()
        self.calls = 0
        self.messages: list[tuple[int, str]] = []

    def see(
        self,
        *heads: Posterior | Sequence[Posterior],
        times: int,
        beta: float | Tensor = 0.1,
        base: Callable[..., Tensor] = torch.sum,
        value: float = 1.0,
        view: bool = False,
    ) -> Caught:
        calls = [[head] if isinstance(head, Posterior) else list(head) for head in heads]
        rates = [torch.cat([kl_to_standard_normal(*p).flatten() for p in views]) for views in calls]
        for _ in range(times):
            self.calls += 1
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.watch.observe(
                    base=base,
                    value=torch.tensor(value),
                    beta=beta,
                    rates=None if view else rates,
                    posteriors=calls,
                )
            self.messages += [(self.calls, str(warning.message)) for warning in caught]
        return self

    @property
    def what(self) -> list[tuple[int, str]]:
        return [(call, text.split(" has collapsed")[0]) for call, text in self.messages]


class TestSigns:
    def test_posterior_at_the_prior(self) -> None:
        seen = Caught().see(PRIOR, times=3 * BASE_CALLS)
        assert seen.what == [(POSTERIOR_CALLS, "CLIMB: the posterior")]
        assert "beta=0.1 is too high" in seen.messages[0][1]
        assert "warm up longer" in seen.messages[0][1]

    def test_message_has_the_numbers_in_nats_and_bits(self) -> None:
        ((_, text),) = Caught().see(PRIOR, times=POSTERIOR_CALLS).messages
        rate = kl_to_standard_normal(*PRIOR).mean().item()
        assert f"The rate is {rate:.3g} nats ({rate / 0.6931472:.3g} bits)" in text
        ratio = PRIOR.mean.var(dim=0, correction=0) / 0.99**2
        signal = (1 + ratio).log().sum().item() / 2
        assert f"now {signal:.3g} nats ({signal / 0.6931472:.3g} bits) at most" in text

    def test_embedding_at_one_point(self) -> None:
        seen = Caught().see(POINT, times=3 * BASE_CALLS)
        assert seen.what == [(BASE_CALLS, "CLIMB: the base")]
        assert "std of the normalised embedding times sqrt(D) is 0.00" in seen.messages[0][1]
        assert "ln K" not in seen.messages[0][1]

    @pytest.mark.parametrize(
        "center", [torch.zeros(1, 1, 20), SimpleNamespace(center=torch.zeros(1, 20))]
    )
    def test_base_loss_pinned_at_ln_k(self, center: object) -> None:
        def base() -> Tensor:
            raise AssertionError

        base.center = center  # type: ignore[attr-defined]
        seen = Caught().see(HEALTHY, times=3 * BASE_CALLS, base=base, value=3.0)
        assert seen.what == [(BASE_CALLS, "CLIMB: the base")]
        assert "the base loss is 3, pinned at ln K = 2.996 for K = 20" in seen.messages[0][1]
        for value in (2.9, 3.1):
            assert Caught().see(HEALTHY, times=BASE_CALLS, base=base, value=value).what == []

    @pytest.mark.parametrize("center", [None, 3.0, torch.zeros(()), torch.zeros(4, 1)])
    def test_without_classes_nothing_is_pinned(self, center: object) -> None:
        base = SimpleNamespace(center=center)
        assert Caught().see(HEALTHY, times=BASE_CALLS, base=base, value=0.0).what == []  # type: ignore[arg-type]

    def test_healthy(self) -> None:
        assert Caught().see(HEALTHY, times=3 * BASE_CALLS).what == []

    def test_beta_0_does_not_collapse_a_posterior(self) -> None:
        assert Caught().see(PRIOR, times=BASE_CALLS, beta=0.0).what == []
        assert Caught().see(PRIOR, times=BASE_CALLS, beta=torch.tensor(0.0)).what == []
        assert len(Caught().see(PRIOR, times=BASE_CALLS, beta=torch.tensor(0.1)).what) == 1

    def test_a_collapsed_posterior_may_pin_the_base_loss(self) -> None:
        base = SimpleNamespace(center=torch.zeros(1, 20))
        seen = Caught().see(PRIOR, times=2 * BASE_CALLS, base=base, value=3.0)  # type: ignore[arg-type]
        assert [what for _, what in seen.what] == ["CLIMB: the posterior"]

    def test_on_the_way_to_the_prior_neither_is_blamed(self) -> None:
        halfway = gaussian(0.1 + 1e-3 * normal(16, DIM), 0.6)
        assert Caught().see(halfway, times=BASE_CALLS).what == []

    def test_it_must_last(self) -> None:
        seen = Caught().see(PRIOR, times=POSTERIOR_CALLS - 1).see(HEALTHY, times=EVERY)
        assert seen.see(PRIOR, times=POSTERIOR_CALLS - EVERY).what == []
        assert len(seen.see(PRIOR, times=EVERY).what) == 1
        seen = Caught().see(POINT, times=BASE_CALLS - 1).see(HEALTHY, times=EVERY)
        assert seen.see(POINT, times=BASE_CALLS - EVERY).what == []

    def test_each_once(self) -> None:
        seen = Caught()
        for _ in range(2):
            seen.see(PRIOR, times=BASE_CALLS).see(POINT, times=BASE_CALLS)
        assert [what for _, what in seen.what] == ["CLIMB: the posterior", "CLIMB: the base"]

    def test_one_of_several_heads_is_enough(self) -> None:
        assert len(Caught().see(HEALTHY, PRIOR, times=BASE_CALLS).what) == 1
        assert len(Caught().see(HEALTHY, POINT, times=BASE_CALLS).what) == 1

    def test_one_of_several_views_is_not(self) -> None:
        assert Caught().see([HEALTHY, POINT], times=BASE_CALLS).what == []

    def test_calls_that_each_hold_the_views_of_one_image(self) -> None:
        calls = [Posterior(*(part[[i, i]] for part in HEALTHY)) for i in range(8)]
        assert Caught().see(calls, times=BASE_CALLS).what == []
        alike = [Posterior(*(part[:2] for part in POINT)) for _ in range(8)]
        assert len(Caught().see(alike, times=BASE_CALLS).what) == 1

    def test_view_prior(self) -> None:
        seen = Caught().see(POINT, times=BASE_CALLS, view=True)
        assert seen.what == [(BASE_CALLS, "CLIMB: the base")]
        assert "The posterior has not" not in seen.messages[0][1]
        seen = Caught().see(POINTS_IN_NOISE, times=BASE_CALLS, view=True)
        assert seen.what == [(POSTERIOR_CALLS, "CLIMB: the posterior")]
        assert "The rate is" not in seen.messages[0][1]

    def test_a_batch_of_one_says_nothing(self) -> None:
        one = Posterior(*(part[:1] for part in POINT))
        assert Caught().see(one, times=BASE_CALLS).what == []

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
    def test_a_copy_starts_anew(self, how: Callable[[CollapseWatch], CollapseWatch]) -> None:
        seen = Caught().see(PRIOR, times=POSTERIOR_CALLS)
        again = Caught(how(seen.watch)).see(PRIOR, times=POSTERIOR_CALLS)
        assert again.what == seen.what


class Learner(nn.Module):
    """Two noisy views of clusters through an MLP that ends in a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, DIM))
        self.head = GaussianHead(DIM)
        self.clusters = normal(20, 16, seed=7)

    def forward(self, noise: float) -> list[Tensor]:
        images = self.clusters[torch.randint(20, (32,))] + 0.3 * torch.randn(32, 16)
        return [self.head(self.layers(images + noise * torch.randn(32, 16))) for _ in range(2)]


def contrast(one: Tensor, two: Tensor) -> Tensor:
    """InfoNCE over the batch."""
    similarity = F.normalize(one, dim=1) @ F.normalize(two, dim=1).T / 0.5
    return F.cross_entropy(similarity, torch.arange(len(one)))


def attract(one: Tensor, two: Tensor) -> Tensor:
    """Pulls views together, and nothing keeps images apart."""
    return -F.cosine_similarity(one, two).mean()


def train(
    base: Callable[..., Tensor], *, beta: float | Schedule, steps: int, lr: float = 1e-2
) -> list[str]:
    """The warnings of a training."""
    model = Learner()
    loss = ClimbLoss(base, heads=model.head, beta=beta)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            loss(*model(0.1)).backward()
            optimizer.step()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


class TestRuns:
    def test_too_high_a_beta(self) -> None:
        (message,) = train(contrast, beta=10.0, steps=1200)
        assert message.startswith("CLIMB: the posterior has collapsed: for 200 calls")

    def test_nothing_that_keeps_images_apart(self) -> None:
        (message,) = train(attract, beta=1e-5, steps=1500, lr=0.03)
        assert message.startswith("CLIMB: the base has collapsed: for 1000 calls")

    @pytest.mark.parametrize("beta", [0.0, Linear(0.02, warmup=300)])
    def test_healthy(self, beta: float | Schedule) -> None:
        assert train(contrast, beta=beta, steps=1200) == []


def test_neither_numbers_nor_random_state_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, Tensor]:
        model = Learner()
        loss = ClimbLoss(contrast, heads=model.head, beta=1.0)
        for _ in range(2 * EVERY):
            loss(*model(0.1)).backward()
        return torch.cat([p.grad.flatten() for p in model.layers.parameters()]), torch.rand(1)  # type: ignore[union-attr]

    watched = run()
    monkeypatch.setattr(CollapseWatch, "observe", lambda self, **_: None)
    for one, other in zip(watched, run(), strict=True):
        assert torch.equal(one, other)


def test_no_graph_is_kept() -> None:
    watch = CollapseWatch()
    mean = torch.ones(4, DIM, requires_grad=True) * 2
    kept = weakref.ref(mean)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for _ in range(POSTERIOR_CALLS):
            rates = [kl_to_standard_normal(mean, mean)]
            calls = [[Posterior(mean, mean)]]
            watch.observe(base=torch.sum, value=mean.sum(), beta=1.0, rates=rates, posteriors=calls)
    del mean, rates, calls
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("prior", "is_fixed"),
    [("standard", True), ("learned", True), ("view", False), ("backward", False)],
)
def test_rates_to_other_views_are_no_distance_to_a_prior(
    prior: str, is_fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(CollapseWatch, "observe", lambda self, **what: seen.append(what["rates"]))
    head = GaussianHead(4)
    loss = ClimbLoss(lambda *z: torch.stack(z).mean(), heads=head, beta=0.1, prior=prior)
    loss(head(torch.randn(5, 4)), head(torch.randn(5, 4)))
    assert [rates is not None for rates in seen] == [is_fixed]
