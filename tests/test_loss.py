from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import rates_of, rows, square

from climb_plugin import ClimbLoss, ClimbTerms, GaussianHead
from climb_plugin.schedule import Linear, TargetRate

PRIORS = ["standard", "learned", "view"]
BAD = [-0.1, math.nan, math.inf]
VIEWS = "views must be a positive int, or some of them, got"


def make(base: Callable[..., Tensor] = square, **options: object) -> ClimbLoss:
    settings: dict[str, object] = {"heads": GaussianHead(6), "beta": 0.1, **options}
    return ClimbLoss(base, **settings)  # type: ignore[arg-type]


def scatter(head: GaussianHead) -> None:
    """Makes the log-variance depend on the embedding."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    head.load_state_dict({**head.state_dict(), "logvar.weight": weight})


class StatefulLoss(nn.Module):
    """A loss with a buffer and a parameter, like those of lightly."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, view: Tensor, factor: float = 1.0) -> Tensor:
        self.center += 1
        return factor * self.scale * view.square().mean()


class TestValue:
    """Against torch.distributions in float64: test_precision.py."""

    @given(batch=st.integers(1, 5), copies=st.integers(1, 4), prior=st.sampled_from(PRIORS[:2]))
    def test_beta_means_the_same_at_any_batch_size_and_number_of_views(
        self, batch: int, copies: int, prior: str
    ) -> None:
        loss = make(prior=prior)
        (head,) = loss.heads
        view = rows(batch)
        loss(head(view))
        one = loss.terms.rate
        loss(*[head(view.repeat(copies, 1)) for _ in range(copies)])
        torch.testing.assert_close(loss.terms.rate, one)

    @pytest.mark.parametrize(
        ("views", "calls"),
        [(3, [[0, 1, 2]]), ((2, 1), [[0, 1], [2]]), ([1, 2], [[0], [1, 2]]), (1, [[0], [1], [2]])],
    )
    def test_views_in_one_batch_are_views(
        self, views: int | tuple[int, ...], calls: list[list[int]]
    ) -> None:
        one = make(prior="view")
        other = make(prior="view", views=views)
        inputs = [rows(seed=seed) for seed in range(3)]
        for loss in (one, other):
            scatter(loss.heads[0])
        one(*[one.heads[0](view) for view in inputs])
        other(*[other.heads[0](torch.cat([inputs[i] for i in call])) for call in calls])
        torch.testing.assert_close(other.terms.rate, one.terms.rate)

    def test_views_of_tokens_are_divided_along_the_batch(self) -> None:
        one, other = make(prior="view"), make(prior="view", views=2)
        tokens = [rows(12, seed=seed).unflatten(0, (3, 4)) for seed in range(2)]
        one(*[one.heads[0](view) for view in tokens])
        other(other.heads[0](torch.cat(tokens)))
        torch.testing.assert_close(other.terms.rate, one.terms.rate)

    @pytest.mark.parametrize(
        "split", [lambda view: view.split([9, 3]), lambda view: [view.reshape(3, 4, 6)]]
    )
    def test_every_sample_and_every_token_counts_the_same(self, split: Any) -> None:
        loss = make()
        (head,) = loss.heads
        loss(*map(head, split(rows(12))))
        torch.testing.assert_close(loss.terms.rate, rates_of(head, rows(12)).mean())

    def test_rates_of_several_heads_add_up(self) -> None:
        heads = [GaussianHead(6), GaussianHead(4)]
        loss = make(heads=heads)
        views = rows(), rows(width=4)
        loss(*(head(view) for head, view in zip(heads, views, strict=True)))
        alone = [rates_of(head, view).mean() for head, view in zip(heads, views, strict=True)]
        torch.testing.assert_close(loss.terms.rate, sum(alone))

    @pytest.mark.parametrize("prior", PRIORS)
    def test_gradient_depends_on_beta_and_is_linear_in_it(self, prior: str) -> None:
        gradients = []
        for beta in (0.0, 1.0, 2.0):
            torch.manual_seed(0)
            loss = make(prior=prior, beta=beta, heads=GaussianHead(6))
            (head,) = loss.heads
            loss(head(rows(seed=1)), head(rows(seed=2))).backward()
            assert head.logvar.weight.grad is not None
            gradients.append(head.logvar.weight.grad)
        assert not torch.equal(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[2] - gradients[1], gradients[1] - gradients[0])

    def test_priors_that_are_replaced_are_the_ones_that_count(self) -> None:
        loss = make(prior="learned")
        other = make(prior="learned").climb_priors
        loss.climb_priors = other
        loss(loss.heads[0](torch.randn(8, loss.heads[0].out_features))).backward()
        assert all(parameter.grad is not None for parameter in other.parameters())

    def test_learned_prior_is_trained_through_the_loss(self) -> None:
        loss = make(prior="learned")
        (head,) = loss.heads
        loss(head(rows() + 1)).backward()
        parameters = dict(loss.named_parameters())
        assert len(parameters) == 2
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    @pytest.mark.parametrize("prior", ["standard", "view"])
    def test_the_loss_owns_no_other_parameters(self, prior: str) -> None:
        assert list(make(prior=prior).parameters()) == []

    def test_beta_zero_with_a_head_is_the_base_loss_to_the_bit(self) -> None:
        loss = make(beta=0.0)
        (head,) = loss.heads
        sample = head(rows())
        assert torch.equal(loss(sample), square(sample))
        assert loss.terms.rate > 0

    def test_beta_zero_without_heads_is_the_base_loss(self) -> None:
        loss = make(heads=(), beta=0)
        view = rows().requires_grad_()
        assert torch.equal(loss(view), square(view))
        assert math.isnan(loss.terms.rate)

    def test_terms_are_detached_scalars(self) -> None:
        loss = make()
        (head,) = loss.heads
        loss(head(rows()))
        assert isinstance(loss.terms, ClimbTerms)
        for name, term in loss.terms._asdict().items():
            assert term.shape == (), name
            assert not term.requires_grad, name


