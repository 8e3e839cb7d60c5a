"""Rule 6: the criterion is the only door to the base loss."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from toys import square

from climb_plugin import ClimbLoss, GaussianHead, wrap
from climb_plugin.climb import Climb

SHORT = ["terms", "heads", "beta", "step", "schedule", "alpha", "prior", "free_nats", "set_step"]


def make(base: Any, **options: Any) -> ClimbLoss:
    settings: dict[str, Any] = {"heads": GaussianHead(4), "beta": 1e-3, **options}
    return ClimbLoss(base, **settings)


@dataclass
class Parts:
    total: Tensor
    value: float


class Base(nn.Module):
    """As the losses of lightly and of pytorch-metric-learning are."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 0.1
        self.cache = torch.zeros(3)
        self._private = 7
        self.proxies = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("center", torch.full((1,), 0.5))
        self.distance = nn.Identity()

    @property
    def doubled(self) -> float:
        return 2 * self.temperature

    def forward(self, z: Tensor) -> Tensor:
        self.later = 3
        return (self.distance(z) @ self.proxies - self.center).square().mean() / self.temperature

    def update_center(self, z: Tensor) -> None:
        self.center += z.detach().mean()

    def masked(self, z: Tensor) -> Tensor:
        return z[:2].mean()

    def parts(self, z: Tensor, kind: str = "dataclass") -> Any:
        value = self(z)
        found = {
            "dataclass": Parts(value, 1.0),
            "dict": {"total": value},
            "tuple": (0.0, [value]),
            "tensor": value,
        }
        return found[kind]