class TestWhichPosteriorsCount:
    """More of them in test_graph.py."""

    @pytest.mark.parametrize("other", ["unused", "detached", "of a call that raised"])
    def test_not_those_that_the_value_does_not_depend_on(self, other: str) -> None:
        def base(*views: Tensor) -> Tensor:
            if any(view.abs().max() > 50 for view in views if view.requires_grad):
                raise KeyError("of the base")
            return views[0].square().mean()

        loss = make(base)
        (head,) = loss.heads
        stale = head(100 * rows(seed=5))
        if other == "of a call that raised":
            with pytest.raises(KeyError, match="of the base"):
                loss(stale)
        loss(head(rows()), *[stale.detach()] * (other == "detached"))
        torch.testing.assert_close(loss.terms.rate, rates_of(head, rows()).mean())

    def test_a_criterion_called_once_per_view_counts_each_view_once(self) -> None:
        """As in the scripts of BYOL, SimSiam and NNCLR."""
        gradients = []
        for once in (True, False):
            loss = make(beta=0.7, heads=GaussianHead(6))
            (head,) = loss.heads
            one, two = head(rows(seed=1)), head(rows(seed=2))
            total = loss(one, two) if once else 0.5 * (loss(one) + loss(two))
            total.backward()
            assert loss.step == 1
            gradients.append([p.grad for p in head.parameters()])
        for whole, halves in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, halves)


@pytest.mark.parametrize("gradients", ["of the view", "of nothing", "none"])
def test_evaluation_is_the_base_loss(gradients: str) -> None:
    loss = make()
    loss.heads[0].eval()
    view = rows().requires_grad_(gradients == "of the view")
    with torch.set_grad_enabled(gradients != "none"):
        total = loss(loss.heads[0](view))
    assert torch.equal(total, square(view))
    if gradients == "of the view":
        found, expected = (torch.autograd.grad(value, view) for value in (total, square(view)))
        assert torch.equal(found[0], expected[0])
    assert math.isnan(loss.terms.rate)
    assert loss.terms.beta == 0
    assert loss.step == 0


class TestBase:
    def test_arguments_pass_verbatim(self) -> None:
        received: list[object] = []

        def base(*args: object, **kwargs: object) -> Tensor:
            received.append((args, kwargs))
            assert isinstance(args[0], Tensor)
            return args[0].mean()

        loss = make(base)
        sample = loss.heads[0](rows())
        views, flag = [1, 2], object()
        loss(sample, views, epoch=3, flag=flag)
        ((args, kwargs),) = received
        assert args[0] is sample
        assert args[1] is views
        assert kwargs == {"epoch": 3, "flag": flag}

    def test_state_dict_is_that_of_the_base_both_ways(self) -> None:
        plain, wrapped = StatefulLoss(), make(StatefulLoss())
        plain(rows())
        wrapped.load_state_dict(plain.state_dict())
        assert torch.equal(wrapped.base.center, torch.ones(3))
        wrapped(wrapped.heads[0](rows()))
        fresh = StatefulLoss()
        fresh.load_state_dict(wrapped.state_dict())
        assert torch.equal(fresh.center, torch.full((3,), 2.0))
        assert list(wrapped.state_dict()) == list(plain.state_dict())

    def test_state_dict_inside_a_module(self) -> None:
        outer = nn.ModuleDict({"criterion": make(StatefulLoss(), prior="learned")})
        keys = set(outer.state_dict())
        assert {"criterion.center", "criterion.scale"} < keys
        assert sum("climb_priors" in key for key in keys) == 2
        outer["criterion"].base.center += 5
        twin = nn.ModuleDict({"criterion": make(StatefulLoss(), prior="learned")})
        twin.load_state_dict(outer.state_dict())
        assert torch.equal(twin["criterion"].center, torch.full((3,), 5.0))


class TestSchedule:
    def train(self, loss: ClimbLoss, steps: int) -> list[float]:
        betas = []
        for _ in range(steps):
            loss(loss.heads[0](rows())).backward()
            betas.append(loss.terms.beta.item())
        return betas

    def test_another_setting_on_resume_warns_with_both_values(self) -> None:
        state = make(beta=0.1, alpha=0.5).state_dict()
        with pytest.warns(UserWarning, match=r"alpha was 0\.5 .* and is 0\.0 now"):
            make(beta=0.1).load_state_dict(state)
        with pytest.warns(
            UserWarning, match=r"beta was Constant\(beta=0\.1\) .* Constant\(beta=0\.2\) now"
        ):
            make(beta=0.2, alpha=0.5).load_state_dict(state)

    def test_a_state_without_a_step_warns_where_it_matters(self) -> None:
        make(StatefulLoss()).load_state_dict(StatefulLoss().state_dict())
        ramped = make(StatefulLoss(), beta=Linear(1.0, warmup=4))
        with pytest.warns(UserWarning, match="no CLIMB step"):
            ramped.load_state_dict(StatefulLoss().state_dict())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": -1}, "step must be an int of 0 or more, got -1"),
            ({"step": "3"}, "step must be an int of 0 or more, got '3'"),
            ({"alpha": None}, "has step, beta, alpha, prior, free_nats, got .*: it is damaged"),
            (None, "has step, beta, alpha, prior, free_nats, got 'half a': it is damaged"),
            ({"TargetRate": {}}, "has log_beta and before, .*: it is damaged"),
            ({"TargetRate": "half a"}, "got 'half a': it is damaged"),
            ({"schedule": "half a"}, "a dict of its class and state, got 'half a'"),
            ({"TargetRate": {"log_beta": math.nan}}, "both finite, got .*nan"),
            ({"TargetRate": {"before": "3"}}, "both finite, got .*'3'"),
            ({"rates": [0, math.inf]}, "a step and finite numbers, got .*inf"),
            ({"rates": [1.5]}, r"a step and finite numbers, got \[1\.5\]"),
            ({"rates": "half a"}, "a step and finite numbers, got 'half a'"),
        ],
    )
    def test_a_damaged_state_is_refused_and_changes_nothing(
        self, change: dict[str, Any] | None, message: str
    ) -> None:
        first, second = (make(beta=TargetRate(4.0)) for _ in range(2))
        self.train(first, 2)
        state = first.state_dict()
        saved = state._metadata[""]["climb"]  # type: ignore[attr-defined]
        for name, value in (change or {}).items():
            place = saved["schedule"] if name == "TargetRate" else saved
            if value is None:
                del place[name]
            elif isinstance(value, dict) and value:
                place[name] = {**place[name], **value}
            else:
                place[name] = value
        if change is None:
            state._metadata[""]["climb"] = "half a"  # type: ignore[attr-defined]
        before = second.climb_state()
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(state)
        assert second.climb_state() == before

    @pytest.mark.parametrize(
        ("width", "prior", "message"),
        [
            (5, "learned", "size mismatch for climb_priors.0.mean"),
            (6, "standard", "Missing key.*climb_priors.0.mean"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:CLIMB's prior was")
    def test_the_state_of_another_prior_is_refused(
        self, width: int, prior: str, message: str
    ) -> None:
        state = make(heads=GaussianHead(width), prior=prior).state_dict()
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            make(prior="learned").load_state_dict(state)

    def test_a_schedule_of_the_users_own_is_checked(self) -> None:
        loss = make(beta=lambda step: 0.1 - step)
        self.train(loss, 1)
        with pytest.raises(ValueError, match=r"schedule's beta must be .* got -0\.9"):
            self.train(loss, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({"beta": beta}, ValueError, "beta must be finite and not negative, got")
            for beta in BAD
        ),
        *(({"alpha": alpha}, ValueError, "alpha must be finite and not neg") for alpha in BAD),
        *(({"free_nats": nats}, ValueError, "free_nats must be finite and not") for nats in BAD),
        ({"prior": "normal"}, ValueError, "'view', 'backward', got 'normal'"),
        ({"prior": "normal", "heads": (), "beta": 0}, ValueError, "'backward', got 'normal'"),
        ({"base": "dino"}, TypeError, "a loss that can be called, got 'dino'"),
        ({"heads": nn.Linear(6, 6)}, TypeError, "GaussianHeads, got Linear"),
        ({"heads": []}, ValueError, r"beta=0\.1\) has nothing to act on"),
        ({"heads": [GaussianHead(6)] * 2}, ValueError, "same head twice"),
        ({"views": 2}, ValueError, "views=2 is for .* prior='standard' has"),
        ({"views": 2, "prior": "learned"}, ValueError, "views=2 is for .* prior='learned' has"),
        *(
            ({"heads": heads, "beta": 0, "prior": "view", "views": views}, ValueError, VIEWS)
            for heads in ((), GaussianHead(6))
            for views in (0, -1, True, 2.0, "2", [], (1, 0), None)
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    "kind", [nn.ModuleList, iter, lambda heads: dict(enumerate(heads)).values()]
)
def test_heads_in_any_collection(kind: Callable[[list[GaussianHead]], Any]) -> None:
    heads = [GaussianHead(6), GaussianHead(6)]
    assert make(heads=kind(heads)).heads == tuple(heads)


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_set_step_of_something_else(step: object) -> None:
    with pytest.raises(ValueError, match="step must be an int of 0 or more, got"):
        make().set_step(step)  # type: ignore[arg-type]


class TestWrongCalls:
    def test_called_before_the_head(self) -> None:
        with pytest.raises(RuntimeError, match=r"no sample of heads\[0\], GaussianHead\(6, 6"):
            make()(rows())

    def test_the_head_that_was_not_called_is_named(self) -> None:
        heads = [GaussianHead(6), GaussianHead(6)]
        loss = make(heads=heads)
        with pytest.raises(RuntimeError, match=r"no sample of heads\[1\]") as error:
            loss(heads[0](rows()))
        assert "heads[0]" not in str(error.value)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_embedding_is_named(self, value: float) -> None:
        loss = make(lambda view: view.nan_to_num(0, 0, 0).mean())
        embedding = rows()
        embedding[2, 3] = value
        with pytest.raises(ValueError, match=r"rate \(now .*embedding or its mean of heads\[0\]"):
            loss(loss.heads[0](embedding))
        assert torch.isfinite(loss(loss.heads[0](rows())))

    @pytest.mark.parametrize(
        ("views", "sizes", "message"),
        [
            (1, [8], r"saw one forward call .* shape \(8, 6\)"),
            (1, [8, 4], r"have shapes \[\(8, 6\), \(4, 6\)\]"),
            (3, [8], r"views=3 does not divide .* \[\(8, 6\)\]"),
            ((2, 2), [8], r"views=\(2, 2\) does not divide .* \[\(8, 6\)\]"),
            ((4, 4, 4), [8], r"views=\(4, 4, 4\) does not divide .* \[\(8, 6\)\]"),
        ],
    )
    def test_views_that_do_not_pair_up(self, views: Any, sizes: list[int], message: str) -> None:
        loss = make(prior="view", views=views)
        with pytest.raises(ValueError, match=message):
            loss(*(loss.heads[0](rows(size)) for size in sizes))

    def test_terms_before_the_first_call(self) -> None:
        loss = make()
        with pytest.raises(AttributeError, match="call the loss first"):
            _ = loss.terms
        assert not hasattr(loss, "terms")


class TestFreeNats:
    """The value, also of a penalty that is partly free: test_fuzz.py."""

    def test_what_lies_below_has_no_gradient(self) -> None:
        embedding = torch.cat([torch.zeros(4, 6), torch.full((4, 6), 3.0)]).requires_grad_()
        loss = make(base=lambda sample: 0 * sample.sum(), free_nats=20.0)
        loss(loss.heads[0](embedding)).backward()
        assert embedding.grad is not None
        assert not embedding.grad[:4].any()
        assert embedding.grad[4:].all()
        assert loss.step == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_check_of_the_base_can_be_left_to_the_host(value: float) -> None:
    def base(sample: Tensor) -> Tensor:
        return sample.square().sum() * value

    checking, loss = make(base=base), make(base=base, check_base=False)
    with pytest.raises(ValueError, match=rf"not finite: base loss \(now {value}\)\. "):
        checking(checking.heads[0](rows()))
    assert not loss(loss.heads[0](rows())).isfinite()
    with pytest.raises(ValueError, match="not finite: rate"):
        loss(loss.heads[0](rows() * math.nan))