class TestClashes:
    @pytest.mark.parametrize("name", SHORT)
    def test_a_name_that_both_have_is_refused_both_ways(self, name: str) -> None:
        class Named(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                return z.square().mean()

        base = Named()
        setattr(base, name, "theirs")
        loss = make(base)
        with pytest.raises(AttributeError, match=rf"criterion\.base\.{name} for that of the base"):
            getattr(loss, name)
        with pytest.raises(AttributeError, match=rf"criterion\.climb\.{name} for CLIMB's"):
            setattr(loss, name, "another")
        assert getattr(loss.base, name) == "theirs"
        loss(loss.climb.heads[0](torch.randn(3, 4)))
        assert getattr(loss.climb, name) is not None

    def test_a_name_that_the_base_sets_later(self) -> None:
        class Later(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                self.alpha = 0.25
                return self.alpha * z.square().mean()

        loss = make(Later(), alpha=0.5)
        assert loss.alpha == 0.5
        loss(loss.heads[0](torch.randn(3, 4)))
        with pytest.raises(AttributeError, match=r"criterion\.base\.alpha"):
            _ = loss.alpha

    @pytest.mark.parametrize("base", [square, nn.MSELoss()])
    def test_without_a_clash_the_short_names_are_climbs(self, base: Any) -> None:
        loss = make(base, alpha=0.5)
        assert (loss.alpha, loss.beta, loss.prior, loss.step) == (0.5, 1e-3, "standard", 0)
        loss.alpha = 0.75
        assert loss.climb.alpha == 0.75

    def test_there_are_no_more_names_than_these(self) -> None:
        """What ClimbLoss adds to nn.Module; each new one may hide one of a base loss."""
        added = {name for name in dir(ClimbLoss) if not name.startswith("_")} - set(dir(nn.Module))
        assert added == {*SHORT, "climb_state", "load_climb_state"}
        own = set(vars(make(square))) - set(vars(nn.Module()))
        assert {name for name in own if not name.startswith("_")} == {"climb", "base"}
        assert set(SHORT) <= set(dir(Climb)) | {"heads", "schedule", "alpha", "prior", "free_nats"}


class TestAttributes:
    @pytest.mark.parametrize(
        "name", ["temperature", "cache", "_private", "proxies", "center", "distance", "doubled"]
    )
    def test_are_read_through_it(self, name: str) -> None:
        loss = make(Base())
        found, expected = getattr(loss, name), getattr(loss.base, name)
        assert found is expected or found == expected
        assert name in dir(loss)

    @pytest.mark.parametrize("name", ["temperature", "_private", "new", "_new"])
    def test_are_set_patched_and_deleted_through_it(self, name: str) -> None:
        loss, plain = make(Base()), Base()
        for criterion in (loss, plain):
            setattr(criterion, name, 0.25)
            with mock.patch.object(criterion, name, 0.5):
                assert getattr(criterion, name) == 0.5
            assert getattr(criterion, name) == 0.25
            delattr(criterion, name)
            assert not hasattr(criterion, name)
        assert not hasattr(loss.base, name)

    def test_lookups_by_name(self) -> None:
        loss = make(Base(), prior="learned")
        assert loss.get_buffer("center") is loss.base.center
        assert loss.get_buffer("base.center") is loss.base.center
        assert loss.get_parameter("proxies") is loss.base.proxies
        assert loss.get_parameter("climb_priors.0.mean") is loss.climb_priors[0].mean
        assert loss.get_submodule("distance") is loss.base.distance
        with pytest.raises(AttributeError, match="no_such_thing"):
            loss.get_buffer("no_such_thing")

    @pytest.mark.parametrize("base", [Base, lambda: square], ids=["module", "function"])
    def test_members_may_be_listed_before_the_first_call(self, base: Callable[[], Any]) -> None:
        loss = make(base())
        names = {name for name, _ in inspect.getmembers(loss)}
        assert "climb_state" in names
        assert not hasattr(loss, "terms")
        assert repr(loss).startswith("ClimbLoss(")

    @pytest.mark.parametrize("what", ["parameter", "buffer", "module"])
    @pytest.mark.parametrize("how", ["set", "registered"])
    def test_what_the_user_adds_is_saved_and_loaded(self, what: str, how: str) -> None:
        def added(criterion: Any) -> Any:
            values = {
                "parameter": nn.Parameter(torch.ones(3)),
                "buffer": torch.ones(3),
                "module": nn.Linear(2, 2),
            }
            if how == "set" and what == "buffer":
                criterion.register_buffer("mine", torch.zeros(3))
                criterion.mine = values[what]
            elif how == "set":
                criterion.mine = values[what]
            elif what == "module":
                criterion.add_module("mine", values[what])
            else:
                getattr(criterion, f"register_{what}")("mine", values[what])
            return criterion

        saved, fresh, plain = added(make(Base())), added(make(Base())), added(Base())
        assert list(saved.state_dict()) == list(plain.state_dict())
        values = {name: value.clone() for name, value in saved.state_dict().items()}
        with torch.no_grad():
            for tensor in [*fresh.parameters(), *fresh.buffers()]:
                tensor.zero_()
        fresh.load_state_dict(values)
        for name, value in values.items():
            assert torch.equal(fresh.state_dict()[name], value)
        plain.load_state_dict(values)

    @pytest.mark.parametrize(
        "how", ["register_buffer", "register_parameter", "add_module", "register_module"]
    )
    def test_registering_is_a_method_that_may_be_overridden(self, how: str) -> None:
        """Of a subclass, which calls super(), and of one criterion."""
        seen: list[str] = []

        class Own(ClimbLoss):
            pass

        def own(self: ClimbLoss, name: str, value: Any) -> None:
            seen.append(name)
            getattr(super(Own, self), how)(name, value)

        setattr(Own, how, own)
        criterion = Own(Base(), heads=GaussianHead(4), beta=0.1)
        getattr(criterion, how)("extra", None)
        assert "extra" in seen
        registered = (criterion.base._buffers, criterion.base._parameters, criterion.base._modules)
        assert any("extra" in names for names in registered)
        criterion.load_state_dict(criterion.state_dict())
        with mock.patch.object(criterion, how) as patched:
            getattr(criterion, how)("more", None)
        patched.assert_called_once_with("more", None)

    def test_training_reaches_the_base(self) -> None:
        loss = make(Base())
        loss.eval()
        assert not loss.base.training
        loss.training = True
        assert loss.base.training

    def test_forward_cannot_be_replaced(self) -> None:
        loss = make(Base())
        with pytest.raises(AttributeError, match=r"set criterion\.base\.forward"):
            loss.forward = square

    @pytest.mark.parametrize("name", SHORT)
    def test_climbs_own_are_not_deleted(self, name: str) -> None:
        with pytest.raises(AttributeError, match=f"{name} is CLIMB's"):
            delattr(make(square), name)

    def test_names_of_torchs_modules_that_the_base_has_set(self) -> None:
        """A base may call something of its own ``type`` or ``half``."""
        base = Base()
        base.type = "cosine"
        loss = make(base)
        assert loss.type == "cosine"
        loss.type = "euclidean"
        assert base.type == "euclidean"
        assert make(Base()).type is not base.type

    @pytest.mark.parametrize("value", [-1.0, float("nan"), "0.5", None])
    def test_settings_are_checked_when_they_are_set(self, value: Any) -> None:
        loss = make(square, alpha=0.5)
        for name in ("alpha", "schedule"):
            with pytest.raises((TypeError, ValueError), match=r"finite|must be a number"):
                setattr(loss, name, value)
        assert (loss.alpha, loss.beta) == (0.5, 1e-3)
        loss.schedule = 0.25
        assert loss.beta == 0.25

    def test_of_a_function(self) -> None:
        def base(z: Tensor) -> Tensor:
            return base.scale * z.mean()  # type: ignore[attr-defined, no-any-return]

        base.scale = 2.0  # type: ignore[attr-defined]
        loss = make(base)
        assert loss.scale == 2.0
        loss.note = "mine"
        assert loss.note == "mine"
        assert not hasattr(base, "note")


def collect(result: Any) -> Any:
    return [*result] if isinstance(result, Iterator) else result


class TestMethods:
    @pytest.mark.parametrize("kind", ["dataclass", "dict", "tuple", "tensor"])
    def test_whose_result_depends_on_a_sample_raise(self, kind: str) -> None:
        loss = make(Base())
        (head,) = loss.heads
        sample = head(torch.randn(5, 4))
        with pytest.raises(
            RuntimeError, match=r"parts of the base .*criterion\.base\.parts\(\.\.\.\)"
        ):
            loss.parts(sample, kind=kind)
        assert loss.base.parts(sample, kind=kind) is not None
        with pytest.raises(RuntimeError, match="masked of the base loss depends on a sample"):
            loss.masked(sample)

    @pytest.mark.parametrize(
        "method",
        [
            functools.partialmethod(Base.parts, kind="dict"),
            functools.singledispatchmethod(Base.masked),
            lambda self, z: (part for part in [1.0, self(z)]),
            lambda self, z: map(self, [z]),
        ],
        ids=["partialmethod", "singledispatchmethod", "generator", "map"],
    )
    def test_so_do_other_kinds_of_methods(self, method: Any) -> None:
        base = type("Other", (Base,), {"other": method})()
        loss = make(base)
        sample, rows = loss.heads[0](torch.randn(5, 4)), torch.randn(5, 4)
        with pytest.raises(RuntimeError, match="other of the base loss depends on a sample"):
            collect(loss.other(sample))
        assert str(collect(loss.other(rows))) == str(collect(loss.base.other(rows)))

    def test_so_do_those_of_a_compiled_base(self) -> None:
        loss = make(torch.compile(Base(), backend="eager"))
        with pytest.raises(RuntimeError, match=r"parts of the base .*criterion\.base\.parts"):
            loss.parts(loss.heads[0](torch.randn(5, 4)), kind="dict")

    def test_so_does_an_attribute_that_depends_on_one(self) -> None:
        class Keeping(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                self.pull = z.square().mean()
                return self.pull + 1

        loss = make(Keeping())
        loss(loss.heads[0](torch.randn(5, 4)))
        with pytest.raises(AttributeError, match=r"pull of the base .*criterion\.base\.pull"):
            _ = loss.pull
        assert loss.base.pull.requires_grad

    def test_others_pass(self) -> None:
        loss = make(Base())
        (head,) = loss.heads
        rows = torch.randn(5, 4)
        loss.update_center(head(rows))
        assert loss.center != 0.5
        with torch.no_grad():
            assert loss.masked(head(rows)).shape == ()
        assert loss.parts(rows, kind="dict")["total"].requires_grad
        assert torch.equal(loss.masked(rows), loss.base.masked(rows))

    def test_without_heads_all_pass(self) -> None:
        loss = make(Base(), heads=(), beta=0)
        assert loss.parts.__func__ is Base.parts


class Sum(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, z: Tensor) -> Tensor:
        return self.loss(z) + z.abs().mean()


NESTS: dict[str, Callable[[ClimbLoss], Any]] = {
    "itself": lambda inner: inner,
    "function": lambda inner: lambda z: inner(z) + z.abs().mean(),
    "module": Sum,
    "module in a module": lambda inner: nn.Sequential(Sum(inner)),
    "function in a module": lambda inner: Sum(lambda z: inner(z)),
}


class TestNesting:
    @pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
    @pytest.mark.parametrize("one_head", [True, False])
    def test_wrapped_in_wrapped_is_refused(
        self, nest: Callable[[ClimbLoss], Any], one_head: bool
    ) -> None:
        head, other = GaussianHead(4), GaussianHead(4)
        inner = make(square, heads=head)

        def both() -> None:
            outer = make(nest(inner), heads=head if one_head else other)
            outer(outer.heads[0](head(torch.randn(5, 4))))

        with pytest.raises((ValueError, RuntimeError), match="the rate would count twice"):
            both()
        inner(head(torch.randn(5, 4))).backward()

    def test_wrap_refuses_it_before_it_changes_anything(self) -> None:
        students = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
        inner = wrap(square, student=students[0], beta=1e-3)
        before = list(students[1].state_dict())
        for base in (inner, Sum(inner)):
            with pytest.raises(ValueError, match="a ClimbLoss already"):
                wrap(base, student=students[1], beta=1e-3)
            assert list(students[1].state_dict()) == before

    def test_an_error_in_the_base_ends_the_call(self) -> None:
        def fails(z: Tensor) -> Tensor:
            raise KeyError("of the base")

        loss, healthy = make(fails), make(square)
        with pytest.raises(KeyError):
            loss(loss.heads[0](torch.randn(5, 4)))
        healthy(healthy.heads[0](torch.randn(5, 4))).backward()

    def test_one_without_heads_may_stand_in_another(self) -> None:
        inner = ClimbLoss(square, heads=(), beta=0)
        loss = make(lambda z: inner(z))
        loss(loss.heads[0](torch.randn(5, 4))).backward()
        assert loss.terms.rate > 0

    def test_a_sum_of_two_outside_is_two_rates(self) -> None:
        head = GaussianHead(4)
        losses = [make(square, heads=head), make(torch.mean, heads=head)]
        sample = head(torch.randn(5, 4))
        total = sum(loss(sample) for loss in losses)
        base = sum(loss.terms.base for loss in losses)
        torch.testing.assert_close(total.detach(), base + 2e-3 * losses[0].terms.rate)


def test_what_a_base_returns_beside_a_scalar_is_refused_before_anything_is_trained() -> None:
    returns: dict[str, Callable[[Tensor], Any]] = {
        "tuple": lambda z: (z.square().mean(), {"std": 1.0}),
        "dict": lambda z: {"loss": z.square().mean()},
        "list": lambda z: [z.square().mean()],
        r"shape \(5,\)": lambda z: z.square().mean(dim=1),
        "float": lambda z: z.square().mean().item(),
        "NoneType": lambda z: None,
    }
    for got, base in returns.items():
        loss = make(base)
        with pytest.raises((TypeError, ValueError), match=f"return a scalar tensor, got {got}"):
            loss(loss.heads[0](torch.randn(5, 4)))
        assert not hasattr(loss, "terms")
        assert loss.step == 0


class Nested(nn.Module):
    """A loss around a loss, whose layers are called alike on both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.base = nn.Linear(1, 1), nn.Module()
        self.base.net = nn.Linear(1, 1)

    def forward(self, z: Tensor) -> Tensor:
        return z.square().mean()


def test_keys_that_are_alike_but_for_the_level() -> None:
    plain, loss, other = Nested(), make(Nested()), make(Nested())
    loss.load_state_dict(plain.state_dict())
    other.load_state_dict(dict(reversed(loss.state_dict().items())))
    for name, value in plain.state_dict().items():
        assert torch.equal(loss.state_dict()[name], value)
        assert torch.equal(other.base.state_dict()[name], value)


@dataclass(slots=True)
class Slots:
    value: Tensor


class Own:
    def __init__(self, value: Tensor) -> None:
        self.value, self.count = value, 3


class Group(deque[Tensor]):
    def __init__(self, value: Tensor) -> None:
        super().__init__([value])
        self.value = value


@pytest.mark.parametrize("kind", [Slots, lambda value: SimpleNamespace(value=value), Own, Group])
def test_results_of_other_kinds_are_looked_into(kind: Callable[..., Any]) -> None:
    base = Base()
    type(base).parts = lambda self, z: kind(value=z.sum())
    try:
        loss = make(base)
        assert float(loss.parts(torch.ones(2, 4)).value) == 8.0
        with pytest.raises(RuntimeError, match="depends on a sample"):
            loss.parts(loss.heads[0](torch.randn(5, 4, requires_grad=True)))
    finally:
        del type(base).parts


def test_beta_can_be_set() -> None:
    loss = make(Base())
    loss.beta = 0.02
    assert loss.beta == 0.02
    assert repr(loss.schedule) == "Constant(beta=0.02)"
    with pytest.raises(ValueError, match="beta must be finite and not negative, got -1"):
        loss.beta = -1


def test_a_property_of_the_base_is_computed_once() -> None:
    class Counting(Base):
        @property
        def count(self) -> int:
            self.calls += 1
            return self.calls

    base = Counting()
    base.calls = 0
    loss = make(base)
    assert [loss.count, loss.count] == [1, 2]


def test_methods_that_a_base_which_is_no_module_has_in_vain_are_told() -> None:
    class Plain:
        def __call__(self, z: Tensor) -> Tensor:
            return z.square().mean()

        def state_dict(self) -> dict[str, Any]:
            return {"center": 0.0}

    with pytest.warns(UserWarning, match=r"has state_dict:.*criterion\.base\.state_dict\(") as said:
        make(Plain())
    assert len(said) == 1
    assert said[0].filename == __file__


def test_copies_are_doors_of_their_own() -> None:
    loss = make(Base())
    twin = copy.deepcopy(loss)
    twin.temperature = 0.7
    assert (loss.temperature, twin.temperature) == (0.1, 0.7)
    assert twin.climb is not loss.climb
    assert twin.heads[0] is not loss.heads[0]
